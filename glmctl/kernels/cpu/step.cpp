// One step of a GLM-4.5-style decoder on a CPU: every row of a ragged batch through all layers, in one call.
//
// Rows of a step are what continuous batching brings: one newest token of a sequence, a token with its drafts, or a
// piece of a prompt. Weights are read once a step whatever the number of rows. A row's result is a fixed sequence of
// operations on its own values and its own cache: it is the same, bit by bit, in every batch and with any number of
// threads.

#include <cmath>

#include "attention.h"
#include "draw.h"
#include "model.h"
#include "pack.h"
#include "router.h"

namespace glm {

// Some rows of weights for some tokens: y = W x, or y = silu(gate x) * (up x) when `up` is there.
struct Job {
  Matrix weight, up;
  const float* bias;
  const float* x;
  long x_width;
  const int* tokens;  // rows of x; null: 0..count-1
  int count;
  float* y;  // rows 0..count-1
  long y_width;
  long first_item;
  int item_rows;
};

// Rows of weights that one item computes. Many tokens are read again for every item, few are not: then small items
// share the work more evenly.
constexpr int ITEM_ROWS = 2 * PANEL, WIDE_ITEM_ROWS = 4 * PANEL;

constexpr int FEW_ROWS = 4;  // for which one thread prepares a phase alone

constexpr long DRAWN_ALONE = 1 << 17;  // logits that one thread draws from in less time than it takes to wake another

class Model {
 public:
  Model(const Config& config, int threads) : c(config), threads_(threads), layers_(config.layers + config.mtp) {}

  void set(int layer, int slot, const Matrix& matrix) {
    if (layer < 0)
      whole_[slot] = matrix;
    else
      layers_[layer].slot[slot] = matrix;
  }

  int64_t vocab() const { return c.vocab; }

  void step(const Batch& batch) {
    pool_ = &pool_of_thread(threads_);
    b = batch;
    const long N = b.rows;
    runs_ = runs_of(c, b);
    x_.fit(N * c.hidden);
    normed_.fit(N * 2 * c.hidden);
    qkv_.fit(N * qkv_width());
    mixed_.fit(N * c.heads * c.head_dim);
    cos_sin_.fit(N * c.rotary);
    wide_.resize(pool_->threads());
    attention_.resize(pool_->threads());
    pool_->run([this](int t) { b.hidden_in ? draft(t) : decode(t); });
  }

 private:
  long qkv_width() const { return (c.heads + 2 * c.kv_heads) * c.head_dim; }
  const float* whole(Whole slot) const { return static_cast<const float*>(whole_[slot].data); }

  void decode(int t) {
    pool_->phase(t, [this] { return b.rows; }, [this](int n) {
      embed(n, x_.data() + n * c.hidden);
      angles(n);
    });
    for (int l = 0; l < c.layers; l++) layer(t, l, l >= c.dense_layers);
    finish(t, whole(FINAL_NORM), whole_[HEAD]);
  }

  // The MTP layer: eh_proj [enorm(embedding), hnorm(hidden)], a MoE layer, its own norm, the model's head.
  void draft(int t) {
    const Layer& own = layers_[c.layers];
    auto join = [&](int n) {
      float* pair = normed_.data() + n * 2 * c.hidden;
      embed(n, pair);
      rms_norm(pair, own.vector(ENORM), pair, c.hidden, c.eps);
      rms_norm(b.hidden_in + n * c.hidden, own.vector(HNORM), pair + c.hidden, c.hidden, c.eps);
      angles(n);
    };
    multiply(t, join, [&] {
      add_job(own.slot[EH], {}, nullptr, normed_.data(), 2 * c.hidden, nullptr, b.rows, x_.data(), c.hidden);
    });
    layer(t, c.layers, true);
    finish(t, whole(MTP_NORM), whole_[whole_[DRAFT_HEAD].data ? DRAFT_HEAD : HEAD]);
  }

  void embed(int n, float* out) const {
    const Matrix& table = whole_[EMBEDDING];
    Matrix row = table.from(b.token[n], 1);
    by_format(table.format, [&](auto format) { widen_rows<format()>(row, out); });
  }

