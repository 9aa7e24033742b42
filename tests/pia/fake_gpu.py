"""A GPU whose tensors have no values, for tests on a machine without one: it records where the host would wait for it,
and the copies that it would make.

Work on host tensors is done as always. Layouts are CUDA's: its GroupNorm answers in contiguous memory, and its
convolutions in channels-last memory where one of their inputs has it; the other input is copied to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU: Final = torch.device("cuda:0")

_READS_VALUES: Final = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")
"""Operators whose result or whose shape of a result the host has to know. So has one that solves equations."""

_READERS: Final[dict[Any, type]] = {
    torch.Tensor.__float__: float,
    torch.Tensor.__int__: int,
    torch.Tensor.__bool__: bool,
    torch.Tensor.item: int,
}
"""Methods that give the host a value, and the value's type."""

_COMPOSED: Final = torch._C.DispatchKey.CompositeImplicitAutograd


class FakeGPU:
    """A context in which tensors may be made on `GPU`; `waits` has a text for each time the host would wait."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.copies: list[tuple[str, int]] = []
        """Operator and bytes of each copy within the GPU, also of those that a convolution makes of its inputs."""
        self.num_operators = 0
        """Operators that ran on the GPU."""
        self._modes: tuple[Any, ...] = (FakeTensorMode(allow_non_fake_inputs=True), _Indexing(self), _Operators(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Indexing(TorchFunctionMode):
    """Indexes fake tensors by operators, because `[]` asks for CUDA's runtime."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            return self._indexed(args[0], args[1])
        if func is torch.Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            place, value = self._indexed(args[0], args[1]), args[2]
            if isinstance(value, torch.Tensor):
                return torch.ops.aten.copy_.default(place, value)
            return torch.ops.aten.fill_.Scalar(place, value)
        if func is torch.Tensor.contiguous and isinstance(args[0], FakeTensor):
            return _contiguous(args[0], **(kwargs or {}))  # the method asks for CUDA's runtime
        if func is functional.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return torch.empty_like(args[0])  # the choice of a kernel asks for the GPU's properties
        if func is torch.Tensor.copy_ and all(isinstance(each, FakeTensor) for each in args[:2]):
            return torch.ops.aten.copy_.default(*args)  # the method asks for CUDA's runtime
        if func is torch.Tensor.data_ptr and isinstance(args[0], FakeTensor):
            return args[0].untyped_storage()._cdata + args[0].storage_offset()  # of views it differs, as an address
        if func in _READERS and isinstance(args[0], FakeTensor):
            self._gpu.waits.append(f"{func.__name__} of {list(args[0].shape)}")
            return _READERS[func](1)
        if func is torch.Tensor.new_tensor and isinstance(args[0], FakeTensor):
            self._gpu.waits.append("new_tensor of values in host memory")
            return torch.empty_like(torch.tensor(args[1], dtype=args[0].dtype), device=GPU)
        if func is torch.Tensor.pin_memory:
            return args[0].clone()
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))

    def _indexed(self, tensor: torch.Tensor, index: Any) -> torch.Tensor:
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
            where = next(at for at, part in enumerate(parts) if part is Ellipsis)
            missing = tensor.dim() - sum(part is not None and part is not Ellipsis for part in parts)
            parts[where : where + 1] = [slice(None)] * missing
        axis = 0
        for part in parts:
            if part is None:
                tensor = tensor.unsqueeze(axis)
            elif isinstance(part, int):
                tensor, axis = tensor.select(axis, part), axis - 1
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
            elif isinstance(part, torch.Tensor) and part.is_cuda:
                tensor = torch.ops.aten.index_select.default(tensor, axis, part)
            else:
                self._gpu.waits.append(f"index by {type(part).__name__} in host memory")
                tensor = tensor.narrow(axis, 0, 1).repeat_interleave(len(part), axis)
            axis += 1
        return tensor


def _contiguous(tensor: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    kept = tensor.is_contiguous(memory_format=memory_format)
    return tensor if kept else tensor.clone(memory_format=memory_format)


class _Operators(TorchDispatchMode):
    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode composed operators arrive whole.
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSED.name):
            with self:
                return func._op_dk(_COMPOSED, *args, **kwargs)  # torch's own, because one in Python may ask for CUDA
        device = None if (given := kwargs.get("device")) is None else torch.device(given)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if device != GPU and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._gpu.num_operators += 1
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if self._waits(name, device, tensors, args, kwargs):
            self._gpu.waits.append(f"{name} of {[list(tensor.shape) for tensor in tensors]}")
        if name in ("_local_scalar_dense", "equal"):
            return 1
        if name == "_to_copy" and device == torch.device("cpu"):
            with unset_fake_temporarily():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        if name in ("clone", "copy_", "_to_copy") and device is None:
            self._gpu.copies.append((name, result.nbytes))
        return self._of_cudnn(*args[:2], result) if name == "convolution" else result

    def _of_cudnn(self, pictures: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The result of a convolution in cuDNN's layout (aten/src/ATen/native/ConvUtils.h)."""
        inputs = {"pictures": pictures, "weight": weight}
        layouts = {what: suggest_memory_format(tensor) for what, tensor in inputs.items()}
        near = torch.channels_last in layouts.values()
        layout = torch.channels_last if near else torch.contiguous_format
        for what, tensor in inputs.items():
            if layouts[what] != layout or not tensor.is_contiguous(memory_format=layout):
                self._gpu.copies.append((f"{what} of a convolution", tensor.nbytes))
        return torch.empty_like(result, memory_format=layout)

    def _waits(
        self, name: str, device: torch.device | None, tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]
    ) -> bool:
        if name == "_to_copy":
            return device is not None and device != args[0].device and not kwargs.get("non_blocking", False)
        if name == "copy_":
            return bool(args[0].device != args[1].device and not (args[2:] and args[2]))
        if name.startswith("index"):
            return any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors)
        return name in _READS_VALUES or "solve" in name
