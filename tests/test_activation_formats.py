"""Activations in 8 and 16 bits beside 4-bit weights: formats, ops, and every way that a quantized model goes."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_like_eager, emulates_rounding, files, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from models import pair, pair_rows, plain, tokens
from torch.export import Dim

import wush_compile as wc
from wush_compile import formats
from wush_compile.errors import ConfigError
from wush_compile.graphs.printing import count_ops
from wush_compile.ops.core import block_transform

wush = torch.ops.wush
ACTIVATIONS = ["fp8", None]
# Every finite e4m3 magnitude, by its byte.
E4M3 = np.array([(m + 8 * (e > 0)) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])


def oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row's scale in fp32, and its codes by exhaustive search in float64: nearest, ties to the even code."""
    amax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(2.0**-100)).astype(np.float32)
    y = (x * (np.float32(1) / amax * np.float32(448))).astype(np.float32)  # fp32, in this order
    distance = np.abs(np.minimum(np.abs(y), 448).astype(np.float64)[..., None] - E4M3)
    nearest = distance.min(-1, keepdims=True)
    ties = distance == nearest
    first = ties.argmax(-1)
    codes = np.where((ties.sum(-1) > 1) & (first % 2 == 1), first + 1, first)
    return (codes | (np.signbit(y) << 7)).astype(np.uint8), amax * np.float32(1 / 448)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.sampled_from([1, 3, 32, 65]))
def test_fp8_is_the_nearest_code_of_an_exhaustive_search(seed, octave, width):
    x = (np.random.default_rng(seed).standard_normal((3, width)) * 2.0**octave).astype(np.float32)
    x[0, 0] = 0.0
    codes, scales = formats.quantize_fp8(torch.from_numpy(x))
    expected, factors = oracle(x)
    assert np.array_equal(codes.numpy(), expected) and np.array_equal(scales.numpy(), factors)
    decoded = formats.dequantize_fp8(codes, scales).numpy().astype(np.float64)
    assert np.abs(decoded - x).max() <= (np.abs(x).max() / 448) * 16 * (1 + 1e-6)  # half a step at the top


def test_fp8_of_extreme_rows():
    x = torch.tensor(
        [[0.0, -0.0], [1e-42, -1e-42], [3e38, 1.0], [float("inf"), 1.0], [1.0, float("nan")], [2.0, -448.0]]
    )
    codes, scales = formats.quantize_fp8(x)
    decoded = formats.dequantize_fp8(codes, scales)
    assert torch.equal(decoded[0], torch.zeros(2)) and torch.signbit(decoded[0]).tolist() == [False, True]
    assert decoded[2].isfinite().all() and decoded[3].isnan().all() and decoded[4].isnan().all()
    assert torch.equal(decoded[5], x[5])
    assert codes[3:5].eq(0).all()
    every = torch.arange(127, dtype=torch.uint8)[None]
    assert np.array_equal(formats.dequantize_fp8(every, torch.ones(1, 1))[0].double().numpy(), E4M3)


def weights(format: str, n: int = 24, k: int = 64):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    return formats.quantize(w, format, "absmax")


