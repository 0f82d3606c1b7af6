"""Machine code of the kernels, compiled for GPUs that are not here: native FP4 on Blackwell, tensor cores elsewhere.

Needs Triton, but no GPU. Every kernel that can be chosen is compiled as it would be launched.
"""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wush_compile.formats import FORMATS
from wush_compile.kernels.triton.common.epilogue import finish_kernel
from wush_compile.kernels.triton.linear import choose as triton_choose
from wush_compile.kernels.triton.linear import older as triton_older
from wush_compile.kernels.triton.linear.gemm import fused_gemm_kernel
from wush_compile.kernels.triton.linear.gemv import gemv_kernel
from wush_compile.kernels.triton.linear.int4 import int4_gemm_kernel
from wush_compile.kernels.triton.linear.int8 import int8_gemm_kernel, int8_gemv_kernel
from wush_compile.kernels.triton.linear.scaled import scaled_gemm_kernel
from wush_compile.kernels.triton.quantize import norm as triton_norm
from wush_compile.kernels.triton.quantize import spec as triton_spec
from wush_compile.kernels.triton.quantize import statistics as triton_statistics
from wush_compile.kernels.triton.quantize import tiles as triton_tiles
from wush_compile.kernels.triton.quantize import tokens as triton_tokens
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.ops.fused import ACTIVATIONS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 8192)
SHAPES = ((28672, 4096), (4096, 14336))
PLAIN = dict(gx=None, gw=None, bias=None, residual=None, SCALED_X=False, SCALED_W=False, BIAS=False, RESIDUAL=False)
BLACKWELL = pytest.mark.parametrize("cc", [100, 103, 120, 121])
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])


def compile_kernel(kernel, pointers, constants, cc, warps, stages=3, fusion=True, source=ASTSource, **options):
    """The compiled kernel: `pointers` are types of arguments, `constants` are the rest; names that the kernel does not
    have are left out."""
    signature = {p.name: pointers.get(p.name, "constexpr") for p in kernel.params}
    values = {name: constants[name] for name in signature if name not in pointers}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if signature[name].startswith("*") or name == "pitch"
    }
    return triton.compile(
        source(kernel, signature, values, aligned),
        target=GPUTarget("cuda", cc, 32),
        options=dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fusion, **options),
    )


