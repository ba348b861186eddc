"""The GPUs that the CUDA half is compiled for."""

import re
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import architectures, plan, toolchain
from native_build.architectures import Architecture
from tests.native_build.building import ROOT

KNOWN = {75, 80, 86, 87, 89, 90, 100, 120}
COMPILER = toolchain.Compiler(("c++",), "a compiler", ())


def test_architectures_by_default():
    def written(known, machine="x86_64"):
        return architectures.written(architectures.default(known, machine))

    assert written(KNOWN) == "80 86 89 90a 100 120+PTX"
    assert written({80, 86, 89, 90}) == "80 86 89+PTX 90a"
    assert written(KNOWN, "aarch64") == "80 86 87 89 90a 100 120+PTX"
    assert written({80, 86, 87}, "aarch64") == "80 86 87+PTX"
    assert written({80, 87, 90}, "ppc64le") == "80+PTX 90a"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("90a", "90a"),
        ("8.0;9.0a+PTX", "80 90a+PTX"),
        ("sm_100, 80", "80 100"),
        ("12.0+ptx 8.6", "86 120+PTX"),
        ("80;8.0+PTX;80", "80+PTX"),
        ("10.0f;", "100f"),
    ],
)
def test_architectures_that_are_named(text, meant):
    assert architectures.written(architectures.parse(text, KNOWN)) == meant


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hopper", "'hopper' is no architecture; write compute capabilities as in 80;90a"),
        ("8.0.1", "'8.0.1' is no architecture"),
        ("7.5", "the kernels need sm_80 (Ampere) or newer, got '7.5'"),
        ("9", "'9' is no architecture"),
        ("80a", "there is no sm_80a"),
        ("90f", "there is no sm_90f"),
        ("130", "this nvcc does not know sm_130, only sm_75, sm_80"),
    ],
)
def test_architectures_that_are_wrong(text, message):
    with pytest.raises(architectures.OptionError, match=re.escape(message)):
        architectures.parse(text, KNOWN)


def test_flags_of_an_architecture():
    assert Architecture(90, "a", ptx=True).flags() == [
        "-gencode", "arch=compute_90a,code=sm_90a",
        "-gencode", "arch=compute_90a,code=compute_90a",
    ]  # fmt: skip


def test_hopper_code_is_for_hopper_alone(monkeypatch):
    """A file of it is left out where sm_90a is, and never compiled for others."""
    nvcc = toolchain.Nvcc(Path("/nvcc"), "13.0.88", frozenset(KNOWN), ("-lcudart_static",))
    monkeypatch.chdir(ROOT)
    for text, expected in (("80;90a+PTX", ["sm_90a"]), ("80;90", [])):
        chosen = architectures.parse(text, KNOWN)
        steps = plan.Plan("1", COMPILER, nvcc, chosen, debug=False).steps
        monkeypatch.setattr(plan, "_write", lambda *args: None)
        commands = {step.what: step.words for step in steps(Path("o"), Path("build/x.so"))}
        hopper = [words for what, words in commands.items() if "conv_sm90" in what]
        assert [re.findall(r"code=(\w+)", " ".join(words)) for words in hopper] == (
            [expected] * len(hopper) if expected else []
        )
        bindings = next(words for what, words in commands.items() if "bindings" in what)
        assert ("-DVOVNET_FAST_WITH_CONV_SM90=1" in bindings) == bool(expected)
