#include "threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace olmfast {

namespace {

// Lives until the process ends: its threads may outlast static destruction.
class Pool {
 public:
  void run(size_t n_pieces, void (*piece)(void*, size_t), void* context, size_t n_threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (helpers_.size() + 1 < n_threads) {
        size_t rank = helpers_.size();
        try {
          helpers_.emplace_back([this, rank] { help(rank); });
        } catch (const std::system_error&) {
          break;  // no more threads can be started: those that are there do the work
        }
        helpers_.back().detach();
      }
      n_threads = std::min(n_threads, helpers_.size() + 1);
      piece_ = piece;
      context_ = context;
      n_pieces_ = n_pieces;
      next_ = 0;
      wanted_ = n_threads - 1;
      working_ = wanted_;
      ++job_;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return working_ == 0; });
  }

  std::mutex busy;

 private:
  void take() {
    for (size_t i = next_++; i < n_pieces_; i = next_++) piece_(context_, i);
  }

  void help(size_t rank) {
    size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (rank >= wanted_) continue;
      lock.unlock();
      take();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  void (*piece_)(void*, size_t) = nullptr;
  void* context_ = nullptr;
  size_t n_pieces_ = 0, wanted_ = 0, working_ = 0, job_ = 0;
  std::atomic<size_t> next_{0};
};

std::atomic<Pool*> the_pool{nullptr};
std::atomic<size_t> n_threads{0};

Pool* pool() {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (!the_pool) {
    // A forked child inherits no threads: it starts a pool of its own.
    static bool registered = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; }) == 0;
    (void)registered;
    the_pool = new Pool;
  }
  return the_pool;
}

size_t cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

size_t threads() {
  size_t n = n_threads;
  return n ? n : cores();
}

void set_threads(size_t n) { n_threads = n; }

void parallel(size_t n_pieces, void (*piece)(void*, size_t), void* context) {
  size_t n = std::min(threads(), n_pieces);
  if (n > 1) {
    Pool* shared = pool();
    std::unique_lock<std::mutex> lock(shared->busy, std::try_to_lock);
    if (lock.owns_lock()) return shared->run(n_pieces, piece, context, n);
  }
  for (size_t i = 0; i < n_pieces; ++i) piece(context, i);
}

}  // namespace olmfast
