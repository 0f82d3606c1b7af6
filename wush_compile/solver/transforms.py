"""The transforms T_b of docs/spec.md §2 in float64, and their rounding to the model dtype."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError

# Rounding errors can make an fp32 moment indefinite. Then damping is added again; this is the limit of tries.
MAX_DAMPING_TRIES = 100
# Channels in a panel of `cholesky_`. The library factors matrices no larger than a panel.
PANEL = 2048
# Of the mean singular value: the least that T counts with, whatever the damping. T all but takes away what inputs hold
# along a direction that costs nothing. GPTQ then moves weights along it freely, and they grow until their rounding
# errors are all that is left. It is more where no output reads the direction, s up to NONE of the largest: a group with
# fewer outputs than a block has channels has such. With 8 outputs, blocks of 32 and the damping 0.01, the relative loss
# of MXFP4 weights with 16-bit activations was .28, and is .00015; with 24 outputs, 4 bits and the damping 1e-6 it was
# 7e10, and is .004. At the default damping nothing else is below LEAST.
LEAST, LEAST_UNREAD, NONE = 0.01, 0.1, 1e-6


def hadamard_matrix(size: int) -> Tensor:
    """Normalized Sylvester–Hadamard matrix, float64 [size, size], symmetric and orthogonal; size a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / math.sqrt(size)


