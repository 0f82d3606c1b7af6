"""`torch.compile(backend="wush")` on a GPU: bits of eager, flipped codes, CUDA graphs, faults, packages."""

import contextlib
import copy

import pytest
import torch
from helpers import with_equal_codes
from models import pair, pair_rows, plain, quantized, tokens
from test_backend import EXACT, FUSED, Mlp, divergence, fresh, mlp, offload, own_cache, rows  # noqa: F401  (fixtures)
from torch._dynamo.utils import counters
from transformers import CompileConfig

import wush_compile as wc
from wush_compile.kernels import dispatch as kernels
from wush_compile.ops import fused as fused_ops
from wush_compile.passes.execution import lay_out_scales

pytestmark = pytest.mark.gpu
PROVIDERS = kernels.resolve


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_gpu_linears_give_the_bits_of_eager(format, mode):
    model = pair(layers=2, format=format).cuda()
    run = torch.compile(model, backend="wush", mode=mode, fullgraph=True)
    for lead in ((1, 1), (2, 5), (1, 1), (64, 8)):
        x = pair_rows(*lead).cuda()
        expected = model(x)
        for _ in range(3):  # warm-up, capture, replay
            assert torch.equal(run(x), expected), lead


@pytest.mark.parametrize("op, prologue", [(op, p) for op, prologues in FUSED.items() for p in prologues])
def test_gpu_fused_ops_compile_to_themselves(op, prologue):
    function = getattr(torch.ops.wush, op).default
    x, w = rows(2, 5).cuda(), rows(1, seed=1)[0].cuda()
    args = (*(a.cuda() if isinstance(a, torch.Tensor) else a for a in prologue(x, w)), None, None, "mxfp4", "absmax")
    with torch._inductor.config.patch(force_disable_caches=True), wc.trace_graphs() as log:
        compiled_result = torch.compile(function, backend="wush", fullgraph=True, options=EXACT, dynamic=True)(*args)
    result = function(*args)
    if log.graphs[0].snapshots[-1].counts[op]:  # its provider has a kernel: the same one
        assert all(map(torch.equal, compiled_result, result))
    flipped = [(a != b).float().mean().item() for a, b in zip(compiled_result, result)]
    reference = fused_ops.FUSED_REFERENCE[op](*args)
    far = [(a != b).float().mean().item() for a, b in zip(result, reference)]
    assert max(flipped + far) <= 0.05, (flipped, far)  # another order of the norm's sum


@contextlib.contextmanager
def watch_gpu(watch):
    """Every quantizer, also a fused one, returns what `watch` makes of its codes and scales."""

    def watching(entries):
        def accepting(args):
            return next((kernel for _, kernel in entries if kernel.refuses(*args) is None), None)

        def run(*args):
            return watch(accepting(args).run(*args))

        return [("watched", kernels.Implementation(run, lambda *args: None if accepting(args) else "refused"))]

    table = PROVIDERS(0)
    quantizers = {op: watching(entries) for op, entries in table.items() if op.endswith("transform_quantize")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "resolve", lambda device: {**table, **quantizers})
        yield


def test_gpu_blocks_are_eager_up_to_flipped_codes():
    """With equal codes only residuals are left, one rounding to bf16 each. CUDA graphs do not change a bit."""
    model = mlp(layers=2, format="nvfp4").cuda()
    run = torch.compile(model, backend="wush", fullgraph=True)
    graphs = torch.compile(model, backend="wush", fullgraph=True, mode="reduce-overhead")
    for lead in ((1, 1), (64, 8)):
        x = rows(*lead).cuda()
        expected = run(x).clone()
        actual, replayed, flipped = with_equal_codes(lambda: run(x), lambda: model(x), watch_gpu)
        assert max(flipped) <= 0.05, flipped
        assert torch.equal(actual, expected)
        assert (actual.double() - replayed.double()).norm() <= 2**-8 * replayed.double().norm()
        for _ in range(3):  # warm-up, capture, replay
            assert torch.equal(graphs(x), expected)


