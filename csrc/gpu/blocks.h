#pragma once

// From a problem to thread blocks: one block for each tile of rows of each head.

#include <type_traits>

#include "common/attention.h"
#include "gpu/tiles.h"

namespace usp::gpu {

// The same problem with pointers known to point to global memory.
USP_DEVICE Attention<float> in_global_memory(Attention<float> a) {
  a.q.data = in_global_memory(a.q.data);
  a.k.data = in_global_memory(a.k.data);
  a.v.data = in_global_memory(a.v.data);
  a.span.first = in_global_memory(a.span.first);
  a.span.stop = in_global_memory(a.span.stop);
  a.bias.data = in_global_memory(a.bias.data);
  a.alibi_slopes = in_global_memory(a.alibi_slopes);
  a.q_pos = in_global_memory(a.q_pos);
  a.k_pos = in_global_memory(a.k_pos);
  return a;
}

// The blocks of a launch. A sequence is a head of a batch entry.
struct BlockOrder {
  uint32_t tiles;      // of a sequence
  uint32_t heads;      // of a batch entry
  uint32_t together;   // sequences whose blocks start side by side
  uint32_t sequences;  // of this launch
  uint32_t first_batch, first_head;
};

struct BlockPlace {
  int b, h, tile;
};

// Tile 0 of `together` sequences comes first, then tile 1 of them: where the longest tiles do, the
// last blocks to start are short ones. Source of the order: FlashAttention-3,
// hopper/tile_scheduler.hpp.
USP_HOST_DEVICE BlockPlace place_of_block(const BlockOrder& order, uint32_t index) {
  const uint32_t group = index / (order.tiles * order.together) * order.together;
  const uint32_t rest = order.sequences - group;
  const uint32_t here = rest < order.together ? rest : order.together;
  const uint32_t inside = index - group * order.tiles, tile = inside / here;
  const uint32_t head = order.first_head + group + inside % here;
  return {static_cast<int>(order.first_batch + head / order.heads),
          static_cast<int>(head % order.heads), static_cast<int>(tile)};
}

// Of tiles of queries: with a causal mask the last ones have most to do, as of keys the first.
USP_DEVICE BlockPlace last_tiles_first(const BlockOrder& order) {
  BlockPlace place = place_of_block(order, block_index());
  place.tile = static_cast<int>(order.tiles) - 1 - place.tile;
  return place;
}

USP_DEVICE Range rows_of_tile(int64_t tile, int size, int64_t count) {
  return intersect({tile * size, (tile + 1) * size}, {0, count});
}

// A run of rows of the block of attention, in few registers.
struct Rows {
  int begin, end;

  USP_DEVICE static Rows of(Range range) {
    return {static_cast<int>(range.begin), static_cast<int>(range.end)};
  }
  USP_DEVICE int size() const { return end - begin; }
  USP_DEVICE bool contain(int row) const { return begin <= row && row < end; }
};

// Keys that a query sees.
USP_DEVICE Rows keys_seen_by(const Span& span, int query) {
  if (query >= span.num_queries) return {0, 0};
  if (span.sees_all()) return {0, static_cast<int>(span.num_keys)};
  return {span.first[query], span.stop[query]};
}

// Queries that see a key, of a tile of which `visible` see some key and `unmasked` see all.
USP_DEVICE Rows queries_that_see(const Span& span, int key, Rows visible, Rows unmasked) {
  if (key >= span.num_keys) return {0, 0};
  if (span.sees_all()) return visible;
  const auto search = [&](const int32_t* ends, int begin, int end) {
    return begin + static_cast<int>(first_above(ends + begin, end - begin, key));
  };
  return {search(span.stop, visible.begin, unmasked.begin),
          search(span.first, unmasked.end, visible.end)};
}

// The rows of `visible` in steps of `size`. The steps [full.begin, full.end) need no mask.
struct Walk {
  Rows visible;
  int count;
  Rows full;

  USP_DEVICE static Walk over(Range visible, Range unmasked, int size) {
    const Rows inside = Rows::of(intersect(visible, unmasked));
    const Rows all = Rows::of(visible);
    const int count = visible.empty() ? 0 : (all.size() + size - 1) / size;
    if (inside.size() <= 0) return {all, count, {0, 0}};
    return {all,
            count,
            {(inside.begin - all.begin + size - 1) / size, (inside.end - all.begin) / size}};
  }

  USP_DEVICE Rows step(int index, int size) const {
    const int begin = visible.begin + index * size;
    return {begin, visible.end - begin < size ? visible.end : begin + size};
  }

