"""The op `dense_crf`: see op.py for its contract and reference.py for its definition."""
