"""What ``vovnet-fast doctor`` finds, on machines that lack this and that."""

import json
import math
import subprocess
import sys

import pytest
import torch

import vovnet_fast
from vovnet_fast import __version__, backends, selfcheck
from vovnet_fast.backends import _cuda_conv, _extension, reference
from vovnet_fast.selfcheck import runner
from vovnet_fast.tools import cli, doctor


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")


def run(words, capsys):
    """The exit status and what was printed, as one line."""
    status = cli.main(["doctor", *words])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 or "--json" in words
    return status, " ".join(out.split())


def only(monkeypatch, *names):
    """There are no other backends."""
    monkeypatch.setattr(backends, "NAMES", names)
    monkeypatch.setattr(backends, "CANDIDATES", {})


def facts(capsys):
    status = cli.main(["doctor", "--json", "--no-self-test"])
    assert status == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_names_everything(capsys, monkeypatch):
    only(monkeypatch, "reference")
    status, text = run([], capsys)
    assert status == 0
    for section in ("versions", "CUDA", "extension", "backends", "engines", "settings"):
        assert f" {section} " in text
    assert f"vovnet_fast {__version__} in" in text
    assert f"torch {torch.__version__}" in text
    for function in {case.function for case in selfcheck.CASES}:
        assert f" {function} error " in text
    assert "self-test of reference on cpu" in text
    assert f"VOVNET_FAST_CACHE {doctor.tuning.cache_file().parent}"[:40] in text
    assert "functions of the usable backends are right" in text


def test_json_says_the_same(capsys):
    found = facts(capsys)
    assert found["healthy"] is True
    assert found["self-test"] == []
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert set(found["backends"]) >= {"reference", "cpu", "triton", "cuda", "auto on cpu"}
    for name, reason in backends.available_backends().items():
        said = found["backends"][name]
        assert said == ("usable" if reason is None else f"not usable: {reason}")
    engines = _cuda_conv.offered(torch.device("cuda"))
    for name, reason in engines.items():
        others = {"depthwise-conv": "separate passes", "conv-sm90 in fp8": "Triton's"}
        beside = others.get(name, "cuDNN")
        expected = f"considered beside {beside}" if reason is None else f"not considered: {reason}"
        assert found["engines"][name] == expected
    assert set(found["engines"]) == {
        "conv-sm80", "conv-sm90", "conv-sm90 in fp8", "depthwise-conv",
    }  # fmt: skip


def test_engines_that_are_considered_are_named(monkeypatch):
    """With what each is measured beside."""
    monkeypatch.setattr(
        _cuda_conv,
        "offered",
        lambda device: dict.fromkeys(("conv-sm80", "depthwise-conv", "conv-sm90 in fp8")),
    )
    assert dict(doctor._engines()) == {
        "conv-sm80": "considered beside cuDNN",
        "depthwise-conv": "considered beside separate passes",
        "conv-sm90 in fp8": "considered beside Triton's",
    }


def test_usable_backends_are_tested_and_pass(monkeypatch):
    """Those that a machine without a GPU has, as in a process without Triton's interpreter."""
    usable = [name for name in ("reference", "cpu") if backends.why_not(name, None) is None]
    only(monkeypatch, *usable)
    report = doctor.examine()
    assert report.healthy
    on_cpu = [check for check in report.checks if check.device == "cpu"]
    every = {case.function for case in selfcheck.CASES}
    assert {(check.backend, check.function) for check in on_cpu} == {
        (name, function) for name in usable for function in every
    }
    assert all(check.error <= check.allowed for check in on_cpu)


def _wrong(z, scale, shift, out, *, pool):
    out.fill_(1e3)
    return z.new_full((z.shape[0], 1, z.shape[3]), math.nan) if pool else None


def _breaks(*args, **options):
    raise RuntimeError("no kernel for [this]")


