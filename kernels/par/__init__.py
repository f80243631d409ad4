"""The op `par`: see op.py for its contract and reference.py for its definition."""