def sass(compiled) -> str:
    """Disassembly; empty where Triton's own disassembler does not know the architecture."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, file.name], capture_output=True, text=True).stdout


def compile_linear(format, n, k, kernel, cc, promote=0, activation="same", gw=None):
    """A product as launched. format: also mxfp4_bf16, MXFP4 weights decoded to bf16. gw: the type of the weight's
    global scale, if it has one."""
    mx, pdl = format == "mxfp4", cc >= 90
    given, plain = {"gw": gw} if gw else {}, PLAIN | dict(SCALED_W=gw is not None)
    tops, unit = format not in ("nvfp4", "int8"), activation == "fp8" or activation == "same" and mx
    fp8_x = "fp8e4nv" if activation == "fp8" else "fp8e5"
    if isinstance(kernel, triton_choose.Scaled):
        scale = "*u8" if mx else "*fp8e4nv"
        pointers = dict(x="*u8", w="*u8", x_scales=scale, w_scales=scale, out="*bf16", M="i32")
        constants = dict(
            plain,
            N=n,
            K=k,
            G=FORMATS[format].group_size,
            BLOCK_M=kernel.block_m,
            BLOCK_N=kernel.block_n,
            BLOCK_K=kernel.block_k,
            STAGES=kernel.stages,
        )
        return compile_kernel(scaled_gemm_kernel, pointers | given, constants, cc, kernel.warps, kernel.stages)
    if isinstance(kernel, triton_choose.Int4):
        pointers = dict(x="*u8", x_scales="*bf16", w="*u8", w_scales="*bf16", out="*bf16", M="i32")
        constants = dict(plain, N=n, K=k, BLOCK_N=kernel.block_n, BLOCK_M=kernel.block_m, STAGES=kernel.stages, PDL=pdl)
        return compile_kernel(int4_gemm_kernel, pointers | given, constants, cc, kernel.warps, kernel.stages)
    if isinstance(kernel, triton_choose.Hopper):  # chosen only where Gluon is what the kernel expects
        from triton.experimental.gluon._runtime import GluonASTSource
        from triton.experimental.gluon.language import NVMMASharedLayout

        from wush_compile.kernels.triton.linear.hopper import hopper_gemm_kernel

        words = 32 if format == "int8" else 16
        x_layout, w_layout = NVMMASharedLayout(128, 8 if mx else 16), NVMMASharedLayout(4 * words, 32)
        block_m = 1 << kernel.block_m.bit_length() - 1
        extra, x_type = kernel.block_m - block_m, fp8_x if mx else "bf16"
        pointers = {
            name: f"tensordesc<{x_type}[{rows}, 128],{x_layout!r}>"
            for name, rows in (("x", block_m), ("x_extra", extra))
            if rows
        }
        pointers |= dict(
            w=f"tensordesc<i32[{kernel.block_n}, {words}],{w_layout!r}>",
            w_scales="*bf16" if format == "int8" else "*u8",
            out="*bf16",
            M="i32",
            work_items="i32",
            whole_tiles="i32",
            split_k="i32",
            prefetch="i32",
        )
        pointers |= (dict(x_unit="*fp32") if unit else {}) | (dict(w_top="*u8") if tops else {})
        pointers |= dict(partials="*fp32", arrivals="*i32") if kernel.split_k > 1 else {}
        constants = dict(
            x_extra=None,
            gx=None,
            gw=None,
            bias=None,
            residual=None,
            x_unit=None,
            w_top=None,
            partials=None,
            arrivals=None,
            N=n,
            K=k,
            FORMAT=format,
            BLOCK_N=kernel.block_n,
            BLOCK_M=block_m,
            EXTRA_M=extra,
            WARPGROUPS=kernel.warpgroups,
            STAGES=kernel.stages,
            GROUP_M=triton_choose.GROUP_M,
        )
        return compile_kernel(hopper_gemm_kernel, pointers | given, constants, cc, 4, source=GluonASTSource)
    if isinstance(kernel, triton_choose.Gemv):
        pointers = dict(x="*i32", x_scales="*u8", w="*i32", w_scales="*u8", out="*bf16")
        constants = dict(plain, N=n, K=k, M=1, FORMAT=format, BLOCK_N=kernel.block_n, BLOCK_K=kernel.block_k, PDL=pdl)
        return compile_kernel(gemv_kernel, pointers | given, constants, cc, kernel.warps)
    pointers = dict(
        x="*u8" if kernel.packed else f"*{fp8_x}" if mx else "*bf16",
        w="*u8",
        w_scales="*i32",
        selectors="*i32",
        out="*bf16",
        M="i32",
    )
    pointers |= dict(x_scales="*i32") if kernel.packed else dict(x_unit="*fp32") if unit else {}
    pointers |= (dict(w_top="*u8") if tops else {}) | (
        dict(partials="*fp32", arrivals="*i32") if kernel.split_k > 1 else {}
    )
    constants = dict(
        plain,
        x_scales=None,
        x_unit=None,
        w_top=None,
        partials=None,
        arrivals=None,
        N=n,
        K=k,
        FORMAT=format,
        PACKED=kernel.packed,
        BLOCK_N=kernel.block_n,
        BLOCK_M=kernel.block_m,
        BLOCK_K=kernel.block_k,
        SPLIT_K=kernel.split_k,
        STAGES=kernel.stages,
        GROUP_M=triton_choose.GROUP_M,
        PDL=pdl,
        PROMOTE=promote,
    )
    return compile_kernel(fused_gemm_kernel, pointers | given, constants, cc, kernel.warps, kernel.stages)


def compile_quantize(
    format, cc, block, tile, rule="absmax", words=None, pdl=None, flat=None, prologue=None, feeds_back=False
):
    """The quantizer for x bf16 [M, 4096]; words and pdl as a launch has them where they are None; flat: the kernel that
    takes the fields of the spec one by one; prologue: an activation without a second operand."""
    pointers = dict(x="*bf16", codes="*u8", scales="*u8", M="i32", pitch="i32") | ({"t": "*bf16"} if block else {})
    pointers |= {"feedback": "*bf16"} if feeds_back else {}
    limit = 7.0 if prologue == "swiglu_oai" else 0.0
    rows = torch.empty(1, 8192 if limit else 4096, dtype=torch.bfloat16, device="meta")
    t = rows.new_empty(4096 // block, block, block) if block else None
    sm = triton_tiles.instructions(divmod(cc, 10))
    how = dict(prologue=prologue, limit=limit, feeds_back=feeds_back)
    spec = triton_spec.make_spec(rows, t, None, format, rule, tile, sm, **how)
    spec = spec._replace(
        words=triton_tiles.words(tile, spec.fp32_dot, block, 4096) if words is None else words,
        pdl=cc >= 90 if pdl is None else pdl,
    )
    absent = ("t", "feedback", "global_scale", "up", "weight", "bias", "mean", "scale", "kept")
    constants = dict.fromkeys(absent) | dict(up_pitch=0, late=1)
    pointers |= {} if pdl is False else dict(late="i32")
    constants |= spec._asdict() if flat else dict(SPEC=spec)
    kernel = flat or triton_quantize.transform_quantize_kernel
    return compile_kernel(kernel, pointers, constants, cc, tile.warps, fusion=False)


def compile_norm(k, plan, cc, keep=False):
    tile, own = plan.tile, plan.way == "own"
    pointers = dict(
        x="*bf16", weight="*bf16", t="*bf16", codes="*u8", scales="*u8", M="i32", lead="i32", pitch="i32", late="i32"
    )
    pointers |= dict(eps="fp32") | ({} if own else dict(scale="*fp32", counters="*i32"))
    pointers |= dict(kept="*bf16") if keep else {}
    rows = torch.empty(1, k, dtype=torch.bfloat16, device="meta")
    t = rows.new_empty(k // 32, 32, 32)
    sm = triton_tiles.instructions(divmod(cc, 10))
    spec = triton_spec.make_spec(rows, t, None, "mxfp4", "absmax", tile, sm, prologue="rms_rounded", pdl=cc >= 90)
    steps = triton_statistics.steps(k, plan.rows, tile.warps)
    constants = dict(
        dict.fromkeys(("up", "bias", "mean", "scale", "kept", "counters", "feedback", "global_scale")),
        up_pitch=0,
        SPEC=spec._replace(words=triton_tiles.words(tile, spec.fp32_dot, 32, k)),
        SUMS=triton_statistics.Sums(k, plan.rows, steps, centered=False, eps_tensor=False, sm=sm),
    )
    return compile_kernel(triton_norm.norm_quantize_kernel, pointers, constants, cc, tile.warps, fusion=False)


def compile_tokens(activation, m, k, block, cc, prologue=None, lanes=False):
    """The quantizer of activations of 8 or 16 bits, for x bf16 [m, k]."""
    tile, tiles = triton_tokens.choose_tokens(m, k, block, activation)
    pointers = dict(x="*bf16", codes="*bf16", M="i32", pitch="i32") | ({"t": "*bf16"} if block else {})
    if activation == "fp8":
        pointers |= dict(codes="*u8", scales="*fp32", maxima="*i32", counters="*i32")
    if prologue:
        pointers |= dict(up="*bf16", up_pitch="i32")
    rows = torch.empty(1, k, dtype=torch.bfloat16, device="meta")
    t = rows.new_empty(k // block, block, block) if block else None
    sm = triton_tiles.instructions(divmod(cc, 10))
    rule = "absmax" if activation in FORMATS else ""
    spec = triton_spec.make_spec(rows, t, None, activation, rule, tile, sm, prologue=prologue, pdl=cc >= 90)
    constants = dict.fromkeys(("t", "feedback", "up", "global_scale", "scales", "maxima", "counters")) | dict(
        up_pitch=0, TILES=tiles
    )
    constants |= dict(LANES=lanes, LATE=lanes and m <= 64, SPEC=spec)
    return compile_kernel(triton_tokens.token_kernel, pointers, constants, cc, tile.warps, fusion=False)


def choices(format, capability):
    """(kernel, shape) of every kernel that can be chosen there; kernels that differ only in split_k count once."""
    found = {}
    for rows, (n, k) in itertools.product(ROWS, SHAPES):
        kernel = triton_choose.choose(format, rows, n, k, capability)
        if not isinstance(kernel, str):
            split = isinstance(kernel, triton_choose.Fused | triton_choose.Hopper)
            tile = kernel._replace(split_k=min(kernel.split_k, 2)) if split else kernel
            found.setdefault(tile, (kernel, (n, k)))
    return found.values()


@BLACKWELL
@both
def test_products_are_native_on_blackwell(cc, format):
    """The block-scaled instruction, and none that would be its emulation."""
    capability = divmod(cc, 10)
    chosen = [c for c in choices(format, capability) if isinstance(c[0], triton_choose.Scaled)]
    if cc == 121 and triton_choose.triton_version() < (3, 9):
        assert not chosen, "Triton 3.6 emulates FP4 on sm_121: nothing may be left to it"
        return
    assert chosen
    instruction = r"tcgen05\.mma\S*kind::mxf4\S*block_scale" if cc < 120 else r"mma\.sync\S*kind::mxf4\S*block_scale"
    kind = {"mxfp4": r"(2X|block32)", "nvfp4": r"(4X|block16)"}[format]
    for kernel, (n, k) in chosen:
        compiled = compile_linear(format, n, k, kernel, cc)
        found = set(re.findall(r"(?:tcgen05\.mma|mma\.sync|wgmma\.mma)\S+", compiled.asm["ptx"]))
        assert found and all(re.match(instruction, f) and re.search(kind, f) for f in found), (kernel, found)
        code = sass(compiled)
        if code:
            assert ("UTCOMMA" if cc < 120 else "OMMA.SF") in code
            assert not re.search(r"\b(HMMA|UTCHMMA|HGMMA)\b", code)


def test_a_silent_fallback_is_seen():
    """The check above can fail: 64 rows on sm_100 become f16 without a warning."""
    compiled = compile_linear("mxfp4", 4096, 4096, triton_choose.Scaled(64, 64, 256, 4, 3), 100)
    assert "kind::f16" in compiled.asm["ptx"] and "block_scale" not in compiled.asm["ptx"]


@BLACKWELL
@both
@pytest.mark.parametrize("feeds_back", [False, True])
def test_quantizers_are_native_on_blackwell(cc, format, feeds_back):
    tile = triton_tiles.Tile(64, 64, 1, 1, 4)
    compiled = compile_quantize(format, cc, FORMATS[format].group_size, tile, feeds_back=feeds_back)
    assert "cvt.rn.satfinite.e2m1x2.f32" in compiled.asm["ptx"]
    code = sass(compiled)
    if code:
        assert "F2FP.SATFINITE.E2M1" in code


@functools.cache
def hopper(format, kernel, n, k):
    compiled = compile_linear(format, n, k, kernel, 90)
    return sass(compiled), compiled.metadata.shared


def main_loops(code: str, products: int = 1) -> list[str]:
    """The innermost loops around so many of the tensor core's instructions: one for each warpgroup with code of its
    own."""
    lines = code.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L_x")}
    found_at = [i for i, line in enumerate(lines) if re.search(r"GMMA\.|UTCHMMA", line)]
    loops: dict[frozenset, tuple[int, int]] = {}
    for i, line in enumerate(lines):
        jump = re.search(r"BRA `\((\.L_x_\d+)\)", line)
        inside = frozenset(at for at in found_at if labels[jump[1]] < at < i) if jump else frozenset()
        if len(inside) >= products and (
            inside not in loops or i - labels[jump[1]] < loops[inside][1] - loops[inside][0]
        ):
            loops[inside] = labels[jump[1]], i
    inner = (span for found, span in loops.items() if not any(other < found for other in loops))
    return ["\n".join(lines[a:b]) + "\n" for a, b in sorted(inner)]


def overwritten_too_early(loop: str) -> list[str]:
    """Instructions that write a register which an earlier product may still read. A product reads its left operand
    until the wait. The ptxas of Triton 3.6 makes such code, with wrong results; the one of 3.9 has not been seen to."""
    reading, found = set(), []
    for line in loop.splitlines():
        instruction = re.search(r"\*/\s+(?:@!?U?P\d+ )?([A-Z]\S*)\s+(?:U?P\d+, )?(.*)", line)
        if not instruction:
            continue
        opcode, operands = instruction.groups()
        registers = [int(r) for r in re.findall(r"\bR(\d+)", operands)]
        if opcode.startswith("WARPGROUP.DEPBAR"):
            reading.clear()
        elif "GMMA." in opcode:
            reading.update(range(registers[1], registers[1] + 4))
        elif operands.startswith("R") and registers and not opcode.startswith(("ST", "RED")):
            written = 4 if ".128" in opcode else 2 if re.search(r"\.64|WIDE", opcode) else 1
            if reading & set(range(registers[0], registers[0] + written)):
                found.append(line.strip())
    return found


def nothing_runs_on(loop: str) -> bool:
    """Whether the loop waits for its last product. Then no ptxas can reuse the product's registers too early."""
    last = re.findall(r"GMMA\.|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d+", loop)[-1]
    return last.endswith("gsb0, 0x0")


