// Rotary embedding and paged attention of one layer, for rows at any positions of their sequences.
#pragma once

#include "model.h"

namespace glm {

constexpr int QUERIES = 8;  // rows of one sequence that share a pass over its keys

// Rows of one sequence at increasing positions.
struct Run {
  int first, count;
};

static std::vector<Run> runs_of(const Batch& b) {
  std::vector<Run> runs;
  for (int n = 0; n < b.rows; n++) {
    bool joins = n > 0 && b.sequence[n] == b.sequence[n - 1] && b.position[n] > b.position[n - 1] &&
                 runs.back().count < QUERIES;
    if (joins)
      runs.back().count++;
    else
      runs.push_back({n, 1});
  }
  return runs;
}

// (a, b) -> (a cos - b sin, b cos + a sin) for the halves of the first `rotary` dimensions
static void rotate(float* head, const float* cos_sin, int rotary) {
  int half = rotary / 2;
  for (int i = 0; i < half; i++) {
    float a = head[i], b = head[i + half], c = cos_sin[i], s = cos_sin[i + half];
    head[i] = a * c - b * s;
    head[i + half] = b * c + a * s;
  }
}

// QK-norm and rotation of one row's heads, in place; its keys and values go into the cache. Queries come out scaled.
static void prepare_heads(const Config& c, const Layer& layer, const Batch& b, int n, float* qkv, const float* cos_sin,
                          float* keys, float* values) {
  int d = c.head_dim;
  float* k = qkv + c.heads * d;
  const float* v = k + c.kv_heads * d;
  float scale = 1.f / std::sqrt(static_cast<float>(d));
  for (int h = 0; h < c.heads + c.kv_heads; h++) {
    bool query = h < c.heads;
    float* head = qkv + static_cast<long>(h) * d;
    const float* weight = layer.vector(query ? Q_NORM : K_NORM);
    if (weight) rms_norm(head, weight, head, d, static_cast<float>(c.eps));
    rotate(head, cos_sin, static_cast<int>(c.rotary));
    for (int i = 0; query && i < d; i++) head[i] *= scale;
  }
  int64_t at = b.position[n];
  long block = b.table[b.sequence[n] * b.max_blocks + at / b.block_size];
  for (int h = 0; h < c.kv_heads; h++) {
    long place = ((block * c.kv_heads + h) * b.block_size + at % b.block_size) * d;
    std::memcpy(keys + place, k + static_cast<long>(h) * d, sizeof(float) * d);
    std::memcpy(values + place, v + static_cast<long>(h) * d, sizeof(float) * d);
  }
}

// out[d] = out[d] * keep + sum over j of p[j] * values[j][d]
static void add_values(float* out, float keep, const float* p, const float* values, int count, int d) {
  int i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    vf o[4];
    for (int u = 0; u < 4; u++) o[u] = load(out + i + u * W) * keep;
    for (int j = 0; j < count; j++)
      for (int u = 0; u < 4; u++) o[u] += load(values + static_cast<long>(j) * d + i + u * W) * p[j];
    for (int u = 0; u < 4; u++) store(out + i + u * W, o[u]);
  }
  for (; i + W <= d; i += W) {
    vf o = load(out + i) * keep;
    for (int j = 0; j < count; j++) o += load(values + static_cast<long>(j) * d + i) * p[j];
    store(out + i, o);
  }
  if (i < d) {
    int here = d - i;
    vf o = load_part(out + i, here) * keep;
    for (int j = 0; j < count; j++) o += load_part(values + static_cast<long>(j) * d + i, here) * p[j];
    std::memcpy(out + i, &o, sizeof(float) * here);
  }
}

// Online softmax (Milakov & Gimelshein 2018) over the blocks of a sequence, for one key-value head and the query heads
// that share it. What is computed for a row depends on its own position and cache alone, not on the rows beside it.
static void attend(const Config& c, const Batch& b, const Run& run, int kv_head, const float* qkv, long qkv_width,
                   const float* keys, const float* values, float* out) {
  const int d = c.head_dim, shared = c.heads / c.kv_heads, piece = std::min(W, b.block_size);
  const int32_t* table = b.table + b.sequence[run.first] * b.max_blocks;
  const int64_t* position = b.position + run.first;
  const long out_width = c.heads * d;
  int queries = run.count * shared;
  thread_local std::vector<float> scores, top, total;
  thread_local std::vector<const float*> query;
  scores.resize(static_cast<size_t>(queries) * PANEL);
  top.assign(queries, -3e38f);
  total.assign(queries, 0.f);
  query.resize(queries);
  auto result = [&](int q) {
    return out + (run.first + q / shared) * out_width + static_cast<long>(kv_head * shared + q % shared) * d;
  };
  for (int q = 0; q < queries; q++) {
    query[q] = qkv + (run.first + q / shared) * qkv_width + static_cast<long>(kv_head * shared + q % shared) * d;
    std::fill_n(result(q), d, 0.f);
  }
  int begin = 0;  // rows before it have seen all of theirs
  for (int64_t start = 0; start <= position[run.count - 1]; start += piece) {
    while (position[begin] < start) begin++;
    const int skipped = static_cast<int>(std::max<int64_t>(0, b.first_place - start));
    if (skipped >= piece) continue;
    long block = table[start / b.block_size];
    long place = ((block * c.kv_heads + kv_head) * b.block_size + start % b.block_size) * d;
    int from = begin * shared;
    Matrix rows{keys + place, nullptr, piece, d, FP32};
    for (int q = from; q < queries; q += BLOCK) {
      int count = std::min(BLOCK, queries - q);
      panel(rows, query.data() + q, count, scores.data() + static_cast<long>(q) * PANEL, nullptr);
    }
    for (int q = from; q < queries; q++) {
      int seen = static_cast<int>(std::min<int64_t>(piece, position[q / shared] - start + 1));
      float* s = scores.data() + static_cast<long>(q) * PANEL;
      const bool part = skipped > 0 || seen < W;
      if (part)
        for (int j = 0; j < W; j++) s[j] = j < skipped || j >= seen ? -3e38f : s[j];
      float most[W];
      std::memcpy(most, s, sizeof most);
      for (int half = W / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++) most[j] = most[j] > most[j + half] ? most[j] : most[j + half];
      const float highest = most[0] > top[q] ? most[0] : top[q];
      store(s, exponential(load(s) - highest));
      if (part)
        for (int j = 0; j < W; j++) s[j] = j < skipped || j >= seen ? 0.f : s[j];
      float change[W];
      store(change, exponential(splat(top[q] - highest)));
      const float added = sum(load(s));
      total[q] = total[q] * change[0] + added;
      top[q] = highest;
      add_values(result(q), change[0], s + skipped, values + place + static_cast<long>(skipped) * d, seen - skipped, d);
    }
  }
  for (int q = 0; q < queries; q++) {
    float* o = result(q);
    float scale = 1.f / total[q];
    for (int i = 0; i < d; i++) o[i] *= scale;
  }
}

}  // namespace glm
