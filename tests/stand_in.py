"""A backend of the reference's functions that ``auto`` considers for CPUs, for tests to break."""

import sys
import types

import torch

from vovnet_fast import backends
from vovnet_fast.backends import reference
from vovnet_fast.selfcheck import sources, trust

FUNCTIONS = [
    name
    for name, value in vars(reference).items()
    if isinstance(value, types.FunctionType)
    and value.__module__ == reference.__name__
    and not name.startswith("_")
    and name != "why_not"
]


def stand_in(monkeypatch, name="fake"):
    """The module of a new backend, the only one that ``auto`` considers."""
    module = types.ModuleType(f"vovnet_fast.backends.{name}")
    module.why_not = lambda device: None
    module.sources = lambda function: ("backends.reference",)
    for function in FUNCTIONS:
        setattr(module, function, getattr(reference, function))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, name))
    monkeypatch.setattr(backends, "CANDIDATES", {"cpu": (name,)})
    return module


def forget():
    """As in a new process."""
    backends._decide.cache_clear()
    trust._verdicts.clear()
    for cached in (trust._table, sources.digest, sources._read):
        cached.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
