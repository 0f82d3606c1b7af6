// FP4 block-scaled products: the arguments that every kernel takes. This header does not use torch.
//
//   out[m, n] = residual[m, n] + round(alpha * sum_k x[m, k] w[n, k] + bias[n]),   alpha = 1 / (global_x * global_w)
//
// in that order: an fp32 sum, times alpha, plus bias, one rounding, then the residual in the output's type.
#pragma once

#include <cstdint>

namespace wush {

enum class Format { mxfp4, nvfp4 };                            // e8m0 scales of 32 codes; e4m3 scales of 16
enum class ScaleLayout : int { row_major = 0, swizzled = 1 };  // [rows, K/G], or tiles of 128 x 4 (fp4_layout.h)
enum class OutType : int { bf16 = 0, fp16 = 1, fp32 = 2 };

struct Operand {
  const void* codes;           // uint8 [rows, K/2], contiguous
  const void* scales;          // uint8, as scale_layout says; padding is zeros
  const float* global_scale;   // one fp32 on the device, or null for 1
  ScaleLayout scale_layout;
};

struct LinearArgs {
  Format format;
  OutType out_type;
  int64_t m, n, k;
  Operand x, w;                // [m, k] and [n, k]
  const void* bias;            // out_type [n], or null
  const void* residual;        // out_type [m, n], or null
  void* out;                   // out_type [m, n]
  void* workspace;             // linear_workspace() bytes, aligned to 256
  int tile;                    // one of the target's tiles, for tests and tuning; -1: the launcher chooses
};

constexpr int group_size(Format f) { return f == Format::mxfp4 ? 32 : 16; }

// Each library has one of each, for its target. A launcher returns null, or the reason why it failed.
int64_t linear_workspace(const LinearArgs&);
const char* linear(const LinearArgs&, void* stream);

// Row-major scales [rows, groups] -> swizzled scales, swizzled_bytes() with zeros as padding.
const char* swizzle_scales(const void* from, void* to, int64_t rows, int64_t groups, void* stream);

}  // namespace wush
