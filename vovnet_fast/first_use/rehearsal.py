"""What a network will launch, found out on meta tensors, which have shapes and no memory.

The network's own code runs on a twin of it. What tuning would measure is launched there as
well, and so is what the self-check runs of the functions that are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import backends, selfcheck, tuning
from ..kernels._common import Launch, Target, planning_for, recording, target_of
from ..ops import NetworkParams
from ..ops._checks import nhwc
from ..ops.features import needs
from ..ops.features import run as run_features

Module = TypeVar("Module", bound=nn.Module)


class Setting(NamedTuple):
    """Where and how a network will run.

    Attributes:
        target: the GPU.
        planning: which engines it will measure, and which it knows.
    """

    target: Target = Target()
    planning: tuning.Planning = tuning.Planning()

    @classmethod
    def here(cls, device: torch.device) -> Setting:
        """That of this process on a GPU."""
        planning = tuning.Planning(tuning.machine(device), tuning.enabled())
        return cls(target_of(device), planning)


class Plan(NamedTuple):
    """What a run needs.

    Attributes:
        launches: in order, those of tuning too.
        functions: of the backend that are used; see :mod:`vovnet_fast.backends`.
    """

    launches: list[Launch]
    functions: frozenset[str]


def of_model(model: Any, x: Tensor, setting: Setting) -> Plan:
    """What ``model(x)`` needs, and its backward pass, if autograd would want one.

    Args:
        model: a :class:`vovnet_fast.VoVNet` on meta tensors, as :func:`twin` makes it.
        x: images, on meta and in the dtype of activations.
        setting: where it runs.
    """
    with planning(setting) as plan:
        if model.decide(x).op:
            _run_folded(model.fold(x.dtype), x, model.out_features)
        else:
            features = [f for f in model._run_modules(x) if f.requires_grad]
            if features:
                torch.autograd.backward(features, [torch.empty_like(f) for f in features])
    return plan()


def of_params(
    params: NetworkParams, x: Tensor, out_features: tuple[str, ...], setting: Setting
) -> Plan:
    """What :func:`vovnet_fast.ops.features` needs for ``[N, C, H, W]`` images on meta."""
    with planning(setting) as plan:
        _run_folded(params, x, out_features)
    return plan()


def _run_folded(params: NetworkParams, x: Tensor, out_features: tuple[str, ...]) -> None:
    backend = backends.get(x.device, x.dtype, needs(params.spec))
    run_features(backend, nhwc(x), params, out_features)


@contextlib.contextmanager
def planning(setting: Setting) -> Iterator[Callable[[], Plan]]:
    """Note what is launched inside; what it gives away makes the plan of that."""
    needed: set[str] = set()
    with (
        recording() as launches,
        planning_for(setting.target),
        tuning.planning(setting.planning),
        backends.shapes_only("triton", needed),
    ):
        yield lambda: Plan(launches, frozenset(needed))


def self_check(functions: Collection[str], dtype: torch.dtype, target: Target) -> list[Launch]:
    """What the self-check of these functions launches, for activations of ``dtype``."""
    with planning_for(target):
        return selfcheck.launches(functions, dtype, "meta")


def twin(model: Module) -> Module:
    """A module of the same structure and modes with its tensors on meta.

    It shares everything else with the model, but for hooks, of which it has none. Statistics
    of a batch are those of one process: others are not to be waited for.
    """
    kind: type[nn.Module] = type(model)
    if isinstance(model, nn.SyncBatchNorm):
        kind = nn.BatchNorm2d
    found: Any = object.__new__(kind)  # FSDP's own would initialise it.
    found.__dict__.update(model.__dict__)
    for name in [name for name in found.__dict__ if name.endswith("_hooks")]:
        found.__dict__[name] = type(found.__dict__[name])()
    found._parameters = {
        name: None if p is None else nn.Parameter(on_meta(p), p.requires_grad)
        for name, p in model._parameters.items()
    }
    found._buffers = {name: None if b is None else on_meta(b) for name, b in model._buffers.items()}
    found._modules = {
        name: None if child is None else twin(child) for name, child in model._modules.items()
    }
    return found


def on_meta(tensor: Tensor) -> Tensor:
    """Not ``to``: of a tensor that is spread over several devices the whole is meant."""
    return torch.empty_strided(
        tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="meta"
    )
