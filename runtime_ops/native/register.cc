// The one symbol onnxruntime looks for: RegisterCustomOps adds domain "msd" to a session's options.

#include <mutex>

#include "ops/op.h"

namespace msd {
namespace {

// A runtime and the domain made for it. A process may hold several runtimes, each with its own table; a domain is
// shared by all sessions of one and never freed, for a session may outlive the options it was made from.
struct Registered {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  const Registered* next;
};

OrtCustomOpDomain* domain_of(const OrtApi* api) {
  static std::mutex mutex;
  static const Registered* first = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Registered* r = first; r != nullptr; r = r->next) {
    if (r->api == api) return r->domain;
  }
  OrtCustomOpDomain* domain = nullptr;
  check(ort::CreateCustomOpDomain::call(api, "msd", &domain));
  for (const auto ops : {matmul_ops, matmul_integer_to_float_ops, attention_ops}) {
    for (const OrtCustomOp* op : ops(api)) check(ort::CustomOpDomainAdd::call(api, domain, op));
  }
  first = new Registered{api, domain, first};
  return domain;
}

}  // namespace
}  // namespace msd

MSD_EXPORT OrtStatus* MSD_ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(msd::ort::kApiVersion);
  if (api == nullptr) {
    // Version 1 of the table has CreateStatus, and every runtime has version 1.
    const OrtApi* oldest = base->GetApi(1);
    return msd::ort::CreateStatus::call(oldest, msd::ort::kFail, "msd: onnxruntime is too old, needed 1.17 or newer");
  }
  return msd::guarded(api, [&] {
    msd::check(msd::ort::AddCustomOpDomain::call(api, options, msd::domain_of(api)));
  });
}
