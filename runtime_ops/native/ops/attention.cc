// msd.Attention for onnxruntime: reads and checks the tensors, then shares rows, or tiles of the cache, among threads.
//
// Everything is read at every call and nothing at creation: within an If or Loop body no input is known as a
// constant when the kernel is created. Nothing in a tensor is trusted before its shape is checked.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "../kernels/attention/sequence.h"
#include "op.h"

namespace msd {
namespace {

using attention::Kernel;
using attention::Partial;
using attention::Problem;
using attention::Side;
using attention::Task;

constexpr const char* kLayout = "attention/1";

enum Input : size_t {
  kQuery, kKey, kValue, kPastKey, kPastValue, kKeyScale, kValueScale, kMask, kSinks, kLengths, kPlan, kFactors, kInputs
};
constexpr const char* kInputNames[kInputs] = {"query",       "key",  "value", "past_key", "past_value", "key_scale",
                                              "value_scale", "mask", "sinks", "lengths",  "plan",       "factors"};
enum OutputIndex : size_t { kY, kPresentKey, kPresentValue, kPresentKeyScale, kPresentValueScale, kOutputs };

using Shape = std::vector<int64_t>;

// Tasks worth having, so that many threads find work: below it rows, or tiles, are shared out in smaller parts.
constexpr int64_t kEnoughTasks = 32;
constexpr int64_t kFewestTiles = 4;  // of a task: merging a tile costs a few percent of computing it

// An op of the runtime's table, for one element type and one type of the cache.
struct AttentionOp : OrtCustomOp {
  const OrtApi* api;
  Real type;
  ort::ElementType cache;
};

// What becomes of the past, and where new tokens go; numbers of the plan. reference.py says what each means.
enum CacheKind : int { kAppend, kShared, kGrow };
constexpr const char* kCacheKinds[] = {"append", "shared", "grow"};

struct AttentionKernel {
  const OrtApi* api;
  Real type;
  Real precision;   // of Y; narrower than `type` where the runtime widened the node
  ort::ElementType cache;
  CacheKind kind;   // attribute `cache`
  std::string who;  // "msd.Attention (node '/layers.0/attn')"
};

constexpr ort::ElementType input_type(Real type, ort::ElementType cache, size_t index) {
  switch (index) {
    case kQuery:
    case kKey:
    case kValue:
      return static_cast<ort::ElementType>(type);
    case kPastKey:
    case kPastValue:
      return cache;
    case kLengths:
    case kPlan:
      return ort::kInt64;
    default:
      return ort::kFloat;
  }
}

[[noreturn]] void refuse_shape(const Tensor* inputs, Input input, const std::string& needed) {
  throw Refused{std::string(kInputNames[input]) + " has shape " + text_of(inputs[input].shape) + ", needed " + needed};
}

void need_shape(const Tensor* inputs, Input input, const Shape& shape) {
  if (inputs[input].shape != shape) refuse_shape(inputs, input, text_of(shape));
}

void read_plan(const Tensor* inputs, const AttentionKernel& self, Problem& problem) {
  if (inputs[kPlan].shape != Shape{5}) refuse_shape(inputs, kPlan, "[5]: bits, dynamic, cache, causal, window");
  int64_t values[5];
  std::memcpy(values, inputs[kPlan].data, sizeof values);
  const auto need = [](const char* what, int64_t found, bool holds, const std::string& needed) {
    if (!holds) throw Refused{"plan has " + std::string(what) + " = " + std::to_string(found) + ", needed " + needed};
  };
  const auto [bits, dynamic, cache, causal, window] = values;
  const int64_t cache_bits = self.cache == ort::kInt8 ? 8 : 4;
  need("bits", bits, bits == cache_bits, std::to_string(cache_bits) + " for the cache's element type");
  need("dynamic", dynamic, dynamic == 0 || dynamic == 1, "0 or 1");
  need("cache", cache, cache == self.kind,
       std::to_string(self.kind) + " for cache = '" + kCacheKinds[self.kind] + "'");
  need("causal", causal, causal == 0 || causal == 1, "0 or 1");
  need("window", window, window >= 0, "0 (none) or more");
  problem.bits = static_cast<int>(bits);
  problem.is_dynamic = dynamic == 1;
  problem.is_shared = cache != kAppend;
  problem.is_causal = causal == 1;
  problem.window = std::min(window, INT64_MAX / 2);  // as good as none, and no sum with it overflows
}

void read_factors(const Tensor* inputs, Problem& problem) {
  if (inputs[kFactors].shape != Shape{2}) refuse_shape(inputs, kFactors, "[2]: softmax scale, soft cap");
  float values[2];
  std::memcpy(values, inputs[kFactors].data, sizeof values);
  const auto [scale, cap] = values;
  if (!std::isfinite(scale)) throw Refused{"factors has scale = " + std::to_string(scale) + ", needed a finite number"};
  constexpr float kSmallest = 0x1p-100f;  // its reciprocal is finite
  if (cap != 0 && !(cap >= kSmallest && std::isfinite(cap))) {
    throw Refused{"factors has soft cap = " + std::to_string(cap) + ", needed 0 (none) or a positive number"};
  }
  problem.scale = scale;
  problem.cap = cap;
}

void read_dimensions(const Tensor* inputs, Problem& problem) {
  const Shape &query = inputs[kQuery].shape, &key = inputs[kKey].shape, &past = inputs[kPastKey].shape;
  if (query.size() != 4) refuse_shape(inputs, kQuery, "[B, Hq, S, D]");
  if (key.size() != 4) refuse_shape(inputs, kKey, "[B, Hkv, L, D]");
  if (inputs[kValue].shape.size() != 4) refuse_shape(inputs, kValue, "[B, Hkv, L, Dv]");
  if (past.size() != 4) refuse_shape(inputs, kPastKey, "[B, Hkv, P, bytes]");
  problem.batch = query[0];
  problem.query_heads = query[1];
  problem.queries = query[2];
  problem.keys.columns = query[3];
  problem.heads = key[1];
  problem.fresh_tokens = key[2];
  problem.values.columns = inputs[kValue].shape[3];
  problem.past_tokens = past[2];
  const auto is_head = [](int64_t columns) { return columns >= 1 && columns <= attention::kLongestHead; };
  if (!is_head(query[3])) refuse_shape(inputs, kQuery, "[B, Hq, S, D] with D 1 to 512");
  if (!is_head(problem.values.columns)) refuse_shape(inputs, kValue, "[B, Hkv, L, Dv] with Dv 1 to 512");
  need_shape(inputs, kKey, {query[0], key[1], key[2], query[3]});
  need_shape(inputs, kValue, {query[0], key[1], key[2], problem.values.columns});
  if (problem.heads < 1 || problem.query_heads < 1 || problem.query_heads % problem.heads != 0) {
    throw Refused{"query has " + std::to_string(problem.query_heads) + " heads and key " +
                  std::to_string(problem.heads) + ", needed a multiple of key's in query"};
  }
  const auto bytes = [&](int64_t columns) { return problem.bits == 8 ? columns : (columns + 1) / 2; };
  problem.keys.bytes = bytes(problem.keys.columns);
  problem.values.bytes = bytes(problem.values.columns);
  need_shape(inputs, kPastKey, {query[0], key[1], past[2], problem.keys.bytes});
  need_shape(inputs, kPastValue, {query[0], key[1], past[2], problem.values.bytes});
  if (past[2] > INT64_MAX - key[2]) refuse_shape(inputs, kPastKey, "fewer tokens");
}

// Returns the tokens that the longest sequence has after this call.
int64_t read_lengths(const Tensor* inputs, CacheKind kind, Problem& problem) {
  const Shape& shape = inputs[kLengths].shape;
  if (shape != Shape{1} && shape != Shape{problem.batch}) {
    refuse_shape(inputs, kLengths, "[1] or [" + std::to_string(problem.batch) + "]");
  }
  problem.lengths = static_cast<const int64_t*>(inputs[kLengths].data);
  problem.length_step = shape[0] == 1 ? 0 : 1;
  const bool is_fixed = kind == kShared;
  const int64_t most = problem.past_tokens - (is_fixed ? problem.fresh_tokens : 0);
  int64_t longest = 0;
  for (int64_t i = 0; i < shape[0]; ++i) {
    const int64_t length = problem.lengths[i];
    if (length < 0 || length > most) {
      throw Refused{"lengths has " + std::to_string(length) + ", needed 0 to " + std::to_string(most) + ": the cache " +
                    (is_fixed ? "has room for " : "holds ") + std::to_string(problem.past_tokens) + " tokens" +
                    (is_fixed ? ", " + std::to_string(problem.fresh_tokens) + " are new" : "")};
    }
    longest = std::max(longest, length);
  }
  longest += problem.fresh_tokens;
  switch (kind) {
    case kAppend:
      problem.present_tokens = problem.past_tokens + problem.fresh_tokens;
      break;
    case kShared:
      problem.present_tokens = problem.past_tokens;
      break;
    case kGrow:
      problem.present_tokens = std::max(problem.past_tokens, longest);
      break;
  }
  return longest;
}

void read_scale(const Tensor* inputs, Input input, const Problem& problem, Side& side) {
  const auto* scales = static_cast<const float*>(inputs[input].data);
  if (problem.is_dynamic) {
    need_shape(inputs, input, {problem.batch, problem.heads, problem.past_tokens, 1});
    side.past_scales = scales;
    return;
  }
  const Shape one = {1, 1, 1, 1}, all = {1, problem.heads, 1, side.columns};
  const Shape& shape = inputs[input].shape;
  if (shape != one && shape != all) refuse_shape(inputs, input, text_of(one) + " or " + text_of(all));
  side.scales = scales;
  side.scale_head = shape == one ? 0 : side.columns;
  side.scale_column = shape == one ? 0 : 1;
}

// `longest`: as `read_lengths` returns it.
void read_mask(const Tensor* inputs, int64_t longest, Problem& problem) {
  const int64_t tokens = problem.is_shared ? longest : problem.present_tokens;
  const Shape& shape = inputs[kMask].shape;
  const Shape full = {problem.batch, problem.query_heads, problem.queries};
  bool fits = shape.size() == 4 && (shape[3] == 1 || shape[3] >= tokens);
  for (size_t i = 0; i < full.size() && fits; ++i) fits = shape[i] == 1 || shape[i] == full[i];
  if (!fits) {
    refuse_shape(inputs, kMask, text_of({problem.batch, problem.query_heads, problem.queries, tokens}) +
                                    " (or more tokens), or 1 in place of any of these");
  }
  const auto* base = static_cast<const float*>(inputs[kMask].data);
  if (shape == Shape{1, 1, 1, 1} && *base == 0) return;
  int64_t steps[4], step = 1;
  for (size_t i = 4; i-- > 0;) {
    steps[i] = shape[i] == 1 ? 0 : step;
    step *= shape[i];
  }
  problem.mask = {base, steps[0], steps[1], steps[2], steps[3]};
}

void read_sinks(const Tensor* inputs, Problem& problem) {
  const Shape& shape = inputs[kSinks].shape;
  const auto* sinks = static_cast<const float*>(inputs[kSinks].data);
  if (shape == Shape{problem.query_heads}) {
    problem.sinks = sinks;
  } else if (shape != Shape{1} || *sinks != -INFINITY) {
    refuse_shape(inputs, kSinks, "[" + std::to_string(problem.query_heads) + "], or [1] with -Inf for none");
  }
}

// Output number `index`; its memory may be that of an input which the caller bound as both.
template <typename T>
T* make_output(const OrtApi* api, OrtKernelContext* context, size_t index, const Shape& shape) {
  OrtValue* output = nullptr;
  check(ort::KernelContextGetOutput::call(api, context, index, shape.data(), shape.size(), &output));
  if (output == nullptr) throw Refused{"output " + std::to_string(index) + " is absent, needed all five"};
  void* data = nullptr;
  check(ort::GetTensorMutableData::call(api, output, &data));
  return static_cast<T*>(data);
}

void make_outputs(const AttentionKernel& self, OrtKernelContext* context, const Tensor* inputs, Problem& problem) {
  const OrtApi* api = self.api;
  const int64_t b = problem.batch;
  const Shape y = {b, problem.query_heads, problem.queries, problem.values.columns};
  problem.output = {make_output<void>(api, context, kY, y), self.type, self.precision};
  for (const bool is_key : {true, false}) {
    Side& side = is_key ? problem.keys : problem.values;
    const size_t present = is_key ? kPresentKey : kPresentValue, scale = is_key ? kPresentKeyScale : kPresentValueScale;
    const Tensor& given = inputs[is_key ? kKeyScale : kValueScale];
    side.fresh = inputs[is_key ? kKey : kValue].data;
    side.past = static_cast<const uint8_t*>(inputs[is_key ? kPastKey : kPastValue].data);
    side.present = make_output<uint8_t>(api, context, present, {b, problem.heads, problem.present_tokens, side.bytes});
    const Shape tokens = {b, problem.heads, problem.present_tokens, 1};
    auto* scales = make_output<float>(api, context, scale, problem.is_dynamic ? tokens : given.shape);
    if (problem.is_dynamic) {
      side.present_scales = scales;
    } else if (scales != given.data) {
      const int64_t count = side.scale_column == 0 ? 1 : problem.heads * side.columns;
      std::memcpy(scales, given.data, static_cast<size_t>(count) * sizeof(float));
    }
  }
}

// Calls work(i, scratch) for i in [0, count) on the session's threads, each with `bytes` of scratch of its own.
template <typename Work>
void parallel_with_scratch(const OrtApi* api, const OrtKernelContext* context, int64_t count, int64_t bytes,
                           const Work& work) {
  std::atomic<bool> has_failed{false};
  parallel_for(api, context, static_cast<size_t>(count), [&](size_t i) noexcept {
    try {
      work(static_cast<int64_t>(i), thread_scratch(bytes));
    } catch (...) {  // out of memory: nothing else is thrown
      has_failed.store(true, std::memory_order_relaxed);
    }
  });
  if (has_failed.load()) throw std::bad_alloc();
}

// A sequence's heads one by one, rows in blocks. `longest` as above.
void attend(const OrtApi* api, const OrtKernelContext* context, const Kernel& kernel, const Problem& problem,
            int64_t longest) {
  const int64_t rows = problem.rows(), heads = problem.batch * problem.heads;
  const int64_t even = ceil_div(heads * rows, kEnoughTasks);
  const int64_t block = std::min(rows, std::clamp(even, attention::kFewRows, attention::kMostRows));
  const int64_t blocks = ceil_div(rows, block), tiles = ceil_div(longest, attention::kTile);
  const int64_t bytes = attention::scratch_bytes(problem, block);

  const auto task_of = [&](int64_t index) {
    Task task{};
    task.b = index / blocks / problem.heads;
    task.head = index / blocks % problem.heads;
    task.first_row = index % blocks * block;
    task.last_row = std::min(task.first_row + block, rows);
    task.last_tile = ceil_div(problem.tokens(task.b), attention::kTile);
    return task;
  };
  const int64_t parts = ceil_div(kEnoughTasks, heads * blocks);
  const int64_t tiles_per_part = std::max(kFewestTiles, ceil_div(tiles, parts));
  if (rows > attention::kFewRows || tiles_per_part >= tiles) {
    return parallel_with_scratch(api, context, heads * blocks, bytes, [&](int64_t index, char* scratch) {
      attention::attend(problem, kernel, task_of(index), scratch);
    });
  }

  // Few rows and a long cache: the cache is shared out as well, and what its tiles give is merged in order, as above.
  const int64_t columns = attention::padded(problem.values.columns);
  const std::unique_ptr<attention::Share[]> shares(new attention::Share[static_cast<size_t>(heads * tiles * rows)]);
  const std::unique_ptr<int32_t[]> sums(new int32_t[static_cast<size_t>(heads * tiles * rows * columns)]);
  const auto partial_of = [&](int64_t head) {
    return Partial{shares.get() + head * tiles * rows, sums.get() + head * tiles * rows * columns};
  };
  const int64_t used_parts = ceil_div(tiles, tiles_per_part);
  parallel_with_scratch(api, context, heads * used_parts, bytes, [&](int64_t index, char* scratch) {
    const Partial partial = partial_of(index / used_parts);
    Task task = task_of(index / used_parts);
    task.first_tile = std::min(index % used_parts * tiles_per_part, task.last_tile);
    task.last_tile = std::min(task.first_tile + tiles_per_part, task.last_tile);
    task.partial = &partial;
    attention::attend(problem, kernel, task, scratch);
  });
  parallel_with_scratch(api, context, heads, bytes, [&](int64_t index, char* scratch) {
    const Partial partial = partial_of(index);
    Task task = task_of(index);
    task.partial = &partial;
    attention::merge(problem, task, scratch);
  });
}

void compute(const AttentionKernel& self, OrtKernelContext* context) {
  const OrtApi* api = self.api;
  Tensor inputs[kInputs];
  read_inputs(api, context, kInputNames, kInputs, [&](size_t i) { return input_type(self.type, self.cache, i); },
              inputs);
  Problem problem{};
  problem.type = self.type;
  read_plan(inputs, self, problem);
  read_factors(inputs, problem);
  read_dimensions(inputs, problem);
  const int64_t longest = read_lengths(inputs, self.kind, problem);
  read_scale(inputs, kKeyScale, problem, problem.keys);
  read_scale(inputs, kValueScale, problem, problem.values);
  read_mask(inputs, longest, problem);
  read_sinks(inputs, problem);
  problem.query = inputs[kQuery].data;
  make_outputs(self, context, inputs, problem);

  if (problem.batch == 0) return;
  const Kernel& kernel = chosen(attention::kVariants);
  if (problem.present_tokens > 0) {
    const int64_t bytes = attention::scratch_bytes(problem, 1);
    parallel_with_scratch(api, context, problem.batch * problem.heads, bytes, [&](int64_t index, char* scratch) {
      attention::store(problem, kernel, index / problem.heads, index % problem.heads, scratch);
    });
  }
  if (problem.queries > 0) attend(api, context, kernel, problem, longest);
}

std::unique_ptr<AttentionKernel> create(const AttentionOp& op, const OrtApi* api, const OrtKernelInfo* info) {
  auto kernel = std::make_unique<AttentionKernel>();
  kernel->api = api;
  kernel->type = op.type;
  kernel->cache = op.cache;
  kernel->who = "msd.Attention (node '" + node_name(api, info) + "')";
  check_layout(api, info, kernel->who, "the cache", kLayout);
  const std::string cache = string_attribute(api, info, kernel->who, "cache", "'append', 'shared' or 'grow'");
  const auto* const found = std::find(std::begin(kCacheKinds), std::end(kCacheKinds), cache);
  if (found == std::end(kCacheKinds)) {
    throw Refused{kernel->who + ": attribute cache is '" + cache + "', needed 'append', 'shared' or 'grow'"};
  }
  kernel->kind = static_cast<CacheKind>(found - std::begin(kCacheKinds));
  kernel->precision = read_precision(api, info, kernel->who, op.type, "query");
  return kernel;
}

const AttentionOp& self(const OrtCustomOp* op) { return *static_cast<const AttentionOp*>(op); }

// Y is like query but for the columns. The cache's tokens are added up only where both are numbers; whether it is
// appended to is an attribute, which shape inference cannot read here: then present caches stay unstated.
void infer_shapes(const OrtApi* api, const OrtShapeInferContext* context) {
  SymbolicShape y = read_symbolic_shape(api, context, kQuery);
  const SymbolicShape value = read_symbolic_shape(api, context, kValue);
  if (y.dims.size() != 4 || value.dims.size() != 4) return;
  y.dims.back() = value.dims.back();
  y.names.back() = value.names.back();
  state_shape(api, context, kY, y);
}

AttentionOp make_op(const OrtApi* api, Real type, ort::ElementType cache) {
  AttentionOp op{};
  set_defaults(op);
  op.api = api;
  op.type = type;
  op.cache = cache;
  op.GetName = [](const OrtCustomOp*) { return "Attention"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t{kInputs}; };
  op.GetInputType = [](const OrtCustomOp* o, size_t index) { return input_type(self(o).type, self(o).cache, index); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{kOutputs}; };
  op.GetOutputType = [](const OrtCustomOp* o, size_t index) {
    constexpr size_t kLike[kOutputs] = {kQuery, kPastKey, kPastValue, kKeyScale, kValueScale};
    return input_type(self(o).type, self(o).cache, kLike[index]);
  };
  set_kernel<AttentionOp, AttentionKernel, create, compute>(op);
  op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
    const OrtApi* a = self(o).api;
    return infer_quietly(a, [&] { infer_shapes(a, context); });
  };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> attention_ops(const OrtApi* api) {
  std::vector<const OrtCustomOp*> ops;
  for (const Real type : {Real::kFloat, Real::kHalf, Real::kBfloat16}) {
    for (const ort::ElementType cache : {ort::kInt8, ort::kUint8}) {
      ops.push_back(new AttentionOp(make_op(api, type, cache)));
    }
  }
  return ops;
}

}  // namespace msd
