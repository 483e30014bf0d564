// Rotary embedding and paged attention of one layer, for rows at any positions of their sequences.
//
// Of each block and key-value head the cache holds the keys as [head dim, places] and the values as [places, head dim]:
// scores are made with places as lanes and means of the values with dimensions as lanes, so that nothing is ever summed
// across a vector but the total of the weights.
#pragma once

#include "model.h"

namespace glm {

constexpr int QUERIES = 64;  // of one sequence and key-value head, that share a pass over its keys
constexpr int SPAN = 256;    // places between two rescalings of the running sums
constexpr int TILE = W >= 16 ? 16 : 8;  // accumulators that are worked on together
constexpr float LOWEST = -3e38f;

// Rows of one sequence at increasing positions.
struct Run {
  int first, count;
};

static std::vector<Run> runs_of(const Config& c, const Batch& b) {
  const int longest = std::max<int>(1, QUERIES / static_cast<int>(c.heads / c.kv_heads));
  std::vector<Run> runs;
  for (int n = 0; n < b.rows; n++) {
    bool joins = n > 0 && b.sequence[n] == b.sequence[n - 1] && b.position[n] > b.position[n - 1] &&
                 runs.back().count < longest;
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
  long block = b.table[b.sequence[n] * b.max_blocks + at / b.block_size], offset = at % b.block_size;
  for (int h = 0; h < c.kv_heads; h++) {
    long place = (block * c.kv_heads + h) * b.block_size * d;
    for (int i = 0; i < d; i++) keys[place + i * b.block_size + offset] = k[static_cast<long>(h) * d + i];
    std::memcpy(values + place + offset * d, v + static_cast<long>(h) * d, sizeof(float) * d);
  }
}

// out[q][j] = query q . key j for `lanes` <= W places of a block; keys [d, places], a row every `stride` floats
template <int Q>
static void score_tile(const float* const* query, const float* keys, int stride, int d, int lanes, float* out) {
  vf sums[Q] = {};
  if (lanes == W)
    for (int i = 0; i < d; i++) {
      vf k = load(keys + static_cast<long>(i) * stride);
      for (int q = 0; q < Q; q++) sums[q] += k * query[q][i];
    }
  else
    for (int i = 0; i < d; i++) {
      vf k = load_part(keys + static_cast<long>(i) * stride, lanes);
      for (int q = 0; q < Q; q++) sums[q] += k * query[q][i];
    }
  for (int q = 0; q < Q; q++) std::memcpy(out + static_cast<long>(q) * SPAN, &sums[q], sizeof(float) * lanes);
}

template <int Q>
static void score(const float* const* query, int queries, const float* keys, int stride, int d, int lanes, float* out) {
  int q = 0;
  for (; q + Q <= queries; q += Q)
    score_tile<Q>(query + q, keys, stride, d, lanes, out + static_cast<long>(q) * SPAN);
  if constexpr (Q > 1)
    score<Q / 2>(query + q, queries - q, keys, stride, d, lanes, out + static_cast<long>(q) * SPAN);
}

// The running softmax of one query: the highest score so far, and the sum of exp(score - highest).
struct Softmax {
  float highest = LOWEST, total = 0.f;

  // Scores [from, to) of a span become weights; others up to the next whole vector become 0. Returns by how much what
  // was summed before shrinks (online softmax, Milakov & Gimelshein 2018).
  float weigh(float* s, int from, int to) {
    const int end = (to + W - 1) / W * W;
    std::fill(s, s + from, LOWEST);
    std::fill(s + to, s + end, LOWEST);
    vf most = splat(highest);
    for (int j = 0; j < end; j += W) {
      vf x = load(s + j);
      most = x > most ? x : most;
    }
    float lane[W], top = LOWEST;
    store(lane, most);
    for (int j = 0; j < W; j++) top = lane[j] > top ? lane[j] : top;
    vf added{};
    for (int j = 0; j < end; j += W) {
      store(s + j, exponential(load(s + j) - top));
      for (int i = j; i < from; i++) s[i] = 0.f;
      for (int i = to; i < j + W; i++) s[i] = 0.f;
      added += load(s + j);
    }
    float kept[W];
    store(kept, exponential(splat(highest - top)));
    highest = top;
    total = total * kept[0] + sum(added);
    return kept[0];
  }
};

// Where the values of a span lie: one pointer a block, to [places, head dim].
struct Values {
  const float* const* block;
  int size, d;
};

// out[q][0..V*W) += sum over places [from, to) of p[q][j] * values[j][column..]; the last vector has `part` lanes
template <int Q, int V>
static void value_tile(const Values& v, int column, int part, const float* p, int from, int to, float* const* out) {
  vf sums[Q][V];
  for (int q = 0; q < Q; q++)
    for (int i = 0; i < V; i++)
      sums[q][i] = part < W ? load_part(out[q] + column, part) : load(out[q] + column + i * W);
  for (int j = from; j < to;) {
    const int stop = std::min(to, (j / v.size + 1) * v.size);
    const float* row = v.block[j / v.size] + static_cast<long>(j % v.size) * v.d + column;
    for (; j < stop; j++, row += v.d)
      for (int i = 0; i < V; i++) {
        vf x = part < W ? load_part(row, part) : load(row + i * W);
        for (int q = 0; q < Q; q++) sums[q][i] += x * p[q * SPAN + j];
      }
  }
  for (int q = 0; q < Q; q++)
    for (int i = 0; i < V; i++) std::memcpy(out[q] + column + i * W, &sums[q][i], sizeof(float) * std::min(part, W));
}

// All columns for the queries that see the places [from, to) together.
template <int Q, int V>
static void value_columns(const Values& v, const float* p, int queries, int column, int part, int from, int to,
                          float* const* out) {
  int q = 0;
  for (; q + Q <= queries; q += Q)
    value_tile<Q, V>(v, column, part, p + static_cast<long>(q) * SPAN, from, to, out + q);
  if constexpr (Q > 1)
    value_columns<Q / 2, V>(v, p + static_cast<long>(q) * SPAN, queries - q, column, part, from, to, out + q);
}

static void add_values(const Values& v, const float* p, int queries, int from, int to, float* const* out) {
  int column = 0;
  for (; column + 4 * W <= v.d; column += 4 * W)
    value_columns<TILE / 4, 4>(v, p, queries, column, W, from, to, out);
  for (; column + 2 * W <= v.d; column += 2 * W)
    value_columns<TILE / 2, 2>(v, p, queries, column, W, from, to, out);
  for (; column < v.d; column += W)
    value_columns<8, 1>(v, p, queries, column, std::min(W, v.d - column), from, to, out);
}

// One thread's attention: a run's query heads that share a key-value head, at a time. What is computed for a row
// depends on its own position and cache alone, not on the rows beside it.
class Attention {
 public:
  // keys and values are one layer's; a block has at most SPAN places
  void attend(const Config& c, const Batch& b, const Run& run, int kv_head, const float* qkv, long qkv_width,
              const float* keys, const float* values, float* out) {
    const int d = c.head_dim, shared = c.heads / c.kv_heads, queries = run.count * shared;
    const int64_t* position = b.position + run.first;
    const int32_t* table = b.table + b.sequence[run.first] * b.max_blocks;
    begin(queries);
    for (int q = 0; q < queries; q++) {
      const long row = run.first + q / shared, head = static_cast<long>(kv_head * shared + q % shared) * d;
      query_[q] = qkv + row * qkv_width + head;
      out_[q] = out + row * c.heads * d + head;
      std::fill_n(out_[q], d, 0.f);
    }
    int first = 0;  // rows before it have seen all of theirs
    for (int64_t start = 0; start <= position[run.count - 1]; start += SPAN) {
      while (position[first] < start) first++;
      auto seen = [&](int q) { return static_cast<int>(std::min<int64_t>(SPAN, position[q / shared] - start + 1)); };
      auto block = [&](int place) {
        return (static_cast<long>(table[(start + place) / b.block_size]) * c.kv_heads + kv_head) * b.block_size * d;
      };
      const int from = static_cast<int>(std::max<int64_t>(0, b.first_place - start));
      score_span(b.block_size, d, keys, block, first * shared, queries, seen(queries - 1));
      for (int q = first * shared; q < queries; q++) {
        const float kept = softmax_[q].weigh(scores(q), from, seen(q));
        for (int i = 0; start && i < d; i++) out_[q][i] *= kept;
      }
      add_span(b.block_size, d, values, block, first * shared, queries, from, seen);
    }
    for (int q = 0; q < queries; q++) {
      const float scale = 1.f / softmax_[q].total;
      for (int i = 0; i < d; i++) out_[q][i] *= scale;
    }
  }

 private:
  float* scores(int q) { return scores_.data() + static_cast<long>(q) * SPAN; }

  void begin(int queries) {
    query_.resize(queries);
    out_.resize(queries);
    scores_.resize(static_cast<size_t>(queries) * SPAN);
    softmax_.assign(queries, Softmax());
  }

  // block(place): where the block that holds a place of the span begins. Queries [first, last), places [0, most).
  template <class Block>
  void score_span(int size, int d, const float* keys, Block block, int first, int last, int most) {
    const int lanes = std::min(W, size);
    for (int place = 0; place < most; place += lanes)
      score<8>(query_.data() + first, last - first, keys + block(place) + place % size, size, d, lanes,
               scores(first) + place);
  }

  template <class Block, class Seen>
  void add_span(int size, int d, const float* values, Block block, int first, int last, int from, Seen seen) {
    blocks_.clear();
    for (int place = 0; place < seen(last - 1); place += size) blocks_.push_back(values + block(place));
    const Values v{blocks_.data(), size, d};
    for (int q = first, count; q < last; q += count) {
      // places that all queries of a tile see, then those that only its later ones do
      count = std::min(TILE, last - q);
      const int common = seen(q);
      add_values(v, scores(q), count, from, common, out_.data() + q);
      for (int i = q; i < q + count; i++)
        if (seen(i) > common) add_values(v, scores(i), 1, common, seen(i), out_.data() + i);
    }
  }

  std::vector<const float*> query_, blocks_;
  std::vector<float*> out_;
  std::vector<float, LineAligned<float>> scores_;
  std::vector<Softmax> softmax_;
};

}  // namespace glm
