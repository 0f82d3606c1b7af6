"""A quantized model on this CPU beside the same model in bf16: one decoding step, and a prefill.

    python benchmarks/cpu_speed.py --out cpu_speed.json
    WUSH_PROVIDER=reference python benchmarks/cpu_speed.py      without the CPU kernels

A Llama with the widths of SmolLM2-135M and random weights, as transformers runs it, with a cache. Models take turns,
and the least time of each counts, so that other work on the machine disturbs all alike. Compare ratios, not times.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from common import environment, write_json
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import wush_compile as wc

SHAPE = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)
FORMATS = ("mxfp4", "nvfp4")


class Step:
    """Runs `tokens` tokens behind a cache of `context` tokens."""

    def __init__(self, model: torch.nn.Module, tokens: int, context: int):
        self.model, self.ids, self.cache = model, torch.randint(997, (1, tokens)), DynamicCache(config=model.config)
        if context:
            model(torch.randint(997, (1, context)), past_key_values=self.cache)
        self.context = context

    def seconds(self) -> float:
        cache = copy.deepcopy(self.cache)
        start = time.perf_counter()
        self.model(self.ids, past_key_values=cache)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="torch's, when left out")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=args.layers, tie_word_embeddings=True, **SHAPE)
    models = {"bf16": LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()}
    data = [torch.randint(997, (2, 128)) for _ in range(2)]
    for format in FORMATS:
        settings = dict(format=format, solver="rtn", progress=False)
        models[format] = wc.quantize(copy.deepcopy(models["bf16"]), data, **settings)
    cases, rows = {"decode": (1, 128), "prefill": (256, 0)}, []
    with torch.no_grad():
        for case, (tokens, context) in cases.items():
            steps = {name: Step(model, tokens, context) for name, model in models.items()}
            best = {name: float("inf") for name in steps}
            for _ in range(args.rounds):
                best = {name: min(best[name], step.seconds()) for name, step in steps.items()}
            for name in models:
                rows.append(dict(case=case, model=name, ms=1e3 * best[name], of_bf16=best[name] / best["bf16"]))
                print(f"{case:8} {name:6} {rows[-1]['ms']:8.2f} ms  {rows[-1]['of_bf16']:.2f} of bf16", flush=True)
    settings = dict(layers=args.layers, rounds=args.rounds, threads=torch.get_num_threads(), **SHAPE)
    write_json(args.out, {**environment(torch.device("cpu")), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
