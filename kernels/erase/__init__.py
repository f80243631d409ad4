"""The op `erase`: see op.py for its contract and reference.py for its definition."""
