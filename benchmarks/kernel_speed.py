"""Times the Triton products against cuBLAS in the same run: CUDA-graph replays, weights rotated out of L2.

    python benchmarks/kernel_speed.py linear parts --out results   the tables, as Markdown and JSON
    python benchmarks/kernel_speed.py tune-linear --out results    every candidate tile; `choose` rests on it
    python benchmarks/kernel_speed.py linear --activations fp8 none    with columns for W4A8 and W4A16
    python benchmarks/kernel_speed.py linear --tuned FILE          the table with each shape's best candidate of FILE
    python benchmarks/kernel_speed.py compare --out results        beside torchao and FP-Quant (comparisons.py)
    python benchmarks/kernel_speed.py tune-grouped grouped        layers of experts (grouped_speed.py), tiles as found
    python benchmarks/kernel_speed.py grouped-peers                one of them beside humming-kernels
    python benchmarks/kernel_speed.py grouped-upcast               the expansion of experts' rows to fp8

Speed-ups are over bf16 `F.linear` on the same shapes. The 4-bit side includes the transform and the quantization of its
input. The shapes are the linear groups of one Llama-3.1-8B decoder layer.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import subprocess
import time

import common
import grouped_speed
import torch
from common import read_tuning

from wush_compile import feedback
from wush_compile.diagnostics.timing import copies, time_us
from wush_compile.formats import FORMATS
from wush_compile.kernels.triton.linear import choose as triton_choose
from wush_compile.kernels.triton.linear import fp4_linear as triton_linear
from wush_compile.kernels.triton.linear.choose import Fused, Gemv, Hopper
from wush_compile.kernels.triton.linear.upcast import upcast_fp8
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.kernels.triton.quantize.tokens import quantize_tokens

GROUPS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # name: (N, K)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)


def environment() -> dict:
    """The head of a result, with the clocks and the driver."""
    query = "clocks.sm,clocks.mem,power.draw,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    smi = subprocess.run(command, capture_output=True, text=True)
    head = common.environment(torch.device("cuda"))
    return {**head, "cuda": torch.version.cuda, query: smi.stdout.strip().splitlines()[:1]}


def random_weight(n: int, k: int, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    low, high = (115, 122) if format == "mxfp4" else (40, 60)
    return codes, torch.randint(low, high, (n, k // FORMATS[format].group_size), dtype=torch.uint8, device="cuda")


def random_transform(k: int, block: int) -> torch.Tensor:
    return (torch.randn(k // block, block, block, device="cuda") / block**0.5).bfloat16()


@functools.cache
def random_feedback(k: int, format: str) -> torch.Tensor:
    return (torch.rand(feedback.shape(format, k), device="cuda") * 0.3).bfloat16()


def factors(format: str, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(g of activations, g of a weight of n rows) as a model with the default settings has them."""
    one = torch.ones(1, device="cuda")
    if format == "mxfp4":
        return None, (1 + torch.rand(n, device="cuda")).bfloat16()
    return (one, one) if format == "nvfp4" else (None, None)


# -- linear ----------------------------------------------------------------------------------------------------------


def weight_sets(format: str, n: int, k: int) -> list[tuple]:
    return [
        (*random_weight(n, k, format), random_transform(k, FORMATS[format].group_size))
        for _ in range(copies(n * k * 0.55))
    ]


def in_lanes(x: torch.Tensor, format: str, activation: str) -> bool:
    """Whether a compiled graph has the activation in the layout `lanes` (`lay_out_scales`)."""
    return triton_linear.refuses_lanes(format, activation, x, x.shape[-1]) is None


def quantized(x: torch.Tensor, t: torch.Tensor, g: torch.Tensor | None, format: str, activation: str) -> tuple:
    """x as a model with the default settings quantizes it: 4 bits by the rule `mse`, with feedback."""
    lanes = in_lanes(x, format, activation)
    f = random_feedback(x.shape[-1], format) if activation == "same" else None
    if activation == "same" and not lanes:
        return triton_quantize.transform_quantize(x, t, g, format, "mse", feedback=f)
    if activation == "same":  # NVFP4
        return quantize_tokens(x, t, format, lanes=True, global_scale=g, rule="mse", feedback=f)
    return quantize_tokens(x, t, activation, lanes=lanes)


