#include "hopper.h"

#include <array>
#include <cstring>
#include <map>

namespace usp::gpu::host {

namespace {

constexpr uint32_t kFirstAddress = 1040;  // a multiple of 16 and of nothing more
constexpr uint64_t kMark = 0xB411E2B411E2ull;
constexpr int kWave = 32, kGroup = 128;

struct Phases {
  int arrivals, pending;
  int64_t bytes;
  uint32_t ended;
};

struct WaveProducts {
  std::vector<std::vector<WaveProduct>> groups;
  std::vector<WaveProduct> open;
  bool ready = false;
};

int capability = 80;
int64_t count_of_products = 0;
Asynchrony copies = Asynchrony::kLate, products = Asynchrony::kLate;
std::map<const void*, Phases> barriers;
std::map<int, WaveProducts> waves;

void check_block_end() {
  for (const auto& [wave, held] : waves) {
    if (!held.open.empty() || !held.groups.empty()) fail("a block ended before its products");
  }
  for (const auto& [barrier, phases] : barriers) {
    if (phases.bytes != 0) fail("a block ended while a barrier waits for bytes");
  }
  waves.clear();
  barriers.clear();
}

const bool registered = (at_block_end(check_block_end), true);

Phases& phases_of(const void* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier is used that was not set up");
  uint64_t mark;
  std::memcpy(&mark, barrier, sizeof(mark));
  if (mark != kMark) fail("something was written over a barrier");
  return found->second;
}

void end_phase_if_complete(Phases& phases) {
  if (phases.pending < 0) fail("more arrivals at a barrier than its phase waits for");
  if (phases.pending > 0 || phases.bytes != 0) return;
  ++phases.ended;
  phases.pending = phases.arrivals;
}

WaveProducts& own_products() { return waves[static_cast<int>(thread_index()) / kWave]; }

void run_all(std::vector<WaveProduct>& group) {
  for (const WaveProduct& product : group) product.run(product);
  group.clear();
}

}  // namespace

int compute_capability() { return capability; }
void set_compute_capability(int of) { capability = of; }

void set_asynchrony(Asynchrony of_copies, Asynchrony of_products) {
  copies = of_copies;
  products = of_products;
}

int64_t product_count() { return count_of_products; }

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - shared_memory();
  if (offset < 0 || offset > static_cast<int64_t>(shared_size())) {
    fail("a shared address of something that is not in shared memory");
  }
  return kFirstAddress + static_cast<uint32_t>(offset);
}

namespace {

char* shared_pointer(uint32_t address, size_t bytes) {
  if (address < kFirstAddress || address - kFirstAddress + bytes > shared_size()) {
    fail("an address beyond the block's shared memory");
  }
  return shared_memory() + (address - kFirstAddress);
}

}  // namespace

uint16_t shared_number(uint32_t address) {
  uint16_t bits;
  std::memcpy(&bits, shared_pointer(address, sizeof(bits)), sizeof(bits));
  return bits;
}

// --- Barriers ------------------------------------------------------------------------------------

void init_barrier(uint64_t* barrier, int arrivals) {
  if (shared_address(barrier) % 8 != 0) fail("a barrier is not aligned to 8");
  *barrier = kMark;
  barriers[barrier] = {arrivals, arrivals, 0, 0};
}

void arrive(uint64_t* barrier, int expected_bytes) {
  Phases& phases = phases_of(barrier);
  phases.bytes += expected_bytes;
  --phases.pending;
  end_phase_if_complete(phases);
}

void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  struct Wait {
    const void* barrier;
    uint32_t parity;
  } mine{barrier, parity};
  wait_until(
      [](void* argument) {
        const auto* wait = static_cast<const Wait*>(argument);
        return phases_of(wait->barrier).ended % 2 != wait->parity;
      },
      &mine);
}

// --- Copies --------------------------------------------------------------------------------------

