// Block transform, quantization and packing in one kernel.
//
// A warp owns 64 columns (two blocks of 32) and walks tiles of 16 rows. Lane (g, t) = (lane / 4, lane % 4) loads 8
// neighbouring channels, 8t..8t+7 of a block, of the rows g and g + 8. As they lie, these are its A fragment of
// mma.m16n8k16 once channels are renamed, k = 8t + 4h + 2b + p to k' = 16h + 8b + 2t + p (h: which of two products). The
// transform's rows are renamed too, column c = 2s + p of output tile j being channel 8s + 2j + p, so that the lane's results
// are 8 neighbouring channels again: one word of codes. NVFP4's 16x16 blocks go in pairs, as a block-diagonal 32x32 one.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fp4.cuh"
#include "quantize.h"

namespace wush {

constexpr int BLOCK = 32;               // columns of one product
constexpr int BLOCKS = 2;               // a warp's
constexpr int WARPS = 4;
constexpr int TILE = 16;                // rows

// What a kernel needs of QuantizeArguments.
struct KernelArguments {
  QuantizeArguments q;
  int column_tiles;                     // CTAs side by side
  int row_tiles;                        // tiles of 16 rows that a warp walks
  int64_t scale_rows, scale_blocks;     // rows and blocks whose scales are written, padding included
  uint32_t identity;                    // 0x3210, where the compiler does not know it
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

// The same with d = 0 before.
template <class T>
__device__ __forceinline__ void mma_first(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                          uint32_t b1) {
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

// Absolute maximum of a group, of which this lane has 8 values; NaN if there is one.
template <bool NV> __device__ __forceinline__ float group_amax(const float (&v)[8]) {
  float m = fabsf(v[0]);
#pragma unroll
  for (int i = 1; i < 8; i++) m = max_nan(m, fabsf(v[i]));
  m = max_nan(m, __shfl_xor_sync(~0u, m, 1));
  return NV ? m : max_nan(m, __shfl_xor_sync(~0u, m, 2));
}

// -- mse -------------------------------------------------------------------------------------------------------------

// Sum over a group of which this lane has 8 values, neighbours first: the order of formats._tree_sum.
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

// The scale byte of the group of y and the factor of its values; g: the global scale, 1 if there is none.
// inverses[b] = g / e4m3(b).
template <bool NV, bool MSE>
__device__ __forceinline__ uint32_t choose_scale(const float (&y)[8], float amax, float g, float g_over_6, float g_over_4,
                                                 const float* inverses, const KernelArguments& args,
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

// Two values as the unfused graph computes them, rounded to the model dtype where it rounds.
template <class T, Prologue P>
__device__ __forceinline__ uint32_t prologue(uint32_t x, uint32_t other, float inverse_rms, const QuantizeArguments& q) {
  if constexpr (P == Prologue::silu_mul) {
    const float2 v = Pair<T>::wide(x), up = Pair<T>::wide(other);
    const float2 s = Pair<T>::wide(Pair<T>::narrow({silu(v.x), silu(v.y)}));
    return Pair<T>::narrow({s.x * up.x, s.y * up.y});
  } else if constexpr (P == Prologue::rms_norm) {
    float2 v = Pair<T>::wide(x), w = {1.0f, 1.0f};
    v = {v.x * inverse_rms, v.y * inverse_rms};
    if (q.gain_rounded) v = Pair<T>::wide(Pair<T>::narrow(v));
    if (q.gain != nullptr) w = Pair<T>::wide(other);
    return Pair<T>::narrow({v.x * (w.x + q.gain_offset), v.y * (w.y + q.gain_offset)});
  } else {
    return x;
  }
}

// 1 / sqrt(mean(x^2) + eps) of every row; one CTA a row.
template <class T> __global__ void __launch_bounds__(256) inverse_rms_kernel(const QuantizeArguments q) {
  const uint4* row = reinterpret_cast<const uint4*>(static_cast<const T*>(q.x) + (int64_t)blockIdx.x * q.stride);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < q.width / 8; i += 256) {
    const uint4 v = row[i];
#pragma unroll
    for (uint32_t word : {v.x, v.y, v.z, v.w}) {
      const float2 pair = Pair<T>::wide(word);
      sum = __fmaf_rn(pair.x, pair.x, __fmaf_rn(pair.y, pair.y, sum));
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  __shared__ float parts[8];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    const float eps = q.eps_pointer == nullptr ? q.eps : *q.eps_pointer;
    q.inverse_rms[blockIdx.x] = rsqrtf(sum * (1.0f / (float)q.width) + eps);
  }
}

// -- the kernel ------------------------------------------------------------------------------------------------------

// A lane's part of the transform: the B fragments of its blocks. The lane's row of output tile j is channel
// 8 (g / 2) + 2j + g % 2, of which it needs the entries 8t..8t+7: 16 bytes as they lie.
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
      b[i][j] = __ldg(reinterpret_cast<const uint4*>(NV ? matrix + (n % 16) * 16 + 8 * (t % 2) : matrix + n * 32 + 8 * t));
    }
  }
}

// y: the lane's 8 results of row g (h = 0) and of row g + 8 (h = 1); words: the lane's 8 channels of either row.
template <class T>
__device__ __forceinline__ void transform_block(float (&y)[2][8], const uint4& low, const uint4& high, const uint4 (&b)[4]) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float d[4];
    mma_first<T>(d, low.x, high.x, low.y, high.y, b[j].x, b[j].y);
    mma<T>(d, low.z, high.z, low.w, high.w, b[j].z, b[j].w);
    y[0][2 * j] = d[0], y[0][2 * j + 1] = d[1], y[1][2 * j] = d[2], y[1][2 * j + 1] = d[3];
  }
}

