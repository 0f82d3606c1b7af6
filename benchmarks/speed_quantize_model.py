"""Time and memory of `wush_compile.quantize` on Llama shapes: random weights in CPU memory, phase by phase.

    python benchmarks/speed_quantize_model.py --model 8b --solver gptq --out quantize_model.json
    python benchmarks/speed_quantize_model.py --model 8b --solver rtn gptq --layers 2  two layers, scaled to all
    python benchmarks/speed_quantize_model.py --model 8b --solver gptq gptq            the second finds a warm process
    torchrun --standalone --nproc-per-node 2 benchmarks/speed_quantize_model.py --out two.json --against one.json

Under torchrun each process makes the model and quantizes it together with the others. The script prints the phases of
each process and whether all hold the same bytes. With `--against` it also prints how much faster that was than the runs
of one process in another file. Give each command a TRITON_CACHE_DIR of its own, or it finds the kernels that an earlier
one compiled.

The time covers everything from the model in CPU memory to the quantized model in CPU memory. Each phase has a floor:
its floating-point operations at the rate of a large matrix product, or its bytes at the rate of a large copy, whichever
takes longer. Both rates are measured at the start. Phases are separated by waiting for the GPU, which costs a little;
`--no-phases` measures without. With `--layers`, one layer is quantized first, so that compilation is not scaled.

Shapes are the published configurations. Weights are normal, with input channels scaled over two decades and a few of
them tenfold again; norms likewise. They are made layer by layer on the GPU.
"""

import argparse
import gc
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wush_compile as wc
from wush_compile import phases
from wush_compile.checkpoint.record import quantization_of
from wush_compile.solver.solution import moment_shape

SHAPES = {
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
    "3b": dict(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "tiny": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
        tie_word_embeddings=False,
    ),
}
OUTLIERS = 4  # channels, times OUTLIER
OUTLIER = 10.0


# -- the model -------------------------------------------------------------------------------------------------------


def channel_scales(channels: int, generator: torch.Generator) -> Tensor:
    """fp32 [channels], log-uniform over two decades, a few of them tenfold; mean square 1."""
    scales = 10 ** (2 * torch.rand(channels, device=generator.device, generator=generator) - 1)
    scales[torch.randperm(channels, device=generator.device, generator=generator)[:OUTLIERS]] *= OUTLIER
    return scales / scales.square().mean().sqrt()


