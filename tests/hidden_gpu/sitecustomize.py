"""Imported by every Python that a test starts: the GPUs stay hidden, whatever a launcher says (tests/conftest.py)."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
