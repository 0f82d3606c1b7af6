"""Times the Triton quantizer, its fused variants and the second moments: CUDA-graph replays, inputs rotated out of L2.

    python benchmarks/speed_quantize_kernel.py quantize fused moments --out results     the tables, as Markdown and JSON
    python benchmarks/speed_quantize_kernel.py tune --out results                       tiles, for `choose_tile`
    python benchmarks/speed_quantize_kernel.py tune-norm --out results                  norms, for `choose_plan`

"share" is the time of a copy of the same bytes, at the rate measured for a copy of that shape, over the kernel's time.
"""

import argparse
import itertools
import pathlib

import torch
import triton
from kernel_speed import compile_all, random_feedback, random_transform, write

from wush_compile.diagnostics.timing import copies, time_us
from wush_compile.formats import FORMATS
from wush_compile.kernels.triton.calibration import moments as triton_gram
from wush_compile.kernels.triton.quantize import fused as triton_fused
from wush_compile.kernels.triton.quantize import norm as triton_norm
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.kernels.triton.quantize.norm import NormPlan
from wush_compile.kernels.triton.quantize.tiles import Tile, choose_tile
from wush_compile.ops import core as ops

SHAPES = ((1, 4096), (16, 4096), (64, 4096), (1024, 4096), (4096, 4096), (8192, 4096), (8192, 14336))


def inputs(m: int, k: int, reads: int = 1) -> list[torch.Tensor]:
    return [torch.randn(m, k, device="cuda").bfloat16() for _ in range(copies(2 * m * k * reads))]


def copy_time(m: int, k: int) -> float:
    pairs = [(torch.empty_like(x), x) for x in inputs(m, k, 2)]
    return time_us([lambda a=a, b=b: a.copy_(b) for a, b in pairs])


def ideal_time(copy: float, format: str, reads: int = 1) -> float:
    """Microseconds to read `reads` 16-bit matrices and to write codes and scales, from the time of a copy of one
    matrix."""
    return copy * (2 * reads + 0.5 + 1 / FORMATS[format].group_size) / 4


