// The kernels of sm_100a and sm_103a, one source each: they take CUTLASS half a minute.
#pragma once

#include <cuda_runtime_api.h>

#include "linear.h"

namespace wush::sm100 {

const char* mxfp4_narrow(const LinearArgs&, cudaStream_t);       // 128 x 64 of the output a block
const char* mxfp4_wide(const LinearArgs&, cudaStream_t);         // 256 x 256 a pair of blocks
const char* nvfp4_narrow(const LinearArgs&, cudaStream_t);
const char* nvfp4_wide(const LinearArgs&, cudaStream_t);

// 0 narrow, 1 wide. By counting, not by timing: no such GPU was at hand. Wide where its pairs fill the GPU.
inline int choose(int64_t m, int64_t n, int sms) {
  return m > 128 && (m + 255) / 256 * ((n + 255) / 256) * 2 >= sms ? 1 : 0;
}

}  // namespace wush::sm100
