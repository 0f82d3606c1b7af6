"""The numbers of the paper's tables (arXiv 2512.00956), as they are printed there."""

# Table 1 is in benchmarks/layer_loss.py, which measures it.

# Tables 2 and 3: recovery in percent, by (format, method of wush_compile.baselines).
_LLAMA_8B = {
    "nvfp4": {
        "rtn": 94.67,
        "rtn-hadamard": 93.82,
        "smoothquant": 95.90,
        "quarot": 93.80,
        "spinquant": 93.40,
        "gptq": 95.92,
        "gptq-hadamard": 96.08,
        "rtn-wush": 95.37,
        "gptq-wush": 96.40,
    },
    "mxfp4": {
        "rtn": 87.83,
        "rtn-hadamard": 89.26,
        "smoothquant": 89.06,
        "quarot": 79.70,
        "spinquant": 88.00,
        "gptq": 89.47,
        "gptq-hadamard": 93.31,
        "rtn-wush": 92.75,
        "gptq-wush": 94.20,
    },
}
_FIVE = ("rtn", "rtn-hadamard", "rtn-wush", "gptq-hadamard", "gptq-wush")


def _rows(nvfp4: tuple, mxfp4: tuple) -> dict[str, dict[str, float]]:
    return {"nvfp4": dict(zip(_FIVE, nvfp4)), "mxfp4": dict(zip(_FIVE, mxfp4))}


_BY_MODEL = {
    "Llama-3.1-8B-Instruct": _LLAMA_8B,
    "Llama-3.2-3B-Instruct": _rows((94.68, 90.95, 94.19, 93.99, 94.93), (87.24, 87.27, 92.92, 92.58, 92.53)),
    "Qwen3-8B": _rows((97.70, 96.04, 98.61, 97.91, 98.66), (93.74, 94.75, 96.68, 97.07, 97.68)),
    "Qwen3-14B": _rows((97.80, 98.12, 98.76), (96.31, 95.44, 98.30)),
    "Qwen3-32B": _rows((98.37, 98.51, 99.24), (92.33, 98.45, 98.28)),
}
TASKS = {
    model: {(format, method): value for format, rows in found.items() for method, value in rows.items()}
    for model, found in _BY_MODEL.items()
}

# Table 4: KL divergence of Qwen3-8B, by format and method.
KL = {
    "nvfp4": {"gptq-hadamard": 0.069518, "rtn-wush": 0.065747, "gptq-wush": 0.054646},
    "mxfp4": {"gptq-hadamard": 0.093119, "rtn-wush": 0.093739, "gptq-wush": 0.077909},
}
# Table 5: averages of Qwen3-8B in MXFP4 by calibration set: (harness, PlatinumBench).
CALIBRATION = {
    "RTN": {"FineWeb": (74.91, 93.00), "C4": (75.57, 92.89), "Open-Platypus": (74.99, 93.12)},
    "GPTQ": {"FineWeb": (75.69, 93.52), "C4": (75.78, 93.53)},
}
# Table 6: (GPU, minutes, GB) of RTN with WUSH.
COST = {
    "Llama-3.2-3B-Instruct": ("H100", 9, 10),
    "Llama-3.1-8B-Instruct": ("H100", 19, 19),
    "Qwen3-8B": ("H100", 25, 17),
    "Qwen3-14B": ("H100", 30, 20),
    "Qwen3-32B": ("B200", 38, 40),
}
# Table 7: the transforms' share of a checkpoint in percent, (MXFP4, NVFP4).
STORAGE = {
    "Llama-3.2-3B-Instruct": (2.1, 1.0),
    "Llama-3.1-8B-Instruct": (1.4, 0.7),
    "Qwen3-8B": (1.4, 0.7),
    "Qwen3-14B": (1.2, 0.6),
    "Qwen3-32B": (1.2, 0.6),
}
