// targets: sm_100a sm_103a

#include <cuda_runtime.h>

#include <tuple>

#include "fp4_layout.h"
#include "linear_sm100.h"
#include "linear_tiles.h"

// What CUTLASS's kernels ask for and callers need not have: swizzled scales, K a multiple of 32 codes and N a multiple of
// 8 outputs (both 16 bytes, for TMA). Row-major scales are swizzled in the workspace; odd widths, which no layer of a
// language model has, are padded there by copies.

namespace wush {
namespace {

struct Plan {
  int64_t k, n;                                                  // padded
  bool swizzle_x, swizzle_w, pad_k, pad_n;
  int64_t x_scales, w_scales, x_codes, w_codes, bias, residual, out, end;   // offsets in the workspace
};

Plan make_plan(const LinearArgs& a) {
  Plan p{};
  const int64_t groups = a.k / group_size(a.format);
  p.k = round_up(a.k, 32);
  p.n = round_up(a.n, 8);
  p.pad_k = p.k != a.k;
  p.pad_n = p.n != a.n;
  p.swizzle_x = a.x.scale_layout == ScaleLayout::row_major;
  p.swizzle_w = a.w.scale_layout == ScaleLayout::row_major;
  int64_t at = 0;
  auto take = [&](bool needed, int64_t bytes) {
    const int64_t offset = at;
    if (needed) at += round_up(bytes, 256);
    return offset;
  };
  p.x_scales = take(p.swizzle_x, swizzled_bytes(a.m, groups));
  p.w_scales = take(p.swizzle_w, swizzled_bytes(a.n, groups));
  p.x_codes = take(p.pad_k, a.m * p.k / 2);
  p.w_codes = take(p.pad_k || p.pad_n, p.n * p.k / 2);
  p.bias = take(p.pad_n && a.bias, p.n * 2);
  p.residual = take(p.pad_n && a.residual, a.m * p.n * 2);
  p.out = take(p.pad_n, a.m * p.n * 2);
  p.end = at;
  return p;
}

// rows x from_width bytes -> to_rows x to_width bytes, zeros around.
cudaError_t pad(void* to, const void* from, int64_t rows, int64_t from_width, int64_t to_rows, int64_t to_width,
                cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(to, 0, size_t(to_rows * to_width), stream);
  if (error != cudaSuccess) return error;
  return cudaMemcpy2DAsync(to, size_t(to_width), from, size_t(from_width), size_t(from_width), size_t(rows),
                           cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

int64_t linear_workspace(const LinearArgs& a) { return make_plan(a).end; }

const char* linear(const LinearArgs& given, void* handle) {
  const auto stream = static_cast<cudaStream_t>(handle);
  if (given.out_type != OutType::bf16) return "the output must be bf16";
  if (given.m > INT32_MAX || given.n > INT32_MAX - 8 || given.k > INT32_MAX - 32) return "a dimension exceeds 2^31";
  for (const void* p : {given.x.codes, given.x.scales, given.w.codes, given.w.scales, given.bias, given.residual,
                        static_cast<const void*>(given.out)})
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return "an operand is not aligned to 16 bytes";
  const Plan p = make_plan(given);
  char* const space = static_cast<char*>(given.workspace);
  LinearArgs a = given;
  const int64_t groups = a.k / group_size(a.format);
  for (auto [operand, needed, offset, rows] : {std::tuple(&a.x, p.swizzle_x, p.x_scales, a.m),
                                               std::tuple(&a.w, p.swizzle_w, p.w_scales, a.n)})
    if (needed) {
      if (const char* error = swizzle_scales(operand->scales, space + offset, rows, groups, handle)) return error;
      operand->scales = space + offset;
      operand->scale_layout = ScaleLayout::swizzled;
    }
  cudaError_t error = cudaSuccess;
  auto padded = [&](auto& pointer, bool needed, int64_t offset, int64_t rows, int64_t width, int64_t to_rows, int64_t to_width) {
    if (!needed || error != cudaSuccess) return;
    error = pad(space + offset, pointer, rows, width, to_rows, to_width, stream);
    pointer = space + offset;
  };
  padded(a.x.codes, p.pad_k, p.x_codes, a.m, a.k / 2, a.m, p.k / 2);
  padded(a.w.codes, p.pad_k || p.pad_n, p.w_codes, a.n, a.k / 2, p.n, p.k / 2);
  padded(a.bias, p.pad_n && a.bias, p.bias, 1, a.n * 2, 1, p.n * 2);
  padded(a.residual, p.pad_n && a.residual, p.residual, a.m, a.n * 2, a.m, p.n * 2);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (p.pad_n) a.out = space + p.out;
  a.k = p.k;
  a.n = p.n;

  int device = 0, sms = 0;
  error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int tile = a.tile >= 0 ? a.tile : int(sm100::choose(a.m, a.n, sms));
  if (tile > 1) return "there is no such tile";
  const bool mx = a.format == Format::mxfp4;
  const auto run = tile == 0 ? (mx ? sm100::mxfp4_narrow : sm100::nvfp4_narrow) : (mx ? sm100::mxfp4_wide : sm100::nvfp4_wide);
  if (const char* refused = run(a, stream)) return refused;
  if (p.pad_n) {
    error = cudaMemcpy2DAsync(given.out, size_t(given.n * 2), a.out, size_t(p.n * 2), size_t(given.n * 2), size_t(given.m),
                              cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

}  // namespace wush
