// Block transform, quantization and packing in one kernel.
//
// A warp owns 64 columns (two blocks of 32) and walks tiles of 16 rows. Lane (g, t) = (lane / 4, lane % 4) loads 8
// neighbouring channels, 8t..8t+7 of a block, of rows g and g + 8. They are its A fragment of mma.m16n8k16 without any
// shuffle, if channel k = 8t + 4h + 2b + p is renamed to k' = 16h + 8b + 2t + p (h: which of two products). The rows of
// the transform are renamed too: column c = 2s + p of output tile j is channel 8s + 2j + p. So the lane's results are 8
// neighbouring channels again, one word of codes. Two 16x16 blocks of NVFP4 form one block-diagonal 32x32 block.

#pragma once

#include "quantize_read.cuh"
#include "quantize_write.cuh"

namespace wush {

// Quantizes the tiles of a warp, from `start` on (the lane's first row). Returns false if a value is not finite: in
// NVFP4's pairs of blocks, 0 * NaN then spoils the other block. The caller repeats with CLEAN, which separates the
// blocks.
template <class T, bool NV, bool TRANSFORM, bool MSE, Prologue P, bool CLEAN>
__device__ __forceinline__ bool walk(const KernelArguments& args, void* ring, Stage<NV>& stage, int first,
                                     int64_t start, float g, const float* inverses) {
  const QuantizeArguments& q = args.q;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const int column = first * BLOCK + 8 * t;
  const float g_over_6 = __fdiv_rn(g, 6.0f), g_over_4 = __fdiv_rn(g, 4.0f);
  bool inside[BLOCKS];
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) inside[i] = column + i * BLOCK < q.width;
  bool finite = true;
  int left = min(q.rows - start, (int64_t)1 << 20);           // number of rows from the lane's first on
  Reader<T, P> reader(q, ring, start, column, lane, warp);
  Writer<NV> writer(stage, q, start - lane / 4, first * BLOCK);
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
    if (IS_NORM<P> && q.gain != nullptr && inside[i])
      gain[i] = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(q.gain) + column + i * BLOCK));
  }
  reader.load_norms(0, left);

#pragma unroll 1
  for (int tile = 0; tile < args.row_tiles; tile++) {
    reader.wait();
    if (tile + Reader<T, P>::STAGES - 1 < args.row_tiles) reader.ask(tile + Reader<T, P>::STAGES - 1);
    else reader.finish_asking();
    uint32_t bytes[2] = {0, 0};                            // MX: both scales of a row; NV: the lane's of each block
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      float y[2][8];
      uint4 words[2] = {reader.get(tile, i, 0, gain[i]), reader.get(tile, i, 1, gain[i])};
      if constexpr (TRANSFORM && P == Prologue::none) {
        // A load leaves the words of a row in neighbouring registers; a product alternates between both rows. One copy
        // by an opaque instruction is enough. Otherwise the compiler makes a copy for each of the four products.
#pragma unroll
        for (int h = 0; h < 2; h++)
          words[h] = {__byte_perm(words[h].x, 0, args.identity), __byte_perm(words[h].y, 0, args.identity),
                      __byte_perm(words[h].z, 0, args.identity), __byte_perm(words[h].w, 0, args.identity)};
      }
      if constexpr (TRANSFORM && CLEAN) {
        // By masks: selecting between words would put them in local memory.
        const uint32_t left = t < 2 ? ~0u : 0u;
        auto keep = [](const uint4& v, uint32_t mask) -> uint4 {
          return {v.x & mask, v.y & mask, v.z & mask, v.w & mask};
        };
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
        float inverse;
        uint32_t byte = choose_scale<NV, MSE>(y[h], bad ? 0.0f : amax, g, g_over_6, g_over_4, inverses, args, inverse);
        uint32_t packed = e2m1_pack8<!NV>(y[h], inverse, q.global_scale == nullptr);
        if (bad) byte = NV ? NV_NAN : MX_NAN, packed = 0;
        writer.put_codes(tile, i, h, packed);
        bytes[h] |= (8 * h < left && inside[i] ? byte : 0) << (NV ? 16 * i : 8 * i);         // padding is 0
      }
    }
    if (tile + 1 < args.row_tiles) reader.load_norms(tile + 1, left - TILE);
    // Gathers the scales of a row: lane 0 has those of row g, lane 1 those of row g + 8.
    if constexpr (NV) {
      bytes[0] |= __shfl_xor_sync(~0u, bytes[0], 2) << 8;
      bytes[1] |= __shfl_xor_sync(~0u, bytes[1], 2) << 8;
    }
    writer.put_scales(__byte_perm(bytes[0], bytes[1], t == 0 ? 0x3210 : 0x7654));
    writer.write(tile, q);
    left -= TILE;
  }
  return finite;
}

