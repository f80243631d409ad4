"""What `launch/prepare_data.py` does: fetch packages, compose the stampscenes, convert pretrained weights."""
