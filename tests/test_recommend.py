"""`recommend`: predictions against measured KL, the choice against all choices, targets, and what is refused."""

import dataclasses
import itertools

import pytest
import torch
from models import plain, tokens
from torch import nn

import wush_compile as wc
from wush_compile.calibration.recommend import GPUS, KEPT, Cost, Recommendation, choose
from wush_compile.calibration.survey import Surveyed
from wush_compile.errors import ConfigError, WushError

DATA = [tokens(4, 48, seed=s) for s in range(4)]
NAMES = ("W4A4", "W4A8", "W4A16", "W8A16")
SETTINGS = {
    "W4A4": ("mxfp4", "same"),
    "W4A8": ("mxfp4", "fp8"),
    "W4A16": ("mxfp4", None),
    "W8A16": ("int8", None),
}


def groups(count: int, seed: int = 0) -> list[Surveyed]:
    random = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        kl = torch.rand(4, generator=random, dtype=torch.float64).sort(descending=True).values.tolist()
        rows = 64 * int(torch.randint(1, 9, (), generator=random))
        found.append(Surveyed((f"layer{i}.a", f"layer{i}.b"), rows, 256, dict(zip(NAMES, kl, strict=True))))
    return found


@pytest.mark.parametrize("gpu, rows", [(None, 1), ("rtx5090", 4096), ("h100", 4096)])
def test_no_other_choice_has_less_kl_for_less(gpu, rows):
    """Against all choices for four groups, at the very cost that the recommended one has."""
    some, cost = groups(4), Cost("mxfp4", GPUS.get(gpu), rows)
    every = list(itertools.product([*NAMES, KEPT], repeat=4))

    def sums(chosen) -> tuple[float, float]:
        return sum(map(cost, some, chosen)), sum(g.kl.get(r, 0.0) for g, r in zip(some, chosen, strict=True))

    whole = sums([KEPT] * 4)[0]
    for max_kl, max_share in ((2.0, None), (0.7, None), (None, 0.99)):
        spent, kl = sums(choose(some, cost, max_kl, max_share))
        assert kl <= (max_kl or kl) and spent <= (max_share or 1) * whole * (1 + 1e-12)
        if max_kl is not None:  # on the way of steps; a share may leave a rest that no step fits
            assert not [c for c in every if sums(c)[0] <= spent * (1 - 1e-9) and sums(c)[1] <= kl * (1 - 1e-9)]
    with pytest.raises(ConfigError, match="even the cheapest rungs cost"):
        choose(some, cost, None, 0.001)


def test_predictions_are_near_what_is_measured():
    model, config = plain("llama", torch.float32), wc.WushConfig()
    found = wc.recommend(model, DATA, config, max_share=1.0, progress=False)
    ids, cost = tokens(8, 48, seed=9), Cost("mxfp4", None, 1)
    with torch.no_grad():
        p = model(input_ids=ids).logits.double().log_softmax(-1)
    measured, predicted = {}, {}
    for rung in NAMES:
        settings = Recommendation(found.groups, [rung] * len(found.groups), cost, config)
        other = wc.quantize(plain("llama", torch.float32), DATA, config, progress=False, **settings)
        with torch.no_grad():
            q = other(input_ids=ids).logits.double().log_softmax(-1)
        measured[rung], predicted[rung] = float((p.exp() * (p - q)).sum(-1).mean()), settings.kl
    for rung in NAMES[:3]:
        assert 0.5 < predicted[rung] / measured[rung] < 2, (rung, predicted, measured)
    for kl in (measured, predicted):  # W4A8 and W4A16 are too close to tell apart here
        assert kl["W4A4"] > kl["W4A8"] > kl["W8A16"]


def test_what_is_recommended_can_be_done():
    """Other settings for one linear stay; what stays in 16 bits is ignored; the model itself has not changed."""
    model = plain("llama", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = wc.WushConfig(overrides={"model.layers.0.mlp.down_proj": {"transform": "hadamard"}})
    found = wc.recommend(model, DATA, config, max_share=0.8, gpu="h100", rows=1, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert "model.layers.0.mlp.down_proj" not in found.rungs and len(found.rungs) == 7
    assert len(set(found.rungs.values())) > 1 and found.share <= 0.8
    assert str(found).count("\n") == 9 and f"predicted KL {found.kl:.3g}" in str(found)
    wc.quantize(model, DATA, config, progress=False, **found)
    record = {g["members"][0]: g for g in model.wush_quantization.to_dict()["groups"]}
    assert record["model.layers.0.mlp.down_proj"]["recipe"] == {"transform": "hadamard"}
    for name, rung in found.rungs.items():
        assert (name in record) == (rung != KEPT)
        if rung != KEPT:
            recipe = {**dataclasses.asdict(config.recipe), **record[name]["recipe"]}
            assert (recipe["format"], recipe["activation_format"]) == SETTINGS[rung]


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x):
        return self.linear(x).round()


def test_what_cannot_be_recommended():
    data = [torch.randn(40, 64)]
    for settings, error in (
        ({}, "one target"),
        ({"max_kl": 0.1, "max_share": 0.5}, "one target"),
        ({"max_kl": 0.0}, "above 0"),
        ({"max_share": 1.5}, "max_share"),
        ({"max_kl": 0.1, "gpu": "h20"}, "h200"),
        ({"max_kl": 0.1, "config": wc.WushConfig(solver="rtn")}, "solver gptq"),
    ):
        with pytest.raises(ConfigError, match=error):
            wc.recommend(Rounded(), data, progress=False, **settings)
    with pytest.raises(WushError, match="no gradient"):
        wc.recommend(Rounded(), data, max_kl=0.1, progress=False)
