// One kernel for all pieces of a message: blocks are dealt out to the pieces by their size.
//
// A thread copies the largest power of two up to 16 bytes that the piece's address, strides, runs
// and place in the message allow. Neighbours in the message are copied by neighbouring threads.

#include "gpu/gpu.h"
#include "gpu/pack.h"

namespace usp::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;
constexpr uint32_t kUnitsPerBlock = kThreads * kUnitsPerThread;
constexpr int kMaxPieces = 32;
constexpr uint32_t kMaxUnit = 16;                // bytes
constexpr int64_t kMaxUnits = int64_t{1} << 30;  // of one job: 32-bit arithmetic does

// Division by a number known before the launch: n / d = (mulhi(n, m) + n) >> s for n < 2^31.
// Source: Granlund & Montgomery 1994, "Division by invariant integers using multiplication".
struct Divider {
  uint32_t divisor, multiplier, shift;

  static Divider by(int64_t d) {
    uint32_t shift = 0;
    while ((int64_t{1} << shift) < d) ++shift;
    const uint64_t power = uint64_t{1} << shift, divisor = static_cast<uint64_t>(d);
    const uint64_t multiplier = ((power - divisor) << 32) / divisor + 1;
    return {static_cast<uint32_t>(d), static_cast<uint32_t>(multiplier), shift};
  }

  USP_DEVICE uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * multiplier >> 32) + n) >> shift;
  }
};

using Unit16 = unsigned __int128;  // a struct would go through stack memory on AMD

struct Job {
  char* data;
  char* message;
  int64_t strides[Piece::kDims];    // bytes
  Divider run;                      // units
  Divider sizes[Piece::kDims - 1];  // of the three inner dims
  uint32_t units;
  uint32_t unit;  // bytes
};

struct Jobs {
  Job job[kMaxPieces];
  uint32_t first_block[kMaxPieces];  // in increasing order
  int count;
};
static_assert(sizeof(Jobs) <= 4096, "kernel arguments take 4 KiB");

// Where unit `n` of a job lies in its tensor, in bytes.
USP_DEVICE int64_t tensor_offset(const Job& job, uint32_t n) {
  uint32_t index = job.run.divide(n);
  int64_t offset = int64_t{n - index * job.run.divisor} * job.unit;
  USP_UNROLL
  for (int d = Piece::kDims - 1; d > 0; --d) {
    const Divider& size = job.sizes[d - 1];
    const uint32_t outer = size.divide(index);
    offset += (index - outer * size.divisor) * job.strides[d];
    index = outer;
  }
  return offset + index * job.strides[0];
}

USP_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <Direction kDirection, typename Unit>
USP_DEVICE void copy_units(const Job& job, uint32_t first) {
  Unit* in_tensor[kUnitsPerThread];
  Unit* in_message[kUnitsPerThread];
  Unit held[kUnitsPerThread];
  USP_UNROLL
  for (int i = 0; i < kUnitsPerThread; ++i) {
    // Past the end the last unit is copied again: no branch between the loads.
    const uint32_t n = smaller(first + i * kThreads, job.units - 1);
    in_tensor[i] = reinterpret_cast<Unit*>(job.data + tensor_offset(job, n));
    in_message[i] = reinterpret_cast<Unit*>(job.message) + n;
    held[i] = kDirection == Direction::kPack ? *in_tensor[i] : *in_message[i];
  }
  USP_UNROLL
  for (int i = 0; i < kUnitsPerThread; ++i) {
    *(kDirection == Direction::kPack ? in_message[i] : in_tensor[i]) = held[i];
  }
}

template <Direction kDirection>
USP_KERNEL USP_LAUNCH_BOUNDS(kThreads, 4) void copy_kernel(Jobs jobs) {
  const uint32_t block = block_index();
  int j = 0;
  while (j + 1 < jobs.count && jobs.first_block[j + 1] <= block) ++j;
  const Job& job = jobs.job[j];
  const uint32_t first = (block - jobs.first_block[j]) * kUnitsPerBlock + thread_index();
  switch (job.unit) {
    case 16:
      return copy_units<kDirection, Unit16>(job, first);
    case 8:
      return copy_units<kDirection, uint64_t>(job, first);
    case 4:
      return copy_units<kDirection, uint32_t>(job, first);
    case 2:
      return copy_units<kDirection, uint16_t>(job, first);
    default:
      return copy_units<kDirection, uint8_t>(job, first);
  }
}

uint32_t unit_of(const Piece& piece, const char* message) {
  uint64_t bits = reinterpret_cast<uintptr_t>(piece.data) |
                  reinterpret_cast<uintptr_t>(message + piece.offset) |
                  static_cast<uint64_t>(piece.run);
  for (int d = 0; d < Piece::kDims; ++d) {
    if (piece.sizes[d] > 1) bits |= static_cast<uint64_t>(piece.strides[d]);
  }
  uint32_t unit = kMaxUnit;
  while (bits % unit != 0) unit /= 2;
  return unit;
}

Job job_of(const Piece& piece, char* message) {
  const uint32_t unit = unit_of(piece, message);
  Job job{};
  job.data = piece.data;
  job.message = message + piece.offset;
  for (int d = 0; d < Piece::kDims; ++d) job.strides[d] = piece.strides[d];
  job.run = Divider::by(piece.run / unit);
  for (int d = 1; d < Piece::kDims; ++d) job.sizes[d - 1] = Divider::by(piece.sizes[d]);
  job.units = static_cast<uint32_t>(piece.bytes() / unit);
  job.unit = unit;
  return job;
}

}  // namespace

const char* copy_pieces(Direction direction, const std::vector<Piece>& pieces, char* message,
                        Stream stream) {
  std::vector<Piece> parts;
  for (const Piece& piece : pieces) {
    cut(piece, kMaxUnits * unit_of(piece, message), kMaxUnit, parts);
  }
  const auto kernel = direction == Direction::kPack ? copy_kernel<Direction::kPack>
                                                    : copy_kernel<Direction::kUnpack>;
  for (size_t begin = 0; begin < parts.size(); begin += kMaxPieces) {
    Jobs jobs{};
    uint32_t blocks = 0;
    for (size_t p = begin; p < parts.size() && jobs.count < kMaxPieces; ++p) {
      jobs.job[jobs.count] = job_of(parts[p], message);
      jobs.first_block[jobs.count] = blocks;
      blocks += (jobs.job[jobs.count].units + kUnitsPerBlock - 1) / kUnitsPerBlock;
      ++jobs.count;
    }
    launch(kernel, {blocks}, kThreads, 0, stream, jobs);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

}  // namespace usp::gpu
