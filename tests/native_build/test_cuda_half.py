"""The extension with its CUDA half, where there is nvcc."""

import re
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from tests.native_build.building import cuda_build, doctor, extension, run

for package in ("ninja", "pybind11"):
    pytest.importorskip(package, reason=f"building without pip takes {package}")


@pytest.fixture(scope="module")
def built(once):
    return cuda_build(once)


def test_with_nvcc_both_halves_are_built(built):
    found = doctor(built.site, "--no-self-test")
    assert found["extension"]["CUDA half"].startswith("nvcc ")
    assert found["extension"]["GPU architectures"] == "90a"
    assert found["backends"]["cpu"] == "usable"
    assert "half" not in found["backends"]["cuda"]
    # The resources of every kernel are in the log.
    assert len(re.findall(r"Used \d+ registers", "".join(built.said.values()))) >= 19
    told = run("readelf", "-d", extension(built.site), cwd=built.site).stdout
    assert not re.search("cudart|libcuda|torch|gomp", told)
    listed = run(_cuobjdump(), "--list-elf", extension(built.site), cwd=built.site).stdout
    # Some versions of cuobjdump leave the letter out.
    assert set(re.findall(r"sm_\d+", listed)) == {"sm_90"}


def _cuobjdump():
    triton = pytest.importorskip("triton", reason="Triton brings cuobjdump")
    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
