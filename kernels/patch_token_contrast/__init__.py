"""The op `patch_token_contrast`: see op.py for its contract and reference.py for its definition."""
