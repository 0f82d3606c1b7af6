// targets: sm_90a sm_120a sm_121a

#include "linear_sm120.cuh"

namespace wush {

int64_t linear_workspace(const LinearArgs&) { return 0; }

const char* linear(const LinearArgs& a, void* stream) {
  using sm120::Choice;
  if (a.k % group_size(a.format) != 0) return "K is not a multiple of the format's group";
  for (const Operand* o : {&a.x, &a.w}) {
    if (reinterpret_cast<uintptr_t>(o->codes) % (a.k % 32 == 0 ? 16 : 8) != 0) return "codes are not aligned to 16 bytes";
    if (reinterpret_cast<uintptr_t>(o->scales) % 4 != 0) return "scales are not aligned to 4 bytes";
  }
  if (reinterpret_cast<uintptr_t>(a.out) % 8 != 0) return "the output is not aligned to 8 bytes";
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (a.tile > int(Choice::wide)) return "there is no such tile";
  const Choice choice = a.tile >= 0 ? Choice(a.tile) : sm120::choose(a.m, a.n, sms);
  const auto run = a.format == Format::mxfp4 ? sm120::linear_mxfp4 : sm120::linear_nvfp4;
  return run(a, choice, static_cast<cudaStream_t>(stream));
}

}  // namespace wush
