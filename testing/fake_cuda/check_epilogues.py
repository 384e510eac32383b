"""Tests of the fake's own cublasLtMatmul epilogues, called directly. Run by tests/test_fake_device.py."""

import ctypes

import pytest
import torch


@pytest.mark.parametrize(("epilogue", "of"), [(1, None), (4, None), (256, "a"), (512, "b")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_epilogues_as_documented(epilogue, of, dtype):
    """D = A B, with a bias for each row of D, or with the sums of A or B over k."""
    m, n, k, batch = 5, 3, 4, 2
    a, b = torch.randn(batch, k, m, dtype=dtype), torch.randn(batch, n, k, dtype=dtype)  # row-major transposes
    bias = torch.randn(batch, 128, dtype=dtype)  # as aligned in every block as in the first
    tensors = [tensor.cuda() for tensor in (a, b, bias, torch.full((batch, n, m), torch.nan, dtype=dtype))]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    fakes, real = ctypes.CDLL(None), ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")

    def create(name, *arguments):
        made = ctypes.c_void_p()
        assert real[f"cublasLt{name}Create"](ctypes.byref(made), *arguments) == 0
        return made

    def give(what, described, attribute, value):
        size = ctypes.c_size_t(ctypes.sizeof(value))
        assert real[f"cublasLt{what}SetAttribute"](described, attribute, ctypes.byref(value), size) == 0

    operation = create("MatmulDesc", 68, 0)  # CUBLAS_COMPUTE_32F, CUDA_R_32F
    give("MatmulDesc", operation, 7, ctypes.c_uint32(epilogue))
    give("MatmulDesc", operation, 8, pointers[2])
    give("MatmulDesc", operation, 10, ctypes.c_int64(128))
    layouts = []
    for rows, cols in ((m, k), (k, n), (m, n)):
        type_of = 2 if dtype == torch.float16 else 0
        layouts.append(
            create("MatrixLayout", type_of, ctypes.c_uint64(rows), ctypes.c_uint64(cols), ctypes.c_int64(rows))
        )
        give("MatrixLayout", layouts[-1], 5, ctypes.c_int32(batch))
        give("MatrixLayout", layouts[-1], 6, ctypes.c_int64(rows * cols))
    preference, handle = create("MatmulPreference"), ctypes.c_void_p()
    give("MatmulPreference", preference, 1, ctypes.c_uint64(0))
    for attribute in (5, 6, 7, 8):
        give("MatmulPreference", preference, attribute, ctypes.c_uint32(2))
    assert fakes.cublasCreate_v2(ctypes.byref(handle)) == 0
    algorithms, count = (ctypes.c_char * 4096)(), ctypes.c_int()
    described = (operation, layouts[0], layouts[1], layouts[2], layouts[2])
    heuristic = fakes.cublasLtMatmulAlgoGetHeuristic
    assert heuristic(handle, *described, preference, 1, algorithms, ctypes.byref(count)) == 0
    one, zero = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(0))
    operands_of_matmul = (one, pointers[0], layouts[0], pointers[1], layouts[1])
    results_of_matmul = (zero, pointers[3], layouts[2], pointers[3], layouts[2])
    matmul = fakes.cublasLtMatmul
    assert (
        matmul(handle, operation, *operands_of_matmul, *results_of_matmul, algorithms, None, ctypes.c_size_t(0), None)
        == 0
    )

    expected = (b.float() @ a.float()) + (bias[:, None, :m].float() if epilogue == 4 else 0)
    torch.testing.assert_close(tensors[3].cpu(), expected.to(dtype))
    sums = {"a": a.float().sum(1), "b": b.float().sum(2)}
    if of is not None:
        bias[:, : sums[of].shape[1]] = sums[of].to(dtype)
    torch.testing.assert_close(tensors[2].cpu(), bias)
