"""Speed of quantizers, moments and calibration."""

from .common import figure, percent, result, shown, table


def shape(row: dict) -> str:
    return f"{row['M']} × {row['K']}"


@figure
def quantizer(name: str) -> str:
    kinds = ("blocks absmax", "blocks mse", "blocks feedback")
    columns = [("mxfp4", "none absmax"), *(("mxfp4", kind) for kind in kinds), *(("nvfp4", kind) for kind in kinds)]
    lines: dict[str, list[str]] = {}
    for row in result(name)["rows"]:
        for format, column in columns:
            if row["format"] == format:
                share = f" ({percent(row[f'{column} share'])})" if row["M"] >= 4096 else ""
                lines.setdefault(shape(row), []).append(f"{shown(row[f'{column} us'], 1)} µs{share}")
    titles = ["none, MXFP4", *(f"{f} {what}" for f in ("MXFP4", "NVFP4") for what in ("`absmax`", "`mse`", "feedback"))]
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
