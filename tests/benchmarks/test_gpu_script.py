"""benchmarks/gpu.py on a CPU: every step in a rehearsal, and the steps that need a GPU."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

import pytest
import torch

from benchmarks import gpu
from benchmarks.evidence import carried, summary
from benchmarks.evidence.folder import FILES, Folder
from benchmarks.evidence.maker import Carried, Maker
from benchmarks.evidence.plan import HEADLINE, plan
from benchmarks.evidence.runner import Run
from benchmarks.networks import HEADLINE as NETWORKS
from benchmarks.networks import text
from vovnet_fast.backends.cpu import int8

NAMES = [
    "carried kernels", "first look", "numerics", "extension", "cuda", "headline inference",
    "headline training", "headline compiled", "headline eight bits", "hopper", "layers",
    "layer gradients", "hopper layers", "eight-bit layers", "memcheck", "racecheck", "initcheck",
    "synccheck", "tuning", "headline tuned", "compiled V-99", "architectures", "blocks",
    "all engines", "other inference", "other training", "detectors", "trainings", "report",
]  # fmt: skip

REHEARSED = {
    "first look", "numerics", "headline inference", "headline training", "headline eight bits",
    "layers", "eight-bit layers", "tuning", "trainings", "report",
}  # fmt: skip


@pytest.fixture
def without_gpu():
    if torch.cuda.is_available():
        pytest.skip("on a GPU: make gpu")


def script(*words):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# --------------------------------------------------------------------------------------
# The rehearsal
# --------------------------------------------------------------------------------------


def test_a_rehearsal_walks_through_every_step(tmp_path, without_gpu):
    pytest.importorskip("triton", minversion="3.6")
    pytest.importorskip("pytest_benchmark")
    done = script("--out", f"{tmp_path}/{{gpu}}-{{commit}}", "--rehearse", "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "cpu-abc"
    found = json.loads((folder / "summary.json").read_text())
    assert found["provenance"]["torch"] == torch.__version__
    assert "nothing was measured" in found["provenance"]["rehearsal"]
    steps = {row["name"]: row for row in found["steps"]}
    assert list(steps) == NAMES
    if not find_spec("mmdet"):
        assert steps.pop("trainings")["status"] == "missing"
    for name, row in steps.items():
        assert row["status"] == ("passed" if name in REHEARSED else "missing"), row
        assert row["detail"]
    pictures = {"networks.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in folder.iterdir()} == set(FILES) - {"networks.png"} | pictures
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(gpu.ROOT).encode() not in content
        assert b"hostname" not in content
    _check_rows(folder, steps)
    _check_tests(folder)
    with tarfile.open(folder / "rest.tar.xz") as archive:
        names = archive.getnames()
        assert {"report/report.md", "junit_numerics.xml", "logs/first_look.txt"} <= set(names)
        assert not any(member.uname or member.uid for member in archive.getmembers())
        for member in archive.getmembers():
            content = archive.extractfile(member).read()
            assert str(gpu.ROOT).encode() not in content, member.name
            assert b"hostname" not in content, member.name
    _check_end(done.stdout, folder)


def _check_rows(folder, steps):
    rows = json.loads((folder / "rows.json").read_text())
    wanted = {
        "first look": "ceiling", "headline inference": "inference",
        "headline training": "training", "layers": "conv", "eight-bit layers": "conv",
    }  # fmt: skip
    if int8.why_not(torch.device("cpu")) is None:
        wanted["headline eight bits"] = "inference"
    assert {row["step"]: row["kind"] for row in rows["benchmarks"]} == wanted
    assert set(rows["clocks"]) - {"headline eight bits"} == {
        "headline inference", "headline training", "layers", "eight-bit layers"
    }  # fmt: skip
    assert {row["dtype"] for row in rows["benchmarks"]} <= {"float32", "bfloat16", "fp8", None}
    folded = next(row for row in rows["benchmarks"] if row["provider"] == "folded")
    assert folded["ratio_low"] <= folded["ratio_to_eager"] <= folded["ratio_high"]
    assert folded["distance"] < 1e-3
    trained = {r["provider"]: r for r in rows["benchmarks"] if r["step"] == "headline training"}
    assert set(trained) == {"checkpoint", "folding"}
    assert trained["checkpoint"]["distance"] == 0
    assert 0 < trained["folding"]["distance"] < 0.1
    table = (folder / "summary.md").read_text()
    assert "## Layers" in table
    for row in trained.values():
        assert f"| {row['spec']} | {row['shape']} | {row['provider']} |" in table


def _check_tests(folder):
    tests = json.loads((folder / "tests.json").read_text())["tests"]
    assert {test["outcome"] for test in tests} == {"passed", "skipped"}
    looked = {test["test"]: test for test in tests if test["step"] == "first look"}
    assert {"a kernel of triton", "a small V-39-eSE 1x3x32x32 in float32 on triton"} <= set(looked)
    assert "eager's" in looked["a small V-39-eSE 1x3x32x32 in float32 on triton"]["why"]


def _check_end(output, folder):
    """Who sees but the last 12,000 characters sees the tables."""
    end = output[-12_000:]
    assert "## Steps" in end
    assert "## Networks" in end
    assert end.rstrip().splitlines()[-2].startswith("Steps: ")
    assert end.rstrip().endswith(str(folder))


# --------------------------------------------------------------------------------------
# On a GPU
# --------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(tmp_path, without_gpu):
    done = script("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def maker(tmp_path, **options):
    return Maker(Folder(tmp_path / "out", tmp_path / "scratch"), False, Carried(**options))


def test_the_steps_on_a_gpu(tmp_path):
    """They cannot run here; their names, times and order can be looked at."""
    steps = plan(maker(tmp_path))
    assert [step.name for step in steps] == NAMES
    assert all(0 < step.estimate < step.limit for step in steps)
    assert [step.name for step in steps if step.closing] == ["report"]
    optional = {step.name for step in steps if step.optional}
    assert optional == {"carried kernels", "trainings", "report"}
    variables = {step.name: step.environment for step in steps}
    tuned = {name: v["VOVNET_FAST_TUNE"] for name, v in variables.items()}
    assert {name: value for name, value in tuned.items() if value != "0"} == {
        "tuning": "1", "headline tuned": "1", "all engines": "all"
    }  # fmt: skip
    assert all(f"{spec}-{text(shape)}" in HEADLINE for spec, shape in NETWORKS)


def test_the_first_call_holds_what_matters_most(tmp_path):
    """In 540 s with everything carried: the proofs, and the headline against its peers."""
    seconds = {step.name: step.estimate for step in plan(maker(tmp_path))}
    seconds["extension"] = 8.0
    before = NAMES.index("headline compiled")
    assert sum(seconds[name] for name in NAMES[:before]) + seconds["report"] < 530


def test_the_headline_is_among_the_benchmarks_cases():
    """Which depend on the device, and are made when they are imported."""
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from benchmarks import test_inference, test_training\n"
        "from benchmarks.networks import HEADLINE\n"
        "inference = {(case.spec, case.shape) for case in test_inference._cases()}\n"
        "print(set(HEADLINE) <= inference, set(HEADLINE) <= set(test_training.CASES))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=gpu.ROOT
    )
    assert done.stdout == "True True\n", done.stderr


def test_carried_files_are_named_from_where_one_is(tmp_path, monkeypatch):
    """The steps run in the repository's root."""
    monkeypatch.chdir(tmp_path)
    options = gpu._parser().parse_args(["--out", "x", "--cache", "a.tar.xz", "--wheel", "b.whl"])
    assert (options.cache, options.wheel) == (tmp_path / "a.tar.xz", tmp_path / "b.whl")


