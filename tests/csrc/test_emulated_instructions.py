"""Convolutions in eight bits by instructions that this processor may not have: AMX, AVX-VNNI and
AVX512-VNNI, which ``emulated_instructions.h`` has in plain vectors.

Their files are compiled with it, and linked with what is compiled already into a module that takes
the extension's place in a process of its own, where tests/backends/test_cpu_int8.py runs. So the
engines' own code is run: which bytes go into which tile, what is padded, and what is stored.
(No package has Intel's emulator, and qemu has neither AVX-512 nor AMX.) The instructions themselves
are looked for in the objects of the extension, where there is a disassembler.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")
pytest.importorskip("pybind11", reason="native_build takes it")

from native_build import plan, toolchain
from tests.csrc.test_cpu_driver import ROOT, installed, run

HERE = Path(__file__).parent
EMULATED = {
    "int8_conv_amx_kernels.amx.o": "amx",
    "int8_conv_vnni_kernels.avx512vnni.o": "vnni",
    "int8_conv_vnni_kernels.avxvnni.o": "vnni",
    "int8_conv_winograd_vnni_kernels.avx512vnni.o": "winograd_vnni",
    "int8_conv_winograd_vnni_kernels.avxvnni.o": "winograd_vnni",
}
"""Objects, and the engine that is in them."""

INSTRUCTIONS = {
    "int8_conv_amx_kernels.amx.o": ("tdpbusd", "tilezero", "ldtilecfg", "tilerelease"),
    "int8_conv_vnni_kernels.avx512vnni.o": ("vpdpbusd .*zmm",),
    "int8_conv_vnni_kernels.avxvnni.o": ("{vex} vpdpbusd .*ymm|vpdpbusd .*ymm",),
    "int8_conv_winograd_vnni_kernels.avx512vnni.o": ("vpdpwssd .*zmm",),
    "int8_conv_winograd_vnni_kernels.avxvnni.o": ("{vex} vpdpwssd .*ymm|vpdpwssd .*ymm",),
    "int8_conv_winograd_kernels.avx2.o": ("vpmaddwd", "vpmulld"),
    "int8_conv_kernels.avx2.o": ("vpmaddubsw", "vpmaddwd"),
}

pytestmark = pytest.mark.skipif(
    toolchain.machine() != "x86_64", reason="these instructions are of x86-64"
)


@pytest.fixture(scope="module")
def objects():
    """By name, those of an installation in the tree, all of its CPU half and the bindings."""
    found = {path.name: path for path in installed()}
    if not found:
        pytest.skip("nothing has been compiled from these sources in the tree: make test does")
    folder = next(iter(found.values())).parents[1]
    if [*folder.glob("cuda/**/*.o")]:
        pytest.skip("the CUDA half is compiled in the tree, too, and is not linked here")
    return {**found, **{path.name: path for path in folder.glob("*.o")}}


@pytest.fixture(scope="module")
def module(objects, tmp_path_factory):
    """The extension with these engines emulated."""
    folder = tmp_path_factory.mktemp("emulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        planned = plan.Plan("1", toolchain.find_compiler(), None, (), debug=False)
        *compiling, link = planned.steps(folder, folder / "_C.so")
    taken = {}
    for step in compiling:
        name = step.output.name
        words, source = list(step.words), step.inputs[0]
        if name in EMULATED:
            words = [word for word in words if not re.fullmatch(r"-m(amx|.*vnni|.*bf16).*", word)]
            words += ["-include", HERE / "emulated_instructions.h"]
        elif name == "processor.o":
            source = HERE / "emulated_processor.cpp"
        else:
            taken[str(step.output)] = str(objects[name])
            continue
        step.output.parent.mkdir(parents=True, exist_ok=True)
        run(*words, "-c", source, "-o", step.output)
    run(*(taken.get(word, word) for word in link.words))
    return folder / "_C.so"


PRELOADED = """
import importlib.util, sys
import vovnet_fast
spec = importlib.util.spec_from_file_location("vovnet_fast._C", sys.argv[1])
sys.modules["vovnet_fast._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
from tests.backends import test_cpu_int8
print("engines:", *("@".join(pair) for pair in test_cpu_int8.ENGINES))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
"""


def test_engines_of_other_processors_compute_the_integers(module):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "VOVNET_"))}
    environment["OMP_WAIT_POLICY"] = "passive"
    words = ["tests/backends/test_cpu_int8.py", "-k", "amx or vnni"]
    done = subprocess.run(
        [sys.executable, "-c", PRELOADED, module, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    engines = re.search("^engines: (.*)$", done.stdout, re.MULTILINE)[1].split()
    isas = {engine.partition("@")[2] for engine in engines}
    if "avx2" not in isas:
        pytest.skip("this processor has no AVX2, and runs no engine of bytes")
    assert "vnni@avx2" in engines
    assert ("amx@avx512" in engines) == ("vnni@avx512" in engines) == ("avx512" in isas)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1]) >= 4 * sum(e.startswith(("amx", "vnni")) for e in engines), done.stdout


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_objects_have_their_instructions(name, objects):
    disassembler = shutil.which("objdump")
    if disassembler is None:
        pytest.skip("there is no objdump, of binutils")
    if name not in objects:
        pytest.skip("the compiler does not know these instructions")
    text = run(disassembler, "-d", "--no-show-raw-insn", objects[name])
    if "(bad)" in text:
        pytest.skip("this objdump does not know these instructions")
    for instruction in INSTRUCTIONS[name]:
        assert re.search(rf"\s({instruction})", text), instruction
