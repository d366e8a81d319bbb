// How the inner loops of kernels are written for compilers, whatever the instruction set.
//
// They are functions of their own, so that the accumulators have the registers to themselves (MSD_INNER), or parts of
// such (MSD_INLINE); their short loops are unrolled, so that arrays of vectors are registers (MSD_UNROLL).
#pragma once

#if defined(__GNUC__)
#define MSD_INNER __attribute__((noinline))
#define MSD_INLINE inline __attribute__((always_inline))
#else
#define MSD_INNER __declspec(noinline)
#define MSD_INLINE __forceinline
#endif
#if defined(__clang__)
#define MSD_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define MSD_UNROLL _Pragma("GCC unroll 16")
#else
#define MSD_UNROLL
#endif
