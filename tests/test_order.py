"""The order in which GPTQ rounds blocks: that of an explicitly permuted problem, and what it gains."""

import dataclasses
import sys

import pytest
import torch
from gptq_oracle import block_diagonal, order_of_channels

from wush_compile import formats
from wush_compile.baselines import METHODS
from wush_compile.config import WushConfig
from wush_compile.recipe import ACTIVATION_ROUNDINGS
from wush_compile.solver import order as ordering
from wush_compile.solver.choose import power_of_s
from wush_compile.solver.experts import pooled_moment, solve_share, solve_shared
from wush_compile.solver.order import in_order, moment_in_order, order_of_blocks, out_of_order
from wush_compile.solver.sensitivity import Sensitivity
from wush_compile.solver.solve import solve

SOLVE, EXPERTS = (sys.modules[f"wush_compile.solver.{name}"] for name in ("solve", "experts"))


def problem(seed=0, n=40, k=256, rows=600, block=32):
    """Correlated inputs [rows, k], whose blocks differ in power and do not lie in its order, and weights [n, k]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.exp(1.5 * torch.randn(k, generator=generator))
    x = torch.randn(rows, k, generator=generator) @ mix / k**0.5
    x *= torch.exp(torch.randn(k // block, generator=generator)).repeat_interleave(block)
    w = torch.randn(n, k, generator=generator) * torch.exp(0.5 * torch.randn(k, generator=generator)) * 0.02
    return x, w


def natural(monkeypatch, module=SOLVE):
    monkeypatch.setattr(module, "order_of_blocks", lambda *_: None)


def solved(x, w, config, moment=None, sensitivity=None):
    moment = x.T @ x if moment is None else moment
    return solve(w, config, moment=moment, count=len(x), sample=x[:64], name="a", sensitivity=sensitivity)


def gradients(x, block):
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(x.shape, generator=generator) * torch.exp(torch.randn(x.shape[1], generator=generator))
    return Sensitivity.of(x, rows, len(x), block)


CASES = {
    "mxfp4": dict(),
    "nvfp4": dict(format="nvfp4"),
    "nearest": dict(activation_rounding="nearest", activation_scale_rule="paper"),
    "blocks of two groups": dict(transform_block_size=64),
    "blocks of four groups": dict(format="nvfp4", transform_block_size=64, activation_scale_rule="search"),
    "fp8": dict(activation_format="fp8"),
    "hadamard": dict(transform="hadamard"),
    "identity": dict(transform="identity", format="nvfp4"),
    "int4": dict(format="int4", transform="wus"),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_it_is_the_solution_of_the_permuted_problem(settings, monkeypatch):
    """Bit for bit, in the model's order: codes, scales, T, feedback and global scales."""
    config, (x, w) = WushConfig(**settings), problem()
    block = config.transform_block_size or config.group_size
    lain = order_of_channels(x, block)
    blocks, moment = lain[::block] // block, x.T @ x
    priced = gradients(x, block)
    found = solved(x, w, config, moment, priced)
    natural(monkeypatch)
    assert not torch.equal(found.weight_packed, solved(x, w, config, moment).weight_packed)
    own = Sensitivity(priced.moment[blocks], len(x), priced.x[:, lain], priced.gradient[:, lain])
    want = solved(x[:, lain], w[:, lain], config, moment[lain][:, lain], own)
    assert torch.equal(formats.unpack(found.weight_packed)[:, lain], formats.unpack(want.weight_packed))
    groups = lain[:: config.group_size] // config.group_size
    assert torch.equal(found.weight_scale[:, groups], want.weight_scale)
    for name, index in (("transform", blocks), ("input_feedback", groups)):
        got, expected = getattr(found, name), getattr(want, name)
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got if len(got) == 1 else got[index], expected), name
    for name in ("weight_global_scale", "input_global_scale"):
        got, expected = getattr(found, name), getattr(want, name)
        assert (got is None and expected is None) or torch.equal(got, expected), name
    assert found.report.pop("input_power") == want.report.pop("input_power")
    assert found.report == pytest.approx(want.report)


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_it_lowers_the_loss(format, sweeps, monkeypatch):
    config, losses = WushConfig(format=format, sweeps=sweeps), []
    with monkeypatch.context() as patch:
        for seed in range(12):
            x, w = problem(seed)
            pair = []
            for change in (lambda _: None, natural):
                change(patch)
                found = solved(x, w, config)
                t = block_diagonal(found.transform, w.shape[1])
                values = formats.dequantize(found.weight_packed, found.weight_scale, format, found.weight_global_scale)
                error = (w.double() @ torch.linalg.inv(t) - values.double()) @ t  # D T: of H's basis
                pair.append((error @ (x.T @ x).double() * error).sum())
                patch.undo()
            losses.append(pair)
    ratio = torch.tensor(losses)
    ratio = (ratio[:, 0] / ratio[:, 1]).log()
    assert ratio.mean() < -2 * ratio.std() / len(ratio) ** 0.5