def operands(k: int, format: str, kind: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(transform, global scale); kind: "blocks" (a matrix each), "shared" or "none"."""
    block = FORMATS[format].group_size
    t = None if kind == "none" else random_transform(k if kind == "blocks" else block, block)
    return t, torch.ones(1, device="cuda") if format == "nvfp4" else None


def quantize_time(
    m: int, k: int, format: str, rule: str, kind: str, tile: Tile | None = None, feeds_back: bool = False
) -> float:
    t, g = operands(k, format, kind)
    more = dict(tile=tile, feedback=random_feedback(k, format) if feeds_back else None)
    return time_us(
        [lambda x=x: triton_quantize.transform_quantize(x, t, g, format, rule, **more) for x in inputs(m, k)]
    )


def bench_quantize() -> list[dict]:
    rows = []
    for m, k in SHAPES:
        copy = copy_time(m, k)
        for format in ("mxfp4", "nvfp4"):
            ideal = ideal_time(copy, format)
            row = {
                "M": m,
                "K": k,
                "format": format,
                "copy us": copy,
                "copy TB/s": 4e-6 * m * k / copy,
                "ideal us": ideal,
            }
            rules = [rule for rule in ("absmax", "mse", "search") if rule in FORMATS[format].scale_rules]
            for kind, rule in (("none", "absmax"), ("shared", "absmax"), *(("blocks", rule) for rule in rules)):
                us = quantize_time(m, k, format, rule, kind)
                row[f"{kind} {rule} us"], row[f"{kind} {rule} share"] = us, ideal / us
            us = quantize_time(m, k, format, "mse", "blocks", feeds_back=True)
            row["blocks feedback us"], row["blocks feedback share"] = us, ideal / us
            rows.append(row)
    return rows


def bench_fused() -> list[dict]:
    """The quantizer with a prologue, beside the quantizer alone."""
    rows = []
    for m, k in SHAPES:
        t, _ = operands(k, "mxfp4", "blocks")
        weight, pairs = torch.ones(k, device="cuda").bfloat16(), list(zip(inputs(m, k, 2), inputs(m, k, 2)))
        tail = (t, None, "mxfp4", "absmax")
        calls = {
            "quantizer": lambda a, b: triton_quantize.transform_quantize(a, *tail),
            "rms_norm": lambda a, b: triton_fused.rms_norm_transform_quantize(a, weight, 1e-5, None, "rounded", *tail),
            "layer_norm": lambda a, b: triton_fused.layer_norm_transform_quantize(a, weight, weight, 1e-5, None, *tail),
            "silu_mul": lambda a, b: triton_fused.silu_mul_transform_quantize(a, b, *tail),
            "gelu_mul": lambda a, b: triton_fused.gelu_mul_transform_quantize(a, b, "none", *tail),
        }
        times = {name: time_us([lambda a=a, b=b: call(a, b) for a, b in pairs]) for name, call in calls.items()}
        row = {"M": m, "K": k} | {f"{name} us": us for name, us in times.items()}
        rows.append(
            row
            | {
                "rms_norm / quantizer": times["rms_norm"] / times["quantizer"],
                "layer_norm / quantizer": times["layer_norm"] / times["quantizer"],
                "silu_mul share": ideal_time(copy_time(m, k), "mxfp4", 2) / times["silu_mul"],
            }
        )
    return rows


def bench_moments() -> list[dict]:
    """Whole and block-diagonal second moments of bf16 rows, beside the reference in fp32."""
    rows = []
    for k, m in itertools.product((4096, 14336), (2048, 8192)):
        xs = inputs(m, k)
        whole, blocks = torch.zeros(k, k, device="cuda"), torch.zeros(k // 32, 32, 32, device="cuda")
        row = {"rows": m, "K": k}
        for name, moment in (("whole", whole), ("blocks", blocks)):
            row[f"{name} us"] = time_us([lambda x=x: triton_gram.add_moment(x, moment) for x in xs], 3)
            row[f"{name} fp32 us"] = time_us([lambda x=x: ops._add_moment(x, moment) for x in xs[:2]], 3, 2)
        row["whole TFLOP/s"] = 2e-6 * m * k * k / row["whole us"]
        row["blocks share"] = copy_time(m, k) / 2 / row["blocks us"]
        rows.append(row)
    return rows


# -- tune ------------------------------------------------------------------------------------------------------------


def tiles(m: int, kind: str) -> list[Tile]:
    if kind == "none":
        shapes = (
            [(1, 512, 1, 1, 1), (1, 512, 1, 1, 2), (1, 1024, 1, 1, 4), (1, 256, 1, 1, 1)]
            if m <= 4
            else [
                (16, 256, 1, 1, 4),
                (8, 512, 1, 1, 4),
                (16, 512, 1, 1, 8),
                (32, 128, 1, 1, 4),
                (4, 1024, 1, 1, 4),
                (4, 512, 1, 1, 2),
            ]
        )
    elif m <= 64:
        shapes = [(16, 64, 1, 1, 1), (16, 64, 1, 1, 2), (16, 32, 1, 1, 1), (16, 128, 1, 1, 1)]
    else:
        shapes = [
            (64, 64, 1, 1, 4),
            (64, 64, 4, 3, 4),
            (64, 64, 6, 3, 4),
            (64, 64, 6, 4, 4),
            (64, 64, 8, 3, 4),
            (64, 64, 8, 2, 4),
            (64, 128, 4, 2, 4),
            (64, 128, 8, 2, 4),
            (64, 128, 4, 3, 4),
            (32, 64, 4, 3, 2),
            (16, 64, 8, 3, 1),
            (128, 64, 4, 3, 8),
        ]
    return [Tile(*s) for s in shapes]


def compile_tile(job) -> str | None:
    """Runs a candidate once in a process of its own, which puts its kernel into Triton's cache."""
    m, k, format, rule, kind, tile = job
    try:
        t, g = operands(k, format, kind)
        x = torch.zeros(m, k, device="cuda").bfloat16()
        triton_quantize.transform_quantize(x, t, g, format, rule, tile)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not compile is a result
        return f"{job}: {type(error).__name__} {str(error)[:200]}"


def tune() -> list[dict]:
    shapes = ((1, 4096), (16, 4096), (64, 4096), (1024, 4096), (4096, 4096), (8192, 4096), (8192, 14336))
    kinds = (
        ("mxfp4", "absmax", "blocks"),
        ("mxfp4", "mse", "blocks"),
        ("nvfp4", "absmax", "blocks"),
        ("mxfp4", "absmax", "none"),
    )
    cases = [(m, k, *kind, t) for kind in kinds for m, k in shapes for t in tiles(m, kind[2])]
    compile_all([(min(m, 1024), *case) for m, *case in cases], compile_tile)
    rows = []
    for (m, k, f, r, kind), group in itertools.groupby(cases, key=lambda c: c[:5]):
        ideal = ideal_time(copy_time(m, k), f)
        timed = sorted((quantize_time(m, k, f, r, kind, t), repr(tuple(t))) for *_, t in group)
        rows.append({"format": f, "rule": r, "kind": kind, "M": m, "K": k, "ideal us": ideal, "all": timed})
        best = "  ".join(f"{us:.1f} {c}" for us, c in timed[:4])
        print(f"{f} {r} {kind} M={m} K={k} ideal {ideal:.1f} | {ideal / timed[0][0]:.0%} | {best}", flush=True)
    return rows


def norm_plans(m: int, k: int) -> list[NormPlan]:
    """Candidate plans, the plan in use first."""
    chosen = triton_norm.choose_plan(m, k, 32)
    plans = [chosen, NormPlan("apart", choose_tile(m, k, 32), 1)]
    if m <= 16:
        rows = triton.next_power_of_2(m)
        plans += [
            NormPlan("own", Tile(16, w, 1, 1, warps), rows)
            for w in (32, 64)
            for warps in (1, 2, 4, 8)
            if 2 * warps >= rows
        ]  # else a thread's sums do not fit its registers
    if m <= 64:
        plans += [
            NormPlan("ahead", Tile(16, w, 1, 1, warps), rows, 0)
            for w, warps in ((32, 1), (32, 2), (64, 1), (64, 4))
            for rows in (1, 2)
        ]
    else:
        walks = ((1, 1), (2, 2), (4, 3)) if m * k <= 2**22 else ((2, 2), (4, 3), (8, 3))
        plans += [
            NormPlan("ahead", Tile(64, 64, tiles, stages, 4), rows, ahead)
            for tiles, stages in walks
            for rows in (1, 2, 4)
            for ahead in (0, 128, 256, 512, 1024)
        ]
    return list(dict.fromkeys(plans))


def norm_call(k: int, plan: NormPlan | None):
    weight, (t, _) = torch.ones(k, device="cuda").bfloat16(), operands(k, "mxfp4", "blocks")
    if plan is None:
        return lambda x: triton_quantize.transform_quantize(x, t, None, "mxfp4", "absmax")
    return lambda x: triton_norm.norm_quantize(x, weight, None, 1e-5, "rms_rounded", t, None, "mxfp4", "absmax", plan)


def compile_plan(job) -> str | None:
    """`compile_tile` for a plan."""
    m, k, plan = job
    try:
        norm_call(k, plan)(torch.zeros(m, k, device="cuda").bfloat16())
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {type(error).__name__} {str(error)[:200]}"


def tune_norm() -> list[dict]:
    shapes = ((1, 4096), (4, 4096), (16, 4096), (64, 4096), (1024, 4096), (4096, 4096), (8192, 4096), (8192, 14336))
    cases = [(m, k, plan) for m, k in shapes for plan in (None, *norm_plans(m, k))]
    # `ahead` is no part of a kernel, nor are the rows of x beyond 1024.
    kernels = {(min(m, 1024), k, plan and plan._replace(ahead=0)) for m, k, plan in cases}
    compile_all(sorted(kernels, key=repr), compile_plan)
    rows = []
    for (m, k), group in itertools.groupby(cases, key=lambda c: c[:2]):
        xs = inputs(m, k)
        plain, chosen, *others = [
            (time_us([lambda x=x: call(x) for x in xs]), plan)
            for call, plan in ((norm_call(k, plan), plan) for *_, plan in group)
        ]
        timed = sorted([chosen, *others])
        rows.append(
            {
                "M": m,
                "K": k,
                "quantizer us": plain[0],
                "chosen us": chosen[0],
                "all": [(us, repr(plan)) for us, plan in timed],
            }
        )
        apart = min(us for us, plan in timed if plan.way == "apart")
        best = "  ".join(
            f"{us / plain[0]:.2f} {plan.way} {tuple(plan.tile)} {plan.rows} {plan.ahead}" for us, plan in timed[:5]
        )
        print(
            f"M={m} K={k} quantizer {plain[0]:.1f} us | times that: apart {apart / plain[0]:.2f}, "
            f"chosen {chosen[0] / plain[0]:.2f} | {best}",
            flush=True,
        )
    return rows


BENCHMARKS = {
    "quantize": bench_quantize,
    "fused": bench_fused,
    "moments": bench_moments,
    "tune": tune,
    "tune-norm": tune_norm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.what:
        write(name, BENCHMARKS[name](), args.out)


if __name__ == "__main__":
    main()
