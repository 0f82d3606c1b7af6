"""Decoding and prefill of a model with random weights: ours against Inductor's bf16, same run.

    python benchmarks/end_to_end.py --out results                       32 layers
    python benchmarks/end_to_end.py --out results --layers 8 16         smaller models, and the time of a layer
    python benchmarks/end_to_end.py --out results --attention grouped
    python benchmarks/end_to_end.py --out results --shape qwen3-30b-a3b --layers 4 12 --context 512 --prefill 0
    python benchmarks/end_to_end.py --out results --models ladder --batch 1 --context 512 --prefill 0    all rungs
    python benchmarks/end_to_end.py --out results --table               only the table of the rows in --out

The shape is Llama-3.1-8B's, or a mixture's with `--shape` (moe_model.py), whose bf16 is transformers' grouped_mm. A
model is bf16, or a format of weights, with `-fp8` or `-none` the format of activations (4 bits without), with
`+head` an int8 head: rungs of the ladder, such as mxfp4-fp8+head.

Each model and case runs in a process of its own: `torch.compile(model, mode="reduce-overhead")`, static cache, greedy
decoding. Nearly all of the time is compilation. So as many processes as the device's memory holds compile side by side.
Then they are timed one after the other, each alone on the device. A row is written as soon as it is known.

Quantized weights and the cached prompt are random; no time depends on their values. "ms" is the median step, from its
launch on an idle device to its end. "queued ms" is a step of a queue of launched steps, which hides the host's time.
Tokens per second follow from "ms", for the whole batch. Memory is what the model holds on the device, without caches.

Attention is transformers' "sdpa", or "grouped" or "split" (attention.py). Where heads share keys and values, "sdpa"
copies the cache four times over before every use; the others do not. "split" also spreads a head's cache over the
device. Both models use the same.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import common
import torch
from attention import ATTENTION, register_attention

SHAPE = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
MIXTURE = "qwen3-30b-a3b"
ALL_LAYERS = {"llama-3.1-8b": 32, MIXTURE: 48}
DEVICE = "cuda"
STEPS = 24  # decoding steps that are timed
WARM_UP = 4  # calls that compile, warm up and record the CUDA graph
ROOM = 32  # tokens a cache holds beyond the context; attention is faster with multiples of 16
GIB = 2**30
WIDTHS = {
    "q_proj": 4096,
    "k_proj": 1024,
    "v_proj": 1024,
    "o_proj": 4096,
    "gate_proj": 14336,
    "up_proj": 14336,
    "down_proj": 4096,
    "lm_head": SHAPE["vocab_size"],
}
GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj"), 4096),
    ("self_attn", ("o_proj",), 4096),
    ("mlp", ("gate_proj", "up_proj"), 4096),
    ("mlp", ("down_proj",), 14336),
)


MODELS = [
    "bf16",
    *("".join(m) for m in itertools.product(["mxfp4", "nvfp4"], ["", "-fp8", "-none"], ["", "+head"])),
    *("".join(m) for m in itertools.product(["int8-fp8", "int8-none"], ["", "+head"])),
]


def settings_of(model: str):
    """The configuration of a model of `MODELS` other than bf16."""
    import wush_compile as wc

    rung, _, head = model.partition("+")
    format, _, activations = rung.partition("-")
    activation = {"": "same", "fp8": "fp8", "none": None}[activations]
    return wc.WushConfig(format=format, activation_format=activation, head="int8" if head else None)


def random_group(prefix: str, names: tuple[str, ...], width: int, config):
    """A `WushGroup` of random bytes: small scales, orthogonal-sized transforms."""
    from wush_compile.modules import Member, WushGroup, buffer_layout

    members, start = [], 0
    for name in names:
        members.append(Member(f"{prefix}.{name}".lstrip("."), start, start + WIDTHS[name], False))
        start += WIDTHS[name]
    block, buffers = config.group_size, {}
    for name, layout in buffer_layout(config, start, width, block, torch.bfloat16, False).items():
        if layout is None:
            buffers[name] = None
        elif name == "weight_packed":
            buffers[name] = torch.randint(0, 256, layout[0], dtype=torch.uint8, device=DEVICE)
        elif name == "weight_scale" and config.format == "int8":
            buffers[name] = torch.full(layout[0], 2e-4, dtype=layout[1], device=DEVICE)
        elif name == "weight_scale":  # weights of about 0.02: their products stay of order 1
            low, high = (118, 121) if config.format == "mxfp4" else (1, 20)
            buffers[name] = torch.randint(low, high, layout[0], dtype=torch.uint8, device=DEVICE)
        elif name == "input_transform":
            buffers[name] = (torch.randn(layout[0], device=DEVICE) / block**0.5).bfloat16()
        elif name == "input_feedback":
            buffers[name] = (0.1 * torch.randn(layout[0], device=DEVICE)).bfloat16()
        else:
            buffers[name] = torch.ones(layout[0], dtype=layout[1], device=DEVICE)
    return WushGroup(members, config, block, buffers)


def build(kind: str, layers: int, attention: str) -> torch.nn.Module:
    """The model on the GPU: bf16, or with every linear but the head quantized, or the head too."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from wush_compile.modules import install_group

    register_attention()
    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
    if kind != "bf16":
        settings = settings_of(kind)
        groups = [(f"model.layers.{layer}.{part}", *rest) for layer in range(layers) for part, *rest in GROUPS]
        groups += [("", ("lm_head",), SHAPE["hidden_size"])] if settings.head else []
        for prefix, names, width in groups:
            group = random_group(prefix, names, width, settings.recipe_of(names[0]))
            for member in group.members:  # the old linear is empty, on the meta device
                assert model.get_submodule(member.name).weight.shape == (member.stop - member.start, width)
            install_group(model, group)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                value = value.fill_(1) if parameter.dim() == 1 else value.normal_(std=0.02)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)
    return model


