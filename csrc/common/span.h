#pragma once

// Which keys a query sees, and which queries see a key.
//
// A span gives each query row i the half-open interval [first[i], stop[i]) of visible keys. Both
// ends are non-decreasing in i. So for a block of rows the keys seen by any row, and those seen by
// every row, follow from the four ends at its first and last row; and for a block of keys the rows
// are intervals too, found by binary search. Only tiles at an edge need a mask.

#include <cstdint>

#include "common/macros.h"

namespace usp {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;

  USP_HOST_DEVICE int64_t size() const { return end > begin ? end - begin : 0; }
  USP_HOST_DEVICE bool empty() const { return end <= begin; }
  USP_HOST_DEVICE bool contains(Range inner) const {
    return begin <= inner.begin && inner.end <= end;
  }
};

USP_HOST_DEVICE Range intersect(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

struct Span {
  const int32_t* first = nullptr;  // (num_queries,), null when every query sees every key
  const int32_t* stop = nullptr;   // (num_queries,)
  int64_t num_queries = 0;
  int64_t num_keys = 0;

  USP_HOST_DEVICE bool sees_all() const { return first == nullptr; }
};

// What both span, with what lies between.
USP_HOST_DEVICE Range hull(Range a, Range b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {a.begin < b.begin ? a.begin : b.begin, a.end > b.end ? a.end : b.end};
}

// Keys seen by at least one of `rows`, with what lies between.
USP_HOST_DEVICE Range visible_keys(const Span& span, Range rows) {
  if (rows.empty()) return {0, 0};
  if (span.sees_all()) return {0, span.num_keys};
  return {span.first[rows.begin], span.stop[rows.end - 1]};
}

// Keys seen by every one of `rows`: no mask is needed there.
USP_HOST_DEVICE Range unmasked_keys(const Span& span, Range rows) {
  if (rows.empty()) return {0, 0};
  if (span.sees_all()) return {0, span.num_keys};
  return {span.first[rows.end - 1], span.stop[rows.begin]};
}

// Index of the first of the non-decreasing ends[0..count) that is greater than `bound`.
USP_HOST_DEVICE int64_t first_above(const int32_t* ends, int64_t count, int64_t bound) {
  int64_t begin = 0;
  while (begin < count) {
    const int64_t middle = begin + (count - begin) / 2;
    if (ends[middle] > bound) {
      count = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Those of `rows` that may see one of `keys`: every other row sees none of them.
USP_HOST_DEVICE Range visible_queries(const Span& span, Range rows, Range keys) {
  if (keys.empty()) return {0, 0};
  if (span.sees_all()) return rows;
  return {rows.begin + first_above(span.stop + rows.begin, rows.size(), keys.begin),
          rows.begin + first_above(span.first + rows.begin, rows.size(), keys.end - 1)};
}

USP_HOST_DEVICE Range visible_queries(const Span& span, Range keys) {
  return visible_queries(span, {0, span.num_queries}, keys);
}

// Rows that see every one of `keys`.
USP_HOST_DEVICE Range unmasked_queries(const Span& span, Range keys) {
  if (keys.empty()) return {0, 0};
  if (span.sees_all()) return {0, span.num_queries};
  return {first_above(span.stop, span.num_queries, keys.end - 1),
          first_above(span.first, span.num_queries, keys.begin)};
}

// Whether some row sees some key of the tile. Gaps between neighbouring rows' intervals make
// tiles that lie inside the visible range and are still masked entirely.
USP_HOST_DEVICE bool sees_any(const Span& span, Range rows, Range keys) {
  if (rows.empty() || keys.empty()) return false;
  if (span.sees_all()) return true;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    if (!intersect({span.first[i], span.stop[i]}, keys).empty()) return true;
  }
  return false;
}

// The same by two binary searches: may say yes for rows that see nothing at all.
USP_HOST_DEVICE bool may_see_any(const Span& span, Range rows, Range keys) {
  if (rows.empty() || keys.empty()) return false;
  if (span.sees_all()) return true;
  return !visible_queries(span, rows, keys).empty();
}

}  // namespace usp
