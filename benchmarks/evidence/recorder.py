"""A pytest plugin: every outcome and every row of a benchmark is on the disk when it exists.

``pytest -p benchmarks.evidence.recorder`` under ``benchmarks/gpu.py``, which says where; elsewhere
it does nothing. It writes in the process that runs the test, a worker of pytest-xdist too: what a
test does to that process afterwards takes nothing along. A test that never ends is named by the
entry that says that it began.
"""

from __future__ import annotations

import pytest

from .records import Sink

_WHY = 2000
"""Characters of a failure that are kept, its last ones."""

_STATS = ("min", "max", "mean", "stddev", "median", "rounds")
_SINK = pytest.StashKey[Sink]()


def pytest_configure(config):
    """Find out where results go."""
    config.stash[_SINK] = Sink.here()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    """Say that a test begins."""
    item.config.stash[_SINK].began(item.nodeid)
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(item, call):
    """Keep the outcome, before any other plugin sees it and perhaps ends the process."""
    report = yield
    sink = item.config.stash[_SINK]
    if report.when == "call" or not report.passed:
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        sink.ended(item.nodeid, outcome, report.duration, _why(report))
    if report.when == "call" and report.passed:
        _keep_row(item, sink)
    return report


def pytest_collectreport(report):
    """Keep what could not even be collected."""
    if report.failed:
        Sink.here().ended(report.nodeid, "error", 0.0, report.longreprtext[-_WHY:])


def _why(report) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return "" if report.passed else report.longreprtext[-_WHY:]


def _keep_row(item, sink: Sink) -> None:
    """A row of pytest-benchmark, where the test has made one."""
    fixture = getattr(item, "funcargs", {}).get("benchmark")
    measured = getattr(fixture, "stats", None)
    if measured is None:
        return
    stats = {name: getattr(measured.stats, name) for name in _STATS}
    sink.row(item.name, {"stats": stats, **fixture.extra_info})
