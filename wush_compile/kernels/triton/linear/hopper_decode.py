"""Registers of Hopper's product: layouts of a warpgroup's packed weights and scales, and the decoding in them (Gluon).

Decoded values must lie where `wgmma` expects its left operand, so that nothing moves between threads. The layouts below
say which thread holds which word of codes and which scale byte. `assert_trivial` in a conversion fails the compilation
if a value would have to move.

H is the number of halves of a scale row of a step: 1 with 4 words of codes a group (MXFP4), 2 with 2 words (NVFP4, and
MXFP4 decoded to bf16, where two lanes have the same scale)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common.decode import BF16_PTX, INT8_PTX, fp8_ptx


@gluon.constexpr_function
def step_words(FORMAT):
    """int32 words of codes of a step of 128 channels, in a weight row."""
    return 32 if FORMAT == "int8" else 16


@gluon.constexpr_function
def mma_layout(BLOCK_M, FORMAT):
    """A warpgroup's accumulator [64 or 128, BLOCK_M]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32 if FORMAT == "mxfp4" else 16])


@gluon.constexpr_function
def code_layout(ROWS, FORMAT):
    """Registers of packed weights [ROWS, 16 words (int8: 32), 4 bytes], rows as in `wgmma`'s left operand.

    A lane of four holds words of one scale group side by side: 4 words of a row (MXFP4), 2 in either half (NVFP4), or
    4 in either half (int8)."""
    words, lanes = ([1, 2], [4, 8]) if FORMAT == "mxfp4" else ([1, 8], [2, 4])
    if FORMAT == "int8":
        words, lanes = [1, 2, 16], [4, 8]
    registers = [[0, 0, 1], [0, 0, 2]] + [[0, w, 0] for w in words] + [[8, 0, 0]]
    return gl.DistributedLinearLayout(
        registers + ([[64, 0, 0]] if ROWS == 128 else []),
        [[0, w, 0] for w in lanes] + [[1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [ROWS, step_words(FORMAT), 4],
    )


@gluon.constexpr_function
def scale_layout(ROWS, FORMAT):
    """Registers of the scale bytes of these weights [ROWS, H, 4 lanes, words of codes]."""
    halves, words = (1, 4) if FORMAT == "mxfp4" else (2, step_words(FORMAT) // 8)
    registers = [[0, 0, 0, 1]] + ([[0, 0, 0, 2]] if words == 4 else []) + ([[0, 1, 0, 0]] if halves == 2 else [])
    registers += [[8, 0, 0, 0]]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        registers + ([[64, 0, 0, 0]] if ROWS == 128 else []),
        lanes,
        [[16, 0, 0, 0], [32, 0, 0, 0]],
        [],
        [ROWS, halves, 4, words],
    )


@gluon.jit
def _bytes(t, ROWS: gl.constexpr, FORMAT: gl.constexpr):
    """[ROWS, words] -> [ROWS, words, 4]: the same value for each of a word's bytes."""
    WORDS: gl.constexpr = step_words(FORMAT)
    t, _ = gl.broadcast(gl.expand_dims(t, 2), gl.full([ROWS, WORDS, 4], 0, gl.int32, code_layout(ROWS, FORMAT)))
    return t


@gluon.jit
def over_words(t, ROWS: gl.constexpr, FORMAT: gl.constexpr):
    """[ROWS, H, 4] -> [ROWS, words]: the same value for each of a group's words."""
    H: gl.constexpr = 1 if FORMAT == "mxfp4" else 2
    WORDS: gl.constexpr = step_words(FORMAT)
    SCALES: gl.constexpr = scale_layout(ROWS, FORMAT)
    t, _ = gl.broadcast(gl.expand_dims(t, 3), gl.full([ROWS, H, 4, WORDS // (4 * H)], 0, gl.int32, SCALES))
    return gl.convert_layout(
        gl.reshape(t, [ROWS, WORDS]), gl.SliceLayout(2, code_layout(ROWS, FORMAT)), assert_trivial=True
    )


@gluon.jit
def decode_fp8(words, e, ROWS: gl.constexpr):
    """`common.decode.decode_fp8` of words int32 [ROWS, 16] and their exponents: uint8 [ROWS, 64] each."""
    a, b = gl.inline_asm_elementwise(
        fp8_ptx("$2", "$6"),
        "=&r,=&r,r,r,r,r,r,r,r,r",
        [_bytes(words, ROWS, "mxfp4"), _bytes(e, ROWS, "mxfp4")],
        dtype=(gl.uint8, gl.uint8),
        is_pure=True,
        pack=4,
    )
    return gl.reshape(a, [ROWS, 64]), gl.reshape(b, [ROWS, 64])


@gluon.jit
def decode_bf16(words, factor, ROWS: gl.constexpr):
    """`common.decode.decode_bf16` of words int32 [ROWS, 16], times their factors: bf16 [ROWS, 64] each."""
    a, b = gl.inline_asm_elementwise(
        BF16_PTX,
        "=r,=r,=r,=r,r,r,r,r",
        [_bytes(words, ROWS, "nvfp4")],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )
    factor = _bytes(factor, ROWS, "nvfp4")
    return gl.reshape(a * factor, [ROWS, 64]), gl.reshape(b * factor, [ROWS, 64])


@gluon.jit
def decode_int8(words, factor, ROWS: gl.constexpr):
    """Words of four int8 codes, int32 [ROWS, 32], times their factors bf16 [ROWS, 32], rounded to bf16: the products'
    operands for the two halves of a step, [ROWS, 64] each."""
    codes = gl.inline_asm_elementwise(
        INT8_PTX,
        "=r,=r,r,r,r,r",
        [_bytes(words, ROWS, "int8")],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=4,
    )
    values = gl.reshape(codes * _bytes(factor, ROWS, "int8"), [ROWS, 2, 4, 4, 2, 2])
    values = gl.reshape(gl.permute(values, [0, 3, 4, 2, 5, 1]), [ROWS, 64, 2])
    return gl.split(values)


@gluon.jit
def to_lanes(t, ROWS: gl.constexpr, FORMAT: gl.constexpr):
    """`gemm._to_lanes` of [ROWS, 64]."""
    UNIT: gl.constexpr = 4 if FORMAT == "mxfp4" else 2
    t = gl.permute(gl.reshape(t, [ROWS, 64 // (16 * UNIT), 4, 4, UNIT]), [0, 1, 3, 2, 4])
    return gl.reshape(t, [ROWS, 64])
