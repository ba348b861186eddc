"""Whether what runs in a thread is the forward pass of an op that autograd takes part in.

Its weights change before they are used again. Without gradients a network's features have to be the
same at every call, whether its weights were kept since the last one or not.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Here(threading.local):
    training = False


_here = _Here()


def training() -> bool:
    """Whether it is."""
    return _here.training


@contextlib.contextmanager
def forward() -> Iterator[None]:
    """Inside, it is."""
    before, _here.training = _here.training, True
    try:
        yield
    finally:
        _here.training = before