  USP_DEVICE bool is_masked(int index) const { return index < full.begin || index >= full.end; }
};

// The steps of a walk over keys that some query of `rows` sees. Where the rows' intervals overlap,
// as under a causal mask or a window, that is all of them; packed documents leave gaps between.
class SeenSteps {
 public:
  USP_DEVICE SeenSteps(const Span& span, Rows rows, const Walk& walk, int size)
      : span_(span), rows_(rows), walk_(walk), size_(size), has_gaps_(find_gaps()) {}

  // The first such step after `step`.
  USP_DEVICE int next(int step) const {
    do {
      ++step;
    } while (has_gaps_ && step < walk_.count && walk_.is_masked(step) && !is_seen(step));
    return step;
  }

 private:
  USP_DEVICE bool is_seen(int step) const {
    const Rows keys = walk_.step(step, size_);
    return may_see_any(span_, {rows_.begin, rows_.end}, {keys.begin, keys.end});
  }

  // Once for all steps. Every wave finds the same.
  USP_DEVICE bool find_gaps() const {
    if (span_.sees_all()) return false;
    bool found = false;
    for (int i = rows_.begin + lane(); i + 1 < rows_.end; i += kWaveSize) {
      found = found || span_.stop[i] < span_.first[i + 1];
    }
    return any_lane(found);
  }

  const Span& span_;
  const Rows rows_;
  const Walk& walk_;
  const int size_;
  const bool has_gaps_;
};

USP_HOST_DEVICE int64_t tiles_of(int64_t rows, int tile_rows) {
  return (rows + tile_rows - 1) / tile_rows;
}

// Sequences whose rows, which blocks walk over, fit a cache: 5/8 of the L2 of an A100 (40 MB) or a
// gfx90a (8 MB), for blocks write, too. Without a mask all tiles take equally long.
inline int64_t sequences_together(const Span& span, int64_t bytes_of_sequence) {
  constexpr int64_t kCached = (kWarps ? 25 : 5) << 20;
  if (span.sees_all() || bytes_of_sequence >= kCached) return 1;
  return kCached / (bytes_of_sequence < 1 ? 1 : bytes_of_sequence);
}

// Of q and dout, or of k and v.
inline int64_t bytes_of_row(const Attention<float>& a) { return (a.D + a.Dv) * 2; }

// Query heads that share a key head stay together.
inline int64_t query_heads_together(const Attention<float>& a) {
  return sequences_together(a.span, a.Lk * bytes_of_row(a)) * a.group_size;
}

// Launches `kernel` for `tiles` blocks of each head of each batch entry, in the order above.
template <typename Arguments>
void launch_blocks(void (*kernel)(Arguments), Arguments arguments, int64_t tiles, int64_t heads,
                   int64_t batch, int64_t together, int threads, size_t shared_bytes,
                   Stream stream) {
  if (tiles == 0) return;
  const int64_t all = heads * batch, most = tiles < kMostBlocks ? kMostBlocks / tiles : 1;
  for (int64_t first = 0; first < all; first += most) {
    const int64_t sequences = all - first < most ? all - first : most;
    arguments.order = {static_cast<uint32_t>(tiles),
                       static_cast<uint32_t>(heads),
                       static_cast<uint32_t>(together < sequences ? together : sequences),
                       static_cast<uint32_t>(sequences),
                       static_cast<uint32_t>(first / heads),
                       static_cast<uint32_t>(first % heads)};
    launch(kernel, static_cast<uint32_t>(sequences * tiles), threads, shared_bytes, stream,
           arguments);
  }
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector16) == 0;
}

// Whether every row of x starts at a multiple of 16 bytes.
inline bool has_aligned_rows(const TensorView& x, int64_t head_dim) {
  constexpr int64_t kVector = 8;
  return is_aligned(x.data) && head_dim >= kVector && head_dim % kVector == 0 &&
         x.batch_stride % kVector == 0 && x.row_stride % kVector == 0 &&
         x.head_stride % kVector == 0;
}

// Calls run(integral constant) with the smallest padded head dim that holds both of a's.
template <bool kPlain, int kIndex = 0, typename Run>
void with_head_dim(const Attention<float>& a, Run&& run) {
  constexpr int kDim = kHeadDims[kIndex];
  if constexpr (is_compiled(kDim, kPlain)) {
    if ((a.D <= kDim && a.Dv <= kDim) || kDim == kMaxHeadDim) {
      return run(std::integral_constant<int, kDim>{});
    }
  }
  if constexpr (kDim < kMaxHeadDim) with_head_dim<kPlain, kIndex + 1>(a, run);
}

}  // namespace usp::gpu
