"""Runs `quantize` and `recommend`: stages one after another, in bounded memory, resumable, on one process or several.

run.py            `quantize` and `quantize_checkpoint`: from a model and data to a quantized model
context.py        `Run`: the devices, processes and directories of one run
inputs.py         the batches: the user's data, or text that the model samples
warm_up.py        one-time work, done in threads while the model is traced
token_weights.py  a pass forward and backward before the loop: what each token counts in second moments
likelihood.py     a model's own log-likelihood, and its gradient at a sample
loop.py           the stage loop: observe, solve, commit, propagate
variants.py       the model's graph, and further ones for batches that it does not hold for
solve_group.py    solves one group of linears of a stage
solve_experts.py  solves a product of experts of a stage, in shares
tensors.py        a stage's weights from a model in memory, and transfers to and from the compute device
streaming.py      a stage's weights from safetensors files, for a model that is never in memory as a whole
activations.py    the values of every batch between two stages
microbatch.py     how many sequences go through a stage at once
journal.py        finished stages in the output directory, so that a killed run can resume
fingerprint.py    sha256 of the data and the model, by which a run recognizes its journal
ranks.py          several processes: shares the windows and the solves over torch.distributed
progress.py       the bar and the log
survey.py         the stage loop without rewriting: what each rung of precision costs each group
costs.py          what a rung costs: measured times of a GPU (gpu_times/), a model of it, or bytes
recommend.py      `recommend`: the cheapest rung of each group for a target
"""
