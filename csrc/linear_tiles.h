// Chooses the tile of a product. The kernels, the tests and the model of benchmarks/projection.py share these numbers.
// They come from counting, not from measurements: no such GPU was at hand.
#pragma once

#include <cstdint>

#include "fp4_layout.h"

namespace wush {

constexpr int64_t tiles(int64_t size, int64_t of) { return (size + of - 1) / of; }

namespace sm120 {

// Rows and columns of the output a block computes, and how much of K it holds at a time.
struct Shape { int bm, bn, bk, warps_m, warps_n, warps_k, stages, blocks; };            // blocks on one multiprocessor

enum class Choice : int { narrow, middle, wide };
constexpr Shape SHAPES[] = {{16, 32, 512, 1, 1, 4, 3, 2}, {64, 32, 256, 2, 1, 2, 3, 2}, {128, 128, 128, 2, 4, 1, 4, 1}};

// The wide tile if its grid fills the GPU. Otherwise smaller tiles spread the weight over more blocks.
constexpr Choice choose(int64_t m, int64_t n, int sms) {
  if (m <= 16) return Choice::narrow;
  return m > 64 && tiles(m, 128) * tiles(n, 128) >= sms ? Choice::wide : Choice::middle;
}

// Words of scales of some rows in a stage; bytes of a stage; bytes of shared memory of a block, which holds the stages
// and at the end the sums of the warps that share a tile.
constexpr int scale_words(const Shape& s, int rows, int group) { return s.bk / (4 * group) * shared_scale_rows(rows); }
constexpr int stage_bytes(const Shape& s, int group) {
  const int bytes = (s.bm + s.bn) * s.bk / 2 + 4 * (scale_words(s, s.bm, group) + scale_words(s, s.bn, group));
  return (bytes + 127) / 128 * 128;
}
constexpr int shared_bytes(const Shape& s, int group) {
  const int stages = s.stages * stage_bytes(s, group), sums = 4 * (s.warps_k - 1) * s.bm * s.bn;
  return stages > sums ? stages : sums;
}

}  // namespace sm120

namespace sm100 {

enum class Choice : int { narrow, wide };                        // 128 x 64 a block; 256 x 256 a pair of blocks

constexpr Choice choose(int64_t m, int64_t n, int sms) {
  return m > 128 && 2 * tiles(m, 256) * tiles(n, 256) >= sms ? Choice::wide : Choice::narrow;
}

}  // namespace sm100

}  // namespace wush
