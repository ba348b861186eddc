"""Who else is looking at a call: then modules run it, on plain PyTorch, which all of them know.

============================================  ==============================================
hooks of all modules                          see every module that is called (flop counters)
``torch.func``, vmap, forward-mode AD         have rules for PyTorch's own functions
dispatch modes, subclasses of ``Tensor``      see PyTorch's own functions, one by one
============================================  ==============================================

Hooks of one module are :mod:`.structure`'s business.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.modules.module as hooks
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import compat


class Watched(NamedTuple):
    """That there is somebody.

    Attributes:
        why: who it is.
        knows_ops: ops would be right as well, if a backend is asked for by name.
    """

    why: str
    knows_ops: bool = False


_HOOKS = Watched("hooks of all modules (torch.nn.modules.module) want to see every one of them")
_TRANSFORM = Watched("transforms of torch.func have rules for PyTorch's own functions alone")
_DUAL = Watched("forward-mode AD has rules for PyTorch's own functions alone")
_MODE = Watched("a dispatch mode is looking at PyTorch's own functions", knows_ops=True)


def watching(x: Tensor, *, modules: bool = True) -> Watched | None:
    """Who is looking at what becomes of ``x``, or None. torch.compile traces for itself.

    ``modules``: there are some that run it, for hooks to see.
    """
    if modules and _hooks_of_all():
        return _HOOKS
    if compat.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return _TRANSFORM
    if forward_ad._current_level >= 0:
        return _DUAL
    if torch._C._len_torch_dispatch_stack() > 0:
        return _MODE
    if type(x) not in (Tensor, nn.Parameter):
        return Watched(f"the input is a {type(x).__name__}, not a plain tensor", knows_ops=True)
    return None


def _hooks_of_all() -> bool:
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
