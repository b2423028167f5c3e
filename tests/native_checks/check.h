// CHECK(condition, format, ...): ends the program with the place and the message where the condition fails.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__), std::printf("\n"), std::exit(1);  \
    }                                                             \
  } while (0)

using Random = std::mt19937_64;

inline double uniform(Random& random) { return (random() >> 11) * 0x1p-53; }
