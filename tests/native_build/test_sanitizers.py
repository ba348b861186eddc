"""The extension's CPU half under AddressSanitizer and UndefinedBehaviorSanitizer."""

import subprocess
import sys

import pytest

pytest.importorskip("setuptools", reason="native_build takes it")

from tests import sanitize

for package in ("ninja", "pybind11"):
    pytest.importorskip(package, reason=f"building without pip takes {package}")


def test_the_op_tests_pass_under_sanitizers(tmp_path):
    """ASan and UBSan find nothing in the CPU half; what they do find ends the process."""
    sanitize.build(tmp_path)
    environment = sanitize.environment(tmp_path)
    code = (
        "import torch; from vovnet_fast.backends import _extension\n"
        "cpu = _extension.load('cpu')\n"
        "assert '-fsanitize=address' in _extension.build_info()['flags']\n"
        "x = torch.zeros({pixels} * 8); z = (x.data_ptr(), 0, 0, 8)\n"
        "cpu.apply_gates(1, z=z, out=z, identity=None, gates=None, n=1, "
        "height=1, width=5, c=8, dtype=2)"
    )
    for pixels, fails in ((5, False), (4, True)):
        words = [sys.executable, "-c", code.format(pixels=pixels)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) == fails, done.stderr
        assert (done.returncode != 0) == fails
    assert sanitize.run("-k", "not environment", folder=tmp_path) == 0
