"""The paper's tables from benchmarks/results: one function a table, which returns what it shows and where it is from.

A table has a title, columns, rows of cells, the results that its numbers come from, and notes. Where the model is not
the paper's, the paper's absolute numbers do not stand beside ours; ratios do where they can be compared.
"""

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import published
import task_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
import layer_loss

from wush_compile.baselines import METHODS

OTHER_MODEL = "The model is SmolLM2-135M-Instruct, which the paper does not measure"


@dataclass
class Shown:
    """A table: cells are texts or numbers; `sources` are files of benchmarks/results."""

    title: str
    columns: list[str]
    rows: list[list]
    sources: list[str]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(map(cell, row)) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}. " for note in self.notes), f"From: {', '.join(self.sources)}.", ""])


def cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def result(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def missing(title: str, command: str) -> Shown:
    return Shown(title, ["not measured"], [[f"`{command}` measures it"]], ["nothing here"])


def table1() -> Shown:
    """Layer losses."""
    measured = result("layer_loss_cpu")
    columns = {letter: f"model.layers.{measured['block']}.{name}" for letter, name in layer_loss.LINEARS.items()}
    rows = []
    for format in layer_loss.PAPER:
        for kind, letter in layer_loss.LETTERS.items():
            values = [
                statistics.fmean(v for k, v in measured["loss"][name].items() if k.startswith(f"{format} {kind} "))
                for name in columns.values()
            ]
            rows.append([format.upper(), letter, *(1000 * v for v in values)])
    notes = [
        f"Losses times 1000, block {measured['block']}",
        f"{OTHER_MODEL} (its table has Qwen3-8B, block 18): orderings stand for its numbers, those of its table",
        *measured["orderings"],
    ]
    return Shown(
        "Table 1: layer losses of RTN", ["format", "transform", *columns], rows, ["layer_loss_cpu.json"], notes
    )


# Rows of accuracy.py that are a method of METHODS, best first.
KL_ROWS = {
    "rtn": ("baseline-rtn", "rtn-identity"),
    "rtn-hadamard": ("baseline-rtn-hadamard", "rtn-hadamard"),
    "gptq-hadamard": ("baseline-gptq-hadamard", "gptq-hadamard-mse"),
    "gptq-wush": ("paper",),
    "default": ("default",),
}


def kl_of() -> tuple[dict[tuple[str, str], dict], list[str]]:
    """(format, method) -> the row of accuracy.py, and the files."""
    found, sources = {}, []
    for name in ("baselines_h200", "accuracy_h200"):
        measured = result(name)
        if measured is None:
            continue
        sources.append(f"{name}.json")
        for format in ("nvfp4", "mxfp4"):
            for method in METHODS:
                for row in KL_ROWS.get(method, (f"baseline-{method}",)):
                    key = f"{format} {row}"
                    if key in measured["rows"] and "error" not in measured["rows"][key]:
                        found.setdefault((format, method), measured["rows"][key])
    return found, sources


def table4() -> Shown:
    """KL divergence to the unquantized model."""
    found, sources = kl_of()
    rows = []
    for format in ("nvfp4", "mxfp4"):
        base, theirs = found[format, "gptq-hadamard"]["kl"], published.KL[format]
        for method, facts in METHODS.items():
            if (format, method) not in found:
                continue
            row = found[format, method]
            paper = theirs[method] / theirs["gptq-hadamard"] if method in theirs else None
            rows.append([format.upper(), facts.title, row["kl"], row["perplexity"], row["kl"] / base, paper])
    return Shown(
        "Table 4: KL divergence to the unquantized model",
        ["format", "method", "KL", "perplexity", "KL / MR-GPTQ's", "the paper's, Qwen3-8B"],
        rows,
        sources,
        [f"{OTHER_MODEL}: of its KL only the ratio to MR-GPTQ stands beside ours", "One seed"],
    )


def tables2_3() -> list[Shown]:
    """Tasks: one table for each file of task_table.py."""
    found = []
    for path in sorted(RESULTS.glob("tasks_*.json")):
        measured = json.loads(path.read_text())
        tasks = [s["task"] for scores in measured["runs"][task_table.REFERENCE]["tasks"].values() for s in scores]
        theirs = published.TASKS.get(measured["model"], {})
        rows = []
        for line in task_table.rows(measured["runs"]):
            title = METHODS[line["method"]].title if line["method"] in METHODS else "-"
            paper = theirs.get((line["format"], line["method"]))
            numbers = [line["average"], line["recovery"], line.get("spread"), line.get("seeds"), paper]
            rows.append([line["format"].upper(), title, *line["tasks"], *numbers])
        notes = [f"Calibrated on {measured['calibration']}; items of a task: {measured['limit'] or 'all'}"]
        if any(line.get("seeds") == 1 for line in task_table.rows(measured["runs"])):
            notes.append("Of a row with one seed, ± is half the paired 95 % interval")
        if not theirs:
            notes.append(f"The model is {measured['model']}, which the paper does not measure")
        columns = ["format", "method", *tasks, "average", "recovery %", "±", "seeds", "paper's recovery %"]
        found.append(Shown(f"Tables 2 and 3: tasks, {measured['model']}", columns, rows, [path.name], notes))
    return found or [missing("Tables 2 and 3: tasks", "python paper/task_table.py MODEL --calibration TEXT --out FILE")]


def table5() -> Shown:
    """Calibration sets."""
    measured = result("calibration_sets_h200")
    if measured is None:
        return missing("Table 5: calibration sets", "python paper/calibration_sets.py --data FOLDER --out FILE")
    rows = [[*key.split(", "), row["kl"], row["perplexity"]] for key, row in measured["rows"].items()]
    notes = [
        f"{OTHER_MODEL}, and its table has averages of tasks (of GPTQ {published.CALIBRATION['GPTQ']['FineWeb'][0]} on "
        f"FineWeb and {published.CALIBRATION['GPTQ']['C4'][0]} on C4): nothing of it stands beside",
        "MXFP4; the test text is of the first set's kind",
    ]
    return Shown(
        "Table 5: calibration sets",
        ["solver", "set", "KL", "perplexity"],
        rows,
        ["calibration_sets_h200.json"],
        notes,
    )


def table6() -> Shown:
    """Time and memory."""
    rows = []
    for name in ("quantize_model_h200", "quantize_model_h200_x2"):
        for run in result(name)["runs"]:
            if run["layers"] != run["all_layers"]:
                continue  # of a few layers: a projection
            gpus = "H200" if run["processes"] == 1 else f"{run['processes']} × H200"
            rows.append(
                [run["model"], run["solver"], gpus, run["tokens"], run["seconds"] / 60, run["peak_allocated"] / 1e9]
            )
    for model, (gpu, minutes, memory) in published.COST.items():
        rows.append([f"the paper: {model}", "rtn", gpu, None, minutes, memory])
    notes = [
        "Ours: the shapes of Llama-3.1-8B with random weights, MXFP4, whole runs; memory is what PyTorch held",
        "The paper's are with RTN on its own number of tokens, on other GPUs: no speed-up follows",
    ]
    columns = ["model", "solver", "GPUs", "tokens", "minutes", "GB"]
    sources = ["quantize_model_h200.json", "quantize_model_h200_x2.json"]
    return Shown("Table 6: time and memory of quantization", columns, rows, sources, notes)


# Dimensions: hidden, intermediate, query channels, key channels, layers, vocabulary, tied head.
SHAPES = {
    "Llama-3.2-3B-Instruct": (3072, 8192, 3072, 1024, 28, 128256, True),
    "Llama-3.1-8B-Instruct": (4096, 14336, 4096, 1024, 32, 128256, False),
    "Qwen3-8B": (4096, 12288, 4096, 1024, 36, 151936, False),
    "Qwen3-14B": (5120, 17408, 5120, 1024, 40, 151936, False),
    "Qwen3-32B": (5120, 25600, 8192, 1024, 64, 151936, False),
}


def storage(shape: tuple, group: int, shared: bool) -> float:
    """Bytes of transforms (16 bits, blocks of a group) over bytes of the whole checkpoint without them, in percent.

    Weights have 4 bits and a scale of 8 bits a group, embeddings 16. `shared`: one transform for q, k, v and one for
    gate, up, as here by default; else one a linear, as in the paper.
    """
    hidden, wide, query, key, layers, vocabulary, tied = shape
    linears = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (wide, hidden), (wide, hidden)]
    linears.append((hidden, wide))
    inputs = [hidden, query, hidden, wide] if shared else [k for _, k in linears]
    weights = layers * sum(n * k for n, k in linears) * (0.5 + 1 / group)
    embeddings = vocabulary * hidden * 2 * (1 if tied else 2)
    return 100 * layers * sum(inputs) * group * 2 / (weights + embeddings)


def table7() -> Shown:
    """Storage of transforms."""
    rows = []
    for model, theirs in published.STORAGE.items():
        cells = [storage(SHAPES[model], group, shared) for shared in (True, False) for group in (32, 16)]
        rows.append([model, *(f"{v:.2f}" for v in cells), *(f"{v:.1f}" for v in theirs)])
    columns = ["model", "MXFP4 %", "NVFP4 %", "a transform a linear, MXFP4 %", "NVFP4 %", "paper's MXFP4 %", "NVFP4 %"]
    notes = ["Computed from the models' dimensions, which are the paper's; norms are left out"]
    return Shown("Table 7: storage of the transforms", columns, rows, ["paper/tables.py, `storage`"], notes)


def all_tables() -> dict[str, Shown]:
    tasks = tables2_3()
    names = {"table2_3" if i == 0 else f"table2_3_{i}": table for i, table in enumerate(tasks)}
    return {"table1": table1(), **names, "table4": table4(), "table5": table5(), "table6": table6(), "table7": table7()}
