"""Speed of products and of whole models."""

from .common import figure, result, shown, table


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
def experts_peers(name: str) -> str:
    """A layer of experts beside humming-kernels, µs."""
    keys = ["bf16 us", "mxfp4 us", "humming W4A8 us"]
    lines = [[str(row["tokens"]), *(shown(row[key], 1) for key in keys)] for row in result(name)["rows"]]
    return table(["tokens", "bf16", "MXFP4 W4A4", "humming W4A8"], lines)


@figure
def experts_step(name: str, batch: str, layers: str) -> str:
    """Queued ms of a step with all layers, from the difference of the two sizes that were timed: MXFP4, bf16."""

    def whole(model: str) -> float:
        rows = [r for r in result(name)["rows"] if r["model"] == model and r["batch"] == int(batch)]
        (few, least), (many, most) = sorted((r["layers"], r["queued ms"]) for r in rows)
        return least + (most - least) / (many - few) * (int(layers) - few)

    bf16, ours = whole("bf16"), whole("mxfp4")
    return f"{shown(ours, 2)} ms ({shown(bf16 / ours, 2)}×)"


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


@figure
def served_decoding(name: str) -> str:
    """Tokens a second of a model and its bf16 original in vLLM, by the number of sequences."""
    found, lines = result(name), []
    for row in found["decode"]["rows"]:
        speeds = [shown(row["tokens a second"][model], 1) for model in ("bf16", found["format"])]
        lines.append([str(row["sequences"]), *speeds, shown(row["gain"][found["format"]], 2)])
    return table(["sequences", "bf16", found["format"].upper(), "ratio"], lines)
