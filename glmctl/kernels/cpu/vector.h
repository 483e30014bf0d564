// The machine's widest float vector, through the compiler's vector extensions: AVX-512, AVX, or 4 lanes of anything.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace glm {

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 4)));  // half as many lanes

template <class V, class P>
static inline V load_as(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline vf load(const float* p) { return load_as<vf>(p); }
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return vf{} + x; }

static inline float bf16_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// W narrow weights as floats. In intrinsics because gcc 12 takes a conversion between vectors of unlike width apart.
static inline vf widen_bf16(const uint16_t* p) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
#endif
}
static inline vf widen_int8(const int8_t* p) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(load_as<vb>(p), vi), vf);
#endif
}

// The lanes of v in float64, lower half and upper half onto theirs.
static inline void add_wide(vf v, vd& low, vd& high) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  low += (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  high += (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX__)
  low += (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  high += (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
  for (int i = 0; i < W / 2; i++) low[i] += v[i], high[i] += v[i + W / 2];
#endif
}

// E4M3 (1 sign, 4 exponent, 3 mantissa bits) has a place in half precision: shifted there it is 1/256 of its value,
// subnormal numbers included. Its NaN becomes a number, so weights that have one are given a NaN for a scale.
constexpr float FP8_UNIT = 256.f;

static inline uint16_t fp8_as_half(uint8_t bits) {
  return static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7F) << 7);
}
static inline float half_to_float(uint16_t half) {
  uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  float x = exponent ? 0.f : static_cast<float>(mantissa) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (exponent) bits = (exponent + 112) << 23 | mantissa << 13;
  bits |= sign;
  std::memcpy(&x, &bits, 4);
  return x;
}
// 1/FP8_UNIT of a weight
static inline float fp8_to_float(uint8_t bits) { return half_to_float(fp8_as_half(bits)); }
static inline vf widen_fp8(const uint8_t* p) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  return (vf)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((int16_t)0xBFFF)));
#elif defined(__AVX2__) && defined(__F16C__)
  __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
  return (vf)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((int16_t)0xBFFF)));
#else
  float lane[W];
  for (int i = 0; i < W; i++) lane[i] = fp8_to_float(p[i]);
  return load(lane);
#endif
}

// W floats at p, or `count` of them and zeros
static inline vf load_part(const float* p, int count) {
  float part[W] = {};
  std::memcpy(part, p, sizeof(float) * count);
  return load(part);
}

// Lane i of the result is the sum of a[i]. Every a[i] is summed by the same tree (upper half onto lower half, again
// and again), so a result does not depend on where its accumulator stands: batch invariance rests on this.
static inline vf sum_lanes(const vf (&a)[W]) {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
  auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  };
  auto quarters = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  };
  __m512 c[4];
  for (int i = 0; i < 4; i++)
    c[i] = quarters(halves((__m512)a[i], (__m512)a[i + 4]), halves((__m512)a[i + 8], (__m512)a[i + 12]));
  __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
  __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(c[2], c[3]), _mm512_unpackhi_ps(c[2], c[3]));
  return (vf)_mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
#elif defined(__AVX__)
  __m256 c[4];
  for (int i = 0; i < 4; i++) {
    __m256 x = (__m256)a[i], y = (__m256)a[i + 4];
    c[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  __m256 low = _mm256_add_ps(_mm256_unpacklo_ps(c[0], c[1]), _mm256_unpackhi_ps(c[0], c[1]));
  __m256 high = _mm256_add_ps(_mm256_unpacklo_ps(c[2], c[3]), _mm256_unpackhi_ps(c[2], c[3]));
  return (vf)_mm256_add_ps(_mm256_shuffle_ps(low, high, 0x44), _mm256_shuffle_ps(low, high, 0xEE));
#else
  vf result;
  for (int i = 0; i < W; i++) result[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
  return result;
#endif
}

static inline float sum(vf v) {
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}

// exp(x) within 2 ulp on [-87.3, 88.7], clamped outside; NaN stays NaN. Cephes' polynomial for exp on [-ln2/2, ln2/2].
static inline vf exponential(vf x) {
  const vf low = splat(-87.3f), high = splat(88.7f), magic = splat(12582912.f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  vf n = (x * 1.44269504f + magic) - magic;
  vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.f;
  // n reaches 128, which has no float of its own: two halves
  vi whole = __builtin_convertvector(n, vi);
  vi half = whole >> 1, rest = whole - half;
  vf scale_a = (vf)((half + 127) << 23), scale_b = (vf)((rest + 127) << 23);
  return p * scale_a * scale_b;
}

// silu(gate) * up, `count` of them; a part of a vector is computed as a whole one, so results do not depend on it
static inline void swiglu(const float* gate, const float* up, float* out, int count) {
  for (int i = 0; i < count; i += W) {
    int here = count - i < W ? count - i : W;
    vf g = here == W ? load(gate + i) : load_part(gate + i, here);
    vf u = here == W ? load(up + i) : load_part(up + i, here);
    vf y = g / (exponential(-g) + 1.f) * u;
    std::memcpy(out + i, &y, sizeof(float) * here);
  }
}

}  // namespace glm
