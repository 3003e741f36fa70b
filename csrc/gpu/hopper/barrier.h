#pragma once

// Barriers in shared memory that count threads and bytes (mbarrier), and what else sm_90a has for
// warps with different tasks.
//
// Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier",
// "setmaxnreg".

#include "../gpu.h"

#if defined(USP_GPU_HOST)
#include "../host/hopper.h"
#endif

// Only sm_90a has these instructions. Elsewhere a kernel that uses them is never launched, see
// device.h.
#if defined(USP_GPU_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define USP_HOPPER 1
#endif

namespace usp::gpu::hopper {

// All that a kernel of this folder does elsewhere: an error, not what memory happens to hold.
USP_DEVICE void never_launched() {
#if defined(USP_GPU_CUDA)
  __trap();
#endif
}

inline constexpr int kGroup = 128;  // threads of a warpgroup: what one wgmma takes

USP_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(USP_GPU_CUDA)
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#else
  return host::shared_address(pointer);
#endif
}

// A phase ends when all arrivals and all bytes that it waits for have come. Phases are told apart
// by their parity, the first being 0; before it, the phase of parity 1 counts as ended.
class Barrier {
 public:
  USP_DEVICE void init(int arrivals) {
#if defined(USP_GPU_CUDA)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(arrivals)
                 : "memory");
#else
    host::init_barrier(&state_, arrivals);
#endif
  }

  USP_DEVICE void arrive() {
#if defined(USP_GPU_CUDA)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#else
    host::arrive(&state_, 0);
#endif
  }

  // Arrives, and lets the phase wait for `bytes` more.
  USP_DEVICE void arrive_expecting(int bytes) {
#if defined(USP_GPU_CUDA)
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
#else
    host::arrive(&state_, bytes);
#endif
  }

  // Until the phase of this parity has ended.
  USP_DEVICE void wait(uint32_t parity) {
#if defined(USP_GPU_CUDA)
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
#else
    host::wait_for_phase(&state_, parity);
#endif
  }

 private:
  uint64_t state_;
};

// Barriers that this thread has set up are there for copies, too. A barrier() makes them the
// block's.
USP_DEVICE void barriers_are_set_up() {
#if defined(USP_GPU_CUDA)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Every lane of the wave comes here; what they read and wrote before is done.
USP_DEVICE void sync_wave() {
#if defined(USP_GPU_CUDA)
  __syncwarp();
#else
  host::meet_wave([](void* const*, int) {}, nullptr);
#endif
}

// Registers of each thread from here on; all threads of the warpgroup come here.
template <int kRegisters>
USP_DEVICE void give_registers_back() {
#if defined(USP_GPU_CUDA)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
USP_DEVICE void take_registers() {
#if defined(USP_GPU_CUDA)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace usp::gpu::hopper
