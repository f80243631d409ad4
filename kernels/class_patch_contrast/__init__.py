"""The op `class_patch_contrast`: see op.py for its contract and reference.py for its definition."""
