"""Layers of mixtures of experts against `torch._grouped_mm` in bf16, for `kernel_speed.py grouped` and `tune-grouped`.

A layer here begins with tokens and their routing and ends with the weighted sum over each token's experts; the router
and the sort of its choices, the same on both sides, are left out.

    bf16     rows gathered, gate-up, SiLU(gate) · up, down, sum over experts
    4 bits   tokens transformed and quantized, gate-up with an index of rows, SiLU(gate) · up transformed and quantized,
             down, sum over experts

Inductor compiles the elementwise parts of both. The router's logits are random, with a bias for each expert, so some
experts get several times the rows of others. Every call of a graph has another routing, so that weights of few experts
do not stay in L2.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from wush_compile.diagnostics.timing import copies, time_us
from wush_compile.formats import FORMATS
from wush_compile.kernels.triton.grouped import upcast
from wush_compile.kernels.triton.grouped.choose import Gemm, Hopper, choose
from wush_compile.kernels.triton.grouped.fp4_grouped_linear import fp4_grouped_linear
from wush_compile.kernels.triton.linear.choose import Gemv
from wush_compile.kernels.triton.linear.upcast import upcast_fp8


class Layer(NamedTuple):
    """Experts; experts a token; width of the model and of an expert."""

    experts: int
    chosen: int
    hidden: int
    inner: int


LAYERS = {"Qwen3-30B-A3B": Layer(128, 8, 2048, 768), "gpt-oss-20b": Layer(32, 4, 2880, 2880)}
TOKENS = (1, 8, 32, 128, 4096, 16384)
SKEW = 0.5  # standard deviation of the experts' biases, where that of a token's own logits is 1
DEVICE = "cuda"
EXPERT_BYTES = 0.53  # of a 4-bit weight


class Routing(NamedTuple):
    """Rows sorted by expert."""

    token: Tensor  # int64 [S], of each row
    offs: Tensor  # int32 [E]
    place: Tensor  # int64 [T, chosen], where the rows of each token are
    weights: Tensor  # bf16 [T, chosen]


def routing(layer: Layer, tokens: int, seed: int) -> Routing:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    noise = [
        torch.randn(*shape, device=DEVICE, generator=generator) for shape in ((tokens, layer.experts), (layer.experts,))
    ]
    top = (noise[0] + SKEW * noise[1]).topk(layer.chosen)
    order = top.indices.flatten().argsort(stable=True)
    counts = torch.bincount(top.indices.flatten(), minlength=layer.experts)
    return Routing(
        order // layer.chosen,
        counts.cumsum(0, dtype=torch.int32),
        order.argsort().view(tokens, -1),
        top.values.softmax(-1).bfloat16(),
    )


def routings(layer: Layer, tokens: int) -> list[Routing]:
    """So many that the experts of one are out of L2 at its next turn."""
    used = min(layer.experts, tokens * layer.chosen)
    count = copies(used * 3 * layer.hidden * layer.inner * EXPERT_BYTES, 16)
    return [routing(layer, tokens, seed) for seed in range(count)]


@torch.compile(dynamic=True)
def silu_mul(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


@torch.compile(dynamic=True)
def combine(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over each token's experts, y [S, hidden] -> [T, hidden]. Expert by expert: of a sum over a
    dimension Inductor makes a reduction of a handful of values, which took ten times as long as its bytes need."""
    return sum((y[place[:, i]] * weights[:, i, None]).float() for i in range(place.shape[1])).to(y.dtype)


def bf16_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    shapes = (2 * layer.inner, layer.hidden), (layer.hidden, layer.inner)
    return tuple(torch.randn(layer.experts, *s, device=DEVICE, dtype=torch.bfloat16) / s[1] ** 0.5 for s in shapes)


def bf16_layer(x: Tensor, r: Routing, up: Tensor, down: Tensor) -> Tensor:
    h = torch._grouped_mm(x[r.token], up.transpose(1, 2), offs=r.offs)
    return combine(torch._grouped_mm(silu_mul(h), down.transpose(1, 2), offs=r.offs), r.place, r.weights)


