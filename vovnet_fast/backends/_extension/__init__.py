"""The extension ``vovnet_fast._C`` (csrc/), and its ops on tensors.

It has a half for the CPU and, where it was built with nvcc, one for CUDA. Both have the
same functions, which take the structs of ``csrc/params.h``, so :class:`Ops` is written
once: memory-bound functions of :mod:`vovnet_fast.backends` are the extension's,
convolutions are ATen's, followed by one pass of the extension into the slot.

==================  ==================================================================
:mod:`.loading`     finding the extension, and why it is not there
:mod:`.fields`      tensors as fields of its structs
:mod:`.passes`      its passes that follow ATen's convolutions, or prepare them
:mod:`.forward`     the forward functions of a backend
:mod:`.backward`    the backward functions
:mod:`.halves`      both together, on the CPU and on CUDA
==================  ==================================================================
"""

from . import loading
from .halves import CPU, CUDA, Ops
from .loading import build_info, load, why_not

__all__ = ["CPU", "CUDA", "SOURCES", "Ops", "build_info", "load", "loading", "why_not"]

_ROOMS = ("backward", "fields", "forward", "halves", "loading", "passes", "shapes")
SOURCES = ("_C", "backends._aten", *(f"backends._extension.{room}" for room in _ROOMS))
"""Modules of this package that compute the functions of :class:`Ops`."""
