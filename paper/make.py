"""`make paper`: the paper's tables and figures from benchmarks/results, as JSON, SVG and one page of Markdown.

    python paper/make.py [--out build/paper]

Nothing is measured here. Each table says which results it is from, and each result names its own command and device.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import tables  # first: it makes benchmarks/ importable
from plots import FIGURES, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/paper"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    page = ["# The paper's tables and figures, measured with wush_compile", ""]
    for name, table in tables.all_tables().items():
        (out / f"{name}.json").write_text(json.dumps(asdict(table), indent=1) + "\n")
        page.append(table.markdown())
    for name, (title, data) in FIGURES.items():
        found = data()
        page += [f"## {title}", ""]
        if found is None:
            page += ["Not measured here; paper/README.md has the command.", ""]
            continue
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(name, found, out / f"{name}.svg")
        page += [f"![{title}]({name}.svg)", "", *([found["note"] + "."] if "note" in found else []), ""]
    (out / "report.md").write_text("\n".join(page))
    print(f"written to {out}: report.md and {len(list(out.glob('*.json')))} results")


if __name__ == "__main__":
    main()
