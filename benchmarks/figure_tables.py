"""Renderers of the tables and numbers that documents show: a result of benchmarks/results/ in, Markdown out.

A renderer is a small function decorated with `@figure`; documents call it by name (figures.py). Its arguments are
strings, the first ones names of results. All rounding is done by `shown`.
"""

import itertools
import json
import re
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES: dict[str, Callable[..., str]] = {}


def figure(function: Callable[..., str]) -> Callable[..., str]:
    FIGURES[function.__name__] = function
    return function


@cache
def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(value: float, digits: int = 0) -> str:
    """`value` with that many decimals. Halves are rounded up, as they are on paper."""
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def percent(share: float, digits: int = 0) -> str:
    return f"{shown(100 * share, digits)} %"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|" + "|".join(cell if cell == "---" else f" {cell} ".replace("  ", " ") for cell in line) + "|"
        for line in lines
    )


# -- mixtures of experts ---------------------------------------------------------------------------------------------


@figure
def experts_accuracy(*names: str) -> str:
    """The rows of `moe_accuracy.py` of several results."""
    models = {"dense": "dense", "exact": "exact mixture", "sparse": "sparse mixture"}
    rows = []
    for name in names:
        for key, row in result(name)["rows"].items():
            model, format, _ = key.split()
            measured = [shown(row["reference_perplexity"], 2), shown(row["perplexity"], 2), shown(row["kl"], 3)]
            rows.append([f"{models[model]}, {format.upper()}", row["title"], *measured, percent(row["top1"], 1)])
    return table(["model", "setting", "bf16", "perplexity", "KL to bf16", "top-1"], rows)


@figure
def experts_trial(name: str, format: str) -> str:
    """The rows of `trial_experts.py` in one format."""
    rows = [row for row in result(name)["rows"] if row["format"] == format]
    lines = [
        [
            f"{row['product'].replace('_', ', ')}, {row['tokens']} tokens",
            row["transform"],
            f"{row['rows'][0]} to {row['rows'][-1]}",
            *(shown(100 * loss, 3) for loss in row["loss"].values()),
        ]
        for row in rows
    ]
    header = [f"τ = {tau.removesuffix('.0').replace('inf', '∞')}" for tau in rows[0]["loss"]]
    return table(["product", "transform", "tokens of an expert", *header], lines)


# -- numbers in sentences --------------------------------------------------------------------------------------------


def at(name: str, path: str) -> float:
    """The number at `path`, keys separated by slashes, of a result."""
    value = result(name)
    for key in path.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return value


@figure
def number(name: str, path: str, digits: str = "0", scale: str = "1") -> str:
    return shown(at(name, path) * float(scale), int(digits))


@figure
def ratio(name: str, path: str, over: str, digits: str = "2") -> str:
    return shown(at(name, path) / at(name, over), int(digits))


@figure
def change(name: str, path: str, over: str) -> str:
    """By which share the number at `path` differs from the one at `over`, without its sign."""
    return percent(abs(at(name, path) / at(name, over) - 1))


# -- accuracy --------------------------------------------------------------------------------------------------------


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
def ladder(accuracy: str, layers: str, whole: str, rows: str) -> str:
    """A row a rung: what multiplies on which GPU, KL, the linears of a layer over bf16 by rows, decoding of one
    sequence over bf16, and memory. The head has 8 bits where decoding was measured so. Cells that were not measured are
    empty."""
    kl = {(row["format"], row["activations"], row["head"]): row["kl"] for row in result(accuracy)["rows"]}
    decode = {row["model"]: row for row in result(whole)["rows"] if row["what"] == "decode"}
    counts, timed, lines = rows.split(","), layers_of(layers), []
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
        measured = head == "16 bits" and f"{column} us" in timed[int(counts[0])]
        cells += [f"{gain(timed[int(count)], column)}×" if measured else "" for count in counts]
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
        change = percent(kl["int8"] / kl["16 bits"] - 1, 1)
        lines.append([format, activations, shown(kl["16 bits"], 4), shown(kl["int8"], 4), f"+{change}"])
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


