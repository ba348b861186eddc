"""Packages that are not there, or are broken, stop neither the benchmarks nor the tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cpu, peers
from vovnet_fast import _optional, backends
from vovnet_fast.tools import doctor

ROOT = Path(__file__).parent.parent
CASE = peers.Case("V-19-slim-dw-eSE", (1, 64, 64), torch.float32, torch.device("cpu"))
BROKEN = "raise RuntimeError('operator torchvision::nms does not exist\\nand more')"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of a name and a source, before all others of that name."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(name, source):
        made.append(name)
        for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        _optional.why_not.cache_clear()

    yield make
    for name in made:  # What was there before comes back.
        sys.modules.pop(name, None)
    _optional.why_not.cache_clear()


def test_one_that_is_there(package):
    package("whole", "")
    assert _optional.why_not("whole") is None


def test_one_that_is_missing(package):
    package("whole", "import missing_below")
    assert _optional.why_not("missing_here") == (
        "missing_here is not installed (pip install missing_here)"
    )
    assert _optional.why_not("missing_here.part") == _optional.why_not("missing_here")
    # Of what is there, the part that is not is named.
    assert "No module named 'missing_below'" in _optional.why_not("whole")


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_one_that_is_for_one_torch_alone(monkeypatch, name):
    """pip would take the newest, and upgrade torch; a CPU build's version is known to no index."""
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    assert _optional.remedy(name) == f'pip install {name} "torch==2.4.1"'


def test_one_that_is_broken(package):
    package("broken", BROKEN)
    assert _optional.why_not("broken") == (
        "broken cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    )


@pytest.mark.parametrize(
    ("version", "old"), [("2.1.0", True), ("3.1.0", True), ("3.2.0", False), ("3.10.1", False)]
)
def test_a_triton_that_is_too_old(package, version, old):
    """torch 2.5 brings one without what the kernels import."""
    package("triton", f"__version__ = {version!r}")
    reason = _optional.why_not("triton")
    if not old:
        assert reason is None
        return
    assert f"triton {version} is older than 3.2" in reason
    assert backends.available_backends()["triton"] == reason
    with pytest.raises(backends.BackendError, match=r"install torch 2\.6 or newer"):
        backends.use_backend("triton").__enter__()


@pytest.mark.parametrize("name", ["timm", "onnxruntime", "openvino"])
def test_peers_that_are_broken_are_missing(package, name):
    package(name, BROKEN)
    with pytest.raises(peers.Missing, match=f"{name} cannot be imported: RuntimeError: operator"):
        peers.PEERS[name].ready(CASE)


def test_a_table_has_the_reason(package):
    package("timm", BROKEN)
    rows = cpu._measure(CASE, ["timm"], 6)
    assert [row["peer"] for row in rows] == ["eager", "timm"]
    assert "timm cannot be imported: RuntimeError" in "\n".join(
        cpu._table(CASE.spec, 64, [{**row, "dtype": "fp32"} for row in rows])
    )


def test_the_doctor_names_what_is_broken(package):
    package("mmdet", "assert False, 'MMCV==1.0 is used but incompatible'")
    assert dict(doctor._versions())["mmdet"] == (
        "mmdet cannot be imported: AssertionError: MMCV==1.0 is used but incompatible"
    )


OPTIONAL = (
    "cudnn", "matplotlib", "mmcv", "mmdet", "mmengine", "ninja", "onnx", "onnxruntime",
    "onnxscript", "pybind11", "pytest_benchmark", "setuptools", "skimage", "sklearn", "timm",
    "torchvision", "triton", "xdist",
)  # fmt: skip

_WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

sys.modules.update(dict.fromkeys({OPTIONAL}))
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "vovnet_fast._C" else find(name, *rest)
"""


def test_all_tests_are_collected_without_them(tmp_path):
    """Without the extension too. What needs them is skipped, when it is imported or run."""
    (tmp_path / "without.py").write_text(_WITHOUT)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    words = ["-p", "without", "-p", "no:cacheprovider", "--assert=plain", "--collect-only", "-qq"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    skipped = {line.split()[2] for line in done.stdout.splitlines() if "SKIPPED" in line}
    assert any("test_mmdet_configs.py" in place for place in skipped)
    assert any("kernels/conftest.py" in place for place in skipped)
