// What kernels for AVX-512 with VNNI share. Everything is in an unnamed namespace: each file has its own, for its own
// instruction set.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "inner.h"

// Adds 32 products of int16, two to a lane, to 16 sums; or 64 of uint8 and int8, four to a lane. Written out as
// instructions, for GCC otherwise rotates accumulators through copies.
#if defined(__GNUC__)
#define MSD_ADD_PRODUCTS_TO(sum, w, q) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(q))
#define MSD_ADD_BYTE_PRODUCTS_TO(sum, w, q) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(q))
#else
#define MSD_ADD_BYTE_PRODUCTS_TO(sum, w, q) (sum) = _mm512_dpbusd_epi32(sum, w, q)
#define MSD_ADD_PRODUCTS_TO(sum, w, q) (sum) = _mm512_dpwssd_epi32(sum, w, q)
#endif

namespace msd {
namespace {

// Four bytes, in every lane.
MSD_INLINE __m512i broadcast_lane(const void* from) {
  int32_t lane;
  memcpy(&lane, from, sizeof lane);
  return _mm512_set1_epi32(lane);
}

// Two neighbouring codes, in every lane.
MSD_INLINE __m512i broadcast_pair(const int16_t* codes) { return broadcast_lane(codes); }

}  // namespace
}  // namespace msd
