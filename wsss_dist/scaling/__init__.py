"""What a step would take on more machines than there are: `python -m wsss_dist.scaling COMMAND`, docs/scaling.md.

table    step time by part for 1 to 512 GPUs, strong and weak scaling, ZeRO 0 to 3, fp32 and bf16 (a model)
hours    the whole schedule of a config (the same model)
count    collectives of one step of the real engine, for one rank of any number (torch's fake process group)
loaders  step times of any number of ranks whose loaders take times that were measured here (a simulation)
order    time and memory of the real sampler's order (measured)
flops    operations of the training stages of a config (measured, kept in docs/scaling.json)
samples  CPU time of single training samples (measured, kept there too)
rates    all-reduce, store, checksum and disk of the ranks it is started on (measured)
"""