def builder(shape: str) -> Callable[[str, int, str], torch.nn.Module]:
    """`build` of a shape."""
    if shape == MIXTURE:
        import moe_model  # which needs this module

        return moe_model.build
    return build


def filled_cache(config, batch: int, context: int):
    """A static cache as after a prompt of `context` tokens, with random contents."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=context + ROOM)
    cache.early_initialization(
        batch,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        torch.bfloat16,
        torch.device(DEVICE),
    )
    for layer in cache.layers:
        layer.keys[:, :, :context].normal_()
        layer.values[:, :, :context].normal_()
    return cache


class Decoding:
    """Steps of greedy decoding after a prompt of random tokens."""

    def __init__(self, model: torch.nn.Module, run, batch: int, context: int):
        self.run, self.batch, self.context = run, batch, context
        self.cache = filled_cache(model.config, batch, context)
        self.token = torch.randint(0, model.config.vocab_size, (batch, 1), device=DEVICE)
        self.position = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def restart(self) -> None:
        self.position.fill_(self.context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def __call__(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.run(
            self.token,
            past_key_values=self.cache,
            use_cache=True,
            position_ids=self.position[None].expand(self.batch, 1),
        ).logits
        self.token = logits[:, -1].argmax(-1, keepdim=True)
        self.position += 1


class Prefill:
    """Logits after the last of `context` tokens, without a cache."""

    def __init__(self, model: torch.nn.Module, run, batch: int, context: int):
        self.run, self.ids = run, torch.randint(0, model.config.vocab_size, (batch, context), device=DEVICE)

    def restart(self) -> None:
        pass

    def __call__(self) -> None:
        self.run(self.ids, use_cache=False, logits_to_keep=1)


def timed(call, repeats: int, queued: bool) -> float:
    """Milliseconds of a call: the median on an idle device; queued: the mean of calls launched one after the other."""
    call.restart()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        call()
        stop.record()
        if not queued:
            stop.synchronize()
    torch.cuda.synchronize()
    if queued:  # the first calls wait for the host
        return events[repeats // 4][0].elapsed_time(events[-1][1]) / (repeats - repeats // 4)
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


class Job(NamedTuple):
    """One row: a model, its attention and layers, decode or prefill, batch, context."""

    model: str
    attention: str
    layers: int
    what: str
    batch: int
    context: int
    shape: str = "llama-3.1-8b"

    @property
    def gib(self) -> float:
        """About the most memory that the job takes on the device, in GiB."""
        four, each = (0.6, 218e6) if self.shape != MIXTURE else (0.55, 623e6)
        weights = self.layers * each * {"bf16": 2, "int8": 1.1}.get(self.model.partition("-")[0], four)
        weights += 2.1e9 if self.shape != MIXTURE else 1.3e9
        cache = self.layers * 4096 * self.batch * (self.context + ROOM) if self.what == "decode" else 0
        return (weights + cache) / GIB + (2 if self.what == "decode" else 3)


@contextlib.contextmanager
def alone(out: pathlib.Path, exclusive: bool):
    """Holds the device: exclusively, or shared with other processes that compile."""
    with (out / "device.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


@torch.inference_mode()
def measure(job: Job, out: pathlib.Path) -> dict:
    from wush_compile.backend import wush

    with alone(out, exclusive=False):
        started = time.perf_counter()
        model = builder(job.shape)(job.model, job.layers, job.attention)
        memory = torch.cuda.memory_allocated() / GIB
        backend = "inductor" if job.model == "bf16" else wush  # the same as backend="wush" of an installed package
        run = torch.compile(model, backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
        call = (Decoding if job.what == "decode" else Prefill)(model, run, job.batch, job.context)
        call.restart()
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        compiled = time.perf_counter() - started
    with alone(out, exclusive=True):
        repeats = STEPS if job.what == "decode" else 8
        ms, queued = (timed(call, repeats, queued) for queued in (False, True))
    tokens = job.batch * (1 if job.what == "decode" else job.context)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return {
        **job._asdict(),
        "memory GiB": memory,
        "ms": ms,
        "queued ms": queued,
        "tokens/s": 1e3 * tokens / ms,
        "compile s": compiled,
        "cudagraph skips": skips,
    }


# -- output ----------------------------------------------------------------------------------------------------------


def rows_of(out: pathlib.Path) -> list[dict]:
    """The last row of each job."""
    path = out / "end_to_end.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({tuple(row.get(key) for key in Job._fields): row for row in rows}.values())


def table(rows: list[dict]) -> str:
    def case(row: dict) -> tuple:
        return row.get("shape"), row["attention"], row["layers"], row["what"], row["batch"], row["context"]

    base = {case(row): row for row in rows if row["model"] == "bf16"}
    keys = ("model", *Job._fields[1:], "memory GiB", "ms", "queued ms", "tokens/s", "over bf16", "queued over bf16")
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in sorted(rows, key=lambda row: (row["model"] != "bf16", row["model"], case(row))):
        bf16 = base.get(case(row))
        if bf16:
            row = row | {"over bf16": bf16["ms"] / row["ms"], "queued over bf16": bf16["queued ms"] / row["queued ms"]}
        cells = (row.get(key, "") for key in keys)
        lines.append("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def slopes(rows: list[dict]) -> list[str]:
    """The time of a layer, and of all layers by extrapolation, for cases timed with several numbers of layers."""

    def case(row: dict) -> tuple:
        return row.get("shape"), row["model"], row["attention"], row["what"], row["batch"], row["context"]

    lines = []
    for key, members in itertools.groupby(sorted(rows, key=case), key=case):
        members = sorted(members, key=lambda row: row["layers"])
        few, many = members[0], members[-1]
        if few["layers"] < many["layers"]:
            layer = (many["queued ms"] - few["queued ms"]) / (many["layers"] - few["layers"])
            every = ALL_LAYERS.get(key[0], 32)
            whole = few["queued ms"] + layer * (every - few["layers"])
            gib = (many["memory GiB"] - few["memory GiB"]) / (many["layers"] - few["layers"])
            held = few["memory GiB"] + gib * (every - few["layers"])
            name = " ".join(map(str, key))
            lines.append(
                f"{name}: {layer:.4f} queued ms a layer; all {every} by extrapolation {whole:.2f}, {held:.2f} GiB"
            )
    return lines


def report(out: pathlib.Path) -> None:
    rows = rows_of(out)
    print(table(rows), *slopes(rows), sep="\n", flush=True)


# -- processes -------------------------------------------------------------------------------------------------------


def waves(jobs: list[Job], gib: float) -> list[list[Job]]:
    """The jobs in groups that fit the memory together; the order is kept where it can be."""
    groups = []
    for job in jobs:
        fits = (group for group in groups if sum(other.gib for other in group) + job.gib <= gib)
        group = next(fits, None)
        if group is None:
            groups.append([job])
        else:
            group.append(job)
    return groups


def run_wave(jobs: list[Job], out: pathlib.Path, deadline: float) -> None:
    """Runs a process for each job, and kills those that are not done by the deadline."""
    threads = max(2, (os.cpu_count() or 2) // len(jobs))
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    processes = [
        subprocess.Popen([sys.executable, __file__, "--out", str(out), "--job", *map(str, job)], env=env)
        for job in jobs
    ]
    for job, process in zip(jobs, processes, strict=True):
        try:
            if process.wait(max(0.1, deadline - time.monotonic())):
                print(f"{job} failed", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"{job} did not finish in time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bf16", "mxfp4"], choices=[*MODELS, "ladder"])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", *ATTENTION])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=ALL_LAYERS)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; 0: no prefill")
    parser.add_argument("--seconds", type=float, default=1e6, help="jobs that are not done by then are killed")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--table", action="store_true", help="only print the table of --out's rows")
    parser.add_argument("--job", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "ladder" in args.models:
        args.models = MODELS
    args.out.mkdir(parents=True, exist_ok=True)
    if args.job:
        model, attention, layers, what, batch, context, shape = args.job
        row = measure(Job(model, attention, int(layers), what, int(batch), int(context), shape), args.out)
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        with (args.out / "end_to_end.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
    elif not args.table:
        cases = [("decode", batch, context) for context in args.context for batch in args.batch]
        if args.prefill:
            cases.insert(len(args.batch), ("prefill", 1, args.prefill))  # after the first context
        jobs = [
            Job(model, args.attention, layers, *case, args.shape)
            for layers in args.layers or [ALL_LAYERS[args.shape]]
            for case in cases
            for model in args.models
        ]
        deadline = time.monotonic() + args.seconds
        for wave in waves(jobs, 0.97 * torch.cuda.get_device_properties(0).total_memory / GIB):
            if time.monotonic() < deadline:
                run_wave(wave, args.out, deadline)
        head = common.environment(torch.device(DEVICE))
        common.write_json(args.out / "end_to_end.json", {**head, "rows": rows_of(args.out)})
    if not args.job:
        report(args.out)


if __name__ == "__main__":
    main()
