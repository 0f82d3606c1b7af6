// What all bindings use: torch's stable ABI, the namespace of this library's ops, the current stream.
//
// The ops of libwush_sm_90a.so are `torch.ops.wush_sm_90a.*`: one process can load the libraries of several GPUs. A
// binding is a .cpp file. It checks the arguments, allocates the outputs and calls a launcher. The launcher's header
// and .cu file do not use torch.

#pragma once

#include <dlfcn.h>

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#define WUSH_CONCAT_(a, b) a##b
#define WUSH_CONCAT(a, b) WUSH_CONCAT_(a, b)
// wush_sm_90a
#define WUSH_NAMESPACE WUSH_CONCAT(wush_, WUSH_TARGET)
// STABLE_TORCH_LIBRARY_FRAGMENT and _IMPL paste their argument unexpanded, so it is expanded here first.
#define WUSH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define WUSH_LIBRARY_IMPL(ns, m) STABLE_TORCH_LIBRARY_IMPL(ns, CUDA, m)

namespace wush {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The current CUDA stream. Torch's function for it is in libtorch_cuda, which a CPU-only torch lacks. It is looked up
// at the first call, so that the library loads with every torch. (`Stream::nativeHandle` exists only from torch 2.13
// on.)
inline void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (symbol == nullptr) {                             // torch loads its libraries with RTLD_LOCAL
      void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    }
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function != nullptr, "this torch has no CUDA: wush's CUDA kernels cannot run");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == 0, "torch gives no CUDA stream for device ", device);
  return stream;
}

// A launcher returns nullptr, or the error as text (cudaGetErrorString).
inline void check_launch(const char* kernel, const char* error) {
  STD_TORCH_CHECK(error == nullptr, kernel, ": ", error == nullptr ? "" : error);
}

inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace wush
