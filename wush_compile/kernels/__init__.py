"""Who computes a `wush::` op on a GPU. The reference in `ops/` computes every call that no provider takes.

provider.py    what a provider is
dispatch.py    the table of providers, and the choice of one for a call
register.py    puts `dispatch` behind the ops
triton/        the Triton provider: Ampere and newer
cuda.py        the CUDA C++ provider (`csrc/`): Blackwell
scaled_mm.py   cuBLASLt's FP4 product through torch: Blackwell
"""
