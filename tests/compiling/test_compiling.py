"""What is compiled ahead is what Triton will look for, and where it looks."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="the Triton backend is optional")

import vovnet_fast
from benchmarks import precompile, sanitize
from tests.quantization import cases
from tests.tiny import TINY
from vovnet_fast import VoVNet, first_use, tuning
from vovnet_fast.backends import BackendError
from vovnet_fast.compiling import cache, side_by_side, workers
from vovnet_fast.compiling.jobs import Job
from vovnet_fast.first_use import rehearsal
from vovnet_fast.first_use.rehearsal import Setting
from vovnet_fast.kernels._common import Target, interpreted, processors
from vovnet_fast.kernels._variants import variant
from vovnet_fast.quantization import rehearsing
from vovnet_fast.tools import cli
from vovnet_fast.tools.compile import command, needed
from vovnet_fast.tools.compile.needed import MODES, Run, plan
from vovnet_fast.tools.plan import launches as work

STATIC = Setting(planning=tuning.Planning(measured=False))
ROOT = Path(vovnet_fast.__file__).parent.parent

compiles = pytest.mark.skipif(interpreted(), reason="Triton interprets in this process")


@pytest.mark.skipif(not interpreted(), reason="they run in this one")
def test_in_a_process_of_their_own():
    """The tests of this file, where tests of kernels have chosen the interpreter before them."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment.pop("TRITON_INTERPRET", None)
    words = ["-m", "pytest", "-q", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Triton interprets" not in done.stdout


def run(*words, **variables):
    """Start Python in a process where Triton compiles, and read the JSON that it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": "", **variables}
    for name in ("TRITON_INTERPRET", "TRITON_CACHE_DIR", workers.ENVIRONMENT):
        env.pop(name, None)
    env |= variables
    done = subprocess.run(
        [sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder whose cache was filled by workers, and what was found out on the way."""
    folder = tmp_path_factory.mktemp("caches") / "filled"
    return folder, run("-m", "tests.compiling.compile_some", "ahead", str(folder))


def test_workers_compile_and_say_what_fails(filled):
    _, found = filled
    assert len(found["keys"]) == 3
    assert list(found["problems"]) == ["max_pool_kernels"], found["problems"]
    assert "AttributeError" in found["problems"]["max_pool_kernels"]
    assert found["modules"] >= 1, "the module that every process of Triton needs"
    assert found["packed"] == sorted(found["keys"])
    assert found["packed modules"] == found["modules"]


def test_a_network_is_found_out_once(filled):
    _, found = filled
    assert found["asked"] == [True, False]
    assert found["note"] == sorted(found["keys"])
    assert not found["holds without one"]


def test_triton_compiles_nothing_that_was_carried(filled, tmp_path):
    """The launcher's own path, in a new process and another folder."""
    folder, _ = filled
    carried = tmp_path / "carried"
    carried.with_suffix(".tar.xz").symlink_to(folder.with_suffix(".tar.xz"))
    log = tmp_path / "log"
    variables = {"VOVNET_FAST_COMPILE_LOG": str(log)}
    found = run("-m", "tests.compiling.compile_some", "launch", str(carried), **variables)
    assert found["new"] == [], "compiled after all"
    assert found["modules"] >= 1
    assert found["noted"] is False
    usage = cache.log(log)
    assert usage.found == 3
    assert usage.compiled == ()


def test_a_packed_cache_is_the_same_each_time_and_fits_or_says_why(filled, tmp_path):
    folder, found = filled
    packed = folder.with_suffix(".tar.xz")
    assert packed.stat().st_size < 100e3
    kept = found["keys"][2]
    first, second = tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"
    contents = cache.pack(folder, first, [kept])
    assert (
        cache.pack(folder, second, [kept]).kernels == contents.kernels == {kept: "max_pool_kernel"}
    )
    assert first.read_bytes() == second.read_bytes()
    manifest = contents.manifest
    assert cache.mismatches(manifest, "sm_90") == []
    changed = {**manifest, "triton": "3.5.0", "sources": "others"}
    wrong = "; ".join(cache.mismatches(changed, "sm_80"))
    assert "Triton's version 3.5.0, here" in wrong
    assert "the kernels' sources others, here" in wrong
    assert "kernels for sm_90, wanted sm_80" in wrong
    with pytest.raises(cache.CacheMismatch, match="wanted sm_80"):
        cache.unpack(packed, tmp_path / "nowhere", "sm_80")
    assert not (tmp_path / "nowhere").exists()


def test_what_cannot_be_packed_or_unpacked(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.tar\.xz"):
        cache.pack(tmp_path, tmp_path / "cache.zip")
    with pytest.raises(ValueError, match="has no kernels to pack"):
        cache.pack(tmp_path, tmp_path / "cache.tar.xz")
    with pytest.raises(ValueError, match="has no kernels ABC"):
        cache.pack(tmp_path, tmp_path / "cache.tar.xz", ["ABC"])
    file = tmp_path / "other.tar.xz"
    file.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no packed cache"):
        cache.unpack(file, tmp_path)
    with pytest.raises(ValueError, match="is no log of kernels"):
        cache.log(file)


def variants(launches):
    return {variant(launch).key for launch in launches}


@compiles
@pytest.mark.parametrize("mode", MODES)
def test_a_network_in_use_needs_what_its_architecture_does(mode):
    trained = mode != "inference"
    model = VoVNet(TINY["detectron2"], norm_eval=mode != "training-batch").train(trained)
    called = []
    model.stage2.register_forward_hook(lambda *_: called.append(1))
    if mode == "training-batch":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.empty(2, 3, 64, 96, device="meta").to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(trained):
        found = rehearsal.of_model(rehearsal.twin(model), images, STATIC)
    expected = plan(Run(TINY["detectron2"], (2, 64, 96), "fp32", mode), STATIC)
    assert variants(found.launches) == variants(expected.launches)
    assert found.functions == expected.functions
    assert not called, "hooks are the user's: nothing has run"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@compiles
@pytest.mark.parametrize("mode", MODES)
def test_tensors_without_memory_are_specialised_as_real_ones(mode):
    """Addresses decide what a kernel may assume, and whether two views are one."""
    model = VoVNet(TINY["depthwise"], norm_eval=mode != "training-batch")
    model = model.half().train(mode != "inference")
    images = torch.zeros(2, 3, 64, 96, dtype=torch.float16)
    images = images.to(memory_format=torch.channels_last)
    setting = Setting(Target(processors=processors(images.device)))
    with torch.set_grad_enabled(model.training):
        real = rehearsal.of_model(model, images, setting)
        planned = rehearsal.of_model(rehearsal.twin(model), rehearsal.on_meta(images), setting)
    assert variants(real.launches) == variants(planned.launches)


@compiles
def test_a_frozen_network_needs_what_inference_does():
    frozen = vovnet_fast.freeze(VoVNet(TINY["timm"]), dtype=torch.float16)
    params = rehearsal.twin(frozen)._unpack()
    images = torch.empty(2, 3, 64, 96, dtype=torch.float16, device="meta")
    images = images.to(memory_format=torch.channels_last)
    found = rehearsal.of_params(params, images, frozen.out_features, STATIC)
    expected = plan(Run(TINY["timm"], (2, 64, 96), "fp16"), STATIC)
    assert variants(found.launches) == variants(expected.launches)


def launched(quantized, images):
    """What a network in eight bits asks Triton to launch, on real memory, planned as it is run."""
    ops = importlib.import_module(f"vovnet_fast.backends.triton.{quantized.dtype}")
    setting = Setting(Target(processors=processors(images.device)))
    with rehearsal.planning(setting) as planned, torch.no_grad():
        quantized._run_fast(ops, images.permute(0, 2, 3, 1))
    return variants(planned().launches)


@compiles
@pytest.mark.parametrize("name", ["detectron2", "depthwise", "timm", "seed"])
@pytest.mark.parametrize("form", cases.DTYPES)
def test_a_network_in_eight_bits_needs_what_its_architecture_does(form, name):
    """With either stem: which one it will have is found out in calibration."""
    images = torch.zeros(2, 3, 64, 96)
    found = [
        launched(cases.quantized(name, form, stem=stem, report=False), images)
        for stem in ("int8", "wide")
    ]
    setting = Setting(Target(processors=processors(images.device)))
    run = Run(TINY[name], (2, 64, 96), form)
    expected = plan(run, setting)
    assert found[0] != found[1]
    assert found[0] | found[1] == variants(expected.launches)
    with_check = needed.by_run([run], [setting])[run]
    assert {"quantize_image", "conv", "max_pool"} <= expected.functions
    assert len(with_check) > len(variants(expected.launches))


@compiles
def test_what_a_network_in_eight_bits_asks_for_at_first_use(monkeypatch):
    quantized = cases.quantized("detectron2", "int8", stem="int8", report=False)
    images, asked = torch.zeros(2, 3, 64, 96), []
    monkeypatch.setattr(first_use, "once", lambda *given: asked.append(given))
    rehearsing.at_first_use(quantized.architecture, images)
    rehearsing.at_first_use(quantized.architecture, torch.nn.Parameter(images))
    [(key, device, dtype, planned)] = asked
    assert key == first_use.key_of_quantized(quantized.architecture, images)
    assert (device, dtype) == (images.device, torch.uint8)
    setting = Setting(Target(processors=processors(images.device)))
    assert variants(planned(setting).launches) == launched(quantized, images)


@compiles
def test_255_levels_take_kernels_of_their_own():
    quantized = cases.quantized("detectron2", "int8", stem="int8", levels=255, report=False)
    found = launched(quantized, torch.zeros(1, 3, 64, 96))
    setting = Setting(Target(processors=processors(torch.device("cpu"))))
    runs = {
        levels: variants(
            plan(Run(TINY["detectron2"], (1, 64, 96), "int8", levels=levels), setting)[0]
        )
        for levels in (127, 255)
    }
    assert found < runs[255]
    assert not found <= runs[127]


@compiles
def test_a_note_of_a_network_in_eight_bits_is_found_by_it(monkeypatch, tmp_path):
    """The command writes it, the network asks for it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    needed.note(Run(TINY["detectron2"], (2, 64, 96), "int8"), [], STATIC)
    held = {}
    for words in (dict(stem="int8"), dict(stem="wide"), dict(stem="int8", levels=255)):
        quantized = cases.quantized("detectron2", "int8", report=False, **words)
        key = first_use.key_of_quantized(quantized.architecture, torch.empty(2, 3, 64, 96))
        held[tuple(words.values())] = first_use.Note(key, STATIC).holds()
    assert held == {("int8",): True, ("wide",): True, ("int8", 255): False}


@compiles
def test_what_eight_bits_do_not_have():
    old = Setting(Target((8, 0), 108), STATIC.planning)
    network = Run(TINY["detectron2"], (1, 64, 96), "fp8")
    with pytest.raises(BackendError, match="sm_80 has no products of fp8: sm_89 and newer have"):
        plan(network, old)
    assert plan(network._replace(dtype="int8"), old).launches
    with pytest.raises(ValueError, match="there is no training step in int8, but one in bf16"):
        plan(network._replace(dtype="int8", mode="training"), STATIC)
    with pytest.raises(ValueError, match="levels must be one of 127, 255, got 63"):
        plan(network._replace(dtype="int8", levels=63), STATIC)


@compiles
@pytest.mark.parametrize("few", [True, False])
def test_compute_sanitizer_sees_every_kernel_of_eight_bits(few):
    found = sanitize.launches(few=few)
    names = {launch.kernel.fn.__name__ for launch in found}
    assert {name for name in work._KERNELS if "eight_bits" in name} <= names
    for name in ("conv_eight_bits_pointer_kernel", "conv_eight_bits_tma_kernel"):
        own = [launch.constants for launch in found if launch.kernel.fn.__name__ == name]
        for key in ("OUT", "FEATURE", "POOL", "INT8", "FP8"):
            assert {constants[key] for constants in own} == {False, True}, key
    assert any(launch.constants.get("OFFSET") for launch in found), "255 levels"
    assert any(launch.constants.get("HALVES") for launch in found), "a wide stem"


@compiles
def test_the_carried_kernels_are_those_of_eight_bits_too():
    found = {(run.dtype, run.mode) for run in precompile.runs()}
    assert {("int8", "inference"), ("fp8", "inference"), ("bf16", "training")} <= found


@compiles
def test_plans_are_made_for_the_gpu_that_is_asked_for():
    network = Run(TINY["detectron2"], (1, 64, 64))
    names = {}
    for number in ((8, 0), (9, 0)):
        setting = Setting(Target(number, 108), STATIC.planning)
        names[number] = {launch.kernel.fn.__name__ for launch in plan(network, setting).launches}
    assert "conv_tma_kernel" in names[9, 0] - names[8, 0]
    few, all_of_them = (variants(plan(network, s).launches) for s in (STATIC, Setting()))
    assert few < all_of_them, "tuning measures more than the static choice"


@compiles
def test_known_choices_are_planned_and_no_others(monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.CACHE_ENVIRONMENT, str(tmp_path))
    problems = {}

    def choose(device, problem, candidates, static, run):
        problems[problem] = tuning.Choice(next(n for n in candidates if n != static))
        return static

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_rehearse", lambda plan, met, *rest: choose(None, *rest))
        network = Run(TINY["detectron2"], (1, 64, 64))
        static = variants(plan(network, STATIC).launches)
    tuning.table().add({"a machine": problems})
    known = Setting(planning=tuning.Planning("a machine"))
    found = variants(plan(network, known).launches)
    assert found != static
    assert len(found) <= len(static) + len(problems)


@compiles
def test_the_command_lists_what_is_needed(monkeypatch, capsys):
    monkeypatch.setenv(tuning.ENVIRONMENT, "0")
    words = ["compile", "V-19-slim-dw-eSE", "1x64x64", "--arch", "sm_90", "--list"]
    assert cli.main(words) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"{len(lines)} kernels"
    assert any(line.startswith("conv_tma_kernel bf16/fp32 warps=") for line in lines)
    assert cli.main([*words, "--train"]) == 0
    more = capsys.readouterr().out.splitlines()
    assert len(more) > len(lines) + 20
    assert cli.main([*words, "--dtype", "int8", "fp8", "--levels", "255"]) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    for begin in (
        "conv_eight_bits_tma_kernel fp32/fp8e4nv warps=",
        "conv_eight_bits_pointer_kernel",
    ):
        assert any(line.startswith(begin) for line in lines)
    assert any("OFFSET=True" in line for line in lines), "of 255 levels"
    assert cli.main([*words, "--dtype", "int8", "--train"]) == 1
    assert "no training step in int8" in " ".join(capsys.readouterr().err.split())


@compiles
def test_inference_of_v99_needs_few_kernels():
    """With what tuning would measure on any card, and the self-check."""
    network = Run("V-99-eSE", (6, 640, 1600))
    found = needed.by_run([network], needed.settings("sm_90", tuning.Planning()))
    assert 20 < len(found[network]) <= 45
    said = " ".join((ROOT / "README.md").read_text().split())
    assert f"For V-99 in inference there are {len(found[network])}, tuning and self-check" in said


@compiles
@pytest.mark.skipif("fp8" not in cases.DTYPES, reason="this torch has no fp8")
def test_how_many_kernels_eight_bits_need_is_said():
    runs = [Run("V-99-eSE", (6, 640, 1600), form) for form in ("int8", "fp8")]
    found = needed.by_run(runs, needed.settings("sm_90", tuning.Planning()))
    said = " ".join((ROOT / "docs" / "quantization.md").read_text().split())
    whole, floating = (len(jobs) for jobs in found.values())
    assert f"{whole} kernels in int8 and {floating} in fp8" in said


@compiles
def test_every_architecture_that_is_known_can_be_named():
    assert command.ARCHITECTURES == needed.ARCHITECTURES


@compiles
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["V-39-eSE", "1x64x64"], "with --arch, one of sm_80"),
        (["V-39-eSE", "--arch", "sm_90"], "V-39-eSE has no size of images"),
        (["V-39-eSE", "64x64", "--arch", "sm_90"], "an input is written NxHxW"),
        (["V-38", "1x64x64", "--arch", "sm_90"], "V-38"),
        (["V-39-eSE", "1x1x1", "--arch", "sm_90"], "too small"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compile for")
def test_what_the_command_refuses(words, message, capsys):
    assert cli.main(["compile", *words]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_processes_that_do_not_start_are_an_error_of_their_own(monkeypatch):
    job = Job("KEY", "kernel", "module", {}, {}, {}, {}, "sm_90")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(workers.WorkersError, match="ended early, status 1"):
        list(workers.compile_all([job], 1))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(workers.WorkersError, match="no process could be started"):
        list(workers.compile_all([job], 1))
    with pytest.raises(ValueError, match="at least one worker"):
        list(workers.compile_all([job], 0))


def test_how_many_processes(monkeypatch):
    monkeypatch.delenv(workers.ENVIRONMENT, raising=False)
    assert workers.count() >= 1
    monkeypatch.setenv(workers.ENVIRONMENT, "0")
    assert workers.count() == 0
    monkeypatch.setenv(workers.ENVIRONMENT, "many")
    with pytest.raises(ValueError, match="must be a number of processes"):
        workers.count()


@pytest.mark.parametrize("given", ["", "3"])
def test_without_fork_nothing_is_compiled_ahead(given, monkeypatch, capsys):
    """Triton has builds for Windows."""
    monkeypatch.setenv(workers.ENVIRONMENT, given)
    if not given:
        monkeypatch.delenv(workers.ENVIRONMENT)
    monkeypatch.delattr(os, "fork")
    assert workers.count() == 0
    assert cli.main(["compile", "V-19-slim-dw-eSE", "1x64x64", "--arch", "sm_80"]) == 1
    assert "forked, which this system does not" in " ".join(capsys.readouterr().err.split())


def test_what_goes_wrong_at_first_use_is_said_once_and_stops_nothing(monkeypatch, caplog):
    device, asked = torch.device("cuda", 7), []

    def fail(setting):
        asked.append(setting)
        raise OSError("the cache is full")

    monkeypatch.setattr(first_use, "_will_run_triton", lambda device, dtype: True)
    monkeypatch.setattr(Setting, "here", classmethod(lambda kind, device: STATIC))
    monkeypatch.setattr(first_use, "_met", set())
    side_by_side.say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first_use.once(("one",), device, torch.float16, fail)
    assert not asked, "not while a graph is captured, but afterwards"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for key in (("one",), ("one",), ("another",)):
        first_use.once(key, device, torch.float16, fail)
    assert asked == [STATIC, STATIC], "a network is asked for once"
    [record] = caplog.records
    assert "one by one: OSError: the cache is full" in record.getMessage()
    monkeypatch.setenv(workers.ENVIRONMENT, "0")
    first_use.once(("a third",), device, torch.float16, fail)
    assert len(asked) == 2


def test_what_is_noted_for_measuring_holds_without(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def notes(key):
        plannings = (tuning.Planning(measured=measured) for measured in (False, True))
        return (first_use.Note((key,), Setting(planning=planning)) for planning in plannings)

    without, measuring = notes("one")
    without.write({})
    assert without.holds()
    assert not measuring.holds()
    without, measuring = notes("another")
    measuring.write({"KEY": "kernel"})
    assert not measuring.holds(), "its kernel is not there"
    measuring.write({})
    assert measuring.holds()
    assert without.holds()


def test_only_what_triton_will_run_is_compiled_at_first_use():
    device = torch.device("cuda", 0)
    with vovnet_fast.use_backend("reference"):
        assert not first_use._will_run_triton(device, torch.float16)
        assert not first_use._will_run_triton(device, torch.uint8)
    if not torch.cuda.is_available():
        assert not first_use._will_run_triton(device, torch.float16)
