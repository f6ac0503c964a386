#include "transfer.hpp"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <system_error>

#include "guard.hpp"
#include "threads.hpp"

namespace olmfast {

namespace {

constexpr uint64_t kPieceBytes = 1 << 20;    // of the source; large enough to make a thread's turn cheap
constexpr uint64_t kInlineBytes = 256 << 10;  // less than this is not worth waking anybody

constexpr std::chrono::microseconds kPatience{500};  // with a list of groups; a buffer travels in about as much
constexpr uint64_t kStreamBytes = 8 << 20;    // written at once: more than a core's own caches keep

// A transfer with as few dimensions as its strides allow: `n_matrices` matrices of rows x columns.
struct Plan {
  const char* source;
  char* target;
  const Shard* shard;
  const Mapping* mapping;
  ConvertRow row;
  ConvertMatrix tiles;
  size_t from_width, to_width;
  bool is_contiguous;
  uint64_t n_rows, n_columns, row_stride, column_stride;  // strides in bytes
  std::vector<uint64_t> outer_shape, outer_strides;       // strides in bytes
};

// Rows (or, in a contiguous transfer, elements) `begin` to `end` of a plan.
struct Piece {
  const Plan* plan;
  uint64_t begin, end;
};

Plan make_plan(const Transfer& transfer, const Mapping& mapping, bool streams) {
  std::vector<uint64_t> shape, strides;
  for (size_t i = 0; i < transfer.shape.size(); ++i) {
    if (transfer.shape[i] == 1) continue;
    if (!shape.empty() && strides.back() == transfer.strides[i] * transfer.shape[i]) {
      shape.back() *= transfer.shape[i];
      strides.back() = transfer.strides[i];
    } else {
      shape.push_back(transfer.shape[i]);
      strides.push_back(transfer.strides[i]);
    }
  }
  Plan plan{};
  plan.source = mapping.data() + transfer.offset;
  plan.target = reinterpret_cast<char*>(transfer.address);
  plan.shard = transfer.shard.get();
  plan.mapping = &mapping;
  const Converter convert = converter(transfer.from, transfer.to);
  plan.row = streams ? convert.stream : convert.row;
  plan.tiles = convert.tiles;
  plan.from_width = width(transfer.from);
  plan.to_width = width(transfer.to);
  auto take = [&](uint64_t& size, uint64_t& stride, uint64_t without) {
    size = shape.empty() ? 1 : shape.back();
    stride = (strides.empty() ? without : strides.back()) * plan.to_width;
    if (!shape.empty()) shape.pop_back(), strides.pop_back();
  };
  take(plan.n_columns, plan.column_stride, 1);
  take(plan.n_rows, plan.row_stride, 0);
  plan.is_contiguous = plan.n_rows == 1 && plan.column_stride == plan.to_width;
  plan.outer_shape = shape;
  for (uint64_t stride : strides) plan.outer_strides.push_back(stride * plan.to_width);
  return plan;
}

uint64_t total_rows(const Plan& plan) {
  return std::accumulate(plan.outer_shape.begin(), plan.outer_shape.end(), plan.n_rows, std::multiplies<>());
}

void cut(const Plan& plan, std::vector<Piece>& pieces) {
  uint64_t n = plan.is_contiguous ? plan.n_columns : total_rows(plan);
  uint64_t item_bytes = plan.is_contiguous ? plan.from_width : plan.n_columns * plan.from_width;
  uint64_t step = std::max<uint64_t>(1, kPieceBytes / item_bytes);
  if (!plan.is_contiguous && plan.column_stride != plan.to_width) step = std::max<uint64_t>(step, 64);  // whole tiles
  for (uint64_t begin = 0; begin < n; begin += step) pieces.push_back({&plan, begin, std::min(n, begin + step)});
}

void move_rows(const Piece& piece) {
  const Plan& plan = *piece.plan;
  for (uint64_t row = piece.begin; row < piece.end;) {
    uint64_t matrix = row / plan.n_rows, first = row % plan.n_rows;
    uint64_t n = std::min(plan.n_rows - first, piece.end - row);
    char* target = plan.target + first * plan.row_stride;
    for (size_t i = plan.outer_shape.size(); i-- > 0; matrix /= plan.outer_shape[i]) {
      target += matrix % plan.outer_shape[i] * plan.outer_strides[i];
    }
    const char* source = plan.source + row * plan.n_columns * plan.from_width;
    if (plan.column_stride != plan.to_width) {
      plan.tiles(source, target, n, plan.n_columns, plan.row_stride, plan.column_stride);
    } else {
      for (uint64_t r = 0; r < n; ++r) {
        plan.row(source + r * plan.n_columns * plan.from_width, target + r * plan.row_stride, plan.n_columns);
      }
    }
    row += n;
  }
}

void move_piece(void* context) {
  const auto& piece = *static_cast<const Piece*>(context);
  const Plan& plan = *piece.plan;
  if (!plan.is_contiguous) return move_rows(piece);
  plan.row(plan.source + piece.begin * plan.from_width, plan.target + piece.begin * plan.to_width,
                   piece.end - piece.begin);
}

void release(const Piece& piece) {
  const Plan& plan = *piece.plan;
  uint64_t item_bytes = plan.is_contiguous ? plan.from_width : plan.n_columns * plan.from_width;
  auto source = static_cast<uint64_t>(plan.source - plan.mapping->data());
  release_pages(*plan.mapping, source + piece.begin * item_bytes, (piece.end - piece.begin) * item_bytes);
}

}  // namespace

// Transfers cut into pieces, and what they need to stay alive until all is copied.
struct Work {
  std::vector<std::unique_ptr<Plan>> plans;
  std::vector<std::shared_ptr<const Mapping>> mappings;
  std::vector<Piece> pieces;
  std::atomic<const Plan*> faulted{nullptr};

