// targets: sm_100a sm_103a

#include <cuda_runtime.h>

#include "linear_prepare.h"
#include "linear_sm100.h"
#include "linear_tiles.h"

namespace wush {
namespace {

const char* run(const LinearArgs& a, sm100::Choice choice, cudaStream_t stream, bool launch) {
  const bool mx = a.format == Format::mxfp4, narrow = choice == sm100::Choice::narrow;
  const auto kernel = mx ? (narrow ? sm100::mxfp4_narrow : sm100::mxfp4_wide)
                         : (narrow ? sm100::nvfp4_narrow : sm100::nvfp4_wide);
  return kernel(a, stream, launch);
}

}  // namespace

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
  return with_prepared(given, stream, [&](const LinearArgs& a) {
    return run(a, a.tile >= 0 ? Choice(a.tile) : sm100::choose(a.m, a.n, sms), stream, true);
  });
}

}  // namespace wush

// For tests without a device: CUTLASS's error for a product with every optional argument, or null.
extern "C" __attribute__((visibility("default")))
const char* wush_linear_refusal(int format, int tile, int64_t m, int64_t n, int64_t k) {
  using namespace wush;
  void* const some = reinterpret_cast<void*>(uintptr_t(4096));
  LinearArgs a{};
  a.format = Format(format);
  a.m = m, a.n = n, a.k = k;
  a.x = a.w = {some, some, static_cast<const float*>(some), ScaleLayout::swizzled};
  a.bias = a.residual = a.out = some;
  return run(a, sm100::Choice(tile), nullptr, false);
}
