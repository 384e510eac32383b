"""Computes ATen's own CUDA ops on a fake device, whose memory is host memory: `install()`.

ATen's CUDA kernels cannot run, so every op that has one is overridden: the CPU's op gets CPU tensors over the same
memory, and new results are copied into CUDA tensors. ATen keeps the ops that only create or view tensors, and with them
every allocation.
"""

import ctypes
import itertools
import os
import threading
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

# Ops without a CUDA registration: composite, with kernels looked up by device.
COMPOSITE = ["aten::copy_", "aten::convolution", "aten::convolution_backward"]

# These allocate, or do what the CPU's op refuses.
REAL = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::_efficientzerotensor",
    "aten::resize_",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
    "aten::record_stream",
    "aten::_copy_from_and_resize",
}


def _rms_norm_backward(grad, input, normalized_shape, rstd, weight, output_mask):
    """aten::_fused_rms_norm_backward, which has no CPU kernel."""
    normed = input * rstd
    direction = grad if weight is None else grad * weight
    inner, outer = tuple(range(-len(normalized_shape), 0)), tuple(range(input.dim() - len(normalized_shape)))
    grad_input = rstd * (direction - normed * (direction * normed).mean(inner, keepdim=True))
    return grad_input.to(input.dtype), (grad * normed).sum(outer) if output_mask[1] else None


SUBSTITUTES = {"aten::_fused_rms_norm_backward": _rms_norm_backward}


def _find(name: str) -> torch._ops.OpOverload:
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")


def _is_view(op: torch._ops.OpOverload) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns)


def _returns_tensors(op) -> bool:
    return op in SUBSTITUTES.values() or all("Tensor" in str(value.type) for value in op._schema.returns)


def alias(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a CUDA tensor."""
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    if count == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count)
    over = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    over = torch._conj(over) if tensor.is_conj() else over
    return torch._neg_view(over) if tensor.is_neg() else over


class _Exchange:
    """Replaces CUDA tensors in the arguments of one call, and puts CUDA tensors back into its results."""

    def __init__(self, replace: Callable[[Tensor], Tensor]):
        self._replace = replace
        self.device: torch.device | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []  # ours, CUDA's

    def arguments(self, value):
        if isinstance(value, Tensor):
            if value.device.type != "cuda":
                return value
            self.device = self.device or value.device
            ours = self._replace(value)
            self.pairs.append((ours, value))
            return ours
        if isinstance(value, (list, tuple)):
            return type(value)(self.arguments(item) for item in value)
        if isinstance(value, dict):
            return {key: self.arguments(item) for key, item in value.items()}
        if isinstance(value, torch.device) and value.type == "cuda":
            self.device = self.device or value
            return torch.device("cpu")
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            return None
        return value

    def resize(self) -> list[tuple[Tensor, Tensor]]:
        """Resizes CUDA's arguments where an op resized ours, as an empty out=. Returns those that changed."""
        resized = [(ours, theirs) for ours, theirs in self.pairs if ours.shape != theirs.shape]
        for ours, theirs in resized:
            theirs.resize_(ours.shape)
        return resized

    def results(self, value):
        """CUDA tensors for `value`: the argument that it aliases, or a new one, which is added to `pairs`."""
        if isinstance(value, Tensor):
            for ours, theirs in self.pairs:
                if value is ours:
                    return theirs
            new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device or "cuda")
            self.pairs.append((value, new))
            return new
        if isinstance(value, (list, tuple)):
            return type(value)(self.results(item) for item in value)
        return value


