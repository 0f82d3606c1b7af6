// targets: sm_90a sm_120a sm_121a

#include "linear_prepare.h"
#include "linear_sm120.cuh"

namespace wush {
namespace {

// One more tile, for tests: sm_100's preparations in front of the narrow tile, so that they run on some GPU.
constexpr int PREPARED = int(sm120::Choice::wide) + 1;

const char* run(const LinearArgs& a, sm120::Choice choice, cudaStream_t stream) {
  return a.format == Format::mxfp4 ? sm120::linear_mxfp4(a, choice, stream) : sm120::linear_nvfp4(a, choice, stream);
}

}  // namespace

int64_t linear_workspace(const LinearArgs& a) { return a.tile == PREPARED ? plan(a).bytes : 0; }

const char* linear(const LinearArgs& given, void* handle) {
  using sm120::Choice;
  const auto stream = static_cast<cudaStream_t>(handle);
  for (const Operand* o : {&given.x, &given.w}) {
    const int alignment = given.k % 32 == 0 ? 16 : 8;
    if (reinterpret_cast<uintptr_t>(o->codes) % alignment != 0) return "codes are not aligned to 16 bytes";
    if (reinterpret_cast<uintptr_t>(o->scales) % 4 != 0) return "scales are not aligned to 4 bytes";
  }
  if (reinterpret_cast<uintptr_t>(given.out) % 8 != 0) return "the output is not aligned to 8 bytes";
  if (given.tile > PREPARED) return "there is no such tile";
  if (given.tile == PREPARED)
    return with_prepared(given, stream, [&](const LinearArgs& a) {
      const bool as_tma_wants = a.k % 32 == 0 && a.n % 8 == 0 && a.x.scale_layout == ScaleLayout::swizzled &&
                                a.w.scale_layout == ScaleLayout::swizzled;
      return as_tma_wants ? run(a, Choice::narrow, stream) : "the preparations were not made";
    });
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return run(given, given.tile >= 0 ? Choice(given.tile) : sm120::choose(given.m, given.n, sms), stream);
}

}  // namespace wush
