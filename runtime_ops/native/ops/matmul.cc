// msd.MatMul for onnxruntime: reads and checks the tensors, then hands rows to the kernel in panels.
//
// Everything is read at every call and nothing at creation: within an If or Loop body no input is known as a
// constant when the kernel is created. Nothing in a tensor is trusted before its shape is checked.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../kernels/matmul/kernel.h"
#include "op.h"

namespace msd {
namespace {

using matmul::Columns;
using matmul::Kernel;
using matmul::Output;
using matmul::Panel;
using matmul::Plan;
using matmul::Real;
using matmul::Weight;
using MatMulVariant = Variant<Kernel>;

constexpr const char* kLayout = "n16k4/1";
constexpr size_t kInputs = 7;
constexpr const char* kInputNames[kInputs] = {"A", "B", "scales", "zero_points", "offsets", "bias", "plan"};
enum Input : size_t { kA, kB, kScales, kZeroPoints, kOffsets, kBias, kPlan };

// Scratch of a panel: large enough that a weight tile, unpacked, serves many rows; small enough for a second cache.
constexpr int64_t kPanelBytes = 1152 * 1024;

// Multiplications below which a task costs more to hand out than to do.
constexpr int64_t kSmallestTask = 1 << 18;

// What a test chose in place of the machine's best; null otherwise.
std::atomic<const MatMulVariant*> chosen_by_test{nullptr};

const MatMulVariant* variant_called(const std::string& name) {
  for (const MatMulVariant& variant : matmul::kVariants) {
    if (name == variant.name && machine_has(variant.isa)) return &variant;
  }
  return nullptr;
}

std::string variant_names() {
  std::string names;
  for (const MatMulVariant& variant : matmul::kVariants) {
    if (!machine_has(variant.isa)) continue;
    if (!names.empty()) names += ' ';
    names += variant.name;
  }
  return names;
}

// The fastest variant this machine runs, or the one that the environment variable MSD_ISA names.
const MatMulVariant& machine_variant() {
  static const MatMulVariant* const variant = [] {
    const char* wanted = std::getenv("MSD_ISA");
    if (wanted != nullptr && *wanted != '\0') return variant_called(wanted);
    for (const MatMulVariant& row : matmul::kVariants) {
      if (machine_has(row.isa)) return &row;
    }
    return static_cast<const MatMulVariant*>(nullptr);
  }();
  if (variant == nullptr) {
    const char* wanted = std::getenv("MSD_ISA");
    throw Refused{"msd.MatMul: MSD_ISA is '" + std::string(wanted == nullptr ? "" : wanted) +
                  "', this machine runs: " + variant_names()};
  }
  return *variant;
}

// An op of the runtime's table, for one element type.
struct MatMulOp : OrtCustomOp {
  const OrtApi* api;
  Real type;
};

struct MatMulKernel {
  const OrtApi* api;
  Real type;
  Real precision;   // of the output; narrower than `type` where the runtime widened the node
  std::string who;  // "msd.MatMul (node '/fc1/MatMul')"
};

// Scratch of the calling thread, kept for its next call.
class Scratch {
 public:
  // Room for `bytes`, aligned to a line of the cache.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(new char[bytes + kAlignment]);
      size_ = bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlignment - address % kAlignment);
  }

