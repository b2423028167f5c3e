// Functions whose loops a compiler turns into vector code, compiled for several generations of x86-64; the loader takes the
// newest that the machine has (g++ 12 and newer know these generations; others compile for the oldest). Fixed numbers of lanes add up in a fixed order, so the bits are the same in all.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && !defined(R1V2_FAST_NO_CLONES)
#define LANE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LANE_CLONES
#endif

#define ALWAYS_INLINE __attribute__((always_inline)) inline  // into each of the clones
