"""Who computes a `wush::` op. The reference in `ops/` computes every call that no provider takes.

provider.py    what a provider is
dispatch.py    the table of providers, and the choice of one for a call
register.py    puts `dispatch` behind the ops
triton/        the Triton provider: Ampere and newer
cpu.py         the CPU provider (`csrc/cpu`): x86-64
cuda.py        the CUDA C++ provider (`csrc/`): Blackwell
facts.py       what kernels remember of a weight
libraries.py   the compiled libraries of csrc, found and loaded
scaled_mm.py   cuBLASLt's FP4 product through torch: Blackwell
"""