  // Returns the shards that are read.
  std::set<const Shard*> add(const std::vector<Transfer>& transfers, bool streams) {
    std::set<const Shard*> shards;
    for (const Transfer& transfer : transfers) {
      if (transfer.n_bytes() == 0) continue;
      mappings.push_back(transfer.shard->mapping());
      plans.push_back(std::make_unique<Plan>(make_plan(transfer, *mappings.back(), streams)));
      cut(*plans.back(), pieces);
      shards.insert(transfer.shard.get());
    }
    return shards;
  }

  void do_piece(size_t i) {
    if (faulted) return;
    const Piece& piece = pieces[i];
    const Mapping& map = *piece.plan->mapping;
    // Subnormal numbers count on every thread, whatever the caller has set for its own arithmetic.
    fenv_t environment;
    fegetenv(&environment);
    fesetenv(FE_DFL_ENV);
    if (!guarded(map.data(), map.size(), move_piece, const_cast<Piece*>(&piece))) faulted = piece.plan;
    fesetenv(&environment);
    if (releases_copied()) release(piece);
  }

  // Throws FileError where a file could not be read, or is not the one that was opened any more.
  void check(const std::set<const Shard*>& shards) const {
    if (const Plan* plan = faulted) {
      plan->shard->explain_fault(static_cast<uint64_t>(plan->source - plan->mapping->data()));
    }
    for (const Shard* shard : shards) shard->check_unchanged();
  }
};

namespace {

uint64_t written(const std::vector<Transfer>& transfers) {
  uint64_t n_bytes = 0;
  for (const Transfer& transfer : transfers) n_bytes += transfer.n_elements() * width(transfer.to);
  return n_bytes;
}

}  // namespace

uint64_t Transfer::n_elements() const {
  return std::accumulate(shape.begin(), shape.end(), uint64_t{1}, std::multiplies<>());
}

void Transfer::check() const {
  const std::string where = shard->path() + ": " + shard->label(offset);
  if (shape.size() != strides.size()) throw std::invalid_argument(where + "as many strides as dimensions are needed");
  if (from != to && !(is_float(from) && is_float(to))) {
    throw std::invalid_argument(where + "only floating-point values can be converted");
  }
  uint64_t n = 1, last = 0;  // `last`: the destination's last element
  bool fits = true, empty = false;
  std::vector<std::pair<uint64_t, uint64_t>> order;
  for (size_t i = 0; i < shape.size(); ++i) {
    empty = empty || shape[i] == 0;
    fits = fits && !__builtin_mul_overflow(n, shape[i], &n);
    if (shape[i] > 1) order.emplace_back(strides[i], shape[i]);
  }
  if (empty) return shard->check_range(offset, 0);
  std::sort(order.begin(), order.end());
  for (auto [stride, size] : order) {
    if (fits && stride <= last) throw std::invalid_argument(where + "two elements would go to the same place");
    uint64_t span = 0;
    fits = fits && !__builtin_mul_overflow(stride, size - 1, &span) && !__builtin_add_overflow(last, span, &last);
  }
  uint64_t source_bytes = 0, target_bytes = 0, n_target = 0;
  fits = fits && !__builtin_mul_overflow(n, uint64_t{width(from)}, &source_bytes) &&
         !__builtin_add_overflow(last, uint64_t{1}, &n_target) &&
         !__builtin_mul_overflow(n_target, uint64_t{width(to)}, &target_bytes);
  if (!fits) throw std::out_of_range(where + "the shape is larger than any memory");
  shard->check_range(offset, source_bytes);
  if (target_bytes > capacity) {
    throw std::out_of_range(where + "needs " + std::to_string(target_bytes) + " bytes, the destination has " +
                            std::to_string(capacity));
  }
  if (address == 0) throw std::invalid_argument(where + "the destination is a null pointer");
}

void run_transfers(const std::vector<Transfer>& transfers) {
  Work work;
  const uint64_t n_bytes = written(transfers);
  const std::set<const Shard*> shards = work.add(transfers, n_bytes >= kStreamBytes);
  install_guard();
  if (n_bytes <= kInlineBytes) {
    for (size_t i = 0; i < work.pieces.size(); ++i) work.do_piece(i);
  } else {
    parallel(work.pieces.size(), [](void* context, size_t i) { static_cast<Work*>(context)->do_piece(i); }, &work);
  }
  work.check(shards);
}

struct Filling::Group {
  std::vector<Transfer> transfers;  // they keep their shards
  Work work;
  std::set<const Shard*> shards;
  size_t number = 0;
  size_t n_begun = 0;             // pieces; under the mutex
  std::atomic<size_t> n_left{0};  // pieces
};

Filling::Filling(size_t n_buffers) : n_buffers_(n_buffers) {
  if (n_buffers == 0) throw std::invalid_argument("Filling: at least one buffer is needed");
  install_guard();
  try {
    thread_ = std::thread([this] { fill(); });
  } catch (const std::system_error&) {
    // No more threads can be started: who waits does the work.
  }
}

Filling::~Filling() { close(); }

void Filling::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_over_ = true;
  }
  begun_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Filling::add(std::vector<Transfer> transfers) {
  auto group = std::make_unique<Group>();
  group->transfers = std::move(transfers);
  group->shards = group->work.add(group->transfers, written(group->transfers) >= kStreamBytes);
  group->n_left = group->work.pieces.size();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    group->number = n_added_++;
    if (group->n_left) queued_.push_back(group.get());
    groups_.push_back(std::move(group));
  }
  begun_.notify_all();
}