class Fake:
    """The fake's switches and log, and the ops that it computes."""

    def __init__(self):
        self._c = ctypes.CDLL(None)
        self._c.fake_cuda_log_entry.restype = self._c.fake_cuda_get.restype = ctypes.c_int64
        self._deferred: dict[int, Callable[[], None]] = {}
        self._keys = itertools.count(1)  # negative for work that is done once
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._run_deferred)
        self._local = threading.local()  # quiet: the fake's own calls are not logged
        self._library = torch.library.Library("aten", "IMPL")

    def set(self, name: str, value: int) -> None:
        """Sets a switch; options.cpp lists them."""
        self._c.fake_cuda_set(name.encode(), ctypes.c_int64(value))

    def get(self, name: str) -> int:
        return self._c.fake_cuda_get(name.encode())

    def clear(self) -> None:
        self._c.fake_cuda_log_clear()

    def log(self) -> list[str]:
        """All calls since `clear`, in order."""
        entries, text = [], ctypes.create_string_buffer(4096)
        while (size := self._c.fake_cuda_log_entry(ctypes.c_int64(len(entries)), text, ctypes.c_int64(4096))) >= 0:
            entries.append(text.raw[: min(size, 4096)].decode())
        return entries

    def _run_deferred(self, key: int) -> None:
        try:
            work = self._deferred.pop(key) if key < 0 else self._deferred[key]
            with torch._C._AutoDispatchBelowAutograd():
                work()
        except BaseException:  # ctypes would ignore it
            traceback.print_exc()
            os.abort()

    def _defer(self, device: int, stream: ctypes.c_void_p, once: bool, work: Callable[[], None]) -> None:
        key = next(self._keys) * (-1 if once else 1)
        self._deferred[key] = work
        self._c.fake_cuda_enqueue(device, stream, self._run, ctypes.c_int64(key))

    def _eager(self, op, args, kwargs):
        exchange = _Exchange(alias)
        args, kwargs = exchange.arguments(args), exchange.arguments(kwargs)
        given = list(exchange.pairs)
        value = op(*args, **kwargs)
        for ours, theirs in exchange.resize():
            alias(theirs).copy_(ours)
        results = exchange.results(value)
        for ours, theirs in exchange.pairs[len(given) :]:
            alias(theirs).copy_(ours)
        return results

    def _later(self, op, args, kwargs, device: int, stream: ctypes.c_void_p, once: bool):
        """Returns results with their shapes; their values follow when the stream is run."""

        def meta(tensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

        def snapshot(value):  # the host may change the value before the stream is run
            if isinstance(value, Tensor) and value.device.type == "cpu":
                return value.clone()
            return type(value)(map(snapshot, value)) if isinstance(value, (list, tuple)) else value

        args = tuple(snapshot(value) for value in args)
        exchange = _Exchange(meta)
        over_meta = exchange.arguments(args), exchange.arguments(kwargs)
        count = len(exchange.pairs)
        if op is torch.ops.aten.copy_.default:  # between two devices
            results = args[0]
        else:
            value = op(*over_meta[0], **over_meta[1])
            exchange.resize()
            results = exchange.results(value)
        made = [theirs for _, theirs in exchange.pairs[count:]]
        over = _Exchange(alias)
        args, kwargs = over.arguments(args), over.arguments(kwargs)
        outputs = [alias(tensor) for tensor in made]
        # Not `over`, which holds CUDA's tensors: a queue that keeps them alive may free them on another thread.
        given = [ours for ours, _ in over.pairs]

        def work():
            value = op(*args, **kwargs)
            flat = list(value) if isinstance(value, (list, tuple)) else [value]
            new = [item for item in flat if not any(item is ours for ours in given)]
            for output, item in zip(outputs, new, strict=True):
                output.copy_(item)

        self._defer(device, stream, once, work)
        return results

    def _call(self, op, args, kwargs):
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else [a])]
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        device = next((t.device.index for t in tensors if t.device.type == "cuda"), torch.cuda.current_device())
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device))
        state = self._c.fake_cuda_begin(device, stream)
        if state == 0:
            return self._eager(op, args, kwargs)
        to_host = op is torch.ops.aten.copy_.default and args[0].device.type == "cpu"
        needs_values = to_host or not _returns_tensors(op)
        if not needs_values:
            try:
                return self._later(op, args, kwargs, device, stream, once=state == 1)
            except NotImplementedError:  # no shapes without values
                if state == 2:
                    raise
        if state == 2:
            raise RuntimeError(f"fake CUDA device: {op} has to wait for its values, which a stream capture forbids")
        self._c.fake_cuda_finish(device, stream)
        return self._eager(op, args, kwargs)

    def _kernel(self, name: str, op):
        label = name.encode()

        def kernel(*args, **kwargs):
            if getattr(self._local, "quiet", False):
                return self._call(op, args, kwargs)
            self._c.fake_cuda_log(label)
            self._local.quiet = True
            try:
                return self._call(op, args, kwargs)
            finally:
                self._local.quiet = False

        return kernel

    def install(self) -> None:
        torch.cuda.init()
        names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
        for name in [*names, *COMPOSITE]:
            if name.startswith("aten::") and name not in REAL and not _is_view(op := _find(name)):
                kernel = self._kernel(name, SUBSTITUTES.get(name, op))
                self._library.impl(name.removeprefix("aten::"), kernel, "CUDA", allow_override=True)


fake = Fake() if hasattr(ctypes.CDLL(None), "fake_cuda_set") else None