def test_where_blocks_stay():
    h = torch.diag_embed(torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]))
    recipe = WushConfig().recipe_of("x")
    order = order_of_blocks(recipe, h)
    assert order.tolist() == [3, 1, 4, 0, 2]  # the least first, ties as they were
    for settings in (dict(moments="conditional"), dict(solver="rtn")):
        assert order_of_blocks(dataclasses.replace(recipe, **settings), h) is None
    for name in ("gptq", "gptq-hadamard", "quarot", "gptq-wush"):
        assert order_of_blocks(METHODS[name].configuration("nvfp4").recipe_of("x"), h) is None
    x = torch.randn(4, 10)
    assert torch.equal(in_order(x, order, 1)[:, :4], x[:, [6, 7, 2, 3]])
    assert torch.equal(out_of_order(in_order(x, order, 1), order, 1), x)
    assert in_order(x, None) is x and in_order(None, order) is None and in_order(h[:1], order) is not None


@pytest.mark.parametrize("elements", [1, 3 * 96, 2**20])
def test_a_moment_is_laid_in_order_in_parts(elements, monkeypatch):
    monkeypatch.setattr(ordering, "COPIED_ELEMENTS", elements)
    moment, order = torch.randn(96, 96), torch.tensor([2, 0, 1])
    channels = torch.cat([torch.arange(32 * b, 32 * b + 32) for b in (2, 0, 1)])
    assert torch.equal(moment_in_order(moment, order), moment[channels][:, channels].double())


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_experts_have_the_order_of_all_rows(format, monkeypatch):
    """Side by side and each alone, they are those of the permuted problem."""
    recipe = WushConfig(format=format).recipe_of("x")
    size, rows = recipe.group_size, [600, 20, 0]
    pairs = [problem(seed, block=size) for seed in range(3)]
    weights = torch.stack([w for _, w in pairs]).bfloat16()
    parts = [x[:n] for (x, _), n in zip(pairs, rows, strict=True)]
    moment = torch.stack([x.T @ x for x in parts])
    pooled = pooled_moment(moment, torch.tensor(rows), "x")
    lain = order_of_channels(torch.cat(parts), size)
    t, _, _, _ = solve_shared(weights, recipe, pooled=pooled, sample=parts[0][:64], name="x")
    found = []
    for together in (1, 4):
        monkeypatch.setattr(EXPERTS, "_together", lambda *_, together=together: together)
        one = solve_share(weights, recipe, t, range(3), moment=moment, rows=rows, pooled=pooled, name="x")
        found.append((formats.unpack(one.weight_packed), one.weight_scale))
    natural(monkeypatch, EXPERTS)
    moment, pooled = (m[..., lain, :][..., lain] for m in (moment, pooled))
    given = dict(moment=moment, rows=rows, pooled=pooled, name="x")
    want = solve_share(weights[..., lain], recipe, t[lain[::size] // size], range(3), **given)
    for codes, scales in found:
        assert torch.equal(codes[..., lain], formats.unpack(want.weight_packed))
        assert torch.equal(scales[..., lain[::size] // size], want.weight_scale)


def test_the_power_of_s_with_feedback():
    for format, power in (("mxfp4", 7 / 16), ("nvfp4", 3 / 8), ("int4", 1 / 2)):
        for rounding in ACTIVATION_ROUNDINGS:
            want = power if rounding == "feedback" else 1 / 2
            assert power_of_s(WushConfig(format=format, activation_rounding=rounding).recipe_of("x")) == want
    for activations in ("fp8", None):
        assert power_of_s(WushConfig(activation_format=activations).recipe_of("x")) == 7 / 8
    assert power_of_s(WushConfig.paper("mxfp4").recipe_of("x")) == 1 / 2
