"""Loaded last in the server that ranks are forked from: what every rank would otherwise find out for itself."""

import gc

import deepspeed.ops

# DeepSpeed tries the C compiler, once in a process, to know what it could build
getattr(deepspeed.ops, "__compatible_ops__", None)
# a garbage collection in a rank need not walk through the modules, nor copy their pages
gc.freeze()