def test_overwritten_registers_are_seen():
    """The check below can fail: the second product's operand is written before the wait."""
    code = """
        /*0010*/ QGMMA.64x128x32.F32.E5M2.E5M2 R24, R88, gdesc[UR16], R24 ;
        /*0020*/ QGMMA.64x128x32.F32.E5M2.E5M2 R24, R96, gdesc[UR12], R24, gsb0 ;
        /*0030*/ LDS.128 R12, [R18+0x18000] ;
        /*0040*/ IMAD.MOV.U32 R97, RZ, RZ, 0x2020200 ;
        /*0050*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/ IMAD.MOV.U32 R96, RZ, RZ, 0x4040404 ;"""
    (found,) = overwritten_too_early(code)
    assert "R97" in found


# Registers that spill to local memory, of the 112 that each of four warpgroups has. Another tile is not faster (an
# H100's tuning run).
SPILLED = {triton_choose.Hopper(256, 128, 4, 1, 4): 12}


@both
def test_hopper_products_stay_in_registers(format):
    """Weights go from the decoder's registers to the tensor core, x from where it was loaded to. The loop stores
    nothing in
    shared memory and spills nothing: either would cost several times the computation."""
    for kernel, (n, k) in choices(format, (9, 0)):
        code, shared = hopper(format, kernel, n, k)
        assert shared <= 227 * 1024, kernel
        if isinstance(kernel, triton_choose.Fused):
            products = re.findall(r"[QH]GMMA\.\S+ R\d+, (\S+),", code)
            assert products and all(p.startswith("R") for p in products), kernel
            (loop,) = main_loops(code)
            assert not re.search(r"\b(STL|LDL)\b" if kernel.packed else r"\b(STL|LDL|STS)\b", loop), kernel
            assert not overwritten_too_early(2 * loop), kernel
            assert nothing_runs_on(loop), kernel
        elif isinstance(kernel, triton_choose.Hopper):
            # A step is 128 channels of 64 weight rows for each warpgroup: 4 products in fp8, 8 in bf16. 192 rows of x
            # take twice as many.
            expected = (4 if format == "mxfp4" else 8) * (1 + (kernel.block_m == 192))
            loops = main_loops(code, expected)
            assert len(loops) == kernel.warpgroups and "UTMALDG" in code, kernel
            for loop in loops:
                products = re.findall(r"[QH]GMMA\.\S+ R\d+, (\S+),", loop)
                assert len(products) == expected and all(p.startswith("R") for p in products), kernel
                assert "STS" not in loop and len(re.findall(r"\b(?:STL|LDL)\b", loop)) <= SPILLED.get(kernel, 0), kernel
                assert not overwritten_too_early(2 * loop), kernel
                assert nothing_runs_on(loop), kernel
        else:
            assert "IDP" in code and "STL" not in code  # dp4a


