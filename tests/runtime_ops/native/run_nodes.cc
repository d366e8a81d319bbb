// A runtime in small: loads the native library and runs nodes read from standard input. For machines where onnxruntime
// is not, such as an emulated one, and for tensors at any address.
//
//   run_nodes LIBRARY ISA < nodes > outputs
//
// A node is an op's name, attributes and inputs; of each the outputs are written, or a refusal: `main` says the order.
// Numbers are int64, names and attributes end with a zero byte.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../../runtime_ops/native/ort_abi.h"

// Where a tensor lies in its pages, behind which comes one that may not be touched.
enum Place : int64_t { kAligned, kAfterOneElement, kAtTheEnd };

struct OrtValue {
  int64_t type;
  std::vector<int64_t> shape;
  int64_t bytes = 0;
  Place place = kAligned;
  char* data = nullptr;

  OrtValue() = default;
  OrtValue(OrtValue&& other) noexcept { *this = std::move(other); }
  OrtValue& operator=(OrtValue&& other) noexcept {
    type = other.type;
    shape = std::move(other.shape);
    bytes = other.bytes;
    place = other.place;
    std::swap(data, other.data);
    std::swap(pages, other.pages);
    std::swap(pages_bytes, other.pages_bytes);
    return *this;
  }
  ~OrtValue() {
    if (pages != nullptr) munmap(pages, pages_bytes);
  }

  // Of `bytes`, which are elements of `element` bytes.
  void reserve(int64_t element) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = static_cast<size_t>(bytes);
    const size_t room = (size + static_cast<size_t>(element) + page - 1) / page * page;
    pages_bytes = room + page;
    void* mapped = mmap(nullptr, pages_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) abort();
    pages = static_cast<char*>(mapped);
    if (mprotect(pages + room, page, PROT_NONE) != 0) abort();
    data = place == kAligned ? pages : place == kAtTheEnd ? pages + room - size : pages + element;
  }

 private:
  char* pages = nullptr;
  size_t pages_bytes = 0;
};

struct OrtStatus {
  std::string text;
};
struct OrtKernelInfo {
  std::map<std::string, std::string> attributes;  // of either type, as text
};
struct OrtKernelContext {
  std::vector<OrtValue> inputs, outputs;
  const OrtCustomOp* op;
};
struct OrtTensorTypeAndShapeInfo {
  const OrtValue* value;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};

namespace {

namespace ort = msd::ort;

int64_t size_of(int64_t type) {
  switch (type) {
    case ort::kFloat:
      return 4;
    case ort::kInt64:
      return 8;
    case ort::kUint8:
    case ort::kInt8:
      return 1;
    default:
      return 2;
  }
}

OrtStatus* fail(const std::string& text) { return new OrtStatus{text}; }

OrtStatus* copy_text(const std::string& text, char* to, size_t* size) {
  const size_t needed = text.size() + 1, room = *size;
  *size = needed;
  if (to == nullptr) return nullptr;
  if (room < needed) return fail("too little room");
  memcpy(to, text.c_str(), needed);
  return nullptr;
}

OrtStatus* find(const OrtKernelInfo* info, const char* name, std::string& found) {
  const auto at = info->attributes.find(name);
  if (at == info->attributes.end()) return fail(std::string("no attribute ") + name);
  found = at->second;
  return nullptr;
}

// Outputs are placed as the first input.
OrtStatus* get_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** output) {
  OrtValue& value = context->outputs[index];
  value.type = context->op->GetOutputType(context->op, index);
  value.shape.assign(dims, dims + rank);
  value.bytes = size_of(value.type);
  for (const int64_t dim : value.shape) value.bytes *= dim;
  value.place = context->inputs[0].place;
  value.reserve(size_of(value.type));
  *output = &value;
  return nullptr;
}

OrtSlot table[300];

// Puts a function into its place of the table, with the signature that place has.
template <int kIndex, typename Result, typename... Arguments>
void offer(ort::Function<kIndex, Result(Arguments...)>,
           std::type_identity_t<Result(MSD_ORT_CALL*)(Arguments...)> function) {
  table[kIndex] = reinterpret_cast<OrtSlot>(function);
}