// Asks for 16 bytes of global memory to be copied to shared memory, or for zeros.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// The rows that a warp reads: tiles on their way are in a ring of shared memory, STAGES deep. A lane reads what it asked for
// itself, so that nothing has to be synchronized. Rows and columns outside are zeros.
template <class T, Prologue P> struct Reader {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  static constexpr int DEPTH = 2;                    // 100 KiB of shared memory, and a third of the bandwidth
#else
  static constexpr int DEPTH = 4;
#endif
  static constexpr int SOURCES = P == Prologue::silu_mul ? 2 : 1, STAGES = DEPTH / SOURCES > 2 ? DEPTH / SOURCES : 2;
  static constexpr int CHUNK = 32 * 16, STAGE = SOURCES * BLOCKS * 2 * CHUNK, BYTES = WARPS * STAGES * STAGE;
  const QuantizeArguments& q;
  uint32_t ring;                                     // this lane's bytes of the warp's ring
  const char* place[SOURCES];                        // of row g of the tile to ask for
  int left;                                          // rows from there on, capped: a walk is short
  int columns;                                       // channels from the lane's first on
  const float* inverse_rms;
  float rms[2] = {0.0f, 0.0f};

  __device__ __forceinline__ Reader(const QuantizeArguments& q, void* shared, int64_t row, int column, int lane, int warp)
      : q(q), ring(__cvta_generic_to_shared(shared) + warp * STAGES * STAGE + lane * 16),
        left(min(q.rows - row, (int64_t)1 << 20)), columns(q.width - column), inverse_rms(q.inverse_rms + row) {
#pragma unroll
    for (int s = 0; s < SOURCES; s++)
      place[s] = static_cast<const char*>(s == 0 ? q.x : q.up) + 2 * (row * stride(s) + column);
  }

  __device__ __forceinline__ int64_t stride(int source) const { return source == 0 ? q.stride : q.up_stride; }

  // Asks for the next tile, the i-th.
  __device__ __forceinline__ void ask(int i) {
#pragma unroll
    for (int s = 0; s < SOURCES; s++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
          copy_async(ring + i % STAGES * STAGE + ((s * BLOCKS + block) * 2 + h) * CHUNK,
                     place[s] + h * 16 * stride(s) + block * BLOCK * 2, 8 * h < left && block * BLOCK < columns);
      }
      place[s] += 2 * TILE * stride(s);
    }
    left -= TILE;
    finish_asking();
  }

  // Groups of copies are counted: one is closed for every tile, also where there is none to ask for.
  __device__ __forceinline__ void finish_asking() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  // Until the oldest tile is there, all but STAGES - 2 of those asked for.
  __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory"); }

  __device__ __forceinline__ uint4 word(int i, int s, int block, int h) const {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(ring + i % STAGES * STAGE + ((s * BLOCKS + block) * 2 + h) * CHUNK) : "memory");
    return v;
  }

  // Of the i-th tile the lane's 8 channels of a block in row g + 8h, as the quantizer takes them.
  __device__ __forceinline__ uint4 get(int i, int block, int h, const uint4& gain) const {
    const uint4 v = word(i, 0, block, h), other = P == Prologue::silu_mul ? word(i, SOURCES - 1, block, h) : gain;
    return {prologue<T, P>(v.x, other.x, rms[h], q), prologue<T, P>(v.y, other.y, rms[h], q),
            prologue<T, P>(v.z, other.z, rms[h], q), prologue<T, P>(v.w, other.w, rms[h], q)};
  }

  // The rows' norms of the i-th tile, of which `rows` are left.
  __device__ __forceinline__ void load_norms(int i, int rows) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (P == Prologue::rms_norm && 8 * h < rows) rms[h] = inverse_rms[i * TILE + 8 * h];
  }
};

