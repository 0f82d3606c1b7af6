"""Accuracy: the comparison of methods, trials of settings, the ladder."""

import itertools
import re

from .common import RESULTS, figure, percent, result, shown, table
from .products import gain, layers_of


@figure
def accuracy(name: str, format: str) -> str:
    """All rows of a format, as benchmarks/accuracy.py measured them; the default stands out."""
    lines = []
    for key, row in result(name)["rows"].items():
        if key.startswith(f"{format} ") and "error" not in row:
            cells = [row["title"], shown(row["perplexity"], 2), shown(row["ratio"], 3), shown(row["kl"], 3)]
            cells.append(percent(row["top1"], 1))
            lines.append([f"**{cell}**" for cell in cells] if key.endswith(" default") else cells)
    return table([format.upper(), "perplexity", "/ bf16", "KL", "top-1"], lines)


@figure
def accuracy_summary(name: str) -> str:
    titles = {
        "rtn-identity": "rounding to nearest",
        "rtn-hadamard": "rounding after a Hadamard transform",
        "gptq-hadamard": "GPTQ after a Hadamard transform",
        "paper": "the WUSH authors' setting",
        "default": "**wush_compile's default**",
    }
    lines = []
    for key, title in titles.items():
        cells = [title]
        for format in ("mxfp4", "nvfp4"):
            row = result(name)["rows"].get(f"{format} {key}")
            cells += ["", ""] if row is None else [shown(row["perplexity"], 1), shown(row["kl"], 3)]
        lines.append([f"**{c.strip('*')}**" for c in cells] if key == "default" else cells)
    header = ["MXFP4 perplexity", "KL to bf16", "NVFP4 perplexity", "KL to bf16"]
    return table(["W4A4, all decoder linears", *header], lines)


@figure
def baselines(name: str) -> str:
    """Rows `baseline-*` of accuracy.py."""
    lines = [
        [key.partition(" ")[0].upper(), row["title"], shown(row["perplexity"], 2), shown(row["kl"], 3)]
        for key, row in result(name)["rows"].items()
    ]
    return table(["format", "method", "perplexity", "KL to bf16"], lines)


@figure
def equalization(name: str) -> str:
    """The largest RMS of a channel over the smallest, of all channels and inside the worst block of 32."""
    lines = []
    measured = result(name)["rms"]
    for kind in next(iter(measured.values())):
        cells = [kind]
        for linear in measured:
            for side in ("activation", "weight"):
                values = measured[linear][kind][side]
                blocks = [values[i : i + 32] for i in range(0, len(values), 32)]
                within = max(max(block) / min(block) for block in blocks)
                cells.append(f"{shown(max(values) / min(values), 2)}, {shown(within, 2)}")
        lines.append(cells)
    header = [f"{linear.rpartition('.')[2]}, {side}" for linear in measured for side in ("input", "weight")]
    return table(["largest / smallest RMS: all, in a block", *header], lines)


@figure
def activation_powers(name: str) -> str:
    """KL by format and activations: no transform, Hadamard, and WUSH with each power of s."""
    rows = result(name)["rows"]
    powers = sorted({row["power"] for row in rows if row["power"] is not None})
    lines = []
    for format in ("mxfp4", "nvfp4"):
        for activations, bits in (("same", "4"), ("fp8", "8"), ("none", "16")):
            kl = {
                (r["transform"], r["power"]): r["kl"]
                for r in rows
                if (r["format"], r["activations"]) == (format, activations)
            }
            keys = [("identity", None), ("hadamard", None), *(("wush", power) for power in powers)]
            lines.append([format.upper(), bits, *(shown(kl[key], 3) if key in kl else "" for key in keys)])
    return table(["weights", "bits of activations", "none", "Hadamard", *(f"s^{power:g}" for power in powers)], lines)


RUNGS = (("mxfp4", "same"), ("mxfp4", "fp8"), ("mxfp4", "none"), ("nvfp4", "same"), ("nvfp4", "fp8"), ("nvfp4", "none"))
RUNGS += (("int8", "fp8"), ("int8", "none"))
GPUS = {"A100, L40S": ((8, 0), (8, 9)), "H100, H200": ((9, 0),), "B200, RTX 5090": ((10, 0), (12, 0))}