# -- speed: products and whole models --------------------------------------------------------------------------------


def layers_of(name: str) -> dict[int, dict]:
    """Rows of x -> microseconds of a whole decoder layer."""
    return {row["M"]: row for row in result(name)["rows"] if row["group"] == "layer"}


def gain(row: dict, format: str, digits: int = 2) -> str:
    return shown(row["bf16 us"] / row[f"{format} us"], digits)


@figure
def linear(name: str) -> str:
    lines = []
    for count, row in layers_of(name).items():
        ours = [f"{shown(row[f'{format} us'])} ({gain(row, format)}×)" for format in ("mxfp4", "nvfp4")]
        lines.append([str(count), shown(row["bf16 us"]), shown(row["fp8 ceiling us"]), *ours])
    return table(["rows", "bf16", "fp8 ceiling", "MXFP4", "NVFP4"], lines)


@figure
def linear_activations(name: str) -> str:
    """Microseconds and gain over bf16 of a layer, by the weights' format and the bits of activations."""
    columns = {
        f"{f} {b}": f + suffix for f in ("mxfp4", "nvfp4") for b, suffix in ((4, ""), (8, " fp8"), (16, " none"))
    }
    layers, lines = layers_of(name), []
    columns = {title: key for title, key in columns.items() if all(f"{key} us" in row for row in layers.values())}
    for count, row in layers.items():
        ours = [f"{shown(row[f'{key} us'])} ({shown(row[f'{key} speed-up'], 2)}×)" for key in columns.values()]
        lines.append([str(count), shown(row["bf16 us"]), *ours])
    return table(["rows", "bf16", *(f"{title.split()[0].upper()} W4A{title.split()[1]}" for title in columns)], lines)


@figure
def linear_summary(name: str, rows: str) -> str:
    counts, measured = rows.split(","), layers_of(name)
    lines = [[f.upper(), *(f"{gain(measured[int(count)], f)}x" for count in counts)] for f in ("mxfp4", "nvfp4")]
    return table(["rows", *counts], lines)


@figure
def linear_range(name: str, format: str, first: str, unit: str = "x") -> str:
    """The least and the largest gain from `first` rows on."""
    gains = sorted(gain(row, format) for count, row in layers_of(name).items() if count >= int(first))
    return f"{gains[0]}{unit} to {gains[-1]}{unit}"


@figure
def libraries(name: str) -> str:
    """The product beside other libraries' products, µs a layer."""
    columns = {
        "bf16": "bf16",
        "mxfp4": "ours, MXFP4",
        "torchao float8": "torchao float8",
        "torchao int4": "torchao int4 weights",
        "FP-Quant MXFP4": "FP-Quant MXFP4",
        "torchao NVFP4 weights": "torchao NVFP4 weights",
        "torchao MXFP4 emulated, eager": "torchao MXFP4, emulated (eager)",
    }
    lines = [[str(row["M"]), *(shown(row[f"{key} us"]) for key in columns)] for row in result(name)["rows"]]
    return table(["rows", *columns.values()], lines)


@figure
def experts(name: str, layer: str) -> str:
    """A layer of experts, µs: bf16 and ours, also without the sum over each token's experts, which is the same in
    both."""
    lines = []
    for row in (row for row in result(name)["rows"] if row["layer"] == layer):
        bare = {key: row[f"{key} us"] - row["sum us"] for key in ("bf16", "mxfp4", "nvfp4")}
        cells = [f"{shown(row[f'{key} us'])} ({gain(row, key)}×)" for key in ("mxfp4", "nvfp4")]
        cells += [f"{shown(bare['bf16'] / bare[key], 2)}×" for key in ("mxfp4", "nvfp4")]
        lines.append([str(row["tokens"]), shown(row["bf16 us"]), *cells])
    return table(["tokens", "bf16", "MXFP4", "NVFP4", "MXFP4 without the sum", "NVFP4 without the sum"], lines)


