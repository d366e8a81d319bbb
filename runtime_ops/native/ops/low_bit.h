// What the ops that multiply a stored low-bit weight share: how they read it, and the way of rows through a kernel.
#pragma once

#include <algorithm>

#include "../kernels/matmul/kernel.h"
#include "op.h"

namespace msd::matmul {

inline constexpr const char* kLayout = "n16k4/1";

// The inputs that a stored weight consists of.
struct WeightTensors {
  const Tensor& b;
  const Tensor& scales;
  const Tensor& zero_points;
  const Tensor* offsets;  // null: 0 everywhere
  const Tensor& bias;
};

// The numbers of a plan, checked one by one; the first three, the weight's storage, are read by `storage`.
class PlanReader {
 public:
  // `count` numbers; `names` is what they are, for the error: "k, bits, block_size, code_bits, signed".
  PlanReader(const Tensor& tensor, int64_t count, const char* names);
  Plan storage(int longest_group) const;
  // Number `index`, if it is one of those `allowed` (0 stands for itself only where listed).
  int64_t one_of(size_t index, const char* name, std::initializer_list<int64_t> allowed, const char* needed) const;

 private:
  static constexpr int64_t kMost = 7;
  int64_t values_[kMost];
};

// Throws Refused unless the shapes fit together.
Weight read_weight(const WeightTensors& tensors, const Plan& plan);

// Rows of A, all its dimensions but the last, which must be the plan's k.
int64_t count_rows(const Tensor& a, const Plan& plan);

// Makes output 0, [..., N] like A; null if there is nothing to compute.
void* make_output(const OrtApi* api, OrtKernelContext* context, const Tensor& a, int64_t n, int64_t rows);

// States the output's shape: A's with N, the length of input `bias`, for K. Its type is `type`, or A's for kUndefined.
void infer_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t bias, ort::ElementType type);

// Scratch of a panel and where its parts lie.
struct PanelLayout {
  PanelLayout(const Plan& plan, int64_t rows);
  int64_t codes, sums, scales, bytes;
};

// Rows of a panel. Equal panels: a short last one would read the whole weight for few rows. Kernels take rows by fours.
int64_t rows_of_panel(const Plan& plan, int64_t rows);

// Multiplications below which a task costs more to hand out than to do.
constexpr int64_t kSmallestTask = 1 << 18;

// Computes all rows, a panel at a time. `fill(panel, row, first, last)` writes codes of rows [first, last) of the panel
// that begins at `row`; `panel` has what does not depend on the row set. `scratch` has PanelLayout's bytes.
template <typename Fill>
void multiply_rows(const OrtApi* api, const OrtKernelContext* context, const Kernel& kernel, const Plan& plan,
                   const Weight& weight, int64_t rows, const Output& output, Panel panel, char* scratch,
                   const Fill& fill) {
  const int64_t panel_rows = rows_of_panel(plan, rows);
  const PanelLayout layout(plan, panel_rows);
  panel.codes = reinterpret_cast<int16_t*>(scratch + layout.codes);
  panel.sums = reinterpret_cast<int32_t*>(scratch + layout.sums);
  panel.scales = reinterpret_cast<float*>(scratch + layout.scales);
  panel.scales64 = reinterpret_cast<double*>(scratch + layout.scales);
  const int64_t tiles = ceil_div(weight.n, kTile);
  const int64_t size = output.type == Real::kFloat ? 4 : 2;

  for (int64_t row = 0; row < rows; row += panel_rows) {
    panel.rows = std::min(panel_rows, rows - row);
    Output panel_output = output;
    panel_output.y = static_cast<char*>(output.y) + row * weight.n * size;

    // A code costs about as much as 16 multiplications.
    const int64_t rows_per_task = std::clamp<int64_t>(kSmallestTask / (16 * plan.k), 1, panel.rows);
    parallel_for(api, context, static_cast<size_t>(ceil_div(panel.rows, rows_per_task)), [&](size_t task) noexcept {
      const int64_t first = static_cast<int64_t>(task) * rows_per_task;
      fill(panel, row, first, std::min(first + rows_per_task, panel.rows));
    });
    const int64_t worthwhile = kSmallestTask / (plan.k * kTile * panel.rows);
    const int64_t tiles_per_task = std::max<int64_t>(ceil_div(worthwhile, kTilesTogether), 1) * kTilesTogether;
    parallel_for(api, context, static_cast<size_t>(ceil_div(tiles, tiles_per_task)), [&](size_t task) noexcept {
      const int64_t first = static_cast<int64_t>(task) * tiles_per_task;
      kernel.multiply(plan, weight, panel, first, std::min(first + tiles_per_task, tiles), panel_output);
    });
  }
}

}  // namespace msd::matmul