  void angles(int n) {
    long half = c.rotary / 2;
    float* to = cos_sin_.data() + n * c.rotary;
    for (long i = 0; i < half; i++) {
      float angle = static_cast<float>(b.position[n]) * whole(INVERSE_FREQUENCIES)[i];
      to[i] = std::cos(angle);
      to[i + half] = std::sin(angle);
    }
  }

  auto normalising(const float* weight) {
    return [this, weight](int n) {
      rms_norm(x_.data() + n * c.hidden, weight, normed_.data() + n * c.hidden, c.hidden, c.eps);
    };
  }

  void layer(int t, int l, bool moe) {
    const Layer& own = layers_[l];
    multiply(t, normalising(own.vector(INPUT_NORM)), [&] {
      long width = qkv_width(), q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
      auto add = [&](Slot weight, Slot bias, long offset) {
        add_job(own.slot[weight], {}, own.vector(bias), normed_.data(), c.hidden, nullptr, b.rows, qkv_.data() + offset,
                width);
      };
      add(Q, Q_BIAS, 0);
      add(K, K_BIAS, q);
      add(V, V_BIAS, q + kv);
    });
    auto heads = [&](int n) {
      prepare_heads(c, own, b, n, qkv_.data() + n * qkv_width(), cos_sin_.data() + n * c.rotary, b.keys[l],
                    b.values[l]);
    };
    rows_then(t, heads, [this] { return static_cast<long>(runs_.size() * c.kv_heads); }, [&](int unit) {
      const Run& run = runs_[unit / c.kv_heads];
      attention_[t].attend(c, b, run, unit % c.kv_heads, qkv_.data(), qkv_width(), b.keys[l], b.values[l],
                           mixed_.data());
    });
    accumulate(t, c.heads * c.head_dim, own.slot[O], mixed_.data(), {});
    if (moe)
      mixture(t, own);
    else
      dense(t, own);
  }

  // A phase that needs something done for every row first. For a few rows one thread does that while the others are
  // still on their way: a meeting of all threads takes longer.
  template <class Each, class Prepare, class Work>
  void rows_then(int t, Each each, Prepare prepare, Work work) {
    if (b.rows > FEW_ROWS) {
      pool_->phase(t, [this] { return b.rows; }, each);
      return pool_->phase(t, prepare, work);
    }
    pool_->phase(t, [&] {
      for (int n = 0; n < b.rows; n++) each(n);
      return prepare();
    }, work);
  }

  void dense(int t, const Layer& own) {
    multiply(t, normalising(own.vector(POST_NORM)), [&] {
      float* inner = inner_.fit(b.rows * c.dense_width);
      add_job(own.slot[GATE], own.slot[UP], nullptr, normed_.data(), c.hidden, nullptr, b.rows, inner, c.dense_width);
    });
    accumulate(t, c.dense_width, own.slot[DOWN], inner_.data(), {});
  }

  void mixture(int t, const Layer& own) {
    multiply(t, normalising(own.vector(POST_NORM)), [&] {
      add_job(own.slot[ROUTER], {}, nullptr, normed_.data(), c.hidden, nullptr, b.rows,
              scores_.fit(b.rows * c.experts), c.experts);
      if (c.shared_width)
        add_job(own.slot[GATE], own.slot[UP], nullptr, normed_.data(), c.hidden, nullptr, b.rows,
                inner_.fit(b.rows * c.shared_width), c.shared_width);
      chosen_.fit(b.rows * c.top_k);
      chosen_weight_.fit(b.rows * c.top_k);
    });
    auto choose = [&](int n) {
      choose_experts(c, own.vector(ROUTER_BIAS), scores_.data() + n * c.experts, chosen_.data() + n * c.top_k,
                     chosen_weight_.data() + n * c.top_k);
    };
    multiply(t, choose, [&] {
      sort_by_expert();
      routed_.fit(b.rows * c.top_k * c.expert_width);
      for (const Group& g : groups_)
        add_job(own.slot[EXPERTS_GATE_UP].from(g.expert * 2 * c.expert_width, c.expert_width),
                own.slot[EXPERTS_GATE_UP].from((g.expert * 2 + 1) * c.expert_width, c.expert_width), nullptr,
                normed_.data(), c.hidden, sorted_token_.data() + g.first, g.count,
                routed_.data() + g.first * c.expert_width, c.expert_width);
    });
    accumulate(t, c.shared_width, own.slot[DOWN], inner_.data(), own.slot[EXPERTS_DOWN]);
  }

