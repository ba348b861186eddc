"""Threads and processes: no hang, no more threads than asked for, and the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.extension_cases import require
from vovnet_fast.backends.cpu import convolution

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    """What a process found that began with nothing; where it hangs, this raises."""
    require("cpu")
    if convolution.choose_engine(torch.float32) == "aten":
        pytest.skip("convolutions are oneDNN's here, which are others on other numbers of threads")
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in Linux's /proc")
    words = [sys.executable, "-m", "tests.backends.threads_alone"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert done.returncode == 0
    return json.loads(done.stdout)


def test_more_processes_than_cores(found):
    assert len(found["processes"]) == 2 * os.cpu_count() + 1
    assert all(found["processes"])


def test_the_number_changes_between_calls(found):
    """A frozen network's recorded calls, too."""
    assert len(found["changed"]) == 10
    assert all(found["changed"])


def test_no_more_threads_than_asked_for(found):
    """OpenMP keeps those it has: four at most, of which one is the caller."""
    assert found["threads"]["4"] >= 3
    assert max(found["threads"].values()) <= 3


def test_after_a_fork(found):
    """With one thread: OpenMP's others do not live on in a child, as PyTorch's do not."""
    assert found["forked"] == [True, True]


def test_in_the_workers_of_a_data_loader(found):
    assert found["workers"] == [1] * 4
    assert all(found["loaded"])
