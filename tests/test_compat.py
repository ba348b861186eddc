"""vovnet_fast.compat: what stands in for what an older version lacks does the same."""

import builtins
import importlib.util
import subprocess
import sys

import pytest
import torch

from vovnet_fast import compat


@pytest.fixture
def old(monkeypatch):
    """The module as an older Python and torch find it."""
    spec = importlib.util.spec_from_file_location("vovnet_fast._old_compat", compat.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 18))
        patch.setattr(torch, "__version__", "2.1.2")
        patch.delattr(torch.compiler, "is_exporting", raising=False)
        spec.loader.exec_module(module)
    return module


def test_zip(old):
    assert old.TORCH == (2, 1)
    assert old.zip is not builtins.zip
    for strict in (False, True):
        assert list(old.zip("ab", iter([1, 2]), strict=strict)) == [("a", 1), ("b", 2)]
    assert list(old.zip("abc", [1])) == [("a", 1)]
    assert list(old.zip(strict=True)) == []
    with pytest.raises(ValueError, match="different lengths"):
        list(old.zip("abc", [1], strict=True))


def test_distributions_are_found_by_what_is_imported(old):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 9, 18))
        by_hand = old.packages_distributions()
    for found in (by_hand, compat.packages_distributions()):
        assert "torch" in found["torch"]
        assert "pytest" in found["pytest"]


def test_an_old_torch_compile_does_not_look_into_a_network(old):
    assert not old.TRACES
    assert not old.is_exporting()

    @old.traced
    def forward(x):
        assert not torch.compiler.is_compiling()
        return x + 1

    def detector(x):
        return forward(2 * x)

    torch._dynamo.reset()
    x = torch.ones(3)
    assert torch.compile(detector, backend="eager")(x).equal(2 * x + 1)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(detector, backend="eager", fullgraph=True)(x)


def test_autocast():
    assert compat.autocast_dtype("cpu") is None
    assert compat.autocast_dtype("meta") is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compat.autocast_dtype("cpu") == torch.bfloat16
        assert compat.autocast_dtype("cuda") is None


def test_a_training_step_imports_no_compiler():
    """Which takes longer than the step: ops of torch.library.custom_op do when they first run."""
    code = (
        "import sys, torch, vovnet_fast\n"
        "model = vovnet_fast.VoVNet('V-19-slim-dw-eSE')\n"
        "with vovnet_fast.use_backend('reference'):\n"
        "    model(torch.zeros(1, 3, 64, 64))[0].sum().backward()\n"
        "x = torch.zeros(1, 8, 4, 4)\n"
        "torch.ops.vovnet_fast.max_pool(x, 'ceil', False, 'reference')\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
