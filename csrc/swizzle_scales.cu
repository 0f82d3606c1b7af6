#include <cuda_runtime.h>

#include "fp4_layout.h"
#include "linear.h"

namespace wush {
namespace {

// A thread writes one word, four groups of a row. Neighbouring threads write neighbouring words.
__global__ void swizzle_kernel(const uint8_t* from, uint32_t* to, int64_t rows, int64_t groups) {
  const int64_t words = swizzled_bytes(rows, groups) / 4, across = round_up(groups, 4) / 4;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < words; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t tile = i / 128, group = tile % across * 4, row = tile / across * 128 + i % 4 * 32 + i % 128 / 4;
    uint32_t word = 0;
    for (int j = 0; j < 4; j++)
      if (row < rows && group + j < groups) word |= uint32_t(from[row * groups + group + j]) << (8 * j);
    to[i] = word;
  }
}

}  // namespace

const char* swizzle_scales(const void* from, void* to, int64_t rows, int64_t groups, void* stream) {
  const int64_t words = swizzled_bytes(rows, groups) / 4;
  if (words == 0) return nullptr;
  const int64_t blocks = (words + 255) / 256;
  swizzle_kernel<<<unsigned(blocks < 65536 ? blocks : 65536), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint8_t*>(from), static_cast<uint32_t*>(to), rows, groups);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace wush
