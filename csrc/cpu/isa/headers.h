// What the kernels include that is not theirs. The files here include it before `#pragma GCC target(...)`, and the kernels
// after: inline functions of these headers may be linked into code that runs on any CPU, so they must not be compiled for one
// instruction set. simd/ and microkernels/ are for these files alone.
#pragma once

#include "cpu/kernels.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef BLOCKDIAG_CPU_KERNELS
#include <immintrin.h>

// g++ 12 warns of its own intrinsics (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