def linear_time(
    format: str, m: int, n: int, k: int, kernel=None, quantize: bool = True, sets=None, activation: str = "same"
) -> float:
    """One group: transform, quantization (unless left out), product."""
    g, gw = factors(format, n)
    g = g if activation == "same" else None
    sets = sets or weight_sets(format, n, k)
    x = torch.randn(m, k, device="cuda").bfloat16()
    ready = quantized(x, sets[0][2], g, format, activation)

    def call(w, s, t):
        q = quantized(x, t, g, format, activation) if quantize else ready
        options = dict(activation_format=activation, lanes=in_lanes(x, format, activation))
        return triton_linear.fp4_linear(*q, g, w, s, gw, None, None, format, torch.bfloat16, kernel, **options)

    return time_us([lambda a=a: call(*a) for a in sets], least=10 if m <= 1024 else 4)


def bf16_time(m: int, n: int, k: int) -> float:
    ws = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies(2 * n * k))]
    x = torch.randn(m, k, device="cuda").bfloat16()
    return time_us([lambda w=w: torch.nn.functional.linear(x, w) for w in ws], least=10 if m <= 1024 else 4)


def fp8_time(m: int, n: int, k: int) -> float:
    """cuBLASLt fp8 with operands that are fp8 already: the ceiling of any product in fp8."""
    ws = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies(n * k))]
    x = torch.randn(m, k, device="cuda").to(torch.float8_e5m2)
    a, b = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    calls = [lambda w=w: torch._scaled_mm(x, w.t(), a, b, out_dtype=torch.bfloat16, use_fast_accum=True) for w in ws]
    return time_us(calls, least=10 if m <= 1024 else 4)


def _to_compile(kernel, m: int) -> tuple:
    """(rows, kernel) that compile to the same machine code as m rows and this kernel."""
    if isinstance(kernel, Hopper):
        return kernel.block_m, kernel._replace(split_k=min(kernel.split_k, 2))
    return kernel.block_m if isinstance(kernel, Fused) else m, kernel


def _job(format: str, m: int, n: int, k: int, kernel, activation: str = "same") -> tuple:
    rows, kernel = _to_compile(kernel, m)
    return format, rows, n, k, kernel, activation


TUNED: dict = {}  # (format, N, K) -> {rows: kernel}, from an earlier `tune-linear`


def read_tuned(path: pathlib.Path) -> None:
    for (format, rows, n, k), all in read_tuning(path).items():
        TUNED.setdefault((format, n, k), {})[rows] = min(all, key=all.get)


def tuned(format: str, m: int, n: int, k: int):
    known = TUNED.get((format, n, k))
    if not known:
        return None
    above = [r for r in sorted(known) if r >= m]
    kernel = known[above[0]] if above else "library" if format == "mxfp4" else "bf16"
    return kernel if not isinstance(kernel, Gemv) or m in (1, 2, 4) else known[above[1]]


def _decoding(format: str, activation: str, m: int, n: int, k: int):
    """The kernel that `fp4_linear` takes for activations of 8 or 16 bits, where the weight fits e4m3."""
    decoded = triton_choose.decoded_format(format, activation, torch.cuda.get_device_capability())
    library = decoded == "mxfp4" or activation == "none"
    return triton_choose.choose_decoding(decoded, m, n, k, torch.cuda.get_device_capability(), library=library)


def bench_linear(rows=ROWS, activations=()) -> list[dict]:
    shapes = [(f, m, n, k) for f in ("mxfp4", "nvfp4") for m in rows for n, k in GROUPS.values()]
    chosen = [(f, m, n, k, tuned(f, m, n, k) or triton_choose.choose(f, m, n, k)) for f, m, n, k in shapes]
    jobs = [_job(*shape) for shape in chosen]
    jobs += [_job(*shape, _decoding(shape[0], a, *shape[1:]), a) for shape in shapes for a in activations]
    compile_all(jobs)
    names = {(f, a): f if a == "same" else f"{f} {a}" for f in ("mxfp4", "nvfp4") for a in ("same", *activations)}
    out = []
    for m in rows:
        total = {"M": m, "group": "layer"}
        for group, (n, k) in GROUPS.items():
            row = {
                "M": m,
                "group": group,
                "N": n,
                "K": k,
                "bf16 us": bf16_time(m, n, k),
                "fp8 ceiling us": fp8_time(m, n, k),
                "mxfp4 us": linear_time("mxfp4", m, n, k, tuned("mxfp4", m, n, k)),
                "nvfp4 us": linear_time("nvfp4", m, n, k, tuned("nvfp4", m, n, k)),
            }
            for (format, activation), name in names.items():
                if activation != "same":
                    row[f"{name} us"] = linear_time(format, m, n, k, activation=activation)
            for key, value in row.items():
                if key.endswith("us"):
                    total[key] = total.get(key, 0) + value
            out.append(row)
        out.append(total)
        for row in out[-5:]:
            for name in names.values():
                row[f"{name} speed-up"] = row["bf16 us"] / row[f"{name} us"]
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in total.items()}, flush=True)
    return out


