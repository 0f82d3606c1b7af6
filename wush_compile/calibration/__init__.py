"""The run of `quantize`: stages one after the other, in bounded memory, resumable, on one process or several.

    calibrate.py      the stage loop: observe, solve, commit, propagate
    tensors.py        where a stage's weights come from: a model in memory, or
    streaming.py      sharded safetensors of a model that is never loaded as a whole (read by shards.py)
    activations.py    every batch's values between two stages
    microbatch.py     how many sequences go through a stage at once
    journal.py        finished stages in the output directory, so that a killed run goes on
    team.py           what other processes do for this one: nothing, or
    distributed.py    windows and solves dealt out over torch.distributed
    progress.py       bar, log, table of groups
"""
