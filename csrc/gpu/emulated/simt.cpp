#include "gpu/emulated/simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace usp::gpu::emulated {

void fail(const char* what) {
  std::fprintf(stderr, "usp emulated GPU: %s\n", what);
  std::abort();
}

namespace {

constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

struct Fibre {
  ucontext_t entry;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool started = false, waiting = false, finished = false;
  std::vector<Copy> copies;
};

struct Wave {
  WaveAction action = nullptr;
  std::vector<void*> lanes;
  int arrived = 0;
};

// The block that runs now. Fibres and their stacks are kept from block to block.
struct Block {
  std::vector<Fibre> fibres;
  std::vector<Wave> waves;
  std::vector<char> shared;
  char* aligned_shared = nullptr;
  const std::function<void()>* body = nullptr;
  uint32_t index = 0, limit = ~0u;  // of a launch
  int threads = 0, wave_size = 32, current = 0, at_barrier = 0, running = 0;
  WaveOrder order = WaveOrder::kAscending;
  jmp_buf done;
};

Block block;

LaunchListener listener = nullptr;

bool runnable(int thread) {
  const Fibre& fibre = block.fibres[thread];
  return !fibre.waiting && !fibre.finished;
}

// A runnable lane of `wave`, looked for from lane `first` on; -1: none.
int runnable_lane(int wave, int first) {
  const int begin = wave * block.wave_size;
  for (int step = 0; step < block.wave_size; ++step) {
    const int thread = begin + (first + step) % block.wave_size;
    if (runnable(thread)) return thread;
  }
  return -1;
}

int next_thread() {
  const int own = block.current / block.wave_size;
  const int lane = runnable_lane(own, block.current % block.wave_size + 1);
  if (lane >= 0) return lane;
  const int count = static_cast<int>(block.waves.size());
  for (int i = 0; i < count; ++i) {
    const int wave = block.order == WaveOrder::kAscending ? i : count - 1 - i;
    const int thread = runnable_lane(wave, 0);
    if (thread >= 0) return thread;
  }
  fail("threads wait for each other in different places, or after some have returned");
}

[[noreturn]] void resume(int thread) {
  block.current = thread;
  Fibre& fibre = block.fibres[thread];
  if (fibre.started) _longjmp(fibre.resume, 1);
  fibre.started = true;
  setcontext(&fibre.entry);
  fail("setcontext failed");
}

void wait() {
  Fibre& fibre = block.fibres[block.current];
  fibre.waiting = true;
  const int next = next_thread();
  if (_setjmp(fibre.resume) == 0) resume(next);
}

void run_fibre() {
  (*block.body)();
  Fibre& fibre = block.fibres[block.current];
  if (!fibre.copies.empty()) fail("a thread returned before its copies arrived");
  fibre.finished = true;
  if (--block.running == 0) _longjmp(block.done, 1);
  resume(next_thread());
}

void prepare_fibre(Fibre& fibre) {
  fibre.started = fibre.waiting = fibre.finished = false;
  getcontext(&fibre.entry);
  fibre.entry.uc_stack.ss_sp = fibre.stack.get();
  fibre.entry.uc_stack.ss_size = kStackBytes;
  fibre.entry.uc_link = nullptr;
  makecontext(&fibre.entry, run_fibre, 0);
}

void run_block() {
  std::memset(block.shared.data(), 0xFF, block.shared.size());
  for (int thread = 0; thread < block.threads; ++thread) prepare_fibre(block.fibres[thread]);
  block.running = block.threads;
  block.current = block.order == WaveOrder::kAscending ? 0 : block.threads - block.wave_size;
  if (_setjmp(block.done) == 0) resume(block.current);
}

}  // namespace

void run_grid(uint32_t blocks, int threads, int wave_size, size_t shared_bytes,
              const std::function<void()>& body) {
  if (threads % wave_size != 0) fail("a block is not a whole number of waves");
  constexpr size_t kAlign = 16;
  block.threads = threads;
  block.wave_size = wave_size;
  block.body = &body;
  if (block.fibres.size() < static_cast<size_t>(threads)) block.fibres.resize(threads);
  block.waves.assign(threads / wave_size, Wave{nullptr, std::vector<void*>(wave_size), 0});
  block.shared.resize(shared_bytes + kAlign);
  const auto address = reinterpret_cast<uintptr_t>(block.shared.data());
  block.aligned_shared = block.shared.data() + (kAlign - address % kAlign) % kAlign;
  const uint32_t end = blocks < block.limit ? blocks : block.limit;
  for (block.index = 0; block.index < end; ++block.index) run_block();
}

void set_block_limit(uint32_t most) { block.limit = most; }

void redirect_launches(LaunchListener to) { listener = to; }

bool redirected(const Launch& launch) {
  if (listener != nullptr) listener(&launch);
  return listener != nullptr;
}

void set_wave_order(WaveOrder order) { block.order = order; }

uint32_t thread_index() { return static_cast<uint32_t>(block.current); }

uint32_t block_index() { return block.index; }

char* shared_memory() { return block.aligned_shared; }

void barrier() {
  if (++block.at_barrier < block.threads) return wait();
  block.at_barrier = 0;
  for (Wave& wave : block.waves) {
    if (wave.arrived > 0) fail("a barrier met while a wave waits for its own lanes");
  }
  for (int thread = 0; thread < block.threads; ++thread) block.fibres[thread].waiting = false;
}

void meet_wave(WaveAction act, void* mine) {
  const int size = block.wave_size, index = block.current / size;
  Wave& wave = block.waves[index];
  if (wave.arrived > 0 && wave.action != act) fail("lanes of a wave met in different operations");
  wave.action = act;
  wave.lanes[block.current % size] = mine;
  if (++wave.arrived < size) return wait();
  wave.arrived = 0;
  act(wave.lanes.data(), size);
  for (int lane = 0; lane < size; ++lane) block.fibres[index * size + lane].waiting = false;
}

namespace {

struct Shuffle {
  float value;
  int mask;
  float received;
};

void shuffle_wave(void* const* lanes, int wave_size) {
  for (int lane = 0; lane < wave_size; ++lane) {
    auto* mine = static_cast<Shuffle*>(lanes[lane]);
    mine->received = static_cast<Shuffle*>(lanes[lane ^ mine->mask])->value;
  }
}

}  // namespace

float shuffle_xor(float value, int mask) {
  Shuffle mine{value, mask, 0.0f};
  meet_wave(shuffle_wave, &mine);
  return mine.received;
}

void copy_later(void* to, const void* from, size_t bytes, bool valid) {
  const auto misaligned = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (valid && misaligned % bytes != 0) fail("a copy to shared memory is not aligned to its size");
  block.fibres[block.current].copies.push_back({to, from, bytes, valid});
}

void copies_arrived() {
  auto& copies = block.fibres[block.current].copies;
  for (const Copy& copy : copies) {
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  copies.clear();
}

}  // namespace usp::gpu::emulated

// Every library of the emulated GPU has it.
extern "C" __attribute__((visibility("default"))) void usp_gpu_redirect_launches(
    usp::gpu::emulated::LaunchListener listener) {
  usp::gpu::emulated::redirect_launches(listener);
}