def test_only_some_steps(tmp_path):
    steps = plan(maker(tmp_path))
    assert [s.name for s in gpu._chosen(steps, ["tuning"])] == ["tuning", "report"]
    with pytest.raises(ValueError, match=r"no step is called tunning; there are carried kernels"):
        gpu._chosen(steps, ["tunning"])


# --------------------------------------------------------------------------------------
# What was carried
# --------------------------------------------------------------------------------------


def a_wheel(folder, tag, suffix=EXTENSION_SUFFIXES[0], content=b"an extension"):
    folder.mkdir(exist_ok=True)
    path = folder / f"vovnet_fast-0.1.0-{tag}-cp3-cp3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"vovnet_fast/_C{suffix}", content)
        archive.writestr("vovnet_fast/_CONSTANTS.py", "")
    return path


def test_a_wheel_that_fits_comes_first(tmp_path):
    wheel = a_wheel(tmp_path, carried.build_tag())
    assert carried.wheel_problem(wheel) is None
    steps = plan(maker(tmp_path, wheel=wheel))
    assert [step.name for step in steps[:3]] == ["carried kernels", "extension", "first look"]
    assert steps[1].estimate < 10
    (tmp_path / "package").mkdir()
    placed = carried.place(wheel, tmp_path / "package")
    assert placed.read_bytes() == b"an extension"
    assert [path.name for path in (tmp_path / "package").iterdir()] == [placed.name]


