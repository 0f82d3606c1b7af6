// The kernels of sm_100a and sm_103a. Each has a source of its own, because it takes half a minute to compile. With
// `launch` false CUTLASS only checks the arguments, which needs no device.
#pragma once

#include <cuda_runtime_api.h>

#include "linear.h"

namespace wush::sm100 {

const char* mxfp4_narrow(const LinearArgs&, cudaStream_t, bool launch);
const char* mxfp4_wide(const LinearArgs&, cudaStream_t, bool launch);
const char* nvfp4_narrow(const LinearArgs&, cudaStream_t, bool launch);
const char* nvfp4_wide(const LinearArgs&, cudaStream_t, bool launch);

}  // namespace wush::sm100
