"""What Clang builds runs on one thread: a second OpenMP runtime beside torch's is not linked."""

import shutil

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from native_build import toolchain

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


def test_no_runtime_of_its_own(monkeypatch, tmp_path):
    clang, symbols = shutil.which("clang++"), shutil.which("nm")
    if clang is None or symbols is None:
        pytest.skip("needs clang++ and nm: apt install clang binutils")
    monkeypatch.setenv("CXX", clang)
    try:
        found = toolchain.find_compiler()
    except toolchain.Missing as missing:
        pytest.skip(f"clang++ makes no extension here: {missing}")
    source, module = tmp_path / "loop.cpp", tmp_path / "loop.so"
    source.write_text(_LOOP)
    words = [*found.command, "-std=c++17", "-fPIC", *found.openmp, *toolchain.link_flags()]
    toolchain.run([*words, source, "-o", module])
    used = toolchain.run([symbols, "-D", module])
    assert "total" in used
    assert "kmpc" not in used
    assert "GOMP" not in used
