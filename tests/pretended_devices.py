"""Several devices where there is one: tensors that compute on the CPU and refuse what tensors on two GPUs would.

Inside :func:`pretended_devices`, `cpu:0`, `cpu:1` and so on are devices of their own, apart from each other and from
the host, which is plain `cpu`. A tensor moved to one, or made there, is a :class:`Placed`; an operation on tensors of
two devices raises, as on GPUs, and else gives the real numbers. (torch's FakeTensorMode checks devices too, but has no
numbers, so that nothing that looks at a value, as a perplexity or a cut does, can run in it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ACROSS = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
"""Take indices from the host, whatever the device of what is indexed."""


class Placed(Tensor):
    """A tensor on a pretended device; `held` has its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held!r}, {self.device})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Placed)
        torch._C.TensorBase.data.__set__(self, value)  # sizes, strides and device
        self.held = value.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()  # accelerate tells tied weights by it

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    """Sees what :class:`Placed` does not: operations that make tensors, and that move them from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Makers(TorchFunctionMode):
    """`torch.tensor` moves what it makes where no dispatch mode sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Inside, `cpu:N` are devices of their own."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to keeps the class
    try:
        with _Devices(), _Makers():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def on_host(tensor: Tensor) -> Tensor:
    """The numbers of a tensor on any device."""
    return tensor.detach().cpu()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if _is_composite(func):
        with _Devices():  # in inference mode nothing has taken it apart yet, `to` among others
            return func.decompose(*args, **kwargs)
    tensors: list[Tensor] = []

    def bare(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor.held if isinstance(tensor, Placed) else tensor

    bare_args = _changed(args, bare)
    bare_kwargs = {key: _changed(value, bare) for key, value in kwargs.items()}
    wanted = kwargs.get("device")
    device = _common_device(func, args, tensors) if wanted is None else torch.device(wanted)
    own = {id(each.held): each for each in tensors if isinstance(each, Placed)}
    if wanted is not None and device.index is not None:
        bare_kwargs["device"] = torch.device("cpu")
    result = func(*bare_args, **bare_kwargs)

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) in own:  # what an operation in place gives back is what it was given
            return own[id(tensor)]
        return tensor if device.index is None else Placed(tensor, device)

    # A view can be written to outside inference mode if what it is a view of can.
    inference = tensors[0].is_inference() if _is_view(func) else torch.is_inference_mode_enabled()
    with torch.inference_mode(inference):
        return _changed(result, placed)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change tensors, in lists and tuples too; torch's own `tree_map` takes any structure, and far longer."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_changed(each, change) for each in value])
    return value


@cache
def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@cache
def _is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns]
    return any(each is not None and not each.is_write for each in aliases)


def _common_device(func: Any, args: Any, tensors: list[Tensor]) -> torch.device:
    if func in _ACROSS:
        return args[0].device
    devices = {each.device for each in tensors if isinstance(each, Placed) or each.ndim > 0}
    if func in _INDEXING and args[0].device.index is not None:
        devices.discard(torch.device("cpu"))
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{func}: expected all tensors on the same device, found {names}")
    return devices.pop() if devices else torch.device("cpu")
