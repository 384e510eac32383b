"""Deploys the ensemble that `make demo` trained in two ways without Python, and compares all answers on the test set.

- An ONNX file of plain operators, which onnxruntime serves without blockdiag.
- A package compiled ahead of time by PyTorch's AOTInductor, which the C++ program examples/serve serves with libtorch
  and libblockdiag.

Both take any batch size. Run: make deploy
"""

import argparse
import subprocess
import sys
from pathlib import Path

import onnxruntime
import torch
from packed_ensemble_digits import PIXELS, PackedEnsemble, load_data
from torch import Tensor, nn

import blockdiag.registration.onnx

TOLERANCE = 1e-5  # of probabilities


class Classifier(nn.Module):
    """The ensemble as a service needs it: images (batch, PIXELS) to the mean of the members' probabilities."""

    def __init__(self, ensemble: PackedEnsemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, images: Tensor) -> Tensor:
        logits = self.ensemble(images.unsqueeze(1).expand(-1, self.ensemble.members, -1))
        return logits.softmax(-1).mean(1)


def load(path: Path) -> tuple[Classifier, int]:
    """The trained ensemble, and the seed that split the data."""
    saved = torch.load(path)
    ensemble = PackedEnsemble(saved["members"], saved["hidden"])
    ensemble.load_state_dict(saved["state_dict"])
    return Classifier(ensemble).eval(), saved["seed"]


def run_onnx(program: torch.export.ExportedProgram, folder: Path, batches: list[Tensor]) -> list[Tensor]:
    path = folder / "packed_ensemble.onnx"
    table = blockdiag.registration.onnx.translation_table()
    torch.onnx.export(
        program, (), path, dynamo=True, external_data=False, custom_translation_table=table, verbose=False
    )
    print(f"{path}: {path.stat().st_size / 2**10:.0f} KiB")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    return [torch.from_numpy(session.run(None, {name: batch.numpy()})[0]) for batch in batches]


def run_package(
    program: torch.export.ExportedProgram, folder: Path, batches: list[Tensor], server: Path
) -> list[Tensor]:
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "packed_ensemble.pt2"))
    print(f"{path}: {Path(path).stat().st_size / 2**10:.0f} KiB")
    requests, answers = folder / "requests.pt", folder / "answers.pt"
    torch.save(batches, requests)
    subprocess.run([server, path, requests, answers], check=True)
    return torch.load(answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", type=Path, default=Path("demo-output/packed_ensemble.pt"), help="default: %(default)s"
    )
    parser.add_argument("--server", type=Path, required=True, help="the program that examples/serve builds")
    arguments = parser.parse_args()
    for path in (arguments.model, arguments.server):
        if not path.exists():
            parser.error(f"there is no {path}")
    model, seed = load(arguments.model)
    _, images, _, labels = load_data(seed)
    batches = [images[:1], images[1:8], images[8:]]
    with torch.no_grad():
        expected = model(images)
        example = torch.zeros(2, PIXELS)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        folder = arguments.model.parent
        answers = {
            "onnxruntime": torch.cat(run_onnx(program, folder, batches)),
            "C++ with AOTInductor": torch.cat(run_package(program, folder, batches, arguments.server.resolve())),
        }
    print(f"\n{'':24}{'accuracy':>10}{'same answer':>14}{'largest difference':>22}")
    worst = 0.0
    for name, probabilities in {"PyTorch": expected, **answers}.items():
        difference = (probabilities - expected).abs().max().item()
        worst = max(worst, difference)
        accuracy = (probabilities.argmax(-1) == labels).double().mean().item()
        same = (probabilities.argmax(-1) == expected.argmax(-1)).sum().item()
        print(f"{name:24}{100 * accuracy:9.2f}%{same:>8} of {len(labels)}{difference:22.1e}")
    if worst > TOLERANCE:
        print(f"The probabilities should differ by no more than {TOLERANCE}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