 private:
  static constexpr size_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

Plan read_plan(const Tensor& tensor) {
  if (tensor.shape != std::vector<int64_t>{5}) {
    throw Refused{"plan has shape " + text_of(tensor.shape) + ", needed [5]: k, bits, block_size, terms, per_row"};
  }
  int64_t values[5];
  std::memcpy(values, tensor.data, sizeof values);
  const auto need = [](const char* what, int64_t found, bool holds, const char* needed) {
    if (!holds) throw Refused{"plan has " + std::string(what) + " = " + std::to_string(found) + ", needed " + needed};
  };
  const auto [k, bits, block_size, terms, per_row] = values;
  need("k", k, k >= 1 && k <= INT32_MAX, "1 to 2147483647");
  need("bits", bits, bits == 2 || bits == 4 || bits == 8, "2, 4 or 8");
  need("block_size", block_size, block_size >= 1 && block_size <= matmul::kLongestGroup, "1 to 256");
  need("terms", terms, terms >= 1 && terms <= 3, "1, 2 or 3");
  need("per_row", per_row, per_row == 0 || per_row == 1, "0 or 1");

  Plan plan;
  plan.k = k;
  plan.bits = static_cast<int>(bits);
  plan.block_size = static_cast<int>(block_size);
  plan.terms = static_cast<int>(terms);
  plan.per_row = per_row == 1;
  plan.groups = ceil_div(k, block_size);
  const int line_k = matmul::kQuad * (8 / plan.bits);
  plan.lines = static_cast<int>(ceil_div(block_size, line_k));
  plan.stride = static_cast<int>(ceil_div(plan.lines * line_k, 16) * 16);
  return plan;
}

// [tiles, groups, 16], [tiles, 1, 16] or, where `may_be_single`, [1, 1, 1].
template <typename T>
Columns<T> read_columns(const Tensor& tensor, Input input, int64_t tiles, int64_t groups, bool may_be_single) {
  const std::vector<int64_t>& shape = tensor.shape;
  const auto* base = static_cast<const T*>(tensor.data);
  if (may_be_single && shape == std::vector<int64_t>{1, 1, 1}) return {base, 0, 0, true};
  const bool fits = shape.size() == 3 && shape[0] == tiles && (shape[1] == groups || shape[1] == 1) &&
                    shape[2] == matmul::kTile;
  if (!fits) {
    throw Refused{std::string(kInputNames[input]) + " has shape " + text_of(shape) + ", needed " +
                  text_of({tiles, groups, matmul::kTile}) + ", " + text_of({tiles, 1, matmul::kTile}) +
                  (may_be_single ? " or [1, 1, 1]" : "")};
  }
  return {base, shape[1] * matmul::kTile, shape[1] == 1 ? 0 : matmul::kTile, false};
}

Weight read_weight(const Tensor (&inputs)[kInputs], const Plan& plan) {
  if (inputs[kBias].shape.size() != 1) {
    throw Refused{"bias has shape " + text_of(inputs[kBias].shape) + ", needed [N]"};
  }
  Weight weight;
  weight.n = inputs[kBias].shape[0];
  const int64_t tiles = ceil_div(weight.n, matmul::kTile);
  const std::vector<int64_t> packed = {tiles, plan.groups, plan.lines, matmul::kLine};
  if (inputs[kB].shape != packed) {
    throw Refused{"B has shape " + text_of(inputs[kB].shape) + ", needed " + text_of(packed) + " for K = " +
                  std::to_string(plan.k) + ", N = " + std::to_string(weight.n) + ", " + std::to_string(plan.bits) +
                  " bits and groups of " + std::to_string(plan.block_size)};
  }
  weight.b = static_cast<const uint8_t*>(inputs[kB].data);
  weight.scales = read_columns<float>(inputs[kScales], kScales, tiles, plan.groups, false);
  weight.zero_points = read_columns<uint8_t>(inputs[kZeroPoints], kZeroPoints, tiles, plan.groups, true);
  weight.offsets = read_columns<float>(inputs[kOffsets], kOffsets, tiles, plan.groups, true);
  weight.has_offsets = !(weight.offsets.single && weight.offsets.base[0] == 0.0f);
  weight.bias = static_cast<const float*>(inputs[kBias].data);
  return weight;
}

// Product of all dimensions but the last.
int64_t count_rows(const Tensor& a) {
  const auto last = a.shape.end() - 1;
  if (std::find(a.shape.begin(), last, 0) != last) return 0;  // the others may be anything, also in product
  int64_t rows = 1;
  for (auto dim = a.shape.begin(); dim != last; ++dim) {
    if (*dim < 0 || *dim > INT64_MAX / rows) throw Refused{"A has shape " + text_of(a.shape) + ", which is too large"};
    rows *= *dim;
  }
  return rows;
}

// Scratch bytes of a panel and where its parts lie.
struct PanelLayout {
  int64_t codes, sums, scales, bytes;
};

PanelLayout panel_layout(const Plan& plan, int64_t rows) {
  const int64_t planes = plan.terms == 3 ? 2 : 1;
  const int64_t cells = plan.groups * rows;
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  PanelLayout layout;
  layout.codes = 0;
  layout.sums = layout.codes + aligned(planes * cells * plan.stride * int64_t{sizeof(int16_t)});
  layout.scales = layout.sums + aligned(planes * cells * int64_t{sizeof(int32_t)});
  layout.bytes = layout.scales + aligned(cells * int64_t{sizeof(double)});
  return layout;
}

void run(const OrtApi* api, const OrtKernelContext* context, const Kernel& kernel, const Plan& plan,
         const Weight& weight, const void* a, int64_t rows, const Output& output) {
  // Panels of equal size: a short last one would read the whole weight for few rows. Kernels take rows by fours.
  const int64_t most = std::clamp<int64_t>(kPanelBytes / panel_layout(plan, 1).bytes, 1, matmul::kMostRows);
  const int64_t even = ceil_div(rows, ceil_div(rows, most));
  const int64_t panel_rows = std::min(ceil_div(even, 4) * 4, std::min(rows, most));
  const PanelLayout layout = panel_layout(plan, panel_rows);

  thread_local Scratch thread_scratch;
  char* scratch = thread_scratch.reserve(static_cast<size_t>(layout.bytes));
  const int64_t tiles = ceil_div(weight.n, matmul::kTile);
  const Real type = output.type;  // A's as well
  const int64_t size = type == Real::kFloat ? 4 : 2;

  for (int64_t row = 0; row < rows; row += panel_rows) {
    Panel panel;
    panel.rows = std::min(panel_rows, rows - row);
    panel.codes = reinterpret_cast<int16_t*>(scratch + layout.codes);
    panel.sums = reinterpret_cast<int32_t*>(scratch + layout.sums);
    panel.scales = reinterpret_cast<float*>(scratch + layout.scales);
    panel.scales64 = reinterpret_cast<double*>(scratch + layout.scales);
    const char* a_panel = static_cast<const char*>(a) + row * plan.k * size;
    Output panel_output = output;
    panel_output.y = static_cast<char*>(output.y) + row * weight.n * size;

    // A code costs about as much as 16 multiplications.
    const int64_t rows_per_task = std::clamp<int64_t>(kSmallestTask / (16 * plan.k), 1, panel.rows);
    parallel_for(api, context, static_cast<size_t>(ceil_div(panel.rows, rows_per_task)), [&](size_t task) noexcept {
      const int64_t first = static_cast<int64_t>(task) * rows_per_task;
      kernel.decompose(plan, a_panel, type, panel, first, std::min(first + rows_per_task, panel.rows));
    });
    const int64_t tiles_per_task =
        std::clamp<int64_t>(kSmallestTask / (plan.k * matmul::kTile * panel.rows), 1, tiles);
    parallel_for(api, context, static_cast<size_t>(ceil_div(tiles, tiles_per_task)), [&](size_t task) noexcept {
      const int64_t first = static_cast<int64_t>(task) * tiles_per_task;
      kernel.multiply(plan, weight, panel, first, std::min(first + tiles_per_task, tiles), panel_output);
    });
  }
}

constexpr ort::ElementType input_type(Real type, size_t index) {
  switch (index) {
    case kA:
      return static_cast<ort::ElementType>(type);
    case kB:
    case kZeroPoints:
      return ort::kUint8;
    case kPlan:
      return ort::kInt64;
    default:
      return ort::kFloat;
  }
}

void compute(const MatMulKernel& self, OrtKernelContext* context) {
  const OrtApi* api = self.api;
  size_t count = 0;
  check(ort::KernelContextGetInputCount::call(api, context, &count));
  if (count != kInputs) throw Refused{"the node has " + std::to_string(count) + " inputs, needed 7"};
  Tensor inputs[kInputs];
  for (size_t i = 0; i < kInputs; ++i) {
    inputs[i] = read_input(api, context, i, kInputNames[i]);
    if (inputs[i].type != input_type(self.type, i)) {
      throw Refused{std::string(kInputNames[i]) + " has element type " + std::to_string(inputs[i].type) +
                    ", needed " + std::to_string(input_type(self.type, i))};
    }
  }

  const Plan plan = read_plan(inputs[kPlan]);
  const Tensor& a = inputs[kA];
  if (a.shape.empty() || a.shape.back() != plan.k) {
    throw Refused{"A has shape " + text_of(a.shape) + ", needed [..., " + std::to_string(plan.k) + "]"};
  }
  const Weight weight = read_weight(inputs, plan);
  const int64_t rows = count_rows(a);

  std::vector<int64_t> shape = a.shape;
  shape.back() = weight.n;
  OrtValue* output = nullptr;
  check(ort::KernelContextGetOutput::call(api, context, 0, shape.data(), shape.size(), &output));
  if (output == nullptr || rows == 0 || weight.n == 0) return;
  void* y = nullptr;
  check(ort::GetTensorMutableData::call(api, output, &y));

  const MatMulVariant* variant = chosen_by_test.load(std::memory_order_relaxed);
  if (variant == nullptr) variant = &machine_variant();
  run(api, context, variant->kernel, plan, weight, a.data, rows, {y, self.type, self.precision});
}

MatMulKernel* create(const MatMulOp& op, const OrtApi* api, const OrtKernelInfo* info) {
  auto kernel = std::make_unique<MatMulKernel>();
  kernel->api = api;
  kernel->type = op.type;
  kernel->who = "msd.MatMul (node '" + node_name(api, info) + "')";
  try {
    const std::string layout = string_attribute(api, info, "layout");
    if (layout != kLayout) {
      throw Refused{kernel->who + ": the weight has layout '" + layout + "', this library reads '" + kLayout + "'"};
    }
  } catch (const RuntimeFailed& absent) {
    ort::ReleaseStatus::call(api, absent.status);
    throw Refused{kernel->who + ": attribute layout is absent, needed '" + kLayout + "'"};
  }
  int64_t dtype = 0;
  if (OrtStatus* absent = ort::KernelInfoGetAttributeInt64::call(api, info, "output_dtype", &dtype)) {
    ort::ReleaseStatus::call(api, absent);
    throw Refused{kernel->who + ": attribute output_dtype is absent, needed A's element type"};
  }
  // The runtime may run a float16 node in float, between casts of its own that it may then drop. The float kernel
  // rounds as the node says, so the values stay those of the function body.
  const bool is_known = dtype == static_cast<int64_t>(Real::kFloat) || dtype == static_cast<int64_t>(Real::kHalf) ||
                        dtype == static_cast<int64_t>(Real::kBfloat16);
  if (dtype != static_cast<int64_t>(op.type) && !(op.type == Real::kFloat && is_known)) {
    throw Refused{kernel->who + ": output_dtype is " + std::to_string(dtype) + ", needed A's element type, " +
                  std::to_string(static_cast<int>(op.type))};
  }
  kernel->precision = static_cast<Real>(dtype);
  machine_variant();  // throws now, when the session is made, if MSD_ISA asks for what is not there
  return kernel.release();
}

// The output's shape, where it can be said in full: an unnamed unknown dimension could only be stated as a number.
void infer_shape(const OrtApi* api, const OrtShapeInferContext* context) {
  SymbolicShape shape = read_symbolic_shape(api, context, kA);  // its type is Y's
  const SymbolicShape bias = read_symbolic_shape(api, context, kBias);
  if (shape.dims.empty() || bias.dims.size() != 1) return;
  shape.dims.back() = bias.dims[0];
  shape.names.back() = bias.names[0];
  for (size_t i = 0; i < shape.dims.size(); ++i) {
    if (shape.dims[i] < 0 && shape.names[i].empty()) return;
  }
  set_symbolic_shape(api, context, 0, shape);
}

const MatMulOp& self(const OrtCustomOp* op) { return *static_cast<const MatMulOp*>(op); }

MatMulOp make_op(const OrtApi* api, Real type) {
  MatMulOp op{};
  op.version = ort::kApiVersion;
  op.api = api;
  op.type = type;
  op.GetName = [](const OrtCustomOp*) { return "MatMul"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return static_cast<const char*>(nullptr); };  // the CPU
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
  op.GetInputType = [](const OrtCustomOp* o, size_t index) { return input_type(self(o).type, index); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetOutputType = [](const OrtCustomOp* o, size_t) { return input_type(self(o).type, kA); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* a, const OrtKernelInfo* info, void** kernel) {
    *kernel = nullptr;
    return guarded(a, [&] { *kernel = create(self(o), a, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& k = *static_cast<const MatMulKernel*>(kernel);
    return guarded(k.api, [&] {
      try {
        compute(k, context);
      } catch (const Refused& refused) {
        throw Refused{k.who + ": " + refused.text};
      }
    });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<MatMulKernel*>(kernel); };
  op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
    // Some runtimes drop the status unread. A shape is a help, never a need: say nothing and release it here.
    const OrtApi* a = self(o).api;
    if (OrtStatus* status = guarded(a, [&] { infer_shape(a, context); })) ort::ReleaseStatus::call(a, status);
    return static_cast<OrtStatus*>(nullptr);
  };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> matmul_ops(const OrtApi* api) {
  std::vector<const OrtCustomOp*> ops;
  for (const Real type : {Real::kFloat, Real::kHalf, Real::kBfloat16}) ops.push_back(new MatMulOp(make_op(api, type)));
  return ops;
}

}  // namespace msd

// For tests: the variants of msd.MatMul that this machine runs, fastest first, separated by blanks.
MSD_EXPORT const char* msd_matmul_variants() {
  try {
    static const std::string names = msd::variant_names();
    return names.c_str();
  } catch (...) {
    return "";
  }
}

// For tests: makes the calls that follow, of every session, run the variant; an empty name the machine's own.
// Returns 1, or 0 if there is no such variant.
MSD_EXPORT int msd_matmul_select(const char* name) {
  try {
    const bool reset = *name == '\0';
    const msd::MatMulVariant* variant = reset ? nullptr : msd::variant_called(name);
    if (!reset && variant == nullptr) return 0;
    msd::chosen_by_test.store(variant, std::memory_order_relaxed);
    return 1;
  } catch (...) {
    return 0;
  }
}