def build(name: str, layers: int | None, device: torch.device) -> nn.Module:
    """A random Llama in bf16 in CPU memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(SHAPES[name])
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    config = LlamaConfig(**settings, max_position_embeddings=8192, rope_theta=500000.0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config)  # its frequencies are not parameters
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            value = channel_scales(len(parameter), generator)
        else:
            rows, width = parameter.shape
            value = torch.randn(rows, width, device=device, generator=generator) * channel_scales(width, generator)
            value /= width**0.5
        parameter.data.copy_(value)
    return model.requires_grad_(False)


def groups(shape: dict) -> dict[str, tuple[int, int]]:
    """(N, K) of the groups of one layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    return {
        "qkv": (heads + 2 * kv, hidden),
        "o": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


# -- floors ----------------------------------------------------------------------------------------------------------


def best(work, repeats: int = 5) -> float:
    """Seconds of the fastest repetition."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured rates: FLOP/s of matrix products; bytes/s of copies on the device, from pageable and pinned memory."""
    n = 8192
    half = [torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2)]
    wide = [torch.randn(n // 2, n // 2, device=device, dtype=torch.float64) for _ in range(2)]
    block = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    there = torch.ones(2**28, dtype=torch.uint8)
    pinned = there.pin_memory()
    near = target[: 2**28]
    rates = {
        "bf16": 2 * n**3 / best(lambda: half[0] @ half[1]),
        "fp64": 2 * (n // 2) ** 3 / best(lambda: wide[0] @ wide[1]),
        "copy": 2 * 2**30 / best(lambda: target.copy_(block)),
        "pageable": 2**28 / best(lambda: near.copy_(there)),
        "pinned": 2**28 / best(lambda: near.copy_(pinned)),
    }
    return rates


def floors(shape: dict, layers: int, tokens: int, length: int, config: wc.WushConfig, rates: dict[str, float]) -> dict:
    """Seconds by phase. Of a symmetric result only half is counted."""
    seconds = dict.fromkeys(
        ("forwards", "moments", "samples", "Cholesky", "transforms", "GPTQ", "packing", "layer losses", "transfers"),
        0.0,
    )

    def add(phase: str, flops: float = 0.0, rate: str = "bf16", nbytes: float = 0.0, by: str = "copy") -> None:
        seconds[phase] += layers * max(flops / rates[rate], nbytes / rates[by])

    for rows, width in groups(shape).values():
        block = config.transform_block_size or config.group_size
        kept = 2 if layers > 1 else 1  # the last layer is only observed
        add("forwards", flops=2 * tokens * rows * width * kept, nbytes=2 * tokens * (rows + width) * kept)
        whole = len(moment_shape(config, width)) == 2
        add("moments", flops=tokens * width * (width if whole else block), nbytes=2 * tokens * width)
        add("samples", nbytes=2 * tokens * width)
        add("transforms", flops=2 * rows * width * block, rate="fp64", nbytes=8 * rows * width)
        if config.solver == "gptq":
            add("Cholesky", flops=width**3 / 3, rate="fp64")
            # The products between blocks; reading and writing residuals, errors and codes once.
            add("GPTQ", flops=rows * width**2, rate="fp64", nbytes=(8 + 8 + 1) * rows * width)
            add("packing", nbytes=1.5 * rows * width)
        else:
            add("packing", nbytes=(8 + 8 + 0.5) * rows * width)
        add("layer losses", nbytes=(2 + 0.5 + 4) * rows * width)
        add("transfers", nbytes=2 * rows * width, by="pageable")
        add("transfers", nbytes=0.5 * rows * width, by="pageable")
    attention = 2 * tokens * length * shape["num_attention_heads"] * shape["head_dim"]  # causal: half of 4·T²·d
    add("forwards", flops=2 * attention)
    return seconds


# -- a run -----------------------------------------------------------------------------------------------------------


def measure(
    name: str,
    solver: str,
    layers: int | None,
    windows: list[Tensor],
    device: torch.device,
    options: dict,
    separate: bool,
) -> dict:
    """Seconds by phase and in total, and peak memory, of one quantization."""
    start = time.perf_counter()
    model = build(name, layers, device)
    made = time.perf_counter() - start
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    together(None)  # the timed part waits for no other process to make its model
    start = time.perf_counter()
    with phases.timing(synchronize=separate) as seconds:
        wc.quantize(model, windows, progress=False, device=device, solver=solver, **options)
        torch.cuda.synchronize()
    total = time.perf_counter() - start
    mine = {
        "phases": {**seconds, "everything else": total - sum(seconds.values())},
        "sha256": digest(model),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }
    everybody = together(mine)
    losses = [report["relative_loss"] for report in quantization_of(model).report.values()]
    return {
        "seconds": total,
        "made": made,
        **mine,
        "losses": losses,
        "sha256": sorted({one["sha256"] for one in everybody}),
        "ranks": everybody,
    }


def together(mine: object) -> list:
    """The values of all processes, by rank; waits for them. Over the CPU, so that NCCL connects in the timed part."""
    if not dist.is_initialized():
        return [mine]
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def digest(model: nn.Module) -> str:
    """sha256 over the sha256 of each tensor of the quantized groups; several threads read them."""

    def one(item: tuple[str, Tensor]) -> bytes:
        return hashlib.sha256(item[1].contiguous().reshape(-1).view(torch.uint8).numpy()).digest()

    tensors = [item for item in model.state_dict().items() if ".group." in item[0]]
    with ThreadPoolExecutor(8) as pool:
        return hashlib.sha256(b"".join(pool.map(one, tensors))).hexdigest()


def show(result: dict) -> None:
    print(
        f"\n{result['model']} {result['solver']}, {result['layers']} of {result['all_layers']} layers, "
        f"{result['tokens']} tokens, {result['processes']} process(es)"
    )
    ranks = result["ranks"]
    columns = ["seconds"] if len(ranks) == 1 else [f"rank {rank}" for rank in range(len(ranks))]
    print(f"| phase | {' | '.join(columns)} | floor | ratio |\n{'|---' * (3 + len(ranks))}|")
    for phase, seconds in sorted(result["phases"].items(), key=lambda item: -item[1]):
        floor = result["floors"].get(phase)
        row = [phase, *(f"{one['phases'].get(phase, 0.0):.3f}" for one in ranks)]
        print("| " + " | ".join([*row, *((f"{floor:.3f}", f"{seconds / floor:.1f}") if floor else ("", ""))]) + " |")
    print(
        f"all: {result['seconds']:.2f} s, floor {sum(result['floors'].values()):.2f} s; "
        f"made in {result['made']:.1f} s, not counted"
    )
    allocated, reserved = result["peak_allocated"] / 1e9, result["peak_reserved"] / 1e9
    print(f"peak GPU memory {allocated:.2f} GB allocated, {reserved:.2f} GB reserved")
    same = "the same in all processes" if len(result["sha256"]) == 1 else "DIFFERENT between processes"
    print(
        f"sha256 of the codes and scales, {same}: {', '.join(s[:16] for s in result['sha256'])}; "
        f"mean relative loss {sum(result['losses']) / len(result['losses']):.4f}"
    )
    if result["layers"] < result["all_layers"]:
        print(f"all {result['all_layers']} layers at this rate: {result['projected']:.0f} s")
    if "faster" in result:
        print(f"{result['faster']:.2f} times as fast as one process", flush=True)


def alike(run: dict, result: dict) -> bool:
    """Whether a recorded run did the same work in one process."""
    return (
        run["processes"] == 1
        and all(run[key] == result[key] for key in ("model", "solver", "format", "layers", "tokens"))
        and run.get("correction", 0.0) == result["correction"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="8b")
    parser.add_argument("--solver", nargs="+", choices=("rtn", "gptq"), default=["gptq"])
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--moments", default="marginal")
    parser.add_argument("--correction", type=float, default=wc.WushConfig().correction)
    parser.add_argument("--layers", type=int, help="quantize only so many layers, after a warm-up with one")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--no-phases", action="store_true", help="do not wait for the GPU between phases")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--against", type=Path, help="JSON file of one process's runs, to compare with")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        dist.init_process_group()
    shape = SHAPES[args.model]
    generator = torch.Generator().manual_seed(1)
    windows = list(torch.randint(3, shape["vocab_size"], (args.windows, args.length), generator=generator).split(1))
    options = {"format": args.format, "moments": args.moments, "correction": args.correction}
    options["batch_size"] = args.batch_size
    rates = ceilings(device)
    torch.cuda.empty_cache()
    if rank == 0:
        shown = {name: f"{rate / 1e12:.3f}e12/s" for name, rate in rates.items()}
        print(json.dumps({**common.environment(device), **shown}), flush=True)
    layers = args.layers or shape["num_hidden_layers"]
    results = []

    def run(solver: str) -> None:
        if args.layers:
            measure(args.model, solver, 1, windows[: max(8, processes)], device, options, False)
        result = measure(args.model, solver, args.layers, windows, device, options, not args.no_phases)
        tokens = args.windows * args.length // processes
        config = wc.WushConfig(format=args.format, moments=args.moments, solver=solver)
        result |= {
            "model": args.model,
            "solver": solver,
            "format": args.format,
            "correction": args.correction,
            "layers": layers,
            "tokens": tokens * processes,
            "all_layers": shape["num_hidden_layers"],
            "processes": processes,
            "rates": rates,
            "floors": floors(shape, layers, tokens, args.length, config, rates),
            "projected": result["seconds"] * shape["num_hidden_layers"] / layers,
        }
        if args.against is not None:
            # The first run is compared with the first; the second, in a warm process, with the second.
            before = sum(run["solver"] == solver for run in results)
            ones = [run for run in json.loads(args.against.read_text())["runs"] if alike(run, result)][before:]
            result |= {"faster": ones[0]["seconds"] / result["seconds"]} if ones else {}
        results.append(result)
        if rank == 0:
            show(result)
            common.write_json(args.out, {**common.environment(device), "runs": results})

    for solver in args.solver:
        run(solver)
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