@pytest.mark.parametrize(
    "cc, format, kernel",
    [
        (90, "mxfp4", triton_choose.Gemv(8, 1024, 4)),
        (90, "mxfp4", triton_choose.Fused(64, 16, 256, 2, 4, 4, True)),
        (80, "mxfp4_bf16", triton_choose.Fused(64, 64, 128, 1, 4, 3, False)),
        (90, "mxfp4", triton_choose.Hopper(128, 128, 2, 4, 6)),
        (90, "mxfp4", triton_choose.Hopper(128, 192, 2, 1, 6)),
        (90, "mxfp4_bf16", triton_choose.Hopper(128, 64, 2, 2, 7)),
        (90, "nvfp4", triton_choose.Hopper(256, 32, 4, 1, 7)),
        (90, "int8", triton_choose.HOPPER_INT8[0]),
        (90, "int4", triton_choose.Int4(64, 16, 4, 3)),
        (100, "mxfp4", triton_choose.Scaled(128, 64, 256, 4, 3)),
    ],
    ids=str,
)
def test_factors_of_weight_rows_are_read_behind_the_sums(cc, format, kernel):
    """Beside a kernel with one scale there are loads of 16 bits, none of them in the main loops, which spill nothing
    and keep the registers of products."""
    products, counts = 1, {}
    if isinstance(kernel, triton_choose.Hopper):
        products = (4 if format == "mxfp4" else 8) * (1 + (kernel.block_m == 192))
    for gw in ("*fp32", "*bf16"):
        activation = "none" if format == "int8" else "same"
        compiled = compile_linear(format, 4095, 4096, kernel, cc, activation=activation, gw=gw)
        loops = main_loops(sass(compiled), products)
        loads = [len(re.findall(r"\bLDG\.E\.U16\b", loop)) for loop in loops]
        counts[gw] = len(re.findall(r"ld\.global\S*\.b16", compiled.asm["ptx"])), loads
        assert not any(re.search(r"\b(STL|LDL)\b", loop) for loop in loops), gw
        if cc == 90 and format != "int4":
            assert all(not overwritten_too_early(2 * loop) and nothing_runs_on(loop) for loop in loops), gw
    assert counts["*bf16"][0] > counts["*fp32"][0] and counts["*bf16"][1] == counts["*fp32"][1]


@pytest.mark.parametrize("cc", [80, 90, 100])
def test_sums_of_the_library_are_read_in_wide_loads(cc):
    """Once, four in a load; a weight row's factor is inverted once for several rows of x."""
    pointers = dict(y="*fp32", unit="*fp32", gw="*bf16", bias="*bf16", residual="*bf16", out="*bf16", M="i32")
    constants = PLAIN | dict(N=4096, UNIT=True, SCALED_W=True, BIAS=True, RESIDUAL=True, ROWS=4, COLUMNS=512)
    ptx = compile_kernel(finish_kernel, pointers, constants, cc, 4).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 4 + 2  # a thread's 16 sums, and residuals
    assert len(re.findall(r"div\.\S*f32", ptx)) == 4
    assert not re.search(r"\.local\b", ptx)


