// msd.MatMul for onnxruntime: reads and checks the tensors, then hands rows to the kernel in panels.
//
// Everything is read at every call and nothing at creation: within an If or Loop body no input is known as a
// constant when the kernel is created. Nothing in a tensor is trusted before its shape is checked.

#include "../kernels/matmul/mx.h"
#include "low_bit.h"

namespace msd {
namespace {

using matmul::Plan;
using matmul::Weight;

enum Input : size_t { kA, kB, kScales, kZeroPoints, kOffsets, kBias, kPlan, kInputs };
constexpr const char* kInputNames[kInputs] = {"A", "B", "scales", "zero_points", "offsets", "bias", "plan"};

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

Plan read_plan(const Tensor& tensor) {
  const matmul::PlanReader reader(tensor, 7, "k, bits, block_size, terms, per_row, codebook, activation");
  Plan plan = reader.storage(matmul::kLongestGroup);
  plan.terms = static_cast<int>(reader.one_of(3, "terms", {1, 2, 3}, "1, 2 or 3"));
  plan.per_row = reader.one_of(4, "per_row", {0, 1}, "0 or 1") == 1;
  const int64_t codebook = reader.one_of(5, "codebook", {0, 1}, "0 or 1");
  if (codebook != 0 && plan.bits != 4) {
    throw Refused{"plan has codebook = 1 with " + std::to_string(plan.bits) + " bits, needed 4"};
  }
  plan.codebook = static_cast<matmul::Codebook>(codebook);
  const int64_t activation = reader.one_of(6, "activation", {0, 1, 2, 3, 4, 5}, "0 to 5");
  plan.activation = static_cast<matmul::ActivationFormat>(activation);
  if (plan.activation == matmul::ActivationFormat::kInt8) return plan;
  // Codes of 8 bits fit one plane; those of MXFP8 have 19.
  const int terms = plan.activation == matmul::ActivationFormat::kMxfp8 ? 3 : 1;
  const std::string with = "plan has activation = " + std::to_string(activation) + " with ";
  if (plan.terms != terms) {
    throw Refused{with + "terms = " + std::to_string(plan.terms) + ", needed " + std::to_string(terms)};
  }
  if (plan.per_row) throw Refused{with + "per_row = 1, needed 0"};
  return plan;
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
  Tensor inputs[kInputs];
  read_inputs(api, context, kInputNames, kInputs, [&](size_t i) { return input_type(self.type, i); }, inputs);
  const Tensor& a = inputs[kA];
  const Plan plan = read_plan(inputs[kPlan]);
  const int64_t rows = matmul::count_rows(a, plan);
  const Weight weight = matmul::read_weight(
      {inputs[kB], inputs[kScales], inputs[kZeroPoints], &inputs[kOffsets], inputs[kBias]}, plan);
  void* y = matmul::make_output(api, context, a, weight.n, rows);
  if (y == nullptr) return;

  const matmul::Kernel& kernel = chosen(matmul::kVariants);
  const int64_t row_bytes = plan.k * (self.type == Real::kFloat ? 4 : 2);
  const int64_t panel_rows = matmul::rows_of_panel(plan, rows);
  const int64_t panel_bytes = matmul::PanelLayout(plan, panel_rows).bytes;
  const int64_t natural_bytes = panel_rows * matmul::natural_codes(plan) * int64_t{sizeof(int16_t)};
  char* scratch = thread_scratch(panel_bytes + natural_bytes);
  auto* natural = reinterpret_cast<int16_t*>(scratch + panel_bytes);
  matmul::multiply_rows(api, context, kernel, plan, weight, rows, {y, self.type, self.precision}, {}, scratch,
                        [&](const matmul::Panel& panel, int64_t row, int64_t first, int64_t last) {
                          const char* a_panel = static_cast<const char*>(a.data) + row * row_bytes;
                          if (natural_bytes == 0) {
                            kernel.decompose(plan, a_panel, self.type, panel, first, last);
                          } else {
                            matmul::decompose_mx(plan, kernel.load_codes, a_panel, self.type, natural, panel, first,
                                                 last);
                          }
                        });
}

std::unique_ptr<MatMulKernel> create(const MatMulOp& op, const OrtApi* api, const OrtKernelInfo* info) {
  auto kernel = std::make_unique<MatMulKernel>();
  kernel->api = api;
  kernel->type = op.type;
  kernel->who = "msd.MatMul (node '" + node_name(api, info) + "')";
  check_layout(api, info, kernel->who, "the weight", matmul::kLayout);
  kernel->precision = read_precision(api, info, kernel->who, op.type, "A");
  return kernel;
}

const MatMulOp& self(const OrtCustomOp* op) { return *static_cast<const MatMulOp*>(op); }

MatMulOp make_op(const OrtApi* api, Real type) {
  MatMulOp op{};
  set_defaults(op);
  op.api = api;
  op.type = type;
  op.GetName = [](const OrtCustomOp*) { return "MatMul"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return size_t{kInputs}; };
  op.GetInputType = [](const OrtCustomOp* o, size_t index) { return input_type(self(o).type, index); };
  op.GetOutputType = [](const OrtCustomOp* o, size_t) { return input_type(self(o).type, kA); };
  set_kernel<MatMulOp, MatMulKernel, create, compute>(op);
  op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
    // A's type as inferred: the runtime may be about to widen a float16 node.
    const OrtApi* a = self(o).api;
    return infer_quietly(a, [&] { matmul::infer_shape(a, context, kBias, ort::kUndefined); });
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
