"""`torch.compile(backend="wush")`: by name, whole, by region, through generate; recompiles, caches and faults."""

import copy
import functools
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_like_eager, emulates_rounding, quantize, with_equal_codes
from models import plain, quantized, tokens
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

import wush_compile as wc
from wush_compile import backend
from wush_compile.errors import ConfigError
from wush_compile.kernels import dispatch as kernels
from wush_compile.ops import core as ops
from wush_compile.ops.fused import ACTIVATIONS

EXACT = {"emulate_precision_casts": True}
EMULATED = emulates_rounding()


class Mlp(nn.Module):
    """Norm, gate, up, down, residual: fuses into four ops, so that Inductor needs no C++ compiler."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6, dtype=dtype)
        self.gate = nn.Linear(64, 96, bias=False, dtype=dtype)
        self.up = nn.Linear(64, 96, bias=False, dtype=dtype)
        self.down = nn.Linear(96, 64, dtype=dtype)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def mlp(layers: int = 1, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Mlp() for _ in range(layers)))
    return quantize(model, rows(2, 5), **{"transform": "hadamard", **settings})


def rows(*lead: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*lead, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compiled code of this file is kept in a folder of its own, and shared between its tests."""
    folder = str(tmp_path_factory.mktemp("inductor"))
    old = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    yield folder
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR") if old is None else os.environ.update(TORCHINDUCTOR_CACHE_DIR=old)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


def compiled(model, **options):
    return torch.compile(model, backend="wush", fullgraph=True, options=EXACT, **options)


# -- by name, mode, options ------------------------------------------------------------------------------------------

BY_NAME = """
import sys, warnings, torch
assert "wush_compile" not in sys.modules
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for rows in (2, 3, 4):
            x = torch.randn(rows, 4)
            torch._dynamo.reset()
            assert torch.allclose(torch.compile(model, backend="wush")(x), model(x), atol=1e-6)
ours = [str(w.message) for w in caught if "wush" in str(w.message)]
assert len(ours) == 1 and "quantize(model)" in ours[0], ours
"""


def test_the_backend_is_found_by_name_and_warns_once_about_unquantized_models(tmp_path):
    done = subprocess.run([sys.executable, "-c", BY_NAME], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_mode_and_options_reach_inductor(monkeypatch):
    from torch._inductor import config

    seen = []
    original = backend.passes.run

    def run(graph, steps, after=None):
        seen.append((config.max_autotune, config.emulate_precision_casts))
        return original(graph, steps, after)

    monkeypatch.setattr(backend.passes, "run", run)
    model, x = mlp(), rows(2, 5)
    with config.patch(force_disable_caches=True):
        torch.compile(model, backend="wush", mode="max-autotune-no-cudagraphs")(x)
        torch._dynamo.reset()
        torch.compile(model, backend="wush", options={"emulate-precision-casts": True})(x)
    assert seen == [(True, False), (False, True)]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="did you mean 'max_autotune'") as caught:
        torch.compile(model, backend="wush", options={"max_autotunes": True})(x)
    assert isinstance(caught.value, ConfigError) or "ConfigError" in str(caught.value)


# -- numerics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, dynamic",
    [
        ("mxfp4", None),
        ("mxfp4", True),
        ("mxfp4", False),
        ("nvfp4", None),
        ("int4", True),
    ],
)
def test_a_compiled_block_gives_the_bits_of_eager(format, dynamic):
    model = mlp(format=format)
    run = compiled(model, dynamic=dynamic)
    for lead in ((2, 5), (3, 7), (1, 1), (0, 4)):
        assert torch.equal(run(rows(*lead)), model(rows(*lead))), lead


