#include "op.h"

#include <cstring>

namespace msd {
namespace {

// Releases what the runtime lent, also when a later call throws.
class TypeAndShape {
 public:
  explicit TypeAndShape(const OrtApi* api) : api_(api) {}
  ~TypeAndShape() {
    if (info_ != nullptr) ort::ReleaseTensorTypeAndShapeInfo::call(api_, info_);
  }
  TypeAndShape(const TypeAndShape&) = delete;
  TypeAndShape& operator=(const TypeAndShape&) = delete;
  OrtTensorTypeAndShapeInfo** out() { return &info_; }
  OrtTensorTypeAndShapeInfo* get() const { return info_; }

 private:
  const OrtApi* api_;
  OrtTensorTypeAndShapeInfo* info_ = nullptr;
};

std::vector<int64_t> dimensions(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(ort::GetDimensionsCount::call(api, info, &rank));
  std::vector<int64_t> dims(rank);
  if (rank > 0) check(ort::GetDimensions::call(api, info, dims.data(), rank));
  return dims;
}

size_t size_of(ort::ElementType type) {
  switch (type) {
    case ort::kUint16:
    case ort::kInt16:
    case ort::kFloat16:
    case ort::kBfloat16:
      return 2;
    case ort::kFloat:
      return 4;
    case ort::kInt64:
      return 8;
    default:
      return 1;
  }
}

void align(Tensor& tensor) {
  const size_t size = size_of(tensor.type);
  if (reinterpret_cast<uintptr_t>(tensor.data) % size == 0) return;
  size_t bytes = size;
  for (const int64_t dim : tensor.shape) bytes *= static_cast<size_t>(dim);
  tensor.copy.reset(new char[bytes]);
  std::memcpy(tensor.copy.get(), tensor.data, bytes);
  tensor.data = tensor.copy.get();
}

class Scratch {
 public:
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

}  // namespace

Tensor read_input(const OrtApi* api, const OrtKernelContext* context, size_t index, const std::string& name) {
  const OrtValue* value = nullptr;
  check(ort::KernelContextGetInput::call(api, context, index, &value));
  if (value == nullptr) throw Refused{name + " is absent, needed a tensor"};
  Tensor tensor;
  TypeAndShape info(api);
  check(ort::GetTensorTypeAndShape::call(api, value, info.out()));
  check(ort::GetTensorElementType::call(api, info.get(), &tensor.type));
  tensor.shape = dimensions(api, info.get());
  void* data = nullptr;
  check(ort::GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  align(tensor);
  return tensor;
}

SymbolicShape read_symbolic_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own, not to be released
  check(ort::ShapeInferContextGetInputTypeShape::call(api, context, index, &info));
  SymbolicShape shape;
  check(ort::GetTensorElementType::call(api, info, &shape.type));
  shape.dims = dimensions(api, info);
  std::vector<const char*> names(shape.dims.size(), nullptr);
  if (!names.empty()) check(ort::GetSymbolicDimensions::call(api, info, names.data(), names.size()));
  for (const char* name : names) shape.names.emplace_back(name == nullptr ? "" : name);
  return shape;
}

void state_shape(const OrtApi* api, const OrtShapeInferContext* context, size_t index, const SymbolicShape& shape) {
  for (size_t i = 0; i < shape.dims.size(); ++i) {
    if (shape.dims[i] < 0 && shape.names[i].empty()) return;
  }
  TypeAndShape info(api);
  check(ort::CreateTensorTypeAndShapeInfo::call(api, info.out()));
  check(ort::SetTensorElementType::call(api, info.get(), shape.type));  // overrides what the runtime inferred
  check(ort::SetDimensions::call(api, info.get(), shape.dims.data(), shape.dims.size()));
  std::vector<const char*> names;
  for (const std::string& name : shape.names) names.push_back(name.c_str());
  check(ort::SetSymbolicDimensions::call(api, info.get(), names.data(), names.size()));
  check(ort::ShapeInferContextSetOutputTypeShape::call(api, context, index, info.get()));
}

std::string string_attribute(const OrtApi* api, const OrtKernelInfo* info, const std::string& who, const char* name,
                             const std::string& needed) {
  size_t size = 0;
  if (OrtStatus* absent = ort::KernelInfoGetAttributeString::call(api, info, name, nullptr, &size)) {
    ort::ReleaseStatus::call(api, absent);
    throw Refused{who + ": attribute " + name + " is absent, needed " + needed};
  }
  std::string value(size, '\0');
  if (size > 0) check(ort::KernelInfoGetAttributeString::call(api, info, name, value.data(), &size));
  value.resize(value.find('\0') == std::string::npos ? value.size() : value.find('\0'));
  return value;
}

void check_layout(const OrtApi* api, const OrtKernelInfo* info, const std::string& who, const char* holder,
                  const std::string& layout) {
  const std::string found = string_attribute(api, info, who, "layout", "'" + layout + "'");
  if (found != layout) {
    throw Refused{who + ": " + holder + " has layout '" + found + "', this library reads '" + layout + "'"};
  }
}

std::string node_name(const OrtApi* api, const OrtKernelInfo* info) {
  size_t size = 0;
  check(ort::KernelInfoGetNodeName::call(api, info, nullptr, &size));
  std::string name(size, '\0');
  if (size > 0) check(ort::KernelInfoGetNodeName::call(api, info, name.data(), &size));
  name.resize(name.find('\0') == std::string::npos ? name.size() : name.find('\0'));
  return name;
}

void set_defaults(OrtCustomOp& op) {
  op.version = ort::kApiVersion;
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return static_cast<const char*>(nullptr); };  // the CPU
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
}

char* thread_scratch(int64_t bytes) {
  thread_local Scratch scratch;
  return scratch.reserve(static_cast<size_t>(bytes));
}

Real read_precision(const OrtApi* api, const OrtKernelInfo* info, const std::string& who, Real type,
                    const char* input) {
  int64_t dtype = 0;
  if (OrtStatus* absent = ort::KernelInfoGetAttributeInt64::call(api, info, "output_dtype", &dtype)) {
    ort::ReleaseStatus::call(api, absent);
    throw Refused{who + ": attribute output_dtype is absent, needed " + input + "'s element type"};
  }
  const bool is_known = dtype == static_cast<int64_t>(Real::kFloat) || dtype == static_cast<int64_t>(Real::kHalf) ||
                        dtype == static_cast<int64_t>(Real::kBfloat16);
  if (dtype != static_cast<int64_t>(type) && !(type == Real::kFloat && is_known)) {
    throw Refused{who + ": output_dtype is " + std::to_string(dtype) + ", needed " + input + "'s element type, " +
                  std::to_string(static_cast<int>(type))};
  }
  return static_cast<Real>(dtype);
}

}  // namespace msd
