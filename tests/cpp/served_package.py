"""Compiles a model ahead of time, has a C++ program serve it, and compares: served_package.py SERVE_PROGRAM"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from blockdiag import BlockDiagLinear, BlockSparseLinear


class Net(nn.Module):
    """Both layouts, with and without bias, in two dtypes, both dtypes at once under autocast, and sparse blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BlockDiagLinear(12, 32, 4)
        self.second = BlockDiagLinear(32, 20, 4, bias=False, dtype=torch.bfloat16)
        self.third = BlockDiagLinear(20, 8, 4)
        self.sparse = BlockSparseLinear(8, 16, (16, 1), 0.5, diagonal=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x).relu().unflatten(-1, (4, 8))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = self.third(self.second(hidden)).float().sin()
        return self.sparse(output.flatten(-2))


def main(program: str) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    inputs = [torch.randn(batch, 12) for batch in (5, 1, 300)]
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        exported = torch.export.export(net, (inputs[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "net.pt2"))
        torch.save(inputs, folder / "inputs.pt")
        subprocess.run([program, package, str(folder / "inputs.pt"), str(folder / "outputs.pt")], check=True)
        outputs = torch.load(folder / "outputs.pt")
        assert len(outputs) == len(inputs)
        for actual, x in zip(outputs, inputs, strict=True):
            torch.testing.assert_close(actual, net(x))

        for arguments in ([], [package, "missing.pt", "outputs.pt"], ["missing.pt2", str(folder / "inputs.pt"), "o"]):
            failed = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
            assert failed.returncode in (1, 2), failed
            assert failed.stderr.startswith("usage") or "missing" in failed.stderr, failed


if __name__ == "__main__":
    main(*sys.argv[1:])