@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
@pytest.mark.parametrize("activation", ["fp8", "none"])
def test_the_product_is_that_of_the_decoded_operands(format, activation, rows):
    x = torch.randn(rows, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    t = torch.randn(64 // 32, 32, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    codes, scales = wush.transform_quantize(x, t, None, activation, "token" if activation == "fp8" else "none")
    w_codes, w_scales = weights(format)
    got = wush.fp4_linear(
        codes, scales, None, w_codes, w_scales, None, None, None, format, torch.float32, "rows", activation
    )
    decoded = formats.dequantize_fp8(codes, scales) if activation == "fp8" else codes.float()
    want = decoded.double() @ formats.dequantize(w_codes, w_scales, format).double().T
    assert got.shape == (rows, 2, 24) and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)
    if activation == "none":
        assert torch.equal(codes, block_transform(x, t).bfloat16()) and scales.shape == (rows, 2, 0)
    else:
        assert codes.shape == x.shape and scales.shape == (rows, 2, 1)


@pytest.mark.parametrize("activation", ["fp8", "none"])
def test_ops_keep_their_contract(activation):
    rule = "token" if activation == "fp8" else "none"
    x, t = torch.randn(3, 64).bfloat16(), torch.randn(2, 32, 32).bfloat16()
    torch.library.opcheck(wush.transform_quantize.default, (x, t, None, activation, rule))
    torch.library.opcheck(wush.transform_quantize.default, (x, None, None, activation, rule))
    codes, scales = wush.transform_quantize(x, t, None, activation, rule)
    args = codes, scales, None, *weights("mxfp4"), None, None, None, "mxfp4", torch.bfloat16, "rows", activation
    torch.library.opcheck(wush.fp4_linear.default, args)


def test_unknown_formats_are_refused():
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="scale rule 'mse' is not one of fp8's: token"):
        wush.transform_quantize(x, None, None, "fp8", "mse")
    with pytest.raises(ConfigError, match="unknown activation_format 'fp9'; did you mean 'fp8'.*same, fp8, None"):
        wc.WushConfig(activation_format="fp9")


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4", "int8"])
@pytest.mark.parametrize("activation", ["fp8", "none"])
def test_a_row_that_is_not_finite_stays_alone(format, activation):
    x = torch.randn(4, 64)
    x[1, 5] = float("nan")
    codes, scales = wush.transform_quantize(x, None, None, activation, "token" if activation == "fp8" else "none")
    y = wush.fp4_linear(
        codes, scales, None, *weights(format), None, None, None, format, torch.float32, "rows", activation
    )
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_more_bits_lose_less(format):
    """Losses of the same weights: 4 bits > fp8 > 16 bits of activations."""
    model = plain("llama")
    losses = []
    for activation in ("same", "fp8", None):
        quantized = quantize(copy.deepcopy(model), tokens(4, 32), format=format, activation_format=activation)
        report = quantized.wush_quantization.report
        losses.append(sum(group["relative_loss"] for group in report.values()))
    assert losses[0] > 1.3 * losses[1] > 1.3 * losses[2]


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_loaded_compiled_exported(activation, tmp_path):
    settings = dict(activation_format=activation, overrides={"*.o_proj": {"activation_format": "same"}})
    model, ids = quantize(plain("llama"), tokens(2, 16), **settings), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    wc.save(model, tmp_path / "a")
    loaded = wc.load(tmp_path / "a")
    assert torch.equal(loaded(ids, use_cache=False).logits, expected)
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    assert f"activation_format={activation}" in wc.explain(loaded, all=True).replace("'", "")
    wc.save(loaded, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    owner = loaded.model.layers[0].mlp.down_proj.owner
    assert owner.input_global_scale is None and owner.recipe.activation_format == activation

    options = {"emulate_precision_casts": True} if emulates_rounding() else {}
    with wc.trace_graphs() as log:
        compiled = torch.compile(copy.deepcopy(model), backend="wush", options=options)
        assert_like_eager(
            lambda: compiled(ids, use_cache=False).logits,
            lambda: model(ids, use_cache=False).logits,
            exact=emulates_rounding(),
        )
    counts = log.graphs[0].snapshots[-1].counts
    assert counts["fp4_linear"] == 8 and counts["rms_norm_transform_quantize"] == 4

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    for inline in (False, True):
        program = torch.export.export(Logits(), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
        wc.fuse(program, inline=inline)
        assert count_ops(program.graph).get("fp4_linear", 0) == (0 if inline else 8)
        assert torch.equal(program.module()(ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_module_of_any_size(activation):
    model = pair(activation_format=activation)
    for rows in (0, 1, 129):
        x = pair_rows(rows)
        y = model(x)
        assert y.shape == x.shape and y.isfinite().all()


def test_the_stream_is_that_of_the_recipe():
    """A later layer is calibrated on what the layer before it produces with its own activation format."""
    losses = []
    for activation in ("same", None):
        overrides = {"model.layers.0.*": {"activation_format": activation}}
        model = quantize(plain("llama"), tokens(4, 32), overrides=overrides)
        losses.append(model.wush_quantization.report["model.layers.1.self_attn.q_proj"]["loss"])
    assert losses[0] != losses[1]


def test_data_is_not_needed_for_a_global_scale_that_is_not_there():
    rounding = dict(format="nvfp4", solver="rtn", transform="hadamard")
    assert wc.WushConfig(**rounding).needs_data
    assert not wc.WushConfig(**rounding, activation_format="fp8").needs_data
