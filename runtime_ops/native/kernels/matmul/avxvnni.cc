// AVX-VNNI: the codes and the loops of AVX2, with vpdpwssd in place of vpmaddwd and vpaddd.

#include "../avxvnni.h"

#include "product256.h"

namespace msd::matmul {

void multiply_avxvnni(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                      const Output& output) {
  multiply_256(plan, weight, panel, first, last, output);
}

}  // namespace msd::matmul
