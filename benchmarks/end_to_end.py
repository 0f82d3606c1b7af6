"""Decoding and prefill of a model in Llama-3.1-8B's shape with random weights: ours against bf16 by Inductor, same run.

    python benchmarks/end_to_end.py --out results                   32 layers; --layers 8 for a smaller one

Each model runs in a process of its own: `torch.compile(model, mode="reduce-overhead")`, static cache, greedy. Quantized
weights are random bytes: nothing is calibrated, and no time depends on what they are. Tokens per second are of the median
step, whole batch; a step's prompt is as long as the context says. Memory is what the model holds on the device, without
caches.
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch

SHAPE = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
             max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False)
STEPS = 24                              # decoding steps that are timed
WIDTHS = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096, "gate_proj": 14336, "up_proj": 14336,
          "down_proj": 4096}
GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj"), 4096), ("self_attn", ("o_proj",), 4096),
          ("mlp", ("gate_proj", "up_proj"), 4096), ("mlp", ("down_proj",), 14336))


def random_group(prefix: str, names: tuple[str, ...], width: int, config):
    """A `WushGroup` of random bytes: small scales, orthogonal-sized transforms."""
    from wush_compile.modules import Member, WushGroup, buffer_layout

    members, start = [], 0
    for name in names:
        members.append(Member(f"{prefix}.{name}", start, start + WIDTHS[name], False))
        start += WIDTHS[name]
    block, buffers = config.group_size, {}
    for name, layout in buffer_layout(config, start, width, block, torch.bfloat16, False).items():
        if layout is None:
            buffers[name] = None
        elif name == "weight_packed":
            buffers[name] = torch.randint(0, 256, layout[0], dtype=torch.uint8, device="cuda")
        elif name == "weight_scale":                                  # weights of about 0.02: their products stay of order 1
            low, high = (118, 121) if config.format == "mxfp4" else (1, 20)
            buffers[name] = torch.randint(low, high, layout[0], dtype=torch.uint8, device="cuda")
        elif name == "input_transform":
            buffers[name] = (torch.randn(layout[0], device="cuda") / block**0.5).bfloat16()
        else:
            buffers[name] = torch.ones(layout[0], device="cuda")
    return WushGroup(members, config, block, buffers)


def build(kind: str, layers: int) -> torch.nn.Module:
    """The model on the GPU: bf16, or with every linear but the head quantized."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    import wush_compile as wc
    from wush_compile.modules import install_group

    config = LlamaConfig(num_hidden_layers=layers, **SHAPE)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    if kind != "bf16":
        settings = wc.WushConfig(format=kind)
        for layer in range(layers):
            for part, names, width in GROUPS:
                group = random_group(f"model.layers.{layer}.{part}", names, width, settings)
                for member in group.members:                          # the old linear holds nothing: its device is meta
                    assert model.get_submodule(member.name).weight.shape == (member.stop - member.start, width)
                install_group(model, group)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                value = value.fill_(1) if parameter.dim() == 1 else value.normal_(std=0.02)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to("cuda")
    return model


def timed(call, repeats: int) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@torch.inference_mode()
def measure(kind: str, layers: int, batches: list[int], contexts: list[int], prefill: int) -> list[dict]:
    from transformers import StaticCache

    from wush_compile.backend import wush

    backend = "inductor" if kind == "bf16" else wush                  # as backend="wush" of an installed package
    model = build(kind, layers)
    memory = torch.cuda.memory_allocated() / 2**30
    rows = []
    for batch in batches:
        for context in contexts:
            torch._dynamo.reset()
            run = torch.compile(model, backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
            cache = StaticCache(config=model.config, max_cache_len=context + STEPS + 8)
            ids = torch.randint(0, SHAPE["vocab_size"], (batch, context), device="cuda")
            started = time.perf_counter()
            for part in ids.split(512, dim=1):                        # eager: only what is timed is compiled
                out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            state = {"token": token, "position": torch.full((1,), context, device="cuda")}

            def step() -> None:
                torch.compiler.cudagraph_mark_step_begin()
                logits = run(state["token"], past_key_values=cache, use_cache=True,
                             position_ids=state["position"][None].expand(batch, 1)).logits
                state["token"] = logits[:, -1].argmax(-1, keepdim=True)
                state["position"] += 1

            for _ in range(4):                                        # compiles, warms up, records the graph
                step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            ms = timed(step, STEPS)
            skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
            rows.append({"what": "decode", "batch": batch, "context": context, "ms": ms, "tokens/s": 1e3 * batch / ms,
                         "compile s": seconds, "cudagraph skips": skips})
            print(kind, rows[-1], flush=True)
            del run, cache
    if prefill:
        torch._dynamo.reset()
        run = torch.compile(model, backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
        ids = torch.randint(0, SHAPE["vocab_size"], (1, prefill), device="cuda")
        started = time.perf_counter()
        for _ in range(3):
            run(ids, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        ms = timed(lambda: run(ids, use_cache=False, logits_to_keep=1), 8)
        rows.append({"what": "prefill", "batch": 1, "context": prefill, "ms": ms, "tokens/s": 1e3 * prefill / ms,
                     "compile s": seconds})
        print(kind, rows[-1], flush=True)
    return [{"model": kind, "memory GiB": memory, **row} for row in rows]


def table(rows: list[dict]) -> str:
    base = {(r["what"], r["batch"], r["context"]): r for r in rows if r["model"] == "bf16"}
    lines = ["| model | memory GiB | what | batch | context | ms | tokens/s | over bf16 |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        bf16 = base.get((r["what"], r["batch"], r["context"]))
        ratio = f"{bf16['ms'] / r['ms']:.2f}" if bf16 else ""
        lines.append(f"| {r['model']} | {r['memory GiB']:.2f} | {r['what']} | {r['batch']} | {r['context']} | {r['ms']:.2f} | "
                     f"{r['tokens/s']:.0f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bf16", "mxfp4"], choices=["bf16", "mxfp4", "nvfp4"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--warm", action="store_true", help="first compile in parallel, so that caches are warm")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.alone:
        rows = measure(args.models[0], args.layers, args.batch, args.context, args.prefill)
        (args.out / f"end_to_end-{args.models[0]}.json").write_text(json.dumps(rows))
        return

    def process(kind: str, out: pathlib.Path) -> int:
        command = [sys.executable, __file__, "--alone", "--models", kind, "--layers", str(args.layers), "--out", str(out),
                   "--prefill", str(args.prefill), "--batch", *map(str, args.batch), "--context", *map(str, args.context)]
        return subprocess.run(command, stdout=subprocess.DEVNULL if out != args.out else None).returncode

    if args.warm:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            (args.out / "warm").mkdir(exist_ok=True)
            list(pool.map(lambda kind: process(kind, args.out / "warm"), args.models))
    rows = []
    for kind in args.models:
        if process(kind, args.out) == 0:
            rows += json.loads((args.out / f"end_to_end-{kind}.json").read_text())
    environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": args.layers}
    (args.out / "end_to_end.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))
    print(environment, table(rows), sep="\n")


if __name__ == "__main__":
    main()
