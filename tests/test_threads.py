"""Threads and processes: many on one layer at once, and layers sent to other processes."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

from blockdiag import BlockDiagLinear

THREADS, CALLS = 8, 40


def gradients(layer, x):
    output = layer(x)
    return (output.detach(), *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_many_threads_on_one_layer(dtype, device):
    """A soak test: threads that run forward and backward passes of several sizes get the same results as one thread."""
    layer = BlockDiagLinear(8 * 33, 8 * 20, 8, device=device, dtype=dtype)
    inputs = [torch.randn(batch, 8 * 33, device=device, dtype=dtype, requires_grad=True) for batch in (1, 7, 64, 200)]
    expected = [gradients(layer, x) for x in inputs]
    barrier = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        barrier.wait()
        for call in range(CALLS):
            index = (thread + call) % len(inputs)
            for actual, wanted in zip(gradients(layer, inputs[index]), expected[index], strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)


def test_threads_add_to_one_gradient(device):
    """Threads that call backward on graphs with shared leaves lose no contribution."""
    layer = BlockDiagLinear(12, 20, 4, device=device, dtype=torch.float64)
    inputs = torch.randint(-3, 4, (THREADS, 5, 12), device=device).double()  # sums of integers are exact in any order
    layer(inputs).sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    threads = [threading.Thread(target=lambda x=x: layer(x).sum().backward()) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([parameter.grad for parameter in layer.parameters()], expected, rtol=0, atol=0)


class Features(Dataset):
    """Computes its samples with a layer, like a frozen feature extractor in a data pipeline."""

    def __init__(self, layer: BlockDiagLinear) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(torch.full((300, self.layer.in_features), float(index)))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context):
    layer = BlockDiagLinear(8 * 33, 8 * 20, 8)
    dataset = Features(layer)
    expected = torch.stack([dataset[index] for index in range(len(dataset))])  # also starts the parent's threads
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=context, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def descend(layer: BlockDiagLinear, x: torch.Tensor, target: torch.Tensor) -> None:
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(layer(x), target).backward()
        optimizer.step()


def test_hogwild():
    """Processes that train one layer in shared memory, without locks."""
    layer, teacher = BlockDiagLinear(12, 20, 4).share_memory(), BlockDiagLinear(12, 20, 4)
    x = torch.randn(64, 12)
    target = teacher(x).detach()
    before = torch.nn.functional.mse_loss(layer(x), target).item()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=descend, args=(layer, x, target)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert torch.nn.functional.mse_loss(layer(x), target).item() < 0.5 * before
