// torch.ops.wush_<target>.fp4_linear and swizzle_scales: checks, outputs, launch. fp4_linear is wush::fp4_linear of
// wush_compile/ops/core.py, but says for each operand whether its scales are swizzled, and takes a `tile` (-1: the
// launcher chooses). bias and residual have the output's dtype.

#include <climits>

#include "fp4_layout.h"
#include "linear.h"
#include "stable.h"

namespace wush {
namespace {

void check(const Tensor& t, int32_t device, ScalarType type, int64_t elements, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name, " is on another device than the codes");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.numel() == elements, name, " has ", t.numel(), " elements, not ", elements);
}

Operand operand(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& global_scale, bool swizzled,
                int64_t rows, int64_t k, int64_t group, int32_t device) {
  check(codes, device, ScalarType::Byte, rows * k / 2, "codes");
  check(scales, device, ScalarType::Byte, swizzled ? swizzled_bytes(rows, k / group) : rows * (k / group), "scales");
  if (global_scale.has_value()) check(*global_scale, device, ScalarType::Float, 1, "global_scale");
  return {codes.const_data_ptr(), scales.const_data_ptr(), static_cast<const float*>(pointer(global_scale)),
          swizzled ? ScaleLayout::swizzled : ScaleLayout::row_major};
}

Tensor fp4_linear(Tensor codes, Tensor scales, std::optional<Tensor> global_scale, Tensor weight_codes,
                  Tensor weight_scales, std::optional<Tensor> weight_global_scale, std::optional<Tensor> bias,
                  std::optional<Tensor> residual, std::string format, ScalarType out_dtype, bool swizzled,
                  bool weight_swizzled, int64_t tile) {
  STD_TORCH_CHECK(format == "mxfp4" || format == "nvfp4", "format ", format, " has no CUDA kernel");
  STD_TORCH_CHECK(codes.is_cuda() && codes.dim() >= 1 && weight_codes.dim() == 2,
                  "codes must be [.., K/2] and [N, K/2]");
  LinearArgs a{};
  a.format = format == "mxfp4" ? Format::mxfp4 : Format::nvfp4;
  const int64_t group = group_size(a.format), rank = codes.dim();
  a.k = 2 * codes.size(rank - 1);
  a.n = weight_codes.size(0);
  a.m = a.k == 0 ? 0 : codes.numel() / (a.k / 2);
  STD_TORCH_CHECK(a.k > 0 && a.k % group == 0, "width ", a.k, " is not a multiple of ", group);
  STD_TORCH_CHECK(2 * weight_codes.size(1) == a.k, "x has ", a.k, " channels, the weight ", 2 * weight_codes.size(1));
  const int32_t device = codes.get_device_index();
  a.x = operand(codes, scales, global_scale, swizzled, a.m, a.k, group, device);
  a.w = operand(weight_codes, weight_scales, weight_global_scale, weight_swizzled, a.n, a.k, group, device);
  STD_TORCH_CHECK(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half || out_dtype == ScalarType::Float,
                  "out_dtype must be bf16, fp16 or fp32");
  a.out_type = out_dtype == ScalarType::BFloat16 ? OutType::bf16
               : out_dtype == ScalarType::Half   ? OutType::fp16 : OutType::fp32;
  if (bias.has_value()) check(*bias, device, out_dtype, a.n, "bias");
  if (residual.has_value()) check(*residual, device, out_dtype, a.m * a.n, "residual");
  a.bias = pointer(bias);
  a.residual = pointer(residual);
  a.tile = tile < 0 ? -1 : int(tile < INT_MAX ? tile : INT_MAX);

  torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(codes.sizes().begin(), codes.sizes().end());
  shape[rank - 1] = a.n;
  Tensor out = torch::stable::new_empty(codes, shape, out_dtype);
  if (a.m == 0 || a.n == 0) return out;
  a.out = out.mutable_data_ptr();
  const Tensor workspace = torch::stable::new_empty(codes, {linear_workspace(a)}, ScalarType::Byte);
  a.workspace = workspace.mutable_data_ptr();
  check_launch("fp4_linear", linear(a, current_stream(device)));
  return out;
}

// [rows, groups] -> [ceil(rows/128), ceil(groups/4), 32, 16], zeros as padding.
Tensor swizzle(Tensor scales) {
  STD_TORCH_CHECK(scales.is_cuda() && scales.dim() == 2, "scales must be a CUDA tensor [rows, groups]");
  const int32_t device = scales.get_device_index();
  const int64_t rows = scales.size(0), groups = scales.size(1);
  check(scales, device, ScalarType::Byte, rows * groups, "scales");
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = torch::stable::new_empty(scales, {(rows + 127) / 128, (groups + 3) / 4, 32, 16}, ScalarType::Byte);
  if (out.numel() > 0)
    check_launch("swizzle_scales",
                 swizzle_scales(scales.const_data_ptr(), out.mutable_data_ptr(), rows, groups, current_stream(device)));
  return out;
}

}  // namespace
}  // namespace wush

WUSH_LIBRARY(WUSH_NAMESPACE, m) {
  m.def(
      "fp4_linear(Tensor codes, Tensor scales, Tensor? global_scale, Tensor weight_codes, Tensor weight_scales,"
      " Tensor? weight_global_scale, Tensor? bias, Tensor? residual, str format, ScalarType out_dtype, bool swizzled,"
      " bool weight_swizzled, int tile=-1) -> Tensor");
  m.def("swizzle_scales(Tensor scales) -> Tensor");
}

WUSH_LIBRARY_IMPL(WUSH_NAMESPACE, m) {
  m.impl("fp4_linear", TORCH_BOX(&wush::fp4_linear));
  m.impl("swizzle_scales", TORCH_BOX(&wush::swizzle));
}
