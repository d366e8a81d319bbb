// The slice of onnxruntime's C ABI that the ops use, declared by hand: no installable package carries the headers.
//
// The runtime hands out one table of function pointers that is only ever appended to, so a slot number is a fact of
// the ABI. Everything here exists since API version 17 (onnxruntime 1.17); a newer slot would be a crash on an older
// runtime, not an error, so nothing newer is called.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define MSD_ORT_CALL __stdcall
#define MSD_EXPORT extern "C" __declspec(dllexport)
#else
#define MSD_ORT_CALL
#define MSD_EXPORT extern "C" __attribute__((visibility("default")))
#endif

struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;  // a null pointer is success
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtCustomOp;

using OrtSlot = void(MSD_ORT_CALL*)();

struct OrtApi {
  OrtSlot slots[1];  // as many as the runtime's version has
};

struct OrtApiBase {
  const OrtApi*(MSD_ORT_CALL* GetApi)(uint32_t version);  // null if the runtime is older than `version`
  const char*(MSD_ORT_CALL* GetVersionString)();
};

namespace msd::ort {

inline constexpr uint32_t kApiVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// Same numbers as TensorProto.DataType for the types used here.
enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kUint16 = 4, kInt16 = 5, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };

enum Characteristic : int { kRequired = 0 };
enum MemoryType : int { kDefaultMemory = 0 };

// One entry of the table: its position and its signature.
template <int kIndex, typename Signature>
struct Function;
template <int kIndex, typename Result, typename... Arguments>
struct Function<kIndex, Result(Arguments...)> {
  static Result call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<Result(MSD_ORT_CALL*)(Arguments...)>(api->slots[kIndex])(arguments...);
  }
};

using CreateStatus = Function<0, OrtStatus*(ErrorCode, const char*)>;
using CreateCustomOpDomain = Function<26, OrtStatus*(const char*, OrtCustomOpDomain**)>;
using CustomOpDomainAdd = Function<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Function<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Function<51, OrtStatus*(OrtValue*, void**)>;
using CreateTensorTypeAndShapeInfo = Function<57, OrtStatus*(OrtTensorTypeAndShapeInfo**)>;
using SetTensorElementType = Function<58, OrtStatus*(OrtTensorTypeAndShapeInfo*, ElementType)>;
using SetDimensions = Function<59, OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t*, size_t)>;
using GetTensorElementType = Function<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ElementType*)>;
using GetDimensionsCount = Function<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Function<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>;
using GetSymbolicDimensions = Function<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char**, size_t)>;
using GetTensorTypeAndShape = Function<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using KernelInfoGetAttributeInt64 = Function<86, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>;
using KernelInfoGetAttributeString = Function<87, OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>;
using KernelContextGetInputCount = Function<88, OrtStatus*(const OrtKernelContext*, size_t*)>;
using KernelContextGetInput = Function<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using KernelContextGetOutput =
    Function<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>;
using ReleaseStatus = Function<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Function<99, void(OrtTensorTypeAndShapeInfo*)>;
using KernelInfoGetNodeName = Function<244, OrtStatus*(const OrtKernelInfo*, char*, size_t*)>;
using ShapeInferContextGetInputTypeShape =
    Function<268, OrtStatus*(const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**)>;
using ShapeInferContextSetOutputTypeShape =
    Function<270, OrtStatus*(const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*)>;
using SetSymbolicDimensions = Function<271, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char**, size_t)>;
using KernelContextParallelFor =
    Function<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;

}  // namespace msd::ort

// What an op tells the runtime, as of API version 17. The runtime reads no field newer than `version`.
struct OrtCustomOp {
  uint32_t version;
  void*(MSD_ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(MSD_ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(MSD_ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  msd::ort::ElementType(MSD_ORT_CALL* GetInputType)(const OrtCustomOp*, size_t);
  size_t(MSD_ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  msd::ort::ElementType(MSD_ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t);
  size_t(MSD_ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(MSD_ORT_CALL* KernelCompute)(void*, OrtKernelContext*);
  void(MSD_ORT_CALL* KernelDestroy)(void*);
  msd::ort::Characteristic(MSD_ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t);
  msd::ort::Characteristic(MSD_ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  msd::ort::MemoryType(MSD_ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t);
  int(MSD_ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(MSD_ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(MSD_ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(MSD_ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(MSD_ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus*(MSD_ORT_CALL* KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus*(MSD_ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int(MSD_ORT_CALL* GetStartVersion)(const OrtCustomOp*);
  int(MSD_ORT_CALL* GetEndVersion)(const OrtCustomOp*);
  void* after_version_17[4];  // in-place and alias queries: room for a runtime that looks, never filled
};
