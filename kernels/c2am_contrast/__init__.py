"""The op `c2am_contrast`: see op.py for its contract and reference.py for its definition."""
