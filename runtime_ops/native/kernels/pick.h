// From a value that is known at run time to the code made for it: `run` gets it as a type.
//
// `static`, so that each file has its own copy (see matmul/kernel.h on inline functions).
#pragma once

#include <type_traits>

#include "real.h"

namespace msd {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

template <typename Run>
static inline auto pick_real(Real type, const Run& run) {
  switch (type) {
    case Real::kHalf:
      return run(Constant<Real::kHalf>{});
    case Real::kBfloat16:
      return run(Constant<Real::kBfloat16>{});
    default:
      return run(Constant<Real::kFloat>{});
  }
}

}  // namespace msd
