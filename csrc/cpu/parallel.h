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

  // Calls body(worker, task) for each task. Whoever is free takes the next one, so tasks of unequal
  // cost balance when the heavy ones come first; tasks write disjoint memory, so who takes which
  // does not show in the result.
  template <typename Body>
  void for_each_task(int64_t tasks, Body&& body) const {
    if (tasks == 0) return;
    std::atomic<int64_t> next{0};
    run(workers_for(tasks), [&](int64_t worker) {
      for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
    });
  }
};

}  // namespace usp::cpu
