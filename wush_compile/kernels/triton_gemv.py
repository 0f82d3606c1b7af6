"""Few rows times packed weights: exact integer products of whole groups, one fp32 multiply-add a group.

A code is an integer, twice its e2m1 value. Four weights times four activations are one `dp4a`; a group's sum is exact
in int32 and meets its two scales in fp32. Nothing is folded into a format of fewer bits, so every scale byte is
allowed. """

import triton
import triton.language as tl

from .triton_formats import e4m3_factor, e8m0_factor
from .triton_launch import prefetch, start_next, wait_inputs


@triton.jit
def _weight_bytes(w, signs):
    """8 codes -> (b, n of codes 0..3, b, n of codes 4..7), four int8 each: the integer is b - 127*n, n its sign.

    `prmt` looks four codes up at once; its own sign mode, on a table of 0x80 (`signs`, in a register of its own
    because it comes from memory), gives 0xFF for negative codes. """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 m, h, a;
        and.b32 m, $4, 0x77777777;
        shr.u32 h, m, 16;
        prmt.b32 m, 0x03020100, 0x0C080604, m;
        prmt.b32 h, 0x03020100, 0x0C080604, h;
        prmt.b32 a, $5, $5, $4;
        lop3.b32 $0, m, a, 0x80808080, 0x96;
        and.b32 $1, a, 0x01010101;
        shr.u32 a, $4, 16;
        prmt.b32 a, $5, $5, a;
        lop3.b32 $2, h, a, 0x80808080, 0x96;
        and.b32 $3, a, 0x01010101; }""",
        "=r,=r,=r,=r,r,r", [w, signs], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )


@triton.jit
def _activation_bytes(x):
    """8 codes -> their integers, codes 0..3 and 4..7, as four int8 each. A -0 is 0: its negation must not carry."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 m, h, a, t, c, z;
        mov.b32 t, 0x80808080;
        and.b32 m, $2, 0x77777777;
        shr.u32 h, m, 16;
        prmt.b32 m, 0x03020100, 0x0C080604, m;
        prmt.b32 h, 0x03020100, 0x0C080604, h;
        prmt.b32 a, t, t, $2;
        and.b32 a, a, 0x01010101;
        add.u32 z, m, 0x7F7F7F7F; shr.u32 z, z, 7; and.b32 a, a, z;
        mul.lo.u32 c, a, 255; xor.b32 m, m, c; add.u32 $0, m, a;
        shr.u32 a, $2, 16;
        prmt.b32 a, t, t, a;
        and.b32 a, a, 0x01010101;
        add.u32 z, h, 0x7F7F7F7F; shr.u32 z, z, 7; and.b32 a, a, z;
        mul.lo.u32 c, a, 255; xor.b32 h, h, c; add.u32 $1, h, a; }""",
        "=r,=r,r", [x], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )


@triton.jit
def _dot8(b0, n0, b1, n1, x0, x1):
    """Eight products of integers, summed: four times the product of the values."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 d, s;
        dp4a.s32.s32 d, $1, $5, 0;
        dp4a.s32.s32 s, $2, $5, 0;
        dp4a.s32.s32 d, $3, $6, d;
        dp4a.s32.s32 s, $4, $6, s;
        mad.lo.s32 $0, s, -127, d; }""",
        "=r,r,r,r,r,r,r", [b0, n0, b1, n1, x0, x1], dtype=tl.int32, is_pure=True, pack=1,
    )


@triton.jit
def _row(
    parts, x, xs, m, first, K: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MX: tl.constexpr,
):
    """fp32 [BN, BK/G]: a row's integer group sums with its weights' bytes, times its own scales."""
    words = first // 8 + tl.arange(0, BK // 8)
    groups = first // G + tl.arange(0, BK // G)
    if K % BK == 0:
        code = tl.load(x + m * (K // 8) + words)
        byte = tl.load(xs + m * (K // G) + groups).to(tl.int32)
    else:
        code = tl.load(x + m * (K // 8) + words, mask=words < K // 8, other=0)
        byte = tl.load(xs + m * (K // G) + groups, mask=groups < K // G, other=1).to(tl.int32)
    x0, x1 = _activation_bytes(code)
    b0, n0, b1, n1 = parts
    x0 = tl.broadcast_to(x0[None, :], (BN, BK // 8))
    x1 = tl.broadcast_to(x1[None, :], (BN, BK // 8))
    d = tl.sum(tl.reshape(_dot8(b0, n0, b1, n1, x0, x1), (BN, BK // G, G // 8)), axis=2)
    factor = e8m0_factor(byte) if MX else e4m3_factor(byte)
    return d.to(tl.float32) * (factor * 0.25)[None, :]


@triton.jit
def finish(y, n, m, N, gx, gw, bias, residual, out, SCALED_X: tl.constexpr, SCALED_W: tl.constexpr, BIAS: tl.constexpr,
           RESIDUAL: tl.constexpr, mask):
    """y / (gx*gw) + bias in fp32, one rounding to out's dtype, plus the residual in that dtype (SPEC §6)."""
    if SCALED_X and SCALED_W:
        y = y * tl.div_rn(1.0, tl.load(gx) * tl.load(gw))
    elif SCALED_X:
        y = y * tl.div_rn(1.0, tl.load(gx))
    elif SCALED_W:
        y = y * tl.div_rn(1.0, tl.load(gw))
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    offset = m.to(tl.int64) * N + n
    r = y.to(out.dtype.element_ty)
    if RESIDUAL:
        added = tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        r = (r.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + offset, r, mask=mask)


