// The loop that all bare loops are. Everything is in an unnamed namespace, as in ../avx2.h.
#pragma once

#include <stdint.h>

#include "kernel.h"

namespace msd::limits {
namespace {

// The sums start at start(0), start(1), ..., for equal ones would be computed once. `rounds` times step(sum), which changes
// it, for each; what `number_of` makes of them in the end. Twelve names, for GCC keeps an array in memory.
template <typename Start, typename Step, typename Number>
inline int32_t in_turns(int64_t rounds, const Start& start, const Step& step, const Number& number_of) {
  static_assert(kSums == 12);
  auto a = start(0), b = start(1), c = start(2), d = start(3), e = start(4), f = start(5);
  auto g = start(6), h = start(7), i = start(8), j = start(9), k = start(10), l = start(11);
  for (int64_t round = 0; round < rounds; ++round) {
    step(a), step(b), step(c), step(d), step(e), step(f), step(g), step(h), step(i), step(j), step(k), step(l);
  }
  return number_of(a) ^ number_of(b) ^ number_of(c) ^ number_of(d) ^ number_of(e) ^ number_of(f) ^  //
         number_of(g) ^ number_of(h) ^ number_of(i) ^ number_of(j) ^ number_of(k) ^ number_of(l);
}

}  // namespace
}  // namespace msd::limits
