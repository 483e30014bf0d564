// The machine's widest float vector through the compiler's vector extensions, an exponential, and a small product.
#pragma once

#include <cstdint>
#include <cstring>

namespace glm {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int STRIP = 2 * W;  // columns of one product tile; widths and padded lengths are multiples of it

typedef float vf __attribute__((vector_size(W * 4)));

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return vf{} + x; }

// e^x to about 2 ulp for x in [-87, 88], held at the ends beyond; NaN stays NaN. Branch-free, so that loops over it
// become vector code: 2^n by the exponent's bits, e^r by the polynomial of Cephes' expf.
static inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  const float shifted = x * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return p * scale;
}

// C[M x STRIP] = (or +=) A[M x depth] B[depth x STRIP]; A's element (m, k) lies at m * row + k * column.
template <int M>
static inline void tile(long depth, const float* A, long row, long column, const float* B, long ldb, float* C, long ldc,
                        bool add) {
  vf c[M][2];
  for (int m = 0; m < M; m++) {
    c[m][0] = add ? load(C + m * ldc) : vf{};
    c[m][1] = add ? load(C + m * ldc + W) : vf{};
  }
  for (long k = 0; k < depth; k++) {
    const vf b0 = load(B + k * ldb), b1 = load(B + k * ldb + W);
    for (int m = 0; m < M; m++) {
      const vf a = splat(A[m * row + k * column]);
      c[m][0] += a * b0;
      c[m][1] += a * b1;
    }
  }
  for (int m = 0; m < M; m++) {
    store(C + m * ldc, c[m][0]);
    store(C + m * ldc + W, c[m][1]);
  }
}

// The same for any M, and for N a multiple of STRIP.
static inline void product(long M, long N, long depth, const float* A, long row, long column, const float* B, long ldb,
                           float* C, long ldc, bool add) {
  for (long n = 0; n < N; n += STRIP) {
    long m = 0;
    for (; m + 6 <= M; m += 6) tile<6>(depth, A + m * row, row, column, B + n, ldb, C + m * ldc + n, ldc, add);
    const float* a = A + m * row;
    float* c = C + m * ldc + n;
    switch (M - m) {
      case 5: tile<5>(depth, a, row, column, B + n, ldb, c, ldc, add); break;
      case 4: tile<4>(depth, a, row, column, B + n, ldb, c, ldc, add); break;
      case 3: tile<3>(depth, a, row, column, B + n, ldb, c, ldc, add); break;
      case 2: tile<2>(depth, a, row, column, B + n, ldb, c, ldc, add); break;
      case 1: tile<1>(depth, a, row, column, B + n, ldb, c, ldc, add); break;
      default: break;
    }
  }
}

}  // namespace glm
