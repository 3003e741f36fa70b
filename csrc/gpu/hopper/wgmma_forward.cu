// One block of keys into the running softmax, on sm_90a.
//
// A thread block owns 128 query rows of one head. One warpgroup brings keys and values, two have 64
// rows each. While the scores of one step become weights, the product of the step before with its
// values runs:
//
//   products   S0 |     S1  O0 |     S2  O1 |     S3  O2 |
//   softmax       |  0         |  1         |  2         |
//
// ptxas moves a wait for products up as far as its block of instructions goes, and so before what
// is to run beside them. That is why the next keys are waited for in between, not where they are
// used.
//
// Source: Shah et al. 2024, "FlashAttention-3", arXiv:2407.08608; here the state comes from memory
// and goes back.

#include "attention.h"

#if defined(USP_WGMMA)

#include "masks.h"
#include "problem.h"
#include "softmax.h"

namespace usp::gpu::hopper {
namespace {

constexpr int kKeys = 128;
constexpr int kStages = 2;

struct ForwardArguments {
  Attention<float> inputs;
  AttentionState<float> state;
  FirstBlock first;
  TensorMap q, k, v;
};

template <typename T, int kDim>
struct ForwardShared {
  using Queries = Tile<T, kOwnRows, kDim>;
  using Keys = Tile<T, kKeys, kDim>;

  struct Barriers {
    Barrier queries;
    Ring<kStages> keys, values;
  };
  static constexpr int kTileBytes = Queries::kBytes + 2 * kStages * Keys::kBytes;
  static constexpr int kBytes = kTileBytes + static_cast<int>(sizeof(Barriers));

  char* base = aligned_shared_memory();

  USP_DEVICE Queries queries() const { return {base}; }
  USP_DEVICE Keys keys(int step) const { return tile(Ring<kStages>::stage(step)); }
  USP_DEVICE Keys values(int step) const { return tile(kStages + Ring<kStages>::stage(step)); }
  USP_DEVICE Barriers& barriers() const { return *reinterpret_cast<Barriers*>(base + kTileBytes); }

 private:
  USP_DEVICE Keys tile(int index) const { return {base + Queries::kBytes + index * Keys::kBytes}; }
};

// One thread brings everything.
template <typename T, int kDim>
USP_DEVICE void produce(const ForwardArguments& arguments, const BlockPlace& place, int first_query,
                        const KeyWalk<kKeys>& keys) {
  using Shared = ForwardShared<T, kDim>;
  const Shared shared;
  typename Shared::Barriers& barriers = shared.barriers();
  barriers.queries.arrive_expecting(Shared::Queries::kBytes);
  shared.queries().load(arguments.q, barriers.queries, first_query, place.h, place.b);

  const int head = static_cast<int>(arguments.inputs.key_head(place.h));
  int n = 0;
  const auto bring = [&](Ring<kStages>& ring, const TensorMap& map,
                         const typename Shared::Keys& tile, int row) {
    ring.wait_empty(n);
    Barrier& full = ring.full[ring.stage(n)];
    full.arrive_expecting(Shared::Keys::kBytes);
    tile.load(map, full, row, head, place.b);
  };
  for (int step = keys.first(); keys.has(step); step = keys.next(step)) {
    const int row = keys.first_row(step);
    bring(barriers.keys, arguments.k, shared.keys(n), row);
    bring(barriers.values, arguments.v, shared.values(n), row);
    ++n;
  }
}

template <typename T, int kDim>
class Consumer {
 public:
  USP_DEVICE Consumer(const ForwardArguments& arguments, const KeyWalk<kKeys>& keys,
                      int first_query)
      : a_(arguments.inputs),
        keys_(keys),
        own_(OwnRows::of(wave())),
        first_query_(first_query + own_.of_wave),
        scale_(static_cast<float>(a_.softmax_scale) * kLog2e) {}

  USP_DEVICE int first_query() const { return first_query_; }

  USP_DEVICE void run(RunningRows& running, Product<kDim>& out) {
    auto& barriers = shared_.barriers();
    LeftOperand<T, kKeys> weights;
    barriers.queries.wait(0);
    {
      Product<kKeys> scores;
      start_scores(scores, 0);
      products_done<0>(scores);
      barriers.keys.release(0);
      scale_rows(out, weigh_step(scores, running, keys_.first()));
      weights.from(scores);
    }
    int n = 0;
    for (int step = keys_.next(keys_.first()); keys_.has(step);) {
      ++n;
      const int following = keys_.next(step);
      Product<kKeys> scores;
      start_scores(scores, n);
      start_values(out, weights, n - 1);
      products_done<1>(scores);
      barriers.keys.release(n);
      const PerRow<float> shrink = weigh_step(scores, running, step);
      if (keys_.has(following)) barriers.keys.wait_full(n + 1);
      products_done<0>(out, weights);
      barriers.values.release(n - 1);
      scale_rows(out, shrink);
      weights.from(scores);
      step = following;
    }
    start_values(out, weights, n);
    products_done<0>(out, weights);
  }

