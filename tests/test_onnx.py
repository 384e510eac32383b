"""Export to ONNX: onnxruntime, without operators of ours, gives the same results."""

import subprocess
import sys

import pytest
import torch

import blockdiag.registration.onnx
from blockdiag import BlockDiagLinear
from every_module import CASES, first, initialized

onnxruntime = pytest.importorskip("onnxruntime")

LEADING = [(5,), (2, 5), ()]


def export(model, x, has_batch, **options):
    dynamic = ({0: torch.export.Dim("batch")},) if has_batch else None
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False, **options)
    return program.model_proto.SerializeToString(), {node.domain for node in program.model_proto.graph.node}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
def test_runs_in_onnxruntime(stacked, leading, bias, dtype):
    layer = BlockDiagLinear(12, 20, 4, bias=bias, dtype=dtype).eval()
    features = (4, 3) if stacked else (12,)
    x = torch.randn(*leading, *features, dtype=dtype)
    model, domains = export(torch.nn.Sequential(layer, torch.nn.ReLU()).eval(), x, has_batch=leading != ())
    assert domains <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    batches = [x] if leading == () else [x, torch.randn(7, *leading[1:], *features, dtype=dtype)]
    for batch in batches:
        (actual,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(actual), layer(batch).relu())


@pytest.mark.parametrize("empty", [(0, 3), (5, 0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_empty_batches(bias, empty):
    layer = BlockDiagLinear(12, 20, 4, bias=bias).eval()
    dynamic = ({dim: torch.export.Dim(f"d{dim}", min=0) for dim in (0, 1)},)
    table = blockdiag.registration.onnx.translation_table()
    program = torch.onnx.export(
        layer,
        (torch.randn(2, 3, 12),),
        dynamo=True,
        dynamic_shapes=dynamic,
        custom_translation_table=table,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = (input.name for input in session.get_inputs())
    for leading in ((2, 4), empty):
        x = torch.randn(*leading, 12)
        (actual,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), layer(x).detach())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_module(case):
    """Exports by torch.onnx.export without a table."""
    module, inputs = initialized(case), case.inputs(3)
    batch = {0: torch.export.Dim("batch")}
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=(batch,) * len(inputs), verbose=False)
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [input.name for input in session.get_inputs()]
    for size in (3, 5):
        inputs = case.inputs(size)
        actual = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(actual[0]), first(module(*inputs)).detach())


def test_the_table_and_an_exported_program_work_too():
    layer, x = BlockDiagLinear(12, 20, 4).eval(), torch.randn(5, 12)
    expected, domains = export(layer, x, has_batch=True)
    assert (
        export(layer, x, has_batch=True, custom_translation_table=blockdiag.registration.onnx.translation_table())[0]
        == expected
    )
    program = torch.onnx.export(torch.export.export(layer, (x,)), dynamo=True, verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} == domains


def test_registered_once():
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    for _ in range(2):
        blockdiag.registration.onnx.register_translation()
    entries = [entry for entry in _torchlib_registry.get_torchlib_ops() if "blockdiag" in str(entry.fx_target)]
    assert sorted(entry.fx_target.name() for entry in entries) == ["blockdiag::linear", "blockdiag::sparse_linear"]
    assert not any(isinstance(finder, blockdiag.registration.onnx._OnImport) for finder in sys.meta_path)


def test_what_cannot_be_registered_names_the_table(monkeypatch):
    """As in another version of torch, with another registry."""
    registry = "torch.onnx._internal.exporter._torchlib._torchlib_registry"
    monkeypatch.setitem(sys.modules, registry, None)
    with pytest.warns(
        UserWarning, match=r"needs custom_translation_table=blockdiag.registration.onnx.translation_table\(\)"
    ):
        blockdiag.registration.onnx._register()


def test_import_does_not_import_the_exporter():
    code = "import sys, blockdiag; assert not {'onnxscript', 'torch.onnx._internal.exporter._core'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_without_onnxscript(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="pip install onnx onnxscript"):
        blockdiag.registration.onnx.translation_table()