  // Rows gathered by expert: each expert's weights are read once, for all of its rows.
  void sort_by_expert() {
    std::vector<int> place(c.experts + 1, 0);
    long S = static_cast<long>(b.rows) * c.top_k;
    for (long s = 0; s < S; s++) place[chosen_.data()[s] + 1]++;
    groups_.clear();
    for (int e = 0; e < c.experts; e++) {
      if (place[e + 1]) groups_.push_back({e, place[e], place[e + 1]});
      place[e + 1] += place[e];
    }
    sorted_token_.fit(S);
    sorted_weight_.fit(S);
    for (long s = 0; s < S; s++) {
      int to = place[chosen_.data()[s]]++;
      sorted_token_.data()[to] = static_cast<int>(s / c.top_k);
      sorted_weight_.data()[to] = chosen_weight_.data()[s];
    }
  }

  // hidden states after the norm, of all rows, and logits of those wanted
  void finish(int t, const float* norm, const Matrix& head) {
    auto normalise = [&](int n) {
      rms_norm(x_.data() + n * c.hidden, norm, b.hidden_out + n * c.hidden, c.hidden, c.eps);
    };
    multiply(t, normalise, [&] {
      if (!b.wanted) return;
      int* rows = wanted_.fit(b.wanted);
      for (int r = 0; r < b.wanted; r++) rows[r] = static_cast<int>(b.wanted_rows[r]);
      add_job(head, {}, nullptr, b.hidden_out, c.hidden, rows, b.wanted, b.logits, head.rows);
    });
  }

  void add_job(const Matrix& weight, const Matrix& up, const float* bias, const float* x, long x_width,
               const int* tokens, int count, float* y, long y_width) {
    int item_rows = count > BLOCK && weight.rows >= WIDE_ITEM_ROWS * 4 * pool_->threads() ? WIDE_ITEM_ROWS : ITEM_ROWS;
    jobs_.push_back({weight, up, bias, x, x_width, tokens, count, y, y_width, items_, item_rows});
    items_ += (weight.rows + item_rows - 1) / item_rows;
  }

  // After each(n) for every row: `add` says which products, by add_job; their rows of weights are shared among the
  // threads.
  template <class Each, class Add>
  void multiply(int t, Each each, Add add) {
    rows_then(t, each, [&] {
      jobs_.clear();
      items_ = 0;
      add();
      return items_;
    }, [&](int item) {
      auto next = std::upper_bound(jobs_.begin(), jobs_.end(), item, [](long i, const Job& j) { return i < j.first_item; });
      const Job& job = *(next - 1);
      do_item(t, job, static_cast<int>(item - job.first_item) * job.item_rows);
    });
  }

  void do_item(int t, const Job& job, int top) {
    const int end = std::min(top + job.item_rows, job.weight.rows);
    const bool pair = job.up.data;
    float* wide = wide_[t].fit(PANEL * job.weight.cols);
    alignas(64) float first[BLOCK * PANEL], second[BLOCK * PANEL];
    const float* x[BLOCK];
    for (int from = 0; from < job.count; from += BLOCK) {
      int n = std::min(BLOCK, job.count - from);
      for (int i = 0; i < n; i++) x[i] = job.x + (job.tokens ? job.tokens[from + i] : from + i) * job.x_width;
      for (int row = top; row < end; row += PANEL) {
        int height = std::min(PANEL, end - row);
        panel(job.weight.from(row, height), x, n, first, wide);
        if (pair) panel(job.up.from(row, height), x, n, second, wide);
        for (int i = 0; i < n; i++) {
          float* y = job.y + (from + i) * job.y_width + row;
          const float* made = first + i * PANEL;
          if (pair)
            swiglu(made, second + i * PANEL, y, height);
          else
            for (int r = 0; r < height; r++) y[r] = job.bias ? made[r] + job.bias[row + r] : made[r];
        }
      }
    }
  }

