"""A pytest plugin: an error that the GPU cannot recover from fails one test, not all after it.

``pytest -p benchmarks.lost_device``. After an illegal access every CUDA call of the process
fails. Under pytest-xdist the worker then ends, and a new one takes its remaining tests; in a
single process the session stops, and what has run is reported.
"""

from __future__ import annotations

import os

import pytest
import torch


def _lost() -> bool:
    """Whether the device of this process can no longer be used."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Look after the device where a test has failed."""
    report = yield
    if report.failed and _lost():
        text = f"\n{item.nodeid} lost the device:\n{report.longreprtext[-4000:]}\n"
        os.write(2, text.encode())  # The report itself goes with the worker.
        if hasattr(item.config, "workerinput"):
            os._exit(70)
        item.session.shouldstop = "the device is lost"
    return report
