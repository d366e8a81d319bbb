#include "sequence.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "exp_of.h"

namespace msd::attention {
namespace {

constexpr float kMinusInfinity = -INFINITY;

int64_t size_of(Real type) { return type == Real::kFloat ? 4 : 2; }

// Cuts memory into arrays that each begin at a line of the cache.
class Cutter {
 public:
  explicit Cutter(char* memory) : memory_(memory) {}
  template <typename T>
  T* cut(int64_t count) {
    char* const at = memory_ == nullptr ? nullptr : memory_ + bytes_;  // null: only to count
    bytes_ += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Running result of rows.
struct Running {
  float* maximum;
  float* sum;
  float* mixed;  // [rows, value columns padded]
};

struct Scratch {
  Scratch(char* memory, const Problem& problem, int64_t rows, int64_t* bytes = nullptr) {
    const int64_t key_columns = padded(problem.keys.columns), value_columns = padded(problem.values.columns);
    const int64_t columns = std::max(key_columns, value_columns);
    Cutter cutter(memory);
    query = cutter.cut<int16_t>(rows * key_columns);
    factors = cutter.cut<float>(rows);
    running.maximum = cutter.cut<float>(rows);
    running.sum = cutter.cut<float>(rows);
    running.mixed = cutter.cut<float>(rows * value_columns);
    products = cutter.cut<int32_t>(rows * kTile);
    weights = cutter.cut<int16_t>(rows * kTile);
    shares = cutter.cut<Share>(rows);
    sums = cutter.cut<int32_t>(rows * value_columns);
    codes = cutter.cut<int8_t>(kTile * columns);
    spare = cutter.cut<int16_t>(kTile * columns);
    key_scales = cutter.cut<float>(kTile);
    value_scales = cutter.cut<float>(kTile);
    mask = cutter.cut<float>(kTile);
    if (bytes != nullptr) *bytes = cutter.bytes();
  }

  int16_t* query;
  float* factors;
  Running running;
  int32_t* products;
  int16_t* weights;
  Share* shares;
  int32_t* sums;
  int8_t* codes;
  int16_t* spare;
  float *key_scales, *value_scales, *mask;
};

// Tokens of a tile, counted from its own first, as they lie in storage: those before `split` from token `low` on, those
// from it from token `high` on. In between may be tokens that are not valid.
struct Place {
  int64_t low, high;
  int split;

  bool is_whole(int begin, int end) const { return low == high || end <= split || begin >= split; }
  int64_t at(int token) const { return (token < split ? low : high) + token; }
};

Place place_of(const Problem& problem, int64_t b, int64_t start) {
  const int64_t length = problem.length(b);
  const int64_t gap = problem.is_shared ? 0 : problem.past_tokens - length;
  return {start, start + gap, static_cast<int>(std::clamp<int64_t>(length - start, 0, kTile))};
}

// values[0] is that of the tile's token 0: those wanted lie side by side in storage, or are copied.
const float* along(const float* stored, int64_t step, const Place& place, int begin, int end, float* copy) {
  if (step == 0) return stored;
  if (place.is_whole(begin, end)) return stored + (place.at(begin) - begin);
  for (int t = begin; t < end; ++t) copy[t] = stored[place.at(t)];
  return copy;
}

// The codes of tokens as bytes in padded columns: where they lie if they are so already, else copied.
Tokens tile_of(const Problem& problem, const Kernel& kernel, const Side& side, int64_t index, const Place& place,
               int begin, int end, int8_t* copy) {
  const int64_t columns = padded(side.columns);
  const uint8_t* stored = side.present + index * problem.present_tokens * side.bytes;
  if (problem.bits == 8 && columns == side.columns && place.is_whole(begin, end)) {
    const auto* codes = reinterpret_cast<const int8_t*>(stored + (place.at(begin) - begin) * side.bytes);
    return {codes, side.bytes, columns, begin, end, stored, 0};
  }
  if (problem.bits == 4 && columns == side.columns && place.is_whole(begin, end)) {
    kernel.unpack(stored + place.at(begin) * side.bytes, (end - begin) * columns, copy + begin * columns);
    return {copy, columns, columns, begin, end, stored, 0};
  }
  for (int t = begin; t < end; ++t) {
    const uint8_t* from = stored + place.at(t) * side.bytes;
    int8_t* to = copy + t * columns;
    if (problem.bits == 8) {
      std::memcpy(to, from, static_cast<size_t>(side.columns));
    } else {
      kernel.unpack(from, side.bytes * 2, to);  // no more than the padded columns
    }
    std::fill(to + side.columns, to + columns, int8_t{0});
  }
  return {copy, columns, columns, begin, end, stored, 0};
}

// Says of the tokens of a tile that as many of `side`, from valid token `start` on, are read after them.
void announce(const Problem& problem, const Side& side, int64_t b, int64_t index, int64_t start, Tokens& tokens) {
  if (start + tokens.end > problem.tokens(b)) return;
  tokens.ahead = side.present + (index * problem.present_tokens + place_of(problem, b, start).low) * side.bytes;
  tokens.ahead_stride = side.bytes;
}

// A row of the task: which head and query it is, and what it may see.
struct Row {
  int64_t query_head, query;
  int64_t first, last;  // tokens
};

Row row_of(const Problem& problem, const Task& task, int64_t row) {
  const int64_t group = problem.group(), total = problem.tokens(task.b);
  Row r;
  r.query_head = task.head * group + row % group;
  r.query = row / group;
  const int64_t position = total - problem.queries + r.query;
  r.first = problem.window > 0 ? std::max<int64_t>(position - problem.window + 1, 0) : 0;
  r.last = problem.is_causal ? std::clamp<int64_t>(position + 1, 0, total) : total;
  return r;
}

int64_t index_of(const Problem& problem, int64_t b, const Row& row) {
  return (b * problem.query_heads + row.query_head) * problem.queries + row.query;
}

void decompose(const Problem& problem, const Kernel& kernel, const Task& task, const Scratch& scratch) {
  const Side& keys = problem.keys;
  const int64_t columns = padded(keys.columns);
  for (int64_t row = task.first_row; row < task.last_row; ++row) {
    const int64_t at = index_of(problem, task.b, row_of(problem, task, row)) * keys.columns * size_of(problem.type);
    const float* scales = problem.is_dynamic ? nullptr : keys.scales + task.head * keys.scale_head;
    const Vector x = {static_cast<const char*>(problem.query) + at, problem.type, keys.columns, scales,
                      keys.scale_column};
    const int64_t r = row - task.first_row;
    scratch.factors[r] = kernel.decompose(x, columns, scratch.query + r * columns) * problem.scale;
  }
}

// Probabilities of the task's rows in a tile, from their products.
void soften(const Problem& problem, const Kernel& kernel, const Task& task, const Scratch& scratch, const Place& place,
            int64_t start, int begin, int end, Share* shares) {
  const int64_t index = (task.b * problem.heads + task.head) * problem.present_tokens;
  Softmax softmax{};
  softmax.cap = problem.cap;
  softmax.is_dynamic = problem.is_dynamic;
  softmax.begin = begin;
  softmax.end = end;
  if (problem.is_dynamic) {
    softmax.key_scales = along(problem.keys.present_scales + index, 1, place, begin, end, scratch.key_scales);
    softmax.value_scales = along(problem.values.present_scales + index, 1, place, begin, end, scratch.value_scales);
  }
  const Mask& mask = problem.mask;
  for (int64_t row = task.first_row; row < task.last_row; ++row) {
    const int64_t r = row - task.first_row;
    const Row seen = row_of(problem, task, row);
    softmax.factor = scratch.factors[r];
    softmax.first = static_cast<int>(std::clamp<int64_t>(seen.first - start, begin, end));
    softmax.last = static_cast<int>(std::clamp<int64_t>(seen.last - start, begin, end));
    if (mask.base != nullptr) {
      const float* line = mask.base + task.b * mask.batch_step + seen.query_head * mask.head_step +
                          seen.query * mask.query_step;
      softmax.mask = along(line, mask.token_step, place, begin, end, scratch.mask);
      softmax.mask_step = mask.token_step;
    }
    shares[r] = kernel.soften(softmax, scratch.products + r * kTile, scratch.weights + r * kTile);
  }
}

void begin_rows(const Problem& problem, const Task& task, const Running& running) {
  const int64_t columns = padded(problem.values.columns), rows = task.last_row - task.first_row;
  std::fill(running.mixed, running.mixed + rows * columns, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const Row row = row_of(problem, task, task.first_row + r);
    const float sink = problem.sinks == nullptr ? kMinusInfinity : problem.sinks[row.query_head];
    const bool is_sound = sink < INFINITY;
    running.maximum[r] = is_sound ? sink : 0;
    running.sum[r] = !is_sound ? float_of(kNan) : sink > kMinusInfinity ? kLimit : 0;
  }
}

void add_tile(const Problem& problem, int64_t rows, const Share* shares, const int32_t* sums, const Running& running) {
  const int64_t columns = padded(problem.values.columns);
  for (int64_t r = 0; r < rows; ++r) {
    const Share& share = shares[r];
    if (share.maximum == kMinusInfinity) continue;
    const float maximum = std::max(running.maximum[r], share.maximum);
    const float a = exp_of(running.maximum[r] - maximum), b = exp_of(share.maximum - maximum);
    const float by = b * share.largest;
    running.maximum[r] = maximum;
    running.sum[r] = running.sum[r] * a + share.sum * b;
    float* mixed = running.mixed + r * columns;
    const int32_t* tile = sums + r * columns;
    for (int64_t i = 0; i < columns; ++i) mixed[i] = mixed[i] * a + static_cast<float>(tile[i]) * by;
  }
}

void finish_rows(const Problem& problem, const Task& task, const Running& running) {
  const Side& values = problem.values;
  const int64_t columns = padded(values.columns);
  const float* scales = values.scales + task.head * values.scale_head;
  for (int64_t row = task.first_row; row < task.last_row; ++row) {
    const int64_t r = row - task.first_row;
    float* mixed = running.mixed + r * columns;
    const float sum = running.sum[r];
    if (sum == 0) {
      std::fill(mixed, mixed + columns, 0.0f);
    } else {
      for (int64_t i = 0; i < values.columns; ++i) mixed[i] = mixed[i] / sum;
      if (!problem.is_dynamic) {
        for (int64_t i = 0; i < values.columns; ++i) mixed[i] = mixed[i] * scales[i * values.scale_column];
      }
    }
    const int64_t at = index_of(problem, task.b, row_of(problem, task, row)) * values.columns;
    if (problem.output.type == Real::kFloat && problem.output.precision == Real::kFloat) {
      float* y = static_cast<float*>(problem.output.y) + at;
      std::memcpy(y, mixed, sizeof(float) * static_cast<size_t>(values.columns));
    } else {
      for (int64_t i = 0; i < values.columns; ++i) store_real(problem.output, at + i, mixed[i]);
    }
  }
}

void pack(const int8_t* codes, int64_t count, int bits, uint8_t* to) {
  if (bits == 8) {
    std::memcpy(to, codes, static_cast<size_t>(count));
    return;
  }
  for (int64_t i = 0; i < count; i += 2) {
    const int high = i + 1 < count ? codes[i + 1] + 8 : 0;
    to[i / 2] = static_cast<uint8_t>((codes[i] + 8) | (high << 4));
  }
}

void store_side(const Problem& problem, const Kernel& kernel, const Side& side, int64_t b, int64_t head,
                int8_t* codes) {
  const int64_t index = b * problem.heads + head;
  const int64_t from = index * problem.past_tokens, to = index * problem.present_tokens;
  const auto past_tokens = static_cast<size_t>(problem.past_tokens);
  if (side.past != side.present && past_tokens > 0) {
    std::memcpy(side.present + to * side.bytes, side.past + from * side.bytes,
                past_tokens * static_cast<size_t>(side.bytes));
  }
  if (problem.is_dynamic && side.past_scales != side.present_scales && past_tokens > 0) {
    std::memcpy(side.present_scales + to, side.past_scales + from, past_tokens * sizeof(float));
  }
  const int64_t grown = problem.present_tokens - problem.past_tokens;
  if (problem.is_shared && grown > 0) {  // shorter sequences do not reach the end
    std::memset(side.present + (to + problem.past_tokens) * side.bytes, 0, static_cast<size_t>(grown * side.bytes));
    if (problem.is_dynamic) std::fill_n(side.present_scales + to + problem.past_tokens, grown, 0.0f);
  }
  const int64_t behind = problem.is_shared ? problem.length(b) : problem.past_tokens;
  const float* scales = problem.is_dynamic ? nullptr : side.scales + head * side.scale_head;
  for (int64_t t = 0; t < problem.fresh_tokens; ++t) {
    const int64_t at = (index * problem.fresh_tokens + t) * side.columns * size_of(problem.type);
    const Vector x = {static_cast<const char*>(side.fresh) + at, problem.type, side.columns, scales,
                      side.scale_column};
    const float scale = kernel.quantize(x, problem.bits == 8 ? 127 : 7, codes);
    pack(codes, side.columns, problem.bits, side.present + (to + behind + t) * side.bytes);
    if (problem.is_dynamic) side.present_scales[to + behind + t] = scale;
  }
}

}  // namespace

int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

int64_t scratch_bytes(const Problem& problem, int64_t rows) {
  int64_t bytes = 0;
  Scratch(nullptr, problem, rows, &bytes);
  return bytes;
}

void store(const Problem& problem, const Kernel& kernel, int64_t b, int64_t head, char* scratch) {
  int8_t* codes = Scratch(scratch, problem, 1).codes;
  store_side(problem, kernel, problem.keys, b, head, codes);
  store_side(problem, kernel, problem.values, b, head, codes);
}

void attend(const Problem& problem, const Kernel& kernel, const Task& task, char* memory) {
  const int64_t rows = task.last_row - task.first_row;
  const Scratch scratch(memory, problem, rows);
  const int64_t index = task.b * problem.heads + task.head, total = problem.tokens(task.b);
  const int64_t columns = padded(problem.values.columns);
  decompose(problem, kernel, task, scratch);
  if (task.partial == nullptr) begin_rows(problem, task, scratch.running);

  // Rows are ordered by query: the first sees the farthest back, the last the farthest ahead.
  const int64_t first = row_of(problem, task, task.first_row).first;
  const int64_t last = row_of(problem, task, task.last_row - 1).last;
  for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int64_t start = tile * kTile;
    const int begin = static_cast<int>(std::clamp<int64_t>(first - start, 0, kTile)) / kStep * kStep;
    const int end = static_cast<int>(std::clamp<int64_t>(std::min(last, total) - start, 0, kTile));
    Share* shares = scratch.shares;
    int32_t* sums = scratch.sums;
    if (task.partial != nullptr) {
      shares = task.partial->shares + tile * problem.rows() + task.first_row;
      sums = task.partial->sums + (tile * problem.rows() + task.first_row) * columns;
    }
    if (begin >= end) {  // hidden from all
      std::fill(shares, shares + rows, Share{kMinusInfinity, 0, 1});
      continue;
    }
    const Place place = place_of(problem, task.b, start);
    Tokens keys = tile_of(problem, kernel, problem.keys, index, place, begin, end, scratch.codes);
    announce(problem, problem.values, task.b, index, start, keys);
    kernel.logits(scratch.query, rows, keys, scratch.spare, scratch.products);
    soften(problem, kernel, task, scratch, place, start, begin, end, shares);
    Tokens values = tile_of(problem, kernel, problem.values, index, place, begin, end, scratch.codes);
    announce(problem, problem.keys, task.b, index, start + kTile, values);
    kernel.mix(scratch.weights, rows, values, scratch.spare, sums);
    if (task.partial == nullptr) add_tile(problem, rows, shares, sums, scratch.running);
  }
  if (task.partial == nullptr) finish_rows(problem, task, scratch.running);
}

void merge(const Problem& problem, const Task& task, char* memory) {
  const int64_t rows = task.last_row - task.first_row, columns = padded(problem.values.columns);
  const Scratch scratch(memory, problem, rows);
  begin_rows(problem, task, scratch.running);
  for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int64_t at = tile * problem.rows() + task.first_row;
    add_tile(problem, rows, task.partial->shares + at, task.partial->sums + at * columns, scratch.running);
  }
  finish_rows(problem, task, scratch.running);
}

}  // namespace msd::attention
