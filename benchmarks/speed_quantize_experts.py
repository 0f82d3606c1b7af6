"""Time and memory of `wush_compile.quantize_checkpoint` on a mixture of experts: random weights, streamed from disk.

    python benchmarks/speed_quantize_experts.py --folder DIR --layers 6 --out quantize_experts.json
    python benchmarks/speed_quantize_experts.py --folder DIR --model tiny --device cpu --windows 4 --length 64

DIR gets the checkpoint, one matrix an expert as the hub has them (1.3 GB a layer of Qwen3-30B-A3B's shape), and the
result. A checkpoint that is there is used again. With `--layers` the time of all layers is projected: those that are
left out take what a layer in the middle takes.

The time covers everything from the files to the files, GPTQ on windows of random tokens. Memory of the GPU is what
PyTorch reserves at most, and of the CPU the most that the process holds, with the values between layers: all of it, and
in each phase of the run what is not mapped from files, sampled every 20 ms.
"""

import argparse
import json
import resource
import shutil
import threading
import time
from pathlib import Path

import common
import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import wush_compile as wc
from wush_compile import phases

SHAPES = {
    "30b-a3b": dict(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=512,
    ),
}


def write_checkpoint(folder: Path, shape: dict, device: torch.device) -> None:
    """A random model in bf16, a file for each layer and one for the rest."""
    config = Qwen3MoeConfig(**shape, norm_topk_prob=True, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    by_file: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "rest"
        by_file.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    index = {}
    for file, shapes in by_file.items():
        tensors = {}
        for name, size in shapes.items():
            value = torch.randn(size, device=device, generator=generator)
            value = 1 + 0.1 * value if len(size) == 1 else value / size[-1] ** 0.5
            value = value.to(torch.bfloat16).cpu()
            path, _, leaf = name.rpartition(".")
            if leaf == "gate_up_proj":
                for e, own in enumerate(value):
                    gate, up = own.chunk(2)
                    tensors[f"{path}.{e}.gate_proj.weight"] = gate.contiguous()
                    tensors[f"{path}.{e}.up_proj.weight"] = up.contiguous()
            elif leaf == "down_proj":
                tensors |= {f"{path}.{e}.down_proj.weight": own.contiguous() for e, own in enumerate(value)}
            else:
                tensors[name] = value
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


class Memory(threading.Thread):
    """Samples the memory of the process: `most` has the most bytes in each phase, without pages that are mapped from
    files."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most: dict[str, int] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            kib = {
                line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))
            }
            name = phases.current() or "other"
            self.most[name] = max(self.most.get(name, 0), sum(kib.values()) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the result go")
    parser.add_argument("--model", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--format", default="mxfp4")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    where, shape = common.device(args.device), dict(SHAPES[args.model])
    every = shape["num_hidden_layers"]
    shape["num_hidden_layers"] = layers = args.layers or every
    source = args.folder / f"{args.model}-{layers}"
    start = time.perf_counter()
    if not source.is_dir():
        write_checkpoint(source, shape, where)
    print(f"checkpoint written in {time.perf_counter() - start:.0f} s, not counted", flush=True)
    ids = torch.randint(3, shape["vocab_size"], (args.windows, args.length), generator=torch.Generator().manual_seed(1))
    shutil.rmtree(args.folder / "quantized", ignore_errors=True)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    log = args.folder / "log.jsonl"
    log.unlink(missing_ok=True)
    memory = Memory()
    memory.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    with phases.timing() as seconds:
        model = wc.quantize_checkpoint(
            source,
            list(ids.split(1)),
            out=args.folder / "quantized",
            device=where,
            format=args.format,
            progress=wc.Progress(bar=False, log=log),
        )
    total = time.perf_counter() - start
    memory.ended.set()
    ends = [event["time"] for line in log.read_text().splitlines() if (event := json.loads(line))["event"] == "stage"]
    result = {
        **common.environment(where),
        "model": args.model,
        "layers": layers,
        "all_layers": every,
        "tokens": ids.numel(),
        "format": args.format,
        "seconds": total,
        "phases": dict(seconds),
        "peak_gpu": torch.cuda.max_memory_reserved() if where.type == "cuda" else None,
        "cpu_before": before,
        "peak_cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_cpu_by_phase": dict(sorted(memory.most.items(), key=lambda item: -item[1])),
        "relative_loss": [
            report["relative_loss"]
            for name, report in model.wush_quantization.report.items()
            if "experts" in name and "relative_loss" in report
        ],
        "stage_ends": ends,
    }
    inner = ends[1:layers]  # the last layer runs once, not twice
    each = (inner[-1] - inner[0]) / (len(inner) - 1) if len(inner) > 1 else total / layers
    # The pass that weighs tokens comes before all stages; that all of it scales is an upper bound.
    before_stages = seconds.get("token weights", 0.0) / layers
    result["projected"] = total + (each + before_stages) * (every - layers)
    common.write_json(args.out, result)
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{phase:16}{value:9.2f} s")
    print(f"all: {total:.1f} s for {layers} layers, {result['projected']:.0f} s for {every} at this rate")
    gpu = f"GPU {result['peak_gpu'] / 1e9:.1f} GB reserved, " if result["peak_gpu"] else ""
    print(f"peak memory: {gpu}CPU {result['peak_cpu'] / 1e9:.1f} GB ({before / 1e9:.1f} GB before the run)")
    print("not mapped:", ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in result["peak_cpu_by_phase"].items()))


if __name__ == "__main__":
    main()
