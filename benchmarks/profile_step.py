"""Lists the kernels of one decoding step, in order, with the microseconds of each and the gap in front of it.

    python benchmarks/profile_step.py bf16 --shape qwen3-30b-a3b --layers 3
    python benchmarks/profile_step.py mxfp4 --attention grouped --layers 4
    python benchmarks/profile_step.py mxfp4 --attention grouped --layers 4 --no-early-start

The models are those of `end_to_end.py`, captured by `mode="reduce-overhead"`. The first line has the milliseconds of a
step that is waited for, and of a queued one. `--no-early-start` launches every kernel after the one in front has ended.
"""

import argparse
from unittest import mock

import end_to_end
import torch
from attention import ATTENTION
from torch.profiler import ProfilerActivity, profile

STEPS = 3  # that are profiled; the last one is printed


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    from wush_compile.backend import wush

    model = end_to_end.builder(args.shape)(args.model, args.layers, args.attention)
    backend = "inductor" if args.model == "bf16" else wush
    step = torch.compile(model, backend=backend, mode="reduce-overhead", fullgraph=True, dynamic=False)
    call = end_to_end.Decoding(model, step, args.batch, args.context)
    call.restart()
    for _ in range(end_to_end.WARM_UP + 1):
        call()
    waited, queued = (end_to_end.timed(call, end_to_end.STEPS, queue) for queue in (False, True))
    call.restart()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if "CUDA" in str(event.device_type)]
    kernels = sorted(kernels, key=lambda event: event.time_range.start)[-(len(kernels) // STEPS) :]
    print(f"{vars(args)}: waited {waited:.3f} ms, queued {queued:.3f} ms, {len(kernels)} kernels")
    end = kernels[0].time_range.start
    for event in kernels:
        span = event.time_range
        print(f"{span.end - span.start:8.2f}  gap {span.start - end:6.2f}  {event.name[:110]}")
        end = span.end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=end_to_end.MODELS)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=end_to_end.ALL_LAYERS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", *ATTENTION])
    parser.add_argument("--no-early-start", action="store_true")
    args = parser.parse_args()
    if args.no_early_start:
        from wush_compile.kernels.triton.common import overlap

        with mock.patch("torch.cuda.get_device_capability", lambda *_: (8, 9)):
            overlap.overlaps(0)  # remembers the answer
    run(args)


if __name__ == "__main__":
    main()