OrtCustomOpDomain domain;

void fill_table() {
  for (OrtSlot& slot : table) slot = [] { abort(); };
  offer(ort::CreateStatus(), [](ort::ErrorCode, const char* text) { return fail(text); });
  offer(ort::ReleaseStatus(), [](OrtStatus* status) { delete status; });
  offer(ort::CreateCustomOpDomain(), [](const char*, OrtCustomOpDomain** made) -> OrtStatus* {
    *made = &domain;
    return nullptr;
  });
  offer(ort::CustomOpDomainAdd(), [](OrtCustomOpDomain* to, const OrtCustomOp* op) -> OrtStatus* {
    to->ops.push_back(op);
    return nullptr;
  });
  offer(ort::AddCustomOpDomain(), [](OrtSessionOptions*, OrtCustomOpDomain*) -> OrtStatus* { return nullptr; });
  offer(ort::GetTensorMutableData(), [](OrtValue* value, void** data) -> OrtStatus* {
    *data = value->data;
    return nullptr;
  });
  offer(ort::GetTensorTypeAndShape(), [](const OrtValue* value, OrtTensorTypeAndShapeInfo** info) -> OrtStatus* {
    *info = new OrtTensorTypeAndShapeInfo{value};
    return nullptr;
  });
  offer(ort::ReleaseTensorTypeAndShapeInfo(), [](OrtTensorTypeAndShapeInfo* info) { delete info; });
  offer(ort::GetTensorElementType(), [](const OrtTensorTypeAndShapeInfo* info, ort::ElementType* type) -> OrtStatus* {
    *type = static_cast<ort::ElementType>(info->value->type);
    return nullptr;
  });
  offer(ort::GetDimensionsCount(), [](const OrtTensorTypeAndShapeInfo* info, size_t* rank) -> OrtStatus* {
    *rank = info->value->shape.size();
    return nullptr;
  });
  offer(ort::GetDimensions(), [](const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t rank) -> OrtStatus* {
    std::copy_n(info->value->shape.begin(), rank, dims);
    return nullptr;
  });
  offer(ort::KernelInfoGetAttributeInt64(), [](const OrtKernelInfo* info, const char* name, int64_t* to) {
    std::string text;
    OrtStatus* status = find(info, name, text);
    *to = std::atoll(text.c_str());
    return status;
  });
  offer(ort::KernelInfoGetAttributeString(), [](const OrtKernelInfo* info, const char* name, char* to, size_t* size) {
    std::string text;
    OrtStatus* status = find(info, name, text);
    return status != nullptr ? status : copy_text(text, to, size);
  });
  offer(ort::KernelInfoGetNodeName(), [](const OrtKernelInfo*, char* to, size_t* size) {
    return copy_text("site", to, size);
  });
  offer(ort::KernelContextGetInputCount(), [](const OrtKernelContext* context, size_t* count) -> OrtStatus* {
    *count = context->inputs.size();
    return nullptr;
  });
  offer(ort::KernelContextGetInput(), [](const OrtKernelContext* context, size_t i, const OrtValue** in) -> OrtStatus* {
    *in = &context->inputs[i];
    return nullptr;
  });
  offer(ort::KernelContextGetOutput(), get_output);
  offer(ort::KernelContextParallelFor(),
        [](const OrtKernelContext*, void (*work)(void*, size_t), size_t count, size_t, void* user) -> OrtStatus* {
          for (size_t i = 0; i < count; ++i) work(user, i);
          return nullptr;
        });
}

