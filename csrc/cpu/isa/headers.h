// Headers from outside that the kernels need. The files here include them before `#pragma GCC target(...)`, and the
// kernels after it: inline functions of these headers may be linked into code that runs on any CPU, so they must not be
// compiled for one instruction set. Only the files here include simd/ and microkernels/.
#pragma once

#include "cpu/kernels.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef BLOCKDIAG_CPU_KERNELS
#include <immintrin.h>

// g++ 12 warns about its own intrinsics (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
