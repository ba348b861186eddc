"""A heap that keeps what is freed, so that no call that is timed pays for pages."""

import platform
import subprocess
import sys

import pytest

from vovnet_fast.tools.bench import heap

FAULTS = """
import resource, torch
from vovnet_fast.tools.bench import heap
{first}
def faults():
    for megabytes in (3, 80, 40):  # Larger than what glibc ever keeps by itself, too.
        torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
print(faults() - faults())
"""


def count(first: str) -> int:
    program = FAULTS.format(first=first)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return -int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_freed_stays():
    assert count("") > 10000
    assert count("assert 'mallopt' in heap.keep()") < 100


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert heap.keep() == "the system's"
