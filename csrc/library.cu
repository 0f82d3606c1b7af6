// What the library says of itself before it is used.

#include <cuda_runtime.h>

#include <cstdio>

namespace {
__global__ void probe() {}
}  // namespace

// nullptr if the kernels can run on this machine, else why not, in one sentence with the remedy.
extern "C" __attribute__((visibility("default"))) const char* wush_problem() {
  static char sentence[256];
  int driver = 0, runtime = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is loaded: install one";
  cudaRuntimeGetVersion(&runtime);
  if (driver / 1000 < runtime / 1000) {
    snprintf(sentence, sizeof sentence,
             "built with CUDA %d.%d, the driver supports %d.%d: update the driver, or build with an older nvcc "
             "(12.9 is enough)",
             runtime / 1000, runtime % 1000 / 10, driver / 1000, driver % 1000 / 10);
    return sentence;
  }
  int before = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) error = cudaGetDevice(&before);
  cudaError_t last = error;
  for (int device = 0; error == cudaSuccess && device < count; device++) {       // one that it was built for will do
    cudaFuncAttributes attributes;
    cudaSetDevice(device);
    last = cudaFuncGetAttributes(&attributes, probe);
    if (last == cudaSuccess) break;
  }
  if (error == cudaSuccess) cudaSetDevice(before);
  cudaGetLastError();                                   // it is reported here, and not by the next launch
  if (last == cudaSuccess) return nullptr;
  snprintf(sentence, sizeof sentence, "%s: build it for this GPU, `python csrc/build.py`", cudaGetErrorString(last));
  return sentence;
}
