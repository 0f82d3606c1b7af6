"""Factors of the rows of MXFP4 weights: their choice, the solver, modules, graphs and checkpoints."""

import pytest
import torch
from models import plain, tokens
from pass_harness import run
from torch import nn

import wush_compile as wc
from wush_compile import formats
from wush_compile.config import WushConfig
from wush_compile.modules import buffer_layout, named_groups
from wush_compile.recipe import ACTIVATION_FORMATS
from wush_compile.solver.loss import layer_loss
from wush_compile.solver.row_factors import FACTORS, candidates, row_factors
from wush_compile.solver.solve import solve

FACTORED = WushConfig().recipe


def problem(n=24, k=96, count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    w = torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))
    return x, w


def solved(x, w, **settings):
    recipe = WushConfig(**settings).recipe
    return solve(w, recipe, moment=x.T @ x, count=len(x), sample=x[:64], name="a"), recipe


def test_candidates_are_powers_of_an_eighth_octave():
    found = candidates(torch.device("cpu"))
    assert found.dtype == torch.bfloat16 and found[0] == 1
    torch.testing.assert_close(
        found.double().log2(), torch.arange(FACTORS).double() / FACTORS, atol=1.5 * 2**-8, rtol=0
    )


@pytest.mark.parametrize("n", [1, 3, 17])
def test_the_factor_with_the_least_error_of_rounding(n):
    _, w = problem(n)
    got = row_factors(w.T.double(), "mxfp4", "mse")
    assert got.shape == (n,) and got.dtype == torch.bfloat16
    errors = []
    for factor in candidates(w.device).float():
        q = formats.dequantize(*formats.quantize(w * factor, "mxfp4", "mse"), "mxfp4")
        errors.append((q.double() / factor - w).square().sum(-1))
    errors = torch.stack(errors)
    own = errors.gather(0, (got[None] == candidates(w.device)[:, None]).int().argmax(0)[None])[0]
    torch.testing.assert_close(own, errors.amin(0), rtol=1e-6, atol=0)
    assert (own < errors[0]).float().mean() > 0.5 or n == 1


def test_rows_of_zeros_and_a_factor_that_is_known():
    """Values of a grid times a factor are exact with the inverse's factor."""
    grid = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, -6]).repeat(4)
    factors = candidates(grid.device)
    w = torch.stack([*(grid / f for f in factors.double()), 0 * grid.double()])
    assert torch.equal(row_factors(w.T, "mxfp4", "mse"), torch.cat([factors, factors[:1]]))


@pytest.mark.parametrize("solver", ["gptq", "rtn"])
def test_losses_fall(solver):
    x, w = problem(200, 128)
    losses = {}
    for rule in ("best", "mse"):
        solution, recipe = solved(x, w, solver=solver, weight_scale_rule=rule, activation_format=None)
        losses[rule] = layer_loss(x, w, solution, recipe)[1]
        assert (solution.weight_global_scale is None) == (rule == "mse")
    assert losses["best"] < 0.96 * losses["mse"]


def test_the_reported_error_is_that_of_the_weights():
    x, w = problem()
    solution, recipe = solved(x, w, transform="hadamard")
    q = formats.dequantize(solution.weight_packed, solution.weight_scale, "mxfp4", solution.weight_global_scale)
    back = q.double().unflatten(1, (-1, 32)) @ solution.transform[0].double()
    error = (back.flatten(1) - w).square().sum() / w.double().square().sum()
    assert solution.report["weight_error"] == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{"weight_scale_rule": "mse"}, {"moments": "conditional"}, {"format": "nvfp4"}, {"format": "int4"}]
)
def test_where_rows_have_none(settings):
    recipe = WushConfig(**settings, activation_format=None if settings.get("format") == "int4" else "same").recipe
    assert not recipe.factors_rows
    layout = buffer_layout(recipe, 24, 96, recipe.group_size, torch.bfloat16, False)["weight_global_scale"]
    assert layout is None or layout[1] == torch.float32


def test_experts_have_none():
    assert buffer_layout(FACTORED, 24, 96, 32, torch.bfloat16, False)["weight_global_scale"] == ((24,), torch.bfloat16)
    assert buffer_layout(FACTORED, 24, 96, 32, torch.bfloat16, False, 4)["weight_global_scale"] is None


@pytest.fixture(scope="module")
def model():
    return wc.quantize(plain("llama"), [tokens(2, 32)], progress=False)


@pytest.mark.parametrize("activations", ACTIVATION_FORMATS)
def test_eager_compiled_and_dequantized_agree(activations):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 33), nn.Linear(33, 1)).bfloat16()
    x = torch.randn(40, 64).bfloat16()
    wc.quantize(linear, [x], activation_format=activations, ignore=("1",), progress=False)
    y, w = linear[0](x), linear[0].dequantize()
    want = nn.functional.linear(x.float(), w, linear[0].bias.float())
    allowed = {"same": 0.2, "fp8": 0.05, None: 0.01}[activations]
    assert (y.float() - want).norm() < allowed * want.norm()
    with torch.no_grad():
        assert torch.equal(torch.compile(linear[0], backend="wush")(x), linear[0](x))


def test_siblings_stay_one_product(model):
    found = run(lambda ids: model(ids, use_cache=False).logits, tokens(1, 8))
    groups = sum(1 for _ in named_groups(model))
    assert found.counts_after["fp4_linear"] == groups


def test_each_linear_stores_its_rows(model, tmp_path):
    from safetensors.torch import load_file

    wc.save(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for _, group in named_groups(model):
        for member in group.members:
            own = stored[f"{member.name}.weight_global_scale"]
            assert (
                torch.equal(own, group.weight_global_scale[member.start : member.stop]) and own.dtype == torch.bfloat16
            )
    again = wc.load(tmp_path / "saved")
    ids = tokens(1, 8)
    assert torch.equal(again(ids).logits, model(ids).logits)
