// Weights into the packed formats: bf16, int8 with a scale for 64 columns, FP8 (E4M3) with a scale for a block.
#pragma once

#include "matmul.h"
#include "pool.h"

namespace glm {

constexpr float FP8_LARGEST = 448.f;
constexpr float FP8_SMALLEST_AMAX = 1e-12f;  // keeps a block of zeros from dividing by zero

// bf16 with round to nearest even; NaN stays NaN
static uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 64);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// E4M3 with round to nearest even, for |x| <= 448
static uint8_t to_fp8(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  bits &= 0x7FFFFFFF;
  float size;
  std::memcpy(&size, &bits, 4);
  // below the smallest normal number steps are of 2^-9; the eighth is that number
  if (size < 0x1p-6f) return sign | static_cast<uint8_t>(std::nearbyint(size * 0x1p9f));
  bits += 0x7FFFF + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((bits >> 20) - (120 << 3));
}

// The largest size; NaN and infinity stay what they are, since a damaged weight must show in the logits.
static float largest_of(const float* row, long from, long to, float largest = 0.f) {
  for (long i = from; i < to; i++) {
    const float size = std::fabs(row[i]);
    largest = size > largest || std::isnan(size) ? size : largest;
  }
  return largest;
}

static void pack_row_int8(const float* row, int cols, int8_t* q, float* scale) {
  for (int k = 0; k < cols; k += INT8_GROUP) {
    const int end = std::min(k + INT8_GROUP, cols);
    const float largest = largest_of(row, k, end);
    const bool finite = std::isfinite(largest);
    const float step = finite ? largest / 127.f : NAN;
    const float inverse = finite && step > 0.f ? 1.f / step : 0.f;
    scale[k / INT8_GROUP] = step;
    for (int i = k; i < end; i++) {
      const float level = finite ? std::nearbyint(row[i] * inverse) : 1.f;
      q[i] = static_cast<int8_t>(std::min(127.f, std::max(-127.f, level)));
    }
  }
}

// `act(from, to)` for pieces of the rows, shared among threads
template <class Act>
static void in_pieces(long rows, long piece, int threads, Act act) {
  Pool pool(threads);
  pool.run([&](int t) {
    pool.phase(t, [&] { return (rows + piece - 1) / piece; },
               [&](int item) { act(item * piece, std::min(rows, (item + 1) * piece)); });
  });
}

static void widen(const Matrix& source, long from, long to, float* out) {
  Matrix part = source.from(from, static_cast<int>(to - from));
  by_format(source.format, [&](auto format) { widen_rows<format()>(part, out); });
}

static void pack_rows(const Matrix& source, long rows, Format format, void* data, float* scale, int threads) {
  const int cols = source.cols, groups = source.groups();
  in_pieces(rows, 64, threads, [&](long from, long to) {
    std::vector<float> wide(cols);
    for (long r = from; r < to; r++) {
      widen(source, r, r + 1, wide.data());
      if (format == INT8)
        pack_row_int8(wide.data(), cols, static_cast<int8_t*>(data) + r * cols, scale + r * groups);
      else
        for (int k = 0; k < cols; k++) static_cast<uint16_t*>(data)[r * cols + k] = to_bf16(wide[k]);
    }
  });
}

// How FP8 scales lie: matrices of `matrix_rows` rows, each in blocks of height x width.
struct Blocks {
  long matrix_rows, height, width;
};

// A block of `rows` rows of fp32 weights, `cols` apart, into FP8. Whether all of them come out exactly.
static bool pack_block(const float* block, long rows, long cols, long from, long to, float step, uint8_t* q) {
  bool exact = true;
  for (long r = 0; r < rows; r++)
    for (long k = from; k < to; k++) {
      const float level = std::min(FP8_LARGEST, std::max(-FP8_LARGEST, block[r * cols + k] / step));
      q[r * cols + k] = to_fp8(level);
      exact &= fp8_to_float(q[r * cols + k]) * (step * FP8_UNIT) == block[r * cols + k];
    }
  return exact;
}

// Rows [0, rows) of one row of blocks; scales [rows, groups of columns].
static void pack_blocks(const float* wide, long rows, int cols, long width, const float* given, uint8_t* q,
                        float* scale) {
  const long groups = (cols + FP8_GROUP - 1) / FP8_GROUP;
  for (long from = 0; from < cols; from += width) {
    const long to = std::min<long>(from + width, cols);
    float step = given ? given[from / width] : 0.f;
    if (!(step > 0.f) || !pack_block(wide, rows, cols, from, to, step, q)) {
      float largest = 0.f;
      for (long r = 0; r < rows; r++) largest = largest_of(wide + r * cols, from, to, largest);
      // at most the largest number, so that NaN is the only step that is not finite
      step = std::isfinite(largest) ? std::max(largest, FP8_SMALLEST_AMAX) / FP8_LARGEST : NAN;
      if (std::isfinite(largest))
        pack_block(wide, rows, cols, from, to, step, q);
      else
        for (long r = 0; r < rows; r++) std::fill(q + r * cols + from, q + r * cols + to, to_fp8(1.f));
    }
    for (long r = 0; r < rows; r++)
      for (long g = from / FP8_GROUP; g * FP8_GROUP < to; g++) scale[r * groups + g] = step * FP8_UNIT;
  }
}

static void pack_fp8(const Matrix& source, long rows, Blocks blocks, const float* given, uint8_t* data, float* scale,
                     int threads) {
  const int cols = source.cols;
  const long groups = (cols + FP8_GROUP - 1) / FP8_GROUP, across = (cols + blocks.width - 1) / blocks.width;
  const long down = (blocks.matrix_rows + blocks.height - 1) / blocks.height;
  in_pieces(rows / blocks.matrix_rows * down, 1, threads, [&](long strip, long) {
    const long first = strip / down * blocks.matrix_rows, top = first + strip % down * blocks.height;
    const long height = std::min(top + blocks.height, first + blocks.matrix_rows) - top;
    std::vector<float> wide(height * cols);
    widen(source, top, top + height, wide.data());
    pack_blocks(wide.data(), height, cols, blocks.width, given ? given + strip * across : nullptr, data + top * cols,
                scale + top * groups);
  });
}

}  // namespace glm
