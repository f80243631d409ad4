"""The op `dilate_regions`: see op.py for its contract and reference.py for its definition."""
