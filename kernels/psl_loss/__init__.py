"""The op `psl_loss`: see op.py for its contract and reference.py for its definition."""