  // x += plain product of all rows + weighted products of the experts' rows, a few of x's columns at a time, so that
  // each column is summed by one thread: the plain product first, then the experts in the order of their number.
  void accumulate(int t, long plain_width, const Matrix& plain, const float* plain_x, const Matrix& experts) {
    const int D = static_cast<int>(c.hidden);
    const int columns = b.rows > BLOCK && D >= WIDE_ITEM_ROWS * 2 * pool_->threads() ? WIDE_ITEM_ROWS : PANEL;
    pool_->phase(t, [&] { return (D + columns - 1) / columns; }, [&](int item) {
      const int first = item * columns, end = std::min(first + columns, D);
      std::vector<float>& sums = sums_of_thread();
      sums.assign(static_cast<size_t>(b.rows) * columns, 0.f);
      auto each_panel = [&](auto add) {
        for (int row = first; row < end; row += PANEL)
          add(row, std::min(PANEL, end - row), sums.data() + static_cast<long>(row - first) * b.rows);
      };
      if (plain_width) add_product(t, plain, 0, plain_x, plain_width, nullptr, nullptr, b.rows, each_panel);
      if (experts.data)
        for (const Group& g : groups_)
          add_product(t, experts, g.expert * D, routed_.data() + g.first * c.expert_width, c.expert_width,
                      sorted_token_.data() + g.first, sorted_weight_.data() + g.first, g.count, each_panel);
      each_panel([&](int row, int height, const float* sum) {
        for (int n = 0; n < b.rows; n++)
          for (int r = 0; r < height; r++) x_.data()[n * D + row + r] += sum[n * PANEL + r];
      });
    });
  }

  // sum[token] += weight * (m x), or = m x where there are no weights, for each panel of rows; `base` is row 0 of m
  template <class EachPanel>
  void add_product(int t, const Matrix& m, long base, const float* inputs, long width, const int* tokens,
                   const float* weights, int count, EachPanel each_panel) {
    float* wide = wide_[t].fit(PANEL * m.cols);
    alignas(64) float made[BLOCK * PANEL];
    const float* x[BLOCK];
    for (int from = 0; from < count; from += BLOCK) {
      int n = std::min(BLOCK, count - from);
      for (int i = 0; i < n; i++) x[i] = inputs + (from + i) * width;
      each_panel([&](int row, int height, float* sum) {
        panel(m.from(base + row, height), x, n, made, wide);
        for (int i = 0; i < n; i++) {
          float* to = sum + static_cast<long>(tokens ? tokens[from + i] : from + i) * PANEL;
          float factor = weights ? weights[from + i] : 1.f;
          for (int r = 0; r < height; r++) to[r] += factor * made[i * PANEL + r];
        }
      });
    }
  }

  static std::vector<float>& sums_of_thread() {
    thread_local std::vector<float> sums;
    return sums;
  }

  struct Group {
    long expert;
    int first, count;
  };

  const Config c;
  const int threads_;
  std::vector<Layer> layers_;
  std::array<Matrix, WHOLE_SLOTS> whole_;
  Pool* pool_ = nullptr;  // of the thread that steps

  Batch b{};
  std::vector<Run> runs_;
  std::vector<Job> jobs_;
  long items_ = 0;
  std::vector<Group> groups_;
  std::vector<Room<float>> wide_;
  std::vector<Attention> attention_;
  Room<float> x_, normed_, qkv_, mixed_, cos_sin_, inner_, routed_, scores_, chosen_weight_, sorted_weight_;
  Room<int64_t> chosen_;
  Room<int> sorted_token_, wanted_;
};

}  // namespace glm

