"""What the benchmarks share: WikiText-2 in its usual form, a tuning run, and what a result was measured on."""

import json
import os
import platform
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


def load_smollm2(gguf: Path | None, where: torch.device) -> tuple[torch.nn.Module, object]:
    """(bf16 model on a device, tokenizer); `gguf` None fetches the file."""
    from wush_compile.checkpoint.gguf import load_gguf
    from wush_compile.demo import smollm2

    model, tokenizer = load_gguf(gguf or smollm2.fetch())
    return model.to(where), tokenizer


def environment(where: torch.device) -> dict[str, str]:
    """Device and versions, for the record."""
    import transformers

    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


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
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
