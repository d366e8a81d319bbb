// msd.MatMulIntegerToFloat for onnxruntime: as msd.MatMul, but the activation comes as codes with a scale and zero point.

#include "low_bit.h"

namespace msd {
namespace {

using matmul::Codes;
using matmul::CodeType;
using matmul::Panel;
using matmul::PanelLayout;
using matmul::Plan;
using matmul::Weight;

enum Input : size_t { kA, kAScale, kAZeroPoint, kB, kScales, kZeroPoints, kBias, kPlan, kInputs };
constexpr const char* kInputNames[kInputs] = {"A",      "a_scale",     "a_zero_point", "B",
                                              "scales", "zero_points", "bias",         "plan"};
constexpr int kLongestGroup = 128;      // of given codes: 128 products of 17 bits and |w - z| <= 255 fit int32
constexpr int64_t kLongestSum = 32768;  // K of one scale: so many products of bytes fit the body's int32

// An op of the runtime's table, for one type of codes.
struct CodesOp : OrtCustomOp {
  const OrtApi* api;
  CodeType type;
};

struct CodesKernel {
  const OrtApi* api;
  CodeType type;
  std::string who;  // "msd.MatMulIntegerToFloat (node '/fc1/MatMul')"
};

bool is_wide(CodeType type) { return type == CodeType::kUint16 || type == CodeType::kInt16; }
bool is_signed(CodeType type) { return type == CodeType::kInt8 || type == CodeType::kInt16; }

Plan read_plan(const Tensor& tensor, CodeType type) {
  const matmul::PlanReader reader(tensor, 5, "k, bits, block_size, code_bits, signed");
  Plan plan = reader.storage(kLongestGroup);
  reader.one_of(3, "code_bits", {is_wide(type) ? 16 : 8}, is_wide(type) ? "16, A's width" : "8, A's width");
  reader.one_of(4, "signed", {is_signed(type) ? 1 : 0}, is_signed(type) ? "1, as A is" : "0, as A is");
  plan.terms = 2;  // one plane of int16 codes, sums in float
  return plan;
}

constexpr ort::ElementType input_type(CodeType type, size_t index) {
  switch (index) {
    case kA:
    case kAZeroPoint:
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

void check_single(const Tensor& tensor, const char* name) {
  const bool is_single = std::all_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t dim) { return dim == 1; });
  if (!is_single) throw Refused{std::string(name) + " has shape " + text_of(tensor.shape) + ", needed one value"};
}

// One scale for all K: so must be the zero points, and K must not be longer than the function body's sums.
void check_one_sum(const Plan& plan, const Weight& weight) {
  if (plan.k > kLongestSum) {
    throw Refused{"scales has one group for K = " + std::to_string(plan.k) + ", needed K up to " +
                  std::to_string(kLongestSum) + " or a scale per group"};
  }
  if (weight.zero_points.per_group != 0) {
    throw Refused{"zero_points differ between groups where scales do not, needed one group of both"};
  }
}

int32_t value_of(const Tensor& tensor, CodeType type) {
  switch (type) {
    case CodeType::kUint8:
      return *static_cast<const uint8_t*>(tensor.data);
    case CodeType::kInt8:
      return *static_cast<const int8_t*>(tensor.data);
    case CodeType::kUint16:
      return *static_cast<const uint16_t*>(tensor.data);
    default:
      return *static_cast<const int16_t*>(tensor.data);
  }
}

// A row of ones in the kernel's order, after the panel in scratch.
struct Ones {
  Ones(const Plan& plan, int64_t start) : layout(plan, 1), at(start), values(start + layout.bytes) {
    bytes = values + plan.k;
  }

  // Writes them, and says so to `panel`.
  void fill(const matmul::Kernel& kernel, const Plan& plan, char* scratch, Panel& panel) const {
    Panel row{};
    row.rows = 1;
    row.codes = reinterpret_cast<int16_t*>(scratch + at + layout.codes);
    row.sums = reinterpret_cast<int32_t*>(scratch + at + layout.sums);
    std::fill_n(scratch + values, plan.k, char{1});
    kernel.load_codes(plan, {scratch + values, CodeType::kUint8, 0}, row, 0, 1);
    panel.ones = row.codes;
    panel.ones_sums = row.sums;
  }

