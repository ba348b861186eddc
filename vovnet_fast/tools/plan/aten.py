"""What the ATen operations that run have to do, recorded on meta tensors or others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ...network.layers import ESE
from .work import DEPTHWISE, ESE_POOL, POINTWISE, POOL, Work, bytes_of

_MOVE_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_MOVE_NOTHING |= {"as_strided_", "set_"}  # Views in place. Autograd uses the latter for outputs.
_OVERWRITE = {"copy_", "fill_", "zero_"}  # They write their first argument without reading it.
_ATEN_KINDS = {
    "native_batch_norm": "batch norm",
    "relu": "ReLU",
    "mul": POINTWISE,
    "add": POINTWISE,
    "max_pool2d_with_indices": POOL,  # Writes 8 bytes of index an element, wanted or not.
}


class AtenRecorder(TorchDispatchMode):
    """Collects the work of the ATen operations that run inside it, on meta tensors or others.

    Not in inference mode, where an operation may not be taken apart into those that run.

    Attributes:
        works: one for each operation that moves memory. Views and allocations do not.
        in_ese: the operations belong to an eSE module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.works: list[Work] = []
        self.in_ese = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _MOVE_NOTHING:
            operands = tree_flatten((args, kwargs or {}))[0]
            if name in _OVERWRITE:
                del operands[0]
            self.works.append(
                Work(
                    self._kind(name, args),
                    _aten_flop(name, args, result),
                    bytes_of(operands),
                    bytes_of(tree_flatten(result)[0]),
                )
            )
        return result

    def _kind(self, name: str, args: tuple[Any, ...]) -> str:
        if self.in_ese and name != "mul":
            return ESE_POOL
        if name == "convolution":
            _, per_group, height, width = args[1].shape
            groups = args[8]
            return DEPTHWISE if per_group == 1 < groups else f"conv {height}x{width}"
        return _ATEN_KINDS.get(name, name)


def _aten_flop(name: str, args: tuple[Any, ...], result: Any) -> int:
    """Two a multiply-add of a convolution; the FC of eSE is one."""
    if name != "convolution":
        return 0
    return 2 * result.numel() * args[1].shape[1:].numel()  # weight: [C_out, C_in / groups, K, K]


@contextlib.contextmanager
def marking_ese(model: nn.Module, recorder: AtenRecorder) -> Iterator[None]:
    """Tell ``recorder`` when an eSE module runs: alone, its FC looks like any other 1x1."""

    def enter(module: nn.Module, args: Any) -> None:
        recorder.in_ese = True

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        recorder.in_ese = False

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ESE):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        yield
