"""Distributed layers: each test starts its own process groups (gloo), of 2 and of 4 processes."""

import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import blockdiag
from blockdiag import BlockDiagLinear, PermutedBlockDiagLinear
from blockdiag.distributed import BlockParallel, shard_placement

BLOCKS, IN, OUT, BATCH = 4, 3, 5, 8


def in_group(rank: int, function, world_size: int, folder, arguments) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The loopback device by name: gloo would resolve the host's name, which fails on some machines.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size)
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads still release tensors, which aborts the process if the interpreter is shutting down.
    os._exit(0)


def run(function, world_size: int, folder, *arguments) -> None:
    """Calls function(*arguments) in `world_size` processes; raises if one of them does."""
    multiprocessing.spawn(in_group, (function, world_size, folder, arguments), nprocs=world_size)


def make_model(num_blocks: int = BLOCKS) -> nn.Sequential:
    """The same on all ranks."""
    torch.manual_seed(1)
    return nn.Sequential(
        BlockDiagLinear(num_blocks * IN, num_blocks * OUT, num_blocks),
        nn.ReLU(),
        BlockDiagLinear(num_blocks * OUT, num_blocks * 2, num_blocks),
    )


def make_batch(num_blocks: int = BLOCKS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(BATCH, num_blocks * IN), torch.randn(BATCH, num_blocks * 2)


def train(model, x, target, steps: int = 3) -> torch.Tensor:
    """Returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
    return loss.detach()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_parameters(model: nn.Module, expected: nn.Module) -> None:
    # Adam divides gradients by their size, which amplifies differences in the order of summation for small ones.
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(actual).detach(), wanted.detach(), rtol=1e-4, atol=1e-5)


def check_conversion_under_ddp(method: str) -> None:
    """Each process calibrates on its own inputs; the result is one model, calibrated on all of them, that trains."""
    dense = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)).double()
    x = torch.randn(400, 16, dtype=torch.float64).cumsum(-1)
    config = blockdiag.LowRank(max_error=0.3, min_features=0)
    if method == "monarch":
        config = blockdiag.Monarch(num_blocks=2, max_error=0.3, min_features=0)

    model = DistributedDataParallel(dense)
    part = x.chunk(dist.get_world_size())[dist.get_rank()]
    optimizer = torch.optim.Adam(model.parameters())
    model(part).square().mean().backward()
    optimizer.step()
    alone, expected = blockdiag.compress(dense, config, calibration=[x], progress=False)
    # A failure in one process fails in all, without a deadlock; a process may have no inputs.
    failing = [part[:, 1:]] if dist.get_rank() == 0 else [part]
    with pytest.raises(ValueError, match=r"failed on calibration batch 0|failed in 1 other processes"):
        blockdiag.compress(model, config, calibration=failing, inplace=True, progress=False)
    only_first = (lambda dense: dense(x)) if dist.get_rank() == 0 else (lambda dense: None)
    _, report = blockdiag.compress(model, config, calibration=only_first, dry_run=True, progress=False)
    assert [layer.after for layer in report.layers] == [layer.after for layer in expected.layers]
    converted, report = blockdiag.compress(
        model, config, calibration=[part], optimizers=optimizer, inplace=True, progress=False
    )
    assert isinstance(converted, DistributedDataParallel)
    assert converted.module is dense
    assert [layer.after for layer in report.layers] == [layer.after for layer in expected.layers]
    for mine, wanted in zip(report.layers, expected.layers, strict=True):
        assert abs(mine.error - wanted.error) < 1e-9
    torch.testing.assert_close(converted(x), alone(x))
    for _ in range(3):
        optimizer.zero_grad()
        converted(part).square().mean().backward()
        optimizer.step()
    for parameter in converted.parameters():
        others = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(others, parameter.detach())
        for other in others:
            torch.testing.assert_close(other, parameter.detach(), rtol=0, atol=0)
    assert set(optimizer.state) == set(converted.parameters())


@pytest.mark.parametrize("method", ["low_rank", "monarch"])
def test_conversion_under_ddp(method, tmp_path):
    run(check_conversion_under_ddp, 2, tmp_path, method)


def check_sharding_rules(num_blocks: int) -> None:
    """Values and gradients for all placements of input and parameters; no communication where none is needed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    even = num_blocks % mesh.size() == 0
    concatenated, weight = torch.randn(BATCH, num_blocks * IN), torch.randn(num_blocks, OUT, IN)
    bias = torch.randn(num_blocks * OUT)
    free = [(Replicate(), Replicate()), (Shard(0), Replicate())] + [(Shard(1), Shard(0))] * even
    costly = [(Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(0))]
    for stacked in (False, True):
        x = concatenated.view(BATCH, num_blocks, IN) if stacked else concatenated
        for input_placement, weight_placement in [*free, *costly]:
            placements = [input_placement, weight_placement, weight_placement]
            plain = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
            sharded = [
                distribute_tensor(tensor, mesh, [placement]).requires_grad_()
                for tensor, placement in zip((x, weight, bias), placements, strict=True)
            ]
            expected = blockdiag.linear(*plain)
            grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
            with CommDebugMode() as communication:
                output = blockdiag.linear(*sharded)
            sharded_grad = distribute_tensor(grad_output, mesh, output.placements)
            with CommDebugMode() as backward:
                grads = torch.autograd.grad(output, sharded, sharded_grad)
            torch.testing.assert_close(output.full_tensor(), expected)
            expected_grads = torch.autograd.grad(expected, plain, grad_output)
            for actual, wanted in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(actual.full_tensor(), wanted)
            if (input_placement, weight_placement) in free:
                assert communication.get_total_counts() + backward.get_total_counts() == 0
                assert output.placements == (input_placement,)


def check_sharding_rules_under_autocast() -> None:
    """float32 parameters beside half activations: results in the dtypes of the op on plain tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = torch.randn(BATCH, BLOCKS * IN).bfloat16(), torch.randn(BLOCKS, OUT, IN), torch.randn(BLOCKS * OUT)
    for placements in ([Replicate()] * 3, [Shard(0), Replicate(), Replicate()], [Shard(1), Shard(0), Shard(0)]):
        plain = [tensor.clone().requires_grad_() for tensor in tensors]
        sharded = [
            distribute_tensor(tensor, mesh, [placement]).requires_grad_()
            for tensor, placement in zip(tensors, placements, strict=True)
        ]
        for dtype in (torch.bfloat16, torch.float32):  # in both orders: DTensor caches what it propagates
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                inputs = [
                    ([x.float(), *rest] if dtype == torch.float32 else [x, *rest]) for x, *rest in (plain, sharded)
                ]
                expected, output = (blockdiag.linear(*each) for each in inputs)
            assert output.dtype == expected.dtype == dtype
            torch.testing.assert_close(output.full_tensor(), expected)
            expected_grads = torch.autograd.grad(expected.float().square().sum(), plain)
            grads = torch.autograd.grad(output.float().square().sum(), sharded)
            for actual, wanted in zip(grads, expected_grads, strict=True):
                assert actual.dtype == wanted.dtype
                torch.testing.assert_close(actual.full_tensor(), wanted)

    # A gradient narrower than what is summed, beyond its range in between.
    y, x = torch.full((6, 8), 1e5), torch.zeros(6, 6, dtype=torch.float16)
    y[::2] *= -1
    sharded = [distribute_tensor(tensor, mesh, [Replicate()]) for tensor in (y, x)]
    _, bias_grad = torch.ops.blockdiag.linear_weight_bias_grad(*sharded, [2, 4, 3], out_dtype=torch.float16)
    assert bias_grad.dtype == torch.float16
    assert (bias_grad.full_tensor() == 0).all()


def test_sharding_rules_under_autocast(tmp_path):
    run(check_sharding_rules_under_autocast, 2, tmp_path)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("num_blocks", [BLOCKS, 3], ids=["even", "uneven"])
def test_sharding_rules(num_blocks, world_size, tmp_path):
    run(check_sharding_rules, world_size, tmp_path, num_blocks)


def check_sharding_rules_of_block_sparse_layers() -> None:
    """Activations are sharded by batch, and parameters replicated; the results are those of one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    layer = blockdiag.BlockSparseLinear(12, 24, (4, 2), 0.4, diagonal=True)
    x = torch.randn(BATCH, 4, 12, requires_grad=True)
    output = layer(x)
    wanted = torch.autograd.grad(output.sin().sum(), [x, *layer.parameters()])
    replicated = [distribute_tensor(t.detach(), mesh, [Replicate()]) for t in (*layer.parameters(), *layer.buffers())]
    values, bias, diagonal = (t.requires_grad_() for t in replicated[:3])
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias", "diagonal"]
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
        result = torch.ops.blockdiag.sparse_linear(sharded, values, *replicated[3:], bias, diagonal)
        assert result.placements == (placement,)
        torch.testing.assert_close(result.full_tensor(), output)
        grads = torch.autograd.grad(result.sin().sum(), [sharded, values, bias, diagonal])
        torch.testing.assert_close([grad.full_tensor() for grad in grads], list(wanted))


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharding_rules_of_block_sparse_layers(world_size, tmp_path):
    run(check_sharding_rules_of_block_sparse_layers, world_size, tmp_path)


def check_block_parallel() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected, model, (x, target) = make_model(), make_model(), make_batch()
    styles = {"0": BlockParallel(), "2": BlockParallel(input_layouts=Shard(-1), output_layouts=Replicate())}
    parallelize_module(model, mesh, styles)
    assert model[0].weight.to_local().shape == (BLOCKS // mesh.size(), OUT, IN)
    torch.testing.assert_close(train(model, x, target), train(expected, x, target))
    assert_same_parameters(model, expected)

    with CommDebugMode() as communication:
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    assert communication.get_total_counts() == 1  # gathers the replicated output

    stacked = BlockParallel(use_local_output=False)
    layer = parallelize_module(make_model()[0], mesh, stacked)
    output = layer(x.view(BATCH, BLOCKS, IN))
    assert output.placements == (Shard(1),)
    torch.testing.assert_close(output.full_tensor(), make_model()[0](x.view(BATCH, BLOCKS, IN)))

    blocks = make_model()[0]
    permuted = PermutedBlockDiagLinear.from_blocks(blocks, torch.randperm(BLOCKS * IN), torch.randperm(BLOCKS * OUT))
    expected = permuted(x)
    parallelize_module(permuted, mesh, BlockParallel(output_layouts=Replicate()))
    assert permuted.weight.to_local().shape == (BLOCKS // mesh.size(), OUT, IN)
    torch.testing.assert_close(permuted(x), expected)

    with pytest.raises(TypeError, match="expected a BlockDiagLinear, but got Linear"):
        parallelize_module(nn.Linear(4, 4), mesh, BlockParallel())
    with pytest.raises(ValueError, match="expected num_blocks to be a multiple of the mesh's size"):
        parallelize_module(BlockDiagLinear(3, 3, 3), mesh, BlockParallel())


@pytest.mark.parametrize("world_size", [2, 4])
def test_block_parallel(world_size, tmp_path):
    run(check_block_parallel, world_size, tmp_path)


def check_compiled_block_parallel() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected, model, (x, target) = make_model(), make_model(), make_batch()
    styles = {"0": BlockParallel(), "2": BlockParallel(input_layouts=Shard(-1), output_layouts=Replicate())}
    compiled = torch.compile(parallelize_module(model, mesh, styles), backend="aot_eager", fullgraph=True)
    for rows in (BATCH, 3, 5):
        torch.testing.assert_close(
            train(compiled, x[:rows], target[:rows]), train(expected, x[:rows], target[:rows]), rtol=1e-4, atol=1e-5
        )
    assert_same_parameters(model, expected)


def test_compiled_block_parallel(tmp_path):
    run(check_compiled_block_parallel, 2, tmp_path)


def check_two_dimensions() -> None:
    """Blocks over one dimension of the mesh; over the other the batch and, by FSDP, the remaining parameters."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "blocks"))
    expected, model, (x, target) = make_model(), make_model(), make_batch()
    styles = {"0": BlockParallel(), "2": BlockParallel(input_layouts=Shard(-1), output_layouts=Replicate())}
    parallelize_module(model, mesh["blocks"], styles)
    fully_shard(model, mesh=mesh["batch"])
    part = slice(mesh.get_local_rank("batch") * BATCH // 2, (mesh.get_local_rank("batch") + 1) * BATCH // 2)
    train(model, x[part], target[part])
    train(expected, x, target)
    assert_same_parameters(model, expected)


def test_two_dimensions(tmp_path):
    run(check_two_dimensions, 4, tmp_path)


def check_data_parallel(kind: str, num_blocks: int) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    expected, model, (x, target) = make_model(num_blocks), make_model(num_blocks), make_batch(num_blocks)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model, mesh=mesh, shard_placement_fn=shard_placement(world_size) if kind == "placed" else None)
        if kind == "placed":
            assert all(parameter.to_local().numel() > 0 for parameter in model.parameters())
    part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    train(model, x[part], target[part])
    train(expected, x, target)
    assert_same_parameters(model, expected)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("kind", "num_blocks"), [("ddp", 4), ("fsdp", 4), ("fsdp", 1), ("placed", 4)], ids=lambda value: str(value)
)
def test_data_parallel(kind, num_blocks, world_size, tmp_path):
    run(check_data_parallel, world_size, tmp_path, kind, num_blocks)


def save_checkpoint(folder) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, (x, target) = make_model(), make_batch()
    styles = {"0": BlockParallel(), "2": BlockParallel(input_layouts=Shard(-1), output_layouts=Replicate())}
    train(parallelize_module(model, mesh, styles), x, target)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=str(folder / "checkpoint"))


def load_checkpoint(folder, kind: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    expected, model, (x, target) = make_model(), make_model(), make_batch()
    if kind == "blocks":
        parallelize_module(model, mesh, {"0": BlockParallel(), "2": BlockParallel()})
    elif kind == "fsdp":
        fully_shard(model, mesh=mesh)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=str(folder / "checkpoint"))
    set_model_state_dict(model, state["model"])
    train(expected, x, target)
    assert_same_parameters(model, expected)


def test_checkpoint_of_4_ranks_loads_on_2(tmp_path):
    run(save_checkpoint, 4, tmp_path, tmp_path)
    for kind in ("blocks", "fsdp", "replicated"):
        folder = tmp_path / kind
        folder.mkdir()
        run(load_checkpoint, 2, folder, tmp_path, kind)
