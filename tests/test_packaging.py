"""What pip gets, and what importing it costs."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.features import require_pip
from vovnet_fast import __version__, _optional

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it.
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def tracked(*patterns):
    """The files that git tracks, relative to the root."""
    words = ["git", "ls-files", "-z", *patterns]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]


def pip(*words, **options):
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built where no compiler can be found."""
    require_pip()
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "repo"
    # A clean copy of what git tracks: leftovers of earlier builds must not help.
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.write_text(os.readlink(ROOT / name))  # As in a checkout on Windows.
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "PATH": str(folder), "CC": "/bin/false", "CXX": "/bin/false"}
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", folder)
    pip("wheel", *options, source, env=environment)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"vovnet_fast-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {
        "vovnet_fast",
        f"vovnet_fast-{__version__}.dist-info",
    }
    for needed in ("vovnet_fast/py.typed", "vovnet_fast/network/model.py", "vovnet_fast/mmdet.py"):
        assert needed in names
    assert set(tracked("vovnet_fast/*.py")) <= set(names)
    tables = tracked("kernels/resources/*.json")
    assert tables
    assert {f"vovnet_fast/{name}" for name in tables} <= set(names)
    metadata = next(n for n in names if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.9", "Extra: onedl"):
        assert line in text.replace("Provides-Extra", "Extra")
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_wheel_works_where_it_is_installed(wheel, tmp_path):
    pip("install", "-q", "--no-deps", "--no-compile", "--target", tmp_path / "site", wheel)
    code = (
        "import torch, vovnet_fast, sys; "
        "assert vovnet_fast.__file__.startswith(sys.argv[1]), vovnet_fast.__file__; "
        "print([tuple(f.shape) for f in vovnet_fast.VoVNet('V-19-slim-dw-eSE').eval()"
        "(torch.zeros(1, 3, 64, 64))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "(1, 512, 2, 2)" in done.stdout


def test_importing_needs_neither_mmdet_nor_a_gpu_stack():
    code = (
        "import sys, vovnet_fast, vovnet_fast.tools.cli; "
        "heavy = {'mmdet', 'mmcv', 'mmengine', 'triton', 'torchvision', 'matplotlib', 'onnx'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_timm_missing_or_too_old_is_one_clear_error():
    code = (
        "import sys; sys.modules['timm'] = None; import vovnet_fast\n"
        "from unittest.mock import MagicMock\n"
        "def attempt():\n"
        "    try: import vovnet_fast.timm\n"
        "    except ImportError as e: print(e)\n"
        "attempt()\n"
        "for name in ('timm', 'timm.layers', 'timm.models'): sys.modules[name] = MagicMock()\n"
        "sys.modules['timm'].__version__ = '0.8.23'\n"
        "attempt()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    missing, old = done.stdout.splitlines()
    assert "needs timm 0.9 or newer, and importing it failed with" in missing
    assert "needs timm 0.9 or newer, got 0.8.23" in old
    assert all(f"with: {_optional.remedy('timm')}" in line for line in (missing, old))


def test_mmdet_missing_is_one_clear_error(tmp_path):
    code = (
        "import sys; sys.modules['mmdet'] = None; import vovnet_fast\n"
        "try: import vovnet_fast.mmdet\n"
        "except ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 'pip install "vovnet-fast[onedl]"' in done.stdout


# --------------------------------------------------------------------------------------
# What it asks pip for, beside what there is
# --------------------------------------------------------------------------------------

OF_OPENMMLAB = re.compile(r"(onedl-)?mm[a-z0-9-]+|mmcv|openmim")
TIED_TO_A_TORCH = {"fairscale", "timm", "torch", "torchaudio", "torchvision", "xformers"}


def asked_for():
    """Every requirement by the extra that has it; the package's own under ``""``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            yield extra, Requirement(line)


def test_extras_that_are_named_exist():
    there = {extra for extra, _ in asked_for()}
    for name in tracked("*.py", "*.md", "Makefile"):
        for extras in re.findall(
            r"(?:vovnet-fast|\"\.)\[([a-z0-9,]+)\]", (ROOT / name).read_text()
        ):
            assert set(extras.split(",")) <= there, f"{name}: {extras}"


def test_openmmlabs_packages_are_asked_for_by_name_or_not_at_all():
    """Two distributions own each of their folders: pip lays one over the other without a word."""
    found = {(extra, r.name) for extra, r in asked_for() if OF_OPENMMLAB.fullmatch(r.name)}
    assert {name for _, name in found} >= {"onedl-mmcv", "onedl-mmdetection", "onedl-mmengine"}
    wrong = {(e, name) for e, name in found if e != "onedl" or not name.startswith("onedl-")}
    assert not wrong, "only the extra whose name says so may bring OpenMMLab's packages"
    nested = {(extra, str(r)) for extra, r in asked_for() if "onedl" in r.extras}
    assert not nested, "an extra that brings the extra onedl does what that does"


def test_no_extra_makes_pip_change_torch():
    """A torchvision fits one torch alone, and a torch of CUDA asks for one Triton."""
    found = [(extra, r) for extra, r in asked_for() if r.name in TIED_TO_A_TORCH]
    assert [(extra, str(r)) for extra, r in found] == [("", "torch>=2.1")]
    triton = [r for _, r in asked_for() if r.name == "triton"]
    assert [str(r.specifier) for r in triton] == [""], "any that is there will do for pip"
