"""Which architectures pass which column of the walk."""

from .common import figure, percent, result, table

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
