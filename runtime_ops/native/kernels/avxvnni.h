// How 16 products join 8 sums with AVX-VNNI: what a product256.h asks of the file that includes it.
#pragma once

#include <immintrin.h>

#if defined(__GNUC__)
// {vex}: without it an assembler takes the form of AVX-512, which a processor with this set need not have.
#define MSD_ADD_PRODUCTS_TO(sum, w, q) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(q))
#else
#define MSD_ADD_PRODUCTS_TO(sum, w, q) (sum) = _mm256_dpwssd_avx_epi32(sum, w, q)
#endif