@triton.jit
def gemv_kernel(
    x, xs, gx, w, ws, gw, bias, residual, sign_bits, out, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr,
    MX: tl.constexpr, SCALED_X: tl.constexpr, SCALED_W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):
    """x int32 [M, K/8], xs uint8 [M, K/G], w int32 [N, K/8], ws uint8 [N, K/G] -> out [M, N], M = 1, 2 or 4; AHEAD:
    cache lines of a row that are prefetched; grid (N/BN)."""
    G: tl.constexpr = 32 if MX else 16
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    start_next(PDL)
    if AHEAD > 0:
        line = 128 * tl.arange(0, AHEAD)
        prefetch(w, row * (K // 2) + line[None, :])
        prefetch(ws, row * (K // G))
    wait_inputs(PDL)
    signs = tl.load(sign_bits)
    acc0 = tl.zeros((BN, BK // G), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for i in tl.range(0, tl.cdiv(K, BK), num_stages=1):
        first = i * BK
        words = first // 8 + tl.arange(0, BK // 8)
        groups = first // G + tl.arange(0, BK // G)
        if K % BK == 0:
            code = tl.load(w + row * (K // 8) + words[None, :])
            byte = tl.load(ws + row * (K // G) + groups[None, :]).to(tl.int32)
        else:
            code = tl.load(w + row * (K // 8) + words[None, :], mask=(words < K // 8)[None, :], other=0)
            byte = tl.load(ws + row * (K // G) + groups[None, :], mask=(groups < K // G)[None, :], other=1).to(tl.int32)
        factor = e8m0_factor(byte) if MX else e4m3_factor(byte)
        parts = _weight_bytes(code, signs)
        acc0 += _row(parts, x, xs, 0, first, K, G, BN, BK, MX) * factor
        if M > 1:
            acc1 += _row(parts, x, xs, 1, first, K, G, BN, BK, MX) * factor
        if M > 2:
            acc2 += _row(parts, x, xs, 2, first, K, G, BN, BK, MX) * factor
            acc3 += _row(parts, x, xs, 3, first, K, G, BN, BK, MX) * factor
    zero = tl.zeros((BN,), tl.int32)
    finish(tl.sum(acc0, 1), n, zero, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
    if M > 1:
        finish(tl.sum(acc1, 1), n, zero + 1, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
    if M > 2:
        finish(tl.sum(acc2, 1), n, zero + 2, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
        finish(tl.sum(acc3, 1), n, zero + 3, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, n < N)