def bench_parts() -> list[dict]:
    """What the library path spends: the upcast of x and of w, and the product for either fp8 type of x."""
    rows = []
    for m, (n, k) in itertools.product((256, 1024, 4096), GROUPS.values()):
        sets = [random_weight(n, k, "mxfp4") for _ in range(copies(n * k * 0.53))]
        xs = [random_weight(m, k, "mxfp4") for _ in range(copies(m * k * 0.53))]
        row = {"M": m, "N": n, "K": k}
        row["upcast x us"] = time_us([lambda a=a: upcast_fp8(*a, None, False) for a in xs])
        row["upcast w us"] = time_us([lambda a=a: upcast_fp8(*a, None, True) for a in sets])
        a, b = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
        ws = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies(n * k))]
        for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
            x = torch.randn(m, k, device="cuda").to(dtype)
            for fast in (True, False):
                row[f"{dtype} fast={fast} us"] = time_us(
                    [
                        lambda w=w: torch._scaled_mm(x, w.t(), a, b, out_dtype=torch.bfloat16, use_fast_accum=fast)
                        for w in ws
                    ]
                )
            one = torch.ones((), device="cuda")
            row[f"{dtype} one scale us"] = time_us(
                [
                    lambda w=w: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
                    for w in ws
                ]
            )
        row["bf16 us"] = bf16_time(m, n, k)
        rows.append(row)
    return rows


COMPARED_ROWS = (1, 16, 64, 256, 1024, 4096)


def _compile_compared(job) -> str | None:
    import comparisons

    return (comparisons.warm if job[0] in comparisons.COMPARISONS else _compile)(job)


def bench_compare() -> list[dict]:
    """Microseconds of a layer's four groups in bf16, in MXFP4 and by other libraries; `all` has each group."""
    import comparisons

    shapes = [(m, n, k) for m in COMPARED_ROWS for n, k in GROUPS.values()]
    chosen = [(m, n, k, triton_choose.choose("mxfp4", m, n, k)) for m, n, k in shapes]
    jobs = comparisons.jobs(GROUPS, COMPARED_ROWS)
    jobs += [_job("mxfp4", *shape) for shape in chosen]
    compile_all(jobs, _compile_compared)
    cells = {"bf16": {}, "mxfp4": {}}
    for m, (group, (n, k)) in itertools.product(COMPARED_ROWS, GROUPS.items()):
        cells["bf16"][m, group] = bf16_time(m, n, k)
        cells["mxfp4"][m, group] = linear_time("mxfp4", m, n, k)
    cells |= comparisons.compare(GROUPS, COMPARED_ROWS)
    return [
        {
            "M": m,
            **{f"{name} us": sum(us[m, group] for group in GROUPS) for name, us in cells.items()},
            "all": {name: {group: us[m, group] for group in GROUPS} for name, us in cells.items()},
        }
        for m in COMPARED_ROWS
    ]


# -- tune ------------------------------------------------------------------------------------------------------------

