// MXFP4 and NVFP4 in a kernel: e2m1 and scale bytes.
//
// The counterpart of wush_compile/formats.py, bit for bit. Sources are compiled with -fmad=false. Where a fused
// multiply-add is exact, the source spells it out.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace wush {

constexpr uint32_t MX_NAN = 0xFF, NV_NAN = 0x7F;

// Whether this GPU has the conversion to e2m1 (cvt.rn.satfinite.e2m1x2.f32).
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define WUSH_NATIVE_E2M1 1
#else
#define WUSH_NATIVE_E2M1 0
#endif

// -- e2m1 ------------------------------------------------------------------------------------------------------------

// fp32 whose low bits are the code (0..7) of 2 * factor * |v|: nearest, ties to even, saturating at 6; NaN -> 0. The
// product must be exact.
//
// A saturating multiply-add (to [0, 1]) cuts out each range of even spacing, and an addition that rounds to an integer
// counts its steps: fp32 has a spacing of 1 at 2^23. At most one range is neither empty nor full, and the ranges before
// it count an even number of steps. So only one rounding happens, and its ties go to even. This takes six
// floating-point instructions, which on Hopper run at twice the rate of integer ones.
__device__ __forceinline__ float e2m1_magnitude(float v, float factor) {
  const float halves = __saturatef(fabsf(v) * factor);                              // [0, 2]: 4 steps of 1/2
  const float ones = __saturatef(__fmaf_rn(fabsf(v), factor, -1.0f));               // [2, 4]: 2 steps of 1
  const float twos = __saturatef(__fmaf_rn(fabsf(v), factor, -2.0f));               // [4, 6]: 1 step of 2
  return __fmaf_rn(halves, 4.0f, __fmaf_rn(ones, 2.0f, twos + 8388608.0f));
}

// 8 floats times `inverse` -> 8 codes, the first in the lowest nibble. `exact`: inverse is a power of two; never true
// with MAYBE_EXACT false.
template <bool MAYBE_EXACT>
__device__ __forceinline__ uint32_t e2m1_pack8(const float (&y)[8], float inverse, bool exact) {
  float v[8];
#if WUSH_NATIVE_E2M1
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = y[i] * inverse;
  uint32_t packed;
  asm("{ .reg .b8 a, b, c, d;\n"
      "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
      "mov.b32 %0, {a, b, c, d}; }"
      : "=r"(packed)
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return packed;
#else
  float factor = 0.5f * inverse;
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = y[i];
  if (!MAYBE_EXACT || !exact) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = y[i] * inverse;
    factor = 0.5f;
  }
  // Absolute values are free as operands, unless the compiler hoists them above the branch.
#pragma unroll
  for (int i = 0; i < 8; i++) asm("" : "+f"(v[i]));
  uint32_t u[8], s[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    u[i] = __float_as_uint(e2m1_magnitude(v[i], factor));
    s[i] = __float_as_uint(v[i]);
  }
  // Low bytes hold codes, high bytes signs. Gathers four at a time: even values to low nibbles, odd ones to high
  // nibbles.
  auto gather = [](const uint32_t(&w)[8], int first, uint32_t pair) {
    const uint32_t low = __byte_perm(w[first], w[first + 2], pair);
    return __byte_perm(low, __byte_perm(w[first + 4], w[first + 6], pair), 0x5410);
  };
  const uint32_t codes = gather(u, 0, 0x0040) + (gather(u, 1, 0x0040) << 4);
  return codes | ((gather(s, 0, 0x0073) >> 4) & 0x08080808u) | (gather(s, 1, 0x0073) & 0x80808080u);
#endif
}

// -- scale bytes -----------------------------------------------------------------------------------------------------

// 2^n, exact, for n in [-127, 127]; 2^-127 is subnormal.
__device__ __forceinline__ float exp2_exact(int n) { return __uint_as_float(n > -127 ? (n + 127) << 23 : 0x400000); }

// fp32 in [0, 448] -> e4m3 byte, nearest, ties to even. Not by the fp8 conversion: compilers up to CUDA 12.9 compile
// round trips through it wrongly for sm_90.
__device__ __forceinline__ uint32_t e4m3_encode(float x) {
  const int exponent = max((int)(__float_as_uint(x) >> 23) - 127, -6);
  const float steps = __fadd_rn(__fmul_rn(x, exp2_exact(3 - exponent)), 8388608.0f);
  return __float_as_uint(steps) - 0x4B000000u + ((exponent + 6) << 3);
}

// Positive e4m3 byte, not NaN -> fp32. In the fields of fp32 the byte is the value times 2^-120, also if subnormal.
__device__ __forceinline__ float e4m3_decode(uint32_t byte) {
  return __fmul_rn(__uint_as_float(byte << 20), 1.329227995784916e36f);
}

}  // namespace wush