@figure
def experts_steps(name: str, layer: str) -> str:
    """The steps of the layer in MXFP4, µs, each timed by itself."""
    steps = ("quantize", "gate-up", "activation", "down", "sum")
    rows = [row for row in result(name)["rows"] if row["layer"] == layer]
    return table(["tokens", *steps], [[str(r["tokens"]), *(shown(r[f"{s} us"], 1) for s in steps)] for r in rows])


@figure
def experts_upcast(name: str) -> str:
    """The expansion of rows to fp8, µs, with one row a program and with several."""
    keys = ("one row a program", "2 rows, 1 warps", "4 rows, 1 warps", "8 rows, 1 warps", "16 rows, 1 warps")
    lines = [
        [f"{row['rows']} of {row['K']}", *(shown(row[f"{key} us"], 1) for key in keys)] for row in result(name)["rows"]
    ]
    return table(["rows", *(key.replace(", 1 warps", "") for key in keys)], lines)


@figure
def experts_whole(name: str, layers: str) -> str:
    """Decoding of a mixture with so many layers, ms a step."""
    found: dict[int, dict[str, dict]] = {}
    for row in result(name)["rows"]:
        if row["layers"] == int(layers):
            found.setdefault(row["batch"], {})[row["model"]] = row
    lines = []
    for batch, row in sorted(found.items()):
        cells = [str(batch)]
        for key in ("ms", "queued ms"):
            bf16, ours = (row[model][key] for model in ("bf16", "mxfp4"))
            cells += [shown(bf16, 2), shown(ours, 2), f"{shown(bf16 / ours, 2)}×"]
        lines.append(cells)
    head = ["sequences", "bf16 waited ms", "MXFP4", "speed-up", "bf16 queued ms", "MXFP4", "speed-up"]
    return table(head, lines)


@figure
def experts_memory(name: str, model: str, layers: str) -> str:
    """GiB of a model's weights with all its layers, from the difference of the two sizes that were held."""
    held = {row["layers"]: row["memory GiB"] for row in result(name)["rows"] if row["model"] == model}
    (few, least), (many, most) = sorted(held.items())
    return shown(least + (most - least) / (many - few) * (int(layers) - few), 1)


def cases(name: str) -> dict[tuple, dict[str, dict]]:
    """(what, attention, batch, context) -> model -> row."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in result(name)["rows"]:
        found.setdefault((row["what"], row["attention"], row["batch"], row["context"]), {})[row["model"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][0], -ord(item[0][1][0]), *item[0][2:])))


@figure
def whole_models(name: str) -> str:
    lines = []
    for (what, attention, batch, context), row in cases(name).items():
        title = f"prefill of {context} tokens"
        cells = [f"decode, batch {batch}, context {context}, `{attention}`" if what == "decode" else title]
        for time in ("ms", "queued ms"):
            bf16, ours = row["bf16"][time], row["mxfp4"][time]
            cells += [shown(bf16, 2), shown(ours, 2), f"{shown(bf16 / ours, 2)}×"]
        lines.append(cells)
    return table(["", "bf16 waited ms", "MXFP4", "speed-up", "bf16 queued ms", "MXFP4", "speed-up"], lines)


@figure
def whole_model(name: str, what: str, attention: str, batch: str, context: str, time: str, digits: str) -> str:
    """The speed-up of MXFP4 in one case; time is "waited" or "queued"."""
    row, key = cases(name)[what, attention, int(batch), int(context)], {"waited": "ms", "queued": "queued ms"}[time]
    return f"{shown(row['bf16'][key] / row['mxfp4'][key], int(digits))}x"


@figure
def weights(name: str, model: str, digits: str = "2", over: str = "") -> str:
    """GiB of a model's weights on the device, or their ratio to those of the model `over`."""
    gib = {row["model"]: row["memory GiB"] for row in result(name)["rows"]}
    return shown(gib[model] / (gib[over] if over else 1), int(digits))


