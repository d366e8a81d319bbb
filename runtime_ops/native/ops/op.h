// What every op shares: errors that become an OrtStatus, checked calls, tensors as plain values.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/real.h"
#include "../ort_abi.h"
#include "isa.h"

namespace msd {

// A mistake in the model or its inputs; the text is one sentence: what was found, what was needed.
struct Refused {
  std::string text;
};

// A call of the runtime failed with this status, which is the holder's to pass on.
struct RuntimeFailed {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw RuntimeFailed{status};
}

// Runs `work`; whatever it throws becomes a status, for no exception may cross into the runtime.
template <typename Work>
OrtStatus* guarded(const OrtApi* api, const Work& work) noexcept {
  const auto failed = [api](ort::ErrorCode code, const char* text) { return ort::CreateStatus::call(api, code, text); };
  try {
    work();
    return nullptr;
  } catch (const Refused& refused) {
    return failed(ort::kInvalidArgument, refused.text.c_str());
  } catch (const RuntimeFailed& runtime) {
    return runtime.status;
  } catch (const std::bad_alloc&) {
    return failed(ort::kFail, "msd: out of memory");
  } catch (const std::exception& error) {
    return failed(ort::kFail, error.what());
  } catch (...) {
    return failed(ort::kFail, "msd: unknown failure");
  }
}

// "[2, 3, 64]"
inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

// An input of a running node. Its memory is the runtime's, or `copy`.
struct Tensor {
  ort::ElementType type;
  std::vector<int64_t> shape;
  const void* data;              // aligned for its type, and for no more than that
  std::unique_ptr<char[]> copy;  // where the runtime's memory is not: an array or a data file may begin at any byte
};

// Throws Refused if input `index` is absent.
Tensor read_input(const OrtApi* api, const OrtKernelContext* context, size_t index, const std::string& name);

// Type and shape as shape inference sees them; an unknown rank reads as 0.
struct SymbolicShape {
  ort::ElementType type;
  std::vector<int64_t> dims;       // -1: not a number
  std::vector<std::string> names;  // of the symbol, empty for a number and for a dimension nothing is known of
};
SymbolicShape read_symbolic_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t index);

// States an output's shape if it can be said in full: an unnamed unknown dimension could only be stated as a number.
void state_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t index, const SymbolicShape& shape);

// Attribute of a node being created; throws Refused, with `needed`, if it is absent.
std::string string_attribute(const OrtApi* api, const OrtKernelInfo* info, const std::string& who, const char* name,
                             const std::string& needed);

// Throws Refused unless the node's attribute `layout`, of what `holder` is ("the weight"), is the one that kernels read.
void check_layout(const OrtApi* api, const OrtKernelInfo* info, const std::string& who, const char* holder,
                  const std::string& layout);

std::string node_name(const OrtApi* api, const OrtKernelInfo* info);

// The node's attribute output_dtype, type of its first output and of the input called `input`. Throws Refused if it is
// absent, or not `type`, the kernel's. But the runtime may run a float16 node in float, between casts of its own that it
// may then drop: the float kernel takes any type and rounds as the node says, so the values stay those of the body.
Real read_precision(const OrtApi* api, const OrtKernelInfo* info, const std::string& who, Real type, const char* input);

// Calls work(i) for i in [0, count) on the session's threads; `work` must not throw.
template <typename Work>
void parallel_for(const OrtApi* api, const OrtKernelContext* context, size_t count, const Work& work) {
  if (count <= 1) {
    if (count == 1) work(size_t{0});
    return;
  }
  const auto call = [](void* user, size_t i) { (*static_cast<const Work*>(user))(i); };
  check(ort::KernelContextParallelFor::call(api, context, call, count, 0,
                                            const_cast<void*>(static_cast<const void*>(&work))));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// Scratch of the calling thread, kept for its next call: `bytes`, aligned to a line of the cache.
char* thread_scratch(int64_t bytes);

// Fills in what all ops have alike: every input and output required, on the CPU, versions 1 and up.
void set_defaults(OrtCustomOp& op);

// Runs an op's compute; what it refuses is said with the node's name, `who`, before it.
template <typename Work>
OrtStatus* computed(const OrtApi* api, const std::string& who, const Work& work) noexcept {
  return guarded(api, [&] {
    try {
      work();
    } catch (const Refused& refused) {
      throw Refused{who + ": " + refused.text};
    }
  });
}

// Infers shapes by `work`, for an op's InferOutputShapeFn. Some runtimes drop the status unread; a shape is a help, never
// a need, so a failure is released here and none returned.
template <typename Work>
OrtStatus* infer_quietly(const OrtApi* api, const Work& work) noexcept {
  if (OrtStatus* status = guarded(api, work)) ort::ReleaseStatus::call(api, status);
  return nullptr;
}

// Fills in how an op's kernels are made, run and destroyed. `kCreate(const Op&, api, info)` returns a unique_ptr to a
// Kernel, which has members `api` and `who`; `kCompute(kernel, context)` runs it. Both may throw.
template <typename Op, typename Kernel, auto kCreate, auto kCompute>
void set_kernel(OrtCustomOp& op) {
  op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    *kernel = nullptr;
    return guarded(api, [&] {
      std::unique_ptr<Kernel> made = kCreate(*static_cast<const Op*>(o), api, info);
      isa_limit();  // throws now, when the session is made, if MSD_ISA asks for what is not there
      *kernel = made.release();
    });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& k = *static_cast<const Kernel*>(kernel);
    return computed(k.api, k.who, [&] { kCompute(k, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

// Reads the inputs of a running node. Throws Refused unless there are `count`, each of the type that `type_of(i)` says.
template <typename TypeOf>
void read_inputs(const OrtApi* api, const OrtKernelContext* context, const char* const* names, size_t count,
                 const TypeOf& type_of, Tensor* inputs) {
  size_t found = 0;
  check(ort::KernelContextGetInputCount::call(api, context, &found));
  if (found != count) {
    throw Refused{"the node has " + std::to_string(found) + " inputs, needed " + std::to_string(count)};
  }
  for (size_t i = 0; i < count; ++i) {
    inputs[i] = read_input(api, context, i, names[i]);
    if (inputs[i].type != type_of(i)) {
      throw Refused{std::string(names[i]) + " has element type " + std::to_string(inputs[i].type) + ", needed " +
                    std::to_string(type_of(i))};
    }
  }
}

// The OrtCustomOps of each op, one per element type, for a runtime. They live as long as the process.
std::vector<const OrtCustomOp*> matmul_ops(const OrtApi* api);
std::vector<const OrtCustomOp*> matmul_integer_to_float_ops(const OrtApi* api);
std::vector<const OrtCustomOp*> attention_ops(const OrtApi* api);

}  // namespace msd