// Standard input and output.
struct Stream {
  static void need(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "run_nodes: %s\n", what);
    exit(1);
  }
  static bool at_end() {
    const int c = getchar();
    if (c != EOF) ungetc(c, stdin);
    return c == EOF;
  }
  static int64_t number() {
    int64_t value;
    need(fread(&value, sizeof value, 1, stdin) == 1, "the input ends within a node");
    return value;
  }
  static std::string text() {
    std::string value;
    for (int c = getchar(); c > 0; c = getchar()) value += static_cast<char>(c);
    return value;
  }
  static OrtValue tensor() {
    OrtValue value;
    value.type = number();
    value.shape.resize(static_cast<size_t>(number()));
    for (int64_t& dim : value.shape) dim = number();
    value.place = static_cast<Place>(number());
    value.bytes = number();
    value.reserve(size_of(value.type));
    const auto bytes = static_cast<size_t>(value.bytes);
    need(fread(value.data, 1, bytes, stdin) == bytes, "the input ends within a tensor");
    return value;
  }
  static void put(int64_t value) { fwrite(&value, sizeof value, 1, stdout); }
  static void put(const char* bytes, int64_t count) {
    put(count);
    fwrite(bytes, 1, static_cast<size_t>(count), stdout);
  }
};

const OrtCustomOp* op_called(const std::string& name, int64_t type, int64_t cache) {
  for (const OrtCustomOp* op : domain.ops) {
    const bool has_cache = name == "Attention";
    if (op->GetName(op) == name && op->GetInputType(op, 0) == type &&
        (!has_cache || op->GetInputType(op, 3) == cache)) {
      return op;
    }
  }
  Stream::need(false, "no such op");
  return nullptr;
}

OrtStatus* run(const OrtCustomOp* op, const OrtKernelInfo& info, OrtKernelContext& context) {
  const auto* api = reinterpret_cast<const OrtApi*>(table);
  void* kernel = nullptr;
  if (OrtStatus* status = op->CreateKernelV2(op, api, &info, &kernel)) return status;
  OrtStatus* status = op->KernelComputeV2(kernel, &context);
  op->KernelDestroy(kernel);
  return status;
}

}  // namespace

int main(int count, char** arguments) {
  Stream::need(count == 3, "needed: run_nodes LIBRARY ISA");
  void* library = dlopen(arguments[1], RTLD_NOW);
  Stream::need(library != nullptr, library == nullptr ? dlerror() : "");
  fill_table();
  const OrtApiBase base = {[](uint32_t) { return reinterpret_cast<const OrtApi*>(table); }, nullptr};
  using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
  const auto register_ops = reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"));
  Stream::need(register_ops(nullptr, &base) == nullptr, "the library does not register its ops");
  const auto select = reinterpret_cast<int (*)(const char*)>(dlsym(library, "msd_select_isa"));
  const auto names = reinterpret_cast<const char* (*)()>(dlsym(library, "msd_isa_names"));
  if (select(arguments[2]) == 0) {
    fprintf(stderr, "run_nodes: no %s, this machine runs: %s\n", arguments[2], names());
    return 3;
  }

  while (!Stream::at_end()) {
    const std::string name = Stream::text();
    OrtKernelInfo info;
    for (int64_t left = Stream::number(); left > 0; --left) {
      const std::string key = Stream::text();
      info.attributes[key] = Stream::text();
    }
    OrtKernelContext context;
    for (int64_t left = Stream::number(); left > 0; --left) context.inputs.push_back(Stream::tensor());
    const int64_t cache = context.inputs.size() > 3 ? context.inputs[3].type : 0;
    context.op = op_called(name, context.inputs[0].type, cache);
    context.outputs.resize(context.op->GetOutputTypeCount(context.op));
    const std::unique_ptr<OrtStatus> status(run(context.op, info, context));
    const std::string refusal = status == nullptr ? "" : status->text;
    Stream::put(refusal.data(), static_cast<int64_t>(refusal.size()));
    if (status != nullptr) continue;
    Stream::put(static_cast<int64_t>(context.outputs.size()));
    for (OrtValue& output : context.outputs) {
      Stream::put(static_cast<int64_t>(output.shape.size()));
      for (const int64_t dim : output.shape) Stream::put(dim);
      Stream::put(output.data, output.bytes);
    }
  }
  return 0;
}
