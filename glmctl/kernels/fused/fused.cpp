// What a training step does between its matrix products, each in one pass over memory. fp32, row-major, contiguous
// unless a stride is given. Sums over rows go through a fixed number of partial sums, so that a result does not
// depend on the number of threads.
#include "attention.h"
#include "simd.h"

using namespace glm;

namespace {

constexpr long PARTS = 32;  // partial sums over the rows of a weight gradient

struct Range {
  long first, last;
};

Range part(long rows, long index) { return {rows * index / PARTS, rows * (index + 1) / PARTS}; }

void add_parts(const float* parts, long width, float* total) {
  for (long c = 0; c < width; c++) {
    float sum = 0.0f;
    for (long i = 0; i < PARTS; i++) sum += parts[i * width + c];
    total[c] = sum;
  }
}

inline float inverse_rms(const float* x, long width, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (long c = 0; c < width; c++) sum += x[c] * x[c];
  return 1.0f / std::sqrt(sum / width + eps);
}

// dx = r (w g - x r^2 mean(w g x)), dw += g x r; x and dx may not overlap, g and dx may be one
inline void norm_back(const float* g, const float* x, const float* w, float r, long width, float* dx, float* dw) {
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (long c = 0; c < width; c++) dot += g[c] * w[c] * x[c];
  const float factor = dot * r * r / width;
#pragma omp simd
  for (long c = 0; c < width; c++) {
    const float gc = g[c];
    dw[c] += gc * x[c] * r;
    dx[c] = r * (gc * w[c] - x[c] * factor);
  }
}

}  // namespace

extern "C" {

int glm_strip() { return STRIP; }

void glm_rms_norm(long rows, long width, const float* x, const float* w, float eps, float* y, float* r, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < rows; i++) {
    const float *xi = x + i * width, scale = inverse_rms(xi, width, eps);
    float* yi = y + i * width;
    r[i] = scale;
#pragma omp simd
    for (long c = 0; c < width; c++) yi[c] = xi[c] * scale * w[c];
  }
}

void glm_rms_norm_back(long rows, long width, const float* g, const float* x, const float* w, const float* r, float* dx,
                       float* dw, float* parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < PARTS; p++) {
    float* mine = parts + p * width;
    std::memset(mine, 0, sizeof(float) * width);
    const Range range = part(rows, p);
    for (long i = range.first; i < range.last; i++)
      norm_back(g + i * width, x + i * width, w, r[i], width, dx + i * width, mine);
  }
  add_parts(parts, width, dw);
}

// y = rotate(norm(x)): x [tokens, heads, d]; cos and sin [tokens, d], sin negative in the first half. w null = no norm
void glm_norm_rope(long tokens, long heads, long d, long rotary, const float* x, const float* w, float eps,
                   const float* cosine, const float* sine, float* y, float* r, int threads) {
  const long half = rotary / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++) {
    const float *c = cosine + t * d, *s = sine + t * d;
    for (long h = 0; h < heads; h++) {
      const long at = (t * heads + h) * d;
      const float* xi = x + at;
      float* yi = y + at;
      if (w != nullptr) {
        const float scale = r[t * heads + h] = inverse_rms(xi, d, eps);
#pragma omp simd
        for (long i = 0; i < d; i++) yi[i] = xi[i] * scale * w[i];
        xi = yi;
      }
#pragma omp simd
      for (long i = 0; i < half; i++) {
        const float a = xi[i], b = xi[i + half];
        yi[i] = a * c[i] + b * s[i];
        yi[i + half] = b * c[i + half] + a * s[i + half];
      }
      if (w == nullptr)
        for (long i = rotary; i < d; i++) yi[i] = xi[i];
    }
  }
}

void glm_norm_rope_back(long tokens, long heads, long d, long rotary, const float* g, const float* x, const float* w,
                        const float* r, const float* cosine, const float* sine, float* dx, float* dw, float* parts,
                        int threads) {
  const long half = rotary / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < PARTS; p++) {
    float* mine = parts + p * d;
    std::memset(mine, 0, sizeof(float) * d);
    const Range range = part(tokens, p);
    for (long t = range.first; t < range.last; t++) {
      const float *c = cosine + t * d, *s = sine + t * d;
      for (long h = 0; h < heads; h++) {
        const long at = (t * heads + h) * d;
        const float* gi = g + at;
        float* out = dx + at;
#pragma omp simd
        for (long i = 0; i < half; i++) {
          const float a = gi[i], b = gi[i + half];
          out[i] = a * c[i] + b * s[i + half];
          out[i + half] = b * c[i + half] + a * s[i];
        }
        for (long i = rotary; i < d; i++) out[i] = gi[i];
        if (w != nullptr) norm_back(out, x + at, w, r[t * heads + h], d, out, mine);
      }
    }
  }
  if (w != nullptr) add_parts(parts, d, dw);
}

