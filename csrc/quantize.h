// Launchers of the quantizers. This header does not use torch.

#pragma once

#include <cstdint>

namespace wush {

enum class Format { mxfp4, nvfp4 };
enum class Rule { absmax, ocp, paper, mse };
enum class Prologue { none, rms_norm, silu_mul, add_rms_norm };

// x [rows, width] bf16 or fp16, 16-byte aligned, rows `stride` elements apart; width is a multiple of the group size.
struct QuantizeArguments {
  const void* x;
  int64_t stride;
  int64_t rows;
  int width;
  bool half;                     // fp16, else bf16: x, up, gain, total and transform
  const void* up;                // silu_mul, add_rms_norm: [rows, width]
  int64_t up_stride;
  const void* gain;              // both norms: [width] or nullptr for ones
  bool gain_rounded;             // both norms: gain * round(value), else round(gain * value)
  bool gain_plus_one;            // both norms: 1 + gain
  float eps;                     // both norms
  const float* eps_pointer;      // both norms: read instead of eps if not nullptr
  float* inverse_rms;            // both norms: scratch, [rows]
  void* total;                   // add_rms_norm: x + up, [rows, width] dense, 16-byte aligned
  const void* transform;         // [blocks, G, G] with G the group size, or nullptr
  bool shared;                   // one matrix for all blocks of columns
  const float* global_scale;     // nullptr for 1
  Rule rule;
  Prologue prologue;
  bool swizzled;                 // scales [ceil(rows/128), ceil(groups/4), 32, 16], zeros as padding
  uint8_t* codes;                // [rows, width/2]
  uint8_t* scales;               // [rows, width/G], or swizzled
  void* stream;
};

// nullptr, or the error of the launch.
const char* quantize_mxfp4(const QuantizeArguments& arguments);
const char* quantize_nvfp4(const QuantizeArguments& arguments);

}  // namespace wush
