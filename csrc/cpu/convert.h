// 16-bit floats and the scales' bytes, to fp32 and back.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace wush::cpu::WUSH_LEVEL {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float read(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(p)[i];
    case Type::f16: return _cvtsh_ss(static_cast<const uint16_t*>(p)[i]);
    default: return from_bits(uint32_t(static_cast<const uint16_t*>(p)[i]) << 16);
  }
}

inline uint16_t to_bf16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;   // NaN
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;     // nearest, ties to even
}

inline float rounded(float value, Type type) {
  switch (type) {
    case Type::f32: return value;
    case Type::f16: return _cvtsh_ss(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
    default: return from_bits(uint32_t(to_bf16(value)) << 16);
  }
}

inline void write(void* p, Type type, int64_t i, float value) {
  switch (type) {
    case Type::f32: static_cast<float*>(p)[i] = value; break;
    case Type::f16: static_cast<uint16_t*>(p)[i] = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); break;
    default: static_cast<uint16_t*>(p)[i] = to_bf16(value);
  }
}

// The same of kLanes numbers from the i-th on.
inline Floats read_vector(const void* p, Type type, int64_t i) {
  switch (type) {
    case Type::f32: return load(static_cast<const float*>(p) + i);
    case Type::f16: return from_half(static_cast<const uint16_t*>(p) + i);
    default: return from_bf16(static_cast<const uint16_t*>(p) + i);
  }
}

inline void write_vector(void* p, Type type, int64_t i, Floats v) {
  switch (type) {
    case Type::f32: store(static_cast<float*>(p) + i, v); break;
    case Type::f16: to_half(static_cast<uint16_t*>(p) + i, v); break;
    default: store_upper(static_cast<uint16_t*>(p) + i, round_bf16(v));
  }
}

inline Floats round_vector(Floats v, Type type) {
  uint16_t half[kLanes];
  switch (type) {
    case Type::f32: return v;
    case Type::f16: to_half(half, v); return from_half(half);
    default: return round_bf16(v);
  }
}

inline float exp2_of(int n) { return from_bits(n > -127 ? uint32_t(n + 127) << 23 : 0x400000); }

inline float e4m3_value(int byte) {
  if ((byte & 0x7f) == 0x7f) return __builtin_nanf("");
  const int exponent = (byte >> 3) & 15;
  const float value = ((byte & 7) + (exponent ? 8 : 0)) * exp2_of((exponent ? exponent : 1) - 10);
  return byte & 0x80 ? -value : value;
}

inline float e8m0_value(int byte) { return byte == 0xff ? __builtin_nanf("") : exp2_of(byte - 127); }

// A table of the factors of all scale bytes.
struct Factors {
  float value[256];
  explicit Factors(Format format) {
    for (int byte = 0; byte < 256; byte++) value[byte] = format == Format::mxfp4 ? e8m0_value(byte) : e4m3_value(byte);
  }
};
inline const float* factors(Format format) {
  static const Factors mxfp4(Format::mxfp4), nvfp4(Format::nvfp4);
  return format == Format::mxfp4 ? mxfp4.value : nvfp4.value;
}

}  // namespace wush::cpu::WUSH_LEVEL