# Fused tiles worth timing, each with split_k 1, 2 and 4.
# format -> most rows -> (block_n, block_m, block_k, warps, stages)
TILES = {
    "mxfp4": {
        16: ((64, 16, 256, 4, 4), (64, 16, 512, 4, 3), (128, 16, 256, 4, 3), (128, 16, 256, 8, 3)),
        32: ((64, 32, 256, 4, 4), (64, 32, 512, 4, 2), (128, 32, 256, 8, 3)),
        64: ((64, 64, 256, 4, 3), (128, 64, 256, 8, 3), (128, 64, 128, 8, 4), (256, 64, 128, 8, 4)),
        128: ((64, 128, 256, 4, 3), (128, 128, 128, 8, 4), (128, 128, 128, 4, 4), (256, 128, 128, 8, 3)),
    },
    "nvfp4": {
        16: ((64, 16, 128, 4, 4), (64, 16, 256, 4, 3), (128, 16, 128, 8, 4)),
        32: ((64, 32, 128, 4, 4), (64, 32, 256, 4, 3), (128, 32, 128, 8, 4)),
        64: ((64, 64, 128, 4, 4), (128, 64, 128, 8, 3)),
        128: ((64, 128, 128, 4, 3), (128, 128, 128, 8, 3)),
    },
}
# Hopper's tiles: (block_n, block_m, warpgroups, stages); split_k above 1 where there is a tail wave.
HOPPER_TILES = {
    "mxfp4": (
        (128, 16, 2, 8),
        (256, 16, 4, 8),
        (128, 32, 2, 8),
        (256, 32, 4, 8),
        (128, 64, 2, 8),
        (256, 64, 4, 8),
        (128, 128, 2, 6),
        (256, 128, 4, 6),
        (128, 192, 2, 6),
        (128, 256, 2, 4),
    ),
    "nvfp4": (
        (128, 16, 2, 8),
        (256, 16, 4, 8),
        (128, 32, 2, 8),
        (256, 32, 4, 7),
        (128, 64, 2, 7),
        (256, 64, 4, 6),
        (128, 128, 2, 5),
        (256, 128, 4, 4),
        (128, 192, 2, 3),
        (128, 256, 2, 3),
    ),
}
GEMVS = tuple(
    Gemv(*tile) for tile in ((16, 2048, 8), (8, 2048, 4), (16, 1024, 4), (4, 16384, 8), (2, 16384, 4), (8, 8192, 8))
)


def candidates(format: str, m: int) -> list:
    """Kernels worth timing at m rows."""
    tiles = next((tiles for most, tiles in TILES[format].items() if m <= most), ())
    fused = [
        Fused(block_n, block_m, block_k, split_k, warps, stages, False)
        for block_n, block_m, block_k, warps, stages in tiles
        for split_k in (1, 2, 4)
    ]
    if m <= 16:
        block_n, block_m, block_k, warps, stages = tiles[0]
        fused += [Fused(block_n, block_m, block_k, split_k, warps, stages, True) for split_k in (1, 2, 4)]
    if m in (1, 2, 4):
        return [*GEMVS, *([Gemv(8, 4096, 4)] if m == 1 else fused[-2:])]
    hopper = [
        Hopper(block_n, block_m, warpgroups, split_k, stages)
        for block_n, block_m, warpgroups, stages in HOPPER_TILES[format]
        for split_k in (1, 2, 3, 4, 6, 8)
        if m > block_m // 2 and (m <= 2 * block_m or block_m >= 128)
    ]
    return fused + hopper + ([] if m < 256 else ["library"] if format == "mxfp4" else ["bf16"])


TUNED_ROWS = (1, 2, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)


