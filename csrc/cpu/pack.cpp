#include "cpu/pack.h"

#include <cstring>

namespace usp::cpu {
namespace {

constexpr int64_t kBytesPerTask = 1 << 18;

// Some bytes of one piece, counted as they lie in the message.
struct Task {
  const Piece* piece;
  int64_t begin;
  int64_t end;
};

std::vector<Task> tasks_of(const std::vector<Piece>& pieces) {
  std::vector<Task> tasks;
  for (const Piece& piece : pieces) {
    for (int64_t begin = 0; begin < piece.bytes(); begin += kBytesPerTask) {
      tasks.push_back({&piece, begin, std::min(begin + kBytesPerTask, piece.bytes())});
    }
  }
  return tasks;
}

char* run_in_tensor(const Piece& piece, int64_t index) {
  char* address = piece.data;
  for (int d = Piece::kDims - 1; d >= 0; --d) {
    address += index % piece.sizes[d] * piece.strides[d];
    index /= piece.sizes[d];
  }
  return address;
}

void copy(Direction direction, const Task& task, char* message) {
  const Piece& piece = *task.piece;
  for (int64_t begin = task.begin; begin < task.end;) {
    const int64_t skip = begin % piece.run;
    const int64_t bytes = std::min(piece.run - skip, task.end - begin);
    char* in_tensor = run_in_tensor(piece, begin / piece.run) + skip;
    char* in_message = message + piece.offset + begin;
    if (direction == Direction::kPack) {
      std::memcpy(in_message, in_tensor, bytes);
    } else {
      std::memcpy(in_tensor, in_message, bytes);
    }
    begin += bytes;
  }
}

}  // namespace

void copy_pieces(Direction direction, const std::vector<Piece>& pieces, char* message,
                 const ParallelFor& parallel) {
  const std::vector<Task> tasks = tasks_of(pieces);
  parallel.for_each_task(static_cast<int64_t>(tasks.size()),
                         [&](int64_t, int64_t task) { copy(direction, tasks[task], message); });
}

}  // namespace usp::cpu
