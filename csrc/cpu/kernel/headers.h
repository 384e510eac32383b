// What the kernels include that is not theirs. It comes before `#pragma GCC target(...)`: inline functions of these headers
// may be linked into code that runs on any CPU.
#pragma once

#include "kernels.h"

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