def test_a_wheel_that_does_not_fit_says_why(tmp_path):
    tag = carried.build_tag()
    damaged = a_wheel(tmp_path / "damaged", tag)
    damaged.write_bytes(b"PK")
    unnamed = tmp_path / "vovnet_fast-0.1.0-cp312-cp312-linux_x86_64.whl"
    unnamed.write_bytes(b"")
    for wheel, reason in (
        (a_wheel(tmp_path / "other", "1_000000000000"), "the wheel is of other sources: 1_0000"),
        (a_wheel(tmp_path / "python", tag, ".cpython-38-x.so"), "holds no extension for"),
        (damaged, "is damaged"),
        (unnamed, "does not say of which sources"),
        (tmp_path / "none.whl", "there is no wheel"),
    ):
        assert reason in carried.wheel_problem(wheel)


def test_an_extension_that_does_not_load_is_built(tmp_path, monkeypatch, capfd):
    """It is a real process that builds; here it only says so."""
    (tmp_path / "vovnet_fast").mkdir()
    (tmp_path / "setup.py").write_text("import sys; print('building:', *sys.argv[1:])")
    wheel = a_wheel(tmp_path, carried.build_tag())
    tag = carried.build_tag()
    monkeypatch.setattr(carried, "ROOT", tmp_path)
    monkeypatch.setattr(carried, "build_tag", lambda: tag)
    for problem in (None, "GLIBC_2.99 not found"):
        monkeypatch.setattr(carried, "_loads", lambda problem=problem: problem)
        assert carried.main(["extension", str(wheel)]) == 0
        assert len(list((tmp_path / "vovnet_fast").iterdir())) == (problem is None)
        last = capfd.readouterr().out.strip().splitlines()
        if problem is None:
            assert last == [f"from the wheel {wheel.name}: its Python and its sources are these"]
        else:
            assert "building: -q build_ext --inplace" in last
            assert last[-1] == f"built here, as the wheel's does not load here: {problem}"
    assert carried.main(["extension"]) == 0
    assert "built here, as no wheel was given" in capfd.readouterr().out


def a_cache(folder):
    """A kernel as Triton keeps it."""
    kernel = folder / "A2B3"
    kernel.mkdir(parents=True)
    description = {"target": {"arch": 90}, "extern_libs": []}
    (kernel / "_a_kernel.json").write_text(json.dumps(description))
    (kernel / "_a_kernel.cubin").write_bytes(b"a binary")
    (kernel / "__grp___a_kernel.json").write_text("{}")
    return folder


def test_carried_kernels_are_unpacked_first(tmp_path):
    """A step of its own, which says what there was; one that does not fit stops nothing."""
    pytest.importorskip("triton", minversion="3.6")
    from vovnet_fast.compiling import cache

    packed = tmp_path / "kernels.tar.xz"
    cache.pack(a_cache(tmp_path / "cache"), packed)
    damaged = tmp_path / "damaged.tar.xz"
    damaged.write_bytes(b"no archive")
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({})
    makers = [Maker(folder, True, Carried(cache=file)) for file in (packed, damaged)]
    steps = [plan(make)[0] for make in makers]
    assert steps[0].name == "carried kernels"
    run = Run(folder, [steps[0], replace(steps[1], name="damaged")], 3600.0, {})
    assert run.all()
    assert [result.status for result in run.results] == ["passed", "failed"]
    assert run.results[0].detail.startswith("1 kernels for sm_90 and 0 modules")
    assert "kernels are compiled as they are met" in run.results[1].detail
    assert (tmp_path / "scratch" / "triton" / "A2B3" / "_a_kernel.cubin").exists()


