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

// Memory that is needed next, asked for turn by turn while the processor computes: a panel that several tokens go
// through is read in one go and then not again for a while, which leaves the memory idle.
class Ahead {
 public:
  Ahead(const void* next, long bytes, int turns)
      : at_(static_cast<const char*>(next)),
        end_(at_ + bytes),
        step_((bytes / LINE + turns - 1) / std::max(turns, 1)) {}
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

// All rows of m (at most PANEL) times n <= T tokens; out[token * PANEL + row]. The last token stands in for those that
// are missing.
template <Format F, int T>
static void pass(const Matrix& m, const float* const* x, int n, float* out) {
  constexpr int R = W / T;
  const float* xs[T];
  float spare[PANEL];
  for (int t = 0; t < T; t++) xs[t] = x[std::min(t, n - 1)];
  for (int r = 0; r < m.rows; r += R) {
    float* at[T];
    for (int t = 0; t < T; t++) at[t] = t < n ? out + static_cast<long>(t) * PANEL + r : spare;
    strip<F, R, T>(m, r, xs, at);
  }
}

constexpr int TOKENS = W >= 16 ? 4 : 2;  // of a square tile

// m times fewer tokens than a square tile has, or one tile's
template <Format F, int T = TOKENS>
static void few(const Matrix& m, const float* const* x, int n, float* out) {
  // three quarters of a tile are a tile
  if (4 * n >= 3 * T) return pass<F, T>(m, x, n, out);
  if constexpr (T > 1) {
    few<F, T / 2>(m, x, std::min(n, T / 2), out);
    if (n > T / 2) few<F, T / 2>(m, x + T / 2, n - T / 2, out + T / 2 * PANEL);
  }
}

// m (at most PANEL rows) times n <= BLOCK tokens; out[token * PANEL + row]. `source` is m as it lies in memory.
template <Format F>
static void panel_of(const Matrix& m, const Matrix& source, const float* const* x, int n, float* out) {
  if (n <= TOKENS) {
    // several rows of narrow weights share a page: read side by side, they look like no sequence to the processor
    if (F != FP32) Ahead(source.from(m.rows, 0).data, source.bytes(), 1).turn();
    return few<F>(m, x, n, out);
  }
  constexpr int T = TOKENS, R = W / T;
  // few enough rows at a time that they and T tokens stay in a 32 KiB cache
  const int height = std::max(m.cols <= 384 ? PANEL : m.cols <= 1024 ? 8 : 4, R);
  const int many = n / T * T;
  Ahead ahead(source.from(m.rows, 0).data, source.bytes(), many / T * ((m.rows + R - 1) / R));
  for (int top = 0; top < m.rows; top += height)
    for (int t = 0; t < many; t += T)
      for (int r = top; r < std::min(top + height, m.rows); r += R) {
        float* at[T];
        for (int i = 0; i < T; i++) at[i] = out + static_cast<long>(t + i) * PANEL + r;
        ahead.turn();
        strip<F, R, T>(m, r, x + t, at);
      }
  if (many < n) few<F>(m, x + many, n - many, out + static_cast<long>(many) * PANEL);
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
