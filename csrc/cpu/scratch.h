#pragma once

// Scratch memory of one call: an aligned slab, cut into equal parts for the workers.

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace usp::cpu {

// The widest vector and the cache line of every target.
inline constexpr int64_t kAlignment = 64;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Hands out consecutive aligned arrays. Built on null it only counts, so that one carving function
// both measures a workspace and lays it out.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* result = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return result;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The slab is the calling thread's and stays for its next call: fresh pages cost more than the work
// on a short sequence. It grows to threads x tile and no further. One Scratch at a time per thread.
class Scratch {
 public:
  Scratch(int64_t workers, int64_t bytes_each)
      : bytes_each_(bytes_each), base_(slab(workers * bytes_each)) {
#ifdef USP_POISON_SCRATCH
    std::memset(base_, 0xFF, static_cast<size_t>(workers * bytes_each));  // NaN everywhere
#endif
  }

  char* of(int64_t worker) { return base_ + worker * bytes_each_; }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };

  static char* slab(int64_t bytes) {
    thread_local std::unique_ptr<char, Free> held;
    thread_local int64_t size = 0;
    if (bytes > size) {
      held.reset();
      size = 0;
      held.reset(static_cast<char*>(
          ::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment})));
      size = bytes;
    }
    return held.get();
  }

  int64_t bytes_each_;
  char* base_;
};

}  // namespace usp::cpu
