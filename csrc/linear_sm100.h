// The kernels of sm_100a and sm_103a, one source each: they take CUTLASS half a minute. `launch` false asks only
// whether CUTLASS takes the arguments, which needs no device.
#pragma once

#include <cuda_runtime_api.h>

#include "linear.h"

namespace wush::sm100 {

const char* mxfp4_narrow(const LinearArgs&, cudaStream_t, bool launch);
const char* mxfp4_wide(const LinearArgs&, cudaStream_t, bool launch);
const char* nvfp4_narrow(const LinearArgs&, cudaStream_t, bool launch);
const char* nvfp4_wide(const LinearArgs&, cudaStream_t, bool launch);

}  // namespace wush::sm100