// The tiles of a warp, from `start` on (the lane's first row). False if something is not finite, so that values of NVFP4's
// pairs of blocks are wrong (0 * NaN): then all is done again with CLEAN, each block without the other.
template <class T, bool NV, bool TRANSFORM, bool MSE, Prologue P, bool CLEAN>
__device__ __forceinline__ bool walk(const KernelArguments& args, void* ring, int first, int64_t start, float g,
                                     const float* inverses) {
  constexpr int PER_BLOCK = NV ? 2 : 1, COUNT = PER_BLOCK * BLOCKS;
  const QuantizeArguments& q = args.q;
  const int lane = threadIdx.x % 32, t = lane % 4;
  const int column = first * BLOCK + 8 * t, group = first * PER_BLOCK, groups = q.width / (BLOCK / PER_BLOCK);
  const float g_over_6 = __fdiv_rn(g, 6.0f), g_over_4 = __fdiv_rn(g, 4.0f);
  bool inside[BLOCKS];
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) inside[i] = column + i * BLOCK < q.width;
  uint8_t* codes = q.codes + start * (q.width / 2) + column / 2;
  uint8_t* scales = q.scales + (q.swizzled ? swizzled_offset(0, group, groups) : (start + 8 * t) * groups + group);
  const bool whole = q.swizzled || groups % COUNT == 0;      // the scales of a row leave as one word
  bool finite = true;
  int left = min(q.rows - start, (int64_t)1 << 20), scale_left = min(args.scale_rows - start, (int64_t)1 << 20);
  Reader<T, P> reader(q, ring, start, column, lane, threadIdx.x / 32);
#pragma unroll
  for (int i = 0; i < Reader<T, P>::STAGES - 1; i++) {
    if (i < args.row_tiles) reader.ask(i);
    else reader.finish_asking();
  }
  uint4 b[BLOCKS][4], gain[BLOCKS];
  if constexpr (TRANSFORM) load_transform<T, NV>(b, q, first, lane);
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    gain[i] = {0, 0, 0, 0};
    if (P == Prologue::rms_norm && q.gain != nullptr && inside[i])
      gain[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(q.gain) + column + i * BLOCK));
  }
  reader.load_norms(0, left);

