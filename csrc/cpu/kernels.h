// The CPU kernels, without torch: plain pointers, fp32 arithmetic in the order of wush_compile/formats.py.
#pragma once

#include <cstdint>

namespace wush::cpu {

enum class Format { mxfp4, nvfp4, int8 };               // int8: of weights alone
enum class Rule { absmax, mse, ocp, paper, search };
enum class Type { f32, f16, bf16 };

inline constexpr int kAlign = 32;                        // operands of a product are padded to this many channels

struct Quantize {
  const void* x;                                         // [rows, width], rows `stride` elements apart
  Type type;
  int64_t rows, width, stride;
  const void* transform;                                 // [blocks, block, block] in row-major order, or nullptr
  Type transform_type;
  int64_t blocks, block;
  const uint16_t* feedback;                              // bf16 [width/group, 6, group/4], or nullptr: round to nearest
  float global_scale;                                    // 1 where there is none
  Format format;
  Rule rule;
  uint8_t* codes;                                        // [rows, width/2]
  uint8_t* scales;                                       // [rows, width/group]

  int64_t group() const { return format == Format::mxfp4 ? 32 : 16; }
  int64_t unit() const;                                  // channels that are quantized independently of all others
  int64_t units() const { return rows * (width / unit()); }
};

struct Linear {
  // One operand is set: codes with scales, e4m3 bytes with a scale a row, or values.
  const uint8_t* codes;                                  // [rows, width/2]
  const uint8_t* scales;                                 // [rows, width/group]
  const uint8_t* fp8;                                    // [rows, width]
  const float* row_scales;                               // [rows], of fp8; else nullptr
  const void* values;                                    // [rows, width]
  Type value_type;

  Format format;
  int64_t rows, width, columns;
  const uint8_t* weight_codes;                           // [columns, width/2], int8: [columns, width]
  const uint8_t* weight_scales;                          // [columns, width/group], int8: two bytes each, of bf16
  float global_scale;                                    // the product of those of one number, 1 where there is none
  const uint16_t* weight_global_scales;                  // bf16 [columns], of each row of the weight, or nullptr
  const void* bias;                                      // [columns] or nullptr, each in the type of the output
  const void* residual;                                  // [rows, columns] or nullptr
  Type type;
  void* out;                                             // [rows, columns]

  void* operand;                                         // scratch: `operand_bytes`, filled by `prepare`
  float* factors;                                        // scratch: [columns], 1 / the global scales, filled by `linear`

  int64_t group() const { return format == Format::nvfp4 ? 16 : 32; }
};

// One level of instructions.
struct Level {
  void (*quantize)(const Quantize&, int64_t begin, int64_t end);     // units begin .. end
  int64_t (*operand_bytes)(const Linear&);
  void (*prepare)(const Linear&, int64_t begin, int64_t end);        // rows begin .. end of the operand
  int64_t (*tile)(const Linear&);                                    // columns that a thread computes at a time
  void (*linear)(const Linear&, int64_t begin, int64_t end);         // columns begin .. end, of every row
};

extern const Level kAvx2, kAvx512;

}  // namespace wush::cpu
