"""Many rows of experts to fp8: `linear.upcast.upcast_fp8` with several rows a program.

A prefill has a row for each token and expert, 131,072 of them for 16,384 tokens that go to 8. A program for each row
would take longer to start than its bytes take to move."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.overlap import overlaps, start_next, wait_inputs
from ..linear.upcast import _upcast_fp8, source_row

# On an H200 (`kernel_speed.py grouped-upcast`) 4 rows a program take 0.58 of the time of one where K is 2048, and 0.31
# where it is 768, at 131,072 rows; 1.24 of it at 1024 rows. Where the two are equal was not measured.
MANY_ROWS = 4096
ROWS, WARPS = 4, 1  # of a program


@triton.jit(do_not_specialize=["T", "S"])
def upcast_rows_kernel(
    codes,
    scales,
    g,
    unit,
    out,
    index,
    T,
    S,
    K: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`upcast_fp8_kernel` in lane order, to e5m2, of ROWS rows of S. Grid (tiles of rows)."""
    wait_inputs(PDL)
    for i in tl.range(0, ROWS):
        r = tl.minimum(tl.program_id(0) * ROWS + i, S - 1)  # the last row again: the same values
        source = source_row(index, r, T)
        _upcast_fp8(r, source, 0, 1, codes, scales, g, unit, out, K, ROW_GROUPS, False, SCALED, GROUPS, True)
    start_next(PDL)


def upcast_many(codes: Tensor, scales: Tensor, g: Tensor | None, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """MXFP4 codes uint8 [T, K/2] and scales uint8 [T, K/32], or their rows index [S] -> (e5m2 [S, K up to a multiple of
    128] in lane order, unit fp32 [S] that holds 1/g)."""
    rows, k = (codes if index is None else index).shape[0], 2 * codes.shape[1]
    out = torch.empty((rows, -(-k // 128) * 128), dtype=torch.float8_e5m2, device=codes.device)
    unit = torch.empty(rows, dtype=torch.float32, device=codes.device)
    power, pdl = triton.next_power_of_2(k // 32), overlaps(codes.device.index)
    upcast_rows_kernel[(triton.cdiv(rows, ROWS),)](
        codes.view(torch.int32),
        scales,
        g,
        unit,
        out.view(torch.int32),
        index,
        codes.shape[0],
        rows,
        k,
        power,
        g is not None,
        max(4, min(power, 128)),
        ROWS,
        pdl,
        num_warps=WARPS,
        launch_pdl=pdl,
    )
    return out, unit