#pragma unroll 1
  for (int tile = 0; tile < args.row_tiles; tile++) {
    reader.wait();
    if (tile + Reader<T, P>::STAGES - 1 < args.row_tiles) reader.ask(tile + Reader<T, P>::STAGES - 1);
    else reader.finish_asking();
    uint32_t bytes[2] = {0, 0};                            // MX: both scales of a row; NV: of each block the lane's one
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      float y[2][8];
      uint4 words[2] = {reader.get(tile, i, 0, gain[i]), reader.get(tile, i, 1, gain[i])};
      if constexpr (TRANSFORM && P == Prologue::none) {
        // A load leaves a row's words side by side, a product wants the two rows' in turn: one copy, by an instruction that
        // the compiler cannot see through. Left to itself it makes one for each of the four products.
#pragma unroll
        for (int h = 0; h < 2; h++)
          words[h] = {__byte_perm(words[h].x, 0, args.identity), __byte_perm(words[h].y, 0, args.identity),
                      __byte_perm(words[h].z, 0, args.identity), __byte_perm(words[h].w, 0, args.identity)};
      }
      if constexpr (TRANSFORM && CLEAN) {
        // By masks: a choice between words would put them in local memory.
        const uint32_t left = t < 2 ? ~0u : 0u;
        auto keep = [](const uint4& v, uint32_t mask) -> uint4 { return {v.x & mask, v.y & mask, v.z & mask, v.w & mask}; };
        float lower[2][8];
        transform_block<T>(lower, keep(words[0], left), keep(words[1], left), b[i]);
        transform_block<T>(y, keep(words[0], ~left), keep(words[1], ~left), b[i]);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          y[0][j] = t < 2 ? lower[0][j] : y[0][j];
          y[1][j] = t < 2 ? lower[1][j] : y[1][j];
        }
      } else if constexpr (TRANSFORM) {
        transform_block<T>(y, words[0], words[1], b[i]);
      } else {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint32_t pairs[4] = {words[h].x, words[h].y, words[h].z, words[h].w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float2 pair = Pair<T>::wide(pairs[j]);
            y[h][2 * j] = pair.x, y[h][2 * j + 1] = pair.y;
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float amax = group_amax<NV>(y[h]);
        const bool bad = !(amax <= 3.4028235e38f);
        finite &= !bad;
        float inverse, v[8];
        uint32_t byte = choose_scale<NV, MSE>(y[h], bad ? 0.0f : amax, g, g_over_6, g_over_4, inverses, args, inverse);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = y[h][j] * inverse;
        uint32_t packed = e2m1_pack8(v);
        if (bad) byte = NV ? NV_NAN : MX_NAN, packed = 0;
        const bool valid = 8 * h < left && inside[i];
        if (valid) *reinterpret_cast<uint32_t*>(codes + h * (int64_t)q.width * 4 + i * (BLOCK / 2)) = packed;
        bytes[h] |= (valid ? byte : 0) << (NV ? 16 * i : 8 * i);         // padding is 0
      }
    }
    if (tile + 1 < args.row_tiles) reader.load_norms(tile + 1, left - TILE);
    codes += TILE / 2 * (int64_t)q.width;

    // Scales of a row leave together: lane 0 writes those of row g, lane 1 those of row g + 8.
    if constexpr (NV) {
      bytes[0] |= __shfl_xor_sync(~0u, bytes[0], 2) << 8;
      bytes[1] |= __shfl_xor_sync(~0u, bytes[1], 2) << 8;
    }
    if (t < 2 && 8 * t < scale_left && first < args.scale_blocks) {
      const uint32_t word = __byte_perm(bytes[0], bytes[1], t == 0 ? 0x3210 : 0x7654);
      uint8_t* place = scales;
      if (q.swizzled) place += swizzled_offset(start + tile * TILE + 8 * t, 0, groups);
      if (whole) {
        if constexpr (NV) *reinterpret_cast<uint32_t*>(place) = word;
        else *reinterpret_cast<uint16_t*>(place) = word;
      } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
          if (group + i < groups) place[i] = word >> (8 * i);
      }
    }
    if (!q.swizzled) scales += TILE * (int64_t)groups;
    left -= TILE, scale_left -= TILE;
  }
  return finite;
}