def test_the_digest_follows_the_sources(tmp_path, monkeypatch):
    for name in ("csrc", "native_build", "vovnet_fast"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_version.py").write_text(name)
    monkeypatch.setattr(carried, "ROOT", tmp_path)
    before = carried.digest()
    assert carried.digest() == before
    (tmp_path / "csrc" / "more.cu").write_text("")
    assert carried.digest() != before


def test_the_summary_says_how_many_kernels_were_compiled_after_all(tmp_path):
    log = tmp_path / "kernels.jsonl"
    assert carried.kernels(log) == ""
    log.write_text('["conv", true, 0.1]\n["conv", false, 2.5]\n["pool", false, 1.0]\n')
    assert carried.kernels(log) == (
        "kernels: 1 times one was found compiled, 2 were compiled after all, in 4 s of a core"
    )


# --------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------


def test_the_table_of_networks():
    measured = dict(step="training", spec="V-39-eSE", shape="2x3x8x8", provider="fused")
    measured |= dict(backend="triton", device_ms=1.234, peak_mib=100.4, distance=0.001)
    measured |= dict(ratio_to_eager=2.0, ratio_low=1.9, ratio_high=2.1)
    measured["pass"] = "step"
    assert summary.networks([{"kind": "conv"}]) == ""
    assert summary.networks([measured]).splitlines()[-1] == (
        "| training | step | V-39-eSE | 2x3x8x8 | fused (triton) | 1.23 | 2.00 (1.90 to 2.10) | "
        "100 | 1.0e-03 |"
    )


def test_the_table_of_layers():
    """The best of each form of engine, side by side."""
    row = dict(kind="conv", name="3x3 64>64", engine="conv-sm90 256x64", of_matmul=0.5)
    row["engines"] = {
        "aten": {"ms": 3.0}, "tma-128x64-k64": {"ms": 2.0}, "tma-64x64-k64": {"ms": 1.5},
        "pointer-64x64": {"error": "no"}, "conv-sm90 256x64": {"ms": 1.0},
    }  # fmt: skip
    lines = summary.layers([row, {"kind": "conv", "engines": None}]).splitlines()
    assert lines[0].startswith("| layer | pass | aten | tma | conv-sm90 | best |")
    assert lines[2:] == [
        "| 3x3 64>64 |  | 3.0000 | 1.5000 | 1.0000 | conv-sm90 256x64 | 50% |  |"
    ]  # fmt: skip
    # The same layer on another backend: one row, that of the faster one.
    other = dict(row, engine="conv-sm80 256x64", of_matmul=0.6)
    other["engines"] = {"aten": {"ms": 2.5}, "conv-sm80 256x64": {"ms": 0.5}}
    assert summary.layers([row, other]).splitlines()[2:] == [
        "| 3x3 64>64 |  | 2.5000 | 1.5000 | 1.0000 | 0.5000 | conv-sm80 256x64 | 60% |  |"
    ]


def test_the_report_costs_no_run(tmp_path, monkeypatch):
    """Not when there are no rows, and not when it cannot be made of them."""
    folder = Folder(tmp_path / "out", tmp_path / "scratch")
    folder.create({})
    make = Maker(folder, True)
    empty = Run(folder, [make.report()], 600.0, {})
    assert empty.all()
    assert empty.results[0].status == "missing"
    folder.rows.append({"kind": "conv"})
    failed = Run(folder, [make.report()], 600.0, {})
    assert failed.all()
    assert failed.results[0].status == "failed"
    assert "none of the 1 rows" in failed.results[0].detail
    (folder.rest / "report").mkdir(exist_ok=True)
    (folder.rest / "report" / "report.md").write_text("# Benchmarks")
    monkeypatch.setattr("benchmarks.evidence.maker.installed", lambda name: False)
    outcome = make.report().read(0, "", [])
    assert outcome.status == "passed"
    assert "matplotlib is not installed" in outcome.detail
