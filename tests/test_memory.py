"""A call allocates its results, and nothing else of their size.

MKL's packing buffers are invisible to torch and not counted; they do not grow with the tensors.
"""

import re
import time
from pathlib import Path

import pytest
import torch

import blockdiag
from reference import Problem, make

# Scratch memory for a tile or a few blocks; a full result takes 2 MiB or more.
SCRATCH = 1 << 20
# cuBLASLt's workspace for split sums, with ATen's limit; cuBLAS's own is allocated once and kept.
WORKSPACE = 32 << 20


def problem_on(device: str) -> Problem:
    """On CUDA, every tensor but the bias is too large for a copy to pass for a workspace."""
    return Problem((64,), 4400, 64, 64) if device == "cuda" else Problem((1024,), 8, 256, 256)


def allowed_beside_results(device: str) -> int:
    uses_cublaslt = device == "cuda" and blockdiag.build_info()["cuda_gemm"] != "cublas"
    return SCRATCH + (WORKSPACE if uses_cublaslt else 0)


def allocated(function, device) -> tuple[int, object]:
    """The peak number of bytes allocated during the call, beyond those before, and the call's result."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return torch.cuda.max_memory_allocated() - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.experimental_event_tree()
    deltas = []

    def visit(event):
        if event.tag.name == "Allocation":
            deltas.append((event.start_time_ns, event.typed[1].alloc_size))
        for child in event.children:
            visit(child)

    for event in events:
        visit(event)
    held = peak = 0
    for _, delta in sorted(deltas):
        held += delta
        peak = max(peak, held)
    return peak, result


def result_bytes(*tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def warm_up(function, device):
    if device == "cuda":
        function()  # cuBLAS's workspace is allocated once and kept
        time.sleep(0.2)  # autograd's thread releases the results slightly after the caller has them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
@pytest.mark.parametrize("bias", [None, "flat"])
def test_forward_allocates_the_output_alone(bias, stacked, dtype, device):
    arguments = [t for t in make(problem_on(device), dtype, device, stacked=stacked, bias=bias) if t is not None]

    def forward():
        return blockdiag.linear(*arguments)

    warm_up(forward, device)
    peak, output = allocated(forward, device)
    assert result_bytes(output) <= peak <= result_bytes(output) + allowed_beside_results(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
def test_backward_allocates_the_gradients_alone(stacked, dtype, device):
    arguments = make(problem_on(device), dtype, device, stacked=stacked)
    output = blockdiag.linear(*arguments)
    grad_output = torch.randn_like(output)

    def backward():
        return torch.autograd.grad(output, arguments, grad_output, retain_graph=True)

    warm_up(backward, device)
    peak, grads = allocated(backward, device)
    assert result_bytes(*grads) <= peak <= result_bytes(*grads) + allowed_beside_results(device)


def test_large_results_ask_for_huge_pages(device):
    """From 32 MiB on, the size from which glibc maps memory anew."""
    if device != "cpu" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("huge pages of Linux")

    def flags_of(tensor):
        """The flags of the mapping that holds the middle of the tensor."""
        middle, within = tensor.data_ptr() + tensor.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                within = int(mapping[1], 16) <= middle < int(mapping[2], 16)
            elif within and line.startswith("VmFlags:"):
                return line.split()
        raise AssertionError("the tensor is in no mapping")

    weight = torch.randn(2, 2048, 4)
    for rows, huge in ((2049, True), (256, False)):
        input = torch.randn(rows, 8)
        output = blockdiag.linear(input, weight)
        assert (output.nbytes >= 32 << 20) == huge
        assert not huge or "hg" in flags_of(output)
        expected = torch.cat([part @ block.T for part, block in zip(input.split(4, -1), weight, strict=True)], -1)
        torch.testing.assert_close(output, expected)


def test_views_are_read_where_they_lie(device):
    """A slice of a wider input, a block-major input, a transposed weight and a sliced gradient are not copied."""
    (batch,), num_blocks, size, _ = problem_on(device)
    features = num_blocks * size
    wide = torch.randn(batch, features + size, device=device)
    block_major = torch.randn(num_blocks, batch, size, device=device).transpose(0, 1)
    weight = torch.randn(num_blocks, size, size, device=device).mT
    grad_output = wide[:, size:]
    ops = torch.ops.blockdiag
    for call in (
        lambda: ops.linear(wide[:, size:], weight),
        lambda: ops.linear(block_major, weight),
        lambda: ops.linear_input_grad(grad_output, weight, [batch, features]),
        lambda: ops.linear_weight_grad(grad_output, wide[:, :features], [num_blocks, size, size]),
    ):
        warm_up(call, device)
        peak, result = allocated(call, device)
        assert peak <= result_bytes(result) + allowed_beside_results(device)
