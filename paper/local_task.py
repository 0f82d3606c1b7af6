"""Makes a local task of lm-eval from a text: which of four continuations is the paragraph's own?

    python paper/local_task.py --data FOLDER --out tasks
    python paper/task_table.py MODEL --tasks continuation --task-dir tasks --calibration TEXT --out results.json

FOLDER holds test.txt of WikiText-2 raw. An item is a paragraph's first 40 words; the choices are its next 12 words and
those at the same place of three other paragraphs. It needs no hub, and a small model is far above chance.
"""

import argparse
import json
import random
from pathlib import Path

CONTEXT, CHOICE, CHOICES = 40, 12, 4
TASK = """task: continuation
dataset_path: json
dataset_kwargs: {data_files: {test: continuation.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def items(text: str, seed: int = 0) -> list[dict]:
    """Items in a random order that the seed fixes; the right choice is at a random place."""
    paragraphs = [line.split() for line in text.split("\n") if not line.strip().startswith("=")]
    paragraphs = [words for words in paragraphs if len(words) >= CONTEXT + CHOICE]
    draw = random.Random(seed)
    draw.shuffle(paragraphs)
    parts = [(" ".join(p[:CONTEXT]), " ".join(p[CONTEXT : CONTEXT + CHOICE])) for p in paragraphs]
    found = []
    for i, (context, right) in enumerate(parts):
        others = draw.sample([j for j in range(len(parts)) if j != i], CHOICES - 1)
        choices = [right, *(parts[j][1] for j in others)]
        order = draw.sample(range(CHOICES), CHOICES)
        found.append({"context": context, "choices": [choices[k] for k in order], "answer": order.index(0)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = items((args.data / "test.txt").read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "continuation.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n", encoding="utf-8")
    (args.out / "continuation.yaml").write_text(TASK)
    print(f"{len(found)} items in {args.out}")


if __name__ == "__main__":
    main()