@pytest.mark.parametrize("kind, dynamic", [("llama", None), ("qwen3", True), ("gemma3", False)])
def test_whole_models_give_the_logits_of_eager(kind, dynamic):
    model = quantized(kind, "nvfp4", layers=1)
    run = compiled(model, dynamic=dynamic)
    for shape in ((2, 9), (1, 12))[: 2 if dynamic is None else 1]:
        ids = tokens(*shape)
        assert_like_eager(
            lambda: run(ids, use_cache=False).logits, lambda: model(ids, use_cache=False).logits, EMULATED
        )


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(reference ‖ other) of logits."""
    a, b = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_what_differs_without_emulated_rounding_is_flipped_codes():
    ids = tokens(4, 64)
    model = quantized("llama", "nvfp4", layers=1)
    run = torch.compile(model, backend="wush", fullgraph=True)
    actual, replayed, flipped = with_equal_codes(
        lambda: run(ids, use_cache=False).logits, lambda: model(ids, use_cache=False).logits
    )
    assert len(flipped) == 4 and flipped[0] == 0 and 0 < max(flipped) < 0.05
    # The same model in full precision is at 2.2e-7 under Inductor; with its flipped codes this one is at 9.8e-7.
    assert divergence(replayed, actual) <= 2 * 2.2e-7  # measured: 0
    assert divergence(model(ids, use_cache=False).logits, actual) > 0


def test_regions_share_one_graph_and_keep_their_own_weights():
    model = mlp(layers=3)
    x = rows(2, 5)
    expected = model(x)
    for layer in model:
        layer.compile(backend="wush", fullgraph=True, options=EXACT)
    assert torch.equal(model(x), expected)
    assert counters["stats"]["unique_graphs"] == 1
    model[1].gate.group.weight_packed.bitwise_xor_(8 << 4)  # flips signs: a graph that had baked it in would not notice
    changed = model(x)
    assert not torch.equal(changed, expected)
    assert torch.equal(changed, copy.deepcopy(model)(x))


def test_compiling_without_no_grad_works():
    model, x = mlp(), rows(2, 5)
    with torch.enable_grad():
        assert torch.equal(compiled(model)(x), model(x))


FUSED = {
    "rms_norm_transform_quantize": [
        lambda x, w: (x, w, 1e-6, None, "rounded"),
        lambda x, w: (x, w, 1e-6, None, "wide_plus_one"),
        lambda x, w: (x, w, 0.0, torch.tensor(1e-6, dtype=torch.float64), "wide"),
        lambda x, w: (x, None, 1e-6, None, "none"),
    ],
    "add_rms_norm_transform_quantize": [
        lambda x, w: (x, x.flip(-1), w, 1e-6, None, "rounded"),
        lambda x, w: (x, x.flip(-1), None, 0.0, torch.tensor(1e-6, dtype=torch.float64), "none"),
    ],
    "layer_norm_transform_quantize": [
        lambda x, w: (x, w, w.flip(0), 1e-5, None),
        lambda x, w: (x, None, None, 0.0, torch.tensor(1e-5)),
    ],
    "rms_norm_keep_transform_quantize": [
        lambda x, w: (x, w, 1e-6, None, "rounded"),
        lambda x, w: (x, w, 0.0, torch.tensor(1e-6, dtype=torch.float64), "wide"),
    ],
    "layer_norm_keep_transform_quantize": [lambda x, w: (x, w, w.flip(0), 1e-5, None)],
    "activation_transform_quantize": [lambda x, w, kind=kind: (x, kind) for kind in ACTIVATIONS],
    "silu_mul_transform_quantize": [lambda x, w: (x, x.flip(-1))],
    "gelu_mul_transform_quantize": [
        lambda x, w: (x, x.flip(-1), "tanh"),
        lambda x, w: (x[..., ::2], x[..., 1::2], "none"),
    ],
    "swiglu_oai_transform_quantize": [lambda x, w: (torch.cat((4 * x, x), -1), 7.0)],
}


@pytest.mark.parametrize("op, prologue", [(op, p) for op, prologues in FUSED.items() for p in prologues])
def test_fused_ops_are_what_they_fuse(op, prologue):
    function = getattr(torch.ops.wush, op).default
    run = torch.compile(function, backend="wush", fullgraph=True, options=EXACT, dynamic=True)
    for lead in ((3,), (2, 5), (0,), ()):
        x, w = rows(*lead), rows(1, seed=1)[0]
        args = (*prologue(x, w), None, None, "mxfp4", "absmax")
        if x.numel():
            torch.library.opcheck(function, args)
        for a, b in zip(run(*args), function(*args)):
            assert torch.equal(a, b)


# -- generate, recompiles --------------------------------------------------------------------------------------------


def test_generate_with_static_and_dynamic_caches():
    model = quantized("llama", layers=1)
    ids = tokens(2, 6)
    settings = dict(max_new_tokens=20, do_sample=False)
    config = CompileConfig(backend="wush", mode=None, fullgraph=True, options=EXACT)
    config._compile_all_devices = True  # transformers compiles only on GPUs unless told
    expected = model.generate(ids, **settings, cache_implementation="static", disable_compile=True)
    assert counters["stats"]["unique_graphs"] == 0
    actual = model.generate(ids, **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(actual, expected)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2

    expected = model.generate(ids, **settings)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="wush", options=EXACT)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("dynamic", [True, False])
def test_generate_compiled_with_and_without_dynamic_shapes(dynamic):
    model = quantized("llama", layers=1)
    settings = dict(max_new_tokens=3, do_sample=False)
    expected = model.generate(tokens(2, 6), **settings)
    model.forward = torch.compile(model.forward, backend="wush", dynamic=dynamic, options=EXACT)
    assert torch.equal(model.generate(tokens(2, 6), **settings), expected)
    assert counters["stats"]["unique_graphs"] >= 1


def test_a_static_decode_loop_of_64_tokens_compiles_two_graphs():
    from transformers import StaticCache

    model = quantized("llama", layers=1)
    run = torch.compile(model, backend="wush", fullgraph=True, options=EXACT, dynamic=False)

    def decode(forward):
        cache = StaticCache(config=model.config, max_cache_len=80)
        ids, position, out = tokens(1, 6), torch.arange(6), []
        for _ in range(64):
            logits = forward(ids, past_key_values=cache, cache_position=position, position_ids=position[None]).logits
            ids = logits[:, -1:].argmax(-1)
            position = position[-1:] + 1
            out.append(ids)
        return torch.cat(out, 1)

    expected = decode(model)
    assert torch.equal(decode(run), expected)
    assert counters["stats"]["unique_graphs"] == 2


# -- caches ----------------------------------------------------------------------------------------------------------


def cache_counts(model, x) -> tuple[int, int]:
    """(hits, misses) of compiling anew."""
    torch._dynamo.reset()
    counters.clear()
    compiled(model)(x)
    inductor = counters["inductor"]
    return inductor["fxgraph_cache_hit"], inductor["fxgraph_cache_miss"]


def copy_of_the_package(root: Path, changed: str | None = None) -> Path:
    """A copy of the package's sources; a line is added to `changed`, which may be a new file."""
    shutil.copytree(backend._ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    if changed is not None:
        (root / changed).parent.mkdir(exist_ok=True)
        with (root / changed).open("a") as source:
            source.write("# another line\n")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "backend.py",
        "formats.py",
        "ops/core.py",
        "passes/pattern.py",
        "passes/execution/cse.py",
        "passes/execution/added.py",
        "passes/added/added.py",
        "kernels/dispatch.py",
        "kernels/triton/provider.py",
        "kernels/triton/linear/gemm.py",
        "kernels/triton/added/added.py",
    ],
)
def test_the_cache_key_depends_on_every_source(path, tmp_path):
    """Sources in sub-folders count, at any depth. The same sources in another place have the same key."""
    assert backend._digest(copy_of_the_package(tmp_path / "same")) == backend._digest(backend._ROOT)
    assert backend._digest(copy_of_the_package(tmp_path / "other", path)) != backend._digest(backend._ROOT)


