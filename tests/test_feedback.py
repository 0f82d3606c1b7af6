"""Rounding with feedback: the reference against float64 and dense matrices, the solver's numbers, the op, models."""

import copy
import re

import hypothesis
import numpy as np
import oracle
import pytest
import torch
from hypothesis import strategies as st
from models import plain, tokens
from moe_models import moe
from pass_harness import run
from torch import nn
from torch.library import opcheck

import wush_compile as wc
from wush_compile import feedback, formats
from wush_compile.checkpoint.record import quantization_of
from wush_compile.config import WushConfig
from wush_compile.experts import ExpertGroup
from wush_compile.formats import get_format
from wush_compile.graphs.printing import count_ops
from wush_compile.modules import named_groups
from wush_compile.ops.core import FAKE
from wush_compile.recipe import MOMENTS, SOLVERS
from wush_compile.solver.choose import FEEDBACK_POWER
from wush_compile.solver.experts import experts_loss, solve_experts
from wush_compile.solver.feedback import DAMPING, ROTATION_DAMPING, equal_steps, feedback_of, rotation
from wush_compile.solver.loss import layer_loss
from wush_compile.solver.solve import solve
from wush_compile.solver.transforms import diagonal_blocks, hadamard_matrix, wush_transform

transform_quantize = torch.ops.wush.transform_quantize
FORMATS = feedback.FORMATS
RULES = [(f, rule) for f in FORMATS for rule in formats.FORMATS[f].scale_rules if rule != "paper"]
BF16 = torch.bfloat16


def global_scale(format, g=4.0):
    return torch.tensor([g]) if format == "nvfp4" else None


def numbers(format, width, seed=0):
    """Feedback of multiples of 1/16, up to 1/2."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, feedback.shape(format, width), generator=generator) / 16).to(BF16)


def rows(format, count, groups, seed=0):
    """Multiples of 1/8, up to 16, in rows and groups of several sizes: with `numbers`, all sums are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 129, (count, groups, get_format(format).group_size), generator=generator)
    return (x >> torch.randint(0, 4, (count, groups, 1), generator=generator)).flatten(1) / 8


def step_and_place(channel):
    return channel // 4 % 4, channel // 16 * 4 + channel % 4


