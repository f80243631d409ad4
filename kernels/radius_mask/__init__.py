"""The op `radius_mask`: see op.py for its contract and reference.py for its definition."""
