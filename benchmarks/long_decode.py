"""Decodes one token again and again from a CUDA graph: every step must give the first step's bits.

    python benchmarks/long_decode.py                            100000 steps each of MXFP4 and NVFP4, 1 and 16 sequences
    python benchmarks/long_decode.py --steps 1000000 --batches 1 4 64

Kernels leave counters at zero for the next launch, and start before the launch in front has ended. A fault there would
show after some of many launches. The model has the widths of Llama-3.1-8B, few layers and a small head. Each step
writes the same place of the cache, and compares its logits with the first step's on the device.
"""

import argparse
import itertools
import time

import end_to_end
import torch

LAYERS, CONTEXT, VOCABULARY = 2, 512, 4096
QUEUE = 2000  # replays between two waits


@torch.inference_mode()
def run(kind: str, batch: int, steps: int) -> int:
    """How many of the steps differ from the first."""
    from wush_compile.backend import wush

    model = end_to_end.build(kind, LAYERS, "grouped")
    step = torch.compile(model, backend=wush, fullgraph=True, dynamic=False)
    cache = end_to_end.filled_cache(model.config, batch, CONTEXT)
    token = torch.randint(0, VOCABULARY, (batch, 1), device="cuda")
    position = torch.full((batch, 1), CONTEXT, device="cuda")
    first, different = (
        torch.zeros(batch, 1, VOCABULARY, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(1, device="cuda"),
    )

    def call() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(CONTEXT)
        logits = step(token, past_key_values=cache, use_cache=True, position_ids=position).logits
        different.add_((logits.view(torch.int16) != first.view(torch.int16)).any())
        return logits

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call()
    graph.replay()
    first.copy_(logits)
    different.zero_()
    started = time.perf_counter()
    for done in range(0, steps, QUEUE):
        for _ in range(min(QUEUE, steps - done)):
            graph.replay()
        torch.cuda.synchronize()
    seconds, wrong = time.perf_counter() - started, int(different.item())
    assert torch.equal(logits, first) or wrong
    assert logits.isfinite().all() and logits.float().std() > 0
    print(f"{kind} batch {batch}: {wrong} of {steps} steps differ, {1e6 * seconds / steps:.1f} µs a step", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100000)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--models", nargs="+", choices=end_to_end.MODELS[1:], default=("mxfp4", "nvfp4"))
    args = parser.parse_args()
    end_to_end.SHAPE["vocab_size"] = end_to_end.WIDTHS["lm_head"] = VOCABULARY
    torch.manual_seed(0)
    if sum(run(kind, batch, args.steps) for kind, batch in itertools.product(args.models, args.batches)):
        raise SystemExit("some steps differ")


if __name__ == "__main__":
    main()
