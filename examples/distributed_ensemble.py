"""Trains one ensemble with its members split over processes; saves a checkpoint for any number of processes.

    torchrun --nproc-per-node 2 examples/distributed_ensemble.py

Every layer is a BlockDiagLinear whose blocks are sharded over the processes (BlockParallel). So each process trains its
share of the members, and nothing is communicated until the members vote. A run that finds a checkpoint resumes from it,
with any number of processes. Uses one GPU per process if there are enough, and CPUs otherwise.
"""

import argparse
import os
from pathlib import Path

import torch
from packed_ensemble_digits import PIXELS, PackedEnsemble, load_data, loss_of, scores
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

from blockdiag.distributed import BlockParallel


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--members", type=int, default=32, help="of the ensemble, a multiple of the processes (default: %(default)s)")
    add("--hidden", type=int, default=256, help="hidden units of each member (default: %(default)s)")
    add("--epochs", type=int, default=20, help="default: %(default)s")
    add("--batch-size", type=int, default=128, help="default: %(default)s")
    add("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--checkpoint", type=Path, default=Path("demo-output/distributed_ensemble"), help="default: %(default)s")
    return parser, parser.parse_args()


def main() -> None:
    parser, arguments = parse_arguments()
    world_size = int(os.environ.get("WORLD_SIZE", "0"))
    if world_size == 0:
        parser.error("start it with torchrun")
    if arguments.members % world_size != 0:
        parser.error(f"{arguments.members} members cannot be split evenly over {world_size} processes")
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cuda" if cuda else "cpu", (world_size,))
    device, first = torch.device(mesh.device_type), dist.get_rank() == 0

    torch.manual_seed(arguments.seed)  # the same model on all processes, before it is sharded
    model = PackedEnsemble(arguments.members, arguments.hidden).to(device)
    # Activations between the layers are of the local members only: Shard(-2) in the stacked layout.
    style = BlockParallel(input_layouts=Shard(-2))
    parallelize_module(model, mesh, {f"layers.{index}": style for index in range(len(model.layers))})
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=1e-2)
    if (arguments.checkpoint / ".metadata").exists():
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=arguments.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])

    train_images, test_images, train_labels, test_labels = (part.to(device) for part in load_data(arguments.seed))
    members = arguments.members // world_size  # of this process
    generator = torch.Generator(device).manual_seed(1 + arguments.seed + dist.get_rank())
    epochs = tqdm(range(arguments.epochs), desc="training", unit="epoch", disable=not first)
    for _ in epochs:
        order = torch.rand(len(train_labels), members, device=device, generator=generator).argsort(0)
        for indices in order.split(arguments.batch_size):
            noise = torch.randn(*indices.shape, PIXELS, device=device, generator=generator)
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(train_images[indices] + 0.2 * noise), train_labels[indices]).backward()
            optimizer.step()
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=arguments.checkpoint)

    with torch.no_grad():
        local = model(test_images.unsqueeze(1).expand(-1, members, -1)).softmax(-1)
        probabilities = DTensor.from_local(local, mesh, [Shard(1)]).full_tensor()
    accuracy, nll, _ = scores(probabilities.mean(1).cpu(), test_labels.cpu())
    if first:
        single = [scores(member.cpu(), test_labels.cpu())[0] for member in probabilities.unbind(1)]
        print(
            f"{arguments.members} members on {world_size} processes ({device}): {100 * sum(single) / len(single):.2f}% "
            f"accuracy on average, the ensemble {100 * accuracy:.2f}% (NLL {nll:.4f})"
        )
        print(f"Checkpoint: {arguments.checkpoint}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
