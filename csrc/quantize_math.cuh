// What the quantizers compute in registers: tensor-core products, scale rules, prologues.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "fp4.cuh"
#include "fp4_layout.h"
#include "quantize.h"

namespace wush {

constexpr int BLOCK = 32;               // columns of one product
constexpr int BLOCKS = 2;               // of a warp
constexpr int WARPS = 4;
constexpr int TILE = 16;                // rows

// The arguments of a kernel: those of the launcher, and what the launcher derives from them.
struct KernelArguments {
  QuantizeArguments q;
  int column_tiles;                     // number of CTAs across the columns
  int row_tiles;                        // number of tiles of 16 rows that a warp walks
  int64_t scale_rows, scale_blocks;     // rows and blocks whose scales are written, padding included
  uint32_t identity;                    // 0x3210, as a value that the compiler does not know
  int mx_carry, mx_below;               // e8m0 byte = ((bits(amax) + carry) >> 23) - below
};

template <class T> struct Pair;
template <> struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float2 wide(uint32_t v) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
  }
  static __device__ __forceinline__ uint32_t narrow(float2 v) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(v);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <> struct Pair<__half> {
  static __device__ __forceinline__ float2 wide(uint32_t v) { return __half22float2(*reinterpret_cast<__half2*>(&v)); }
  static __device__ __forceinline__ uint32_t narrow(float2 v) {
    const __half2 pair = __float22half2_rn(v);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  if constexpr (__is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// The same for d = 0.
template <class T>
__device__ __forceinline__ void mma_first(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, __half)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

__device__ __forceinline__ float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// Absolute maximum of a group, of which this lane holds 8 values; NaN if a value is NaN.
template <bool NV> __device__ __forceinline__ float group_amax(const float (&v)[8]) {
  float m = fabsf(v[0]);
#pragma unroll
  for (int i = 1; i < 8; i++) m = max_nan(m, fabsf(v[i]));
  m = max_nan(m, __shfl_xor_sync(~0u, m, 1));
  return NV ? m : max_nan(m, __shfl_xor_sync(~0u, m, 2));
}

// -- mse -------------------------------------------------------------------------------------------------------------

// Sum over a group, of which this lane holds 8 values, in the order of formats._tree_sum: neighbours first.
template <bool NV> __device__ __forceinline__ float tree_sum(const float (&s)[8]) {
  float sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  sum += __shfl_xor_sync(~0u, sum, 1);
  return NV ? sum : sum + __shfl_xor_sync(~0u, sum, 2);
}

// formats._squared_error.
__device__ __forceinline__ float squared_error_nv(const float (&y)[8], float inverse, float unit) {
  float s[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float a = fabsf(y[i] * inverse), capped = fminf(a, 8.0f);
    // c = 2^(22 + e), e the exponent of max(a, 1): a + c is a rounded to e2m1's spacing there.
    const float c = __uint_as_float((__float_as_uint(fmaxf(capped, 1.0f)) & 0x7F800000u) + (22u << 23));
    const float d = (a - fminf((capped + c) - c, 6.0f)) * unit;
    s[i] = d * d;
  }
  return tree_sum<true>(s);
}

// formats._halved_scale_gain.
__device__ __forceinline__ float halved_scale_gain(const float (&y)[8], float inverse) {
  float s[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float v = fabsf(y[i]) * inverse, small = __saturatef(v);
    const float distance = fabsf(small - ((small + 4194304.0f) - 4194304.0f));       // to the nearest multiple of 1/2
    s[i] = __fmaf_rn(__saturatef(v - 3.5f), -4.0f, __saturatef(distance - 0.125f));
  }
  return tree_sum<false>(s);
}

// -- scales ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float mx_inverse(int byte) { return __uint_as_float(max((254 - byte) << 23, 0x400000)); }

__device__ __forceinline__ uint32_t nv_byte(float amax, float g_over_largest) {
  return min(max(e4m3_encode(fminf(amax * g_over_largest, 448.0f)), 0x01u), 0x7Eu);
}

// The scale byte of the group of y, and in `inverse` the factor of its values. g: the global scale, 1 if there is none;
// inverses[b] = g / e4m3(b).
template <bool NV, bool MSE>
__device__ __forceinline__ uint32_t choose_scale(const float (&y)[8], float amax, float g, float g_over_6,
                                                 float g_over_4, const float* inverses, const KernelArguments& args,
                                                 float& inverse) {
  uint32_t byte;
  if constexpr (NV) {
    byte = nv_byte(amax, g_over_6);
    if constexpr (MSE) {
      const uint32_t narrow = nv_byte(amax, g_over_4);
      const float s0 = e4m3_decode(byte), s1 = e4m3_decode(narrow);
      const float e1 = squared_error_nv(y, inverses[narrow], s1), e0 = squared_error_nv(y, inverses[byte], s0);
      byte = e1 < e0 ? narrow : byte;
    }
    inverse = inverses[byte];
  } else {
    int b = max((int)((__float_as_uint(amax) + args.mx_carry) >> 23) - args.mx_below, 1);     // at most 254
    if constexpr (MSE) {
      b = halved_scale_gain(y, mx_inverse(b)) > 0.0f ? max(b - 1, 1) : b;
    }
    byte = b;
    inverse = mx_inverse(b) * g;
  }
  return byte;
}

// -- prologues -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

template <Prologue P> constexpr bool IS_NORM = P == Prologue::rms_norm || P == Prologue::add_rms_norm;
template <Prologue P> constexpr bool READS_TWO = P == Prologue::silu_mul || P == Prologue::add_rms_norm;

// Two sums in fp32.
template <class T> __device__ __forceinline__ float2 add(uint32_t x, uint32_t other) {
  const float2 v = Pair<T>::wide(x), w = Pair<T>::wide(other);
  return {v.x + w.x, v.y + w.y};
}

// Two values of the prologue, rounded to the model dtype where the unfused graph rounds. other: of q.up; gain: of
// q.gain.
template <class T, Prologue P>
__device__ __forceinline__ uint32_t prologue(uint32_t x, uint32_t other, uint32_t gain, float inverse_rms,
                                             const QuantizeArguments& q) {
  if constexpr (P == Prologue::silu_mul) {
    const float2 v = Pair<T>::wide(x), up = Pair<T>::wide(other);
    const float2 s = Pair<T>::wide(Pair<T>::narrow({silu(v.x), silu(v.y)}));
    return Pair<T>::narrow({s.x * up.x, s.y * up.y});
  } else if constexpr (IS_NORM<P>) {
    float2 v = P == Prologue::add_rms_norm ? add<T>(x, other) : Pair<T>::wide(x), w = {1.0f, 1.0f};
    v = {v.x * inverse_rms, v.y * inverse_rms};
    if (q.gain_rounded) v = Pair<T>::wide(Pair<T>::narrow(v));
    if (q.gain != nullptr) w = Pair<T>::wide(gain);
    if (q.gain_plus_one) w = {1.0f + w.x, 1.0f + w.y};                    // not w + 0: -0 keeps its sign
    return Pair<T>::narrow({v.x * w.x, v.y * w.y});
  } else {
    return x;
  }
}

// -- transform -------------------------------------------------------------------------------------------------------

// A lane's part of the transform: the B fragments of its blocks. The lane's row of output tile j is channel
// 8 (g / 2) + 2j + g % 2. The lane needs the entries 8t..8t+7 of that row, 16 neighbouring bytes.
template <class T, bool NV>
__device__ __forceinline__ void load_transform(uint4 (&b)[BLOCKS][4], const QuantizeArguments& q, int first, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int n = 8 * (g / 2) + 2 * j + g % 2;
      const int column = (first + i) * BLOCK + 8 * t;
      b[i][j] = {0, 0, 0, 0};
      if (column >= q.width || (NV && n / 16 != t / 2)) continue;
      const int64_t block = q.shared ? 0 : NV ? column / 16 : column / 32;
      const T* matrix = static_cast<const T*>(q.transform) + block * (NV ? 256 : 1024);
      matrix += NV ? (n % 16) * 16 + 8 * (t % 2) : n * 32 + 8 * t;
      b[i][j] = __ldg(reinterpret_cast<const uint4*>(matrix));
    }
  }
}

// y: the lane's 8 results of row g (h = 0) and row g + 8 (h = 1). low, high: its 8 channels of these rows.
template <class T>
__device__ __forceinline__ void transform_block(float (&y)[2][8], const uint4& low, const uint4& high,
                                                const uint4 (&b)[4]) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float d[4];
    mma_first<T>(d, low.x, high.x, low.y, high.y, b[j].x, b[j].y);
    mma<T>(d, low.z, high.z, low.w, high.w, b[j].z, b[j].w);
    y[0][2 * j] = d[0], y[0][2 * j + 1] = d[1], y[1][2 * j] = d[2], y[1][2 * j + 1] = d[3];
  }
}

}  // namespace wush