@figure
def projected_floors() -> str:
    """Computed by benchmarks/projection.py: floors of a decoder layer's products in µs."""
    import projection

    def total(device, m: int, format: str) -> str:
        shapes = projection.GROUPS.values()
        if format == "bf16":
            seconds = sum(projection.bf16_floor(device, m, n, k) for n, k in shapes)
        else:
            seconds = sum(projection.count(device, format, m, n, k).floor for n, k in shapes)
        return shown(1e6 * seconds, 1 if seconds < 1e-4 else 0)

    columns = [(device, format) for device in projection.DEVICES for format in ("mxfp4", "nvfp4", "bf16")]
    lines = [[str(m), *(total(device, m, format) for device, format in columns)] for m in projection.ROWS]
    titles = [f"{device.name} {format if format == 'bf16' else format.upper()}" for device, format in columns]
    return table(["rows", *titles], lines)


# -- speed: quantizers and moments -----------------------------------------------------------------------------------


def shape(row: dict) -> str:
    return f"{row['M']} × {row['K']}"


@figure
def quantizer(name: str) -> str:
    columns = (("mxfp4", "none absmax"), ("mxfp4", "blocks absmax"), ("mxfp4", "blocks mse"))
    columns += (("nvfp4", "blocks absmax"), ("nvfp4", "blocks mse"))
    lines: dict[str, list[str]] = {}
    for row in result(name)["rows"]:
        for format, column in columns:
            if row["format"] == format:
                share = f" ({percent(row[f'{column} share'])})" if row["M"] >= 4096 else ""
                lines.setdefault(shape(row), []).append(f"{shown(row[f'{column} us'], 1)} µs{share}")
    titles = ["none, MXFP4", "MXFP4 `absmax`", "MXFP4 `mse`", "NVFP4 `absmax`", "NVFP4 `mse`"]
    return table(["rows × K", *titles], [[key, *cells] for key, cells in lines.items()])


@figure
def prologues(name: str) -> str:
    """The quantizer behind a norm or an activation; the factor of RMSNorm, and SiLU·mul's share of a copy's rate."""
    lines = []
    for row in result(name)["rows"]:
        us = {key: f"{shown(row[f'{key} us'], 1)} µs" for key in ("quantizer", "rms_norm", "layer_norm", "silu_mul")}
        us["rms_norm"] += f" ({shown(row['rms_norm us'] / row['quantizer us'], 2)}×)"
        us["silu_mul"] += f" ({percent(row['silu_mul share'])})" if row["M"] >= 4096 else ""
        lines.append([shape(row), *us.values(), f"{shown(row['gelu_mul us'], 1)} µs"])
    return table(
        ["rows × K", "quantizer", *(f"with {p}" for p in ("RMSNorm", "LayerNorm", "SiLU·mul", "GELU·mul"))], lines
    )


@figure
def gates(name: str) -> str:
    """SiLU·mul before and after its cheaper exponential and division, RMSNorm and NVFP4's mse, each beside its own
    quantizer."""
    lines = []
    for row in result(name)["rows"]:
        us = {key.removesuffix(" us"): value for key, value in row.items() if key.endswith(" us")}
        shares = [percent(us["silu_mul ideal"] / us[key]) for key in ("silu_mul before", "silu_mul")]
        times = zip(("silu_mul before", "silu_mul"), shares)
        lines.append(
            [
                shape(row),
                f"{shown(us['quantizer'], 1)} µs",
                *(f"{shown(us[key], 1)} µs ({share})" for key, share in times),
                f"{shown(us['rms_norm'], 1)} µs ({shown(us['rms_norm'] / us['quantizer'], 2)}×)",
                f"{shown(us['nvfp4 mse'], 1)} µs ({shown(us['nvfp4 mse'] / us['nvfp4 absmax'], 2)}×)",
            ]
        )
    titles = ("quantizer, MXFP4", "SiLU·mul before", "SiLU·mul", "RMSNorm", "NVFP4 `mse`")
    return table(["rows × K", *titles], lines)


