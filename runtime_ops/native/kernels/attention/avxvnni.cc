// AVX-VNNI: the products of AVX2, with vpdpwssd in place of vpmaddwd and vpaddd. Codes are made by avx2.cc.

#include "../avxvnni.h"

#include "product256.h"

namespace msd::attention {

void logits_avxvnni(const int16_t* query, int64_t rows, const Tokens& keys, int16_t* spare, int32_t* products) {
  logits_256(query, rows, keys, spare, products);
}

void mix_avxvnni(const int16_t* weights, int64_t rows, const Tokens& values, int16_t* spare, int32_t* sums) {
  mix_256(weights, rows, values, spare, sums);
}

}  // namespace msd::attention
