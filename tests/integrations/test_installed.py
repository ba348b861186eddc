"""Which distributions own mmcv, mmdet and mmengine, told from metadata that tests make up."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vovnet_fast.integrations import installed
from vovnet_fast.tools import cli, doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path that alone has distributions, and a function that puts one there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()

    def put(name, version, module, *, files=("__init__.py",), top_level=True, gone=()):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (folder / "RECORD").write_text("".join(f"{module}/{f},,\n" for f in (*files, *gone)))
        if top_level:
            (folder / "top_level.txt").write_text(f"{module}\n")
        (tmp_path / module).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / module / file).write_text(f"__version__ = {version!r}\n")

    put.folder = tmp_path
    return put


def only_problem():
    (problem,) = installed.problems()
    return problem


def test_nothing_and_what_goes_together(site):
    assert installed.problems() == []
    assert installed.installed("mmcv") == []
    site("numpy", "2.0", "numpy")
    site("onedl-mmcv", "2.3.6", "mmcv")
    site("onedl-mmengine", "0.10.12", "mmengine", top_level=False)
    site("onedl-mmdetection", "3.5.1", "mmdet")
    assert installed.problems() == []
    (found,) = installed.installed("mmengine")
    assert (found.name, found.version, found.onedl) == ("onedl-mmengine", "0.10.12", True)


@pytest.mark.parametrize(
    ("mmcv", "mmdet"),
    [
        (("mmcv", "2.1.0"), ("mmdet", "3.3.0")),
        (("mmcv", "2.0.0rc4"), ("mmdet", "3.0.0")),
        (("mmcv-full", "1.7.2"), ("mmdet", "2.28.2")),
        (("mmcv", "1.7.2"), ("mmdet", "2.28.2")),
        (("onedl-mmcv", "2.3.6"), ("onedl-mmdetection", "3.5.1")),
    ],
)
def test_generations_that_fit(site, mmcv, mmdet):
    site(*mmcv, "mmcv")
    assert installed.problems() == []
    site(*mmdet, "mmdet")
    assert installed.problems() == []


@pytest.mark.parametrize(
    ("mmcv", "mmdet", "words"),
    [
        (("mmcv", "2.2.0"), ("mmdet", "3.3.0"), ["refuses mmcv 2.2", 'mim install "mmcv==2.1.0"']),
        (("onedl-mmcv", "2.3.6"), ("mmdet", "3.2.0"), ["uninstall -y onedl-mmcv mmdet)"]),
        (("mmcv-full", "1.7.2"), ("mmdet", "3.3.0"), ["needs mmcv 2.x", "mmdet==2.28.2"]),
        (("mmcv", "2.1.0"), ("mmdet", "2.28.2"), ["for mmcv 1.x", "mmcv-full==1.7.2"]),
    ],
)
def test_generations_that_do_not(site, mmcv, mmdet, words):
    site(*mmcv, "mmcv")
    site(*mmdet, "mmdet")
    problem = only_problem()
    for word in [" ".join(mmcv), " ".join(mmdet), *words]:
        assert word in problem


@pytest.mark.parametrize(
    ("module", "first", "second"),
    [
        ("mmcv", ("mmcv", "2.1.0"), ("onedl-mmcv", "2.3.6")),
        ("mmcv", ("mmcv", "1.7.2"), ("mmcv-full", "1.7.2")),
        ("mmdet", ("mmdet", "3.3.0"), ("onedl-mmdetection", "3.5.1")),
        ("mmengine", ("mmengine", "0.10.4"), ("onedl-mmengine", "0.10.12")),
    ],
)
@pytest.mark.parametrize("top_level", [True, False])
def test_one_folder_of_two_owners(site, module, first, second, top_level):
    site(*first, module, top_level=top_level)
    site(*second, module, top_level=top_level)
    problem = only_problem()
    assert f"{' '.join(first)} and {' '.join(second)} are both installed" in problem
    assert f"own the same folder {module}" in problem
    assert f"pip uninstall -y {first[0]} {second[0]}" in problem
    assert f'"{second[0]}=={second[1]}"' in problem


def test_what_an_uninstall_left(site):
    site("onedl-mmcv", "2.3.6", "mmcv", gone=("cnn.py", "video.py"))
    problem = only_problem()
    assert "onedl-mmcv 2.3.6 is there by half: 2 files of it are gone, mmcv/cnn.py" in problem
    assert '--force-reinstall --no-deps "onedl-mmcv==2.3.6"' in problem


def test_one_distribution_twice_on_the_path_is_one(site, tmp_path, monkeypatch):
    site("mmcv", "2.1.0", "mmcv")
    other = tmp_path / "other"
    (other / "mmcv-2.0.0.dist-info").mkdir(parents=True)
    (other / "mmcv-2.0.0.dist-info" / "METADATA").write_text("Name: mmcv\nVersion: 2.0.0\n")
    (other / "mmcv-2.0.0.dist-info" / "top_level.txt").write_text("mmcv\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(other)])
    assert [it.version for it in installed.installed("mmcv")] == ["2.1.0"]
    assert installed.problems() == []


def test_what_to_install_does_not_change_what_is_there(site):
    assert 'pip install "vovnet-fast[mmdet]"' in installed.remedy("mmdet")
    site("mmcv-full", "1.7.2", "mmcv")
    assert installed.remedy("mmdet") == 'pip install "mmdet==2.28.2" for mmcv-full 1.7.2'
    assert 'mim install "mmcv-full==1.7.2"' in installed.remedy("mmcv._ext")


# --------------------------------------------------------------------------------------
# Where it is said
# --------------------------------------------------------------------------------------


PROBLEM = "mmdet 3.3.0 refuses mmcv 2.2 and newer, and mmcv 2.2.0 is installed"


@pytest.fixture
def unfit(site, monkeypatch):
    """mmdet 3.3 as it is: it asserts, when it is imported."""
    before = sys.path
    site("mmcv", "2.2.0", "mmcv")
    site("mmdet", "3.3.0", "mmdet")
    init = site.folder / "mmdet" / "__init__.py"
    init.write_text("assert False, 'MMCV==2.2.0 is used but incompatible'")
    assert before == [str(site.folder)]
    return site.folder


def imported(folder):
    """What importing ``vovnet_fast.mmdet`` says in a process that finds ``folder`` first."""
    code = "try:\n import vovnet_fast.mmdet\nexcept ImportError as e: print(e)"
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_integration_says_it(unfit):
    assert imported(unfit).startswith("vovnet_fast.mmdet cannot be used here: ")


def test_the_doctor_says_it(unfit, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_checks", list)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    (problem,) = found["problems"]
    assert problem.startswith(PROBLEM)
    assert cli.main(["doctor"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"What is installed does not go together: {PROBLEM}" in said