 private:
  USP_DEVICE void start_scores(Product<kKeys>& scores, int n) {
    shared_.barriers().keys.wait_full(n);
    begin_products(scores);
    multiply_transposed(scores, shared_.queries(), own_.of_group, shared_.keys(n));
    end_products();
  }

  USP_DEVICE void start_values(Product<kDim>& out, LeftOperand<T, kKeys>& weights, int n) {
    shared_.barriers().values.wait_full(n);
    begin_products(out, weights);
    multiply_accumulate(out, weights, shared_.values(n));
    end_products();
  }

  USP_DEVICE PerRow<float> weigh_step(Product<kKeys>& scores, RunningRows& running, int step) {
    if (keys_.is_masked(step)) mask(scores, a_.span, first_query_, keys_.rows(step));
    return weigh(scores, scale_, running);
  }

  const Attention<float>& a_;
  const KeyWalk<kKeys>& keys_;
  OwnRows own_;
  int first_query_;
  float scale_;
  ForwardShared<T, kDim> shared_;
};

template <typename T, int kDim>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 1) void forward_kernel(
    const USP_GRID_CONSTANT ForwardArguments arguments) {
#if defined(USP_HOPPER)
  const Attention<float>& a = arguments.inputs;
  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lq, kOwnRows));
  const Range range = rows_of_tile(place.row_tile, kOwnRows, a.Lq);
  const Walk walk = Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kKeys);
  const SeenSteps seen(a.span, range, walk, kKeys);
  const KeyWalk<kKeys> keys{walk, seen};
  if (keys.is_empty() && arguments.state.result == nullptr) return;

  const int first_query = static_cast<int>(range.begin);
  const ForwardShared<T, kDim> shared;
  if (thread_index() == 0) {
    shared.barriers().queries.init(1);
    shared.barriers().keys.init(1);
    shared.barriers().values.init(1);
    barriers_are_set_up();
  }
  barrier();
  if (wave() < 4) {
    give_registers_back<kProducerRegisters>();
    if (thread_index() == 0 && !keys.is_empty()) {
      produce<T, kDim>(arguments, place, first_query, keys);
    }
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kDim> consumer(arguments, keys, first_query);
    const auto state =
        StateRows<T>::of(arguments.state, a, place.b, place.h, consumer.first_query());
    RunningRows running;
    Product<kDim> out;
    state.load(running, out);
    if (!keys.is_empty()) consumer.run(running, out);
    state.store(running, out);
  }
#else
  never_launched();
#endif
}

template <typename T, int kDim>
const char* launch_forward(const Attention<float>& a, const AttentionState<float>& state,
                           Stream stream) {
  using Shared = ForwardShared<T, kDim>;
  static_assert(shared_bytes(Shared::kBytes) <= kSharedLimit);
  ForwardArguments arguments{a, state, {}, {}, {}, {}};
  const char* error = make_map(arguments.q, a.q, {a.B, a.Lq, a.H, kDim, kOwnRows});
  if (error == nullptr) error = make_map(arguments.k, a.k, {a.B, a.Lk, a.G, kDim, kKeys});
  if (error == nullptr) error = make_map(arguments.v, a.v, {a.B, a.Lk, a.G, kDim, kKeys});
  if (error != nullptr) return error;
  launch_blocks(forward_kernel<T, kDim>, arguments, tiles_of(a.Lq, kOwnRows), a.H, a.B, kThreads,
                shared_bytes(Shared::kBytes), stream);
  return last_error();
}

}  // namespace

bool takes_forward(const Attention<float>& inputs, const AttentionState<float>& state) {
  return is_taken(inputs) && has_aligned_pairs(state.out, 4) &&
         has_aligned_pairs(state.result, 2) && runs_here(forward_kernel<BFloat16, 64>);
}

const char* attention_forward(const Attention<float>& inputs, const AttentionState<float>& state,
                              Stream stream) {
  return with_exact_head_dim(inputs, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    return inputs.q.dtype == DType::kBFloat16
               ? launch_forward<BFloat16, kDim>(inputs, state, stream)
               : launch_forward<Float16, kDim>(inputs, state, stream);
  });
}

}  // namespace usp::gpu::hopper

#endif
