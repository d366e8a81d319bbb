// Which variant of its kernel an op runs.
#pragma once

#include <string>

#include "../kernels/variant.h"

namespace msd {

// The instruction sets this machine runs, best first, separated by blanks: "avx2 scalar".
std::string isa_names();

// The best one that may be used: the machine's best, or what a test or the environment variable MSD_ISA names.
// Throws Refused if MSD_ISA names what is not there.
Isa isa_limit();

// The first row of a kernel's table, ordered fastest first, that the limit allows. The last row runs everywhere.
template <typename Kernel, size_t kRows>
const Kernel& chosen(const Variant<Kernel> (&table)[kRows]) {
  const Isa limit = isa_limit();
  for (const Variant<Kernel>& row : table) {
    if (row.isa <= limit && machine_has(row.isa)) return row.kernel;
  }
  return table[kRows - 1].kernel;
}

}  // namespace msd
