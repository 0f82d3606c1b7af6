"""`wush::observe_experts`: what `wush::observe` would see of each expert's rows."""

import pytest
import torch
from torch.library import opcheck

from wush_compile.ops import core, observe_experts  # noqa: F401  (registers the ops)

wush = torch.ops.wush
K, E = 8, 3


def state(rows: int = 64, blocks: int | None = None) -> dict[str, torch.Tensor]:
    """Empty buffers; `blocks` of the moment's diagonal alone."""
    shape = (E, K, K) if blocks is None else (E, blocks, K // blocks, K // blocks)
    return {
        "moment": torch.zeros(shape),
        "count": torch.zeros(E, dtype=torch.int64),
        "sample": torch.zeros(rows, K),
        "expert": torch.zeros(rows, 1),
    }


def offsets(*counts: int) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (0, 17, 3), (5, 0, 129)])
def test_each_expert_is_observed_alone(counts, blocks):
    seen, start = state(blocks=blocks), 0
    x = torch.randn(sum(counts) + 2, K)  # the last two rows belong to no expert
    wush.observe_experts(x, offsets(*counts), None, None, *seen.values())
    for e, count in enumerate(counts):
        moment, total = torch.zeros_like(seen["moment"][e]), torch.zeros((), dtype=torch.int64)
        wush.observe(x[start : start + count], None, moment, total, torch.zeros(0, K))
        assert torch.equal(seen["moment"][e], moment) and seen["count"][e] == total == count
        start += count


def test_masked_rows_do_not_count():
    x, offs = torch.randn(6, K), offsets(2, 1, 3)
    token, mask = torch.tensor([0, 2, 1, 0, 1, 2]), torch.tensor([[1, 0, 1]])
    masked, alone = state(), state()
    wush.observe_experts(x, offs, mask, token, *masked.values())
    wush.observe_experts(x[[0, 1, 3, 5]], offsets(2, 0, 2), None, None, *alone.values())
    assert masked["count"].tolist() == [2, 0, 2]
    for name, value in masked.items():
        assert torch.equal(value, alone[name]), name


def test_the_sample_knows_whose_its_rows_are():
    seen = state(rows=32)
    for _ in range(5):
        counts = torch.randint(0, 20, (E,)).tolist()
        owner = torch.arange(E).repeat_interleave(torch.tensor(counts))
        x = torch.randn(sum(counts), K)
        x[:, 0] = owner.float()
        wush.observe_experts(x, offsets(*counts), None, None, *seen.values(), 7)
    uniform = 32 - 32 // core.LARGEST_SHARE
    assert torch.equal(seen["sample"][:uniform, 0], seen["expert"][:uniform, 0])


def test_opcheck():
    opcheck(wush.observe_experts.default, (torch.randn(5, K), offsets(2, 0, 3), None, None, *state().values()))