def tensor_cores(format: str, activation: str, gpus: str) -> str:
    """What multiplies on these GPUs, all of them alike: from the words of the providers."""
    import torch  # noqa: F401  (first: the package registers its kernels when torch is there)

    from wush_compile.kernels.dispatch import arithmetic

    [found] = {re.search(r"(\w+) tensor cores", arithmetic(format, c, activation))[1].lower() for c in GPUS[gpus]}
    return found


@figure
def token_weights(name: str) -> str:
    """KL by setting, in a column for each format and activation format."""
    kl = {(r["row"], r["format"], r["activations"]): r["kl"] for r in result(name)["rows"]}
    measured = {(f, a) for _, f, a in kl}
    columns = [(f, a) for f in ("mxfp4", "nvfp4") for a in ("same", "fp8", "none") if (f, a) in measured]
    lines = []
    for row in dict.fromkeys(row for row, *_ in kl):
        lines.append([row, *(shown(kl[(row, *c)], 4) if (row, *c) in kl else "" for c in columns)])
    bits = {"same": 4, "fp8": 8, "none": 16}
    return table(["setting", *(f"{format.upper()}, {bits[a]} bits" for format, a in columns)], lines)


@figure
def frontier(name: str) -> str:
    """KL by setting, and its change from the default of the same run."""
    kl = {(r["row"], r["format"]): r["kl"] for r in result(name)["rows"]}
    lines = []
    for row in dict.fromkeys(row for row, _ in kl):
        cells = [f"`{row}`"]
        for format in ("mxfp4", "nvfp4"):
            own, default = kl.get((row, format)), kl["default", format]
            cells += ["", ""] if own is None else [shown(own, 4), f"{100 * (own / default - 1):+.1f} %"]
        lines.append(cells)
    return table(["setting", "MXFP4", "of the default", "NVFP4", "of the default"], lines)


@figure
def frontier_sets(name: str) -> str:
    """KL by setting, the mean of several calibration sets and their range."""
    found: dict[str, dict[str, list[float]]] = {}
    for r in result(name)["rows"]:
        found.setdefault(r["row"], {}).setdefault(r["format"], []).append(r["kl"])
    lines = []
    for row in sorted(found, key=len):
        kls = [found[row].get(format) for format in ("mxfp4", "nvfp4")]
        cells = ["" if k is None else f"{shown(sum(k) / len(k), 4)} ({min(k):.4f} to {max(k):.4f})" for k in kls]
        lines.append([f"`{row}`", *cells])
    return table(["setting", "MXFP4", "NVFP4"], lines)


@figure
def qronos(name: str) -> str:
    """KL by how weights make up for the layers in front, or rows of a weight for each other."""
    found: dict[str, dict[str, float]] = {}
    for r in result(name)["rows"]:
        text = f", {r['calibration_windows']} windows" if "calibration_windows" in r else ""
        text += ", 16-bit activations" if r.get("activations") == "16" else ""
        found.setdefault(f"`{r['row']}`{text}", {})[r["format"]] = r["kl"]
    lines = [
        [row, *("" if format not in kls else shown(kls[format], 4) for format in ("mxfp4", "nvfp4"))]
        for row, kls in found.items()
    ]
    return table(["setting", "MXFP4", "NVFP4"], lines)


@figure
def encoder(name: str) -> str:
    """Errors of an encoder's embeddings and hidden states by setting."""
    rows = result(name)["rows"]
    cells = [
        [f"{r['format'].upper()}, {r['row']}", shown(r["embedding_error"], 4), shown(r["state_error"], 4)] for r in rows
    ]
    return table(["setting", "squared error of embeddings", "relative error of hidden states"], cells)


@figure
def recommended(name: str) -> str:
    """The assignments of `trial_recommend.py`: predicted and measured KL, by rising measured KL."""
    rows = sorted(result(name)["rows"].items(), key=lambda item: item[1]["kl"])
    return table(
        ["assignment", "cost / 16 bits", "predicted KL", "measured KL"],
        [[key, shown(r["share"], 3), shown(r["predicted"], 4), shown(r["kl"], 4)] for key, r in rows],
    )


