// mma.m16n8k64 on e2m1 with block scales: the instruction of sm_120a and sm_121a. Below sm_120, the same function of
// the same registers in exact integer arithmetic, so that the code around the instruction also runs on those GPUs.
#pragma once

#include "fp4_layout.h"
#include "linear.h"

// Only GPUs without the instruction need the emulation.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1200
#define WUSH_EMULATE_FP4 1
#endif

namespace wush {

#if WUSH_EMULATE_FP4

// Sum of products of eight pairs of codes, in quarters.
__device__ inline int dot_e2m1(uint32_t a, uint32_t b) {
  auto doubled = [](uint32_t code) {                               // 2 * value: 0, 1, 2, 3, 4, 6, 8, 12
    const int c = code & 7;
    const int v = c < 5 ? c : (c == 5 ? 6 : 4 * c - 16);
    return code & 8 ? -v : v;
  };
  int sum = 0;
  for (int i = 0; i < 32; i += 4) sum += doubled(a >> i) * doubled(b >> i);
  return sum;
}

__device__ inline float e4m3_value(uint32_t byte) {
  const uint32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 0x7F) == 0x7F) return __int_as_float(0x7FC00000);
  return exponent == 0 ? ldexpf(float(mantissa), -9) : ldexpf(float(8 + mantissa), int(exponent) - 10);
}

// A group's sum in quarters times both scales, exact.
template <Format FORMAT>
__device__ inline float scaled(int quarters, uint32_t sa, uint32_t sb) {
  const float sum = 0.25f * float(quarters);
  if constexpr (FORMAT == Format::nvfp4) return sum * (e4m3_value(sa) * e4m3_value(sb));
  if (sa == 0xFF || sb == 0xFF) return __int_as_float(0x7FC00000);
  return ldexpf(sum, int(sa + sb) - 254);
}

// Not inlined: the callers are unrolled.
template <Format FORMAT, int BYTE>
__device__ __noinline__ float4 mma_emulated(
    float4 c, uint4 a_words, uint2 b_words, uint32_t scale_a, uint32_t scale_b
) {
  constexpr int GROUPS = FORMAT == Format::mxfp4 ? 2 : 4, WORDS = 8 / GROUPS;
  const int lane = threadIdx.x % 32;
  const uint32_t a[4] = {a_words.x, a_words.y, a_words.z, a_words.w}, b[2] = {b_words.x, b_words.y};
  uint32_t rows[2][8], cols[2][8], row_scales[2], col_scales[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {                           // rows g and g + 8; columns 2t and 2t + 1
    const int row_lane = fragment_c_row(lane, 0) * 4, col_lane = fragment_c_col(lane, half) * 4;
    row_scales[half] = __shfl_sync(~0u, scale_a, row_lane + half) >> (8 * BYTE);
    col_scales[half] = __shfl_sync(~0u, scale_b, col_lane) >> (8 * BYTE);
#pragma unroll
    for (int w = 0; w < 8; w++) {                                  // eight codes each, k = 8w..
      rows[half][w] = __shfl_sync(~0u, a[half + w / 4 * 2], row_lane + w % 4);
      cols[half][w] = __shfl_sync(~0u, b[w / 4], col_lane + w % 4);
    }
  }
  float acc[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      int sum = 0;
#pragma unroll
      for (int w = group * WORDS; w < (group + 1) * WORDS; w++) sum += dot_e2m1(rows[i / 2][w], cols[i % 2][w]);
      acc[i] += scaled<FORMAT>(sum, row_scales[i / 2] >> (8 * group) & 255, col_scales[i % 2] >> (8 * group) & 255);
    }
  return make_float4(acc[0], acc[1], acc[2], acc[3]);
}

#endif

// acc += (A * scale_a)(B * scale_b). Scales: words; mxfp4 uses the two bytes from BYTE (0 or 2) on, nvfp4 all four.
template <Format FORMAT, int BYTE>
__device__ __forceinline__ void mma_fp4(
    float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t scale_a, uint32_t scale_b
) {
#if WUSH_EMULATE_FP4
  const float4 c = make_float4(acc[0], acc[1], acc[2], acc[3]);
  const uint4 a_words = make_uint4(a[0], a[1], a[2], a[3]);
  const float4 d = mma_emulated<FORMAT, BYTE>(c, a_words, make_uint2(b[0], b[1]), scale_a, scale_b);
  acc[0] = d.x, acc[1] = d.y, acc[2] = d.z, acc[3] = d.w;
#else
  if constexpr (FORMAT == Format::mxfp4)
    asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {%12, 0}, {%11}, {%12, 0};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b), "n"(BYTE));
  else
    asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, {%10}, {0, 0}, {%11}, {0, 0};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scale_a), "r"(scale_b));
#endif
}

}  // namespace wush
