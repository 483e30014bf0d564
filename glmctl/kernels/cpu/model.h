// Weights and sizes of a GLM-4.5-style decoder, and the room that one step needs.
#pragma once

#include <array>
#include <memory>
#include <new>

#include "matmul.h"
#include "pool.h"

namespace glm {

// In the order of `glmctl.engine.native.SIZES` and `REALS`.
struct Config {
  int64_t layers, dense_layers, hidden, vocab, heads, kv_heads, head_dim, rotary;
  int64_t dense_width, expert_width, shared_width, experts, top_k, groups, groups_kept, normalize, mtp;
  double eps, scale;
};

// In the order of `glmctl.engine.native.SLOTS`.
enum Slot {
  INPUT_NORM, Q, K, V, Q_BIAS, K_BIAS, V_BIAS, Q_NORM, K_NORM, O, POST_NORM, GATE, UP, DOWN, ROUTER, ROUTER_BIAS,
  EXPERTS_GATE_UP, EXPERTS_DOWN, ENORM, HNORM, EH, LAYER_SLOTS,
};
enum Whole { EMBEDDING, HEAD, FINAL_NORM, MTP_NORM, INVERSE_FREQUENCIES, DRAFT_HEAD, WHOLE_SLOTS };

// GATE, UP and DOWN are the dense feed-forward's, or the shared expert's of a MoE layer
struct Layer {
  std::array<Matrix, LAYER_SLOTS> slot;
  const float* vector(Slot s) const { return static_cast<const float*>(slot[s].data); }
};

// One call's rows; see `glm_step`.
struct Batch {
  int rows, wanted, block_size, max_blocks;
  int first_place;  // what lies before it was never written
  const int64_t *token, *position, *sequence;
  const int32_t* table;
  float* const* keys;
  float* const* values;
  const int64_t* wanted_rows;
  const float* hidden_in;  // of the MTP layer, else null
  float *logits, *hidden_out;
};

// Memory at the beginning of a cache line: a whole vector then never lies in two of them.
template <class T>
struct LineAligned {
  using value_type = T;
  static constexpr std::align_val_t LINE{64};
  LineAligned() = default;
  template <class U>
  LineAligned(const LineAligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
  bool operator==(const LineAligned&) const { return true; }
  bool operator!=(const LineAligned&) const { return false; }
};

template <class T>
struct Room {
  std::vector<T, LineAligned<T>> held;
  T* fit(size_t count) {
    if (held.size() < count) held.resize(count + count / 4);
    return held.data();
  }
  T* data() { return held.data(); }
};

}  // namespace glm
