"""What older versions of Python and torch lack, each with the version at which it can go.

The package wants Python 3.9 and torch 2.1; what a version cannot do at all is in
docs/compatibility.md, and is refused where it is asked for.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
"""Major and minor version."""

if TYPE_CHECKING or (sys.version_info >= (3, 10) and TORCH >= (2, 5)):
    zip = builtins.zip
else:  # Python 3.9; torch 2.4, whose torch.compile cannot trace ``strict`` either.

    def zip(*iterables: Any, strict: bool = False) -> Iterator[Any]:
        """The builtin one, which knows ``strict`` from Python 3.10 on."""
        if not strict:
            return builtins.zip(*iterables)
        columns = [list(column) for column in iterables]
        if len(set(map(len, columns))) > 1:
            raise ValueError(f"zip() arguments of different lengths: {[*map(len, columns)]}")
        return builtins.zip(*columns)


def packages_distributions() -> dict[str, list[str]]:
    """Distributions by the names that can be imported from them."""
    import importlib.metadata as metadata  # Nobody waits for it who does not ask.

    if sys.version_info >= (3, 10):
        return dict(metadata.packages_distributions())
    found: dict[str, list[str]] = {}  # Python 3.9
    for distribution in metadata.distributions():
        names = (distribution.read_text("top_level.txt") or "").split() or {
            file.parts[0].partition(".")[0] for file in distribution.files or ()
        }
        for name in names:
            found.setdefault(name, []).append(distribution.metadata["Name"])
    return found


TRACES = TORCH >= (2, 7)
"""Whether torch.compile and torch.export can look into a network. Where they cannot, it runs as
ever between two graphs; torch.export raises."""


def hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, into which torch.compile does not look.

    Unlike ``torch.compiler.disable`` it does not import torch._dynamo where nobody else did.
    """
    disabled: Callable[..., Any] = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        return disabled(*args, **options)

    return run


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A network's forward; see :data:`TRACES`. A decorator."""
    return function if TRACES else hidden(function)


if hasattr(torch.compiler, "is_compiling"):
    is_compiling = torch.compiler.is_compiling
else:  # torch 2.1

    def is_compiling() -> bool:
        """Whether torch.compile or torch.export is tracing."""
        return torch._utils.is_compiling()


if hasattr(torch.compiler, "is_exporting"):
    is_exporting = torch.compiler.is_exporting
else:  # torch 2.6, whose torch.export is not told apart from torch.compile.

    def is_exporting() -> bool:
        """Whether torch.export is tracing."""
        return False


if hasattr(torch, "get_autocast_dtype"):

    def autocast_dtype(kind: str) -> torch.dtype | None:
        """The dtype of autocast for devices of a kind, None where it is off."""
        known = kind in ("cpu", "cuda")  # torch 2.4 cannot trace the question.
        if (known or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return None

else:  # torch 2.3

    def autocast_dtype(kind: str) -> torch.dtype | None:
        """The dtype of autocast for devices of a kind, None where it is off."""
        if kind == "cuda" and torch.is_autocast_enabled():
            return torch.get_autocast_gpu_dtype()
        if kind == "cpu" and torch.is_autocast_cpu_enabled():
            return torch.get_autocast_cpu_dtype()
        return None


def register_load_state_dict_pre_hook(module: torch.nn.Module, hook: Callable[..., Any]) -> None:
    """Let ``hook(module, state_dict, prefix, ...)`` see what a module is about to load."""
    if hasattr(module, "register_load_state_dict_pre_hook"):
        module.register_load_state_dict_pre_hook(hook)
    else:  # torch 2.4
        module._register_load_state_dict_pre_hook(hook, with_module=True)


def group_name(group: Any) -> str:
    """The name of a process group."""
    from torch.distributed import distributed_c10d as c10d

    if hasattr(group, "group_name"):
        return str(group.group_name)
    return str(c10d._world.pg_names[group])  # torch 2.1


def process_group(name: str) -> Any:
    """The process group of a name."""
    from torch.distributed import distributed_c10d as c10d

    resolve: Any = getattr(c10d, "_resolve_process_group", None)
    if resolve is not None:
        return resolve(name)
    [group] = [g for g, n in c10d._world.pg_names.items() if n == name]  # torch 2.1
    return group


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """Rows of all processes one after another, into ``out``."""
    import torch.distributed as dist

    if TORCH < (2, 2) and dist.get_backend(group) == "gloo":
        dist.all_gather(list(out.chunk(dist.get_world_size(group))), x, group)
    else:
        dist.all_gather_into_tensor(out, x, group)


def unseen_by_hooks() -> contextlib.AbstractContextManager[Any]:
    """A context in which hooks on what autograd saves, which this thread may have, see nothing.

    Where there may be some, others that do nothing are set over them: an older torch does not tell
    whether there are any.
    """
    state: Any = torch._C._autograd
    top = getattr(state, "_top_saved_tensors_default_hooks", None)
    there = state._saved_tensors_hooks_is_enabled() if top is None else top(False) is not None
    if not there:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(x: Tensor) -> Tensor:
    return x


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` stands for a batch of gradients, as ``is_grads_batched=True`` makes them."""
    known = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    if known is None:  # torch 2.1
        return torch._C._functorch.is_batchedtensor(x)
    return known(x)


# --------------------------------------------------------------------------------------
# torch.library
# --------------------------------------------------------------------------------------

_TAGS = [
    getattr(torch.Tag, name)
    # From torch 2.7 on inductor takes the second for granted.
    for name in ("pt2_compliant_tag", "needs_fixed_stride_order")
    if hasattr(torch.Tag, name)
]


def define(library: torch.library.Library, schema: str) -> None:
    """Define an op. Its operands keep their strides under torch.compile."""
    if _TAGS:
        library.define(schema, tags=_TAGS)
    else:  # torch 2.1
        library.define(schema)


def register_fake(library: torch.library.Library, op: str, fake: Callable[..., Any]) -> None:
    """Say what an op returns, without computing it."""
    if hasattr(torch.library, "register_fake"):
        torch.library.register_fake(op, fake, lib=library)
    elif hasattr(torch.library, "impl_abstract"):  # torch 2.3
        torch.library.impl_abstract(op, fake, lib=library)
    else:  # torch 2.1
        library.impl(op.partition("::")[2], fake, "Meta")


def register_vmap(library: torch.library.Library, op: str, rule: Callable[..., Any]) -> None:
    """Say how an op is mapped. Before torch 2.5 it cannot be said, and vmap raises."""
    if hasattr(torch.library, "register_vmap"):
        torch.library.register_vmap(op, rule, lib=library)


def register_autograd_kernel(
    library: torch.library.Library, name: str, kernel: Callable[..., Any]
) -> None:
    """Let ``kernel(below, *args)`` run where autograd comes; ``below`` is the op beneath it."""
    overload = getattr(getattr(torch.ops, library.ns), name).default
    after = getattr(torch._C, "_after_autograd_keyset", None)
    if after is None:  # torch 2.3

        def plain(*args: Any) -> Any:
            return kernel(overload, *args)

        library.impl(name, plain, "Autograd")
        return

    def with_keyset(keyset: Any, *args: Any) -> Any:
        return kernel(lambda *inner: overload.redispatch(keyset & after, *inner), *args)

    library.impl(name, with_keyset, "Autograd", with_keyset=True)