template <class T, bool NV, bool TRANSFORM, bool MSE, Prologue P>
__global__ void __launch_bounds__(32 * WARPS, !MSE && P == Prologue::none ? 4 : 3) quantize_kernel(const __grid_constant__ KernelArguments args) {
  const QuantizeArguments& q = args.q;
  const int first = ((blockIdx.x % args.column_tiles) * WARPS + threadIdx.x / 32) * BLOCKS;       // the warp's blocks
  const int64_t start = (int64_t)(blockIdx.x / args.column_tiles) * args.row_tiles * TILE + threadIdx.x % 32 / 4;
  const float g = q.global_scale == nullptr ? 1.0f : *q.global_scale;

  __shared__ __align__(16) uint8_t ring[Reader<T, P>::BYTES];
  __shared__ float inverses[128];
  if constexpr (NV) {
    inverses[threadIdx.x] = __fdiv_rn(g, e4m3_decode(max(threadIdx.x, 1)));
    __syncthreads();
  }
  const bool finite = walk<T, NV, TRANSFORM, MSE, P, false>(args, ring, first, start, g, inverses);
  if constexpr (NV && TRANSFORM) {
    if (__any_sync(~0u, !finite)) walk<T, NV, TRANSFORM, MSE, P, true>(args, ring, first, start, g, inverses);
  }
}

// -- launch ----------------------------------------------------------------------------------------------------------

template <class T, bool NV, bool TRANSFORM, Prologue P>
const char* launch_rule(const KernelArguments& args, int64_t grid, cudaStream_t stream) {
  if (args.q.rule == Rule::mse)
    quantize_kernel<T, NV, TRANSFORM, true, P><<<grid, 32 * WARPS, 0, stream>>>(args);
  else
    quantize_kernel<T, NV, TRANSFORM, false, P><<<grid, 32 * WARPS, 0, stream>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, bool NV, Prologue P>
const char* launch_transform(const KernelArguments& args, int64_t grid, cudaStream_t stream) {
  return args.q.transform == nullptr ? launch_rule<T, NV, false, P>(args, grid, stream)
                                     : launch_rule<T, NV, true, P>(args, grid, stream);
}

template <class T, bool NV> const char* launch(const KernelArguments& args, int64_t grid, cudaStream_t stream) {
  switch (args.q.prologue) {
    case Prologue::silu_mul: return launch_transform<T, NV, Prologue::silu_mul>(args, grid, stream);
    case Prologue::rms_norm:
      inverse_rms_kernel<T><<<args.q.rows, 256, 0, stream>>>(args.q);
      return launch_transform<T, NV, Prologue::rms_norm>(args, grid, stream);
    default: return launch_transform<T, NV, Prologue::none>(args, grid, stream);
  }
}

template <bool NV> const char* quantize(const QuantizeArguments& q) {
  constexpr int GROUPS_OF_BLOCK = NV ? 2 : 1;
  KernelArguments args{q};
  args.identity = 0x3210;
  const int64_t blocks = (q.width + BLOCK - 1) / BLOCK, groups = q.width / (BLOCK / GROUPS_OF_BLOCK);
  args.scale_rows = q.swizzled ? (q.rows + 127) / 128 * 128 : q.rows;
  args.scale_blocks = q.swizzled ? (groups + 3) / 4 * 4 / GROUPS_OF_BLOCK : blocks;
  args.column_tiles = (args.scale_blocks + BLOCKS * WARPS - 1) / (BLOCKS * WARPS);
  const int64_t tiles = (args.scale_rows + TILE - 1) / TILE;
  // Enough warps for every multiprocessor first, then few reads of the transform.
  args.row_tiles = 1;
  while (args.row_tiles < 8 && tiles / (2 * args.row_tiles) * args.column_tiles >= 132 * 6) args.row_tiles *= 2;
  args.mx_carry = q.rule == Rule::absmax || q.rule == Rule::mse ? 0x3FFFFF : 0;
  args.mx_below = q.rule == Rule::paper ? 0 : 2;
  const int64_t grid = (tiles + args.row_tiles - 1) / args.row_tiles * args.column_tiles;
  const auto stream = static_cast<cudaStream_t>(q.stream);
  return q.half ? launch<__half, NV>(args, grid, stream) : launch<__nv_bfloat16, NV>(args, grid, stream);
}

}  // namespace wush
