// One token of each row of logits: the largest, or by inverse CDF with a given uniform number, after temperature,
// top-k, top-p and min-p. The definition is glmctl/kernels/draw.py. A row's token is a fixed sequence of operations on
// its own logits and parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

namespace glm {

struct Drawing {
  const float* logits;
  long vocab;
  float temperature;  // 0: the largest logit
  int64_t top_k;      // 0: all
  float top_p;        // 1: all
  float min_p;        // 0: all
  double uniform;

  bool truncated() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

struct Drawn {
  int64_t token;
  float logprob;  // under the softmax at the row's temperature, before truncation
};

// The logits of one row, divided by its temperature, W at a time; -inf behind the end.
class Scaled {
 public:
  explicit Scaled(const Drawing& d)
      : x_(d.logits), vocab_(d.vocab), temperature_(d.temperature > 0 ? d.temperature : 1.f) {
    vf top = splat(-std::numeric_limits<float>::infinity());
    for (long i = 0; i < vocab_; i += W) {
      vf x = raw(i);
      top = x > top ? x : top;
    }
    float lane[W];
    store(lane, top);
    largest_ = *std::max_element(lane, lane + W);
    // division keeps the order, so this is the largest of the quotients too
    top_ = largest_ / temperature_;
  }

  long vocab() const { return vocab_; }
  float top() const { return top_; }
  float at(long i) const { return x_[i] / temperature_; }
  vf vector(long i) const { return temperature_ == 1.f ? raw(i) : raw(i) / temperature_; }

  // e^(logit - the largest): 1 for the likeliest token; 0 below e^-87, the smallest that fp32 holds in full
  vf weight(vf logit) const {
    vf x = logit - top_;
    vf w = exponential(x);
    return x < splat(-87.3f) ? splat(0.f) : w;
  }
  vf weight(long i) const { return weight(vector(i)); }

  int64_t argmax() const { return std::find(x_, x_ + vocab_ - 1, largest_) - x_; }

 private:
  vf raw(long i) const {
    if (i + W <= vocab_) return load(x_ + i);
    float part[W];
    std::fill(part, part + W, -std::numeric_limits<float>::infinity());
    std::memcpy(part, x_ + i, sizeof(float) * (vocab_ - i));
    return load(part);
  }

  const float* x_;
  long vocab_;
  float temperature_, largest_, top_;
};

// Weights in id order, summed a chunk at a time, so that only the chunk of the drawn token is walked one by one.
class Chunks {
 public:
  explicit Chunks(const Scaled& s) : s_(s), sums_(sums_of_thread()) {
    sums_.clear();
    for (long first = 0; first < s.vocab(); first += CHUNK) {
      const long end = std::min(first + CHUNK, s.vocab());
      vd low{}, high{};
      for (long i = first; i < end; i += W) add_wide(s.weight(i), low, high);
      low += high;
      double sum = 0;
      for (int j = 0; j < W / 2; j++) sum += low[j];
      sums_.push_back(sum);
      total_ += sum;
    }
  }

  double total() const { return total_; }

  // the first token whose cumulative weight exceeds u * total; never one of weight zero
  int64_t draw(double u) const {
    const double target = u * total_;
    double before = 0;
    size_t chunk = 0;
    while (chunk + 1 < sums_.size() && before + sums_[chunk] <= target) before += sums_[chunk++];
    const long first = chunk * CHUNK, end = std::min(first + CHUNK, s_.vocab());
    int64_t last = end - 1;
    for (long i = first; i < end; i += W) {
      float w[W];
      store(w, s_.weight(i));
      for (long j = 0; j < std::min<long>(W, end - i); j++) {
        if (!(w[j] > 0)) continue;
        before += w[j];
        last = i + j;
        if (before > target) return last;
      }
    }
    return last;  // the chunk's sum was rounded up
  }

 private:
  static constexpr long CHUNK = 128;

  static std::vector<double>& sums_of_thread() {
    thread_local std::vector<double> sums;
    return sums;
  }

  const Scaled& s_;
  std::vector<double>& sums_;
  double total_ = 0;
};

// Tokens by descending logit, equal ones by id, of which truncation keeps a first part. They lie in buckets of like
// logits, and a bucket is sorted only when somebody asks for the order inside it.
class Ranking {
 public:
  explicit Ranking(const Scaled& s) : room_(room_of_thread()), first_(BUCKETS + 1, 0), mass_(BUCKETS, 0), sorted_(BUCKETS, 0) {
    const long V = s.vocab();
    room_.logit.resize(V + W);
    room_.weight.resize(V + W);
    room_.bucket.resize(V);
    room_.ids.resize(V);
    for (long i = 0; i < V; i += W) {
      vf logit = s.vector(i);
      store(room_.logit.data() + i, logit);
      store(room_.weight.data() + i, s.weight(logit));
    }
    for (long i = 0; i < V; i++) {
      float z = (s.top() - room_.logit[i]) * PER_NAT;
      int b = z < BUCKETS - 1 ? static_cast<int>(z) : BUCKETS - 1;
      room_.bucket[i] = static_cast<uint16_t>(b);
      first_[b + 1]++;
      mass_[b] += room_.weight[i];
    }
    for (int b = 0; b < BUCKETS; b++) {
      first_[b + 1] += first_[b];
      total_ += mass_[b];
    }
    std::vector<long> place(first_.begin(), first_.end() - 1);
    for (long i = 0; i < V; i++) room_.ids[place[room_.bucket[i]]++] = static_cast<int>(i);
    kept_ = {BUCKETS - 1, count(BUCKETS - 1)};
  }

