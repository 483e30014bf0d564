// A few threads that walk through the phases of a step together.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace glm {

static inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Waiting spins for a bounded time and then sleeps, so that a busy neighbour costs its own share and no more.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads < 1 ? 1 : threads), owner_(getpid()), ranges_(threads_) {
    for (int t = 1; t < threads_; t++) workers_.emplace_back([this, t] { serve(t); });
  }

  ~Pool() {
    if (owner_ != getpid()) {  // after a fork the threads are not ours to join
      for (auto& worker : workers_) worker.detach();
      return;
    }
    task_ = nullptr;
    advance(start_);
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }
  bool usable() const { return owner_ == getpid(); }

  // Run task(t) on every thread, t = 0 being the caller, and return when all have.
  void run(const std::function<void(int)>& task) {
    task_ = &task;
    if (threads_ > 1) advance(start_);
    task(0);
    meet([] {});
  }

  // All threads of the running task come here; the last to arrive prepares, which names how many items there are.
  // Each item is then done once, by whoever is free: first those of the thread's own range, so that weights stay in
  // the cache of the core that used them last, then the others'.
  template <class Prepare, class Work>
  void phase(int t, Prepare prepare, Work work) {
    meet([&] {
      long items = prepare();
      for (int i = 0; i < threads_; i++) {
        ranges_[i].next.store(items * i / threads_, std::memory_order_relaxed);
        ranges_[i].end = items * (i + 1) / threads_;
      }
    });
    for (int i = 0; i < threads_; i++) {
      Range& range = ranges_[(t + i) % threads_];
      if (threads_ == 1) {
        for (long item = range.next; item < range.end; item++) work(static_cast<int>(item));
        continue;
      }
      for (long item; (item = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
        work(static_cast<int>(item));
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<long> next{0};
    long end = 0;
  };
  struct alignas(64) Gate {
    std::atomic<unsigned> turn{0};
    std::atomic<int> sleepers{0};
    std::mutex mutex;
    std::condition_variable wake;
  };

  void advance(Gate& gate) {
    gate.turn.fetch_add(1, std::memory_order_seq_cst);
    if (gate.sleepers.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(gate.mutex);
      gate.wake.notify_all();
    }
  }

  void await(Gate& gate, unsigned seen, int spins) {
    for (int i = 0; i < spins; i++) {
      if (gate.turn.load(std::memory_order_acquire) != seen) return;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(gate.mutex);
    gate.sleepers.fetch_add(1, std::memory_order_seq_cst);
    gate.wake.wait(lock, [&] { return gate.turn.load(std::memory_order_seq_cst) != seen; });
    gate.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }

  template <class Last>
  void meet(Last last) {
    if (threads_ == 1) return last();
    unsigned seen = barrier_.turn.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      last();
      advance(barrier_);
    } else {
      await(barrier_, seen, BARRIER_SPINS);
    }
  }

  void serve(int t) {
    for (unsigned seen = 0;; seen++) {
      await(start_, seen, IDLE_SPINS);
      if (!task_) return;
      (*task_)(t);
      meet([] {});
    }
  }

  static constexpr int BARRIER_SPINS = 1500;  // 30 to 100 us: longer than a phase's imbalance, shorter than a time slice
  static constexpr int IDLE_SPINS = 6000;     // what sampling takes between two steps of a small model

  int threads_;
  pid_t owner_;
  std::vector<Range> ranges_;
  std::atomic<int> arrived_{0};
  Gate barrier_, start_;
  const std::function<void(int)>* task_ = nullptr;
  std::vector<std::thread> workers_;  // last: they use everything above
};

// The calling thread's own pool, for every model that it steps and for what it does between the steps: two pools would
// wait, and that is spin, side by side. any: of as many threads as it has, where there is one already.
static inline Pool& pool_of_thread(int threads, bool any = false) {
  struct Own {
    Pool* pool = nullptr;
    ~Own() {
      if (pool && pool->usable()) delete pool;
    }
  };
  thread_local Own own;
  // after a fork its threads stayed in the parent process
  if (own.pool && !own.pool->usable()) own.pool = nullptr;
  if (own.pool && !any && own.pool->threads() != std::max(threads, 1)) {
    delete own.pool;
    own.pool = nullptr;
  }
  if (!own.pool) own.pool = new Pool(threads);
  return *own.pool;
}

}  // namespace glm
