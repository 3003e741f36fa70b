#pragma once

// What sm_90a has beyond other NVIDIA GPUs, on the CPU: barriers that count bytes, copies of boxes,
// wgmma. Everything that runs on by itself there does so here, too: at once or as late as the
// rules allow, as the test wants it. A rule that is broken ends the program with a message.

#include <vector>

#include "../half.h"
#include "../hopper/layouts.h"
#include "simt.h"

namespace usp::gpu::host {

// Of the GPU that this target stands in for: 80, 90.
int compute_capability();
void set_compute_capability(int capability);

// kAtOnce: where it is started. kLate: copies when no thread can go on without them, products where
// their wave waits for them.
enum class Asynchrony { kAtOnce, kLate };
void set_asynchrony(Asynchrony copies, Asynchrony products);

// How many wgmma there have been.
int64_t product_count();

// As a kernel sees it: 32 bits, the block's dynamic memory not at 0.
uint32_t shared_address(const void* pointer);
uint16_t shared_number(uint32_t address);

void init_barrier(uint64_t* barrier, int arrivals);
void arrive(uint64_t* barrier, int expected_bytes);
void wait_for_phase(uint64_t* barrier, uint32_t parity);

void encode_map(uint64_t* words, const void* data, const uint64_t* dims, const uint64_t* strides,
                const uint32_t* box);
void load_box(void* to, const uint64_t* words, void* barrier, const int* first);

// One lane's part of one wgmma.
struct ProductLane {
  float* d;
  const uint32_t* a;  // null: from shared memory
  uint64_t a_tile, b_tile;
  bool adds;
};

// A wave's part.
struct WaveProduct {
  void (*run)(const WaveProduct&);
  int wave_of_group;
  std::vector<ProductLane> lanes;
};

void begin_products();
void end_products();
void products_done(int running);

// Takes the part of every wave of the warpgroup; `lanes` are ProductLanes.
void start_products(void (*run)(const WaveProduct&), void* const* lanes, int count);

template <typename T, int kColumns>
void run_product(const WaveProduct& product) {
  constexpr int kLanes = 32, kRows = 16, kDepth = 16;
  const int first_lane = product.wave_of_group * kLanes, first_row = product.wave_of_group * kRows;
  const auto number = [](uint16_t bits) { return to_float(T{bits}); };
  float a[kRows][kDepth], b[kDepth][kColumns];
  const ProductLane& any = product.lanes[0];
  for (int k = 0; k < kDepth; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      b[k][n] = number(shared_number(any.a == nullptr ? descriptor::k_major(any.b_tile, n, k)
                                                      : descriptor::mn_major(any.b_tile, k, n)));
    }
    for (int m = 0; m < kRows && any.a == nullptr; ++m) {
      a[m][k] = number(shared_number(descriptor::k_major(any.a_tile, first_row + m, k)));
    }
  }
  for (int lane = 0; lane < kLanes && any.a != nullptr; ++lane) {
    for (int i = 0; i < kRows * kDepth / kLanes; ++i) {
      const Position at = m64nNk16::a(first_lane + lane, i);
      const uint32_t pair = product.lanes[lane].a[i / 2];
      a[at.row - first_row][at.column] = number(static_cast<uint16_t>(pair >> i % 2 * 16));
    }
  }
  float sums[kRows][kColumns] = {};
  for (int m = 0; m < kRows; ++m) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < kColumns; ++n) sums[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kRows * kColumns / kLanes; ++i) {
      const Position at = m64nNk16::d(first_lane + lane, i);
      float& d = product.lanes[lane].d[i];
      d = (any.adds ? d : 0.0f) + sums[at.row - first_row][at.column];
    }
  }
}

template <typename T, int kColumns>
void wgmma(ProductLane mine) {
  meet_group(
      [](void* const* lanes, int count) { start_products(run_product<T, kColumns>, lanes, count); },
      &mine);
}

}  // namespace usp::gpu::host