  double total() const { return total_; }

  void keep_count(int64_t k) {
    if (k >= first_[BUCKETS]) return;
    int b = 0;
    while (first_[b + 1] < k) b++;
    kept_ = {b, k - first_[b]};
  }

  // up to and including the token that reaches this share of what is kept
  void keep_mass(double share) {
    const double limit = share * kept_mass();
    double before = 0;
    for (int b = 0; b <= kept_.bucket; b++) {
      if (b < kept_.bucket && before + mass_[b] < limit) {
        before += mass_[b];
        continue;
      }
      const int* ids = sorted(b);
      for (long j = 0; j < inside(b); j++) {
        if (before >= limit) return void(kept_ = {b, j});
        before += room_.weight[ids[j]];
      }
    }
  }

  // tokens at least so likely as this share of the likeliest, whose weight is 1
  void keep_likely(float share) {
    // a bucket earlier than the share's own: the logarithm is rounded
    int from = std::max(0, static_cast<int>(std::min<float>(-std::log(share) * PER_NAT, BUCKETS)) - 1);
    for (int b = from; b <= kept_.bucket; b++) {
      const int* ids = sorted(b);
      for (long j = 0; j < inside(b); j++)
        if (room_.weight[ids[j]] < share) return void(kept_ = {b, j});
    }
  }

  // the first kept token whose cumulative weight exceeds u * the mass that is kept; never one of weight zero
  int64_t draw(double u) {
    const double target = u * kept_mass();
    double before = 0;
    int64_t last = sorted(0)[0];
    for (int b = 0; b <= kept_.bucket; b++) {
      if (b < kept_.bucket && before + mass_[b] <= target) {
        before += mass_[b];
        continue;
      }
      const int* ids = sorted(b);
      for (long j = 0; j < inside(b); j++) {
        if (!(room_.weight[ids[j]] > 0)) continue;
        before += room_.weight[ids[j]];
        last = ids[j];
        if (before > target) return last;
      }
    }
    return last;
  }

 private:
  static constexpr int BUCKETS = 1024, PER_NAT = 32;  // 32 nats; what is less likely than e^-32 lies in the last

  struct Kept {
    int bucket;   // all buckets before this one,
    long inside;  // and so many of it
  };
  struct Room {
    std::vector<float> logit, weight;
    std::vector<uint16_t> bucket;
    std::vector<int> ids;
  };

  static Room& room_of_thread() {
    thread_local Room room;
    return room;
  }

  long count(int b) const { return first_[b + 1] - first_[b]; }
  long inside(int b) const { return b < kept_.bucket ? count(b) : kept_.inside; }

  double kept_mass() {
    double mass = 0;
    for (int b = 0; b < kept_.bucket; b++) mass += mass_[b];
    if (kept_.inside == count(kept_.bucket)) return mass + mass_[kept_.bucket];
    const int* ids = sorted(kept_.bucket);
    for (long j = 0; j < kept_.inside; j++) mass += room_.weight[ids[j]];
    return mass;
  }

  const int* sorted(int b) {
    int* ids = room_.ids.data() + first_[b];
    if (!sorted_[b]) {
      const float* logit = room_.logit.data();
      std::sort(ids, ids + count(b), [&](int i, int j) { return logit[i] != logit[j] ? logit[i] > logit[j] : i < j; });
      sorted_[b] = 1;
    }
    return ids;
  }

  Room& room_;
  std::vector<long> first_;
  std::vector<double> mass_;
  std::vector<char> sorted_;
  double total_ = 0;
  Kept kept_;
};

static inline Drawn draw(const Drawing& d, bool logprob) {
  const Scaled scaled(d);
  Drawn drawn{0, 0.f};
  double total = 0;
  if (d.temperature == 0) drawn.token = scaled.argmax();
  if (d.temperature > 0 && d.truncated()) {
    Ranking ranking(scaled);
    if (d.top_k > 0) ranking.keep_count(d.top_k);
    if (d.top_p < 1) ranking.keep_mass(d.top_p);
    if (d.min_p > 0) ranking.keep_likely(d.min_p);
    drawn.token = ranking.draw(d.uniform);
    total = ranking.total();
  } else if (d.temperature > 0 || logprob) {
    const Chunks chunks(scaled);
    if (d.temperature > 0) drawn.token = chunks.draw(d.uniform);
    total = chunks.total();
  }
  if (logprob)
    drawn.logprob = static_cast<float>(static_cast<double>(scaled.at(drawn.token)) - scaled.top() - std::log(total));
  return drawn;
}

static inline bool all_finite(const float* x, long count) {
  vf zero{}, more{};  // x * 0 is NaN where x is not finite
  long i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    zero += load(x + i) * 0.f;
    more += load(x + i + W) * 0.f;
  }
  float rest = sum(zero + more);
  for (; i < count; i++) rest += x[i] * 0.f;
  return rest == 0.f;
}

}  // namespace glm
