// Launchers of the quantizers. This header does not use torch.

#pragma once

#include <cstdint>

namespace wush {

enum class Format { mxfp4, nvfp4 };
enum class Rule { absmax, ocp, paper, mse };
enum class Prologue { none, rms_norm, silu_mul };

// x [rows, width] bf16 or fp16, 16-byte aligned, rows `stride` elements apart; width is a multiple of the group size.
struct QuantizeArguments {
  const void* x;
  int64_t stride;
  int64_t rows;
  int width;
  bool half;                     // fp16, else bf16: x, up, gain and transform
  const void* up;                // silu_mul: [rows, width]
  int64_t up_stride;
  const void* gain;              // rms_norm: [width] or nullptr for ones
  bool gain_rounded;             // rms_norm: gain * round(value), else round(gain * value)
  bool gain_plus_one;            // rms_norm: 1 + gain
  float eps;                     // rms_norm
  const float* eps_pointer;      // rms_norm: read instead of eps if not nullptr
  float* inverse_rms;            // rms_norm: scratch, [rows]
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
