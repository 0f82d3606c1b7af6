// sm_120a, sm_121a: the block-scaled product by mma.sync. On sm_90a the same kernel runs with the instruction emulated.
//
// A block computes BM x BN of the output over all of K. cp.async loads tiles of codes and scales, STAGES in flight.
// Codes and scales beyond the operands are zero, so the loop has no tails. WARPS_K warps share a tile of the output and
// take turns at the steps of K: with few rows of x, only this gives all warps work. Their sums are added at the end in
// a fixed order. Scales stay in words of four, in memory and in the instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "linear_tiles.h"
#include "mma_fp4.cuh"

namespace wush::sm120 {

// -- copies ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Copies 16, 8 or 4 bytes; where `valid` is false, writes zeros and reads nothing.
template <int BYTES>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                 ::"r"(to), "l"(from), "r"(bytes), "n"(BYTES) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

// -- tile ------------------------------------------------------------------------------------------------------------

template <Format FORMAT_, Choice CHOICE>
struct Tile {
  static constexpr Format FORMAT = FORMAT_;
  static constexpr Shape SHAPE = SHAPES[int(CHOICE)];
  static constexpr int BM = SHAPE.bm, BN = SHAPE.bn, BK = SHAPE.bk, STAGES = SHAPE.stages, BLOCKS = SHAPE.blocks;
  static constexpr int WARPS_M = SHAPE.warps_m, WARPS_N = SHAPE.warps_n, WARPS_K = SHAPE.warps_k;
  static constexpr int GROUP = group_size(FORMAT), THREADS = 32 * WARPS_M * WARPS_N * WARPS_K;
  static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;           // of one warp
  static constexpr int STEPS = BK / 64 / WARPS_K;                      // k steps of one warp in a stage
  static constexpr int ROW_BYTES = BK / 2, WORDS = BK / (4 * GROUP);   // of a row: codes; words of four scales
  static constexpr int W_AT = BM * ROW_BYTES, XS_AT = W_AT + BN * ROW_BYTES;           // within a stage; x's codes at 0
  static constexpr int WS_AT = XS_AT + 4 * scale_words(SHAPE, BM, GROUP);
  static constexpr int STAGE_BYTES = stage_bytes(SHAPE, GROUP), SHARED_BYTES = shared_bytes(SHAPE, GROUP);
  static_assert(WM % 16 == 0 && WN % 16 == 0 && BK % (64 * WARPS_K) == 0 && BK % (4 * GROUP) == 0, "whole fragments");
  static_assert(FORMAT == Format::nvfp4 || STEPS % 2 == 0, "mxfp4: a word of scales is two steps of one warp");
  static_assert(128 % BM == 0 && 128 % BN == 0, "a tile lies in one tile of scales");
};

// Loads rows from `row0` on of one operand, at k0, into a stage.
template <class T, int ROWS>
__device__ __forceinline__ void load_codes(
    uint32_t to, const Operand& o, int64_t row0, int64_t rows, int64_t k0, int64_t k
) {
  constexpr int CHUNKS = T::ROW_BYTES / 16;
  const char* codes = static_cast<const char*>(o.codes);
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += T::THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const int64_t byte = k0 / 2 + chunk * 16;
    const char* from = codes + (row0 + row) * (k / 2) + byte;
    const uint32_t at = to + row * T::ROW_BYTES + shared_chunk<T::ROW_BYTES>(row, chunk) * 16;
    const bool inside = row0 + row < rows;
    if (T::FORMAT == Format::mxfp4 || k % 32 == 0) {
      const bool valid = inside && byte < k / 2;
      copy_async<16>(at, valid ? from : codes, valid);
    } else {                                                           // nvfp4 with rows of an odd number of 8 bytes
      const bool low = inside && byte < k / 2, high = inside && byte + 8 < k / 2;
      copy_async<8>(at, low ? from : codes, low);
      copy_async<8>(at + 8, high ? from + 8 : codes, high);
    }
  }
}

// Loads words of four scales into a stage. Scales beyond K become zero, whatever is in memory there.
template <class T, int ROWS>
__device__ __forceinline__ void load_scales(
    uint32_t* to, const Operand& o, int64_t row0, int64_t rows, int64_t k0, int64_t k
) {
  const uint8_t* scales = static_cast<const uint8_t*>(o.scales);
  const int64_t groups = k / T::GROUP, group0 = k0 / T::GROUP;
  const bool swizzled = o.scale_layout == ScaleLayout::swizzled;
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * T::WORDS; i += T::THREADS) {
    int row, word;
    if (swizzled) {                                                    // rows 32 apart are neighbours in memory
      constexpr int SIDE = ROWS < 32 ? 1 : ROWS / 32;
      word = i / ROWS, row = i % SIDE * 32 + i % ROWS / SIDE;
    } else {
      word = i % T::WORDS, row = i / T::WORDS;
    }
    const int64_t group = group0 + 4 * word, r = row0 + row;
    uint32_t* at = to + word * shared_scale_rows(ROWS) + shared_scale_row(row);
    const int64_t offset = swizzled ? swizzled_offset(r, group, groups) : r * groups + group;
    const bool inside = r < rows && group < groups;
    if (group + 4 <= groups && (swizzled || groups % 4 == 0)) {
      copy_async<4>(shared_address(at), inside ? scales + offset : scales, inside);
    } else {
      uint32_t value = 0;
      for (int j = 0; j < 4; j++)
        if (inside && group + j < groups) value |= uint32_t(scales[offset + j]) << (8 * j);
      *at = value;
    }
  }
}

