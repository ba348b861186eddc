"""Which distributions own mmcv, mmdet and mmengine, told from metadata that tests make up."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vovnet_fast.integrations import installed
from vovnet_fast.tools import doctor

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
    assert 'pip install "vovnet-fast[onedl]"' in installed.remedy("mmdet")
    site("mmcv-full", "1.7.2", "mmcv")
    assert installed.remedy("mmdet") == 'pip install "mmdet==2.28.2" for mmcv-full 1.7.2'
    assert 'mim install "mmcv-full==1.7.2"' in installed.remedy("mmcv._ext")


ONE_OF_UPSTREAM = [
    (("mmengine", "0.10.7", "mmengine"), "mmcv==2.1.0", "mmdet==3.3.0"),
    (("mmdet", "3.3.0", "mmdet"), "mmcv==2.1.0", None),
    (("mmdet", "2.28.2", "mmdet"), "mmcv-full==1.7.2", None),
    (("mmdet3d", "1.4.0", "mmdet3d"), "mmcv==2.1.0", "mmdet==3.3.0"),
    # Which refuses mmcv 1.7.1 and newer.
    (("mmdet3d", "1.0.0rc6", "mmdet3d"), "mmcv-full==1.7.0", "mmdet==2.28.2"),
]


@pytest.mark.parametrize(("there", "mmcv", "mmdet"), ONE_OF_UPSTREAM)
def test_one_of_upstreams_is_enough_to_stay_with_them(site, there, mmcv, mmdet):
    """onedl's mmcv brings its mmengine, and would lie over it."""
    site(*there)
    assert installed.remedy("mmcv") == f'mim install "{mmcv}" for {" ".join(there[:2])}'
    assert installed.remedy("mmcv._ext") == installed.remedy("mmcv")
    if mmdet:
        assert installed.remedy("mmdet") == f'pip install "{mmdet}" for {" ".join(there[:2])}'
    for module in (*installed.MODULES, "mmcv.ops", "terminaltables"):
        assert "onedl" not in installed.remedy(module)


def test_the_doctor_does_not_lay_onedls_over_upstreams(site, monkeypatch):
    absent = 'mmdet is not installed (pip install "vovnet-fast[onedl]")'
    monkeypatch.setattr(doctor._optional, "why_not", lambda module: absent)
    assert doctor._version("mmdet").startswith(absent[:-1])
    site("mmcv", "2.1.0", "mmcv")
    assert doctor._version("mmdet") == (
        'mmdet is not installed (pip install "mmdet==3.3.0" for mmcv 2.1.0)'
    )


# --------------------------------------------------------------------------------------
# Where it is said
# --------------------------------------------------------------------------------------


PROBLEM = "mmdet 3.3.0 refuses mmcv 2.2 and newer, and mmcv 2.2.0 is installed"


_SAY = """
import sys
from vovnet_fast.tools import cli
try:
    import vovnet_fast.mmdet
except ImportError as error:
    print(error, file=sys.stderr)
words = ["doctor", "--no-self-test"]
print(sum([cli.main([*words, "--json"]), cli.main(words)]), file=sys.stderr)
"""


def test_the_integration_and_the_doctor_say_it(site):
    """With mmdet 3.3 as it is: it asserts, when it is imported."""
    site("mmcv", "2.2.0", "mmcv")
    site("mmdet", "3.3.0", "mmdet")
    (site.folder / "mmdet" / "__init__.py").write_text("assert False, 'MMCV==2.2.0 is used'")
    path = os.pathsep.join([str(site.folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SAY], capture_output=True, text=True,
        cwd=site.folder, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, status = done.stderr.splitlines()[-2:]
    assert error.startswith("vovnet_fast.mmdet cannot be used here: ")
    found, end = json.JSONDecoder().raw_decode(done.stdout)
    assert found["healthy"] is False
    if "onedl" not in " ".join(found["problems"]):  # Where the tests run with those.
        assert PROBLEM in error
        assert found["problems"][0].startswith(PROBLEM)
    assert found["versions"]["mmdet"].startswith("mmdet cannot be imported: AssertionError")
    said = " ".join(done.stdout[end:].split())
    assert f"This does not go together: {found['problems'][0]}" in said
    assert status == "2"
