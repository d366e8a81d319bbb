#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <optional>

#include "op.h"

namespace msd {
namespace {

constexpr int kNoTest = -1;
std::atomic<int> chosen_by_test{kNoTest};

std::optional<Isa> isa_called(const std::string& name) {
  for (const IsaName& row : kIsaNames) {
    if (name == row.name && machine_has(row.isa)) return row.isa;
  }
  return std::nullopt;
}

Isa best_isa() {
  for (const IsaName& row : kIsaNames) {
    if (machine_has(row.isa)) return row.isa;
  }
  return Isa::kScalar;
}

}  // namespace

std::string isa_names() {
  std::string names;
  for (const IsaName& row : kIsaNames) {
    if (!machine_has(row.isa)) continue;
    if (!names.empty()) names += ' ';
    names += row.name;
  }
  return names;
}

Isa isa_limit() {
  const int by_test = chosen_by_test.load(std::memory_order_relaxed);
  if (by_test != kNoTest) return static_cast<Isa>(by_test);
  static const std::optional<Isa> limit = [] {
    const char* wanted = std::getenv("MSD_ISA");
    return wanted != nullptr && *wanted != '\0' ? isa_called(wanted) : best_isa();
  }();
  if (limit) return *limit;
  const char* wanted = std::getenv("MSD_ISA");
  throw Refused{"msd: MSD_ISA is '" + std::string(wanted == nullptr ? "" : wanted) +
                "', this machine runs: " + isa_names()};
}

}  // namespace msd

// For tests and `msd doctor`: the instruction sets this machine runs, best first, separated by blanks.
MSD_EXPORT const char* msd_isa_names() {
  try {
    static const std::string names = msd::isa_names();
    return names.c_str();
  } catch (...) {
    return "";
  }
}

// For tests: lets the calls that follow, of every session, use this instruction set and lesser ones; an empty name the
// machine's best. Returns 1, or 0 if there is no such set here.
MSD_EXPORT int msd_select_isa(const char* name) {
  try {
    if (*name == '\0') {
      msd::chosen_by_test.store(msd::kNoTest, std::memory_order_relaxed);
      return 1;
    }
    const std::optional<msd::Isa> isa = msd::isa_called(name);
    if (!isa) return 0;
    msd::chosen_by_test.store(static_cast<int>(*isa), std::memory_order_relaxed);
    return 1;
  } catch (...) {
    return 0;
  }
}