def random_orthogonal(blocks: int, size: int, seed: int, name: str) -> Tensor:
    """Haar-random orthogonal matrices, float64 [blocks, size, size] on the CPU. Seed and name determine them."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    q, r = torch.linalg.qr(torch.randn(blocks, size, size, dtype=torch.float64, generator=generator))
    # With the signs of R's diagonal moved into it, Q is uniform over the orthogonal group.
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]


def cholesky_(a: Tensor, panel: int = PANEL) -> tuple[Tensor, Tensor]:
    """Cholesky by panels: a float64 [K, K] -> L in its place, and info int32 []: 0 if a is positive definite.

    Entries of the result above the diagonal blocks of `panel` channels have no meaning. Beside `a` the function holds
    only a panel of columns in memory. The library's function needs another K² values, so it only factors matrices no
    larger than a panel.
    """
    size, info = a.shape[0], torch.zeros((), dtype=torch.int32, device=a.device)
    if size <= panel:
        return torch.linalg.cholesky_ex(a)
    for start in range(0, size, panel):
        here = slice(start, min(start + panel, size))
        factor, failed = torch.linalg.cholesky_ex(a[here, here])
        a[here, here] = factor
        info |= failed
        if here.stop < size:
            # X Lᵀ = A
            a[here.stop :, here] = torch.linalg.solve_triangular(
                factor.mT, a[here.stop :, here], upper=True, left=False
            )
            for low in range(here.stop, size, panel):
                column = slice(low, min(low + panel, size))
                a[low:, column].addmm_(a[low:, here], a[column, here].T, alpha=-1)
    return a, info


def damped_cholesky(
    h: Tensor, damping: float, name: str, again: Callable[[], Tensor] | None = None, panel: int = PANEL
) -> tuple[Tensor, int]:
    """Lower L with L Lᵀ = h + t·damping·mean(diag h)·I, float64 [.., K, K] -> ([.., K, K], the largest t needed).

    t is the least whole number that is enough, from 1 on. The factor of a zero matrix is the identity. If damping is 0,
    each further try adds 0.01. `again` makes h [K, K] anew; if it is given, the factor overwrites h (`cholesky_`).
    """
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)  # [..]
    zero = mean == 0
    share = torch.full_like(mean, damping)
    for tries in range(1, MAX_DAMPING_TRIES + 1):
        damped = h.clone() if again is None else h if tries == 1 else again()
        damped.diagonal(dim1=-2, dim2=-1).add_(torch.where(zero, 1.0, share * mean)[..., None])
        factor, info = torch.linalg.cholesky_ex(damped) if again is None else cholesky_(damped, panel)
        failed = info != 0
        if not failed.any():
            return factor, tries
        share = torch.where(failed, share + (damping or 0.01), share)
    raise ConfigError(
        f"{name}: the second moment of its inputs is not positive definite even with {float(share.max()):.2g} "
        "of its mean diagonal added: raise damping or calibrate on more data"
    )


def wush_transform(
    root: Tensor,
    gram: Tensor,
    damping: float,
    hadamard: bool = True,
    power: float = 0.5,
    rotation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """T_b of eq. 7, float64 [b, B, B].

    root [b, B, B]: any L with L Lᵀ = the damped moment of the block's inputs. gram [b, B, B]: S_b = W_bᵀW_b / N.
    With Lᵀ S_b L = V diag(s²) Vᵀ and s descending, T_b = Had diag(√s) Vᵀ L⁻¹; `hadamard=False` leaves Had out (WUS).
    s is damped before, and not left below LEAST of its mean. Another `power` p replaces √s by c · s^p, with c such that
    the geometric mean stays that of √s (docs/spec.md §2).
    rotation: d [b, B] -> what stands for Had [b, B, B]; d = s² / stretch², what errors along singular vectors cost.
    In each row of Vᵀ L⁻¹ the entry of largest magnitude is made positive, so that T is the same for every root. A block
    with gram 0 gets Had (WUS: the identity).
    """
    size = root.shape[-1]
    had = (hadamard_matrix(size) if hadamard else torch.eye(size, dtype=torch.float64)).to(root.device)
    square, v = torch.linalg.eigh(root.mT @ gram @ root)
    s = square.flip(-1).clamp(min=0).sqrt()  # [b, B]
    mean = s.mean(-1, keepdim=True)
    least = torch.where(s > NONE * s[..., :1], LEAST, LEAST_UNREAD)
    s = torch.maximum(s + damping * mean, least * mean)
    rows = torch.linalg.solve(root, v.flip(-1).mT, left=False)  # Vᵀ L⁻¹ [b, B, B]
    magnitude = rows.abs()
    index = torch.arange(size, device=root.device)
    first = torch.where(magnitude == magnitude.amax(-1, keepdim=True), index, size - 1).amin(-1, keepdim=True)
    rows = torch.where(rows.gather(-1, first) < 0, -rows, rows)
    stretch = s.sqrt()
    if power != 0.5:
        # A rank-deficient moment has s of 0 without damping: the mean must stay finite.
        logs = s.clamp(min=1e-12 * s[..., :1]).clamp(min=1e-300).log()
        stretch = s.pow(power) * (logs.mean(-1, keepdim=True) * (0.5 - power)).exp()
    left = had
    if rotation is not None:
        d = square.flip(-1).clamp(min=0) / stretch.square()
        left = rotation(torch.where(stretch > 0, d, 0.0))
    t = left @ (stretch[..., None] * rows)
    dead = gram.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    return torch.where(dead[:, None, None], had, t)


def diagonal_blocks(h: Tensor, block: int) -> Tensor:
    """[K, K] -> its diagonal blocks [K/B, B, B]; [K/B, B, B] passes through."""
    if h.dim() == 3:
        return h
    return h.unflatten(1, (-1, block)).unflatten(0, (-1, block)).diagonal(dim1=0, dim2=2).movedim(-1, 0)


def apply_blockwise(x: Tensor, t: Tensor | None) -> Tensor:
    """[K, n] -> [K, n], a row for each channel: block b becomes T_b x_b. t: [K/B, B, B], [1, B, B] or None."""
    return x if t is None else (t @ x.unflatten(0, (-1, t.shape[-1]))).flatten(0, 1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def round_transform(t: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    """T float64 [b, B, B] -> (T as stored, in the model dtype; the float64 inverse of the stored T)."""
    rounded = t.to(dtype)
    if not torch.isfinite(rounded).all():
        remedy = "convert the model to bfloat16" if dtype == torch.float16 else "scale its weights or its inputs"
        raise ConfigError(f"{name}: its transform overflows {_short(dtype)}; {remedy}")
    inverse, info = torch.linalg.inv_ex(rounded.to(torch.float64))
    if info.any() or not torch.isfinite(inverse).all():
        raise ConfigError(
            f"{name}: its transform is singular once rounded to {_short(dtype)}; raise damping, scale its weights or "
            "its inputs, or convert the model to float32"
        )
    return rounded, inverse
