"""The block transform of a tile: one product with a block-diagonal operand."""

import triton
import triton.language as tl

from ..common.formats import ABS_BITS, INF_BITS, drop_bad, float_bits, group_amax


@triton.jit
def load_operand(t, first, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """[W, W]: entry (k, n) is T_b[c, k] if column k of the tile and output c, which column n holds, are of one block b;
    else 0.

    A tensor core leaves columns 8j + 2t and 8j + 2t + 1 of the product with lane t of four. Column 8j + 2t + i holds
    output (W/4)t + 2j + i. So a lane has W/4 consecutive outputs, and what follows takes place in its registers.
    """
    B: tl.constexpr = SPEC.block
    W: tl.constexpr = SPEC.columns
    k = tl.arange(0, W)
    n = tl.arange(0, W)
    c = (n // 2 % 4) * (W // 4) + n // 8 * 2 + n % 2
    inside = (k // B)[:, None] == (c // B)[None, :]
    if not EVEN:
        inside = inside & (first + c < SPEC.width)[None, :]
    offset = (c % B)[None, :] * B + (k % B)[:, None]
    if not SPEC.shared:
        offset += ((first // B + c // B) * (B * B))[None, :]
    return tl.load(t + offset, mask=inside, other=0.0)


@triton.jit
def dot(x, operand, SPEC: tl.constexpr):
    """fp32 [R, W]: x @ operand, its columns in the order of the outputs."""
    if SPEC.fp32_dot:
        y = tl.dot(x.to(tl.float32), operand.to(tl.float32), input_precision="ieee")
    else:
        y = tl.dot(x, operand)
    return output_order(y, SPEC)


@triton.jit
def output_order(y, SPEC: tl.constexpr):
    """[R, W] from the order of `load_operand`'s columns to that of the outputs."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    return tl.reshape(tl.permute(tl.reshape(y, (R, W // 8, 4, 2)), (0, 2, 1, 3)), (R, W))


@triton.jit
def clean_dot(y, x, operand, SPEC: tl.constexpr):
    """(y with zeros in groups that are not finite, bits of the groups' absolute maxima before that).

    In the shared product a NaN or Inf would reach the other blocks of its row (0 * NaN). So the product is computed
    again from the finite values, and the blocks that had others become Inf."""
    B: tl.constexpr = SPEC.block
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    if B > 0 and W > B:
        finite = (float_bits(x.to(tl.float32)) & ABS_BITS) < INF_BITS
        y = dot(tl.where(finite, x, 0.0).to(x.dtype), operand, SPEC)
        bad = tl.max(tl.reshape(tl.where(finite, 0, 1), (R, W // B, B)), axis=2)  # [R, W/B]
        bad = tl.reshape(tl.broadcast_to(bad[:, :, None], (R, W // B, B)), (R, W))
        y = tl.where(bad != 0, float("inf"), y)
    amax = group_amax(y, R, W, SPEC.group)
    return drop_bad(y, amax, R, W, SPEC.group), amax
