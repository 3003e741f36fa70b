// Gradients of one block of keys, from the final lse and delta, on sm_90a.
//
// As in ../attention_backward.cu: one kernel owns keys and walks over queries for dK and dV, one
// owns queries and walks over keys for dQ. A thread block owns 128 rows; one warpgroup brings what
// it walks over, two have 64 rows each. Scores are computed with the own rows as rows, so that they
// and their gradients are the left operands of the next products where they lie, in registers.

#include "attention.h"

#if defined(USP_WGMMA)

#include "gradient_tiles.h"
#include "problem.h"

namespace usp::gpu::hopper {
namespace {

struct GradientArguments {
  Attention<float> inputs;
  AttentionGradients<float> gradients;
  FirstBlock first;
  TensorMap q, k, v, dout;
};

// --- dK and dV -----------------------------------------------------------------------------------

// One wave.
template <typename T, int kDim>
USP_DEVICE void produce_queries(const GradientArguments& arguments, const BlockPlace& place,
                                int first_key, const QueryWalk& walk) {
  const GradientShared<T, kDim> shared;
  const Attention<float>& a = arguments.inputs;
  const AttentionGradients<float>& g = arguments.gradients;
  auto& rest = shared.rest();
  if (lane() == 0) {
    shared.load_own(arguments.k, arguments.v, {0, first_key, place.h, place.b});
  }
  for (int step = 0; step < walk.steps(); ++step) {
    const int head = walk.head(step);
    const Rows rows = walk.rows(step);
    const int64_t first = (int64_t{place.b} * a.H + head) * a.Lq + rows.begin;
    QueryResults found[kColumns / kWaveSize];
    USP_UNROLL
    for (int i = 0; i < kColumns / kWaveSize; ++i) {
      const int row = i * kWaveSize + lane();
      const bool exists = row < rows.size();
      found[i] = QueryResults::of(exists ? g.lse[first + row] : -kInfinity,
                                  exists ? g.delta[first + row] : 0.0f);
    }
    const uint32_t stage = Ring<kStages>::stage(step);
    rest.walked.wait_empty(step);
    USP_UNROLL
    for (int i = 0; i < kColumns / kWaveSize; ++i) {
      rest.lse[stage][i * kWaveSize + lane()] = found[i].lse;
      rest.delta[stage][i * kWaveSize + lane()] = found[i].delta;
    }
    if (lane() == 0) {
      shared.load_walked(arguments.q, arguments.dout, {0, rows.begin, head, place.b}, step);
    } else {
      rest.walked.full[stage].arrive();
    }
  }
}

template <typename T, int kDim>
USP_DEVICE void consume_queries(const GradientArguments& arguments, const BlockPlace& place,
                                int first_key, const QueryWalk& walk) {
  const GradientShared<T, kDim> shared;
  const Attention<float>& a = arguments.inputs;
  const AttentionGradients<float>& g = arguments.gradients;
  auto& ring = shared.rest().walked;
  const OwnRows own = OwnRows::of(wave());
  first_key += own.of_wave;
  const float scale = static_cast<float>(a.softmax_scale) * kLog2e;

  Product<kDim> dk, dv;
  dk.clear();
  dv.clear();
  shared.rest().own.wait(0);
  for (int step = 0; step < walk.steps(); ++step) {
    Product<kColumns> scores, dscores;
    LeftOperand<T, kColumns> weights, gradients;
    ring.wait_full(step);
    shared.start_scores(scores, dscores, own.of_group, step);
    products_done<1>(scores);
    if (walk.is_masked(step)) {
      const int first_query = walk.rows(step).begin;
      mask(scores, a.span,
           [&](int row, int column) { return Pair{first_query + column, first_key + row}; });
    }
    const uint32_t stage = Ring<kStages>::stage(step);
    scores.for_each_pair([&](float* x, int, int column) {
      const FloatPair lse = load_pair(shared.rest().lse[stage] + column);
      weigh(x[0], scale, lse.x);
      weigh(x[1], scale, lse.y);
    });
    weights.from(scores);
    start_gradient(dv, weights, shared.walked(1, step));
    products_done<1>(dscores);
    dscores.for_each_pair([&](float* x, int, int column) {
      const float* p = scores.x + (x - dscores.x);
      const FloatPair delta = load_pair(shared.rest().delta[stage] + column);
      x[0] = p[0] * (x[0] - delta.x);
      x[1] = p[1] * (x[1] - delta.y);
    });
    gradients.from(dscores);
    start_gradient(dk, gradients, shared.walked(0, step));
    products_done<0>(dk, dv, weights, gradients);
    sync_wave();
    ring.release(step);
  }

  const int64_t row = (int64_t{place.b} * a.Lk + first_key) * a.G + place.h;
  const int count = static_cast<int>(a.Lk) - first_key;
  MatrixRows<float>{g.dk + row * kDim, a.G * kDim, count}.add(dk,
                                                              static_cast<float>(a.softmax_scale));
  MatrixRows<float>{g.dv + row * kDim, a.G * kDim, count}.add(dv, 1.0f);
}

template <typename T, int kDim>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 1) void wgmma_key_value_kernel(
    const USP_GRID_CONSTANT GradientArguments arguments) {
#if defined(USP_HOPPER)
  const Attention<float>& a = arguments.inputs;
  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lk, kOwnRows));
  const Range range = rows_of_tile(place.row_tile, kOwnRows, a.Lk);
  const QueryWalk walk{
      Walk::over(visible_queries(a.span, range), unmasked_queries(a.span, range), kColumns),
      Rows::of(a.query_heads(place.h))};
  if (walk.steps() <= 0) return;

  GradientShared<T, kDim>().set_up(kWaveSize);
  const int first_key = static_cast<int>(range.begin);
  if (wave() < 4) {
    give_registers_back<kProducerRegisters>();
    if (wave() == 0) produce_queries<T, kDim>(arguments, place, first_key, walk);
  } else {
    take_registers<kConsumerRegisters>();
    consume_queries<T, kDim>(arguments, place, first_key, walk);
  }
