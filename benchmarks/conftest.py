"""What the benchmarks share: one device, one stopwatch on it, and where the rows come from."""

import pytest
import torch

from vovnet_fast import _provenance as provenance
from vovnet_fast.tools.bench import heap

from .ceilings import Ceilings
from .op_rows import ALL, ENGINES
from .timing import Stopwatch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def watch(device):
    return Stopwatch(device)


@pytest.fixture(scope="session")
def ceilings(watch):
    return Ceilings(watch)


def pytest_addoption(parser):
    parser.addoption(
        "--engines", choices=ENGINES, default=ALL,
        help="which engines of an op are measured: all, one of each form, or those for Hopper",
    )  # fmt: skip


_SEEN, _LEFT_OUT = pytest.StashKey(), pytest.StashKey()


@pytest.fixture(scope="session", autouse=True)
def clocks(device, request):
    """Notes machine and sources before the first row, and clocks from then on."""
    clocks = provenance.Clocks(device)
    found = provenance.collect(device)
    if device.type == "cpu":
        found["heap"] = heap.keep()
    request.config.stash[_SEEN] = (found, clocks)
    return clocks


@pytest.fixture(autouse=True)
def _reading(clocks):
    """Clocks right after the work, while they are those of a busy device."""
    yield
    clocks.see()


def pytest_benchmark_generate_machine_info(config):
    """Instead of pytest-benchmark's, which has the machine's name."""
    if _SEEN not in config.stash:  # No test has run.
        return {}
    found, clocks = config.stash[_SEEN]
    return {"provenance": found | {"clocks": clocks.summary()}}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Notes what was skipped or failed, and why: a report shall not keep it quiet."""
    report = yield
    if report.skipped or report.failed:
        # Of a skip, longrepr is where and why.
        error = f"{call.excinfo.typename}: {call.excinfo.value}" if call.excinfo else ""
        why = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else error
        item.config.stash.setdefault(_LEFT_OUT, []).append(
            {"name": item.name, "status": report.outcome, "why": why.partition("\n")[0][:300]}
        )
    return report


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left_out"] = config.stash.get(_LEFT_OUT, [])


def pytest_benchmark_update_commit_info(config, commit_info):
    for name in ("project", "branch"):  # Names of folders and of work in progress.
        commit_info.pop(name, None)


@pytest.fixture(autouse=True)
def _best_cudnn(device, request):
    """cuDNN may try its algorithms, for every provider: nobody is compared with a bad one."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    with torch.inference_mode(not getattr(request.module, "TRAINS", False)):
        yield
    torch.backends.cudnn.benchmark = before
    if device.type == "cuda":
        torch.cuda.empty_cache()
