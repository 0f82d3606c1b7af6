// Prepares operands for sm_100's kernels. They need swizzled scales, K a multiple of 32 codes and N a multiple of 8
// outputs (TMA needs rows of whole 16 bytes). Row-major scales are swizzled into the workspace. Other widths, which no
// layer of a language model has, are padded there by copies. This is host code, so it is tested on any GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "fp4_layout.h"
#include "linear.h"

namespace wush {

struct Preparation {
  int64_t k, n;                                                  // padded
  bool swizzle_x, swizzle_w, pad_k, pad_n;
  int64_t x_scales, w_scales, x_codes, w_codes, bias, residual, out, bytes;   // offsets in the workspace; its size
};

inline int64_t out_bytes(OutType type) { return type == OutType::fp32 ? 4 : 2; }

inline Preparation plan(const LinearArgs& a) {
  Preparation p{};
  const int64_t groups = a.k / group_size(a.format), element = out_bytes(a.out_type);
  p.k = round_up(a.k, 32);
  p.n = round_up(a.n, 8);
  p.pad_k = p.k != a.k;
  p.pad_n = p.n != a.n;
  p.swizzle_x = a.x.scale_layout == ScaleLayout::row_major;
  p.swizzle_w = a.w.scale_layout == ScaleLayout::row_major;
  auto take = [&](bool needed, int64_t bytes) {
    const int64_t offset = p.bytes;
    if (needed) p.bytes += round_up(bytes, 256);
    return offset;
  };
  p.x_scales = take(p.swizzle_x, swizzled_bytes(a.m, groups));
  p.w_scales = take(p.swizzle_w, swizzled_bytes(a.n, groups));
  p.x_codes = take(p.pad_k, a.m * p.k / 2);
  p.w_codes = take(p.pad_k || p.pad_n, p.n * p.k / 2);
  p.bias = take(p.pad_n && a.bias, p.n * element);
  p.residual = take(p.pad_n && a.residual, a.m * p.n * element);
  p.out = take(p.pad_n, a.m * p.n * element);
  return p;
}

// rows x width bytes -> to_rows x to_width bytes, padded with zeros.
inline cudaError_t pad(void* to, const void* from, int64_t rows, int64_t width, int64_t to_rows, int64_t to_width,
                       cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(to, 0, size_t(to_rows * to_width), stream);
  if (error != cudaSuccess) return error;
  return cudaMemcpy2DAsync(to, size_t(to_width), from, size_t(width), size_t(width), size_t(rows),
                           cudaMemcpyDeviceToDevice, stream);
}

// Prepares the operands, calls run(prepared arguments), and copies the output to its place; null or the error.
template <class Run>
const char* with_prepared(const LinearArgs& given, cudaStream_t stream, Run run) {
  const Preparation p = plan(given);
  char* const space = static_cast<char*>(given.workspace);
  const int64_t groups = given.k / group_size(given.format), element = out_bytes(given.out_type);
  LinearArgs a = given;
  const char* problem = nullptr;
  auto swizzle = [&](Operand& o, bool needed, int64_t offset, int64_t rows) {
    if (!needed || problem) return;
    problem = swizzle_scales(o.scales, space + offset, rows, groups, stream);
    o.scales = space + offset;
    o.scale_layout = ScaleLayout::swizzled;
  };
  swizzle(a.x, p.swizzle_x, p.x_scales, a.m);
  swizzle(a.w, p.swizzle_w, p.w_scales, a.n);
  if (problem) return problem;
  cudaError_t error = cudaSuccess;
  auto padded = [&](const void*& pointer, bool needed, int64_t offset, int64_t rows, int64_t width, int64_t to_rows,
                    int64_t to_width) {
    if (!needed || error != cudaSuccess) return;
    error = pad(space + offset, pointer, rows, width, to_rows, to_width, stream);
    pointer = space + offset;
  };
  padded(a.x.codes, p.pad_k, p.x_codes, a.m, a.k / 2, a.m, p.k / 2);
  padded(a.w.codes, p.pad_k || p.pad_n, p.w_codes, a.n, a.k / 2, p.n, p.k / 2);
  padded(a.bias, p.pad_n && a.bias, p.bias, 1, a.n * element, 1, p.n * element);
  padded(a.residual, p.pad_n && a.residual, p.residual, a.m, a.n * element, a.m, p.n * element);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (p.pad_n) a.out = space + p.out;
  a.k = p.k;
  a.n = p.n;
  if (const char* refused = run(a)) return refused;
  if (p.pad_n)
    error = cudaMemcpy2DAsync(given.out, size_t(given.n * element), a.out, size_t(p.n * element),
                              size_t(given.n * element), size_t(given.m), cudaMemcpyDeviceToDevice, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace wush
