// Causal attention inside documents, forward and backward, on the projections' own layout [tokens, heads, width].
//
// One task is one key-value head of one document with all its query heads, so that its dK and dV are summed by one
// thread in one order. Queries go in blocks of ROWS against all earlier keys at once; scores never leave the cache.
#pragma once

#include <cmath>
#include <vector>

#include "simd.h"

namespace glm {

constexpr long ROWS = 24;  // four product tiles high: their scores against a few hundred keys stay in L1/L2

struct Shape {
  long H, K, d;
  float scale;
};

static inline long padded(long n) { return (n + STRIP - 1) / STRIP * STRIP; }

// [length, d] with a row stride -> [d, padded length], zero beyond
static void transpose(const float* x, long stride, long length, long d, float* out) {
  const long wide = padded(length);
  for (long c = 0; c < d; c++) {
    for (long j = 0; j < length; j++) out[c * wide + j] = x[j * stride + c];
    for (long j = length; j < wide; j++) out[c * wide + j] = 0.0f;
  }
}

static inline float largest(const float* s, long n) {
  float top = s[0];
#pragma omp simd reduction(max : top)
  for (long j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
  return top;
}

// s -> exp(s - top), its sum returned
static inline float exponentials(float* s, long n, float top) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (long j = 0; j < n; j++) {
    s[j] = exp_of(s[j] - top);
    sum += s[j];
  }
  return sum;
}

static void forward_task(const Shape& z, long start, long length, long kv, const float* q, const float* k,
                         const float* v, float* out, float* lse, std::vector<float>& room) {
  const long d = z.d, wide = padded(length), group = z.H / z.K;
  const long qs = z.H * d, ks = z.K * d;
  room.resize(d * wide + ROWS * wide + ROWS * d);
  float *kt = room.data(), *s = kt + d * wide, *qb = s + ROWS * wide;
  const float* v0 = v + start * ks + kv * d;
  transpose(k + start * ks + kv * d, ks, length, d, kt);
  for (long h = kv * group; h < (kv + 1) * group; h++) {
    for (long i = 0; i < length; i += ROWS) {
      const long rows = length - i < ROWS ? length - i : ROWS, keys = i + rows, span = padded(keys);
      for (long r = 0; r < rows; r++)
        for (long c = 0; c < d; c++) qb[r * d + c] = q[(start + i + r) * qs + h * d + c] * z.scale;
      product(rows, span, d, qb, d, 1, kt, wide, s, wide, false);
      float inverse[ROWS];
      for (long r = 0; r < rows; r++) {
        const long seen = i + r + 1;
        float* row = s + r * wide;
        const float top = largest(row, seen), sum = exponentials(row, seen, top);
        for (long j = seen; j < keys; j++) row[j] = 0.0f;
        inverse[r] = 1.0f / sum;
        lse[(start + i + r) * z.H + h] = top + std::log(sum);
      }
      float* o = out + (start + i) * qs + h * d;
      product(rows, d, keys, s, wide, 1, v0, ks, o, qs, false);
      for (long r = 0; r < rows; r++)
        for (long c = 0; c < d; c++) o[r * qs + c] *= inverse[r];
    }
  }
}

static void backward_task(const Shape& z, long start, long length, long kv, const float* q, const float* k,
                          const float* v, const float* out, const float* lse, const float* grad, float* dq, float* dk,
                          float* dv, std::vector<float>& room) {
  const long d = z.d, wide = padded(length), group = z.H / z.K;
  const long qs = z.H * d, ks = z.K * d;
  room.resize(2 * d * wide + 2 * ROWS * wide + ROWS * d);
  float *kt = room.data(), *vt = kt + d * wide, *p = vt + d * wide, *ds = p + ROWS * wide, *qb = ds + ROWS * wide;
  const float* k0 = k + start * ks + kv * d;
  transpose(k0, ks, length, d, kt);
  transpose(v + start * ks + kv * d, ks, length, d, vt);
  float *dk0 = dk + start * ks + kv * d, *dv0 = dv + start * ks + kv * d;
  for (long j = 0; j < length; j++)
    for (long c = 0; c < d; c++) dk0[j * ks + c] = dv0[j * ks + c] = 0.0f;
  for (long h = kv * group; h < (kv + 1) * group; h++) {
    for (long i = 0; i < length; i += ROWS) {
      const long rows = length - i < ROWS ? length - i : ROWS, keys = i + rows, span = padded(keys);
      const long at = (start + i) * qs + h * d;
      for (long r = 0; r < rows; r++)
        for (long c = 0; c < d; c++) qb[r * d + c] = q[at + r * qs + c] * z.scale;
      product(rows, span, d, qb, d, 1, kt, wide, p, wide, false);
      product(rows, span, d, grad + at, qs, 1, vt, wide, ds, wide, false);
      for (long r = 0; r < rows; r++) {
        const long seen = i + r + 1;
        float *pr = p + r * wide, *sr = ds + r * wide;
        float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
        for (long c = 0; c < d; c++) delta += grad[at + r * qs + c] * out[at + r * qs + c];
        const float normaliser = lse[(start + i + r) * z.H + h];
#pragma omp simd
        for (long j = 0; j < seen; j++) {
          pr[j] = exp_of(pr[j] - normaliser);
          sr[j] = pr[j] * (sr[j] - delta);
        }
        for (long j = seen; j < keys; j++) pr[j] = sr[j] = 0.0f;
      }
      product(rows, d, keys, ds, wide, 1, k0, ks, dq + at, qs, false);
      for (long r = 0; r < rows; r++)
        for (long c = 0; c < d; c++) dq[at + r * qs + c] *= z.scale;
      // qb carries the scale already
      product(keys, d, rows, ds, 1, wide, qb, d, dk0, ks, true);
      product(keys, d, rows, p, 1, wide, grad + at, qs, dv0, ks, true);
    }
  }
}

}  // namespace glm
