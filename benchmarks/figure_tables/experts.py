"""Mixtures of experts: accuracy."""

from .common import figure, percent, result, shown, table


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
