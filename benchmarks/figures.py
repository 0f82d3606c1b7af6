"""Writes the tables and numbers of README.md and docs/ that report a measurement, from benchmarks/results/*.json.

    python benchmarks/figures.py            rewrites what differs, and draws docs/notebook/speedup.svg
    python benchmarks/figures.py --check    changes nothing; prints a diff and exits 1 if something differs

A document names a figure in a comment, and the text up to the closing comment is written from the results:

    <!-- figures: linear_summary linear_h200 rows=1,16,64 -->         a renderer of figure_tables/ and its arguments
    | rows | 1 | 16 | 64 |  ...
    <!-- /figures -->
    bf16: <!-- figures: number accuracy_h200 reference_perplexity 2 -->20.81<!-- /figures -->.
"""

import argparse
import difflib
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

from figure_tables import FIGURES, layers_of, result

ROOT = Path(__file__).resolve().parent.parent
PLOT = Path("docs/notebook/speedup.svg")
MARKER = re.compile(r"(<!-- figures: (.+?) -->)(.*?)(<!-- /figures -->)", re.DOTALL)


# -- the plot --------------------------------------------------------------------------------------------------------


def plot_data() -> dict:
    rows = layers_of("linear_h200")
    gains = {
        format: [round(r["bf16 us"] / r[f"{format} us"], 4) for r in rows.values()] for format in ("mxfp4", "nvfp4")
    }
    return {"device": result("linear_h200")["device"], "rows": list(rows), **gains}


def digest() -> str:
    """Stands in the plot's description: a plot of other data is found without drawing it."""
    return "linear_h200 " + hashlib.sha256(json.dumps(plot_data()).encode()).hexdigest()[:16]


def draw(path: Path) -> None:
    """Speed-up of a whole layer over bf16 against the number of rows. The same data give the same bytes."""
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{path} needs drawing: pip install matplotlib, or run make figures")
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "wush"
    import matplotlib.pyplot as plt

    data = plot_data()
    chart, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="bf16, cuBLAS")
    for format in ("mxfp4", "nvfp4"):
        axes.plot(data["rows"], data[format], marker="o", markersize=4, label=format.upper())
    axes.set_xscale("log", base=2)
    powers = [m for m in data["rows"] if m & (m - 1) == 0]
    axes.set_xticks(powers, powers)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of the activation")
    axes.set_ylabel("speed-up over bf16")
    axes.set_title(f"Linear layers of a Llama-3.1-8B decoder layer, {data['device']}", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    chart.savefig(path, metadata={"Date": None, "Creator": None, "Description": digest()})


# -- documents -------------------------------------------------------------------------------------------------------


def written(text: str) -> str:
    """A document with every figure in it rendered anew. ValueError names a marker that cannot be."""
    if text.count("<!-- figures: ") != len(MARKER.findall(text)):
        raise ValueError("a figures comment is not closed by <!-- /figures -->")

    def render(match: re.Match) -> str:
        opening, call, _, closing = match.groups()
        name, *arguments = shlex.split(call)
        named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if name not in FIGURES:
            raise ValueError(f"there is no figure {name!r}; there are {', '.join(sorted(FIGURES))}")
        content = FIGURES[name](*(argument for argument in arguments if "=" not in argument), **named)
        if "\n" in content:
            return f"{opening}\n\n{content}\n\n{closing}"
        if match.start() == 0 or text[match.start() - 1] == "\n":
            raise ValueError(f"the comment of {name} begins a line, where Markdown takes it for a block: move it back")
        return f"{opening}{content}{closing}"

    return MARKER.sub(render, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="print what differs and exit 1 instead of writing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that holds README.md and docs/")
    args = parser.parse_args(arguments)
    stale = 0
    for path in [args.root / "README.md", *sorted((args.root / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        try:
            new = written(text)
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path}: {error}")
        if new != text:
            stale += 1
            name = str(path.relative_to(args.root))
            lines = (text.splitlines(), new.splitlines(), name, f"{name} from the results")
            print("\n".join(difflib.unified_diff(*lines, lineterm="", n=0)))
            if not args.check:
                path.write_text(new, encoding="utf-8")
    plot = args.root / PLOT
    if not plot.exists() or digest() not in plot.read_text(encoding="utf-8"):
        stale += 1
        print(f"{PLOT} shows other data than linear_h200.json")
        if not args.check:
            draw(plot)
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
