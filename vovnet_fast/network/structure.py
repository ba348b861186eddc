"""Whether modules still are what an op computes in their place, and answers about them.

Anybody may change a module after it was built: its attributes, its ``forward``, its class, its
children, a weight. The modules themselves are looked at, therefore, whenever something depends on
them. An answer is kept until one of them looks different: which children there are and of which
class, hooks, modes, whose ``forward`` runs, geometry, shapes of weights. Looking takes a tenth of
the time of finding the answer again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .. import compat

Answer = TypeVar("Answer")
Class = TypeVar("Class", bound=type[nn.Module])

_PLAIN = (Tensor, nn.Parameter)
"""What parameters are, other than those that a quantisation or a sharding has wrapped."""


_forwards: dict[type, Any] = {}
"""By class of modules, its ``forward`` as it was defined."""

_getters: dict[type, Callable[[dict[str, Any]], Any]] = {}
"""By class of modules, what takes the attributes that this depends on from a module's own."""


def computed_by(*attributes: str) -> Callable[[Class], Class]:
    """Decorate a class of modules in whose place ops can run.

    Args:
        attributes: what its ``forward`` depends on, beside parameters and buffers.
    """

    def remember(cls: Class) -> Class:
        _forwards[cls] = cls.forward
        if attributes:
            _getters[cls] = operator.itemgetter(*attributes)
        return cls

    return remember


computed_by()(nn.ModuleList)
for _cls in (nn.BatchNorm2d, nn.SyncBatchNorm):
    computed_by("eps")(_cls)
computed_by("stride", "padding", "dilation", "groups", "padding_mode")(nn.Conv2d)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is to happen when ``module`` is called, which must then be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_other(module: Any, *classes: type[nn.Module]) -> str | None:
    """Why calling ``module`` may do something else than its class was written to do, or None.

    Args:
        module: whatever there is in the place of a module.
        classes: of which it may be. A class derived from them is another one.
    """
    cls = type(module)
    if cls not in classes:
        return f"the fused path knows {' and '.join(c.__name__ for c in classes)}, not {_name(cls)}"
    # The first is not guarded by torch.compile, which the second is.
    if "forward" in module.__dict__ or module.forward.__func__ is not cls.forward:
        return f"this {cls.__name__} has a forward of its own"
    if cls.forward is not _forwards[cls]:
        return f"{cls.__name__}.forward has been replaced"
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None and type(tensor) not in _PLAIN:
            return f"the fused path knows plain tensors, and its {name} is a {_name(type(tensor))}"
    return None


def _name(cls: type) -> str:
    return "None" if cls is type(None) else cls.__name__


def why_other_conv(
    conv: nn.Conv2d, shape: tuple[int, ...], strides: tuple[int, ...], groups: int = 1
) -> str | None:
    """Why an ``nn.Conv2d`` is not the one that an op computes, or None.

    Args:
        conv: the convolution.
        shape: of its weight. Padding is half the kernel.
        strides: those that it may have.
        groups: of its channels.
    """
    weight = getattr(conv, "weight", None)
    if weight is None or tuple(weight.shape) != shape:
        found = "gone" if weight is None else str(list(weight.shape))
        return f"its weight is {found}, and was built as {list(shape)}"
    half = shape[2] // 2
    expected: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("stride", conv.stride, tuple((s, s) for s in strides)),
        ("padding", conv.padding, ((half, half),)),
        ("dilation", conv.dilation, ((1, 1),)),
        ("groups", conv.groups, (groups,)),
        ("padding_mode", conv.padding_mode, ("zeros",)),
    )
    for name, value, known in expected:
        if value not in known:
            return f"the fused path knows {name}={' or '.join(map(str, known))}, not {value!r}"
    return None


def _nothing(own: dict[str, Any]) -> None:
    """What an ``itemgetter`` of no attributes would be."""


def _look(module: nn.Module) -> tuple[Any, ...]:
    # It runs for every module at every call: some tenths of a millisecond for the largest network.
    own, cls = module.__dict__, module.__class__
    parameters = own["_parameters"]
    weight = parameters.get("weight")
    if weight is None:
        weight = own.get("weight")  # Of FSDP's views, no parameters.
    try:
        attributes = _getters.get(cls, _nothing)(own)
    except KeyError:  # Somebody has put a module in its place, say.
        attributes = None
    return (
        cls,
        cls.forward,
        own["training"],
        "forward" in own,
        not own["_modules"],
        not (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ),
        own["_buffers"].get("running_mean") is None,
        weight.__class__,
        parameters.get("bias").__class__,
        weight.shape if cls is nn.Conv2d and weight is not None else None,
        attributes,
    )


class _Kept(Generic[Answer]):
    """An answer, and what was seen when it was given.

    It must not hold the module that it is about, which is the key that it is kept by.
    """

    __slots__ = ("_below", "_children", "_leaves", "_looks", "_parents", "answer")

    def __init__(self, root: nn.Module, answer: Answer) -> None:
        self.answer = answer
        self._children = list(root._modules.values())
        self._below = [module for module in root.modules() if module is not root]
        self._looks = [_look(module) for module in self._below]
        self._parents = [(m, list(m._modules.values())) for m in self._below if m._modules]
        self._leaves = [module for module in self._below if not module._modules]

    def holds(self, root: nn.Module) -> bool:
        """Whether everything is as it was."""
        return (
            list(root._modules.values()) == self._children
            and all(list(m._modules.values()) == children for m, children in self._parents)
            and [_look(module) for module in self._below] == self._looks
        )

    def tensors(self) -> list[Any]:
        """What its convolutions and norms compute with just now, in an order that does not change.

        None stands for what one of them does not have.
        """
        found = []
        for module in self._leaves:
            own = module.__dict__  # As in _look().
            parameters, buffers = own["_parameters"], own["_buffers"]
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = own.get(name)
                if tensor is None:
                    tensor = parameters.get(name)
                found.append(buffers.get(name) if tensor is None else tensor)
        return found


_kept: WeakKeyDictionary[nn.Module, _Kept[Any]] = WeakKeyDictionary()


def kept(root: nn.Module, find: Callable[[], Answer]) -> Answer:
    """What ``find()`` says, which has to depend on the modules below ``root`` alone.

    A root has one answer: it is always asked with the same ``find``. torch.compile traces
    ``find`` itself, and guards what it reads.
    """
    if compat.is_compiling():
        return find()
    known: _Kept[Answer] | None = _kept.get(root)
    if known is None or not known.holds(root):
        known = _kept[root] = _Kept(root, find())
    return known.answer


def known(root: nn.Module) -> _Kept[Any] | None:
    """What was last seen of the modules below ``root`` by :func:`kept`; another one if they change.

    None before its first call.
    """
    return _kept.get(root)
