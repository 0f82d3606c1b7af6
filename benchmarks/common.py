"""What the benchmarks share: WikiText-2 in its usual form, a tuning run, and what a result was measured on."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from pathlib import Path

import torch


def wikitext_join(raw: str) -> str:
    """The text of a WikiText split for a tokenizer: the usual Hugging Face join of its lines."""
    rows = ["" if line.strip() == "" else line + "\n" for line in raw.split("\n")[:-1]]
    return "\n\n".join(rows)


def wikitext(folder: Path, split: str) -> str:
    """`split` is valid or test; the folder holds valid.txt and test.txt, WikiText-2 raw v1."""
    # newline="" keeps what the file says: splitting at other line ends would move tokens.
    with (Path(folder) / f"{split}.txt").open(encoding="utf-8", newline="") as file:
        return wikitext_join(file.read())


def device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def trial_parser(description: str, file: str, needs_data: bool = False) -> argparse.ArgumentParser:
    """Arguments of the trial in the script `file`: data and model for the functions below, and out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    without = "" if needs_data else "; the text of `make demo` without"
    parser.add_argument("--data", type=Path, required=needs_data, help=f"folder with valid.txt and test.txt{without}")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, default=Path(f"{Path(file).stem}.json"))
    return parser


def load_smollm2(path: Path | None, where: torch.device) -> tuple[torch.nn.Module, object]:
    """(bf16 model on a device, tokenizer) of a GGUF file or a model directory; None fetches SmolLM2's file."""
    from wush_compile.checkpoint.gguf import load_gguf
    from wush_compile.demo import smollm2

    if path is not None and path.is_dir():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        return model.to(where), AutoTokenizer.from_pretrained(path)
    model, tokenizer = load_gguf(path or smollm2.fetch())
    return model.to(where), tokenizer


def smollm2_texts(
    data: Path | None, tokenizer, where: torch.device, calibration: int = 128, test: int = 64, first: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """(batches of calibration int64 [n, window], ids of the test [1, N], the test's window) of a trial on SmolLM2.

    `calibration` windows of 512 tokens of WikiText-2 valid, from the `first` on, and `test` windows of 2048 of test;
    without a folder `data` the text of `make demo`, for a CPU.
    """
    from wush_compile.data import python_topics, windows
    from wush_compile.demo import run as demo

    if data is None:
        pieces = windows(python_topics(), tokenizer, demo.WINDOW, demo.CALIBRATION_WINDOWS + demo.EVALUATION_WINDOWS)
        batches = torch.cat(pieces[: demo.CALIBRATION_WINDOWS]).to(where).split(4)
        return list(batches), torch.cat(pieces[demo.CALIBRATION_WINDOWS :], dim=1), demo.WINDOW
    pieces = windows(wikitext(data, "valid"), tokenizer, 512, first + calibration)
    ids = torch.cat(windows(wikitext(data, "test"), tokenizer, 2048, test), dim=1)
    return list(torch.cat(pieces[first:]).to(where).split(8)), ids, 2048


def environment(where: torch.device) -> dict[str, str]:
    """The head of a result: device, date, command and versions."""
    import transformers

    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "/".join(Path(sys.argv[0]).absolute().parts[-2:]), *map(shown, sys.argv[1:])]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "transformers": transformers.__version__,
    }


def shown(argument: str) -> str:
    """An argument as a result records it: of a path only the last part, since folders differ between machines."""
    return Path(argument).name if "/" in argument else argument


def read_tuning(path: Path) -> dict[tuple[str, int, int, int], dict]:
    """(format, rows, N, K) -> {kernel: microseconds} of a file that `kernel_speed.py tune-linear` wrote.

    A kernel is a tile of `linear/choose.py` or a name, "library" or "bf16"."""
    from wush_compile.kernels.triton.linear.choose import Fused, Gemv, Hopper

    kinds = {"Fused": Fused, "Gemv": Gemv, "Hopper": Hopper}
    return {
        # The text of a kernel is its own repr.
        (row["format"], row["M"], row["N"], row["K"]): {eval(text, kinds): us for us, text in row["all"]}
        for row in json.loads(path.read_text())["rows"]
    }


def write_json(path: Path | None, result: dict) -> None:
    """Replaces the file whole, so that a killed benchmark keeps every row it finished."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps(result, indent=1)
    # The numbers of a list stand on one line.
    text = re.sub(r"\[\n\s+([-+.\w]+(?:,\n\s+[-+.\w]+)*)\n\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    partial.write_text(text + "\n")
    os.replace(partial, path)