def dense(numbers):
    """[6, G/4] -> F float64 [G, G]: what an error of channel c' adds to channel c."""
    size = 4 * numbers.shape[-1]
    f = np.zeros((size, size))
    for c in range(size):
        for other in range(size):
            (s, w), (u, v) = step_and_place(c), step_and_place(other)
            if u > s:
                f[c, other] = float(numbers[u * (u - 1) // 2 + s, w ^ v])
    return f


def channel_by_channel(x, format, rule, g, given):
    """Codes [M, K] of rows x [M, K], from docs/spec.md §4 alone."""
    size, x = get_format(format).group_size, x.numpy()
    codes = np.zeros(x.shape, np.uint8)
    for b in range(x.shape[1] // size):
        f, here = dense(given[b]), slice(b * size, (b + 1) * size)
        nearest, scales = oracle.quantize(x[:, here], format, rule, g)
        if format == "mxfp4":
            unit = np.ldexp(np.float32(1), scales.astype(int) - 127)
            inverse = 1 / unit
        else:
            unit, inverse = (
                oracle.E4M3[scales].astype(np.float32),
                np.float32(g) / oracle.E4M3[scales].astype(np.float32),
            )
            unit = unit * np.float32(1 / np.float32(g))
        error = np.zeros((len(x), size))
        for c in sorted(range(size), key=lambda c: -step_and_place(c)[0]):
            own = x[:, here][:, c]
            z = (own.astype(np.float64) - error @ f[c]).astype(np.float32)
            code = oracle.e2m1_encode(z * inverse)
            error[:, c] = oracle.bf16(oracle.e2m1_decode(code) * unit - own)
            codes[:, b * size + c] = code
    return codes


# -- the reference ---------------------------------------------------------------------------------------------------


@hypothesis.given(st.sampled_from([16, 32, 64]), st.lists(st.integers(0, 3), max_size=3))
def test_steps_and_channels_are_each_others_inverse(size, lead):
    x = torch.arange(int(np.prod(lead)) * size).view(*lead, size)
    steps = feedback.by_step(x)
    assert steps.shape == (4, *lead, size // 4)
    assert torch.equal(feedback.by_channel(steps), x)
    for c in range(size):
        s, w = step_and_place(c)
        assert torch.equal(steps[s, ..., w], x[..., c])


@pytest.mark.parametrize("format,rule", RULES)
def test_codes_are_those_of_channels_one_by_one(format, rule):
    x, given, g = rows(format, 40, 3), numbers(format, 3 * get_format(format).group_size), global_scale(format)
    codes, scales = feedback.quantize(x, format, rule, g, given)
    want = channel_by_channel(x, format, rule, None if g is None else g.item(), given)
    assert np.array_equal(formats.unpack(codes).numpy(), want)
    nearest = formats.quantize(x, format, rule, g)
    assert torch.equal(scales, nearest[1]) and not torch.equal(codes, nearest[0])


@pytest.mark.parametrize("format", FORMATS)
def test_without_feedback_and_with_zeros_codes_are_the_nearest(format):
    x, g = rows(format, 9, 2).view(3, 3, -1), global_scale(format)
    want = formats.quantize(x, format, "mse", g)
    for given in (None, torch.zeros(feedback.shape(format, x.shape[-1]), dtype=BF16)):
        got = feedback.quantize(x, format, "mse", g, given)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**100, -(2.0**127)])
def test_groups_without_small_values_are_rounded_to_nearest(format, value):
    size, g = get_format(format).group_size, global_scale(format)
    x, given = rows(format, 8, 3), numbers(format, 3 * size)
    clean = feedback.quantize(x, format, "absmax", g, given)[0]
    x[::2, size] = value
    codes = feedback.quantize(x, format, "absmax", g, given)[0].unflatten(1, (3, -1))
    nearest = formats.quantize(x, format, "absmax", g)[0].unflatten(1, (3, -1))
    clean = clean.unflatten(1, (3, -1))
    assert torch.equal(codes[::2, 1], nearest[::2, 1])
    assert torch.equal(codes[1::2], clean[1::2]) and torch.equal(codes[:, ::2], clean[:, ::2])


def test_the_largest_group_that_takes_feedback():
    """A factor that is a power of two changes no code of MXFP4, until 2^100 is reached."""
    x, given = rows("mxfp4", 8, 2), numbers("mxfp4", 64)
    x[:, ::32] = 15.875
    codes = feedback.quantize(x, "mxfp4", "absmax", None, given)[0]
    nearest = formats.quantize(x, "mxfp4", "absmax")[0]
    assert torch.equal(feedback.quantize(x * 2.0**96, "mxfp4", "absmax", None, given)[0], codes)
    assert torch.equal(feedback.quantize(x * 2.0**97, "mxfp4", "absmax", None, given)[0], nearest)
    assert not torch.equal(codes, nearest)


# -- the solver's numbers --------------------------------------------------------------------------------------------


def blocks(size, count=3, seed=0):
    """(T of WUSH, S̃ = T⁻ᵀ S T⁻¹) of random blocks, float64 [count, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(count, 1, size, dtype=torch.float64, generator=generator))
    x = torch.randn(count, 400, size, dtype=torch.float64, generator=generator) * spread
    x = x @ torch.randn(count, size, size, dtype=torch.float64, generator=generator)
    w = torch.randn(count, 70, size, dtype=torch.float64, generator=generator)
    root, gram = torch.linalg.cholesky(x.mT @ x / 400), w.mT @ w / 70
    t = wush_transform(root, gram, 0.01, rotation=rotation)
    inverse = torch.linalg.inv(t)
    return t, inverse.mT @ gram @ inverse


def costs(*shape, spread, seed=0):
    """Positive numbers whose logarithms are normal, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(spread * torch.randn(shape, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("spread", [0, 1e-9, 0.1, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_a_rotation_makes_steps_equally_dear(size, spread):
    """Q diag(d) Qᵀ = RᵀR, and each R_ss² is the geometric mean of d."""
    d = costs(5, 40, size, spread=spread)
    q = equal_steps(d)
    eye = torch.eye(size, dtype=torch.float64).expand_as(q)
    torch.testing.assert_close(q @ q.mT, eye, rtol=0, atol=1e-14)
    root = torch.linalg.cholesky((q * d[..., None, :]) @ q.mT)
    want = d.log().mean(-1, keepdim=True).div(2).exp().expand_as(d)
    torch.testing.assert_close(root.diagonal(dim1=-2, dim2=-1), want, rtol=1e-7, atol=0)


def test_values_on_the_mean_are_left_there():
    d = torch.tensor([[1.0, 4.0, 0.25, 1.0], [1, 1, 1, 1], [4, 1, 1, 0.25], [1e-4, 1e-4, 1e-4, 1.0]]).double()
    q = equal_steps(d)
    root = torch.linalg.cholesky((q * d[:, None, :]) @ q.mT)
    want = d.log().mean(-1, keepdim=True).div(2).exp().expand_as(d)
    torch.testing.assert_close(root.diagonal(dim1=1, dim2=2), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [16, 32, 64, 256])
def test_all_steps_cost_the_same_after_the_transform(size):
    """Each frequency of a step has an R with an equal diagonal."""
    _, cost = blocks(size)
    assert rotation(costs(0, size, spread=1)).shape == (0, size, size)
    had, at = hadamard_matrix(size // 4), feedback.by_step(torch.arange(size))
    matrix = torch.einsum("wk,bswtv,vl->bkslt", had, cost[:, at[:, :, None, None], at], had)  # [3, n, 4, n, 4]
    others = matrix * (1 - torch.eye(size // 4))[:, None, :, None]
    assert others.abs().max() < 1e-9 * cost.abs().max()  # frequencies do not mix
    small = matrix.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [3, n, 4, 4]
    mean = small.diagonal(dim1=-2, dim2=-1).mean((1, 2))[:, None, None, None]
    diagonal = torch.linalg.cholesky(small / mean + ROTATION_DAMPING * torch.eye(4)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, diagonal.mean(-1, keepdim=True).expand_as(diagonal), rtol=1e-6, atol=0)
    # Ranks are dealt so that the frequencies are alike: with the values of one share in each they are not.
    d = torch.linalg.eigvalsh(cost).flip(-1)
    plain = (d / d.mean(-1, keepdim=True) + ROTATION_DAMPING).log().view(3, 4, -1).mean(1).div(2).std(-1)
    assert (diagonal[..., 0].log().std(-1) < 0.8 * plain).all()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("n", [1, 8, 24, 32, 40, 200])
def test_errors_cost_less_where_few_outputs_read_them(n, size):
    """S̃ of `n` outputs has the rank n: in the other directions errors cost nothing."""
    x, w = problem(n=n, k=128, seed=1)
    losses = {}
    for rounding in ("nearest", "feedback"):
        found = solved(x, w, transform_block_size=size, activation_rounding=rounding)
        losses[rounding] = layer_loss(x, w, *found)[1]
    assert losses["feedback"] < 0.8 * losses["nearest"]


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_numbers_are_those_of_a_dense_factor(group, size):
    if size < group:
        return
    _, cost = blocks(size)
    got = feedback_of(cost, group)
    assert got.dtype == BF16 and got.shape == (3 * size // group, 6, group // 4) and got.is_contiguous()
    channels = feedback.by_step(torch.arange(group))  # [4, G/4]
    at = channels.flatten()
    for b in range(len(got)):
        block, low = divmod(b, size // group)
        own = cost[block, low * group :, low * group :][:group, :group]
        own = own + DAMPING * own.diagonal().mean() * torch.eye(group)
        root = torch.linalg.cholesky(own[at][:, at]).mT.view(4, group // 4, 4, group // 4)
        f = torch.from_numpy(dense(got[b]))
        for u in range(4):
            for s in range(u):
                want = torch.linalg.solve(root[s, :, s], root[s, :, u])
                torch.testing.assert_close(f[channels[s]][:, channels[u]], want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_errors_cost_less(format):
    size = get_format(format).group_size
    t, cost = blocks(size, count=40)
    generator = torch.Generator().manual_seed(1)
    # Inputs of the second moment that T makes of theirs.
    root = torch.linalg.cholesky(cost)
    x = torch.randn(40, 500, size, dtype=torch.float64, generator=generator) @ root.mT
    x, g = x.transpose(0, 1).flatten(1).float(), global_scale(format, 16.0)  # [500, 40·G]
    paid = []
    for given in (None, feedback_of(cost, size)):
        codes, scales = feedback.quantize(x, format, "mse", g, given)
        error = (formats.dequantize(codes, scales, format, g) - x).double().unflatten(1, (40, size))
        paid.append(torch.einsum("nbi,bij,nbj->b", error, cost, error))
    assert (paid[1] < paid[0]).all()  # of each block
    assert paid[1].sum() < 0.9 * paid[0].sum()


@pytest.mark.parametrize("group,size", [(16, 16), (32, 32), (32, 64)])
def test_blocks_without_a_cost_have_no_feedback(group, size):
    cost = torch.zeros(3, size, size, dtype=torch.float64)
    cost[1] = blocks(size)[1][1]
    found = feedback_of(cost, group).view(3, -1)
    assert not found[0].any() and found[1].any() and not found[2].any()
    same = 0.3 * torch.eye(size, dtype=torch.float64)[None]
    assert not feedback_of(same, group).any()


def test_what_no_cost_can_be_has_no_feedback():
    """Rounding makes S̃ of a transform near to singular indefinite."""
    cost = blocks(32)[1]
    cost[1] -= 0.5 * torch.linalg.eigvalsh(cost[1])[-1] * torch.eye(32)
    found = feedback_of(cost, 32)
    assert found.isfinite().all() and torch.equal(found[[0, 2]], feedback_of(cost[[0, 2]], 32))
    x, w = problem(n=1, k=64)
    for settings in ({"damping": 0.0}, {"damping": 1e-8}):
        assert solved(x, w, **settings)[0].input_feedback.isfinite().all()


def problem(n=24, k=96, count=400, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.exp(torch.randn(k, generator=generator))
    x = torch.randn(count, k, generator=generator) @ mix / k**0.5
    w = torch.randn(n, k, generator=generator) * torch.exp(0.5 * torch.randn(k, generator=generator)) * 0.02
    return x.to(dtype), w.to(dtype)


def solved(x, w, **settings):
    recipe = WushConfig(**settings).recipe
    moment = x.float().T @ x.float()
    return solve(w, recipe, moment=moment, count=len(x), sample=x[:64], name="a"), recipe


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_solution_has_the_numbers_of_its_rounded_transform(format, solver):
    x, w = problem(dtype=BF16)
    solution, recipe = solved(x, w, format=format, solver=solver)
    inverse = torch.linalg.inv(solution.transform.double())
    wide = w.double().unflatten(1, (len(inverse), -1)).transpose(0, 1)
    want = feedback_of(inverse.mT @ (wide.mT @ wide / len(w)) @ inverse, recipe.group_size)
    assert solution.input_feedback.any()
    assert torch.equal(solution.input_feedback, want)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("format", FORMATS)
def test_layer_losses_fall(format, solver, moments):
    x, w = problem(n=60, k=128, count=1000)
    losses = {}
    for rounding in ("nearest", "feedback"):
        settings = dict(format=format, solver=solver, moments=moments, activation_rounding=rounding)
        solution, recipe = solved(x, w, **settings)
        losses[rounding] = layer_loss(x, w, solution, recipe)[1]
    assert losses["feedback"] < 0.97 * losses["nearest"]


def test_experts_have_the_numbers_of_their_transform():
    """Of the mean over all their rows; each expert's rows are rounded with them in its loss."""
    x, _ = problem(count=1200)
    weights = torch.stack([problem(seed=e)[1] for e in range(3)])
    rows = x.view(3, 400, -1)
    found = {}
    for rounding in ("nearest", "feedback"):
        recipe = WushConfig(activation_rounding=rounding).recipe
        given = dict(moment=rows.mT @ rows, count=torch.full((3,), 400), sample=x[:64], name="a")
        solution = solve_experts(weights, recipe, **given)
        error, power = experts_loss(x, torch.arange(3).repeat_interleave(400), weights, solution, recipe)
        found[rounding] = error / power
    inverse = torch.linalg.inv(solution.transform.double())
    gram = sum(w.mT @ w for w in weights.double().unflatten(2, (3, 32)).transpose(1, 2)) / 24 / 3
    assert torch.equal(solution.input_feedback, feedback_of(inverse.mT @ gram @ inverse, 32))
    assert found["feedback"] < 0.97 * found["nearest"]


def test_dead_blocks_have_zeros():
    x, w = problem()
    x[:, :32] = 0
    w[:, 64:] = 0
    for solver in SOLVERS:
        for moments in MOMENTS:
            found = solved(x, w, solver=solver, moments=moments)[0].input_feedback
            assert not found[0].any() and found[1].any() and not found[2].any()


def test_blocks_of_two_groups():
    x, w = problem(k=128)
    solution, recipe = solved(x, w, transform_block_size=64)
    inverse = torch.linalg.inv(solution.transform.double())
    wide = w.double().unflatten(1, (2, 64)).transpose(0, 1)
    assert solution.input_feedback.shape == (4, 6, 8)
    assert torch.equal(solution.input_feedback, feedback_of(inverse.mT @ (wide.mT @ wide / len(w)) @ inverse, 32))
    nearest = solved(x, w, transform_block_size=64, activation_rounding="nearest")
    assert layer_loss(x, w, solution, recipe)[1] < 0.97 * layer_loss(x, w, *nearest)[1]


NEAREST = [
    {"activation_rounding": "nearest"},
    {"transform": "wus"},
    {"transform": "hadamard"},
    {"transform": "random"},
    {"transform": "identity"},
    {"activation_format": "fp8"},
    {"activation_format": None},
    {"activation_scale_rule": "paper"},
    {"format": "int4"},
]


@pytest.mark.parametrize("settings", NEAREST, ids=str)
def test_where_the_setting_has_no_effect(settings):
    x, w = problem()
    solution, recipe = solved(x, w, **settings)
    assert not recipe.rounds_with_feedback and solution.input_feedback is None
    same, _ = solved(x, w, **settings | {"activation_rounding": "nearest"})
    assert solution.transform is same.transform or torch.equal(solution.transform, same.transform)
    assert torch.equal(solution.weight_packed, same.weight_packed)


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_the_rotation_of_the_solved_transform(rounding):
    x, w = problem(n=60)
    solution, _ = solved(x, w, activation_rounding=rounding)
    h = diagonal_blocks((x.T @ x).double() / len(x), 32)
    root = torch.linalg.cholesky(h + 0.01 * h.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(32))
    wide = w.double().unflatten(1, (3, 32)).transpose(0, 1)
    power, turn = (FEEDBACK_POWER["mxfp4"], rotation) if rounding == "feedback" else (1 / 2, None)
    want = wush_transform(root, wide.mT @ wide / len(w), 0.01, power=power, rotation=turn)
    torch.testing.assert_close(solution.transform, want.float(), rtol=1e-5, atol=1e-6)


# -- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    width, g = 64, global_scale(format)
    t = torch.randn(width // 32, 32, 32)
    for lead in [(), (0,), (5,), (2, 3)]:
        opcheck(transform_quantize, (torch.randn(*lead, width), t, g, format, "mse", "rows", numbers(format, width)))


@pytest.mark.parametrize("format", FORMATS)
def test_the_op_transforms_and_rounds_with_feedback(format):
    """Rows are rounded each for itself: also where the reference takes them in parts."""
    width, g = 2 * get_format(format).group_size, global_scale(format)
    x, t = rows(format, 4096, 2), torch.randint(-2, 3, (1, 16, 16)).float()
    given = numbers(format, width)
    y = torch.einsum("nbi,ji->nbj", x.unflatten(1, (-1, 16)), t[0]).flatten(1)
    got = transform_quantize(x, t, g, format, "absmax", "rows", given)
    for a, b in zip(got, feedback.quantize(y, format, "absmax", g, given), strict=True):
        assert torch.equal(a, b)
    again = transform_quantize(x[7:8], t, g, format, "absmax", "rows", given)
    assert torch.equal(again[0], got[0][7:8])


@pytest.mark.parametrize(
    "given,format,rule,message",
    [
        (torch.zeros(2, 6, 8), "mxfp4", "mse", "float32, not bfloat16"),
        (torch.zeros(4, 6, 8, dtype=BF16), "mxfp4", "mse", "shape"),
        (torch.zeros(2, 6, 8, dtype=BF16), "nvfp4", "mse", "shape"),
        (torch.zeros(2, 6, 8, dtype=BF16), "mxfp4", "paper", "takes no feedback"),
        (torch.zeros(2, 6, 8, dtype=BF16), "int4", "mse", "takes no feedback"),
        (torch.zeros(2, 6, 8, dtype=BF16, device="meta"), "mxfp4", "mse", "feedback on meta"),
    ],
)
def test_what_the_op_refuses(given, format, rule, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        FAKE["transform_quantize"](torch.randn(3, 64), None, global_scale(format), format, rule, "rows", given)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_every_quantizer_of_a_compiled_model_has_its_feedback(format):
    """Through all passes, each in the fused op that takes the quantizer's place; `run` demands the bits of eager."""
    model = wc.quantize(plain("llama", layers=1), [tokens(2, 16, seed=1)], format=format, progress=False)
    seen = run(model, tokens(2, 9), use_cache=False)
    lines = [line for line in seen.after.splitlines() if "transform_quantize(" in line]
    assert [re.search(r"wush\.(\w+)\(", line)[1] for line in lines] == [
        "rms_norm_transform_quantize",
        "transform_quantize",
        "rms_norm_transform_quantize",
        "silu_mul_transform_quantize",
    ]
    found = [re.findall(r"([\w.]+)\.input_(transform|feedback)", line) for line in lines]
    for first, second in found:
        assert first == (second[0], "transform") and second[1] == "feedback"
    assert len({first[0] for first, _ in found}) == 4


@pytest.mark.parametrize("format", FORMATS)
def test_inlined_programs_round_with_feedback(format):
    """Without an op of ours and without constants; the reference goes on as before."""
    model = wc.quantize(plain("llama", layers=1), [tokens(2, 16, seed=1)], format=format, solver="rtn", progress=False)
    ids = tokens(2, 9)
    with torch.no_grad():
        program = wc.fuse(torch.export.export(Logits(model), (ids,)), inline=True)
        assert not count_ops(program.graph)
        assert torch.equal(program.module()(ids), Logits(model)(ids))


def test_groups_of_one_model_may_differ():
    """In eager mode, compiled, and loaded."""
    torch.manual_seed(0)
    overrides = {"o_proj": {"activation_rounding": "nearest"}, "down_proj": {"format": "nvfp4"}}
    model = plain("llama", layers=1)
    wc.quantize(model, [tokens(2, 16, seed=1)], overrides=overrides, solver="rtn", progress=False)
    seen = run(model, tokens(2, 9), use_cache=False)
    lines = [line for line in seen.after.splitlines() if "transform_quantize(" in line]
    assert ["input_feedback" in line for line in lines] == [True, False, True, True]
    assert "'rows'" not in lines[1]  # a graph of rounding to nearest names neither of the last arguments
    shapes = [None if g.input_feedback is None else tuple(g.input_feedback.shape) for _, g in named_groups(model)]
    assert shapes == [(2, 6, 8), None, (2, 6, 8), (8, 6, 4)]


def test_experts_share_their_feedback(tmp_path):
    losses = {}
    for rounding in ("nearest", "feedback"):
        model = wc.quantize(moe("qwen3_moe"), [tokens(8, 64)], activation_rounding=rounding, progress=False)
        losses[rounding] = {name: one["relative_loss"] for name, one in quantization_of(model).report.items()}
    groups = {name: group for name, group in named_groups(model) if isinstance(group, ExpertGroup)}
    assert len(groups) == 2
    for name, group in groups.items():
        assert group.input_feedback.shape == (2, 6, 8) and group.input_feedback.any()
        assert losses["feedback"][group.members[0].name] < losses["nearest"][group.members[0].name], name
    wc.save(model, tmp_path)
    again = wc.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_loses_less_by_default(format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 64)).bfloat16()
    mix = torch.randn(128, 128) / 8
    data = [(torch.randn(64, 128) @ mix).bfloat16() for _ in range(16)]
    losses = []
    for settings in ({"activation_rounding": "nearest"}, {}):
        quantized = wc.quantize(copy.deepcopy(model), data, format=format, progress=False, **settings)
        losses.append([report["relative_loss"] for report in quantization_of(quantized).report.values()])
        for _, group in named_groups(quantized):
            assert (group.input_feedback is None) == bool(settings)
    assert all(b < 0.99 * a for a, b in zip(*losses, strict=True))
