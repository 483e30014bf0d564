// Weights of four formats times fp32 activations, in one reduction order whatever the format or the batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "vector.h"

namespace glm {

enum Format { FP32 = 0, BF16 = 1, INT8 = 2, FP8 = 3 };
constexpr int INT8_GROUP = 64, FP8_GROUP = 128;  // columns that share a scale

// [rows, cols], row-major. An int8 weight is q * scale[row, col / INT8_GROUP]; an FP8 one (E4M3) is q * scale[row,
// col / FP8_GROUP] / FP8_UNIT.
struct Matrix {
  const void* data = nullptr;
  const float* scale = nullptr;
  int rows = 0, cols = 0;
  Format format = FP32;

  int groups() const {
    const int group = format == FP8 ? FP8_GROUP : INT8_GROUP;
    return (cols + group - 1) / group;
  }
  long bytes() const { return static_cast<long>(rows) * cols * size(); }
  int size() const { return format == FP32 ? 4 : format == BF16 ? 2 : 1; }
  // rows from `first` on, which is a multiple of nothing in particular
  Matrix from(long first, int count) const {
    Matrix part = *this;
    part.data = static_cast<const char*>(data) + first * cols * size();
    if (scale) part.scale = scale + first * groups();
    part.rows = count;
    return part;
  }
};

// One row of a matrix as a stream of fp32 vectors. `at(k)`: W weights from column k; `tail(k, n)`: n of them, then zeros.
template <Format F>
struct Row;

template <>
struct Row<FP32> {
  const float* p;
  Row() = default;
  Row(const Matrix& m, int row) : p(static_cast<const float*>(m.data) + static_cast<long>(row) * m.cols) {}
  vf at(int k) const { return load(p + k); }
  float one(int k) const { return p[k]; }
};

template <>
struct Row<BF16> {
  const uint16_t* p;
  Row() = default;
  Row(const Matrix& m, int row) : p(static_cast<const uint16_t*>(m.data) + static_cast<long>(row) * m.cols) {}
  vf at(int k) const { return widen_bf16(p + k); }
  float one(int k) const { return bf16_to_float(p[k]); }
};

template <>
struct Row<INT8> {
  const int8_t* p;
  const float* scale;
  Row() = default;
  Row(const Matrix& m, int row)
      : p(static_cast<const int8_t*>(m.data) + static_cast<long>(row) * m.cols),
        scale(m.scale + static_cast<long>(row) * m.groups()) {}
  vf at(int k) const { return widen_int8(p + k) * scale[k / INT8_GROUP]; }
  float one(int k) const { return static_cast<float>(p[k]) * scale[k / INT8_GROUP]; }
};

template <>
struct Row<FP8> {
  const uint8_t* p;
  const float* scale;
  Row() = default;
  Row(const Matrix& m, int row)
      : p(static_cast<const uint8_t*>(m.data) + static_cast<long>(row) * m.cols),
        scale(m.scale + static_cast<long>(row) * m.groups()) {}
  vf at(int k) const { return widen_fp8(p + k) * scale[k / FP8_GROUP]; }
  float one(int k) const { return fp8_to_float(p[k]) * scale[k / FP8_GROUP]; }
};

// R rows times T tokens, R * T == W: one accumulator a product, so the order of summation is that of every other shape.
// out[t * R + r]
template <Format F, int R, int T>
static inline void tile(const Row<F> (&row)[R], const float* const* x, int cols, float* out) {
  static_assert(R * T == W, "the accumulators of a tile are as many as a vector's lanes");
  vf acc[W];
  for (int i = 0; i < W; i++) acc[i] = vf{};
  int k = 0;
  for (; k + W <= cols; k += W) {
    vf xs[T];
    for (int t = 0; t < T; t++) xs[t] = load(x[t] + k);
    for (int r = 0; r < R; r++) {
      vf w = row[r].at(k);
      for (int t = 0; t < T; t++) acc[t * R + r] += w * xs[t];
    }
  }
  if (k < cols) {
    vf xs[T];
    for (int t = 0; t < T; t++) xs[t] = load_part(x[t] + k, cols - k);
    for (int r = 0; r < R; r++) {
      float part[W] = {};
      for (int i = k; i < cols; i++) part[i - k] = row[r].one(i);
      vf w = load(part);
      for (int t = 0; t < T; t++) acc[t * R + r] += w * xs[t];
    }
  }
  store(out, sum_lanes(acc));
}

constexpr int PANEL = 16;  // rows that go through the tokens together
constexpr int BLOCK = 64;  // tokens that go through a panel together

// Memory that is needed next, asked for little by little while the processor computes: a panel that several tokens go
// through is read in one go and then not again for a while, which leaves the memory idle.
class Ahead {
 public:
  Ahead(const void* next, long bytes, int turns)
      : at_(static_cast<const char*>(next)), end_(at_ + bytes), step_((bytes / LINE + turns - 1) / std::max(turns, 1)) {}
  void turn() {
    for (long i = 0; i < step_ && at_ < end_; i++, at_ += LINE) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr long LINE = 64;
  const char* at_;
  const char* end_;
  long step_;
};

// rows [first, first + R) of m (fewer at its end) times T tokens; out[t][r] with PANEL floats a token
template <Format F, int R, int T>
static inline void strip(const Matrix& m, int first, const float* const* x, float* const* out) {
  Row<F> row[R];
  for (int r = 0; r < R; r++) row[r] = Row<F>(m, std::min(first + r, m.rows - 1));
  float result[W];
  tile<F, R, T>(row, x, m.cols, result);
  for (int t = 0; t < T; t++) std::memcpy(out[t], result + t * R, sizeof(float) * R);
}

// m (at most PANEL rows) times n <= BLOCK tokens; out[token * PANEL + row]. `source` is m as it lies in memory.
template <Format F>
static void panel_of(const Matrix& m, const Matrix& source, const float* const* x, int n, float* out) {
  constexpr int T4 = W >= 16 ? 4 : 2;
  constexpr int R4 = W / T4;
  // few enough rows at a time that they and T4 tokens stay in a 32 KiB cache
  int height = m.cols <= 384 ? PANEL : m.cols <= 1024 ? 8 : 4;
  height = std::max(height, R4);
  int many = n - n % T4 + (n % T4 > T4 / 2 ? T4 : 0);  // tokens in whole tiles, the last one padded by repetition
  if (m.rows <= R4 && n > 1) many = (n + T4 - 1) / T4 * T4;
  // one token's panel is read without a pause anyway
  Ahead ahead(source.from(m.rows, 0).data, n > 1 ? source.bytes() : 0, many / T4 * ((m.rows + R4 - 1) / R4));
  for (int top = 0; top < m.rows && many; top += height)
    for (int t = 0; t < many; t += T4) {
      const float* xs[T4];
      float spare[PANEL];
      float* to[T4];
      for (int i = 0; i < T4; i++) {
        xs[i] = x[std::min(t + i, n - 1)];
        to[i] = t + i < n ? out + static_cast<long>(t + i) * PANEL : nullptr;
      }
      for (int r = top; r < std::min(top + height, m.rows); r += R4) {
        float* at[T4];
        for (int i = 0; i < T4; i++) at[i] = to[i] ? to[i] + r : spare;
        ahead.turn();
        strip<F, R4, T4>(m, r, xs, at);
      }
    }
  for (int t = many; t < n;) {
    int pair = W >= 16 && n - t >= 2 ? 2 : 1;
    for (int r = 0; r < m.rows; r += W / pair) {
      float* at[2] = {out + static_cast<long>(t) * PANEL + r, out + static_cast<long>(t + pair - 1) * PANEL + r};
      if (pair == 2)
        strip<F, W / 2, 2>(m, r, x + t, at);
      else
        strip<F, W, 1>(m, r, x + t, at);
    }
    t += pair;
  }
}

template <Format F>
static void widen_rows(const Matrix& m, float* to) {
  for (int r = 0; r < m.rows; r++) {
    Row<F> row(m, r);
    float* out = to + static_cast<long>(r) * m.cols;
    int k = 0;
    for (; k + W <= m.cols; k += W) store(out + k, row.at(k));
    for (; k < m.cols; k++) out[k] = row.one(k);
  }
}

constexpr int WIDEN_FROM = 12;  // tokens from which narrow weights are widened once rather than in every tile

// `act(format)` with the format as a type's constant
template <class Act>
static void by_format(Format format, Act act) {
  switch (format) {
    case FP32: return act(std::integral_constant<Format, FP32>());
    case BF16: return act(std::integral_constant<Format, BF16>());
    case INT8: return act(std::integral_constant<Format, INT8>());
    case FP8: return act(std::integral_constant<Format, FP8>());
  }
}

// m (at most PANEL rows) times n <= BLOCK tokens; out[token * PANEL + row]. `wide` has room for PANEL * cols floats.
static void panel(const Matrix& m, const float* const* x, int n, float* out, float* wide) {
  Matrix read = m;
  if (m.format != FP32 && n >= WIDEN_FROM) {
    by_format(m.format, [&](auto format) { widen_rows<format()>(m, wide); });
    read.format = FP32;
    read.data = wide;
  }
  by_format(read.format, [&](auto format) { panel_of<format()>(read, m, x, n, out); });
}

// x * weight / sqrt(mean(x^2) + eps)
static void rms_norm(const float* x, const float* weight, float* out, int width, float eps) {
  vf squares{};
  int k = 0;
  for (; k + W <= width; k += W) {
    vf v = load(x + k);
    squares += v * v;
  }
  if (k < width) {
    vf v = load_part(x + k, width - k);
    squares += v * v;
  }
  float scale = 1.f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
  for (int i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
}

}  // namespace glm
