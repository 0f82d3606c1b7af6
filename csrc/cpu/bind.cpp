// torch.ops.wush_cpu.*: arguments, scratch, threads. wush_compile/kernels/cpu.py checks what they read: no exception leaves
// this library, since a compiler may have linked a C++ runtime of its own into it.

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "kernels.h"

namespace wush::cpu {

int64_t Quantize::unit() const { return transform ? std::lcm(block, group()) : group(); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const Level* level() {
  static const Level* found = [] {
    __builtin_cpu_init();
    const char* wanted = std::getenv("WUSH_CPU_LEVEL");   // "avx2": for tests
    const bool least = wanted != nullptr && std::string(wanted) == "avx2";
    if (!least && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16")) return &kAvx512;
    return __builtin_cpu_supports("x86-64-v3") ? &kAvx2 : nullptr;
  }();
  return found;
}

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    default: return Type::bf16;
  }
}

int64_t element_size(Type type) { return type == Type::f32 ? 4 : 2; }

// Calls f(begin, end) by threads, `grain` items or more at a time.
template <class F>
void parallel(int64_t count, int64_t grain, F f) {
  if (count > 0) torch::stable::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

// Work below this many operations a thread costs less than waking the thread.
constexpr int64_t kGrain = 1 << 15;

void transform_quantize(const Tensor& x, const std::optional<Tensor>& transform, const std::optional<Tensor>& feedback,
                        double global_scale, bool nvfp4, int64_t rule, const Tensor& codes, const Tensor& scales) {
  Quantize q{};
  q.x = x.const_data_ptr();
  q.type = type_of(x.scalar_type());
  q.rows = x.size(0), q.width = x.size(1), q.stride = x.stride(0);
  q.format = nvfp4 ? Format::nvfp4 : Format::mxfp4;
  q.rule = Rule(rule);
  if (transform.has_value()) {
    q.transform = transform->const_data_ptr();
    q.transform_type = type_of(transform->scalar_type());
    q.blocks = transform->size(0), q.block = transform->size(1);
  }
  if (feedback.has_value()) q.feedback = static_cast<const uint16_t*>(feedback->const_data_ptr());
  q.global_scale = float(global_scale);
  q.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  q.scales = static_cast<uint8_t*>(scales.mutable_data_ptr());
  if (q.rows == 0 || q.width == 0) return;
  const int64_t work = q.unit() * (q.transform ? q.block : 8);
  parallel(q.units(), kGrain / work, [&](int64_t begin, int64_t end) { level()->quantize(q, begin, end); });
}

void fp4_linear(const Tensor& codes, const std::optional<Tensor>& scales, const Tensor& weight_codes,
                const Tensor& weight_scales, double global_scale, const std::optional<Tensor>& weight_global_scales,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t format,
                const std::string& activation, const Tensor& out) {
  Linear a{};
  a.format = Format(format);
  a.rows = out.size(0), a.columns = out.size(1), a.width = weight_codes.size(1) * (a.format == Format::int8 ? 1 : 2);
  a.type = type_of(out.scalar_type());
  if (activation == "same") {
    a.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
    a.scales = static_cast<const uint8_t*>(scales->const_data_ptr());
  } else if (activation == "fp8") {
    a.fp8 = static_cast<const uint8_t*>(codes.const_data_ptr());
    a.row_scales = static_cast<const float*>(scales->const_data_ptr());
  } else {
    a.values = codes.const_data_ptr();
    a.value_type = type_of(codes.scalar_type());
  }
  a.weight_codes = static_cast<const uint8_t*>(weight_codes.const_data_ptr());
  a.weight_scales = static_cast<const uint8_t*>(weight_scales.const_data_ptr());
  a.global_scale = float(global_scale);
  if (weight_global_scales.has_value())
    a.weight_global_scales = static_cast<const uint16_t*>(weight_global_scales->const_data_ptr());
  if (bias.has_value()) a.bias = bias->const_data_ptr();
  if (residual.has_value()) a.residual = residual->const_data_ptr();
  a.out = out.mutable_data_ptr();
  if (a.rows == 0 || a.columns == 0) return;
  const int64_t bytes = (level()->operand_bytes(a) + 63) / 64 * 64, size = element_size(a.type);
  const Tensor scratch = torch::stable::new_empty(out, {(bytes + 4 * a.columns) / size + 64});
  auto aligned = (reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr()) + 63) & ~uintptr_t(63);
  a.operand = reinterpret_cast<void*>(aligned);
  a.factors = reinterpret_cast<float*>(aligned + bytes);
  parallel(a.rows, kGrain / (a.width + 1), [&](int64_t begin, int64_t end) { level()->prepare(a, begin, end); });
  // A thread takes whole tiles, one after the other.
  const int64_t tile = level()->tile(a), tiles = (a.columns + tile - 1) / tile;
  parallel(tiles, kGrain / (tile * a.width * a.rows / 16 + 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) level()->linear(a, t * tile, std::min((t + 1) * tile, a.columns));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wush_cpu, m) {
  m.def(
      "transform_quantize(Tensor x, Tensor? transform, Tensor? feedback, float global_scale, bool nvfp4, int rule, "
      "Tensor(a!) codes, Tensor(b!) scales) -> ()");
  m.def(
      "fp4_linear(Tensor codes, Tensor? scales, Tensor weight_codes, Tensor weight_scales, float global_scale, "
      "Tensor? weight_global_scales, Tensor? bias, Tensor? residual, int format, str activation, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wush_cpu, CPU, m) {
  m.impl("transform_quantize", TORCH_BOX(&transform_quantize));
  m.impl("fp4_linear", TORCH_BOX(&fp4_linear));
}

}  // namespace wush::cpu

// nullptr if the kernels run on this machine; else the reason, in one sentence.
extern "C" __attribute__((visibility("default"))) const char* wush_problem() {
  return wush::cpu::level() ? nullptr : "this CPU lacks AVX2 or FMA";
}