// out = silu(gate) up (weight of the row, when given); gate and up have row strides
void glm_swiglu(long rows, long width, const float* gate, long gate_stride, const float* up, long up_stride,
                const float* weight, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < rows; i++) {
    const float *a = gate + i * gate_stride, *b = up + i * up_stride, w = weight == nullptr ? 1.0f : weight[i];
    float* o = out + i * width;
#pragma omp simd
    for (long c = 0; c < width; c++) o[c] = a[c] / (1.0f + exp_of(-a[c])) * b[c] * w;
  }
}

// Gradients of gate, up and the row's weight; `hidden`, when given, becomes the forward's result again
void glm_swiglu_back(long rows, long width, const float* g, const float* gate, long gate_stride, const float* up,
                     long up_stride, const float* weight, float* dgate, long dgate_stride, float* dup, long dup_stride,
                     float* dweight, float* hidden, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < rows; i++) {
    const float *a = gate + i * gate_stride, *b = up + i * up_stride, *gi = g + i * width;
    const float w = weight == nullptr ? 1.0f : weight[i];
    float *da = dgate + i * dgate_stride, *db = dup + i * dup_stride;
    float* hi = hidden == nullptr ? nullptr : hidden + i * width;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (long c = 0; c < width; c++) {
      const float sigmoid = 1.0f / (1.0f + exp_of(-a[c])), silu = a[c] * sigmoid, gc = gi[c];
      dot += gc * silu * b[c];
      da[c] = gc * w * b[c] * sigmoid * (1.0f + a[c] * (1.0f - sigmoid));
      db[c] = gc * w * silu;
      if (hi != nullptr) hi[c] = silu * b[c] * w;
    }
    if (dweight != nullptr) dweight[i] = dot;
  }
}

// Each row's -log softmax(logits)[target] + z log(Z)^2, and the logits become its gradient when `gradient`
void glm_softmax_loss(long rows, long width, long stride, float* logits, const int64_t* target, float z, float* loss,
                      int gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < rows; i++) {
    float* row = logits + i * stride;
    const float chosen = row[target[i]], top = largest(row, width), sum = exponentials(row, width, top);
    const float normaliser = std::log(sum) + top;
    loss[i] = normaliser - chosen + z * normaliser * normaliser;
    if (!gradient) continue;
    const float inverse = (1.0f + 2.0f * z * normaliser) / sum;
#pragma omp simd
    for (long c = 0; c < width; c++) row[c] *= inverse;
    row[target[i]] -= 1.0f;
  }
}

// out[i] = sum over k of rows[place[i, k]]; with k = 1 a plain gather
void glm_gather_sum(long count, long k, long width, const float* rows, const int64_t* place, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < count; i++) {
    float* o = out + i * width;
    std::memcpy(o, rows + place[i * k] * width, sizeof(float) * width);
    for (long j = 1; j < k; j++) {
      const float* from = rows + place[i * k + j] * width;
#pragma omp simd
      for (long c = 0; c < width; c++) o[c] += from[c];
    }
  }
}

void glm_attention(long documents, const int64_t* start, const int64_t* length, long H, long K, long d, float scale,
                   const float* q, const float* k, const float* v, float* out, float* lse, int threads) {
  const Shape z{H, K, d, scale};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room;
#pragma omp for schedule(dynamic, 1)
    for (long t = 0; t < documents * K; t++)
      forward_task(z, start[t / K], length[t / K], t % K, q, k, v, out, lse, room);
  }
}

void glm_attention_back(long documents, const int64_t* start, const int64_t* length, long H, long K, long d,
                        float scale, const float* q, const float* k, const float* v, const float* out,
                        const float* lse, const float* grad, float* dq, float* dk, float* dv, int threads) {
  const Shape z{H, K, d, scale};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room;
#pragma omp for schedule(dynamic, 1)
    for (long t = 0; t < documents * K; t++)
      backward_task(z, start[t / K], length[t / K], t % K, q, k, v, out, lse, grad, dq, dk, dv, room);
  }
}

}  // extern "C"
