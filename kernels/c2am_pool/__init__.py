"""The op `c2am_pool`: see op.py for its contract and reference.py for its definition."""
