"""What the execution passes add to compile time, and what a call of a wush op costs in eager mode.

    python benchmarks/compile_overhead.py --layers 32 --out compile_overhead.json

A Llama with random weights is compiled twice from cold caches: in bf16 by plain Inductor, and quantized by the wush
backend. The cost of a call is the dispatcher's, without a kernel. Needs no GPU.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from common import environment, write_json
from transformers import LlamaConfig, LlamaForCausalLM

import wush_compile as wc
from wush_compile.passes import pipeline as passes

CALLS = 2000


def llama(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def compile_seconds(model: torch.nn.Module, backend: str) -> float:
    """First call minus second call, from cold caches."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    run, ids, seconds = torch.compile(model, backend=backend, dynamic=False), torch.randint(97, (2, 9)), []
    with torch.no_grad(), fresh_cache():
        for _ in range(2):
            start = time.perf_counter()
            run(ids, use_cache=False)
            seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def timed_passes(spent: Counter) -> tuple:
    """The execution passes, each adding its seconds to `spent`."""

    def timed(step):
        def run(graph):
            start = time.perf_counter()
            changes = step(graph)
            spent[step.__name__] += time.perf_counter() - start
            return changes

        run.__name__ = step.__name__
        return run

    return tuple(map(timed, passes.EXECUTION))


def call_microseconds() -> dict[str, float]:
    """op -> microseconds from the call to the kernel and back.

    Each op is called under another name with its own schema and a kernel that does nothing: the best of five rounds,
    minus a plain call of that kernel.
    """
    x, vector = torch.randn(1, 32), torch.randn(32)
    quantizer = (None, None, "mxfp4", "absmax")
    codes, scales = torch.ops.wush.transform_quantize(x, *quantizer)
    calls = {
        "transform_quantize": (x, *quantizer),
        "fp4_linear": (codes, scales, None, codes, scales, None, None, None, "mxfp4", torch.float32),
        "rms_norm_transform_quantize": (x, vector, 1e-6, None, "rounded", *quantizer),
        "silu_mul_transform_quantize": (x, x, *quantizer),
    }
    library, result = torch.library.Library("wush_overhead", "DEF"), {}
    for name, args in calls.items():
        schema = getattr(torch.ops.wush, name).default._schema
        library.define(str(schema).removeprefix("wush::"))
        output = (torch.empty(0), torch.empty(0)) if len(schema.returns) == 2 else torch.empty(0)

        def nothing(*_, output=output):
            return output

        library.impl(name, nothing, "CompositeExplicitAutograd")
        seconds = {}
        for function in (getattr(torch.ops.wush_overhead, name).default, nothing):
            rounds = []
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(CALLS):
                    function(*args)
                rounds.append(time.perf_counter() - start)
            seconds[function] = min(rounds) / CALLS
        called, alone = seconds.values()
        result[name] = (called - alone) * 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()

    model = llama(options.layers)
    plain = compile_seconds(model, "inductor")
    model = wc.quantize(model, solver="rtn", transform="hadamard", progress=False)
    spent: Counter = Counter()
    original, passes.EXECUTION = passes.EXECUTION, timed_passes(spent)
    try:
        wush = compile_seconds(model, "wush")
    finally:
        passes.EXECUTION = original
    ours = sum(spent.values())
    where = environment(torch.device("cpu"))
    print(f"{options.layers} layers; {', '.join(map(' '.join, where.items()))}\n")
    print("| compile | seconds |\n|---|---|")
    print(f"| plain Inductor, bf16 | {plain:.1f} |\n| wush backend, quantized | {wush:.1f} |")
    print(f"| its passes | {ours:.2f} ({100 * ours / wush:.2f} %) |")
    for name, seconds in spent.items():
        print(f"| {name} | {seconds:.3f} |")
    calls = call_microseconds()
    print("\n| op | overhead of a call, µs |\n|---|---|")
    for name, microseconds in calls.items():
        print(f"| {name} | {microseconds:.1f} |")
    write_json(
        options.out,
        {
            **where,
            "layers": options.layers,
            "inductor_s": plain,
            "wush_s": wush,
            "passes_s": dict(spent),
            "share": ours / wush,
            "calls_us": calls,
        },
    )


if __name__ == "__main__":
    main()
