"""The fused path on the backend of plain PyTorch, which takes any tensor and is quick.

Asked for by name, ``reference`` means plain modules. Here it does the work of a fused
backend: what is tested is everything above the kernels, which have tests of their own.
"""

import contextlib

import pytest
import torch

from vovnet_fast import backends
from vovnet_fast.network import decision
from vovnet_fast.ops import _checks

needs_traces = pytest.mark.skipif(
    not backends.COMPILES, reason=f"torch {torch.__version__} traces no op of a fused path"
)


@contextlib.contextmanager
def fused(*, watched=True):
    """Let modules run as ops, whatever the device.

    ``watched=False``: under dispatch modes too, which are the test's own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "fused", lambda *_: True)
        patch.setattr(backends, "select", lambda *_: "reference")
        if not watched:
            patch.setattr(decision, "watching", lambda *_, **options: None)
            patch.setattr(_checks, "notice_modes", lambda: False)
        yield


@contextlib.contextmanager
def asked_for(name="cpu"):
    """The same where a backend was asked for by name, which may then not be passed over."""
    with fused(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "chosen", lambda: name)
        yield
