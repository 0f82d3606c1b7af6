"""Kernels of `wush::fp4_linear`, out [M, N] = x [M, K] times w [N, K] transposed, their launches, and the choice.

    fp4_linear.py   the op: its arguments, the choice, the fallbacks
    operands.py     the arguments as the launches take them, and their checks
    choose.py       which kernel and which tile a shape gets
    launch.py       one launch for each kernel below
    gemv.py         1, 2 or 4 rows
    gemm.py         weights decoded in registers in front of the tensor core
    hopper.py       the same for many rows on Hopper; hopper_decode.py has its register layouts
    upcast.py       packed rows to fp8 or bf16 in memory
    lane_order.py   activations of 8 or 16 bits in the same order of channels
    library.py      both operands upcast, the product by cuBLAS
    scaled.py       Blackwell's FP4 instruction
    int4.py         int8 tensor cores
    int8.py         weights of 8 bits

The host side uses the names of the op's schema (codes, scales, weight_codes, ...). Inside the kernels:

    x, x_scales, gx          codes, scale bytes and global scale of the activation; SCALED_X: gx is given
    w, w_scales, gw          the same of the weight; SCALED_W. gw: fp32 [1], or bf16 [N], a factor of each row
    x_unit                   fp32 [M], what the values of an upcast row of x, or of an e4m3 row, are multiplied by
    w_top                    uint8 [N], the largest scale byte of each weight row (MXFP4)
    bias, residual, out      [N], [M, N], [M, N]; BIAS, RESIDUAL: the operand is given
    G                        channels of a scale group: 32 (MXFP4, INT4) or 16 (NVFP4)
    BLOCK_M, BLOCK_N, BLOCK_K, STAGES    the tile of a program, the depth of its load pipeline
    SPLIT_K                  parts of K, each a program's; partials: their fp32 sums, arrivals: how many are stored
    GROUP_M                  tiles of M that are computed next to each other (`choose.GROUP_M`)
    PDL                      programmatic dependent launch (`common/overlap.py`)
"""