template <class T, bool NV, bool TRANSFORM, bool MSE, Prologue P>
__global__ void __launch_bounds__(32 * WARPS, !MSE && P == Prologue::none ? 4 : 3)
quantize_kernel(const __grid_constant__ KernelArguments args) {
  const QuantizeArguments& q = args.q;
  const int first = ((blockIdx.x % args.column_tiles) * WARPS + threadIdx.x / 32) * BLOCKS;       // the warp's blocks
  const int64_t start = (int64_t)(blockIdx.x / args.column_tiles) * args.row_tiles * TILE + threadIdx.x % 32 / 4;
  const float g = q.global_scale == nullptr ? 1.0f : *q.global_scale;

  __shared__ __align__(16) uint8_t ring[Reader<T, P>::BYTES];
  __shared__ __align__(16) Stage<NV> stage;
  __shared__ float inverses[128];
  if constexpr (NV) {
    inverses[threadIdx.x] = __fdiv_rn(g, e4m3_decode(max(threadIdx.x, 1)));
    __syncthreads();
  }
  const bool finite = walk<T, NV, TRANSFORM, MSE, P, false>(args, ring, stage, first, start, g, inverses);
  if constexpr (NV && TRANSFORM) {
    if (__any_sync(~0u, !finite)) {
      __syncwarp();                                        // the second walk overwrites the codes of the first
      walk<T, NV, TRANSFORM, MSE, P, true>(args, ring, stage, first, start, g, inverses);
    }
  }
  __syncthreads();
  write_scales(stage, args, start - threadIdx.x % 32 / 4, first - threadIdx.x / 32 * BLOCKS);
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
      inverse_rms_kernel<T, false><<<args.q.rows, 256, 0, stream>>>(args.q);
      return launch_transform<T, NV, Prologue::rms_norm>(args, grid, stream);
    case Prologue::add_rms_norm:
      inverse_rms_kernel<T, true><<<args.q.rows, 256, 0, stream>>>(args.q);
      return launch_transform<T, NV, Prologue::add_rms_norm>(args, grid, stream);
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
  // First enough CTAs for two on every multiprocessor; then long walks, which read the transform rarely.
  args.row_tiles = 1;
  while (args.row_tiles < MOST_TILES && tiles / (2 * args.row_tiles) * args.column_tiles >= 256) args.row_tiles *= 2;
  args.mx_carry = q.rule == Rule::absmax || q.rule == Rule::mse ? 0x3FFFFF : 0;
  args.mx_below = q.rule == Rule::paper ? 0 : 2;
  const int64_t grid = (tiles + args.row_tiles - 1) / args.row_tiles * args.column_tiles;
  if (grid > INT32_MAX || q.rows > INT32_MAX) return "more rows than one launch can have";
  const auto stream = static_cast<cudaStream_t>(q.stream);
  return q.half ? launch<__half, NV>(args, grid, stream) : launch<__nv_bfloat16, NV>(args, grid, stream);
}

}  // namespace wush
