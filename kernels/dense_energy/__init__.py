"""The op `dense_energy`: see op.py for its contract and reference.py for its definition."""