class Weights(NamedTuple):
    """A layer in 4 bits: (codes, scales, transform) of gate-up and of down, and the global scales of a format."""

    up: tuple[Tensor, Tensor, Tensor]
    down: tuple[Tensor, Tensor, Tensor]
    g: Tensor | None
    gw: Tensor | None
    format: str


def packed_weights(layer: Layer, format: str) -> Weights:
    def weight(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(0, 256, (layer.experts, n, k // 2), dtype=torch.uint8, device=DEVICE)
        low, high = (115, 122) if format == "mxfp4" else (40, 60)
        size = FORMATS[format].group_size
        scales = torch.randint(low, high, (layer.experts, n, k // size), dtype=torch.uint8, device=DEVICE)
        return codes, scales, (torch.randn(k // size, size, size, device=DEVICE) / size**0.5).bfloat16()

    g = torch.ones(1, device=DEVICE) if format == "nvfp4" else None
    gw = torch.ones(layer.experts, device=DEVICE) if format == "nvfp4" else None
    return Weights(weight(2 * layer.inner, layer.hidden), weight(layer.hidden, layer.inner), g, gw, format)


TUNED: dict[tuple, object] = {}  # (format, N, K, tokens) -> the fastest tile of a `tune-grouped` of this run


def product(w: Weights, which: str, codes: Tensor, scales: Tensor, r: Routing) -> Tensor:
    """Rows times the weights of gate-up (of tokens, by an index) or of down."""
    weight, index = (w.up, r.token) if which == "gate-up" else (w.down, None)
    tile = TUNED.get((w.format, weight[0].shape[1], 2 * weight[0].shape[2], r.weights.shape[0]))
    args = (codes, scales, w.g, *weight[:2], w.gw, r.offs, None, w.format, torch.bfloat16)
    if tile is None:
        return torch.ops.wush.fp4_grouped_linear(*args, index=index)
    return fp4_grouped_linear(*args, index=index, kernel=tile)


def parts(x: Tensor, r: Routing, w: Weights) -> dict[str, Callable[[], object]]:
    """The steps of a layer in 4 bits, each as a call on the results of the steps before."""
    inner, wush, done = w.down[0].shape[2] * 2, torch.ops.wush, {}

    def keep(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run():
            done[name] = call()
            return done[name]

        return run

    steps = {
        "quantize": lambda: wush.transform_quantize(x, w.up[2], w.g, w.format, "absmax"),
        "gate-up": lambda: product(w, "gate-up", *done["quantize"], r),
        "activation": lambda: wush.silu_mul_transform_quantize(
            done["gate-up"][:, :inner], done["gate-up"][:, inner:], w.down[2], w.g, w.format, "absmax"
        ),
        "down": lambda: product(w, "down", *done["activation"], r),
        "sum": lambda: combine(done["down"], r.place, r.weights),
    }
    return {name: keep(name, call) for name, call in steps.items()}


def packed_layer(x: Tensor, r: Routing, w: Weights) -> Tensor:
    result = None
    for step in parts(x, r, w).values():
        result = step()
    return result


def layer_us(call: Callable[[Routing], object], all_routings: list[Routing], tokens: int) -> float:
    return time_us([lambda r=r: call(r) for r in all_routings], least=8 if tokens <= 512 else 2)


def bench_layer(name: str, tokens: tuple[int, ...]) -> list[dict]:
    layer, rows = LAYERS[name], []
    wide = bf16_weights(layer)
    packed = {format: packed_weights(layer, format) for format in ("mxfp4", "nvfp4")}
    for count in tokens:
        x = torch.randn(count, layer.hidden, device=DEVICE).bfloat16()
        all_routings = routings(layer, count)
        row = {"layer": name, "tokens": count, "rows an expert": count * layer.chosen / layer.experts}
        row["bf16 us"] = layer_us(lambda r: bf16_layer(x, r, *wide), all_routings, count)
        for format, weights in packed.items():
            row[f"{format} us"] = layer_us(lambda r: packed_layer(x, r, weights), all_routings, count)
            row[f"{format} speed-up"] = row["bf16 us"] / row[f"{format} us"]
        steps = [parts(x, r, packed["mxfp4"]) for r in all_routings]
        for each in steps:
            for step in each.values():
                step()
        for step in steps[0]:
            row[f"{step} us"] = time_us([each[step] for each in steps], least=8 if count <= 512 else 2)
        print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        rows.append(row)
        del steps
        torch.cuda.empty_cache()
    return rows


def bench_grouped(compile_all: Callable, tokens: tuple[int, ...] = TOKENS) -> list[dict]:
    """Microseconds of whole layers, and of the steps of the layer in MXFP4."""
    every = [(format, count, name) for format in ("mxfp4", "nvfp4") for count in tokens for name in LAYERS]
    jobs = []
    for format, count, name in every:
        layer = LAYERS[name]
        for n, k in shapes(layer).values():
            rows = count * layer.chosen
            tile = TUNED.get((format, n, k, count)) or choose(format, "same", rows, layer.experts, n, k)
            jobs.append((format, layer.experts, n, k, tile))
    compile_all(jobs, compile_tile)
    return [row for name in LAYERS for row in bench_layer(name, tokens)]


# -- rows to fp8 -------------------------------------------------------------------------------------------------------

UPCAST_TILES = ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (16, 1))  # rows of a program, warps
# (rows, K, tokens that they are copies of, or None)
UPCAST_SHAPES = (
    (131072, 2048, 16384),
    (131072, 768, None),
    (32768, 2048, 4096),
    (32768, 768, None),
    (65536, 2880, None),
    (1024, 2048, 128),
)


def bench_upcast() -> list[dict]:
    """Microseconds of the expansion of rows to fp8: a program a row, and several rows a program."""
    found = []
    for rows, k, tokens in UPCAST_SHAPES:
        codes = torch.randint(0, 256, (tokens or rows, k // 2), dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(110, 125, (tokens or rows, k // 32), dtype=torch.uint8, device=DEVICE)
        index = None if tokens is None else torch.randint(0, tokens, (rows,), device=DEVICE)
        one = time_us([lambda: upcast_fp8(codes, scales, None, False, True, index)])
        line = {"rows": rows, "K": k, "tokens": tokens, "one row a program us": one}
        for tile in UPCAST_TILES:
            with mock.patch.multiple(upcast, ROWS=tile[0], WARPS=tile[1]):
                line[f"{tile[0]} rows, {tile[1]} warps us"] = time_us(
                    [lambda: upcast.upcast_many(codes, scales, None, index)]
                )
        found.append(line)
    return found


# -- humming ---------------------------------------------------------------------------------------------------------

PEERS = {"humming W4A8": "float8e4m3", "humming W4A16": None}
PEER_TOKENS = (1, 8, 128, 4096)


def humming_layer(
    layer: Layer, activation: str | None, up: Tensor, down: Tensor
) -> Callable[[Tensor, Routing], Tensor]:
    """The layer by humming-kernels: MXFP4 weights, activations in fp8, quantized by its own kernel, or in bf16. Its
    products take rows that are gathered already."""
    from humming.layer import HummingLayer

    def experts_of(weight: Tensor) -> HummingLayer:
        made = HummingLayer(
            shape_n=weight.shape[1],
            shape_k=weight.shape[2],
            num_experts=layer.experts,
            weight_config={"dtype": "float4e2m1", "scale_dtype": "float8e8m0", "group_size": 32},
            input_config={"dtype": activation} if activation else None,
            torch_dtype=torch.bfloat16,
        ).to(DEVICE)
        made.load_from_unquantized(weight)
        made.transform()
        return made

    first, second = experts_of(up), experts_of(down)
    config = {"gemm_type": "grouped_contiguous"}

    def run(x: Tensor, r: Routing) -> Tensor:
        layout = torch.nn.functional.pad(r.offs, (1, 0)).long()
        h = silu_mul(first(x[r.token], expert_layout=layout, compute_config=config))
        return combine(second(h, expert_layout=layout, compute_config=config), r.place, r.weights)

    return run


def warm_humming(job: tuple[str, str, int]) -> str | None:
    """Compiles what humming needs for a layer and a number of tokens, in a process of its own."""
    name, peer, tokens = job
    try:
        layer = LAYERS[name]
        run = humming_layer(layer, PEERS[peer], *bf16_weights(layer))
        run(torch.randn(tokens, layer.hidden, device=DEVICE).bfloat16(), routing(layer, tokens, 0))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {type(error).__name__}: {str(error)[:300]}"


def bench_peers(compile_all: Callable, tokens: tuple[int, ...] = PEER_TOKENS) -> list[dict]:
    """Microseconds of the first layer in bf16, in MXFP4 and by humming-kernels."""
    name, layer = next(iter(LAYERS.items()))
    compile_all([(name, peer, count) for peer in PEERS for count in tokens], warm_humming)
    wide, packed = bf16_weights(layer), packed_weights(layer, "mxfp4")
    rows = [{"layer": name, "tokens": count} for count in tokens]
    inputs = [(torch.randn(count, layer.hidden, device=DEVICE).bfloat16(), routings(layer, count)) for count in tokens]
    for row, (x, all_routings) in zip(rows, inputs):
        row["bf16 us"] = layer_us(lambda r: bf16_layer(x, r, *wide), all_routings, row["tokens"])
        row["mxfp4 us"] = layer_us(lambda r: packed_layer(x, r, packed), all_routings, row["tokens"])
    for peer, activation in PEERS.items():
        try:
            run = humming_layer(layer, activation, *wide)
            for row, (x, all_routings) in zip(rows, inputs):
                got, want = run(x, all_routings[0]), bf16_layer(x, all_routings[0], *wide)
                error = ((got - want).norm() / want.norm()).item()
                if not error < 0.35:  # 4-bit weights: 0.2
                    raise ArithmeticError(f"relative error {error:.2g} at {row['tokens']} tokens")
                row[f"{peer} us"] = layer_us(lambda r: run(x, r), all_routings, row["tokens"])
                print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        except Exception as error:  # a library that is missing or fails is a result
            print(f"no column for {peer}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return rows


# -- tune ------------------------------------------------------------------------------------------------------------

TUNED_TOKENS = TOKENS


def candidates(format: str, rows: int, experts: int) -> list:
    """Tiles worth timing for so many rows."""
    average, mx = rows / experts, format == "mxfp4"
    found = [Gemv(8, 2048, 4), Gemv(16, 1024, 4)] if rows <= 64 else []
    if average <= 24:
        found += [Gemm(64, 16, 256, 4, 4 if mx else 3), Gemm(64, 16, 128, 4, 4)]
        found += [Hopper(128, 16, 6, 3), Hopper(128, 16, 10 if mx else 8, 2)]
    if 4 < average <= 96:
        found += [Gemm(64, 32, 128, 4, 4), Hopper(128, 32, 8 if mx else 5, 2)]
    if average > 12:
        found += [Hopper(128, 64, 6 if mx else 4, 2)]
    if average > 96:
        found += [Hopper(128, 128, 6 if mx else 4, 1), Hopper(128, 256, 4 if mx else 3, 1)]
    return found


def compile_tile(job: tuple) -> str | None:
    """Runs a tile in a process of its own, which puts its kernel into Triton's cache. Returns why it failed."""
    format, experts, n, k, tile = job
    try:
        layer = Layer(experts, 1, k, n)
        r = routing(layer, 64, 0)
        size = FORMATS[format].group_size
        codes, w = (torch.zeros(*s, k // 2, dtype=torch.uint8, device=DEVICE) for s in ((64,), (experts, n)))
        scales, ws = (torch.ones(*s, k // size, dtype=torch.uint8, device=DEVICE) for s in ((64,), (experts, n)))
        g = torch.ones(1, device=DEVICE) if format == "nvfp4" else None
        gw = torch.ones(experts, device=DEVICE) if format == "nvfp4" else None
        for index in (r.token, None):
            fp4_grouped_linear(
                codes, scales, g, w, ws, gw, r.offs, None, format, torch.bfloat16, index=index, kernel=tile
            )
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return f"{job}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def shapes(layer: Layer) -> dict[str, tuple[int, int]]:
    """(N, K) of a layer's products."""
    return {"gate-up": (2 * layer.inner, layer.hidden), "down": (layer.hidden, layer.inner)}


def tune_grouped(
    compile_all: Callable, tokens: tuple[int, ...] = TUNED_TOKENS, kinds: tuple[str, ...] = ("mxfp4", "nvfp4")
) -> list[dict]:
    """Microseconds of each product of the layers with every candidate tile, the upcast of its rows included."""
    every = [
        (format, name, count, part, tile)
        for format, name, count in itertools.product(kinds, LAYERS, tokens)
        if format == "mxfp4" or name == next(iter(LAYERS))  # one layer is enough for the tiles of the slower format
        for part, (_, k) in shapes(LAYERS[name]).items()
        for tile in candidates(format, count * LAYERS[name].chosen, LAYERS[name].experts)
        if not isinstance(tile, Gemm) or -(-k // 128) * 128 % tile.block_k == 0
    ]
    jobs = {(f, LAYERS[name].experts, *shapes(LAYERS[name])[part], tile) for f, name, _, part, tile in every}
    failed = compile_all(sorted(jobs, key=repr), compile_tile)
    rows, weights = [], {}
    for (format, name, count, part), group in itertools.groupby(every, key=lambda case: case[:4]):
        layer = LAYERS[name]
        if (format, name) not in weights:
            weights = {(format, name): packed_weights(layer, format)}
        w = weights[format, name]
        (n, k), (codes, scales, _) = shapes(layer)[part], w.up if part == "gate-up" else w.down
        all_routings = routings(layer, count)
        sources = count if part == "gate-up" else count * layer.chosen
        x = torch.ops.wush.transform_quantize(
            torch.randn(sources, k, device=DEVICE).bfloat16(), None, w.g, format, "absmax"
        )

        def call(r: Routing, tile) -> Tensor:
            index = r.token if part == "gate-up" else None
            return fp4_grouped_linear(
                *x, w.g, codes, scales, w.gw, r.offs, None, format, torch.bfloat16, index=index, kernel=tile
            )

        timed, first, tiles = [], None, list(group)
        for *_, tile in tiles:
            if any(repr((format, layer.experts, n, k, tile)) in line for line in failed):
                continue
            y = call(all_routings[0], tile).float()
            first = y if first is None else first
            error = ((y - first).norm() / first.norm()).item()
            if not error < 4e-3:
                print(f"WRONG {format} {name} {part} {count} {tile}: {error:.3g}", flush=True)
            timed.append((layer_us(lambda r: call(r, tile), all_routings, count), repr(tile)))
        timed.sort()
        TUNED[format, n, k, count] = next(tile for *_, tile in tiles if repr(tile) == timed[0][1])
        average = count * layer.chosen / layer.experts
        rows.append({"format": format, "layer": name, "part": part, "tokens": count, "N": n, "K": k, "all": timed})
        best = "  ".join(f"{us:.1f} {tile}" for us, tile in timed[:5])
        print(f"{format} {name[:4]} {part} {count} ({average:.1f} an expert) | {best}", flush=True)
    return rows