// -- epilogue --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float read(const void* p, int64_t i, OutType type) {
  switch (type) {
    case OutType::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case OutType::fp16: return __half2float(static_cast<const __half*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ float round_to(float y, OutType type) {
  switch (type) {
    case OutType::bf16: return __bfloat162float(__float2bfloat16_rn(y));
    case OutType::fp16: return __half2float(__float2half_rn(y));
    default: return y;
  }
}

__device__ __forceinline__ void write(void* p, int64_t i, float y0, float y1, bool pair, OutType type) {
  if (type == OutType::bf16) {
    auto* out = static_cast<__nv_bfloat16*>(p) + i;
    if (pair) *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(y0, y1);
    else *out = __float2bfloat16_rn(y0);
  } else if (type == OutType::fp16) {
    auto* out = static_cast<__half*>(p) + i;
    if (pair) *reinterpret_cast<__half2*>(out) = __floats2half2_rn(y0, y1);
    else *out = __float2half_rn(y0);
  } else {
    float* out = static_cast<float*>(p) + i;
    if (pair) *reinterpret_cast<float2*>(out) = make_float2(y0, y1);
    else *out = y0;
  }
}

__device__ __forceinline__ float finish(const LinearArgs& a, float sum, float alpha, int64_t m, int64_t n) {
  float y = __fmul_rn(sum, alpha);
  if (a.bias) y = __fadd_rn(y, read(a.bias, n, a.out_type));
  y = round_to(y, a.out_type);
  return a.residual ? __fadd_rn(y, read(a.residual, m * a.n + n, a.out_type)) : y;
}

// -- kernel ----------------------------------------------------------------------------------------------------------

template <class T>
__global__ __launch_bounds__(T::THREADS, T::BLOCKS) void linear_kernel(const __grid_constant__ LinearArgs a) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_k = warp / (T::WARPS_M * T::WARPS_N);
  const int warp_m = warp % T::WARPS_M, warp_n = warp / T::WARPS_M % T::WARPS_N;

  // Consecutive blocks go down eight tiles of x, then to the next tile of w, so that both stay in the L2 cache.
  const int64_t tiles_m = (a.m + T::BM - 1) / T::BM, tiles_n = (a.n + T::BN - 1) / T::BN;
  const int64_t band = blockIdx.x / (8 * tiles_n), height = min(int64_t(8), tiles_m - 8 * band);
  const int64_t in_band = blockIdx.x % (8 * tiles_n);
  const int64_t row0 = (8 * band + in_band % height) * T::BM, col0 = in_band / height * T::BN;

  const int64_t tiles_k = (a.k + T::BK - 1) / T::BK;
  auto load = [&](int64_t tile) {
    if (tile < tiles_k) {
      char* stage = shared + tile % T::STAGES * T::STAGE_BYTES;
      const uint32_t at = shared_address(stage);
      load_codes<T, T::BM>(at, a.x, row0, a.m, tile * T::BK, a.k);
      load_codes<T, T::BN>(at + T::W_AT, a.w, col0, a.n, tile * T::BK, a.k);
      load_scales<T, T::BM>(reinterpret_cast<uint32_t*>(stage + T::XS_AT), a.x, row0, a.m, tile * T::BK, a.k);
      load_scales<T, T::BN>(reinterpret_cast<uint32_t*>(stage + T::WS_AT), a.w, col0, a.n, tile * T::BK, a.k);
    }
    commit();
  };

  float acc[T::WM / 16][T::WN / 8][4] = {};
#pragma unroll
  for (int s = 0; s < T::STAGES - 1; s++) load(s);

  for (int64_t tile = 0; tile < tiles_k; tile++) {
    wait<T::STAGES - 2>();
    __syncthreads();
    load(tile + T::STAGES - 1);
    const char* stage = shared + tile % T::STAGES * T::STAGE_BYTES;
    const uint32_t at = shared_address(stage);
    const uint32_t* x_scales = reinterpret_cast<const uint32_t*>(stage + T::XS_AT);
    const uint32_t* w_scales = reinterpret_cast<const uint32_t*>(stage + T::WS_AT);
#pragma unroll
    for (int s = 0; s < T::STEPS; s++) {
      const int step = warp_k * T::STEPS + s;
      const int word = T::FORMAT == Format::mxfp4 ? step / 2 : step;
      uint32_t x[T::WM / 16][4], w[T::WN / 16][4], xs[T::WM / 16], ws[T::WN / 8];
#pragma unroll
      for (int i = 0; i < T::WM / 16; i++) {
        const int row = warp_m * T::WM + i * 16 + ldmatrix_a_row(lane), chunk = 2 * step + ldmatrix_a_chunk(lane);
        load_matrices(x[i], at + row * T::ROW_BYTES + shared_chunk<T::ROW_BYTES>(row, chunk) * 16);
        const int scale_row = warp_m * T::WM + i * 16 + fragment_scale_a_row(lane);
        xs[i] = x_scales[word * shared_scale_rows(T::BM) + shared_scale_row(scale_row)];
      }
#pragma unroll
      for (int j = 0; j < T::WN / 16; j++) {
        const int row = warp_n * T::WN + j * 16 + ldmatrix_b_row(lane), chunk = 2 * step + ldmatrix_b_chunk(lane);
        load_matrices(w[j], at + T::W_AT + row * T::ROW_BYTES + shared_chunk<T::ROW_BYTES>(row, chunk) * 16);
      }
#pragma unroll
      for (int j = 0; j < T::WN / 8; j++) {
        const int scale_row = warp_n * T::WN + j * 8 + fragment_scale_b_col(lane);
        ws[j] = w_scales[word * shared_scale_rows(T::BN) + shared_scale_row(scale_row)];
      }
#pragma unroll
      for (int i = 0; i < T::WM / 16; i++)
#pragma unroll
        for (int j = 0; j < T::WN / 8; j++) {
          const uint32_t b[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
          if (T::FORMAT == Format::mxfp4 && s % 2 == 1) mma_fp4<T::FORMAT, 2>(acc[i][j], x[i], b, xs[i], ws[j]);
          else mma_fp4<T::FORMAT, 0>(acc[i][j], x[i], b, xs[i], ws[j]);
        }
    }
  }

  if constexpr (T::WARPS_K > 1) {
    wait<0>();
    __syncthreads();
    constexpr int VALUES = T::WM * T::WN / 32;                         // of a lane
    float* sums = reinterpret_cast<float*>(shared);
    const int group = warp % (T::WARPS_M * T::WARPS_N);
    auto at = [&](int k, int v) { return ((k * T::WARPS_M * T::WARPS_N + group) * VALUES + v) * 32 + lane; };
    if (warp_k > 0)
#pragma unroll
      for (int v = 0; v < VALUES; v++) sums[at(warp_k - 1, v)] = acc[v / 4 / (T::WN / 8)][v / 4 % (T::WN / 8)][v % 4];
    __syncthreads();
    if (warp_k > 0) return;
    for (int k = 0; k < T::WARPS_K - 1; k++)
#pragma unroll
      for (int v = 0; v < VALUES; v++) acc[v / 4 / (T::WN / 8)][v / 4 % (T::WN / 8)][v % 4] += sums[at(k, v)];
  }

  float alpha = 1.0f;
  if (a.x.global_scale) alpha = *a.x.global_scale;
  if (a.w.global_scale) alpha = __fmul_rn(alpha, *a.w.global_scale);
  alpha = __fdiv_rn(1.0f, alpha);
#pragma unroll
  for (int i = 0; i < T::WM / 16; i++)
#pragma unroll
    for (int j = 0; j < T::WN / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t m = row0 + warp_m * T::WM + i * 16 + fragment_c_row(lane, 2 * half);
        const int64_t n = col0 + warp_n * T::WN + j * 8 + fragment_c_col(lane, 0);
        if (m >= a.m || n >= a.n) continue;
        const float y0 = finish(a, acc[i][j][2 * half], alpha, m, n);
        const bool second = n + 1 < a.n;
        const float y1 = second ? finish(a, acc[i][j][2 * half + 1], alpha, m, n + 1) : 0.0f;
        const bool pair = second && a.n % 2 == 0;                      // then the pair is aligned
        write(a.out, m * a.n + n, y0, y1, pair, a.out_type);
        if (second && !pair) write(a.out, m * a.n + n + 1, y1, 0.0f, false, a.out_type);
      }
}

template <class T>
const char* launch(const LinearArgs& a, cudaStream_t stream) {
  const int64_t blocks = (a.m + T::BM - 1) / T::BM * ((a.n + T::BN - 1) / T::BN);
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "the output has too many tiles";
  const cudaError_t raised =
      cudaFuncSetAttribute(linear_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::SHARED_BYTES);
  if (raised != cudaSuccess) return cudaGetErrorString(raised);
  linear_kernel<T><<<unsigned(blocks), T::THREADS, T::SHARED_BYTES, stream>>>(a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <Format F>
const char* launch_choice(const LinearArgs& a, Choice choice, cudaStream_t stream) {
  switch (choice) {
    case Choice::narrow: return launch<Tile<F, Choice::narrow>>(a, stream);
    case Choice::middle: return launch<Tile<F, Choice::middle>>(a, stream);
    default: return launch<Tile<F, Choice::wide>>(a, stream);
  }
}

// One source a format.
const char* linear_mxfp4(const LinearArgs&, Choice, cudaStream_t);
const char* linear_nvfp4(const LinearArgs&, Choice, cudaStream_t);

}  // namespace wush::sm120
