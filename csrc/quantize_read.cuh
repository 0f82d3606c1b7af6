// How the quantizers read: rows through a ring buffer in shared memory, and the norms of rows.

#pragma once

#include "quantize_math.cuh"

namespace wush {

// 1 / sqrt(mean(x^2) + eps) of every row, one CTA for each row; of x + up, in fp32, with ADD, and that sum in q.total.
template <class T, bool ADD> __global__ void __launch_bounds__(256) inverse_rms_kernel(const QuantizeArguments q) {
  const int64_t r = blockIdx.x;
  const uint4* row = reinterpret_cast<const uint4*>(static_cast<const T*>(q.x) + r * q.stride);
  const uint4* up = ADD ? reinterpret_cast<const uint4*>(static_cast<const T*>(q.up) + r * q.up_stride) : nullptr;
  uint4* total = ADD ? reinterpret_cast<uint4*>(static_cast<T*>(q.total) + r * q.width) : nullptr;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < q.width / 8; i += 256) {
    const uint4 v = row[i], w = ADD ? up[i] : uint4{0, 0, 0, 0};
    const uint32_t words[4] = {v.x, v.y, v.z, v.w}, others[4] = {w.x, w.y, w.z, w.w};
    uint32_t sums[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 pair = ADD ? add<T>(words[j], others[j]) : Pair<T>::wide(words[j]);
      sum = __fmaf_rn(pair.x, pair.x, __fmaf_rn(pair.y, pair.y, sum));
      sums[j] = Pair<T>::narrow(pair);
    }
    if constexpr (ADD) total[i] = {sums[0], sums[1], sums[2], sums[3]};
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

// Starts to copy 16 bytes of global memory, or zeros, to shared memory.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// The rows that a warp reads: a ring buffer in shared memory holds the tiles in flight, STAGES of them. A lane reads
// only what it has loaded itself, so no barrier is needed. Rows and columns outside are zeros.
template <class T, Prologue P> struct Reader {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  static constexpr int DEPTH = 2;                    // it has 100 KiB of shared memory and a third of the bandwidth
#else
  static constexpr int DEPTH = 4;
#endif
  static constexpr int SOURCES = READS_TWO<P> ? 2 : 1, STAGES = DEPTH / SOURCES > 2 ? DEPTH / SOURCES : 2;
  static constexpr int CHUNK = 32 * 16, STAGE = SOURCES * BLOCKS * 2 * CHUNK, BYTES = WARPS * STAGES * STAGE;
  const QuantizeArguments& q;
  uint32_t ring;                                     // this lane's bytes of the warp's ring
  const char* place[SOURCES];                        // of row g of the next tile to load
  int left;                                          // number of rows from there on, capped: a walk is short
  int columns;                                       // number of channels from the lane's first on
  const float* inverse_rms;
  float rms[2] = {0.0f, 0.0f};

  __device__ __forceinline__ Reader(const QuantizeArguments& q, void* shared, int64_t row, int column, int lane,
                                    int warp)
      : q(q), ring(__cvta_generic_to_shared(shared) + warp * STAGES * STAGE + lane * 16),
        left(min(q.rows - row, (int64_t)1 << 20)), columns(q.width - column), inverse_rms(q.inverse_rms + row) {
#pragma unroll
    for (int s = 0; s < SOURCES; s++)
      place[s] = static_cast<const char*>(s == 0 ? q.x : q.up) + 2 * (row * stride(s) + column);
  }

  __device__ __forceinline__ int64_t stride(int source) const { return source == 0 ? q.stride : q.up_stride; }

  // Starts to load the next tile, number i.
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

  // `wait` counts groups of copies, so every tile closes one, even if there is nothing to load.
  __device__ __forceinline__ void finish_asking() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  // Waits for the oldest tile: at most STAGES - 2 stay in flight.
  __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory"); }

  __device__ __forceinline__ uint4 word(int i, int s, int block, int h) const {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(ring + i % STAGES * STAGE + ((s * BLOCKS + block) * 2 + h) * CHUNK) : "memory");
    return v;
  }

  // The lane's 8 channels of a block in row g + 8h of tile i, after the prologue.
  __device__ __forceinline__ uint4 get(int i, int block, int h, const uint4& gain) const {
    const uint4 v = word(i, 0, block, h), other = READS_TWO<P> ? word(i, SOURCES - 1, block, h) : v;
    return {prologue<T, P>(v.x, other.x, gain.x, rms[h], q), prologue<T, P>(v.y, other.y, gain.y, rms[h], q),
            prologue<T, P>(v.z, other.z, gain.z, rms[h], q), prologue<T, P>(v.w, other.w, gain.w, rms[h], q)};
  }

  // Loads the norms of the rows of tile i; `rows`: number of rows from the lane's first on.
  __device__ __forceinline__ void load_norms(int i, int rows) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (IS_NORM<P> && 8 * h < rows) rms[h] = inverse_rms[i * TILE + 8 * h];
  }
};

}  // namespace wush
