"""1, 2 or 4 rows times packed weights: exact integer products of whole groups, one fp32 multiply-add a group.

A code stands for an integer, twice its e2m1 value. One `dp4a` multiplies four weights by four activations. The sum of a
group is exact in int32 and is then multiplied by its two scales in fp32. No narrower format is involved, so every scale
byte is allowed."""

import triton
import triton.language as tl

from ..common.epilogue import finish
from ..common.formats import e4m3_factor, e8m0_factor
from ..common.overlap import start_next, wait_inputs


@triton.jit
def weight_bytes(w):
    """8 codes -> (integers of the positive codes among 0..3, minus the negative ones; the same of codes 4..7), four
    int8 each, 0 where the code has the other sign.

    One `prmt` looks up four codes. Where a code's sign bit is set, `prmt` gives the sign of the table's byte, which is
    0. So each sign takes one look-up, and the sign itself costs nothing."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 n, t, h;
        mov.b32 t, 0x03020100;
        mov.b32 h, 0x0C080604;
        xor.b32 n, $4, 0x88888888;
        prmt.b32 $0, t, h, $4;
        prmt.b32 $1, t, h, n;
        shr.u32 n, n, 16;
        prmt.b32 $3, t, h, n;
        shr.u32 n, $4, 16;
        prmt.b32 $2, t, h, n; }""",
        "=&r,=&r,=&r,=&r,r",
        [w],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _activation_bytes(x):
    """8 codes -> their integers, codes 0..3 and codes 4..7, four int8 each.

    The tables hold 12 plus and 12 minus the magnitude; 12 is then subtracted without a borrow between bytes."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 n, p, q;
        xor.b32 n, $2, 0x88888888;
        prmt.b32 p, 0x0F0E0D0C, 0x18141210, $2;
        prmt.b32 q, 0x090A0B0C, 0x00040608, n;
        or.b32 p, p, q;
        add.u32 p, p, 0x74747474;
        xor.b32 $0, p, 0x80808080;
        shr.u32 n, n, 16;
        prmt.b32 q, 0x090A0B0C, 0x00040608, n;
        shr.u32 n, $2, 16;
        prmt.b32 p, 0x0F0E0D0C, 0x18141210, n;
        or.b32 p, p, q;
        add.u32 p, p, 0x74747474;
        xor.b32 $1, p, 0x80808080; }""",
        "=&r,=&r,r",
        [x],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _dot8(p0, n0, p1, n1, x0, x1):
    """The sum of eight products of integers: four times the sum of the values' products."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 d, s;
        dp4a.s32.s32 d, $1, $5, 0;
        dp4a.s32.s32 s, $2, $5, 0;
        dp4a.s32.s32 d, $3, $6, d;
        dp4a.s32.s32 s, $4, $6, s;
        sub.s32 $0, d, s; }""",
        "=r,r,r,r,r,r,r",
        [p0, n0, p1, n1, x0, x1],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def row_sums(
    weights,
    x,
    x_scales,
    m,
    first,
    K: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """fp32 [BLOCK_N, BLOCK_K/G]: the integer group sums of x's row m with `weight_bytes`, times the row's scales."""
    words = first // 8 + tl.arange(0, BLOCK_K // 8)
    groups = first // G + tl.arange(0, BLOCK_K // G)
    if K % BLOCK_K == 0:
        code = tl.load(x + m * (K // 8) + words)
        byte = tl.load(x_scales + m * (K // G) + groups).to(tl.int32)
    else:
        code = tl.load(x + m * (K // 8) + words, mask=words < K // 8, other=0)
        byte = tl.load(x_scales + m * (K // G) + groups, mask=groups < K // G, other=1).to(tl.int32)
    x0, x1 = _activation_bytes(code)
    p0, n0, p1, n1 = weights
    x0 = tl.broadcast_to(x0[None, :], (BLOCK_N, BLOCK_K // 8))
    x1 = tl.broadcast_to(x1[None, :], (BLOCK_N, BLOCK_K // 8))
    d = tl.sum(tl.reshape(_dot8(p0, n0, p1, n1, x0, x1), (BLOCK_N, BLOCK_K // G, G // 8)), axis=2)
    factor = e8m0_factor(byte) if FORMAT == "mxfp4" else e4m3_factor(byte)
    return d.to(tl.float32) * (factor * 0.25)[None, :]


@triton.jit
def load_weights(w, w_scales, row, first, K: tl.constexpr, G: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes int32 [BLOCK_N, BLOCK_K/8] and scale bytes int32 [BLOCK_N, BLOCK_K/G]; beyond K codes are 0, bytes 1."""
    words = first // 8 + tl.arange(0, BLOCK_K // 8)
    groups = first // G + tl.arange(0, BLOCK_K // G)
    if K == BLOCK_K:
        code = tl.load(w + row * (K // 8) + words[None, :])
        byte = tl.load(w_scales + row * (K // G) + groups[None, :])
    else:
        code = tl.load(w + row * (K // 8) + words[None, :], mask=(words < K // 8)[None, :], other=0)
        byte = tl.load(w_scales + row * (K // G) + groups[None, :], mask=(groups < K // G)[None, :], other=1)
    return code, byte.to(tl.int32)


@triton.jit
def gemv_kernel(
    x,
    x_scales,
    gx,
    w,
    w_scales,
    gw,
    bias,
    residual,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x int32 [M, K/8], x_scales uint8 [M, K/G], w int32 [N, K/8], w_scales uint8 [N, K/G] -> out [M, N]; M is 1, 2 or
    4. Grid (tiles of N). Weights are read before the kernel waits for its inputs."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    acc0 = tl.zeros((BLOCK_N, BLOCK_K // G), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    code, byte = load_weights(w, w_scales, row, 0, K, G, BLOCK_K)
    wait_inputs(PDL)
    start_next(PDL)
    for i in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=1):
        first = i * BLOCK_K
        factor = e8m0_factor(byte) if FORMAT == "mxfp4" else e4m3_factor(byte)
        weights = weight_bytes(code)
        if BLOCK_K < K:  # load the next step while this one computes
            code, byte = load_weights(w, w_scales, row, first + BLOCK_K, K, G, BLOCK_K)
        acc0 += row_sums(weights, x, x_scales, 0, first, K, G, BLOCK_N, BLOCK_K, FORMAT) * factor
        if M > 1:
            acc1 += row_sums(weights, x, x_scales, 1, first, K, G, BLOCK_N, BLOCK_K, FORMAT) * factor
        if M > 2:
            acc2 += row_sums(weights, x, x_scales, 2, first, K, G, BLOCK_N, BLOCK_K, FORMAT) * factor
            acc3 += row_sums(weights, x, x_scales, 3, first, K, G, BLOCK_N, BLOCK_K, FORMAT) * factor
    zero = tl.zeros((BLOCK_N,), tl.int32)
    finish(tl.sum(acc0, 1), n, zero, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
    if M > 1:
        finish(tl.sum(acc1, 1), n, zero + 1, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
    if M > 2:
        finish(tl.sum(acc2, 1), n, zero + 2, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
        finish(tl.sum(acc3, 1), n, zero + 3, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
