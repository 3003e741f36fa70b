#pragma once

// A thread block on the CPU: each thread a fibre, run in turn.
//
// A fibre runs until it meets a wave-wide operation (all lanes of its wave must come to the same
// one) or a barrier. A wave runs ahead of the others as far as it can, and copies to shared memory
// arrive only where they are waited for: so a missing barrier or wait gives wrong numbers here,
// too. Shared memory starts as NaN. Threads that never meet end the program with a message.

#include <cstddef>
#include <cstdint>
#include <functional>

namespace usp::gpu::emulated {

struct Index3 {
  uint32_t x, y, z;
};

// A parameter of a kernel: its bytes.
struct Argument {
  const void* data;
  size_t bytes;
};

// A launch as a GPU's runtime is told of it.
struct Launch {
  const void* kernel;
  const Argument* arguments;
  size_t num_arguments;
  Index3 grid;
  int threads;
  size_t shared_bytes;
};

// From now on launches are only told of, not run; null ends it.
using LaunchListener = void (*)(const Launch*);
void redirect_launches(LaunchListener listener);
bool redirected(const Launch& launch);

// Ends the program: a kernel broke a rule of the machine.
[[noreturn]] void fail(const char* what);

// Runs `body` once for each thread of each block, in their order.
void run_grid(uint32_t blocks, int threads, int wave_size, size_t shared_bytes,
              const std::function<void()>& body);

// Which wave of a block goes first: results must not depend on it.
enum class WaveOrder { kAscending, kDescending };
void set_wave_order(WaveOrder order);

// From now on a launch ends after so many blocks: shows which come first.
void set_block_limit(uint32_t most);

uint32_t thread_index();
uint32_t block_index();
char* shared_memory();

void barrier();
float shuffle_xor(float value, int mask);
void copy_later(void* to, const void* from, size_t bytes, bool valid);
void copies_arrived();

// One operation of a whole wave: when its last lane comes, `act` is called with the `mine` of every
// lane in order, and may read and write them all.
using WaveAction = void (*)(void* const* lanes, int wave_size);
void meet_wave(WaveAction act, void* mine);

}  // namespace usp::gpu::emulated
