#include "combine.hpp"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <stdexcept>

#include "element.hpp"
#include "guard.hpp"
#include "threads.hpp"

namespace olmfast {

namespace {

constexpr uint64_t kPiece = 64 * kStrip;  // a thread's turn

// An operand with what is needed to read it.
struct Reader {
  const Operand* operand;
  std::shared_ptr<const Mapping> mapping;
  const char* from;
  size_t from_width;
  ConvertRow row, round, widen;
};

bool is_computed(Kind kind) { return kind == Kind::bf16 || kind == Kind::f16 || kind == Kind::f32; }

Reader make_reader(const Operand& operand, uint64_t n) {
  if (!is_computed(operand.kind) || !is_computed(operand.rounded)) {
    throw std::invalid_argument("combine: only F32, F16 and BF16 are combined");
  }
  Reader reader{&operand, nullptr, nullptr, width(operand.kind), converter(operand.kind, Kind::f32).row,
                converter(Kind::f32, operand.rounded).row, converter(operand.rounded, Kind::f32).row};
  if (operand.shard) {
    if (n > operand.shard->size()) throw std::out_of_range("combine: more values than the file has bytes");
    operand.shard->check_range(operand.place, n * reader.from_width);
    reader.mapping = operand.shard->mapping();
    reader.from = reader.mapping->data() + operand.place;
  } else {
    if (operand.place == 0 && n) throw std::invalid_argument("combine: an operand is a null pointer");
    reader.from = reinterpret_cast<const char*>(operand.place);
  }
  return reader;
}

struct Step {
  ConvertRow row;
  const char* from;
  char* to;
  size_t n;
};

void take_step(void* context) {
  const auto& step = *static_cast<const Step*>(context);
  step.row(step.from, step.to, step.n);
}

// Values [begin, begin + n), at most a strip of them, as float32. False if the file could not be read.
bool read(const Reader& reader, uint64_t begin, size_t n, float* out) {
  Step step{reader.row, reader.from + begin * reader.from_width, reinterpret_cast<char*>(out), n};
  if (!reader.mapping) {
    take_step(&step);
  } else if (!guarded(reader.mapping->data(), reader.mapping->size(), take_step, &step)) {
    return false;
  }
  if (reader.operand->rounded != Kind::f32) {
    char narrow[kStrip * 2];
    reader.round(reinterpret_cast<const char*>(out), narrow, n);
    reader.widen(narrow, reinterpret_cast<char*>(out), n);
  }
  return true;
}

// Strips of `readers`, put together by `strip(context, begin, n)`, which returns the reader that failed or null.
struct Work {
  uint64_t n;
  const Reader* (*strip)(void* context, float* memory, uint64_t begin, size_t n);
  void* context;
  size_t n_strips;  // of memory
  std::atomic<const Reader*> faulted{nullptr};
};

void do_piece(void* context, size_t i) {
  auto& work = *static_cast<Work*>(context);
  // Subnormal numbers count on every thread, whatever the caller has set for its own arithmetic.
  fenv_t environment;
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  static thread_local std::vector<float> memory;
  if (memory.size() < work.n_strips * kStrip) memory.resize(work.n_strips * kStrip);
  const uint64_t end = std::min(work.n, (i + 1) * kPiece);
  for (uint64_t begin = i * kPiece; begin < end && !work.faulted; begin += kStrip) {
    const Reader* failed = work.strip(work.context, memory.data(), begin, std::min<uint64_t>(kStrip, end - begin));
    if (failed) work.faulted = failed;
  }
  fesetenv(&environment);
}

// Take what n values of each were read from out of this process, if that is asked for.
void release(const std::vector<Reader>& readers, uint64_t n) {
  for (const Reader& reader : readers) {
    if (reader.mapping && releases_copied()) release_pages(*reader.mapping, reader.operand->place, n * reader.from_width);
  }
}

void run(Work& work, const std::vector<Reader>& readers) {
  install_guard();
  parallel((work.n + kPiece - 1) / kPiece, do_piece, &work);
  if (const Reader* reader = work.faulted) reader->operand->shard->explain_fault(reader->operand->place);
  release(readers, work.n);
  const Shard* checked = nullptr;
  for (const Reader& reader : readers) {
    const Shard* shard = reader.operand->shard.get();
    if (shard && shard != checked) shard->check_unchanged();
    checked = shard ? shard : checked;
  }
}

// The target, and how a strip of results gets there.
struct Writer {
  explicit Writer(const Target& target)
      : to(reinterpret_cast<char*>(target.address)), to_width(width(target.kind)),
        rounded(target.rounded == target.kind ? Kind::f32 : target.rounded),
        round(converter(Kind::f32, rounded).row), widen(converter(rounded, Kind::f32).row),
        row(converter(Kind::f32, target.kind).row) {
    if (!is_computed(target.kind) || !is_computed(target.rounded)) {
      throw std::invalid_argument("combine: only F32, F16 and BF16 are combined");
    }
    if (target.n > target.capacity / to_width) {
      throw std::out_of_range("combine: needs " + std::to_string(target.n) + " values of " + std::to_string(to_width) +
                              " bytes, the destination has " + std::to_string(target.capacity) + " bytes");
    }
    if (target.n && !to) throw std::invalid_argument("combine: the destination is a null pointer");
  }

