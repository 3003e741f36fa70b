#pragma once

// Rows on their way from global to shared memory while the block computes.
//
// With asynchronous copies a request goes straight to where nobody reads now, another stage.
// Without them it goes to registers, and store() moves it on once the rows before it have been
// used.

#include "gpu/shared_rows.h"

namespace usp::gpu {

// Rows [rows.begin, rows.end), at least one; zeros beyond them and beyond head_dim. In steps of 16
// bytes where `vectors`: then every row is aligned to 16 bytes and head_dim a multiple of 8.
template <typename T, int kRows, int kDim, int kThreads>
class RowsInFlight {
 public:
  using Shared = SharedRows<T, kRows, kDim>;

  USP_DEVICE void request(const Shared& to, const HeadRows<T>& from, Rows rows, bool vectors) {
    base_ = from.data + rows.begin * from.row_stride;
    row_stride_ = from.row_stride;
    count_ = rows.size();
    head_dim_ = from.head_dim;
    vectors_ = vectors;
    if constexpr (kAsyncCopies) {
      copy(to);
    } else if (vectors) {
      // Neither a branch nor zeros for what is not there: either would wait for what is.
      for_each_vector([&](int i, Place at) {
        held_[i] = *reinterpret_cast<const Vector16*>(at.exists ? at.from : base_);
      });
    }
  }

  USP_DEVICE void store(const Shared& to) const {
    if constexpr (!kAsyncCopies) {
      if (!vectors_) return copy_numbers(to);
      for_each_vector([&](int i, Place at) {
        const Vector16 value = at.exists ? held_[i] : Vector16{};
        if (at.mine) *reinterpret_cast<Vector16*>(to.row(at.row) + at.column) = value;
      });
    }
  }

 private:
  USP_DEVICE void copy(const Shared& to) const {
    if (!vectors_) return copy_numbers(to);
    for_each_vector([&](int, Place at) {
      if (at.mine) copy16(to.row(at.row) + at.column, at.exists ? at.from : base_, at.exists);
    });
  }

  struct Place {
    int row, column;
    const T* from;
    bool exists, mine;
  };

  // visit(i, place); i is known to the compiler.
  template <typename Visit>
  USP_DEVICE void for_each_vector(Visit&& visit) const {
    const T* from = nullptr;
    Shared::template for_each_vector<kThreads>([&](int i, int r, int d, bool mine) {
      from = i == 0 ? base_ + r * row_stride_ + d
                    : from + Shared::template kRowsApart<kThreads> * row_stride_;
      visit(i, Place{r, d, from, r < count_ && d < head_dim_, mine});
    });
  }

  USP_DEVICE void copy_numbers(const Shared& to) const {
    Shared::template for_each_number<kThreads>([&](int r, int d) {
      to.row(r)[d] = r < count_ && d < head_dim_ ? base_[r * row_stride_ + d] : T{0};
    });
  }

  const T* base_;
  int64_t row_stride_;
  int count_, head_dim_;
  bool vectors_;
  Vector16 held_[kAsyncCopies ? 1 : Shared::template kVectors<kThreads>];
};

// Rows that are needed at once: there after copies_arrived() and barrier().
template <int kThreads, typename T, int kRows, int kDim>
USP_DEVICE void copy_rows(const SharedRows<T, kRows, kDim>& to, const HeadRows<T>& from, Rows rows,
                          bool vectors) {
  RowsInFlight<T, kRows, kDim, kThreads> copy;
  copy.request(to, from, rows, vectors);
  copy.store(to);
}

// Rows that a block walks over, tile by tile: the n-th in a stage of shared memory.
template <typename T, int kRows, int kDim, int kStages, int kThreads>
class WalkedRows {
 public:
  using Stages = SharedStages<SharedRows<T, kRows, kDim>, kStages>;

  USP_DEVICE explicit WalkedRows(Stages stages) : stages_(stages) {}

  USP_DEVICE void request(int n, const HeadRows<T>& from, Rows rows, bool vectors) {
    next_.request(stages_.stage(n), from, rows, vectors);
  }
  USP_DEVICE void store(int n) const { next_.store(stages_.stage(n)); }
  USP_DEVICE const T* tile(int n) const { return stages_.stage(n).data; }

 private:
  Stages stages_;
  RowsInFlight<T, kRows, kDim, kThreads> next_;
};

// A float for each of those rows, likewise; at most one for each thread. It lies there as
// convert(float): once for all that use it.
template <int kRows, int kStages>
class WalkedFloats {
 public:
  USP_DEVICE explicit WalkedFloats(float* stages) : stages_(stages) {}

  USP_DEVICE void request(int n, const float* from, int count) {
    const int i = static_cast<int>(thread_index());
    exists_ = i < count;
    const float* place = exists_ ? from + i : from;
    if constexpr (kAsyncCopies) {
      if (i < kRows) copy4(tile(n) + i, place, exists_);
    } else {
      held_ = *place;
    }
  }
  template <typename Convert>
  USP_DEVICE void store(int n, Convert&& convert) const {
    const int i = static_cast<int>(thread_index());
    if (i >= kRows) return;
    float& there = tile(n)[i];
    if constexpr (kAsyncCopies) {
      there = convert(there);
    } else {
      there = convert(exists_ ? held_ : 0.0f);
    }
  }

  USP_DEVICE float* tile(int n) const {
    static_assert(kRows % 4 == 0);
    return static_cast<float*>(__builtin_assume_aligned(stages_ + n % kStages * kRows, 16));
  }

 private:
  float* stages_;
  bool exists_;
  float held_;
};

// Calls use(step, n) for the steps below `count` that next(step before) names, from next(-1) on,
// the n-th of them, with its rows in shared memory: request(step, n) starts their way and store(n)
// ends it, where copies that run by themselves have arrived.
template <int kStages, typename Next, typename Request, typename Store, typename Use>
USP_DEVICE void walk_tiles(int count, Next&& next, Request&& request, Store&& store, Use&& use) {
  constexpr bool kEarly = kStages > 1 || !kAsyncCopies;  // before the rows now there are used
  int step = next(-1);
  if (step >= count) return copies_arrived();  // of the own rows
  request(step, 0);
  for (int n = 0; step < count; ++n) {
    if constexpr (!kAsyncCopies) barrier();
    copies_arrived();
    store(n);
    barrier();
    const int following = next(step);
    if (kEarly && following < count) request(following, n + 1);
    use(step, n);
    if (!kEarly && following < count) {
      barrier();
      request(following, n + 1);
    }
    step = following;
  }
}

}  // namespace usp::gpu