bool Filling::is_ready() const { return !queued_.empty() && queued_.front()->number < n_released_ + n_buffers_; }

// Each thread of the pool takes one piece after another, from group to group, until there has been none for a while:
// then others may have the pool.
void Filling::fill() {
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      begun_.wait(lock, [&] { return is_over_ || is_ready(); });
      if (is_over_) return;
    }
    parallel(threads(), [](void* context, size_t) { static_cast<Filling*>(context)->do_pieces(); }, this);
  }
}

void Filling::do_pieces() {
  while (true) {
    Group* group;
    size_t i;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      if (!begun_.wait_for(lock, kPatience, [&] { return is_over_ || is_ready(); }) || is_over_) return;
      group = queued_.front();
      i = group->n_begun++;
      if (group->n_begun == group->work.pieces.size()) queued_.pop_front();
    }
    group->work.do_piece(i);
    if (--group->n_left == 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      filled_.notify_all();
    }
  }
}

void Filling::wait() {
  std::unique_ptr<Group> group;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (groups_.empty()) throw std::logic_error("Filling: no group is left to wait for");
    if (groups_.front()->number >= n_released_ + n_buffers_) {
      throw std::logic_error("Filling: the next group's buffer has not been released");
    }
    if (is_over_) throw std::logic_error("Filling: closed");
    if (thread_.joinable()) filled_.wait(lock, [&] { return groups_.front()->n_left == 0; });
    group = std::move(groups_.front());
    groups_.pop_front();
  }
  if (!thread_.joinable()) {
    for (size_t i = 0; i < group->work.pieces.size(); ++i) group->work.do_piece(i);
    if (group->n_left) queued_.pop_front();
  }
  group->work.check(group->shards);
}

void Filling::release() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++n_released_;
  }
  begun_.notify_all();
}

}  // namespace olmfast
