"""How fast a config trains on this machine, and where the time goes: `launch/benchmark.py`.

`phases` says what is timed as what, `flops` what an image costs and what the device could do, `synthetic` makes the
batches, `contest` takes the turns, `show` prints and draws.
"""