@figure
def csrc_quantizer(name: str) -> str:
    """The CUDA quantizer beside Triton's, µs."""
    header, lines = ["rows × K"], []
    for format in ("MXFP4", "NVFP4"):
        header += [f"{format} cuda (share), Triton", "mse", "RMSNorm", "SiLU·mul"]
    for row in result(name)["rows"]:
        cells = [shape(row)]
        for format in ("mxfp4", "nvfp4"):
            for kind in ("absmax", "mse", "rms_norm", "silu_mul"):
                cuda, triton, *share = row[format][kind]
                cells.append(f"{shown(cuda, 1)}{f' ({percent(share[0])})' if share else ''}, {shown(triton, 1)}")
        lines.append(cells)
    return table(header, lines)


@figure
def moments(name: str) -> str:
    rows = result(name)["rows"]
    whole = [f"{shown(r['whole us'])} µs ({shown(r['whole TFLOP/s'])} TFLOP/s)" for r in rows]
    lines = [["whole moment", *whole]]
    for title, key in (("the same in fp32", "whole fp32 us"), ("diagonal blocks of 32", "blocks us")):
        lines.append([title, *(f"{shown(r[key])} µs" for r in rows)])
    return table(["", *(f"K = {r['K']}" for r in rows)], lines)


# -- speed: calibration ----------------------------------------------------------------------------------------------


@figure
def calibration(whole: str, parts: str) -> str:
    """Seconds of whole models. `whole`: a run of all layers; `parts`: two layers each, scaled to all."""
    paper = {("8b", "rtn"): "19 min, 19 GB", ("3b", "rtn"): "9 min, 10 GB"}
    names = {"8b": "Llama-3.1-8B", "3b": "Llama-3.2-3B"}
    lines = []
    for run in [result(whole)["runs"][0], *(r for r in result(parts)["runs"] if r["layers"] < r["all_layers"])]:
        if run["layers"] < run["all_layers"] and (run["model"], run["solver"]) == ("8b", "gptq"):
            continue  # measured whole
        complete = run["layers"] == run["all_layers"]
        how = (
            f"all {run['layers']} layers"
            if complete
            else f"{run['layers']} layers, before: {shown(run['seconds'], 1)} s"
        )
        seconds = f"**{shown(run['seconds'])} s**" if complete else f"{shown(run['projected'])} s"
        title = f"{names[run['model']]} shape, {run['solver'].upper()}-WUSH"
        gigabytes = f"{shown(run['peak_allocated'] / 1e9, 1)} GB"
        lines.append([title, how, seconds, paper.get((run["model"], run["solver"]), ""), gigabytes])
    return table(["", "measured", "all layers", "the paper, one H100", "peak GPU memory"], lines)


def phase_table(header: list[str], columns: list[dict], floors: dict, totals: list[float]) -> str:
    """Seconds by phase, the longest in the second last column first."""
    names = sorted({name for column in columns for name in column}, key=lambda name: -columns[-1].get(name, 0.0))
    lines = []
    for name in names:
        cells = [shown(column[name], 1) if name in column else "" for column in columns]
        lines.append([name, *cells, *([shown(floors[name], 1) if name in floors else ""] if floors else [])])
    total = [f"**{shown(seconds, 1)}**" for seconds in totals]
    return table(header, [*lines, ["**all**", *total, *([""] if floors else [])]])


@figure
def phases(before: str, now: str) -> str:
    old, new = result(before)["runs"][0], result(now)["runs"][0]
    header = ["phase", "before", "now", "floor"]
    return phase_table(header, [old["phases"], new["phases"]], new["floors"], [old["seconds"], new["seconds"]])


