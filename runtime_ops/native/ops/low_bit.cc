#include "low_bit.h"

#include <cstring>

namespace msd::matmul {
namespace {

// Scratch of a panel: large enough that a weight tile, unpacked, serves many rows; small enough for a second cache.
constexpr int64_t kPanelBytes = 1152 * 1024;

// [tiles, groups, 16], [tiles, 1, 16] or, where `may_be_single`, [1, 1, 1].
template <typename T>
Columns<T> read_columns(const Tensor& tensor, const char* name, int64_t tiles, int64_t groups, bool may_be_single) {
  const std::vector<int64_t>& shape = tensor.shape;
  const auto* base = static_cast<const T*>(tensor.data);
  if (may_be_single && shape == std::vector<int64_t>{1, 1, 1}) return {base, 0, 0, true};
  const bool fits =
      shape.size() == 3 && shape[0] == tiles && (shape[1] == groups || shape[1] == 1) && shape[2] == kTile;
  if (!fits) {
    throw Refused{std::string(name) + " has shape " + text_of(shape) + ", needed " +
                  text_of({tiles, groups, kTile}) + ", " + text_of({tiles, 1, kTile}) +
                  (may_be_single ? " or [1, 1, 1]" : "")};
  }
  return {base, shape[1] * kTile, shape[1] == 1 ? 0 : kTile, false};
}

}  // namespace

PlanReader::PlanReader(const Tensor& tensor, int64_t count, const char* names) {
  if (tensor.shape != std::vector<int64_t>{count}) {
    throw Refused{"plan has shape " + text_of(tensor.shape) + ", needed " + text_of({count}) + ": " + names};
  }
  std::memcpy(values_, tensor.data, static_cast<size_t>(count) * sizeof(int64_t));
}

int64_t PlanReader::one_of(size_t index, const char* name, std::initializer_list<int64_t> allowed,
                           const char* needed) const {
  const int64_t value = values_[index];
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return value;
  throw Refused{"plan has " + std::string(name) + " = " + std::to_string(value) + ", needed " + needed};
}

Plan PlanReader::storage(int longest_group) const {
  const auto within = [this](size_t index, const char* name, int64_t most) {
    const int64_t value = values_[index];
    if (value >= 1 && value <= most) return value;
    throw Refused{"plan has " + std::string(name) + " = " + std::to_string(value) + ", needed 1 to " +
                  std::to_string(most)};
  };
  Plan plan{};
  plan.k = within(0, "k", INT32_MAX);
  plan.bits = static_cast<int>(one_of(1, "bits", {2, 4, 8}, "2, 4 or 8"));
  plan.block_size = static_cast<int>(within(2, "block_size", longest_group));
  plan.groups = ceil_div(plan.k, plan.block_size);
  const int line_k = kQuad * (8 / plan.bits);
  plan.lines = static_cast<int>(ceil_div(plan.block_size, line_k));
  plan.stride = static_cast<int>(ceil_div(plan.lines * line_k, 16) * 16);
  return plan;
}

Weight read_weight(const WeightTensors& tensors, const Plan& plan) {
  static constexpr float kNoOffset = 0;
  if (tensors.bias.shape.size() != 1) {
    throw Refused{"bias has shape " + text_of(tensors.bias.shape) + ", needed [N]"};
  }
  Weight weight;
  weight.n = tensors.bias.shape[0];
  const int64_t tiles = ceil_div(weight.n, kTile);
  const std::vector<int64_t> packed = {tiles, plan.groups, plan.lines, kLine};
  if (tensors.b.shape != packed) {
    throw Refused{"B has shape " + text_of(tensors.b.shape) + ", needed " + text_of(packed) + " for K = " +
                  std::to_string(plan.k) + ", N = " + std::to_string(weight.n) + ", " + std::to_string(plan.bits) +
                  " bits and groups of " + std::to_string(plan.block_size)};
  }
  weight.b = static_cast<const uint8_t*>(tensors.b.data);
  weight.scales = read_columns<float>(tensors.scales, "scales", tiles, plan.groups, false);
  weight.zero_points = read_columns<uint8_t>(tensors.zero_points, "zero_points", tiles, plan.groups, true);
  weight.offsets = {&kNoOffset, 0, 0, true};
  if (tensors.offsets != nullptr) {
    weight.offsets = read_columns<float>(*tensors.offsets, "offsets", tiles, plan.groups, true);
  }
  weight.has_offsets = !(weight.offsets.single && weight.offsets.base[0] == 0.0f);
  weight.bias = static_cast<const float*>(tensors.bias.data);
  return weight;
}

int64_t count_rows(const Tensor& a, const Plan& plan) {
  if (a.shape.empty() || a.shape.back() != plan.k) {
    throw Refused{"A has shape " + text_of(a.shape) + ", needed [..., " + std::to_string(plan.k) + "]"};
  }
  const auto last = a.shape.end() - 1;
  if (std::find(a.shape.begin(), last, 0) != last) return 0;  // the others may be anything, also in product
  int64_t rows = 1;
  for (auto dim = a.shape.begin(); dim != last; ++dim) {
    if (*dim < 0 || *dim > INT64_MAX / rows) throw Refused{"A has shape " + text_of(a.shape) + ", which is too large"};
    rows *= *dim;
  }
  return rows;
}

void* make_output(const OrtApi* api, OrtKernelContext* context, const Tensor& a, int64_t n, int64_t rows) {
  std::vector<int64_t> shape = a.shape;
  shape.back() = n;
  OrtValue* output = nullptr;
  check(ort::KernelContextGetOutput::call(api, context, 0, shape.data(), shape.size(), &output));
  if (output == nullptr || rows == 0 || n == 0) return nullptr;
  void* y = nullptr;
  check(ort::GetTensorMutableData::call(api, output, &y));
  return y;
}

void infer_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t bias_index, ort::ElementType type) {
  SymbolicShape shape = read_symbolic_shape(api, context, 0);
  const SymbolicShape bias = read_symbolic_shape(api, context, bias_index);
  if (shape.dims.empty() || bias.dims.size() != 1) return;
  if (type != ort::kUndefined) shape.type = type;
  shape.dims.back() = bias.dims[0];
  shape.names.back() = bias.names[0];
  state_shape(api, context, 0, shape);
}

PanelLayout::PanelLayout(const Plan& plan, int64_t rows) {
  const int64_t planes = plan.terms == 3 ? 2 : 1;
  const int64_t cells = plan.groups * rows;
  const auto aligned = [](int64_t size) { return (size + 63) / 64 * 64; };
  codes = 0;
  sums = codes + aligned(planes * cells * plan.stride * int64_t{sizeof(int16_t)});
  scales = sums + aligned(planes * cells * int64_t{sizeof(int32_t)});
  bytes = scales + aligned(cells * int64_t{sizeof(double)});
}

int64_t rows_of_panel(const Plan& plan, int64_t rows) {
  if (rows == 0) return 1;
  const int64_t most = std::clamp<int64_t>(kPanelBytes / PanelLayout(plan, 1).bytes, 1, kMostRows);
  const int64_t even = ceil_div(rows, ceil_div(rows, most));
  return std::min(ceil_div(even, 4) * 4, std::min(rows, most));
}

}  // namespace msd::matmul
