#pragma once

// Threads for kernels that know nothing of torch.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace usp::cpu {

// A pool the caller owns. `run(workers, body)` calls body(w) once for each w in [0, workers) and
// returns when all are done; calls may run one after another on one thread.
struct ParallelFor {
  int64_t num_threads;
  std::function<void(int64_t workers, const std::function<void(int64_t worker)>& body)> run;

  int64_t workers_for(int64_t tasks) const {
    return std::max<int64_t>(1, std::min(num_threads, tasks));
  }

  // Tasks. One, but many small ones would spend their time on taking turns.
  int64_t taken_at_once(int64_t tasks) const {
    constexpr int64_t kTurnsPerWorker = 64, kMost = 16;
    return std::clamp<int64_t>(tasks / (kTurnsPerWorker * num_threads), 1, kMost);
  }

  // Calls body(worker, task) for each task. Whoever is free takes the next ones, so tasks of
  // unequal cost balance when the heavy ones come first; tasks write disjoint memory, so who takes
  // which does not show in the result.
  template <typename Body>
  void for_each_task(int64_t tasks, Body&& body) const {
    if (tasks == 0) return;
    const int64_t run_length = taken_at_once(tasks);
    std::atomic<int64_t> next{0};
    run(workers_for(tasks), [&](int64_t worker) {
      for (int64_t begin = next.fetch_add(run_length); begin < tasks;
           begin = next.fetch_add(run_length)) {
        const int64_t end = std::min(begin + run_length, tasks);
        for (int64_t task = begin; task < end; ++task) body(worker, task);
      }
    });
  }

  // The task that a worker will probably take after this one; it may be past the last.
  int64_t probably_after(int64_t task, int64_t tasks) const {
    const int64_t run_length = taken_at_once(tasks);
    const bool ends_run = (task + 1) % run_length == 0;
    return task + 1 + (ends_run ? (workers_for(tasks) - 1) * run_length : 0);
  }
};

}  // namespace usp::cpu
