"""The op `random_walk`: see op.py for its contract and reference.py for its definition."""
