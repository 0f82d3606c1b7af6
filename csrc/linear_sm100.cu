// targets: sm_100a sm_103a

#include <cuda_runtime.h>

#include "linear_prepare.h"
#include "linear_sm100.h"
#include "linear_tiles.h"

namespace wush {

int64_t linear_workspace(const LinearArgs& a) { return plan(a).bytes; }

const char* linear(const LinearArgs& given, void* handle) {
  using sm100::Choice;
  const auto stream = static_cast<cudaStream_t>(handle);
  if (given.out_type != OutType::bf16) return "the output must be bf16";
  if (given.m > INT32_MAX || given.n > INT32_MAX - 8 || given.k > INT32_MAX - 32) return "a dimension exceeds 2^31";
  for (const void* p : {given.x.codes, given.x.scales, given.w.codes, given.w.scales, given.bias, given.residual,
                        static_cast<const void*>(given.out)})
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return "an operand is not aligned to 16 bytes";
  if (given.tile > int(Choice::wide)) return "there is no such tile";
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const bool mx = given.format == Format::mxfp4;
  return with_prepared(given, stream, [&](const LinearArgs& a) {
    const Choice choice = a.tile >= 0 ? Choice(a.tile) : sm100::choose(a.m, a.n, sms);
    if (choice == Choice::narrow) return mx ? sm100::mxfp4_narrow(a, stream) : sm100::nvfp4_narrow(a, stream);
    return mx ? sm100::mxfp4_wide(a, stream) : sm100::nvfp4_wide(a, stream);
  });
}

}  // namespace wush