@figure
def massive_tokens(name: str) -> str:
    """Relative losses on ordinary tokens / on massive ones, by transform and rule, a column for each multiple."""
    rows = result(name)["rows"]
    multiples, lines = sorted({r["multiple"] for r in rows}), []
    for key in dict.fromkeys((r["format"], r["transform"], r["weights"]) for r in rows):
        found = {r["multiple"]: r for r in rows if (r["format"], r["transform"], r["weights"]) == key}
        cells = (
            " / ".join(shown(found[m][part], 2) for part in ("ordinary", "massive") if part in found[m])
            for m in multiples
        )
        lines.append([key[0].upper(), key[1], key[2], *cells])
    heads = ("none" if m == 1 else f"× {m:g}" for m in multiples)
    return table(["loss, %", "transform", "weights", *heads], lines)


def llama_gib(format: str, head: str) -> float:
    """GiB of the weights of Llama-3.1-8B's shape: 32 layers, an embedding, a head, norms."""
    from wush_compile.calibration.costs import KEPT, held

    rung = "W8A16" if format == "int8" else "W4A4"
    layer = sum(held(rung, format, *shape) for shape in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
    outside = 128256, 4096
    both = held(KEPT, "mxfp4", *outside) + held(KEPT if head == "16 bits" else "W8A16", "mxfp4", *outside)
    return (32 * layer + both + 2 * 65 * 4096) / 2**30


@figure
def ladder(accuracy: str, layers: str, same: str, whole: str, rows: str) -> str:
    """A row a rung: what multiplies on which GPU, KL, the linears of a layer over bf16 by rows, decoding of one
    sequence over bf16, and memory. `same` has the linears with 4-bit activations, `layers` the others. The head has
    8 bits where decoding was measured so. Cells that were not measured are empty."""
    kl = {(row["format"], row["activations"], row["head"]): row["kl"] for row in result(accuracy)["rows"]}
    decode = {row["model"]: row for row in result(whole)["rows"] if row["what"] == "decode"}
    counts, lines = rows.split(","), []
    timed, timed_same = layers_of(layers), layers_of(same)
    for (format, activation), head in itertools.product(RUNGS, ("16 bits", "int8")):
        model = format if activation == "same" else f"{format}-{activation}"
        row = decode.get(model + ("+head" if head == "int8" else ""))
        if head == "int8" and row is None:
            continue
        column = model.replace("-", " ")
        cells = [
            (format if format == "int8" else format.upper()) + (", int8 head" if head == "int8" else ""),
            {"same": "4 bits", "fp8": "fp8", "none": "16 bits"}[activation],
            *(tensor_cores(format, activation, gpus) for gpus in GPUS),
        ]
        known = kl.get((format, activation, head))
        cells.append("" if known is None else shown(known, 4))
        found = timed_same if activation == "same" else timed
        measured = head == "16 bits" and f"{column} us" in found[int(counts[0])]
        cells += [f"{gain(found[int(count)], column)}×" if measured else "" for count in counts]
        cells.append("" if row is None else f"{shown(decode['bf16']['queued ms'] / row['queued ms'], 2)}×")
        lines.append([*cells, shown(llama_gib(format, head), 2)])
    columns = [*(f"{count} row{'s' * (count != '1')}" for count in counts), "one sequence", "GiB"]
    return table(["weights", "activations", *GPUS, "KL", *columns], lines)


@figure
def weight_errors(name: str) -> str:
    """Rounding errors of formats of 8 bits, in shares of the weights' power."""
    errors = result(name)["errors"]
    formats = list(next(iter(errors.values())))
    return table(["", *formats], [[what, *(f"{found[f]:.1e}" for f in formats)] for what, found in errors.items()])


def head_kl(name: str) -> dict[tuple[str, str], dict[str, float]]:
    """(format, activations) -> head -> KL."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in result(name)["rows"]:
        found.setdefault((row["format"], row["activations"]), {})[row["head"]] = row["kl"]
    return found


@figure
def ladder_head(name: str) -> str:
    lines = []
    for (format, activations), kl in head_kl(name).items():
        change = f"{100 * (kl['int8'] / kl['16 bits'] - 1):+.1f} %"
        lines.append([format, activations, shown(kl["16 bits"], 4), shown(kl["int8"], 4), change])
    return table(["weights", "activations", "head in 16 bits", "int8 head", "change"], lines)


@figure
def head_cost(name: str) -> str:
    """The most that an int8 head adds to the KL of a rung with 4-bit weights."""
    kl = (found for (format, _), found in head_kl(name).items() if format != "int8")
    return percent(max(found["int8"] / found["16 bits"] - 1 for found in kl), 1)


@figure
def decode_ms(name: str, model: str) -> str:
    return shown(next(row["queued ms"] for row in result(name)["rows"] if row["model"] == model), 2)


@figure
def head_speed(name: str) -> str:
    """The head's product, µs: bf16, int8, and their ratio."""
    lines = [
        [str(r["M"]), shown(r["bf16 us"]), shown(r["int8 us"]), f"{shown(r['gain'], 2)}×"] for r in result(name)["rows"]
    ]
    return table(["rows", "bf16 µs", "int8 µs", "speed-up"], lines)


@figure
def layer_losses(name: str) -> str:
    """Relative losses in percent, the mean over seeds; the seven linears in the order of the paper's Table 1."""
    letters = {"identity": "I", "random": "R", "hadamard": "H", "wus": "WUS", "wush": "WUSH"}
    lines = []
    for format in ("mxfp4", "nvfp4", "int4"):
        for transform, letter in letters.items():
            means = []
            for losses in result(name)["relative"].values():
                values = [loss for key, loss in losses.items() if key.startswith(f"{format} {transform} ")]
                means.append(f"{100 * sum(values) / len(values):#.3g}")
            lines.append([format, letter, *means])
    return table(["relative loss, %", "", *"QKVOGUD"], lines)


@figure
def demo(name: str) -> str:
    lines = []
    for row in result(name)["rows"]:
        kl, top1 = ("", "") if row["kl"] is None else (shown(row["kl"], 4), percent(row["top1"], 1))
        lines.append([row["title"], shown(row["perplexity"], 2), kl, top1, f"{shown(row['weights MiB'], 1)} MiB"])
    return table([result(name)["text"], "perplexity", "KL to bf16", "top-1", "weights"], lines)


@figure
def global_scale(name: str, rule: str) -> str:
    """The trial of candidates for NVFP4's global scale: errors over those of the best candidate."""
    lines = []
    for candidate, row in result(name)["summary"][rule].items():
        errors = [shown(row[f"{side} {how}"], 2) for side in ("ordinary", "outlying") for how in ("mean", "worst")]
        lines.append([candidate, *errors, percent(row["saturated"], 3), percent(row["subnormal"], 1)])
    return table(
        ["candidate", "ordinary tokens, mean", "worst", "outlying tokens, mean", "worst", "saturated", "subnormal"],
        lines,
    )


@figure
def global_scale_position(name: str, rule: str) -> str:
    errors = {int(e): error for e, error in result(name)["position"][rule].items() if int(e) <= -6 or int(e) >= 8}
    return table(["e", *map(str, errors)], [["error", *(shown(error, 4) for error in errors.values())]])


@figure
def global_scale_layers(name: str) -> str:
    """Relative losses of SmolLM2's linears in percent."""
    rows = result(name)["layers"]
    lines = [[candidate, *(f"{100 * loss:#.3g}" for loss in row.values())] for candidate, row in rows.items()]
    return table(["relative loss, %", *(linear.removesuffix("_proj") for linear in next(iter(rows.values())))], lines)


@figure
def files() -> str:
    """All results with what they were measured on."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        run = result(path.stem)
        lines.append([f"`{path.name}`", run["device"], run["date"], f"`{run['command']}`"])
    return table(["file", "device", "date", "command"], lines)