// The C ABI. Pointers stay the caller's and must outlive their use; nothing throws but for lack of memory.
extern "C" {

int glm_lanes() { return glm::W; }

glm::Model* glm_create(const int64_t* sizes, const double* reals, int threads) {
  glm::Config config;
  std::memcpy(&config, sizes, sizeof(int64_t) * 17);
  config.eps = reals[0];
  config.scale = reals[1];
  return new glm::Model(config, threads);
}

void glm_destroy(glm::Model* model) { delete model; }

// layer -1: the whole model's slots
void glm_set(glm::Model* model, int layer, int slot, const void* data, const float* scale, int rows, int cols,
             int format) {
  model->set(layer, slot, glm::Matrix{data, scale, rows, cols, static_cast<glm::Format>(format)});
}

// token, position, sequence [rows] and wanted_rows [wanted] int64; table [sequences, max_blocks] int32; keys, values:
// one pointer a layer to fp32 [blocks, kv heads, head dim, block size] and [blocks, kv heads, block size, head dim].
// logits [wanted, vocab], hidden_out [rows, hidden]. With hidden_in [rows, hidden] it is the MTP layer's step, whose
// place 0 is never written and never read, and logits are of the draft head's rows where there is one. Returns 0, or
// 1 + the first row that points outside.
int glm_step(glm::Model* model, int rows, const int64_t* token, const int64_t* position, const int64_t* sequence,
             const int32_t* table, int sequences, int max_blocks, int blocks, int block_size, float* const* keys,
             float* const* values, int wanted, const int64_t* wanted_rows, const float* hidden_in, float* logits,
             float* hidden_out) {
  glm::Batch batch{rows, wanted, block_size, max_blocks, hidden_in ? 1 : 0, token, position, sequence, table, keys, values,
                   wanted_rows, hidden_in, logits, hidden_out};
  for (int n = 0; n < rows; n++) {
    bool inside = token[n] >= 0 && token[n] < model->vocab() && sequence[n] >= 0 && sequence[n] < sequences &&
                  position[n] >= batch.first_place && position[n] < static_cast<int64_t>(max_blocks) * block_size;
    for (int64_t j = 0; inside && j <= position[n] / block_size; j++) {
      int32_t block = table[sequence[n] * max_blocks + j];
      inside = block >= 0 && block < blocks;
    }
    if (!inside) return n + 1;
  }
  for (int r = 0; r < wanted; r++)
    if (wanted_rows[r] < 0 || wanted_rows[r] >= rows) return rows + 1;
  if (rows) model->step(batch);
  return 0;
}

// logits [rows, vocab], rows `stride` floats apart; the parameters of a row as in glmctl/kernels/draw.py. logprobs may be
// null. threads: of the pool, where the calling thread has none yet.
void glm_draw(long rows, long vocab, const float* logits, long stride, const float* temperature, const int64_t* top_k,
              const float* top_p, const float* min_p, const double* uniform, int64_t* tokens, float* logprobs,
              int threads) {
  auto row = [=](int n) {
    glm::Drawn drawn = glm::draw(
        {logits + n * stride, vocab, temperature[n], top_k[n], top_p[n], min_p[n], uniform[n]}, logprobs != nullptr);
    tokens[n] = drawn.token;
    if (logprobs) logprobs[n] = drawn.logprob;
  };
  if (rows * vocab <= glm::DRAWN_ALONE) {
    for (long n = 0; n < rows; n++) row(static_cast<int>(n));
    return;
  }
  glm::Pool& pool = glm::pool_of_thread(threads, true);
  pool.run([&](int t) { pool.phase(t, [&] { return rows; }, row); });
}

int glm_all_finite(const float* x, long count) { return glm::all_finite(x, count); }

// fp32 or bf16 weights [rows, cols] into bf16 or int8, by row
void glm_pack(const void* source, int source_format, long rows, int cols, int format, void* data, float* scale,
              int threads) {
  glm::pack_rows(glm::Matrix{source, nullptr, 0, cols, static_cast<glm::Format>(source_format)}, rows,
                 static_cast<glm::Format>(format), data, scale, threads);
}

// The same into FP8, `matrix_rows` rows a matrix, in blocks of height x width weights that share a scale; `given`
// [matrices, blocks down, blocks across] or null: scales that are taken where they give every weight of a block exactly.
// scale: [rows, FP8 groups], of unit FP8_UNIT.
void glm_pack_fp8(const void* source, int source_format, long rows, int cols, long matrix_rows, long height, long width,
                  const float* given, void* data, float* scale, int threads) {
  glm::pack_fp8(glm::Matrix{source, nullptr, 0, cols, static_cast<glm::Format>(source_format)}, rows,
                glm::Blocks{matrix_rows, height, width}, given, static_cast<uint8_t*>(data), scale, threads);
}

}  // extern "C"
