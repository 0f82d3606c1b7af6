"""`wush::fp4_grouped_linear` in Triton: each row times the weight of its own expert.

    fp4_grouped_linear.py   the op: operands, choice of a kernel, launches
    choose.py               which kernel for which sizes
    find.py                 which expert a row or a tile belongs to, found on the device from the offsets
    upcast.py               many rows expanded to fp8
    gemv.py                 few rows: one at a time, exact integer products
    gemm.py                 tensor-core products of tiles, weights decoded in registers
    hopper.py               the same on Hopper, copied and decoded while the tensor core works (Gluon)
    scaled.py               Blackwell's own FP4 instruction

The experts' products are those of `linear`, whose decoders and epilogues they share. What is added: a tile has an
expert, and its rows end where the expert's rows end. The host knows neither; it launches as many programs as any split
of the rows could need, and the programs that get no tile end at once.
"""
