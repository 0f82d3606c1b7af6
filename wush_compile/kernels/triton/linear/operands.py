"""Arguments of `wush::fp4_linear` as the launches take them, and the checks that keep a kernel inside its operands."""

from typing import NamedTuple

import torch
from torch import Tensor

from ....formats import get_format
from ....ops.layouts import operand_of
from ...provider import has_row_factors


class Operands(NamedTuple):
    """Dense arguments; the leading dimensions of the activation and of the residual are one dimension M."""

    codes: Tensor  # uint8 [M, K/2]; activation fp8: uint8 [M, K]; none: 16-bit floats [M, K]
    scales: Tensor  # uint8 [M, K/G]; int4: bf16; activation fp8: fp32 [M, 1]; none: fp32 [M, 0]
    global_scale: Tensor | None  # fp32 [1]
    weight_codes: Tensor  # uint8 [N, K/2]; int8: uint8 [N, K]
    weight_scales: Tensor  # [N, K/G], as scales
    weight_global_scale: Tensor | None  # fp32 [1], or bf16 [N], a factor of each row
    bias: Tensor | None  # [N]
    residual: Tensor | None  # [M, N]
    format: str
    precise: bool = False  # see `fp4_linear`
    activation: str = "same"  # the op's activation_format
    decoded: str = ""  # activation fp8 or none: what the weight is decoded to, as FORMAT of `gemm.fused_gemm_kernel`
    # Whether the activation is in the layout `lanes`: codes in that order; bf16 [M, K] of NVFP4, and scales [M, 0].
    lanes: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        k = self.codes.shape[1] * (2 if self.activation == "same" and not self.lanes else 1)
        return self.codes.shape[0], self.weight_codes.shape[0], k

    @property
    def kernel_format(self) -> str:
        """The format by its name in the kernels: the operands' own, or what the weight is decoded to."""
        return self.decoded or self.format

    @property
    def row_factors(self) -> bool:
        """Whether the weight's global scale is a factor of each of its rows."""
        return has_row_factors(self.weight_global_scale)

    def weight(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and global scale of some of the weight's rows."""
        g = self.weight_global_scale
        return self.weight_codes[rows], self.weight_scales[rows], g[rows] if self.row_factors else g

    @property
    def given(self) -> tuple[bool, bool, bool, bool]:
        """Which optional operands there are: SCALED_X, SCALED_W, BIAS, RESIDUAL of the kernels."""
        optional = self.global_scale, self.weight_global_scale, self.bias, self.residual
        return tuple(t is not None for t in optional)


def dense(t: Tensor) -> Tensor:
    """`t` contiguous and aligned for 16-byte loads."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def check(o: Operands, out_dtype: torch.dtype) -> None:
    """ValueError if an operand's shape, dtype or device would make a kernel read memory that is not its own."""
    (m, n, k), fmt = o.sizes, get_format(o.format)
    written = o.format if o.activation == "same" else o.activation
    columns, codes_dtype, groups, scale_dtype = operand_of(written, k, o.codes.dtype, "lanes" if o.lanes else "rows")
    expected = {
        "codes": ((m, columns), codes_dtype),
        "scales": ((m, groups), scale_dtype),
        "weight_codes": ((n, k // fmt.per_byte), torch.uint8),
        "weight_scales": ((n, k // fmt.group_size), fmt.scale_dtype),
        "global_scale": ((1,), torch.float32),
        "weight_global_scale": ((n,), torch.bfloat16) if o.row_factors else ((1,), torch.float32),
        "bias": ((n,), None),
        "residual": ((m, n), out_dtype),
    }
    for name, (shape, dtype) in expected.items():
        t = getattr(o, name)
        if t is None:
            continue
        if t.device != o.codes.device:
            raise ValueError(f"{name} is on {t.device}, the activation on {o.codes.device}")
        if tuple(t.shape) != shape and not (shape == (1,) and t.numel() == 1):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, the product needs {shape}")
        if t.dtype != dtype and (dtype is not None or not t.is_floating_point()):
            raise ValueError(f"{name} is {t.dtype}, {o.format} needs {dtype or 'a floating-point type'}")