  void write(float* values, uint64_t begin, size_t n) const {
    if (rounded != Kind::f32) {
      char narrow[kStrip * 2];
      round(reinterpret_cast<const char*>(values), narrow, n);
      widen(narrow, reinterpret_cast<char*>(values), n);
    }
    row(reinterpret_cast<const char*>(values), to + begin * to_width, n);
  }

  char* to;
  size_t to_width;
  Kind rounded;
  ConvertRow round, widen, row;
};

std::vector<Reader> make_readers(const std::vector<Operand>& operands, uint64_t n) {
  if (operands.empty()) throw std::invalid_argument("combine: there are no operands");
  std::vector<Reader> readers;
  for (const Operand& operand : operands) readers.push_back(make_reader(operand, n));
  return readers;
}

struct Summing {
  const std::vector<Reader>& readers;
  const Writer& writer;
  const Loops& loops;
  float divisor;
};

const Reader* sum_strip(void* context, float* memory, uint64_t begin, size_t n) {
  const auto& summing = *static_cast<const Summing*>(context);
  float *sum = memory, *values = memory + kStrip;
  for (const Reader& reader : summing.readers) {
    const bool first = &reader == &summing.readers.front();
    if (!read(reader, begin, n, first ? sum : values)) return &reader;
    if (first) {
      summing.loops.multiply(sum, reader.operand->weight, n);
    } else {
      summing.loops.add_multiple(sum, values, reader.operand->weight, n);
    }
  }
  if (summing.divisor != 1.0f) summing.loops.divide(sum, summing.divisor, n);
  summing.writer.write(sum, begin, n);
  return nullptr;
}

struct AddingUp {
  const std::vector<Reader>& readers;  // the base, then the operands
  const Writer& writer;
  const Loops& loops;
  const Adding& adding;
};

// A task vector: what is left of it, times its weight.
const Reader* read_part(const AddingUp& up, const Reader& reader, const float* base, float* part, uint64_t begin,
                        size_t n) {
  const Operand& operand = *reader.operand;
  if (!read(reader, begin, n, part)) return &reader;
  if (operand.from_base) up.loops.subtract(part, base, n);
  const size_t n_first = std::min<uint64_t>(n, operand.n_first - std::min(operand.n_first, begin));
  if (operand.largest_first >= 0) up.loops.thin(part, operand.largest_first, n_first);
  if (operand.largest >= 0) up.loops.thin(part + n_first, operand.largest, n - n_first);
  if (operand.scale != 1.0f) up.loops.multiply(part, operand.scale, n);
  up.loops.multiply(part, operand.weight, n);
  return nullptr;
}

const Reader* add_strip(void* context, float* memory, uint64_t begin, size_t n) {
  const auto& up = *static_cast<const AddingUp*>(context);
  const size_t n_parts = up.readers.size() - 1;
  float *base = memory, *sum = base + kStrip, *total = sum + kStrip, *weights = total + kStrip;
  float* parts = weights + kStrip;
  if (!read(up.readers[0], begin, n, base)) return &up.readers[0];
  for (size_t i = 0; i < n_parts; ++i) {
    float* part = parts + i * kStrip;
    if (const Reader* failed = read_part(up, up.readers[i + 1], base, part, begin, n)) return failed;
    if (i == 0) {
      std::copy_n(part, n, sum);
    } else {
      up.loops.add(sum, part, n);
    }
  }
  float* merged = sum;
  if (up.adding.signs) {
    // -0: what is added to it stays what it is.
    std::fill_n(total, n, -0.0f);
    std::fill_n(weights, n, 0.0f);
    for (size_t i = 0; i < n_parts; ++i) {
      up.loops.agree(parts + i * kStrip, sum, up.readers[i + 1].operand->weight, total, weights, n);
    }
    up.loops.sign(total, sum, n);
    merged = total;
  } else if (up.adding.normalize) {
    std::fill_n(weights, n, up.adding.divisor);
  }
  if (up.adding.normalize) up.loops.divide_by(merged, weights, up.adding.least, n);
  if (up.adding.scale != 1.0f) up.loops.multiply(merged, up.adding.scale, n);
  up.loops.add(base, merged, n);
  up.writer.write(base, begin, n);
  return nullptr;
}

struct Moving {
  const std::vector<Reader>& readers;  // what moves, the operands and, if there is one, the base
  size_t n_operands;
  const Writer& writer;
  const Loops& loops;
  const RowWeights& weights;
};

const Reader* move_strip(void* context, float* memory, uint64_t begin, size_t n) {
  const auto& moving = *static_cast<const Moving*>(context);
  const RowWeights& weights = moving.weights;
  float *total = memory, *part = total + kStrip, *base = part + kStrip;
  const bool has_base = moving.readers.size() > moving.n_operands + 1;
  if (!read(moving.readers[0], begin, n, total)) return &moving.readers[0];
  if (has_base && !read(moving.readers.back(), begin, n, base)) return &moving.readers.back();
  for (size_t i = 0; i < moving.n_operands; ++i) {
    if (!read(moving.readers[i + 1], begin, n, part)) return &moving.readers[i + 1];
    if (has_base) moving.loops.subtract(part, base, n);
    const float* own = reinterpret_cast<const float*>(weights.address) + i * weights.n_rows;
    for (uint64_t at = weights.first + begin, end = at + n; at < end;) {
      const uint64_t row = at / weights.row, until = std::min(end, (row + 1) * weights.row);
      moving.loops.multiply(part + (at - weights.first - begin), own[row], until - at);
      at = until;
    }
    moving.loops.add(total, part, n);
  }
  moving.writer.write(total, begin, n);
  return nullptr;
}

}  // namespace

void combine(const std::vector<Operand>& operands, float divisor, const Target& target) {
  const Writer writer(target);
  const std::vector<Reader> readers = make_readers(operands, target.n);
  Summing summing{readers, writer, loops(), divisor};
  Work work{target.n, sum_strip, &summing, 2};
  run(work, readers);
}

void combine_task_vectors(const Operand& base, const std::vector<Operand>& operands, const Adding& adding,
                          const Target& target) {
  const Writer writer(target);
  std::vector<Reader> readers = make_readers(operands, target.n);
  readers.insert(readers.begin(), make_reader(base, target.n));
  AddingUp up{readers, writer, loops(), adding};
  Work work{target.n, add_strip, &up, 4 + operands.size()};
  run(work, readers);
}

void combine_by_row(const Operand& moving, const Operand* base, const std::vector<Operand>& operands,
                    const RowWeights& weights, const Target& target) {
  uint64_t end = 0;
  if (weights.row == 0 || __builtin_add_overflow(weights.first, target.n, &end)) {
    throw std::out_of_range("combine: rows of " + std::to_string(weights.row) + " values");
  }
  const uint64_t n_rows = end / weights.row + (end % weights.row != 0);
  if (n_rows > weights.n_rows) {
    throw std::out_of_range("combine: weights of " + std::to_string(weights.n_rows) + " rows for " +
                            std::to_string(n_rows));
  }
  if (weights.address == 0 && !operands.empty()) throw std::invalid_argument("combine: the weights are a null pointer");
  const Writer writer(target);
  std::vector<Reader> readers{make_reader(moving, target.n)};
  for (const Operand& operand : operands) readers.push_back(make_reader(operand, target.n));
  if (base) readers.push_back(make_reader(*base, target.n));
  Moving all{readers, operands.size(), writer, loops(), weights};
  Work work{target.n, move_strip, &all, 3};
  run(work, readers);
}

Counted count_magnitudes(const Operand& operand, const Operand* base, uint64_t n, int32_t low, int32_t high) {
  std::vector<Reader> readers{make_reader(operand, n)};
  if (base) readers.push_back(make_reader(*base, n));
  Counted counted;
  float values[kStrip], others[kStrip];
  int32_t between[kStrip];
  const Loops& all = loops();
  install_guard();
  for (uint64_t begin = 0; begin < n; begin += kStrip) {
    const size_t m = std::min<uint64_t>(kStrip, n - begin);
    const Reader* failed = nullptr;
    if (!read(readers[0], begin, m, values)) failed = &readers[0];
    if (base && !read(readers[1], begin, m, others)) failed = &readers[1];
    if (failed) failed->operand->shard->explain_fault(failed->operand->place);
    if (base) all.subtract(values, others, m);
    const size_t found = all.tally(values, low, high, m, counted.tally, between);
    counted.between.insert(counted.between.end(), between, between + found);
  }
  release(readers, n);
  for (const Reader& reader : readers) {
    if (reader.operand->shard) reader.operand->shard->check_unchanged();
  }
  return counted;
}

bool all_finite(uintptr_t address, uint64_t n, Kind kind) {
  const auto* from = reinterpret_cast<const char*>(address);
  if (kind == Kind::f64) {
    uint64_t largest = 0;
    for (uint64_t i = 0; i < n; ++i) largest = std::max(largest, load<uint64_t>(from + i * 8) & ~(uint64_t{1} << 63));
    return largest < 0x7FF0000000000000u;
  }
  if (!is_computed(kind)) throw std::invalid_argument("all_finite: only floats can be infinite");
  const ConvertRow row = converter(kind, Kind::f32).row;
  const Loops& all = loops();
  float values[kStrip];
  for (uint64_t begin = 0; begin < n; begin += kStrip) {
    const size_t m = std::min<uint64_t>(kStrip, n - begin);
    row(from + begin * width(kind), reinterpret_cast<char*>(values), m);
    if (!all.finite(values, m)) return false;
  }
  return true;
}

}  // namespace olmfast