namespace {

struct Map {
  const char* data;
  uint64_t dims[4], strides[3];  // numbers, bytes
  uint32_t rows;
};
static_assert(sizeof(Map) <= 128);

constexpr int kRowBytes = 128, kChunkBytes = 16;

bool is_inside(const Map& map, const std::array<int64_t, 4>& at) {
  for (int dim = 0; dim < 4; ++dim) {
    if (at[dim] < 0 || at[dim] >= static_cast<int64_t>(map.dims[dim])) return false;
  }
  return true;
}

void copy_box(uint32_t to, const Map& map, std::array<int64_t, 4> at) {
  const int64_t first_column = at[0], first_row = at[1];
  for (uint32_t row = 0; row < map.rows; ++row) {
    for (int byte = 0; byte < kRowBytes; byte += 2) {
      at[0] = first_column + byte / 2;
      at[1] = first_row + row;
      char* place = shared_pointer(descriptor::swizzled(to + row * kRowBytes + byte), 2);
      if (is_inside(map, at)) {
        std::memcpy(place,
                    map.data + at[0] * 2 + at[1] * map.strides[0] + at[2] * map.strides[1] +
                        at[3] * map.strides[2],
                    2);
      } else {
        std::memset(place, 0, 2);
      }
    }
  }
}

}  // namespace

void encode_map(uint64_t* words, const void* data, const uint64_t* dims, const uint64_t* strides,
                const uint32_t* box) {
  Map map{static_cast<const char*>(data), {}, {}, box[1]};
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) fail("a mapped tensor is not aligned to 16");
  if (box[0] * 2 != kRowBytes || box[1] > 256 || box[2] != 1 || box[3] != 1) fail("a box's sizes");
  for (int i = 0; i < 4; ++i) {
    map.dims[i] = dims[i];
    if (dims[i] == 0 || dims[i] > uint64_t{1} << 32) fail("a mapped tensor's sizes");
  }
  for (int i = 0; i < 3; ++i) {
    map.strides[i] = strides[i];
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) fail("a mapped tensor's strides");
  }
  std::memcpy(words, &map, sizeof(map));
}

void load_box(void* to, const uint64_t* words, void* barrier, const int* first) {
  Map map;
  std::memcpy(&map, words, sizeof(map));
  const uint32_t address = shared_address(to);
  if (address % 1024 != 0) fail("a swizzled box is not aligned to 1024");
  phases_of(barrier);
  const std::array<int64_t, 4> at{first[0], first[1], first[2], first[3]};
  const auto copy = [=] {
    copy_box(address, map, at);
    Phases& phases = phases_of(barrier);
    phases.bytes -= map.rows * kRowBytes;
    end_phase_if_complete(phases);
  };
  if (copies == Asynchrony::kAtOnce) {
    copy();
  } else {
    when_all_wait(copy);
  }
}

// --- Products ------------------------------------------------------------------------------------

void begin_products() {
  meet_wave([](void* const*, int) { own_products().ready = true; }, nullptr);
}

void start_products(void (*run)(const WaveProduct&), void* const* lanes, int count) {
  ++count_of_products;
  const int first_wave = static_cast<int>(thread_index()) / kGroup * (kGroup / kWave);
  const auto lane = [&](int index) { return *static_cast<const ProductLane*>(lanes[index]); };
  for (int first = 0; first < count; first += kWave) {
    WaveProduct product{run, first / kWave, {}};
    for (int i = first; i < first + kWave; ++i) {
      const ProductLane mine = lane(i), other = lane(0);
      if (mine.a_tile != other.a_tile || mine.b_tile != other.b_tile || mine.adds != other.adds) {
        fail("lanes of a warpgroup describe different tiles");
      }
      product.lanes.push_back(mine);
    }
    WaveProducts& wave = waves[first_wave + first / kWave];
    if (!wave.ready) fail("a product without wgmma.fence after registers were used");
    if (products == Asynchrony::kAtOnce) run(product);
    wave.open.push_back(std::move(product));
  }
}

void end_products() {
  meet_wave(
      [](void* const*, int) {
        WaveProducts& own = own_products();
        own.groups.push_back(std::move(own.open));
        own.open.clear();
      },
      nullptr);
}

void products_done(int running) {
  meet_wave(
      [](void* const* lanes, int) {
        WaveProducts& own = own_products();
        const size_t most = *static_cast<const int*>(lanes[0]);
        while (own.groups.size() > most) {
          if (products == Asynchrony::kLate) run_all(own.groups.front());
          own.groups.erase(own.groups.begin());
        }
        own.ready = false;
      },
      &running);
}

}  // namespace usp::gpu::host
