// torch.ops.wush_<target>.*transform_quantize: checks, outputs, launch. The ops are those of wush_compile/ops/core.py
// and ops/fused.py, with `swizzled` in place of `scale_layout`: scales as Blackwell's products read them
// (ops/layouts.py).

#include "quantize.h"
#include "stable.h"

namespace wush {
namespace {

Format parse_format(const std::string& name) {
  STD_TORCH_CHECK(name == "mxfp4" || name == "nvfp4", "format ", name, " has no CUDA kernel");
  return name == "mxfp4" ? Format::mxfp4 : Format::nvfp4;
}

Rule parse_rule(const std::string& name, Format format) {
  if (name == "absmax") return Rule::absmax;
  if (name == "paper") return Rule::paper;
  if (name == "mse") return Rule::mse;
  STD_TORCH_CHECK(name == "ocp" && format == Format::mxfp4, "scale rule ", name, " is not one of the format's");
  return Rule::ocp;
}

// Elements from a row to the next, if one stride walks the leading dimensions and rows can be read 16 bytes at a time;
// else -1.
int64_t row_stride(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t rank = sizes.size();
  int64_t stride = -1, extent = 1;                       // extent: number of rows in the dimensions so far
  for (int64_t d = rank - 2; d >= 0; d--) {
    if (sizes[d] == 1) continue;
    if (stride < 0) stride = strides[d];
    if (strides[d] != stride * extent) return -1;
    extent *= sizes[d];
  }
  if (stride < 0) stride = sizes[rank - 1];
  const bool dense = strides[rank - 1] == 1 || sizes[rank - 1] == 1;
  const bool aligned = stride % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return dense && aligned && stride >= 0 ? stride : -1;
}

struct Rows {
  Tensor tensor;                                         // keeps a copy alive, if one was made
  int64_t stride;
};

Rows rows_of(const Tensor& x) {
  int64_t stride = row_stride(x);
  if (stride >= 0) return {x, stride};
  const Tensor dense = torch::stable::contiguous(x);     // x itself if only the alignment is wrong
  stride = row_stride(dense);
  return {stride >= 0 ? dense : torch::stable::clone(dense), x.size(-1)};
}

std::tuple<Tensor, Tensor> run(QuantizeArguments& q, const Tensor& x, const std::optional<Tensor>& transform,
                               const std::optional<Tensor>& global_scale, const std::string& format_name,
                               const std::string& rule, bool swizzled) {
  const Format format = parse_format(format_name);
  const int64_t group = format == Format::mxfp4 ? 32 : 16, rank = x.dim();
  STD_TORCH_CHECK(x.is_cuda() && rank >= 1, "x must be a CUDA tensor with at least one dimension");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "x must be bf16 or fp16");
  const int64_t width = x.size(rank - 1), rows = width == 0 ? 0 : x.numel() / width;
  STD_TORCH_CHECK(width % group == 0 && width < (1 << 30), "width ", width, " is not a multiple of ", group);
  const int32_t device = x.get_device_index();
  auto check = [&](const std::optional<Tensor>& other, const char* name) {
    if (other.has_value())
      STD_TORCH_CHECK(other->is_cuda() && other->get_device_index() == device, name, " is on another device than x");
  };
  check(transform, "transform");
  check(global_scale, "global_scale");
  if (transform.has_value()) {
    const auto& t = *transform;
    STD_TORCH_CHECK(t.dim() == 3 && t.size(1) == group && t.size(2) == group && t.scalar_type() == x.scalar_type(),
                    "transform must be [blocks, ", group, ", ", group, "] of the dtype of x");
    STD_TORCH_CHECK(t.size(0) == 1 || t.size(0) * group == width, t.size(0), " blocks of ", group,
                    " do not cover width ", width);
    STD_TORCH_CHECK(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
                    "transform must be contiguous and begin at a multiple of 16 bytes");
    q.shared = t.size(0) == 1;
  }
  if (global_scale.has_value())
    STD_TORCH_CHECK(global_scale->scalar_type() == ScalarType::Float && global_scale->numel() == 1,
                    "global_scale must be one fp32 number");
  q.rows = rows;
  q.width = width;
  q.half = x.scalar_type() == ScalarType::Half;
  q.transform = pointer(transform);
  q.global_scale = static_cast<const float*>(pointer(global_scale));
  q.rule = parse_rule(rule, format);
  q.swizzled = swizzled;

  torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[rank - 1] = width / 2;
  Tensor codes = torch::stable::new_empty(x, shape, ScalarType::Byte);
  if (swizzled)
    shape = {(rows + 127) / 128, (width / group + 3) / 4, 32, 16};
  else
    shape[rank - 1] = width / group;
  Tensor scales = torch::stable::new_empty(x, shape, ScalarType::Byte);
  if (rows > 0) {
    q.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
    q.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
    q.stream = current_stream(device);
    check_launch("transform_quantize", format == Format::mxfp4 ? quantize_mxfp4(q) : quantize_nvfp4(q));
  }
  return {codes, scales};
}

std::tuple<Tensor, Tensor> transform_quantize(Tensor x, std::optional<Tensor> transform,
                                              std::optional<Tensor> global_scale, std::string format,
                                              std::string scale_rule, bool swizzled) {
  QuantizeArguments q{};
  const Rows rows = rows_of(x);
  q.x = rows.tensor.const_data_ptr();
  q.stride = rows.stride;
  return run(q, x, transform, global_scale, format, scale_rule, swizzled);
}

// Fills in what both norms have in common; returns the memory that their kernels share.
Tensor set_norm(QuantizeArguments& q, const Tensor& x, const std::optional<Tensor>& weight, double eps,
                const std::optional<Tensor>& eps_tensor, const std::string& gain) {
  const int64_t width = x.size(-1);
  STD_TORCH_CHECK((gain == "none") != weight.has_value(), "gain ", gain, " does not fit the weight");
  STD_TORCH_CHECK(gain == "none" || gain == "rounded" || gain == "wide" || gain == "wide_plus_one", "gain ", gain,
                  " is not one of none, rounded, wide, wide_plus_one");
  if (weight.has_value())
    STD_TORCH_CHECK(weight->is_cuda() && weight->scalar_type() == x.scalar_type() && weight->numel() == width &&
                        weight->is_contiguous() && reinterpret_cast<uintptr_t>(weight->const_data_ptr()) % 16 == 0,
                    "weight must be [", width, "] of the dtype of x, aligned to 16 bytes");
  if (eps_tensor.has_value())
    STD_TORCH_CHECK(eps_tensor->is_cuda() && eps_tensor->scalar_type() == ScalarType::Float && eps_tensor->numel() == 1,
                    "eps_tensor must be one fp32 number on the device of x");
  const Tensor scratch = torch::stable::new_empty(x, {width == 0 ? 0 : x.numel() / width}, ScalarType::Float);
  q.gain = pointer(weight);
  q.gain_rounded = gain == "rounded";
  q.gain_plus_one = gain == "wide_plus_one";
  q.eps = static_cast<float>(eps);
  q.eps_pointer = static_cast<const float*>(pointer(eps_tensor));
  q.inverse_rms = static_cast<float*>(scratch.mutable_data_ptr());
  return scratch;
}

// The rows of two tensors, which must be alike.
std::tuple<Rows, Rows> set_two(QuantizeArguments& q, const Tensor& x, const Tensor& up, const char* names) {
  STD_TORCH_CHECK(x.dim() == up.dim() && x.scalar_type() == up.scalar_type() && up.is_cuda() &&
                      x.get_device_index() == up.get_device_index(),
                  names, " differ in rank, dtype or device");
  for (int64_t d = 0; d < x.dim(); d++) STD_TORCH_CHECK(x.size(d) == up.size(d), names, " differ in shape");
  const Rows rows = rows_of(x), up_rows = rows_of(up);
  q.x = rows.tensor.const_data_ptr();
  q.stride = rows.stride;
  q.up = up_rows.tensor.const_data_ptr();
  q.up_stride = up_rows.stride;
  return {rows, up_rows};
}

std::tuple<Tensor, Tensor> rms_norm_transform_quantize(Tensor x, std::optional<Tensor> weight, double eps,
                                                       std::optional<Tensor> eps_tensor, std::string gain,
                                                       std::optional<Tensor> transform,
                                                       std::optional<Tensor> global_scale, std::string format,
                                                       std::string scale_rule, bool swizzled) {
  QuantizeArguments q{};
  const Rows rows = rows_of(x);
  const Tensor scratch = set_norm(q, x, weight, eps, eps_tensor, gain);
  q.x = rows.tensor.const_data_ptr();
  q.stride = rows.stride;
  q.prologue = Prologue::rms_norm;
  return run(q, x, transform, global_scale, format, scale_rule, swizzled);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_transform_quantize(
    Tensor x, Tensor residual, std::optional<Tensor> weight, double eps, std::optional<Tensor> eps_tensor,
    std::string gain, std::optional<Tensor> transform, std::optional<Tensor> global_scale, std::string format,
    std::string scale_rule, bool swizzled) {
  QuantizeArguments q{};
  const auto rows = set_two(q, x, residual, "x and its residual");
  const Tensor scratch = set_norm(q, x, weight, eps, eps_tensor, gain);
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  Tensor total = torch::stable::new_empty(x, shape, x.scalar_type());
  q.prologue = Prologue::add_rms_norm;
  q.total = total.mutable_data_ptr();
  auto [codes, scales] = run(q, x, transform, global_scale, format, scale_rule, swizzled);
  return {codes, scales, total};
}

std::tuple<Tensor, Tensor> silu_mul_transform_quantize(Tensor gate, Tensor up, std::optional<Tensor> transform,
                                                       std::optional<Tensor> global_scale, std::string format,
                                                       std::string scale_rule, bool swizzled) {
  QuantizeArguments q{};
  const auto rows = set_two(q, gate, up, "gate and up");
  q.prologue = Prologue::silu_mul;
  return run(q, gate, transform, global_scale, format, scale_rule, swizzled);
}

}  // namespace
}  // namespace wush

