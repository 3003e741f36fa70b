#pragma once

// gemm on matrix tiles (matrix_tiles.h).
//
// A product that is added to c waits: the next softmax or gradients of a tile make it step by step
// between their own vectors, for a core does both at once, but looks ahead no further than a few
// hundred instructions.

#include <algorithm>
#include <optional>

#include "cpu/matrix_tiles.h"

namespace usp::cpu {
namespace {

// A product with c as it lies.
struct TiledProduct : Product<float> {
  int64_t words() const { return (k + 1) / 2; }
  int64_t tiles() const { return whole_tiles(words()) / kTileWords; }
  int64_t steps() const {
    const auto halved = [](int64_t count) { return (count + 2 * kTileRows - 1) / (2 * kTileRows); };
    return halved(m) * halved(n) * tiles();
  }
};

// A product, block by block of its sums, and step by step of these.
template <typename Tiles>
class TileProduct {
 public:
  explicit TileProduct(const TiledProduct& of)
      : of_(of),
        room_(tile_room(LeftTiles::room(of.m, of.words()) + RightTiles::room(of.n))),
        left_(of.m, of.words(), of.a, room_),
        right_(of.n, of.words(), of.b, room_ + LeftTiles::room(of.m, of.words())) {}

  bool done() const { return i_ >= of_.m; }

  // At most so many steps of the block that is its turn.
  void advance(int64_t most) {
    const Range tiles{tile_, std::min(tile_ + most, of_.tiles())};
    const bool two_rows = of_.m - i_ > kTileRows, two_columns = of_.n - j_ > kTileWords;
    const TileRow rows[2] = {left_.row(i_), two_rows ? left_.row(i_ + kTileRows) : TileRow{}};
    const TileRow columns[2] = {right_.column(j_), right_.column(j_ + kTileWords)};
    const auto block = two_rows ? (two_columns ? tile_block<Tiles, 2, 2> : tile_block<Tiles, 2, 1>)
                                : (two_columns ? tile_block<Tiles, 1, 2> : tile_block<Tiles, 1, 1>);
    if (tile_ == 0) of_.update.look_ahead();
    block(
        of_.words(), tiles, rows, columns,
        {of_.c.data + i_ * of_.c.ld + j_, of_.c.ld, of_.m - i_, of_.update.alpha, of_.update.adds});
    tile_ = tiles.end;
    if (tile_ < of_.tiles()) return;
    tile_ = 0;
    j_ += 2 * kTileWords;
    if (j_ < of_.n) return;
    j_ = 0;
    i_ += 2 * kTileRows;
  }

  void finish() {
    while (!done()) advance(of_.tiles());
  }

 private:
  TiledProduct of_;
  float* room_;
  LeftTiles left_;
  RightTiles right_;
  int64_t i_ = 0, j_ = 0, tile_ = 0;
};

// Products of this thread that wait for the next work on vectors, between whose instructions the
// tiles multiply. One that has begun ends before another that does not wait: they share memory and
// tiles.
template <typename Tiles>
class Later {
 public:
  static Later& of_thread() {
    static thread_local Later mine;
    return mine;
  }

  void add(const TiledProduct& product) {
    if (end_ == kMost) finish();
    waiting_[end_++] = product;
  }

  int64_t steps() const {
    int64_t steps = 0;
    for (int64_t p = next_; p < end_; ++p) steps += waiting_[p].steps();
    return steps;
  }

  void advance() {
    if (!begun_.has_value()) {
      if (next_ == end_) return;
      begun_.emplace(waiting_[next_++]);
    }
    begun_->advance(1);
    if (begun_->done()) begun_.reset();
  }

  void finish() {
    while (begun_.has_value() || next_ < end_) advance();
    next_ = end_ = 0;
  }

  void finish_begun() {
    if (begun_.has_value()) finish();
  }

  // Of the two halves of a room, the one that no product which waits reads.
  int64_t other_half() { return half_ ^= 1; }

 private:
  static constexpr int64_t kMost = 3;  // of a tile of gradients
  TiledProduct waiting_[kMost];
  std::optional<TileProduct<Tiles>> begun_;
  int64_t next_ = 0, end_ = 0, half_ = 0;
};

// Spreads the steps of products that wait over `turns`.
template <typename Tiles>
class Spread {
 public:
  Spread(Later<Tiles>& later, int64_t turns)
      : later_(later), every_(turns / std::max<int64_t>(later.steps(), 1)), left_(every_) {}

  USP_SIMD_MEMBER void turn() {
    if (--left_ > 0) return;
    left_ = every_;
    later_.advance();
  }

 private:
  Later<Tiles>& later_;
  const int64_t every_;
  int64_t left_;
};

template <typename Tiles>
void gemm_on_tiles(const Product<float>& p) {
  Later<Tiles>& later = Later<Tiles>::of_thread();
  const Update<float>& update = p.update;
  if (update.adds && update.factor != nullptr) {
    later.finish();
    // Columns up to a whole tile: they are padding, as those of a are.
    p.c.transposed ? scale_columns(p.c, p.n, whole_tiles(p.m), update.factor)
                   : scale_rows(p.c, p.m, p.n, update.factor);
  }
  const TiledProduct product =
      p.c.transposed ? TiledProduct{{p.n, whole_tiles(p.m), p.k, p.b, p.a, p.c, update}}
                     : TiledProduct{p};
  if (update.adds) return later.add(product);
  later.finish_begun();
  TileProduct<Tiles>(product).finish();
}

template <typename Tiles>
void end_products() {
  Later<Tiles>::of_thread().finish();
  Tiles::release();
}

}  // namespace
}  // namespace usp::cpu