  PanelLayout layout;
  int64_t at, values, bytes;
};

void compute(const CodesKernel& self, OrtKernelContext* context) {
  const OrtApi* api = self.api;
  Tensor inputs[kInputs];
  read_inputs(api, context, kInputNames, kInputs, [&](size_t i) { return input_type(self.type, i); }, inputs);
  const Tensor& a = inputs[kA];
  for (const Input input : {kAScale, kAZeroPoint}) check_single(inputs[input], kInputNames[input]);
  Plan plan = read_plan(inputs[kPlan], self.type);
  const int64_t rows = matmul::count_rows(a, plan);
  const Weight weight =
      matmul::read_weight({inputs[kB], inputs[kScales], inputs[kZeroPoints], nullptr, inputs[kBias]}, plan);
  plan.is_one_sum = inputs[kScales].shape[1] == 1;
  if (plan.is_one_sum) check_one_sum(plan, weight);
  void* y = matmul::make_output(api, context, a, weight.n, rows);
  if (y == nullptr) return;

  // 8-bit codes less their zero point fit int16. 16-bit codes do less a constant; the shift makes up for the rest.
  const int32_t zero_point = value_of(inputs[kAZeroPoint], self.type);
  const int32_t center = !is_wide(self.type) ? zero_point : is_signed(self.type) ? 0 : 32768;
  Panel panel{};
  panel.shift = center - zero_point;

  const matmul::Kernel& kernel = chosen(matmul::kVariants);
  const PanelLayout layout(plan, matmul::rows_of_panel(plan, rows));
  const Ones ones(plan, layout.bytes);
  char* scratch = thread_scratch(panel.shift != 0 ? ones.bytes : layout.bytes);
  if (panel.shift != 0) ones.fill(kernel, plan, scratch, panel);
  const int64_t row_bytes = plan.k * (is_wide(self.type) ? 2 : 1);
  const float scale = *static_cast<const float*>(inputs[kAScale].data);
  matmul::multiply_rows(api, context, kernel, plan, weight, rows, {y, Real::kFloat, Real::kFloat},
                        panel, scratch, [&](const Panel& filled, int64_t row, int64_t first, int64_t last) {
                          const char* codes = static_cast<const char*>(a.data) + row * row_bytes;
                          kernel.load_codes(plan, {codes, self.type, center}, filled, first, last);
                          for (int64_t g = 0; g < plan.groups; ++g) {
                            std::fill_n(filled.scales + g * filled.rows + first, last - first, scale);
                          }
                        });
}

std::unique_ptr<CodesKernel> create(const CodesOp& op, const OrtApi* api, const OrtKernelInfo* info) {
  auto kernel = std::make_unique<CodesKernel>();
  kernel->api = api;
  kernel->type = op.type;
  kernel->who = "msd.MatMulIntegerToFloat (node '" + node_name(api, info) + "')";
  check_layout(api, info, kernel->who, "the weight", matmul::kLayout);
  return kernel;
}

const CodesOp& self(const OrtCustomOp* op) { return *static_cast<const CodesOp*>(op); }

CodesOp make_op(const OrtApi* api, CodeType type) {
  CodesOp op{};
  set_defaults(op);
  op.api = api;
  op.type = type;
  op.GetName = [](const OrtCustomOp*) { return "MatMulIntegerToFloat"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t{kInputs}; };
  op.GetInputType = [](const OrtCustomOp* o, size_t index) { return input_type(self(o).type, index); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ort::kFloat; };
  set_kernel<CodesOp, CodesKernel, create, compute>(op);
  op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
    const OrtApi* a = self(o).api;
    return infer_quietly(a, [&] { matmul::infer_shape(a, context, kBias, ort::kFloat); });
  };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> matmul_integer_to_float_ops(const OrtApi* api) {
  std::vector<const OrtCustomOp*> ops;
  for (const CodeType type : {CodeType::kUint8, CodeType::kInt8, CodeType::kUint16, CodeType::kInt16}) {
    ops.push_back(new CodesOp(make_op(api, type)));
  }
  return ops;
}

}  // namespace msd
