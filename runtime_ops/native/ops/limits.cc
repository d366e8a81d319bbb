// What the machine does at best, for `msd bench`: the caller holds the clock.
#include "../kernels/limits/kernel.h"

#include <cstring>

#include "op.h"

namespace msd {
namespace {

limits::Counted loop_called(const char* name) {
  const limits::Loops& loops = chosen(limits::kVariants);
  if (std::strcmp(name, "float32") == 0) return loops.float32;
  if (std::strcmp(name, "int16") == 0) return loops.int16;
  if (std::strcmp(name, "int8") == 0) return loops.int8;
  return {};
}

volatile int64_t kept;  // so that no loop is left out for having no effect

}  // namespace
}  // namespace msd

// Runs a bare loop of multiply-adds of "float32", "int16" or "int8", with the instruction set that ops use. Returns the
// number of operations, a multiply-add being two; 0 if there is no such loop.
MSD_EXPORT double msd_multiply_add(const char* name, int64_t rounds) {
  try {
    const msd::limits::Counted counted = msd::loop_called(name);
    if (counted.loop == nullptr) return 0;
    msd::kept = counted.loop(rounds);
    return static_cast<double>(counted.operations) * static_cast<double>(rounds);
  } catch (...) {
    return 0;
  }
}

// Reads `count` numbers, in four streams: one alone leaves memory waiting. Returns how many were read.
MSD_EXPORT int64_t msd_read(const int64_t* numbers, int64_t count) {
  constexpr int kStreams = 4, kLine = 8;
  const int64_t each = count / (kStreams * kLine) * kLine;
  int64_t sums[kLine] = {};
  for (int64_t i = 0; i < each; i += kLine) {
    for (int stream = 0; stream < kStreams; ++stream) {
      for (int j = 0; j < kLine; ++j) sums[j] ^= numbers[stream * each + i + j];
    }
  }
  for (const int64_t sum : sums) msd::kept = sum;
  return kStreams * each;
}