def test_caches_are_keyed_on_passes_configuration_and_providers(monkeypatch, tmp_path):
    from torch._functorch import config as functorch

    with functorch.patch(enable_autograd_cache=False):  # its hits would hide Inductor's counters
        model, x = mlp(), rows(4, 11)
        assert cache_counts(model, x) == (0, 1)
        assert cache_counts(model, x) == (1, 0)
        other = copy_of_the_package(tmp_path / "wush_compile", "passes/execution/cse.py")
        for name, value in (
            ("_ROOT", other),
            ("_providers", lambda: ("other",)),
            ("EXACT", None),
        ):
            with monkeypatch.context() as patch:
                if name == "EXACT":
                    patch.setitem(EXACT, "max_autotune", True)
                else:
                    patch.setattr(backend, name, value)
                assert cache_counts(model, x) == (0, 1), name
        assert cache_counts(model, x) == (1, 0)


WARM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_backend import cache_counts, mlp, rows
from torch._dynamo.utils import counters
model, x = mlp(), rows(2, 5)
with torch.no_grad():
    cache_counts(model, x)
    print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


def test_a_second_process_compiles_from_the_cache(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WARM, os.path.dirname(__file__)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout.split()[-1]))
    assert hits[0] == 0 and hits[1] >= 1


# -- faults ----------------------------------------------------------------------------------------------------------


def test_hooks_fire_and_change_what_is_compiled():
    model, x = mlp(), rows(2, 5)
    plain_output = model(x)
    model[0].up.register_forward_hook(lambda module, args, output: output * 2)
    model[0].down.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    expected = model(x)
    assert (plain_output - expected).norm() > 0.2 * expected.norm()
    run = compiled(model)
    assert_like_eager(lambda: run(x), lambda: model(x), EMULATED)


