"""Peak memory of a computation without running it: on tensors that have shapes but no content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def weightless(dtype: torch.dtype) -> Iterator[None]:
    """Tensors and models made inside have shapes and take no memory; floats are of this dtype. On the CPU."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors made by `run` that are alive at once; those made before it do not count."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.sizes: dict[int, int] = {}
            self.now = self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
            result = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and (key := _storage(tensor)) not in given | self.sizes.keys():
                    storage = tensor.untyped_storage()
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key)
            return result

        def forget(self, key: int) -> None:
            self.now -= self.sizes.pop(key, 0)

    with Living() as living:
        run()
    return int(living.peak)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
