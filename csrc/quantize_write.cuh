// How the quantizers write: a warp gathers codes and scales in shared memory and stores them in the widest pieces.

#pragma once

#include "quantize_math.cuh"

namespace wush {

constexpr int MOST_TILES = 8;                // of a warp at most: 128 rows, one tile of swizzled scales

// A CTA's results before they are stored. Codes: two buffers for each warp, a tile each, of 32 chunks of 16 bytes.
// Scales: of all rows of the CTA, 2 (MXFP4) or 4 (NVFP4) from each warp.
template <bool NV> struct Stage {
  using Scales = std::conditional_t<NV, uint32_t, uint16_t>;
  uint32_t codes[WARPS][2][32][4];
  alignas(16) Scales scales[MOST_TILES * TILE][WARPS];
};

// Makes the compiler keep a number in a register. Otherwise it computes addresses again in every iteration.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Stores a warp's results, a tile at a time. A chunk of 16 bytes holds the codes of one block in one row: several lanes
// make its words, and one lane stores them.
template <bool NV> struct Writer {
  uint32_t put[BLOCKS];                      // address of the lane's words of row g in the first buffer
  uint32_t get;                              // address of the chunk that the lane stores
  uint32_t scales;                           // address of its scales: lane t < 2 has those of row g + 8t
  uint8_t* place;                            // address of the chunk in the output
  int left;                                  // number of rows from there on; 0 for columns outside
  bool whole;                                // the whole chunk is in the matrix

  __device__ __forceinline__ Writer(Stage<NV>& stage, const QuantizeArguments& q, int64_t first_row, int column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    // Of eight rows, the last four have their chunks in the other order, so that the rows of a block use all banks.
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
      put[i] = kept(shared_address(&stage.codes[warp][0][2 * g + (i ^ (g >> 2))][t]));
    get = kept(shared_address(stage.codes[warp][0][lane]));
    scales = shared_address(&stage.scales[g + 8 * (t % 2)][warp]);
    const int row = lane / 2;
    column += ((lane & 1) ^ (row >> 2 & 1)) * BLOCK;
    place = q.codes + (first_row + row) * (q.width / 2) + column / 2;
    left = column < q.width ? min(q.rows - first_row - row, (int64_t)1 << 20) : 0;
    whole = column + BLOCK <= q.width;
  }

  __device__ __forceinline__ void put_codes(int tile, int block, int h, uint32_t word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(put[block] + tile % 2 * 512 + h * 256), "r"(word) : "memory");
  }

  // word: both scales (MX) or all four (NV) of row g, in lane 1 of row g + 8.
  __device__ __forceinline__ void put_scales(uint32_t word) {
    if (threadIdx.x % 4 < 2) {
      if constexpr (NV) asm volatile("st.shared.u32 [%0], %1;" ::"r"(scales), "r"(word) : "memory");
      else asm volatile("st.shared.u16 [%0], %1;" ::"r"(scales), "h"((uint16_t)word) : "memory");
    }
    scales += TILE * WARPS * sizeof(typename Stage<NV>::Scales);
  }

  // The next tile uses the other buffer, so one barrier is enough.
  __device__ __forceinline__ void write(int tile, const QuantizeArguments& q) {
    __syncwarp();
    if (left > 0) {
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(get + tile % 2 * 512) : "memory");
      if (q.width % BLOCK == 0) {
        *reinterpret_cast<uint4*>(place) = v;
      } else {                               // rows start at multiples of 8 bytes and end with half a block
        *reinterpret_cast<uint2*>(place) = {v.x, v.y};
        if (whole) *reinterpret_cast<uint2*>(place + 8) = {v.z, v.w};
      }
    }
    left -= TILE;
    place += TILE / 2 * (int64_t)q.width;
  }
};

// Stores a CTA's scales, from row `first_row` and block `first` on.
template <bool NV>
__device__ __forceinline__ void write_scales(const Stage<NV>& stage, const KernelArguments& args, int64_t first_row,
                                             int first) {
  constexpr int PER_BLOCK = NV ? 2 : 1, WIDTH = PER_BLOCK * BLOCKS * WARPS;           // groups of a CTA: 8 or 16
  const QuantizeArguments& q = args.q;
  const int group = first * PER_BLOCK, groups = q.width / (BLOCK / PER_BLOCK), rows = args.row_tiles * TILE;
  if (q.swizzled) {
    const int padded = (groups + 3) / 4 * 4;
    for (int i = threadIdx.x; i < rows * (WIDTH / 4); i += 32 * WARPS) {
      const int j = i % rows, word = i / rows;
      // In a whole tile of 128 rows, rows 32 apart have neighbouring words.
      const int row = rows == 128 ? j % 4 * 32 + j / 4 : j;
      const int64_t r = first_row + row;
      if (r < args.scale_rows && group + 4 * word < padded)
        *reinterpret_cast<uint32_t*>(q.scales + swizzled_offset(r, group + 4 * word, groups)) =
            reinterpret_cast<const uint32_t*>(stage.scales[row])[word];
    }
  } else if (groups % WIDTH == 0) {
    using Row = std::conditional_t<NV, uint4, uint2>;
    for (int row = threadIdx.x; row < rows && first_row + row < q.rows; row += 32 * WARPS)
      *reinterpret_cast<Row*>(q.scales + (first_row + row) * groups + group) =
          *reinterpret_cast<const Row*>(stage.scales[row]);
  } else {
    for (int i = threadIdx.x; i < rows * WIDTH; i += 32 * WARPS) {
      const int row = i / WIDTH, c = i % WIDTH;
      if (first_row + row < q.rows && group + c < groups)
        q.scales[(first_row + row) * groups + group + c] = reinterpret_cast<const uint8_t*>(stage.scales[row])[c];
    }
  }
}

}  // namespace wush
