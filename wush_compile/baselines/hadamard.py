"""Hadamard matrices of sizes that are no power of two, and products with them."""

import math

import torch
from torch import Tensor, nn

from ..solver.transforms import hadamard_matrix


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def paley(size: int) -> Tensor | None:
    """A Hadamard matrix of ±1, float64 [size, size], by one of Paley's two constructions over a prime field.

    None if neither has this size.
    """
    for q, residue in ((size - 1, 3), (size // 2 - 1, 1)):
        if not _prime(q) or q % 4 != residue or size % 4:
            continue
        squares = {x * x % q for x in range(1, q)}
        character = torch.tensor([0.0, *(1.0 if x in squares else -1.0 for x in range(1, q))], dtype=torch.float64)
        index = torch.arange(q)
        jacobsthal = character[(index[:, None] - index[None]) % q]  # [q, q]
        border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        border[0, 1:], border[1:, 1:] = 1, jacobsthal
        border[1:, 0] = -1 if residue == 3 else 1
        eye = torch.eye(q + 1, dtype=torch.float64)
        if residue == 3:
            return border + eye
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(border, signs) + torch.kron(eye, zeros)
    return None


def factors(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(A [m, m], B [p, p]), float64 and orthogonal, with m · p = size: A ⊗ B is a normalized Hadamard matrix.

    A is [1, 1] if size is a power of two, and Paley's of the least size else. Where Paley has none (11008), A is a
    random orthogonal matrix of the odd part.
    """
    power = size & -size
    odd = size // power
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64), hadamard_matrix(power)
    for m in (odd << shift for shift in range(power.bit_length())):
        found = paley(m)
        if found is not None:
            return found / math.sqrt(m), hadamard_matrix(size // m)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=generator))[0]
    return q.contiguous(), hadamard_matrix(power)


def random_hadamard(size: int, seed: int) -> Tensor:
    """A normalized Hadamard matrix with random signs of its rows, float64 [size, size]: QuaRot's rotation."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
    return signs[:, None] * torch.kron(*factors(size))


class Rotation(nn.Module):
    """x [.., K] -> x (A ⊗ B) [.., K], computed in fp32: a Hadamard product at run time."""

    def __init__(self, size: int, device: torch.device):
        super().__init__()
        a, b = factors(size)
        self.register_buffer("a", a.to(device, torch.float32))
        self.register_buffer("b", b.to(device, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32).unflatten(-1, (self.a.shape[0], self.b.shape[0]))  # [.., m, p]
        return (self.a.mT @ wide @ self.b).flatten(-2).to(x.dtype)

    def matrix(self) -> Tensor:
        """A ⊗ B, float64 [K, K]."""
        return torch.kron(*factors(self.a.shape[0] * self.b.shape[0]))
