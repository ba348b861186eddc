"""Where the kernels of csrc/cuda that multiply by warps run in tests."""

import pytest
import torch

from tests.csrc import cuda_on_cpu, hopper
from tests.extension_cases import require
from vovnet_fast.backends import _extension


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernel runs; on the host it must never meet a conflict of banks."""
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        require("cuda")
        yield torch.device("cuda")
        return
    module = cuda_on_cpu.built(request.getfixturevalue("once"))
    monkeypatch.setattr(_extension, "CUDA", _extension.Ops(lambda: module, cuda_on_cpu.on_host))
    module.take_counts()
    module.copies_land_early(False)
    yield torch.device("cpu")
    module.copies_land_early(False)


@pytest.fixture
def emulation(once, device):
    if device.type != "cpu":
        pytest.skip("looks at what the host counts")
    return cuda_on_cpu.built(once)


@pytest.fixture(scope="session")
def simulator(once):
    """A GPU that runs the Hopper convolution."""
    name = "simulator.so"
    folder = once.folder(
        "conv_sm90", lambda folder: hopper.build("conv_sm90_simulator.cpp", folder / name)
    )
    return hopper.Simulator(folder / name)