def _fits(kernel, format: str, m: int, n: int, k: int) -> bool:
    """Whether a candidate can compute the shape and is not far from the fastest by the formula."""
    if isinstance(kernel, Hopper):
        tiles = -(-n // kernel.block_n) * -(-m // kernel.block_m)
        known = triton_choose.hopper_times(format, m, n, k)
        if kernel._replace(split_k=1) in known and known.get(kernel, 1e9) > 1.3 * min(known.values()):
            return False
        if kernel.split_k == 1:
            return tiles >= 48
        return kernel.warpgroups == 2 and tiles % triton_choose.MULTIPROCESSORS > 0
    return not isinstance(kernel, Fused) or (k % kernel.block_k == 0 and k // kernel.block_k % kernel.split_k == 0)


def _compile(job) -> str | None:
    """Runs a candidate in a process of its own, which puts its kernel into Triton's cache. Returns why it failed."""
    try:
        format, m, n, k, kernel, activation = job
        g, gw = factors(format, n)
        g = g if activation == "same" else None
        x = torch.randn(m, k, device="cuda").bfloat16()
        q = quantized(x, random_transform(k, FORMATS[format].group_size), g, format, activation)
        w = random_weight(n, k, format)
        for _ in range(2):  # from its second use on a weight may be prefetched, which is another compilation
            options = dict(activation_format=activation, lanes=in_lanes(x, format, activation))
            triton_linear.fp4_linear(*q, g, *w, gw, None, None, format, torch.bfloat16, kernel, **options)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not compile is a result
        return f"{job}: {type(error).__name__} {str(error)[:200]}"


def compile_all(jobs: list, compile=_compile) -> list[str]:
    """Compiles every job in a process of its own; returns the messages of those that failed."""
    jobs = list(dict.fromkeys(jobs))
    start = time.time()
    workers = max(2, (os.cpu_count() or 2) - 4)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [f for f in pool.map(compile, jobs) if f]
    print(
        f"compiled {len(jobs)} in {time.time() - start:.0f} s, failed {len(failed)}", *failed[:8], sep="\n", flush=True
    )
    return failed


def tune_linear(rows=TUNED_ROWS) -> list[dict]:
    cases = [
        (f, m, *GROUPS[g], c)
        for f in ("mxfp4", "nvfp4")
        for m in rows
        for g in GROUPS
        for c in candidates(f, m)
        if _fits(c, f, m, *GROUPS[g])
    ]
    cases.sort(key=lambda c: (c[0], c[2:4], c[1]))
    failed = compile_all([_job(*case) for case in cases])
    rows, held, sets = [], None, []
    for (f, m, n, k), group in itertools.groupby(cases, key=lambda c: c[:4]):
        if held != (f, n, k):
            held, sets = (f, n, k), []
            sets = weight_sets(f, n, k)
        timed = [
            (linear_time(f, m, n, k, c, sets=sets), repr(c))
            for *_, c in group
            if not any(repr(_to_compile(c, m)[1]) in line for line in failed)
        ]
        timed.sort()
        bf16 = bf16_time(m, n, k)
        rows.append({"format": f, "M": m, "N": n, "K": k, "bf16 us": bf16, "all": timed})
        best = "  ".join(f"{us:.1f} {c}" for us, c in timed[:3])
        print(f"{f} M={m} {n}x{k} bf16 {bf16:.1f} | {bf16 / timed[0][0]:.2f}x | {best}", flush=True)
    return rows


# -- output ----------------------------------------------------------------------------------------------------------


def markdown(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "all"))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = (row.get(key, "") for key in keys)
        lines.append("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def write(name: str, rows: list[dict], out: pathlib.Path) -> None:
    """Writes a benchmark's rows as JSON and Markdown, with what they were measured on."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**environment(), "rows": rows}, indent=1))
    (out / f"{name}.md").write_text(f"{environment()}\n\n{markdown(rows)}\n")
    if not name.startswith("tune"):
        print(markdown(rows), flush=True)


BENCHMARKS = {
    "linear": bench_linear,
    "parts": bench_parts,
    "compare": bench_compare,
    "tune-linear": tune_linear,
    "grouped": functools.partial(grouped_speed.bench_grouped, compile_all),
    "grouped-peers": functools.partial(grouped_speed.bench_peers, compile_all),
    "grouped-upcast": grouped_speed.bench_upcast,
    "tune-grouped": functools.partial(grouped_speed.tune_grouped, compile_all),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    parser.add_argument("--tuned", type=pathlib.Path, help="a tuning run; `linear` takes its best kernels")
    parser.add_argument("--rows", type=int, nargs="+", help="the rows of `linear` and `tune-linear`, instead of all")
    parser.add_argument("--tokens", type=int, nargs="+", help="the tokens of the benchmarks of experts")
    parser.add_argument("--formats", nargs="+", choices=("mxfp4", "nvfp4"), help="the formats of `tune-grouped`")
    parser.add_argument("--activations", nargs="+", choices=("fp8", "none"), default=(), help="columns of `linear`")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tuned:
        read_tuned(args.tuned)
    for name in args.what:
        options = {"rows": args.rows} if args.rows and name in ("linear", "tune-linear") else {}
        if args.tokens and "grouped" in name and name != "grouped-upcast":
            options["tokens"] = args.tokens
        if args.formats and name == "tune-grouped":
            options["kinds"] = args.formats
        if name == "linear":
            options["activations"] = args.activations
        rows = BENCHMARKS[name](**options)
        write(name, rows, args.out)


if __name__ == "__main__":
    main()
