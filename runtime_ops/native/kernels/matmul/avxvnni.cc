// AVX-VNNI: the codes and the loops of AVX2, with vpdpwssd in place of vpmaddwd and vpaddd.

#include <immintrin.h>

#if defined(__GNUC__)
// {vex}: without it an assembler takes the form of AVX-512, which a processor with this set need not have.
#define MSD_ADD_PRODUCTS_TO(sum, w, q) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(q))
#else
#define MSD_ADD_PRODUCTS_TO(sum, w, q) (sum) = _mm256_dpwssd_avx_epi32(sum, w, q)
#endif
#include "product256.h"

namespace msd::matmul {

void multiply_avxvnni(const Plan& plan, const Weight& weight, const Panel& panel, int64_t first, int64_t last,
                      const Output& output) {
  multiply_256(plan, weight, panel, first, last, output);
}

}  // namespace msd::matmul
