"""The op `max_upsampled_masks`: see op.py for its contract and reference.py for its definition."""
