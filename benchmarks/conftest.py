"""What the benchmarks share: one device, and one stopwatch on it."""

import pytest
import torch

from .timing import Stopwatch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def watch(device):
    return Stopwatch(device)


@pytest.fixture(autouse=True)
def _best_cudnn(device, request):
    """cuDNN may try its algorithms, for every provider: nobody is compared with a bad one."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    with torch.inference_mode(not getattr(request.module, "TRAINS", False)):
        yield
    torch.backends.cudnn.benchmark = before
    if device.type == "cuda":
        torch.cuda.empty_cache()
