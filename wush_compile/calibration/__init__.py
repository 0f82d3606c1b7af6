"""The run of `quantize`: stages one after the other, in bounded memory, resumable, on one process or several.

run.py            `quantize` and `quantize_checkpoint`: from a model and data to a quantized model
loop.py           the stage loop: observe, solve, commit, propagate
solve_group.py    one group of a stage
tensors.py        where a stage's weights come from: a model in memory, or
streaming.py      sharded safetensors of a model that is never loaded as a whole
activations.py    every batch's values between two stages
microbatch.py     how many sequences go through a stage at once
journal.py        finished stages in the output directory, so that a killed run goes on
ranks.py          what other processes do: windows and solves dealt out over torch.distributed
progress.py       bar, log, table of groups
"""
