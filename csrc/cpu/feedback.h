// Rounding with feedback: the arithmetic of wush_compile/feedback.py, on a group a lane.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace wush::cpu::WUSH_LEVEL {
namespace {

inline Floats magnitude(Floats v) { return floats(both(bits(v), every(0x7fffffff))); }

constexpr int kSteps = 4, kPairs = 6;
constexpr float kLargest = 0x1p100f;                     // groups with larger values are rounded to nearest

// Groups whose scales are known, of any rows and channels. Their codes are written when every lane has a group, and by
// `finish`. Many rows share a group's numbers F; a few rows have as many F as groups.
template <int G>
class Batch {
 public:
  static constexpr int kPlaces = G / kSteps;             // channels of a step
  static constexpr int kNumbers = kPairs * kPlaces;      // of F, for a group

  explicit Batch(float global_scale) : per_scale_(1.f / global_scale) {
    for (int lane = 0; lane < kLanes; lane++) inverse_[lane] = unit_[lane] = 0.f, kept_[lane] = 0;
  }

  // `scale` is the group's, decoded; `inverse` what its values are multiplied by; F of its channels is `feedback`.
  void push(const Floats* x, float inverse, float scale, float amax, const uint16_t* feedback, uint8_t* codes) {
    for (int i = 0; i < G / kLanes; i++) store(x_ + count_ * G + i * kLanes, x[i]);
    inverse_[count_] = inverse, unit_[count_] = scale * per_scale_;
    kept_[count_] = amax < kLargest ? int(0xffff0000) : 0;
    feedback_[count_] = reinterpret_cast<const char*>(feedback);
    codes_[count_] = codes;
    if (++count_ == kLanes) round();
  }

  void finish() {
    if (count_) round();
  }

 private:
  void read_feedback() {
    bool same = true;
    for (int lane = count_; lane < kLanes; lane++) feedback_[lane] = feedback_[0];
    for (int lane = 1; lane < kLanes; lane++) same &= feedback_[lane] == feedback_[0];
    if (same && feedback_[0] == held_) return;
    held_ = same ? feedback_[0] : nullptr;
    for (int i = 0; i < kNumbers; i += 8) {              // two numbers in 32 bits
      Floats pairs[4];
      if (same) {
        uint32_t four[4];
        std::memcpy(four, feedback_[0] + 2 * i, 16);
        for (int j = 0; j < 4; j++) pairs[j] = floats(every(four[j]));
      } else {
        load_columns(feedback_, 2 * i, pairs);
      }
      for (int j = 0; j < 4; j++) {
        f_[i + 2 * j] = floats(shift_left<16>(bits(pairs[j])));
        f_[i + 2 * j + 1] = floats(both(bits(pairs[j]), every(0xffff0000)));
      }
    }
  }

  void round() {
    read_feedback();
    const char* rows[kLanes];
    for (int lane = 0; lane < kLanes; lane++) rows[lane] = reinterpret_cast<const char*>(x_ + lane * G);
    step<3>(rows), step<2>(rows), step<1>(rows), step<0>(rows);
    alignas(64) uint32_t words[G / 8][kLanes];
    for (int i = 0; i < G / 8; i++) store(reinterpret_cast<float*>(words[i]), floats(words_[i]));
    for (int lane = 0; lane < count_; lane++)
      for (int i = 0; i < G / 8; i++) std::memcpy(codes_[lane] + 4 * i, &words[i][lane], 4);
    count_ = 0;
  }

  template <int S>
  void step(const char* const rows[]) {
    Floats x[kPlaces], sums[kPlaces];
    for (int p = 0; p < kPlaces; p += 4) load_columns(rows, 4 * (4 * p + 4 * S), x + p);
    for (int w = 0; w < kPlaces; w++) sums[w] = zero();
    // Products of numbers of bf16 are exact.
#pragma GCC unroll 4
    for (int u = S + 1; u < kSteps; u++)
#pragma GCC unroll 8
      for (int v = 0; v < kPlaces; v++) {
        const Floats e = errors_[u][v];
#pragma GCC unroll 8
        for (int w = 0; w < kPlaces; w++) sums[w] = fma(e, f_[(u * (u - 1) / 2 + S) * kPlaces + (w ^ v)], sums[w]);
      }
    const Floats inverse = load(inverse_), unit = load(unit_);
    const Integers kept = bits(load(reinterpret_cast<const float*>(kept_))), sign = every(0x80000000);
#pragma GCC unroll 8
    for (int p = 0; p < kPlaces; p += 4) {
      Integers half = every(0);                          // four codes, the last in the highest bits
#pragma GCC unroll 4
      for (int w = p; w < p + 4; w++) {
        const Floats z = mul(sub(x[w], sums[w]), inverse), a = least(magnitude(z), all(6.f));
        // A power of two, with 6 of its last places: the sum's last three bits are the steps to `a`, plus 6.
        const Floats c = floats(add(both(bits(most(a, all(1.f))), every(0x7f800000)), every((22 << 23) + 6)));
        const Floats sum = add(a, c);
        // The exponent adds 2 a power of two to the code, and 2·149 = 2 mod 8.
        const Integers code = add(bits(sum), shift_right<22>(bits(sum)));
        half = either(shift_right<4>(half), select(sign, bits(z), shift_left<28>(code)));
        if constexpr (S > 0) {
          const Floats value = floats(select(sign, bits(z), bits(sub(sum, c))));
          const Integers e = bits(sub(mul(value, unit), x[w]));
          const Integers odd = both(shift_right<16>(e), every(1));
          errors_[S][w] = floats(both(add(add(e, every(0x7fff)), odd), kept));
        }
      }
      Integers& word = words_[p / 2 + S / 2];
      word = S % 2 ? half : either(word, shift_right<16>(half));
    }
  }

  alignas(64) float x_[kLanes * G] = {};
  Floats f_[kNumbers], errors_[kSteps][kPlaces];
  Integers words_[G / 8];
  alignas(64) float inverse_[kLanes], unit_[kLanes];
  alignas(64) int kept_[kLanes];                         // which bits of an error are kept: those of bf16, or none
  const char *feedback_[kLanes], *held_ = nullptr;  // of which F is f_, in every lane
  uint8_t* codes_[kLanes];
  const float per_scale_;
  int count_ = 0;
};

}  // namespace
}  // namespace wush::cpu::WUSH_LEVEL
