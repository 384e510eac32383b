"""Export to ONNX: onnxruntime, which has no operator of ours, computes the same."""

import pytest
import torch

import blockdiag.onnx
from blockdiag import BlockDiagLinear

onnxruntime = pytest.importorskip("onnxruntime")

LEADING = [(5,), (2, 5), ()]


def export(model, x, has_batch):
    dynamic = ({0: torch.export.Dim("batch")},) if has_batch else None
    table = blockdiag.onnx.translation_table()
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=dynamic, custom_translation_table=table, verbose=False
    )
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
    table = blockdiag.onnx.translation_table()
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


def test_without_onnxscript(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="pip install onnx onnxscript"):
        blockdiag.onnx.translation_table()