#endif
}

// --- dQ ------------------------------------------------------------------------------------------

// One thread.
template <typename T, int kDim>
USP_DEVICE void produce_keys(const GradientArguments& arguments, const BlockPlace& place,
                             int first_query, const Walk& walk) {
  const GradientShared<T, kDim> shared;
  const int key_head = static_cast<int>(arguments.inputs.key_head(place.h));
  shared.load_own(arguments.q, arguments.dout, {0, first_query, place.h, place.b});
  for (int step = 0; step < walk.count; ++step) {
    shared.rest().walked.wait_empty(step);
    shared.load_walked(arguments.k, arguments.v,
                       {0, walk.step(step, kColumns).begin, key_head, place.b}, step);
  }
}

// Rows of queries of a warp. The product of a step's gradients with its keys runs beside the scores
// of the next step.
template <typename T, int kDim>
class KeyConsumer {
 public:
  USP_DEVICE KeyConsumer(const GradientArguments& arguments, const BlockPlace& place,
                         int first_query, const Walk& walk)
      : a_(arguments.inputs),
        g_(arguments.gradients),
        place_(place),
        walk_(walk),
        own_(OwnRows::of(wave())),
        first_query_(first_query + own_.of_wave),
        count_(static_cast<int>(a_.Lq) - first_query_),
        scale_(static_cast<float>(a_.softmax_scale) * kLog2e) {}

  USP_DEVICE void run() {
    auto& ring = shared_.rest().walked;
    load_results();
    Product<kDim> dq;
    dq.clear();
    LeftOperand<T, kColumns> gradients;
    shared_.rest().own.wait(0);
    {
      Product<kColumns> scores, dscores;
      start_scores(scores, dscores, 0);
      products_done<1>(scores);
      weigh_step(scores, 0);
      products_done<0>(dscores);
      differentiate(dscores, scores);
      gradients.from(dscores);
    }
    for (int step = 1; step < walk_.count; ++step) {
      Product<kColumns> scores, dscores;
      start_scores(scores, dscores, step);
      start_gradient(dq, gradients, shared_.walked(0, step - 1));
      products_done<2>(scores);
      weigh_step(scores, step);
      products_done<1>(dscores);
      differentiate(dscores, scores);
      products_done<0>(dq, gradients);
      ring.release(step - 1);
      gradients.from(dscores);
    }
    start_gradient(dq, gradients, shared_.walked(0, walk_.count - 1));
    products_done<0>(dq, gradients);

    const int64_t row = (int64_t{place_.b} * a_.Lq + first_query_) * a_.H + place_.h;
    MatrixRows<float>{g_.dq + row * kDim, a_.H * kDim, count_}.add(
        dq, static_cast<float>(a_.softmax_scale));
  }

 private:
  USP_DEVICE void load_results() {
    const int64_t first = (int64_t{place_.b} * a_.H + place_.h) * a_.Lq + first_query_;
    results_.for_each([&](QueryResults& result, int row) {
      const bool exists = row < count_;
      result = QueryResults::of(exists ? g_.lse[first + row] : -kInfinity,
                                exists ? g_.delta[first + row] : 0.0f);
    });
  }

  USP_DEVICE void start_scores(Product<kColumns>& scores, Product<kColumns>& dscores, int step) {
    shared_.rest().walked.wait_full(step);
    shared_.start_scores(scores, dscores, own_.of_group, step);
  }

