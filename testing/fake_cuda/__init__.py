"""Two fake CUDA devices, so that the CUDA host code runs, and is tested, without a GPU.

    python testing/fake_cuda COMMAND ...      # for instance: python -m pytest -m cuda tests/test_linear.py

A shared library, compiled by build.py and loaded in front of the real ones, defines the functions of the CUDA runtime,
of the driver, of cuBLAS and of cuBLASLt that torch and blockdiag call. Device memory is host memory; matrix products
are computed on the CPU as BLAS documents them, ATen's ops by their CPU kernels (aten.py), and blockdiag's own kernels
by emulation (tests/cpp/emulated_cuda.h), but for casts, which that tests by itself. A call that is not faked fails by
name, and so does every kernel that ATen would launch. `fake_cuda.aten.fake` holds the switches, listed in options.cpp,
and the log of calls.

It verifies the host code: which calls are made, how often and in what order; values, given BLAS's documented
arithmetic, through every transposition, leading dimension, stride and epilogue; that every access is in live memory of
the right device, and no operand is less aligned than cuBLASLt was told; behavior after an error, and when memory runs
out; streams, events, threads, captured graphs; and with `lazy`, missing dependencies.

It cannot verify: the arithmetic of a device, its order of summation and its speed; which algorithms the real heuristic
knows, and for which problems it has none; undocumented restrictions of the real libraries; a host that reads device
memory, or passes a host pointer to the device, where real hardware would fault; how a GPU runs blockdiag's own kernels.
A capture keeps the order of the calls, not the graph of their dependencies.
"""
