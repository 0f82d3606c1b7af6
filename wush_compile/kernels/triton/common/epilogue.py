"""The end of every product: global scales, bias, one rounding, residual."""

import triton
import triton.language as tl


@triton.jit
def weight_scale(gw, n, N):
    """fp32: the weight's global scale, or, where gw is bf16, the factors of its rows n; 1 beyond the last."""
    if gw.dtype.element_ty == tl.bfloat16:
        return tl.load(gw + n, mask=n < N, other=1.0).to(tl.float32)
    else:
        return tl.load(gw)


@triton.jit
def finish(
    y,
    n,
    m,
    N,
    gx,
    gw,
    bias,
    residual,
    out,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    mask,
):
    """Stores y / (gx * gw) + bias, computed in fp32 and rounded once to out's dtype; the residual is then
    added in that dtype (docs/spec.md §6).

    y: fp32 sums. gw: as in `weight_scale`. n, m: columns and rows of `out` [M, N], int32, of shapes that broadcast to
    y's."""
    if SCALED_X and SCALED_W:
        y = y * tl.div_rn(1.0, tl.load(gx) * weight_scale(gw, n, N))
    elif SCALED_X:
        y = y * tl.div_rn(1.0, tl.load(gx))
    elif SCALED_W:
        y = y * tl.div_rn(1.0, weight_scale(gw, n, N))
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    offset = m.to(tl.int64) * N + n
    r = y.to(out.dtype.element_ty)
    if RESIDUAL:
        added = tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        r = (r.to(tl.float32) + added).to(out.dtype.element_ty)
    tl.store(out + offset, r, mask=mask)


@triton.jit(do_not_specialize=["M"])
def finish_kernel(
    y,
    unit,
    gx,
    gw,
    bias,
    residual,
    out,
    M,
    N: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`finish` of sums fp32 [M, N] in memory, times unit fp32 [M] if UNIT. Grid (tiles of M, tiles of N)."""
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (m < M) & (n < N)
    sums = tl.load(y + (m.to(tl.int64) * N + n), mask=mask, other=0.0)
    if UNIT:
        sums *= tl.load(unit + m, mask=m < M, other=0.0)
    finish(sums, n, m, N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