@figure
def ranks(name: str) -> str:
    one, two = result(name)["runs"]
    columns = [*(rank["phases"] for rank in two["ranks"]), one["phases"]]
    header = ["phase, seconds", *(f"rank {rank}" for rank in range(len(two["ranks"]))), "one process"]
    return phase_table(header, columns, {}, [*(two["seconds"] for _ in two["ranks"]), one["seconds"]])


# -- coverage --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "quantized": "quantized",
    "graph": "equals its graph",
    "saved": "saved and loaded",
    "generate": "generates",
    "compile": "compiled",
    "export": "exported",
    "images": "text with images",
}
_ALMOST = ("the trace itself differs", "by another order of additions")


def mark(row: dict, column: str) -> str:
    """`✓` equal, `≈` equal but for the trace's own difference, `✗` not, `–` does not apply."""
    value = row.get(column)
    if column == "graph" and row.get("equal") not in (None, "equal"):
        return "≈"
    if value is True:
        return "✓"
    if value is None or column in row.get("not_applicable", {}):
        return "–"
    return "≈" if value.startswith(_ALMOST) else "✗"


def walked(name: str) -> dict[str, dict]:
    """The architectures that run in eager mode and have a linear."""
    return {n: row for n, row in result(name)["rows"].items() if row.get("eager") is True and row["linears"]}


def passes(row: dict) -> bool:
    """Whether an architecture is quantized and no column but `images` is `✗`."""
    return mark(row, "quantized") == "✓" and all(mark(row, c) != "✗" for c in COLUMNS if c != "images")


@figure
def coverage(name: str, what: str) -> str:
    """How many architectures were walked, run, have linears, or pass; `share` of those that pass."""
    rows, linear = result(name)["rows"], walked(name)
    passed = sum(map(passes, linear.values()))
    counts = {
        "walked": len(rows),
        "run": sum(row.get("eager") is True for row in rows.values()),
        "linear": len(linear),
        "pass": passed,
        "share": percent(passed / len(linear), 1),
    }
    return str(counts[what])


@figure
def coverage_columns(name: str) -> str:
    """For each column how many architectures it applies to, and how many hold it."""
    lines = []
    for column, title in COLUMNS.items():
        marks = [mark(row, column) for row in walked(name).values()]
        marks = [m for m in marks if m != "–"]
        lines.append([title, *(str(n) for n in (len(marks), marks.count("✓"), marks.count("≈"), marks.count("✗")))])
    return table(["column", "applies to", "✓", "≈", "✗"], lines)


@figure
def coverage_table(name: str) -> str:
    """A row for each architecture that runs and has a linear."""
    lines = [
        [
            f"`{model}`",
            row["class"].removeprefix("nn."),
            row["kind"],
            f"{row.get('linears_quantized', 0)} of {row['linears']}",
            *(mark(row, column) for column in COLUMNS),
        ]
        for model, row in walked(name).items()
    ]
    return table(["model type", "class", "kind", "linears", *COLUMNS.values()], lines)


@figure
def coverage_failures(name: str) -> str:
    """What those say that do not pass."""
    lines = []
    for model, row in walked(name).items():
        column = next((c for c in COLUMNS if mark(row, c) == "✗"), None if passes(row) else "quantized")
        if column is not None:
            text = str(row.get(column) or row.get("stopped")).replace("|", "/").replace("<", "&lt;").replace("\n", " ")
            lines.append([f"`{model}`", COLUMNS[column], text[:160].replace("*", "\\*").replace("_", "\\_")])
    return table(["model type", "column", "error"], lines)


@figure
def coverage_not_run(name: str) -> str:
    """The model types of which no tiny model runs."""
    rows = result(name)["rows"]
    return ", ".join(f"`{model}`" for model, row in rows.items() if row.get("eager") is not True)