  USP_DEVICE void weigh_step(Product<kColumns>& scores, int step) {
    if (walk_.is_masked(step)) {
      const int first_key = walk_.step(step, kColumns).begin;
      mask(scores, a_.span,
           [&](int row, int column) { return Pair{first_query_ + row, first_key + column}; });
    }
    scores.for_each([&](float& x, int slot, int) { weigh(x, scale_, results_.of[slot].lse); });
  }

  USP_DEVICE void differentiate(Product<kColumns>& dscores, const Product<kColumns>& weights) {
    USP_UNROLL
    for (int i = 0; i < dscores.kCount; ++i) {
      dscores.x[i] = weights.x[i] * (dscores.x[i] - results_.of[dscores.slot(i)].delta);
    }
  }

  const Attention<float>& a_;
  const AttentionGradients<float>& g_;
  const BlockPlace& place_;
  const Walk& walk_;
  OwnRows own_;
  int first_query_, count_;
  float scale_;
  PerRow<QueryResults> results_;
  GradientShared<T, kDim> shared_;
};

template <typename T, int kDim>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 1) void wgmma_query_kernel(
    const USP_GRID_CONSTANT GradientArguments arguments) {
#if defined(USP_HOPPER)
  const Attention<float>& a = arguments.inputs;
  const BlockPlace place = place_of_block(arguments.first, tiles_of(a.Lq, kOwnRows));
  const Range range = rows_of_tile(place.row_tile, kOwnRows, a.Lq);
  const Walk walk = Walk::over(visible_keys(a.span, range), unmasked_keys(a.span, range), kColumns);
  if (walk.count == 0) return;

  GradientShared<T, kDim>().set_up(1);
  const int first_query = static_cast<int>(range.begin);
  if (wave() < 4) {
    give_registers_back<kProducerRegisters>();
    if (thread_index() == 0) produce_keys<T, kDim>(arguments, place, first_query, walk);
  } else {
    take_registers<kConsumerRegisters>();
    KeyConsumer<T, kDim>(arguments, place, first_query, walk).run();
  }
#endif
}

// --- Launching -----------------------------------------------------------------------------------

// Fills the four maps; returns null, or what went wrong.
template <int kDim>
const char* make_maps(GradientArguments& arguments, int query_rows, int key_rows) {
  const Attention<float>& a = arguments.inputs;
  const MapSizes queries{a.B, a.Lq, a.H, kDim, query_rows}, keys{a.B, a.Lk, a.G, kDim, key_rows};
  const char* error = make_map(arguments.q, a.q, queries);
  if (error == nullptr) error = make_map(arguments.dout, arguments.gradients.dout, queries);
  if (error == nullptr) error = make_map(arguments.k, a.k, keys);
  if (error == nullptr) error = make_map(arguments.v, a.v, keys);
  return error;
}

template <typename T, int kDim>
const char* launch_backward(const Attention<float>& a, const AttentionGradients<float>& gradients,
                            Stream stream) {
  constexpr int kBytes = shared_bytes(GradientShared<T, kDim>::kBytes);
  static_assert(kBytes <= kSharedLimit);
  GradientArguments arguments{a, gradients, {}, {}, {}, {}, {}};
  if (const char* error = make_maps<kDim>(arguments, kColumns, kOwnRows)) return error;
  launch_blocks(wgmma_key_value_kernel<T, kDim>, arguments, tiles_of(a.Lk, kOwnRows), a.G, a.B,
                kThreads, kBytes, stream);
  if (const char* error = make_maps<kDim>(arguments, kOwnRows, kColumns)) return error;
  launch_blocks(wgmma_query_kernel<T, kDim>, arguments, tiles_of(a.Lq, kOwnRows), a.H, a.B,
                kThreads, kBytes, stream);
  return last_error();
}

}  // namespace

bool takes_backward(const Attention<float>& inputs, const AttentionGradients<float>& gradients) {
  return is_taken(inputs) && can_map(gradients.dout, inputs.B, inputs.Lq, inputs.H) &&
         has_aligned_pairs(gradients.dq, 4) && has_aligned_pairs(gradients.dk, 4) &&
         has_aligned_pairs(gradients.dv, 4) && runs_here(wgmma_query_kernel<BFloat16, 64>);
}

const char* attention_backward(const Attention<float>& inputs,
                               const AttentionGradients<float>& gradients, Stream stream) {
  return with_exact_head_dim(inputs, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    return inputs.q.dtype == DType::kBFloat16
               ? launch_backward<BFloat16, kDim>(inputs, gradients, stream)
               : launch_backward<Float16, kDim>(inputs, gradients, stream);
  });
}

}  // namespace usp::gpu::hopper

#endif
