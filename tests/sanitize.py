"""Every kernel once or twice, at sizes that fill no tile, for compute-sanitizer (not collected by pytest).

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1                       else a read past a tensor stays in a larger block
    python tests/sanitize.py --part 0/16                          compiles what Triton needs, one process a part
    compute-sanitizer --error-exitcode 1 --tool memcheck python tests/sanitize.py --part 0/16

and with `--tool racecheck`, `--tool initcheck`. Operands are made on the CPU, so that the sanitizer sees little but
these kernels. Results are copied back, so that initcheck reports any byte that was never written.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from wush_compile import feedback
from wush_compile.diagnostics.draw import factors_of_rows
from wush_compile.formats import ACTIVATION_FORMATS, FORMATS, get_format, quantize
from wush_compile.kernels import cuda
from wush_compile.kernels.triton.calibration import gptq as triton_gptq
from wush_compile.kernels.triton.calibration import moments as triton_gram
from wush_compile.kernels.triton.grouped import fp4_grouped_linear as triton_grouped
from wush_compile.kernels.triton.grouped.choose import Gemm
from wush_compile.kernels.triton.grouped.choose import Gemv as ExpertGemv
from wush_compile.kernels.triton.grouped.choose import Hopper as ExpertHopper
from wush_compile.kernels.triton.linear import fp4_linear as triton_linear
from wush_compile.kernels.triton.linear import launch as triton_launch
from wush_compile.kernels.triton.linear.choose import Fused, Gemv, Hopper
from wush_compile.kernels.triton.quantize import fused as triton_fused
from wush_compile.kernels.triton.quantize import norm as triton_norm
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.kernels.triton.quantize.tiles import Tile
from wush_compile.kernels.triton.quantize.tokens import quantize_tokens
from wush_compile.ops import fused as fused_ops
from wush_compile.ops.layouts import SCALE_LAYOUTS as LAYOUTS

Case = tuple[str, Callable[[], object]]  # name, call

FLOATS = ("mxfp4", "nvfp4")
RULES = [(format, rule) for format in FLOATS for rule in FORMATS[format].scale_rules]
ROWS = (1, 3, 17, 129)
WIDTHS = (576, 1536, 4096)
TRANSFORMS = ("none", "shared", "distinct", "double")  # double: blocks of two groups
GENERATOR = torch.Generator().manual_seed(0)
DEVICE = "cuda"


def size(index: int) -> tuple[int, int]:
    """(rows, K) of the index-th case, in an order that keeps no step with products of twos and threes."""
    return ROWS[(index + index // 4) % 4], WIDTHS[(index + index // 3) % 3]


# -- operands --------------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype).to(DEVICE)


def rows(m: int, k: int, dtype: torch.dtype = torch.bfloat16, finite: bool = True) -> Tensor:
    """Rows of a wider tensor; not finite: NaN and a huge value, which take the quantizers' second pass."""
    wide = torch.randn(m, k + 64, generator=GENERATOR).to(dtype)
    if not finite:
        wide[m // 2, k // 2], wide[m - 1, 3] = float("nan"), 3e38
    return wide.to(DEVICE)[:, :k]


def scalar(g: float | None) -> Tensor | None:
    return None if g is None else torch.tensor([g]).to(DEVICE)


def factors(n: int) -> Tensor:
    """Of a weight's rows."""
    return factors_of_rows(n, GENERATOR).to(DEVICE)


def packed(m: int, k: int, format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of m quantized rows."""
    codes = torch.randint(0, 256, (m, k // 2), dtype=torch.uint8, generator=GENERATOR)
    shape = m, k // FORMATS[format].group_size
    if format == "int4":
        scales = torch.rand(shape, generator=GENERATOR).bfloat16()
    else:
        low, high = (115, 122) if format == "mxfp4" else (40, 60)
        scales = torch.randint(low, high, shape, dtype=torch.uint8, generator=GENERATOR)
    return codes.to(DEVICE), scales.to(DEVICE)


def matrices(kind: str, k: int, format: str, dtype: torch.dtype = torch.bfloat16) -> Tensor | None:
    block = FORMATS[format].group_size * (2 if kind == "double" else 1)
    return None if kind == "none" else normal(1 if kind == "shared" else k // block, block, block, dtype=dtype)


def both_passes(m: int, k: int, quantize: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Of finite rows, and of rows that are not."""
    return *quantize(rows(m, k)), *quantize(rows(m, k, finite=False))


# -- Triton ----------------------------------------------------------------------------------------------------------


def quantizer_cases() -> Iterator[Case]:
    """All sizes with absmax, with a matrix a block and without; all rules and transforms at sizes taken in turn."""
    cases = [(f, "absmax", t, m, k) for f, t, m, k in itertools.product(FLOATS, ("none", "distinct"), ROWS, WIDTHS)]
    cases += [(*rule, t, *size(i)) for i, (rule, t) in enumerate(itertools.product(RULES, TRANSFORMS))]
    for index, (format, rule, kind, m, k) in enumerate(dict.fromkeys(cases)):

        def call(format=format, rule=rule, kind=kind, m=m, k=k, swizzled=index // 3 % 2 == 1):
            g = scalar(3.0 if rule == "paper" else 0.37 if format == "nvfp4" else None)
            return both_passes(
                m,
                k,
                lambda x: triton_quantize.transform_quantize(
                    x, matrices(kind, k, format), g, format, rule, None, swizzled
                ),
            )

        yield f"quantize {format} {rule} {kind} {m}x{k} swizzled={index // 3 % 2 == 1}", call


def tile_cases() -> Iterator[Case]:
    """Programs that walk several tiles, and the other dtypes."""
    tiles = (Tile(64, 64, 4, 3, 4), Tile(64, 64, 8, 3, 4), Tile(128, 64, 1, 1, 4), Tile(32, 64, 4, 3, 2))
    for index, (format, tile, (m, k)) in enumerate(itertools.product(FLOATS, tiles, ((129, 576), (333, 1536)))):

        def call(format=format, tile=tile, m=m, k=k, swizzled=index % 2 == 0):
            return both_passes(
                m,
                k,
                lambda x: triton_quantize.transform_quantize(
                    x, matrices("distinct", k, format), None, format, "mse", tile, swizzled
                ),
            )

        yield f"quantize {format} {tile} {m}x{k}", call
    for format, dtype, kind in itertools.product(FLOATS, (torch.float16, torch.float32), ("none", "distinct")):

        def call(format=format, dtype=dtype, kind=kind):
            return triton_quantize.transform_quantize(
                rows(37, 576, dtype), matrices(kind, 576, format, dtype), None, format, "absmax"
            )

        yield f"quantize {format} {dtype} {kind}", call


def feedback_cases() -> Iterator[Case]:
    """Rounding with feedback: all rules, layouts, and behind a norm and a gate."""
    rules = [(format, rule) for format, rule in RULES if rule != "paper"]
    for index, ((format, rule), kind) in enumerate(itertools.product(rules, ("shared", "distinct", "double"))):
        m, k = size(index)

        def call(format=format, rule=rule, kind=kind, m=m, k=k, swizzled=index % 2 == 1):
            f = normal(*feedback.shape(format, k)) / 8
            return both_passes(
                m,
                k,
                lambda x: triton_quantize.transform_quantize(
                    x, matrices(kind, k, format), None, format, rule, None, swizzled, feedback=f
                ),
            )

        yield f"quantize with feedback {format} {rule} {kind} {m}x{k} swizzled={index % 2 == 1}", call
    for format, (m, k) in itertools.product(FLOATS, ((3, 576), (129, 1536), (333, 4096))):

        def fused(format=format, m=m, k=k):
            tail = (
                matrices("distinct", k, format),
                None,
                format,
                "mse",
                "rows",
                normal(*feedback.shape(format, k)) / 8,
            )
            gated = triton_fused.silu_mul_transform_quantize(rows(m, k), rows(m, k), *tail)
            return *gated, *triton_fused.rms_norm_transform_quantize(rows(m, k), normal(k), 1e-5, None, "wide", *tail)

        yield f"fused with feedback {format} {m}x{k}", fused
    for m in (3, 129):

        def lanes(m=m):
            f = normal(*feedback.shape("nvfp4", 1536)) / 8
            more = dict(lanes=True, rule="mse", feedback=f)
            return quantize_tokens(rows(m, 1536), matrices("distinct", 1536, "nvfp4"), "nvfp4", **more)

        yield f"lanes with feedback {m}x1536", lanes


def prologue_cases() -> Iterator[Case]:
    kinds = [("rms_norm", gain) for gain in fused_ops.GAINS]
    kinds += [("layer_norm", ""), ("silu_mul", ""), ("gelu_mul", "none"), ("gelu_mul", "tanh")]
    kinds += [("add_rms_norm", "rounded"), ("rms_norm_keep", "rounded"), ("layer_norm_keep", "")]
    kinds += [("activation", "relu2"), ("activation", "gelu"), ("swiglu_oai", "")]
    for index, (format, (kind, detail), transform) in enumerate(itertools.product(FLOATS, kinds, ("none", "distinct"))):
        m, k = size(index)

        def call(format=format, kind=kind, detail=detail, transform=transform, m=m, k=k):
            x, weight = rows(m, k), normal(k)
            tail = (matrices(transform, k, format), None, format, "absmax")
            if kind == "activation":
                return triton_fused.activation_transform_quantize(x, detail, *tail)
            if "rms_norm" in kind:
                weight = None if detail == "none" else weight
                norm = getattr(triton_fused, f"{kind}_transform_quantize")
                inputs = (x, rows(m, k)) if kind == "add_rms_norm" else (x,)
                return norm(*inputs, weight, 1e-5, None, detail, *tail)
            if kind.startswith("layer_norm"):
                norm = getattr(triton_fused, f"{kind}_transform_quantize")
                return norm(x, weight, normal(k), 1e-5, None, *tail)
            both = normal(m, 2 * k)
            if kind == "swiglu_oai":
                return triton_fused.swiglu_oai_transform_quantize(both, 7.0, *tail)
            if kind == "silu_mul":
                return triton_fused.silu_mul_transform_quantize(both[:, :k], both[:, k:], *tail)
            return triton_fused.gelu_mul_transform_quantize(both[:, :k], both[:, k:], detail, *tail)

        yield f"{kind} {detail} {format} {transform} {m}x{k}", call
    for format, way, m in itertools.product(FLOATS, ("apart", "add"), (3, 129, 333)):

        def norm(format=format, way=way, m=m):
            """With the statistics in a kernel of their own, and of a sum."""
            x, tail = rows(m, 576), (matrices("distinct", 576, format), None, format, "absmax")
            if way == "add":
                return triton_fused.add_rms_norm_transform_quantize(
                    x, rows(m, 576), normal(576), 1e-5, None, "wide", *tail
                )
            plan = triton_norm.choose_plan(m, 576, FORMATS[format].group_size)._replace(way="apart", rows=1)
            return triton_norm.norm_quantize(x, normal(576), None, 1e-5, "rms_rounded", *tail, plan)

        yield f"rms_norm {way} {format} {m}x576", norm
    for format, kind, (m, k) in itertools.product(
        ACTIVATION_FORMATS, ("none", "distinct"), ((1, 576), (17, 1536), (333, 576))
    ):

        def token(format=format, kind=kind, m=m, k=k):
            return quantize_tokens(rows(m, k), matrices(kind, k, "mxfp4"), format)

        yield f"quantize {format} {kind} {m}x{k}", token


# (formats, kernel, precise, (rows, N, K) ...); None: what is chosen for the size.
PRODUCTS = (
    (FLOATS, None, False, ((1, 33, 576), (2, 100, 1536), (4, 200, 1024), (1, 72, 4608), (3, 33, 576), (17, 264, 1024))),
    (FLOATS, None, False, ((40, 264, 1024), (70, 200, 1536), (130, 264, 1024), (300, 272, 1024))),
    (FLOATS, Gemv(8, 4096, 4), False, ((1, 100, 4096),)),
    (("mxfp4",), Fused(64, 16, 256, 1, 4, 4, True), False, ((3, 72, 512), (17, 264, 1024))),
    (("mxfp4",), Fused(64, 16, 128, 2, 4, 6, True), False, ((17, 264, 1024),)),
    (("mxfp4",), Fused(64, 16, 256, 2, 4, 4, False), False, ((3, 72, 512),)),
    (("mxfp4",), Fused(64, 64, 256, 2, 4, 3, True), False, ((70, 264, 1024),)),
    (("mxfp4",), Fused(128, 128, 128, 1, 8, 4, False), False, ((130, 200, 512),)),
    (("mxfp4",), Fused(128, 256, 128, 1, 8, 3, False), False, ((130, 200, 512),)),
    (("nvfp4",), Fused(64, 16, 128, 2, 4, 4, True), False, ((3, 72, 512), (17, 264, 1024))),
    (("nvfp4",), Fused(64, 16, 128, 1, 4, 4, False), False, ((17, 264, 1024),)),
    (("nvfp4",), Fused(64, 64, 128, 2, 4, 4, False), False, ((70, 264, 1024),)),
    (("nvfp4",), Fused(128, 128, 128, 2, 8, 3, False), False, ((130, 200, 512),)),
    (("mxfp4",), Hopper(128, 64, 2, 2, 8), False, ((70, 264, 1024), (150, 264, 1024))),
    (("mxfp4",), Hopper(128, 192, 2, 4, 6), False, ((400, 264, 1024),)),
    (("mxfp4",), Hopper(256, 128, 4, 1, 6), False, ((130, 200, 512),)),
    (("nvfp4",), Hopper(128, 64, 2, 2, 7), False, ((70, 264, 1024), (150, 264, 1024))),
    (("nvfp4",), Hopper(128, 192, 2, 4, 3), False, ((400, 264, 1024),)),
    (("nvfp4",), Hopper(256, 128, 4, 1, 4), False, ((130, 200, 512),)),
    (("mxfp4",), None, True, ((9, 72, 512), (64, 200, 1024), (100, 136, 1024))),
    (("mxfp4",), "library", False, ((5, 48, 512), (300, 208, 1024))),
    (("mxfp4",), "library", True, ((130, 48, 512),)),
    (FLOATS, "bf16", False, ((5, 33, 576), (70, 100, 512))),
    (("int4",), None, False, ((1, 33, 576), (17, 72, 96), (70, 200, 512))),
)


def product_cases() -> Iterator[Case]:
    """Alone, to fp32 where the kernel has it, and with everything that can be added, to bf16."""
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    for kinds, kernel, precise, sizes in PRODUCTS:
        if isinstance(kernel, Hopper) and not on_hopper:
            continue
        for format, (m, n, k), full in itertools.product(kinds, sizes, (False, True)):

            def call(format=format, kernel=kernel, precise=precise, m=m, n=n, k=k, full=full):
                gx, gw = (scalar(v if full and format == "nvfp4" else None) for v in (0.37, 4.0))
                gw = factors(n) if full and format != "nvfp4" else gw
                bias = normal(n) if full and kernel != "library" else None
                residual = normal(m, n) if full else None
                dtype = torch.bfloat16 if full or kernel == "library" else torch.float32
                x, w = packed(m, k, format), packed(n, k, format)
                # As on a GPU of four multiprocessors: several tiles for a program, and some behind the last whole wave.
                with mock.patch.object(triton_launch, "multiprocessors", lambda device: 4):
                    run = [
                        triton_linear.fp4_linear(*x, gx, *w, gw, bias, residual, format, dtype, kernel, precise)
                        for _ in range(2)
                    ]  # a weight's second use may start early
                return run[1]

            yield f"linear {format} {kernel} precise={precise} {m}x{n}x{k} full={full}", call


def wide_cases() -> Iterator[Case]:
    """4-bit weights with activations of 8 and 16 bits, in rows and in lane order."""
    sizes = ((1, 33, 576), (3, 72, 512), (17, 264, 1024), (70, 200, 1536), (300, 272, 1024))
    for format, activation, (m, n, k), lanes in itertools.product(FLOATS, ACTIVATION_FORMATS, sizes, (False, True)):
        bf16 = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
        if lanes and triton_linear.refuses_lanes(format, activation, bf16, k):
            continue

        def call(format=format, activation=activation, m=m, n=n, k=k, lanes=lanes):
            x = quantize_tokens(normal(m, k), None, activation, lanes=lanes)
            with mock.patch.object(triton_launch, "multiprocessors", lambda device: 4):
                return triton_linear.fp4_linear(
                    *x,
                    None,
                    *packed(n, k, format),
                    factors(n),
                    None,
                    None,
                    format,
                    torch.bfloat16,
                    activation_format=activation,
                    lanes=lanes,
                )

        yield f"linear {format} {activation} {m}x{n}x{k} lanes={lanes}", call
    for m, n, k in ((33, 72, 384), *sizes[3:]):

        def values(m=m, n=n, k=k):
            x = quantize_tokens(normal(m, k), matrices("distinct", k, "nvfp4"), "nvfp4", lanes=True, rule="absmax")
            added = None, None, None, "nvfp4", torch.bfloat16
            return triton_linear.fp4_linear(*x, None, *packed(n, k, "nvfp4"), *added, lanes=True)

        yield f"linear nvfp4 from values {m}x{n}x{k}", values


# Weights of 8 bits: a tile that is chosen for every number of rows, and sizes that fill none.
EIGHT_BITS = (
    (1, 33, 96),
    (2, 40, 576),
    (4, 8200, 256),
    (3, 72, 192),
    (17, 200, 576),
    (64, 72, 512),
    (70, 33, 576),
    (150, 264, 384),
)


def eight_bit_cases() -> Iterator[Case]:
    """Alone, and behind fp8 rows with everything that can be added."""
    dtypes = torch.bfloat16, torch.float16
    for (m, n, k), full, dtype in itertools.product(EIGHT_BITS, (False, True), dtypes):

        def call(m=m, n=n, k=k, full=full, dtype=dtype):
            w = normal(n, k).float()
            codes, scales = quantize(w, "int8", "absmax")
            activation = "fp8" if full else "none"
            x = quantize_tokens(normal(m, k, dtype=dtype), None, activation)
            added = (normal(n, dtype=dtype), normal(m, n, dtype=dtype)) if full else (None, None)
            gw = factors(n) if full else None
            run = [
                triton_linear.fp4_linear(
                    *x, None, codes, scales, gw, *added, "int8", dtype, activation_format=activation
                )
                for _ in range(2)
            ]
            return run[1]

        yield f"linear int8 {m}x{n}x{k} full={full} {dtype}", call


# Tiles of the products of four experts with 90 rows, each at two widths, of which one fills no step.
EXPERT_TILES = (
    ExpertGemv(8, 2048, 4),
    Gemm(64, 16, 128, 4, 4),
    Gemm(128, 64, 128, 8, 3),
    ExpertHopper(128, 16, 5, 3),
    ExpertHopper(128, 64, 4, 2),
    ExpertHopper(128, 128, 3, 1),
)
OFFSETS = ([20, 20, 77, 90], [0, 3, 5, 60], [30, 10, 90, 40], [-5, 2**30, 2**31 - 1, 50])  # two right, two wrong


def expert_cases() -> Iterator[Case]:
    """Every tile with right and with wrong offsets, rows by an index that goes past the tokens."""
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    for kernel, format, k in itertools.product(EXPERT_TILES, FLOATS, (416, 512)):
        if isinstance(kernel, ExpertHopper) and not on_hopper:
            continue

        def call(kernel=kernel, format=format, k=k):
            x, w = packed(40, k, format), [t.view(4, 72, -1) for t in packed(4 * 72, k, format)]
            index = torch.arange(90).mul(7).sub(3).to(DEVICE)
            results = []
            with mock.patch.object(triton_grouped, "multiprocessors", lambda device: 4):
                for ends in OFFSETS:
                    offs = torch.tensor(ends, dtype=torch.int32).to(DEVICE)
                    y = triton_grouped.fp4_grouped_linear(
                        *x, None, *w, None, offs, None, format, torch.bfloat16, "same", index, kernel
                    )
                    results += [y] if ends is OFFSETS[0] or ends is OFFSETS[1] else []  # else rows may stay unwritten
            return tuple(results)

        yield f"experts {format} {kernel} K {k}", call


def other_cases() -> Iterator[Case]:
    for tokens, count, k in ((20, 37, 416), (129, 128, 576), (3, 5, 96)):

        def upcast(tokens=tokens, count=count, k=k):
            index = torch.arange(count).mul(7).sub(3).to(DEVICE)  # past the tokens on both sides
            return triton_grouped.upcast.upcast_many(*packed(tokens, k, "mxfp4"), None, index)

        yield f"experts' rows {tokens} -> {count} x {k}", upcast
    for m, k, block in ((1, 64, 32), (70, 96, 16), (300, 576, 32), (1000, 1536, 64), (129, 512, 128), (17, 64, None)):

        def call(m=m, k=k, block=block):
            moment = torch.zeros((k, k) if block is None else (k // block, block, block)).to(DEVICE)
            triton_gram.add_moment(rows(m, k), moment)
            return moment

        yield f"moment {m}x{k} block {block}", call
    for (format, rule), n in itertools.product(((f, r) for f in FORMATS for r in FORMATS[f].scale_rules), (1, 41)):

        def call(format=format, rule=rule, n=n):
            group = get_format(format).group_size
            w, z, unit = (
                torch.randn(group, columns, dtype=torch.float64, generator=GENERATOR).to(DEVICE)
                for columns in (n, n, 2 * group)
            )
            unit = unit[:, group:]
            codes = torch.empty(group, n, dtype=torch.uint8, device=DEVICE)
            scales = torch.empty(n, dtype=get_format(format).scale_dtype, device=DEVICE)
            error = torch.empty_like(w)
            g = scalar(3.0 if rule == "paper" else 4.0 if format == "nvfp4" else None)
            triton_gptq.round_group(w, z, unit, format, rule, g, codes, scales, error)
            return codes, scales, error

        yield f"gptq {format} {rule} {n} rows", call


# -- csrc ------------------------------------------------------------------------------------------------------------


def csrc_cases() -> Iterator[Case]:
    """Nothing where there is no library for this GPU. On Hopper the product is the one with the FP4 instruction
    emulated."""
    if cuda.unavailable(torch.cuda.get_device_capability()):
        return
    rules = [(format, rule) for format, rule in RULES if rule in cuda.RULES]
    kinds = itertools.product(rules, ("none", "shared", "distinct"), (False, True))
    for index, ((format, rule), kind, swizzled) in enumerate(kinds):
        m, k = size(index)

        def call(format=format, rule=rule, kind=kind, swizzled=swizzled, m=m, k=k):
            g = scalar(3.0 if rule == "paper" else 0.37)
            return both_passes(
                m,
                k,
                lambda x: cuda.transform_quantize(x, matrices(kind, k, format), g, format, rule, LAYOUTS[swizzled]),
            )

        yield f"csrc quantize {format} {rule} {kind} {m}x{k} swizzled={swizzled}", call
    for format, kind, (m, k) in itertools.product(FLOATS, ("none", "distinct"), ((1, 576), (17, 1536), (129, 576))):

        def norms(format=format, kind=kind, m=m, k=k):
            tail = (matrices(kind, k, format), None, format, "absmax", LAYOUTS[m > 1])
            norm = (normal(k), 1e-5, None, "rounded")
            plain = cuda.rms_norm_transform_quantize(rows(m, k), *norm, *tail)
            return *plain, *cuda.add_rms_norm_transform_quantize(rows(m, k), rows(m, k), *norm, *tail)

        def gated(format=format, kind=kind, m=m, k=k):
            both = normal(m, 2 * k)
            return cuda.silu_mul_transform_quantize(
                both[:, :k], both[:, k:], matrices(kind, k, format), None, format, "mse", LAYOUTS[m > 1]
            )

        yield f"csrc rms_norm, add_rms_norm {format} {kind} {m}x{k}", norms
        yield f"csrc silu_mul {format} {kind} {m}x{k}", gated
    for format, (m, n, k) in itertools.product(FLOATS, ((1, 33, 576), (17, 72, 96), (130, 200, 512))):

        def product(format=format, m=m, n=n, k=k):
            return cuda.fp4_linear(
                *packed(m, k, format),
                scalar(0.5),
                *packed(n, k, format),
                scalar(4.0),
                normal(n),
                normal(m, n),
                format,
                torch.bfloat16,
            )

        yield f"csrc linear {format} {m}x{n}x{k}", product
    yield (
        "csrc swizzle",
        lambda: cuda.load(cuda.TARGETS[torch.cuda.get_device_capability()]).swizzle_scales(
            packed(130, 576, "nvfp4")[1]
        ),
    )


GROUPS = {
    "quantizer": quantizer_cases,
    "feedback": feedback_cases,
    "tiles": tile_cases,
    "prologues": prologue_cases,
    "products": product_cases,
    "wide": wide_cases,
    "eight bits": eight_bit_cases,
    "experts": expert_cases,
    "others": other_cases,
    "csrc": csrc_cases,
}


def cases(groups=tuple(GROUPS)) -> Iterator[Case]:
    for group in groups:
        yield from GROUPS[group]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=tuple(GROUPS))
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case, from the i-th on")
    parser.add_argument("--verbose", action="store_true", help="name each case before it runs")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        parser.error("PYTORCH_NO_CUDA_MEMORY_CACHING=1 is not set: out-of-bounds accesses would stay unseen")
    start, done = time.time(), 0
    for name, call in itertools.islice(cases(args.only), part, None, parts):
        if args.verbose:
            print(name, flush=True)
        try:
            result = call()
            for tensor in result if isinstance(result, tuple) else (result,):
                tensor.cpu()
        except Exception as error:
            raise RuntimeError(name) from error
        done += 1
    print(f"part {args.part}: {done} cases in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