def test_gpu_what_differs_from_eager_is_flipped_codes(monkeypatch):
    """Only packed codes can be compared, so no activation takes the layout `lanes`; other tests hold its bits equal."""
    monkeypatch.setattr(lay_out_scales, "layouts_of", lambda *args: ("rows",))
    layers, ids = 2, tokens(4, 64).cuda()
    full = plain("llama", layers=layers).cuda()
    unquantized = divergence(
        full(ids, use_cache=False).logits, torch.compile(full, backend="inductor")(ids, use_cache=False).logits
    )
    torch._dynamo.reset()
    model = quantized("llama", "nvfp4", layers=layers).cuda()
    run = torch.compile(model, backend="wush", fullgraph=True)
    eager = model(ids, use_cache=False).logits
    with torch._inductor.config.patch(force_disable_caches=True):
        run(ids, use_cache=False)
    actual, replayed, flipped = with_equal_codes(
        lambda: run(ids, use_cache=False).logits, lambda: model(ids, use_cache=False).logits, watch_gpu
    )
    kl = divergence(replayed, actual)
    print(
        f"KL of bf16 under Inductor {unquantized:.2e}; of the quantized model {divergence(eager, actual):.2e}, "
        f"with the same codes {kl:.2e}; flipped bytes {[round(f, 4) for f in flipped]}"
    )
    assert max(flipped) <= 0.05, flipped
    assert kl <= 2 * unquantized


def test_gpu_generate_with_a_static_cache():
    model = quantized("llama").cuda()
    ids = tokens(2, 6).cuda()
    settings = dict(max_new_tokens=64, do_sample=False, cache_implementation="static")
    expected = model.generate(ids, **settings, disable_compile=True)
    config = CompileConfig(backend="wush", mode="reduce-overhead", fullgraph=True)
    actual = model.generate(ids, **settings, compile_config=config)
    # Inductor's arithmetic rounds differently from eager's: tokens may differ after a near tie.
    assert (actual[:, :12] == expected[:, :12]).all()
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_gpu_provider_that_fails_falls_back_with_one_warning(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no such instruction")

    model, x = pair().cuda(), pair_rows(2, 5).cuda()  # quantized on the CPU, by what resolve says of it
    entry = ("triton", kernels.Implementation(broken, lambda *args: None))
    table = {op: [*entries] for op, entries in kernels.resolve(0).items()} | {"fp4_linear": [entry]}
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    run = torch.compile(model, backend="wush", fullgraph=True)
    with caplog.at_level("WARNING", "wush_compile"):
        first, second = run(x), run(x)
    assert torch.equal(first, second) and torch.equal(model(x), first) and table["fp4_linear"] == []
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "wush_compile")
    assert warning.startswith("triton failed in fp4_linear") and "no such instruction" in warning


@pytest.mark.parametrize("where", ["cpu_offload", "device_map"])
def test_gpu_offloaded_models_run_and_compile(where, tmp_path):
    model, x = pair(layers=2), pair_rows(2, 5).cuda()
    expected = copy.deepcopy(model).cuda()(x)
    offload(model, where, {"0": 0, "1": "cpu"}, tmp_path)
    assert torch.equal(model(x), expected)
    run = torch.compile(model, backend="wush")
    assert torch.equal(run(x), expected) and torch.equal(run(x), expected)


def test_gpu_packages_of_narrow_layers_inline_the_arithmetic(shared_libstdcxx, tmp_path):
    torch.manual_seed(0)
    full = torch.nn.Sequential(Mlp()).cuda()  # the weights of `mlp()`
    model, x = mlp().cuda(), rows(2, 5).cuda()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    path = torch._inductor.aoti_compile_and_package(wc.fuse(program, inline=True), package_path=str(tmp_path / "m.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for lead in ((2, 5), (3, 7)):
        x = rows(*lead).cuda()
        # A share f of flipped codes moves values by √(12 f) of what quantization itself does: half allows 2 %.
        assert (packaged(x) - model(x)).norm() <= 0.5 * (full(x) - model(x)).norm()
