"""Grading of PlatinumBench (Vendrow et al., 2025), for the harness: which items count, and what is a right answer.

A model ends with `Answer: …`, or with \\boxed{…}, or its last line is the answer. What the answer is, and whether it is
right, follows the benchmark's own rules by its field `platinum_parsing_strategy`. The harness loads this file by path:
it imports nothing of the package.
"""

import re

BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^\\{}]+)\}")
NUMBER = re.compile(r"-?[0-9.]*[0-9]")


def kept(dataset):
    """Without the questions that the benchmark's review rejected."""
    return dataset.filter(lambda item: item["cleaning_status"] != "rejected")


def _answer(output: str) -> str:
    """The answer of a response as `answer: …`, in lower case unless it comes from a box alone."""
    if "answer:" in output.lower().replace("*", ""):
        box = BOXED.search(output.lower().split("answer: ")[-1])
        return output if box is None else f"answer: {box.group(1)}"
    box = BOXED.search(output)
    return f"answer: {box.group(1) if box else output.strip(chr(10)).split(chr(10))[-1].lower()}"


def _without(text: str, characters: str) -> str:
    return text.translate({ord(c): None for c in characters})


def _last(text: str) -> str:
    return text.lower().split("answer: ")[-1]


def _text(output: str) -> str:
    line = _last(_without(output, '#*"').replace("\xa0", " ")).split("\n")[0]
    return _without(line, ",.").split("}")[0].strip()


def parse(output: str, strategy: str) -> str | None:
    """The answer that a response gives, or None if it gives none."""
    output = _answer(output)
    if strategy == "math":
        found = NUMBER.search(_without(_last(_without(output, "*#")), ","))
        return None if found is None else re.sub(r"\.0+$", "", found.group())
    if strategy == "multiple_choice":
        return _without(_last(_without(output, "*")), ".").strip()[:1]
    if strategy == "bbh_multiple_choice":
        found = re.search(r"\([a-z]\)", _without(_last(_without(output, "*#")), ".'\""))
        return None if found is None else found.group()
    if strategy == "squad":
        return "n/a" if _text(output).startswith("n/a ") else _text(output)
    if strategy == "text":
        return _text(output)
    raise ValueError(f"PlatinumBench has a parsing strategy {strategy!r} that is not known here")


def right(prediction: str | None, targets: list[str], numeric: bool) -> bool:
    if prediction is None:
        return False
    if not numeric:
        return prediction in targets
    try:
        return float(prediction) == float(targets[0])
    except ValueError:
        return False


def score(item: dict, results: list[str], numeric: bool = False) -> dict[str, float]:
    prediction = parse(results[0], item["platinum_parsing_strategy"])
    return {"exact_match": float(right(prediction, item["platinum_target"], numeric))}


def score_number(item: dict, results: list[str]) -> dict[str, float]:
    return score(item, results, numeric=True)
