"""What Clang builds runs on torch's threads: no second OpenMP runtime is linked beside torch's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import toolchain

ROOT = Path(__file__).resolve().parents[2]

_REGION = """
#include "{header}"
// How many threads are in a region at the same time: each waits until all are there.
extern "C" int at_once(int threads) {{
  int inside = 0, seen = 0;
  vovnet_fast::on_threads(threads, [&](int, int team) {{
    __atomic_fetch_add(&inside, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&inside, __ATOMIC_SEQ_CST) < team) {{
    }}
    __atomic_store_n(&seen, __atomic_load_n(&inside, __ATOMIC_SEQ_CST), __ATOMIC_SEQ_CST);
  }});
  return seen;
}}
"""

_AT_WORK = "torch.ones(512, 512) @ torch.ones(512, 512); torch.ones(1 << 24).exp(); "
_AT_WORK += "before = len(os.listdir('/proc/self/task')); "
"""Torch's threads are there."""

_LOOP = """
extern "C" double total(const double* x, long count) {
  double sum = 0;
#pragma omp parallel for num_threads(2) reduction(+ : sum)
  for (long i = 0; i < count; ++i) sum += x[i];
  return sum;
}
"""


def test_which_flag_follows_from_the_compiler_and_not_from_its_name():
    assert toolchain._openmp("#define __GNUC__ 12\n") == ("-fopenmp",)
    assert toolchain._openmp("#define __GNUC__ 4\n#define __clang__ 1\n") == ("-fopenmp-simd",)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Makes a module of sources by Clang."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("needs clang++: apt install clang")
    monkeypatch.setenv("CXX", clang)
    try:
        found = toolchain.find_compiler()
    except toolchain.Missing as missing:
        pytest.skip(f"clang++ makes no extension here: {missing}")

    def make(text, *others):
        source, module = tmp_path / "module.cpp", tmp_path / "module.so"
        source.write_text(text)
        words = [*found.command, "-std=c++17", "-fPIC", *found.openmp, *toolchain.link_flags()]
        toolchain.run([*words, source, *others, "-o", module])
        return module

    return make


def test_no_runtime_of_its_own(build):
    symbols = shutil.which("nm")
    if symbols is None:
        pytest.skip("needs nm: apt install binutils")
    used = toolchain.run([symbols, "-D", build(_LOOP)])
    assert "total" in used
    assert "kmpc" not in used
    assert "GOMP" not in used


def test_loops_run_on_the_threads_of_torch(build):
    """As many at once as were asked for, and no more than there were before."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in Linux's /proc")
    module = build(
        _REGION.format(header=ROOT / "csrc/cpu/threads.h"), ROOT / "csrc/cpu/threads.cpp"
    )
    program = f"import ctypes, json, os, torch; torch.set_num_threads(3); {_AT_WORK}" + (
        f"at_once = ctypes.CDLL({str(module)!r}).at_once; "
        "print(json.dumps([at_once(3), at_once(1), before, len(os.listdir('/proc/self/task'))]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together, alone, before, after = json.loads(done.stdout)
    assert (together, alone) == (3, 1)
    assert after == before
