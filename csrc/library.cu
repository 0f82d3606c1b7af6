// Lets the library say, before it is used, whether it runs here.

#include <cuda_runtime.h>

#include <cstdio>

namespace {
__global__ void probe() {}
}  // namespace

// nullptr if the kernels run on this machine; else the reason and the remedy, in one sentence.
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
  for (int device = 0; error == cudaSuccess && device < count; device++) {       // one suitable device is enough
    cudaFuncAttributes attributes;
    cudaSetDevice(device);
    last = cudaFuncGetAttributes(&attributes, probe);
    if (last == cudaSuccess) break;
  }
  if (error == cudaSuccess) cudaSetDevice(before);
  cudaGetLastError();                                   // clears the error, so that the next launch does not report it
  if (last == cudaSuccess) return nullptr;
  snprintf(sentence, sizeof sentence, "%s: build it for this GPU, `python csrc/build.py`", cudaGetErrorString(last));
  return sentence;
}