#define WUSH_QUANTIZER \
  "Tensor? transform, Tensor? global_scale, str format, str scale_rule, bool swizzled) -> (Tensor codes, Tensor scales)"

WUSH_LIBRARY(WUSH_NAMESPACE, m) {
  m.def("transform_quantize(Tensor x, " WUSH_QUANTIZER);
  m.def("rms_norm_transform_quantize(Tensor x, Tensor? weight, float eps, Tensor? eps_tensor, str gain, "
        WUSH_QUANTIZER);
  m.def("add_rms_norm_transform_quantize(Tensor x, Tensor residual, Tensor? weight, float eps, Tensor? eps_tensor, "
        "str gain, Tensor? transform, Tensor? global_scale, str format, str scale_rule, bool swizzled) -> (Tensor codes, "
        "Tensor scales, Tensor total)");
  m.def("silu_mul_transform_quantize(Tensor gate, Tensor up, " WUSH_QUANTIZER);
}

WUSH_LIBRARY_IMPL(WUSH_NAMESPACE, m) {
  m.impl("transform_quantize", TORCH_BOX(&wush::transform_quantize));
  m.impl("rms_norm_transform_quantize", TORCH_BOX(&wush::rms_norm_transform_quantize));
  m.impl("add_rms_norm_transform_quantize", TORCH_BOX(&wush::add_rms_norm_transform_quantize));
  m.impl("silu_mul_transform_quantize", TORCH_BOX(&wush::silu_mul_transform_quantize));
}
