"""Weights of 8 bits times activations of 16 bits; runs on any GPU with bf16 tensor cores (sm_80 and later).

gemv     one row: fp32 products of the integers, each half group's sum times its scale
gemm     up to 64 rows: code · scale in the dtype of the activations, in front of the tensor core
upcast   the same in memory, for the library's product of more rows (`library.py`)

Few rows take as long as reading the weight. So `gemv` reads the next tile of codes while it multiplies one.
"""

import triton
import triton.language as tl

from ..common.epilogue import finish
from ..common.overlap import start_next, wait_inputs

G, HALF = tl.constexpr(32), tl.constexpr(16)


@triton.jit
def _wide(word):
    """A word of four codes -> their values in fp32. Behind the exponent of 2^23 a byte is a number without a
    conversion, which most GPUs do at an eighth of the speed of a sum."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t, a, b, c, d;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 a, t, 0x4B000000, 0x7440;
        prmt.b32 b, t, 0x4B000000, 0x7441;
        prmt.b32 c, t, 0x4B000000, 0x7442;
        prmt.b32 d, t, 0x4B000000, 0x7443;
        add.f32 $0, a, 0fCB000080;
        add.f32 $1, b, 0fCB000080;
        add.f32 $2, c, 0fCB000080;
        add.f32 $3, d, 0fCB000080; }""",
        "=f,=f,=f,=f,r",
        [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _load_words(w, w_scales, row, first, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes as words int32 [BLOCK_N, BLOCK_K/4], and the scale of each half group, [BLOCK_N, BLOCK_K/16]; zeros beyond
    K. A thread holds half a group: 16 bytes."""
    word = first // 4 + tl.arange(0, BLOCK_K // 4)
    half = first // HALF + tl.arange(0, BLOCK_K // HALF)
    if K % BLOCK_K == 0:
        codes = tl.load(w + row * (K // 4) + word[None, :])
        return codes, tl.load(w_scales + row * (K // G) + half[None, :] // 2)
    codes = tl.load(w + row * (K // 4) + word[None, :], mask=(word < K // 4)[None, :], other=0)
    scales = tl.load(w_scales + row * (K // G) + half[None, :] // 2, mask=(half < K // HALF)[None, :], other=0.0)
    return codes, scales


@triton.jit
def _value(words, part: tl.constexpr, X: tl.constexpr):
    """One of the four 16-bit floats of type X in each int64, as fp32."""
    return ((words >> (16 * part)) & 0xFFFF).to(tl.uint16).to(X, bitcast=True).to(tl.float32)


@triton.jit
def _row(weights, x, first, X: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 [BLOCK_N, BLOCK_K/16]: the sums of half groups of `_wide` weights with a row of x, four values a word."""
    word = first // 4 + tl.arange(0, BLOCK_K // 4)
    values = tl.load(x + word) if K % BLOCK_K == 0 else tl.load(x + word, mask=word < K // 4, other=0)
    values = values[None, :]
    w0, w1, w2, w3 = weights
    y = w0 * _value(values, 0, X) + w1 * _value(values, 1, X)
    y += w2 * _value(values, 2, X)
    y += w3 * _value(values, 3, X)
    return tl.sum(tl.reshape(y, (BLOCK_N, BLOCK_K // HALF, HALF // 4)), axis=2)


@triton.jit
def int8_gemv_kernel(
    x,
    unit,
    w,
    w_scales,
    gw,
    bias,
    residual,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    X: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x int64 [1, K/4], four floats of type X each, unit fp32 [1] (UNIT), w int32 [N, K/4], w_scales bf16 [N, K/32]
    -> out [1, N]. Grid (tiles of N). Weights are read before the kernel waits for its inputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_K // HALF), tl.float32)
    codes, scales = _load_words(w, w_scales, row, 0, K, BLOCK_K)
    wait_inputs(PDL)
    start_next(PDL)
    for i in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=1):
        first = i * BLOCK_K
        weights, factor = _wide(codes), scales.to(tl.float32)
        if BLOCK_K < K:  # load the next step while this one computes; the last one reads the first again
            after = tl.where(first + BLOCK_K < K, first + BLOCK_K, 0)
            codes, scales = _load_words(w, w_scales, row, after, K, BLOCK_K)
        acc += _row(weights, x, first, X, K, BLOCK_N, BLOCK_K) * factor
    y = tl.sum(acc, 1)
    if UNIT:
        y *= tl.load(unit)
    finish(y, n, tl.zeros_like(n), N, None, gw, bias, residual, out, False, SCALED_W, BIAS, RESIDUAL, n < N)


@triton.jit
def _load_weights(w, w_scales, row, first, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes int8 [BLOCK_N, BLOCK_K] and scales bf16 [BLOCK_N, BLOCK_K/G]; zeros beyond K."""
    k = first + tl.arange(0, BLOCK_K)
    group = first // G + tl.arange(0, BLOCK_K // G)
    if K % BLOCK_K == 0:
        return tl.load(w + row * K + k[None, :]), tl.load(w_scales + row * (K // G) + group[None, :])
    codes = tl.load(w + row * K + k[None, :], mask=(k < K)[None, :], other=0)
    return codes, tl.load(w_scales + row * (K // G) + group[None, :], mask=(group < K // G)[None, :], other=0.0)


@triton.jit
def _decoded(codes, scales, dtype, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes [ROWS, COLUMNS] times the scales [ROWS, COLUMNS/G] of their groups, rounded to `dtype`."""
    values = tl.reshape(codes.to(tl.float32), (ROWS, COLUMNS // G, G)) * scales.to(tl.float32)[:, :, None]
    return tl.reshape(values, (ROWS, COLUMNS)).to(dtype)


@triton.jit(do_not_specialize=["M"])
def int8_gemm_kernel(
    x,
    unit,
    w,
    w_scales,
    gw,
    bias,
    residual,
    out,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """x 16-bit floats [M, K], unit fp32 [M] (UNIT), w int8 [N, K], w_scales bf16 [N, K/32] -> out [M, N].

    Grid (tiles of M times tiles of N)."""
    wait_inputs(PDL)
    start_next(PDL)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_m = tl.minimum(m, M - 1).to(tl.int64)
    row_n = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        codes, scales = _load_weights(w, w_scales, row_n, first, K, BLOCK_K)
        k = first + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            values = tl.load(x + row_m[:, None] * K + k[None, :])
        else:
            values = tl.load(x + row_m[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        acc = tl.dot(_decoded(codes, scales, values.dtype, BLOCK_N, BLOCK_K), tl.trans(values), acc)
    if UNIT:
        acc *= tl.load(unit + row_m)[None, :]
    mask = (m < M)[None, :] & (n < N)[:, None]
    finish(acc, n[:, None], m[None, :], N, None, gw, bias, residual, out, False, SCALED_W, BIAS, RESIDUAL, mask)


@triton.jit
def int8_upcast_kernel(w, w_scales, out, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """w int8 [N, K], w_scales bf16 [N, K/32] -> code · scale, out [N, K]. Grid (tiles of N, tiles of K)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    codes, scales = _load_weights(w, w_scales, row, first, K, BLOCK_K)
    values = _decoded(codes, scales, out.dtype.element_ty, BLOCK_N, BLOCK_K)
    tl.store(out + row * K + k[None, :], values, mask=(n < N)[:, None] & (k < K)[None, :])
