import os
from pathlib import Path

# Networks here are small and tests run side by side (pytest-xdist): several threads
# a process would only wait for each other. NumPy's, which multiply for Triton's
# interpreter, are asked for when it is imported: torch does that.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

from tests.once import Once, root_of

torch.set_num_threads(1)

# A network's first step of a kind on a CPU measures in which way it is fastest: here that would
# take longer than the step, and what runs would depend on the machine. Tests of it say otherwise.
if not torch.cuda.is_available():
    os.environ.setdefault("VOVNET_FAST_TUNE", "0")

KERNELS = Path(__file__).parent / "kernels"

LONGEST = ("aot", "benchmarks", "csrc", "kernels", "native_build", "network")
"""Whose files take minutes. Workers (pytest-xdist) take whole files in the order of collection: one
of these that came last would keep one worker busy while the others had nothing left to do."""


@pytest.fixture(scope="session")
def once(request, tmp_path_factory):
    """Makes what several test files share."""
    return Once(root_of(request.config, tmp_path_factory))


def pytest_configure(config):
    """Let Triton interpret where tests of kernels are going to run, and there is no GPU.

    Triton asks when the kernels are imported, which other tests do before those are collected.
    """
    chosen = [Path(arg.partition("::")[0]).resolve() for arg in config.args]
    kernels = any(c == KERNELS or KERNELS in c.parents or c in KERNELS.parents for c in chosen)
    if kernels and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)
