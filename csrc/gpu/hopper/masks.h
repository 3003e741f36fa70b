#pragma once

// Scores that a mask hides, in tiles at an edge.

#include "../scores.h"
#include "registers.h"

namespace usp::gpu::hopper {

// Of the queries from `first_query` on, as rows, and of a tile that ends where `keys` do: -inf
// where unseen.
template <int kColumns>
USP_DEVICE void mask(Product<kColumns>& scores, const Span& span, int first_query, Rows keys) {
  const int before = kColumns - keys.size();  // of another step
  PerRow<Columns> seen;
  seen.for_each([&](Columns& columns, int row) {
    const Columns found = visible_columns(span, first_query + row, keys, true);
    columns = {(found.begin > 0 ? found.begin : 0) + before, found.end + before};
  });
  scores.for_each([&](float& x, int slot, int column) {
    if (!seen.of[slot].contain(column)) x = -kInfinity;
  });
}

// Likewise with the keys from `first_key` on as rows, and the queries from `first_query` on. Those
// that do not exist stay: their weights are 0 in any case.
template <int kColumns>
USP_DEVICE void mask_transposed(Product<kColumns>& scores, const Span& span, int first_query,
                                int first_key) {
  if (span.sees_all()) return;
  const int last = static_cast<int>(span.num_queries) - 1;
  scores.for_each([&](float& x, int slot, int column) {
    const int key = first_key + row_of_slot(slot);
    const int query = first_query + column < last ? first_query + column : last;
    if (key < span.first[query] || key >= span.stop[query]) x = -kInfinity;
  });
}

}  // namespace usp::gpu::hopper