def test_copies_compile_like_the_original():
    model, x = mlp(), rows(2, 5)
    twin = copy.deepcopy(model)
    twin[0].gate.group.weight_packed.zero_()
    assert torch.equal(compiled(model)(x), model(x))
    assert torch.equal(compiled(twin)(x), twin(x))
    assert not torch.equal(model(x), twin(x))


def _in_worker(connection):
    torch.set_num_threads(1)
    model, x, expected = connection.recv()
    with torch.no_grad():
        connection.send((torch.equal(model(x), expected), torch.equal(compiled(model)(x), expected)))


def test_a_model_sent_to_a_worker_process_gives_the_same_bits():
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_in_worker, args=(theirs,))
    worker.start()
    model, x = mlp(), rows(2, 5)
    ours.send((model, x, model(x)))
    assert ours.recv() == (True, True)
    worker.join(60)
    assert worker.exitcode == 0


def offload(model: nn.Module, where: str, device_map: dict, folder) -> None:
    """Part of the model on the CPU or on disk, brought in by accelerate's hooks when it is needed.

    A quantized layer holds buffers only: accelerate leaves those on the device unless it is told to offload buffers.
    """
    import accelerate

    main = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=main, offload_buffers=True)
    elif where == "disk_offload":
        accelerate.disk_offload(model, str(folder), execution_device=main, offload_buffers=True)
    else:
        accelerate.dispatch_model(
            model, device_map, main_device=main, offload_dir=str(folder), force_hooks=True, offload_buffers=True
        )
    assert any(b.is_meta for name, b in model.named_buffers() if name.endswith("weight_packed"))


OFFLOADS = pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "device_map"])


@OFFLOADS
def test_offloaded_models_give_the_same_logits(where, tmp_path):
    model, ids = quantized("llama"), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    offload(model, where, device_map, tmp_path)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@OFFLOADS
@pytest.mark.parametrize("region", [False, True])
def test_offloaded_models_compile(where, region, tmp_path):
    model, x = mlp(layers=2), rows(2, 5)
    expected = model(x)
    offload(model, where, {"0": "cpu", "1": "disk"}, tmp_path)
    if region:
        for layer in model:
            layer.compile(backend="wush", options=EXACT)
        run = model
    else:
        run = torch.compile(model, backend="wush", options=EXACT)
    for _ in range(2):  # the hooks put the weights away again behind each call
        assert torch.equal(run(x), expected)


def test_partly_quantized_models_compile():
    model = quantize(
        plain("llama", layers=1),
        tokens(2, 9),
        format="mxfp4",
        transform="hadamard",
        ignore=("*.o_proj", "*.up_proj", "lm_head"),
    )
    ids = tokens(2, 9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no quantized linear.*")
        run = compiled(model)
        assert_like_eager(
            lambda: run(ids, use_cache=False).logits, lambda: model(ids, use_cache=False).logits, EMULATED
        )


def test_siblings_of_which_one_has_a_bias_stay_one_matmul():
    from helpers import branches

    model, x = branches(torch.bfloat16)
    with wc.trace_graphs() as log:
        assert torch.equal(compiled(model)(x), model(x))
    assert log.graphs[0].snapshots[-1].counts["fp4_linear"] == 2


def test_a_provider_that_fails_falls_back_with_one_warning_that_names_it(monkeypatch, caplog):
    calls = []

    def broken(*args):
        calls.append(args)
        raise RuntimeError("no such instruction")

    table = {"fp4_linear": [("triton", kernels.Implementation(broken, lambda *args: None))]}
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    model, x = mlp(), rows(2, 5)
    expected = model(x)
    library = torch.library.Library("wush", "IMPL")
    dispatched = functools.partial(kernels.dispatch, "fp4_linear", ops.REFERENCE["fp4_linear"])
    library.impl("fp4_linear", dispatched, "CPU", allow_override=True)
    try:
        run = compiled(model)
        with caplog.at_level("WARNING", "wush_compile"):
            assert torch.equal(run(x), expected) and torch.equal(run(x), expected) and torch.equal(model(x), expected)
    finally:
        library._destroy()
    assert len(calls) == 1 and table == {"fp4_linear": []}
    (warning,) = (r.getMessage() for r in caplog.records if r.name == "wush_compile")
    assert warning.startswith("triton failed in fp4_linear") and "no such instruction" in warning


def test_the_public_names_are_there():
    assert wc.fuse is backend.fuse and callable(wc.trace_graphs)