@pytest.mark.parametrize("rows", [1, 2])
def test_two_programs_of_a_few_rows_fit_a_multiprocessor(rows):
    """8 warps with 128 registers a thread take half of its registers. The launch asks for that; no loop spills."""
    kernel = triton_choose.choose("mxfp4", rows, 4096, 14336)
    assert isinstance(kernel, triton_choose.Gemv) and kernel.warps == 8
    pointers = dict(x="*i32", x_scales="*u8", w="*i32", w_scales="*u8", gw="*bf16", out="*bf16")
    tile = dict(N=4096, K=14336, M=rows, FORMAT="mxfp4", BLOCK_N=kernel.block_n, BLOCK_K=kernel.block_k, PDL=True)
    compiled = compile_kernel(gemv_kernel, pointers, PLAIN | tile | dict(SCALED_W=True), 90, 8, maxnreg=128)
    code = sass(compiled)
    lines = code.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".L_x")}
    jumps = [(i, re.search(r"BRA `\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines)]
    start, stop = max(((labels[to[1]], i) for i, to in jumps if to), key=lambda span: span[1] - span[0])
    assert stop - start > 300  # the loop over K
    assert not re.search(r"\b(STL|LDL)\b", "\n".join(lines[start:stop]))


@pytest.mark.parametrize("rule", FORMATS["nvfp4"].scale_rules)
@pytest.mark.parametrize("block, tile", [(0, (16, 256, 1, 1, 4)), (16, (64, 64, 4, 3, 4))])
def test_no_fp8_conversion_in_the_nvfp4_quantizer(rule, block, tile):
    """ptxas 12.8 and 12.9 get e4m3 round trips wrong on sm_90: the scales are rounded without the instruction."""
    code = sass(compile_quantize("nvfp4", 90, block, triton_tiles.Tile(*tile), rule))
    assert code and not re.search(r"E4M3|UNPACK_B", code)


@pytest.mark.parametrize("cc", [90, 100])
def test_instructions_a_value_of_the_nvfp4_quantizer(cc):
    """In the loop over whole tiles, 32 values a thread (docs/notebook/quantize_kernel.md). A squared error takes about
    10; `search` has four of them and `mse` two."""
    tile, counts = triton_tiles.Tile(64, 64, 6, 4, 4), {}
    for rule in ("mse", "search"):
        code = sass(compile_quantize("nvfp4", cc, 16, tile, rule))
        if not code:
            pytest.skip(f"Triton's disassembler does not know sm_{cc}")
        loop = main_loops(code)[0]
        counts[rule] = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s", loop)) / 32
        assert not re.search(r"\b(STL|LDL)\b", code), rule
    print(f"sm_{cc}:", ", ".join(f"{rule} {count:.1f}" for rule, count in counts.items()))
    assert counts["mse"] < 37 and counts["search"] < 62


@both
@pytest.mark.parametrize("cc", [80, 89, 90, 100, 120])
def test_rounding_with_feedback_stays_in_registers(cc, format):
    """Nothing spills, and what errors add is computed by tensor cores."""
    tile = triton_tiles.Tile(64, 64, 6, 4, 4)
    code = sass(compile_quantize(format, cc, FORMATS[format].group_size, tile, "mse", feeds_back=True))
    if not code:
        pytest.skip(f"Triton's disassembler does not know sm_{cc}")
    assert re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", code) and not re.search(r"\b(STL|LDL)\b", code)


def test_weights_are_read_before_the_kernel_in_front_has_ended():
    """Between two waits, the first of which a launch may skip; x comes behind the second."""
    code = sass(compile_quantize("mxfp4", 90, 32, triton_tiles.Tile(16, 64, 1, 1, 1), "mse", feeds_back=True))
    before, between, behind = (part.count("LDG.E") for part in code.split("ACQBULK"))
    assert before == 0 and between == 16 + 48 and behind > 0


@both
def test_instructions_of_rounding_with_feedback(format):
    """In the loop over whole tiles on Hopper: 9 to find the error of three values in four, one to subtract what errors
    add to a value. No value moves between threads, and no operand of the products is stored again."""
    block, tile, counts = FORMATS[format].group_size, triton_tiles.Tile(64, 64, 6, 4, 4), {}
    for feeds_back in (False, True):
        loop = main_loops(sass(compile_quantize(format, 90, block, tile, "mse", feeds_back=feeds_back)))[0]
        number, *moved = (len(re.findall(p, loop)) for p in (r"/\*[0-9a-f]{4,}\*/\s", r"\bSTS", r"\bLDS", r"\bSHFL"))
        counts[feeds_back] = number / 32, moved
    print(f"{format}: {counts[False][0]:.1f} instructions a value, {counts[True][0]:.1f} with feedback")
    assert counts[True][1] == counts[False][1]
    assert counts[True][0] < counts[False][0] + 9


def bare(compiled) -> str:
    """PTX without the kernel's name and without line information."""
    ptx = re.split(r"\n\s*\.(?:file|section)\b", compiled.asm["ptx"])[0].replace(compiled.name, "")
    lines = (line.split("//")[0].strip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line and not re.match(r"\.loc\b|\$L__(tmp|func)", line))


@pytest.mark.parametrize("block, feeds_back", [(0, False), (16, False), (16, True)])
def test_a_packaged_quantizer_compiles_from_its_text_alone(block, feeds_back, tmp_path, monkeypatch):
    """Inductor compiles a copy of the sources, in which the fields of a `Spec` come one by one: to the same code."""
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as text_of

    tile = triton_tiles.choose_tile(100, 4096, block)
    how = dict(words=0, pdl=False, feeds_back=feeds_back)
    want = bare(compile_quantize("nvfp4", 90, block, tile, "mse", **how))
    kernel = triton_quantize.flat_transform_quantize_kernel
    imports = "import triton, triton.language as tl\nfrom triton.language.extra import libdevice\n"
    (tmp_path / "copied_kernel.py").write_text(imports + "@triton.jit\n" + text_of(kernel))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "copied_kernel", raising=False)
    import copied_kernel

    for flat in (kernel, copied_kernel.flat_transform_quantize_kernel):
        assert bare(compile_quantize("nvfp4", 90, block, tile, "mse", **how, flat=flat)) == want
    assert bare(compile_quantize("nvfp4", 90, block, tile, "absmax", **how)) != want


def test_each_spec_has_a_kernel_of_its_own():
    """Triton's keys, in memory and on disk, tell apart two specs that differ in one field."""
    from triton.runtime.jit import compute_cache_key

    rows = torch.empty(1, 4096, dtype=torch.bfloat16, device="meta")
    tile = triton_tiles.Tile(64, 64, 1, 1, 4)
    spec = triton_spec.make_spec(rows, None, None, "mxfp4", "mse", tile, 90)
    others = [
        spec._replace(**{name: not value if value in (0, 1) else "other" if isinstance(value, str) else 7})
        for name, value in spec._asdict().items()
    ]
    kernel, memory, disk = triton_quantize.transform_quantize_kernel, set(), set()
    signature = {p.name: "constexpr" for p in kernel.params}
    for one in (spec, *others):
        memory.add(compute_cache_key({}, [("constexpr", one)], {}))
        disk.add(ASTSource(kernel, signature, dict.fromkeys(signature) | dict(SPEC=one), {}).hash())
    assert len(memory) == len(disk) == len(spec) + 1
    assert compute_cache_key({}, [("constexpr", spec._replace())], {}) in memory


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("k", [128, 256, 512, 1024, 4096])
def test_an_upcast_reduces_where_lanes_are_neighbours(k, lanes):
    """Triton 3.6 exchanges values with the wrong lanes where the lanes of a row are not neighbours. In the layout of
    the steps, the largest scale of a row of 256 or 512 channels was the largest of one half. A vector has no such
    layout."""
    from wush_compile.kernels.triton.linear.upcast import upcast_fp8_kernel

    pointers = dict(codes="*i32", scales="*u8", unit="*fp32", out="*i32", T="i32")
    groups = triton.next_power_of_2(k // 32)
    constants = dict(g=None, index=None, K=k, ROW_GROUPS=groups, E4M3=False, SCALED=False, GROUPS=min(groups, 32))
    constants |= dict(LANE_ORDER=lanes, PDL=True)
    text = compile_kernel(upcast_fp8_kernel, pointers, constants, 90, 4).asm["ttgir"]
    reduced = re.findall(r"\}\) : \(tensor<([^>]*?), #", text)
    assert reduced == [f"{groups}xi32"], reduced


@pytest.mark.parametrize("k", [576, 4096, 14336])
def test_rows_are_read_in_wide_loads_for_a_norm(k):
    """16 bytes a load, most of them asked for before the first is needed, nothing spilled; and the quantizer's product
    takes what the norm leaves in registers."""
    for plan in dict.fromkeys(triton_norm.choose_plan(m, k, 32) for m in (1, 2, 4, 16, 64, 1024, 4096, 8192)):
        code = sass(compile_norm(k, plan, 90))
        asked = min(16, -(-k // 1024) * 4 * plan.rows // plan.tile.warps)
        assert code.count("LDG.E.128") >= asked and not re.search(r"\b(STL|LDL)\b", code), plan
        if plan.way == "ahead":
            assert re.search(r"\b(RED|ATOM)G?\.E\.ADD\.STRONG\.GPU", code) and "EXCH.STRONG.GPU" in code, plan
            products = re.findall(r"GMMA\.\S+ R\d+, (\S+),", code)
            assert all(p.startswith("R") for p in products), plan
            order = re.findall(r"LDG\.E\.128|FFMA", code)
            together = max(len(list(run)) for name, run in itertools.groupby(order) if name != "FFMA")
            assert together >= asked // 2, (plan, together, asked)


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_a_norm_that_is_kept_spills_nothing(rows):
    code = sass(compile_norm(4096, triton_norm.choose_plan(rows, 4096, 32), 90, keep=True))
    assert "STG.E" in code and not re.search(r"\b(STL|LDL)\b", code)


def test_silu_of_bf16_divides_by_the_hardware():
    tile = triton_tiles.Tile(64, 64, 6, 3, 4)
    code = sass(compile_quantize("mxfp4", 90, 32, tile, prologue="silu"))
    assert "MUFU.EX2" in code and "MUFU.RCP" in code and "FCHK" not in code  # the check in front of a true division
    assert "FCHK" in sass(compile_quantize("mxfp4", 80, 32, tile, prologue="silu"))


@pytest.mark.parametrize("cc", [80, 90, 100, 120])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_spill_next_to_nothing(kind, cc):
    """Nothing but on sm_120: there gelu_new keeps four words in memory."""
    tile = triton_tiles.choose_tile(4096, 4096, 32)
    compiled = compile_quantize("mxfp4", cc, 32, tile, prologue=kind)
    assert len(re.findall(r"\b(?:STL|LDL)\b", sass(compiled))) <= (8 if cc == 120 else 0)


@pytest.mark.parametrize("cc", [90, 100])
def test_a_clamped_gate_spills_nothing(cc):
    """It reads gate and up, which alternate, 16 bytes at once."""
    code = sass(compile_quantize("mxfp4", cc, 32, triton_tiles.choose_tile(4096, 4096, 32), prologue="swiglu_oai"))
    assert not re.search(r"\b(STL|LDL)\b", code)
    assert re.search(r"LDGSTS\S*\.128", code) and not re.search(r"LDG\S*\.U16", code)


@pytest.mark.parametrize("cc", [80, 86, 89])
def test_older_gpus_quantize(cc):
    for format, (m, wide) in itertools.product(("mxfp4", "nvfp4"), ((1, True), (4096, True), (4096, False))):
        block = FORMATS[format].group_size if wide else 0
        tile = triton_tiles.choose_tile(m, 4096, block)
        assert compile_quantize(format, cc, block, tile).metadata.shared <= SHARED[cc]


# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def registers(code: str) -> int:
    """Of a thread."""
    return 1 + max(int(r) for r in re.findall(r"\bR(\d+)\b", code))


@pytest.mark.parametrize("decoded", ["mxfp4_bf16", "nvfp4"])
@pytest.mark.parametrize("cc", [80, 86, 89])
def test_what_is_counted_of_older_gpus(cc, decoded):
    """Shared memory and registers are what the tables say at most, and nothing is kept in memory instead."""
    tiles = list(triton_older.TILES.values())
    for tile in tiles if cc == 89 else tiles[-1:]:
        kernel = triton_choose.Fused(tile.block_n, tile.block_m, tile.block_k, 2, tile.warps, tile.stages, False)
        compiled = compile_linear(decoded, 4096, 4096, kernel, cc, activation="none")
        code = sass(compiled)
        assert compiled.metadata.shared <= tile.shared <= SHARED[cc], tile
        assert registers(code) <= tile.registers and not re.search(r"\b(STL|LDL)\b", code), (tile, registers(code))


def test_parts_follow_the_multiprocessors():
    """As many programs as a device can hold at once where K gives them; fewer parts on a smaller one."""
    sizes = 16, 4096, 4096
    parts = {sms: triton_older.fused(*sizes, (8, 9), sms)[1] for sms in (24, 58, 76, 128, 142)}
    assert list(parts.values()) == sorted(parts.values()) and parts[24] < parts[142]
    assert triton_choose.choose("mxfp4", *sizes, (8, 9), multiprocessors=24).split_k == parts[24]
    for sms, split in parts.items():
        tile, _ = triton_older.fused(*sizes, (8, 9), sms)
        slots = sms * triton_older.resident(tile, (8, 9))
        costs = {p: triton_older.cost(tile, p, *sizes, slots) for p in (1, 2, 4, 8)}
        assert costs[split] == min(costs.values())
    assert triton_older.resident(triton_older.TILES[16], (8, 0)) > triton_older.resident(triton_older.TILES[16], (8, 9))
    assert triton_choose.choose("nvfp4", 129, 4096, 4096, (8, 0)) == "bf16"
    assert isinstance(triton_choose.choose("mxfp4", 5, 4096, 4096, (8, 0)), triton_choose.Fused)


EVERY = {
    (cc, format): [c for c in choices(format, divmod(cc, 10)) if not isinstance(c[0], triton_choose.Hopper)]
    for cc in SHARED
    for format in ("mxfp4", "nvfp4")
}
WHOLE = bool(os.environ.get("WUSH_EVERY_KERNEL"))


@pytest.mark.parametrize("cc, format", EVERY)
def test_every_kernel_that_can_be_chosen_fits(cc, format):
    """Shared memory and registers, without spills. One choice in eight; all with WUSH_EVERY_KERNEL=1 in the
    environment. Gluon's are above."""
    for kernel, (n, k) in EVERY[cc, format] if WHOLE else EVERY[cc, format][:: 8 if cc < 100 else 4]:
        fused = isinstance(kernel, triton_choose.Fused)
        decoded = triton_choose.decoded_format(format, "same", divmod(cc, 10)) if fused else format
        compiled = compile_linear(decoded, n, k, kernel, cc)
        assert compiled.metadata.shared <= SHARED[cc], kernel
        code = sass(compiled)
        if code:
            assert registers(code) <= 255 and not re.search(r"\b(STL|LDL)\b", code), kernel


# 8 or 16 bits: (what the weight is decoded to, activation) -> the tensor core's instruction on Hopper.
DECODED = {
    ("mxfp4", "fp8"): "e5m2.e4m3",
    ("mxfp4_bf16", "none"): "bf16.bf16",
    ("nvfp4", "fp8"): "bf16.bf16",
    ("nvfp4", "none"): "bf16.bf16",
}
# The tile that NVFP4 has too, with two more registers for the scales of the weight's rows.
SPILLED_MXFP4 = {triton_choose.Hopper(256, 128, 4, 1, 4): 20}


@pytest.mark.parametrize("decoded, activation", DECODED)
def test_wide_activations_meet_weights_in_registers(decoded, activation):
    """MXFP4 times fp8 is one product of e5m2 and e4m3: nothing is converted, and the weights come from registers."""
    fp8 = decoded == "mxfp4"
    tiles = [triton_choose.Fused(64, 16, 256, 4, 4, 3, False), triton_choose.Fused(128, 64, 128, 1, 8, 3, False)]
    tiles += [triton_choose.Hopper(128, 192, 2, 1, 3), triton_choose.Hopper(256, 128, 4, 1, 4)]
    for kernel in tiles:
        compiled = compile_linear(decoded, 4096, 4096, kernel, 90, activation=activation)
        instructions = set(re.findall(r"wgmma\.mma_async\S+", compiled.asm["ptx"]))
        assert instructions and all(i.endswith(f".f32.{DECODED[decoded, activation]}") for i in instructions), kernel
        assert compiled.metadata.shared <= 227 * 1024, kernel
        expected = 1
        if isinstance(kernel, triton_choose.Hopper):
            expected = (4 if fp8 else 8) * (1 + (kernel.block_m == 192))
        spilled = (SPILLED_MXFP4 if decoded == "mxfp4_bf16" else SPILLED).get(kernel, 0)
        loops = main_loops(sass(compiled), expected)
        assert len(loops) == getattr(kernel, "warpgroups", 1), kernel
        for loop in loops:
            products = re.findall(r"[QH]GMMA\.\S+ R\d+, (\S+),", loop)
            assert products and all(p.startswith("R") for p in products), kernel
            assert not re.search(r"\bSTS\b", loop), kernel
            assert len(re.findall(r"\b(?:STL|LDL)\b", loop)) <= spilled, kernel
            assert not overwritten_too_early(2 * loop) and nothing_runs_on(loop), kernel


@pytest.mark.parametrize("cc", [80, 89])
@pytest.mark.parametrize("decoded", ["mxfp4_bf16", "nvfp4"])
def test_wide_activations_on_older_gpus(cc, decoded):
    for rows in (1, 64, 128):
        kernel = triton_choose.choose_decoding(decoded, rows, 4096, 4096, divmod(cc, 10))
        compiled = compile_linear(decoded, 4096, 4096, kernel, cc, activation="fp8")
        assert re.search(r"mma\.sync\S*\.f32\.bf16\.bf16\.f32", compiled.asm["ptx"])
        assert compiled.metadata.shared <= (163 if cc == 80 else 99) * 1024, kernel


@pytest.mark.parametrize("cc", [80, 89, 90])
@pytest.mark.parametrize("activation", ["fp8", "none", "nvfp4"])
def test_quantizers_of_wide_activations(cc, activation):
    """Nothing spills. fp8 is written by the instruction for it, and never read back, which ptxas gets wrong."""
    blocks = ((1, 32, None), (300, 32, "silu_mul"), (300, 0, None), (300, 16 if activation == "nvfp4" else 128, None))
    for m, block, prologue in blocks:
        compiled = compile_tokens(activation, m, 4096, block, cc, prologue, lanes=cc == 90 or activation in FORMATS)
        assert compiled.metadata.shared <= 99 * 1024
        code = sass(compiled)
        assert code and not re.search(r"\b(STL|LDL)\b|UNPACK_B", code), (m, block)
        assert ("E4M3.F32.PACK" in code) == (activation == "fp8" and cc >= 89)


@pytest.mark.parametrize("cc", [80, 90, 120])
def test_int4_runs_on_int8_tensor_cores(cc):
    for kernel, (n, k) in choices("int4", divmod(cc, 10)):
        compiled = compile_linear("int4", n, k, kernel, cc)
        assert re.search(r"(mma\.sync\S*|wgmma\S*)\.s32\.s8\.s8", compiled.asm["ptx"]), (cc, kernel)
        assert compiled.metadata.shared <= (163 if cc == 80 else 99) * 1024


def test_choice_is_a_pure_function_of_the_shape():
    assert triton_choose.choose("mxfp4", 1, 4096, 4096) == triton_choose.choose("mxfp4", 1, 4096, 4096, (9, 0))
    assert triton_choose.choose("mxfp4", 3000, 4096, 4096, portable=True) == "library"
    assert triton_choose.has_gluon() and isinstance(
        triton_choose.choose("mxfp4", 300, 4096, 4096), triton_choose.Hopper
    )
    assert isinstance(triton_choose.choose("mxfp4", 100, 4096, 4096, precise=True), triton_choose.Fused)
    assert triton_choose.choose("mxfp4", 300, 128, 576) == "bf16"
    sizes = (*ROWS, 3, 5, 24, 48, 96, 192, 256, 384, 768, 1024, 1536, 2048, 4096)
    for rows, (n, k), format in itertools.product(sizes, (*SHAPES, (6144, 4096), (4096, 640)), ("mxfp4", "nvfp4")):
        kernel = triton_choose.choose(format, rows, n, k)
        if isinstance(kernel, triton_choose.Fused):
            assert k % (kernel.block_k * kernel.split_k) == 0
        if isinstance(kernel, triton_choose.Hopper):
            assert kernel.split_k <= k // 128


@pytest.mark.parametrize("kernel", triton_choose.HOPPER_INT8)
def test_hopper_products_with_weights_of_eight_bits_stay_in_registers(kernel):
    compiled = compile_linear("int8", 128256, 4096, kernel, 90, activation="none")
    code, expected = sass(compiled), 8 * (1 + (kernel.block_m == 192))
    loops = main_loops(code, expected)
    assert len(loops) == kernel.warpgroups and compiled.metadata.shared <= 227 * 1024
    for loop in loops:
        products = re.findall(r"HGMMA\.\S+ R\d+, (\S+),", loop)
        assert len(products) == expected and all(p.startswith("R") for p in products)
        assert "LDS.128" in loop and not re.search(r"\b(STS|STL|LDL)\b", loop)
        assert not overwritten_too_early(2 * loop) and nothing_runs_on(loop)


@pytest.mark.parametrize("cc", [80, 90])
def test_weights_of_eight_bits(cc):
    """No spills; `gemv`'s loop has no barrier, and the product for more rows runs on tensor cores."""
    n, k = 128256, 4096
    tile = triton_choose.choose_int8(1, n, k)
    pointers = dict(x="*i64", w="*i32", w_scales="*bf16", out="*bf16")
    common = PLAIN | dict(unit=None, N=n, K=k, UNIT=False, PDL=cc >= 90)
    blocks = dict(X=triton.language.bfloat16, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k)
    code = sass(compile_kernel(int8_gemv_kernel, pointers, common | blocks, cc, tile.warps))
    loop = code[: code.index("BRA")]
    assert "LDL" not in code and "LDG.E.128" in loop and "BAR.SYNC" not in loop
    tile = triton_choose.choose_int8(16, n, k)
    pointers = dict(x="*bf16", w="*i8", w_scales="*bf16", out="*bf16", M="i32")
    blocks = dict(BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, STAGES=tile.stages)
    code = sass(compile_kernel(int8_gemm_kernel, pointers, common | blocks, cc, tile.warps, tile.stages))
    assert "LDL" not in code and ("HGMMA" if cc == 90 else "HMMA") in code
