// Kernels that break one rule of sm_90a each: the host target must end the program and say which.
//
// usage: gpu_host_rules RULE; "none" breaks none.

#include <cstdio>
#include <string>

#include "gpu/hopper/tiles.h"

namespace usp::gpu::hopper {
namespace {

using Rows = Tile<BFloat16, 64, 64>;

struct Arguments {
  std::string rule;
  TensorMap map;
};

struct Shared {
  Rows tile{aligned_shared_memory()};
  Barrier& full = *reinterpret_cast<Barrier*>(tile.data + Rows::kBytes);
};

// One warpgroup brings a tile and multiplies it with itself.
void kernel(const Arguments* arguments) {
  const std::string& rule = arguments->rule;
  const Shared shared;
  if (thread_index() == 0 && rule != "not set up") {
    shared.full.init(1);
    barriers_are_set_up();
  }
  barrier();
  if (thread_index() == 0) {
    shared.full.arrive_expecting(Rows::kBytes + (rule == "too few bytes" ? 2 : 0));
    if (rule == "written over") *reinterpret_cast<float*>(&shared.full) = 1.0f;
    const int row = rule == "misaligned" ? 128 : 0;
    load_box(shared.tile.data + row, arguments->map, shared.full, {0, 0, 0, 0});
    if (rule == "too many arrivals") shared.full.arrive();
  }
  if (rule == "not waited for") return;
  shared.full.wait(0);
  if (rule == "a phase that never ends") shared.full.wait(1);

  Product<64> sums;
  if (rule != "no fence") begin_products(sums);
  const int first = rule == "lanes disagree" && lane() == 5 ? 8 : 0;
  if (rule != "a warp is missing" || wave() != 2) {
    multiply_transposed(sums, shared.tile, first, shared.tile);
    end_products();
  }
  if (rule != "products left") products_done<0>(sums);
}

int run(const std::string& rule) {
  static BFloat16 numbers[64 * 64] alignas(16) = {};
  Arguments arguments{rule, {}};
  const TensorView view{numbers, DType::kBFloat16, 64 * 64, 64, 64};
  make_map(arguments.map, view, {1, 64, 1, 64, 64});
  launch(kernel, {}, kGroup, shared_bytes(Rows::kBytes + 64), {},
         static_cast<const Arguments*>(&arguments));
  std::puts("done");
  return 0;
}

}  // namespace
}  // namespace usp::gpu::hopper

int main(int count, char** arguments) {
  return usp::gpu::hopper::run(count > 1 ? arguments[1] : "none");
}