@pytest.mark.parametrize(
    ("function", "problem"), [(_wrong, "error"), (_breaks, "RuntimeError: no kernel for [this]")]
)
def test_wrong_numbers_are_an_exit_status(capsys, monkeypatch, function, problem):
    only(monkeypatch, "reference")
    exact = reference.normalize

    def normalize(z, *args, **options):
        return (exact if z.dtype == torch.float64 else function)(z, *args, **options)

    fake = _Fake(normalize)
    monkeypatch.setattr(runner, "backend_module", lambda name: fake)
    status, text = run([], capsys)
    assert status == 1
    assert "1 of 19 functions compute wrong numbers" in text
    assert "FAILED: normalize (" in text
    assert problem in text
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    failed = [check for check in found["self-test"] if not check["passed"]]
    assert [check["function"] for check in failed] == ["normalize"]


class _Fake:
    """The reference, but for one function."""

    def __init__(self, normalize):
        self.normalize = normalize

    def __getattr__(self, name):
        return getattr(reference, name)


@pytest.fixture
def reloaded():
    """The extension is looked for again, in the test and after it."""
    _extension.loading._loaded.cache_clear()
    yield
    _extension.loading._loaded.cache_clear()


def test_without_the_extension(capsys, monkeypatch, reloaded):
    monkeypatch.setattr(_extension.loading, "NAME", "vovnet_fast._nonesuch")
    found = facts(capsys)
    assert "is not built" in found["extension"]["vovnet_fast._C"]
    assert "is not built" in found["backends"]["cpu"]
    assert found["backends"]["auto on cpu"] == "reference"


@pytest.fixture
def in_its_place(reloaded, monkeypatch, tmp_path):
    """Puts a module in the place of the extension."""

    def put(source):
        (tmp_path / "_stands_in.py").write_text(source)
        monkeypatch.setattr(vovnet_fast, "__path__", [str(tmp_path), *vovnet_fast.__path__])
        monkeypatch.setattr(_extension.loading, "NAME", "vovnet_fast._stands_in")

    yield put
    sys.modules.pop("vovnet_fast._stands_in", None)


def test_with_an_extension_that_cannot_be_loaded(capsys, in_its_place):
    in_its_place("raise ImportError('undefined symbol: x')")
    found = facts(capsys)
    assert "cannot be loaded: undefined symbol: x" in found["extension"]["vovnet_fast._C"]
    assert "cannot be loaded" in found["backends"]["cpu"]


def test_with_an_extension_of_another_version(capsys, in_its_place):
    in_its_place("def build_info(): return {'version': '0.0.1'}\ncpu = None")
    assert f"built for vovnet_fast 0.0.1, this is {__version__}" in facts(capsys)["backends"]["cpu"]


def test_without_triton_and_mmdet():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'mmdet', 'mmcv'])); "
        "from vovnet_fast.tools import cli; "
        "sys.exit(cli.main(['doctor', '--json', '--no-self-test']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for module in ("triton", "mmdet", "mmcv"):
        assert found["versions"][module].startswith(f"{module} is not installed (pip install ")
    assert found["backends"]["triton"] == "not usable: triton is not installed (pip install triton)"


def test_a_gpu_is_described(capsys, monkeypatch):
    """As far as it can be told without one."""
    properties = type("", (), dict(name="H [1]", major=9, minor=0, total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92400)
    found = dict(doctor._cuda())
    assert found["GPU 0"] == "H [1], capability 9.0, 80 GiB"
    assert found["cuDNN"] == "92400"


def test_what_is_broken_does_not_stop_it(capsys, monkeypatch):
    def breaks():
        raise RuntimeError("CUDA is [broken]")

    monkeypatch.setattr(torch.cuda, "is_available", breaks)
    # Not all reasons ask for a GPU: Triton's interpreter, where others chose it, needs none.
    monkeypatch.setattr(backends, "available_backends", breaks)
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cpu")])
    found = facts(capsys)
    for section in ("CUDA", "backends"):
        assert found[section]["broken"] == "RuntimeError: CUDA is [broken]"
    assert "tuning" in found["settings"]
