import json
import subprocess
import sys

import pytest
import torch

from tests import straight_line
from vovnet_fast import VoVNet, __version__, checkpoints, specs, tuning
from vovnet_fast.tools import cli
from vovnet_fast.tuning import Choice


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    net = straight_line.build("ese_vovnet19b_slim_dw")
    path = tmp_path_factory.mktemp("cli") / "timm.safetensors"
    checkpoints.write(net.state_dict(), path)
    return path


def test_convert(timm_file, tmp_path, capsys):
    dst = tmp_path / "native.pth"
    words = f"convert {timm_file} {dst} --spec V-19-slim-dw-eSE --from timm --to detectron2"
    assert cli.main([*words.split(), "--add-prefix", "img_backbone."]) == 0
    report = capsys.readouterr().out
    for word in ("V-19-slim-dw-eSE", "timm -> detectron2", "154 written", "head.fc.weight"):
        assert word in report
    written = torch.load(dst, weights_only=True)
    assert all(k.startswith("img_backbone.st") for k in written)
    checkpoints.load(VoVNet("V-19-slim-dw-eSE"), dst)


def test_convert_recognises_everything(timm_file, tmp_path, capsys):
    assert cli.main(["convert", str(timm_file), str(tmp_path / "a.safetensors")]) == 0
    assert "ese_vovnet19b_slim_dw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{src} {dir}/a.txt", "DST must end in .pth, .pt, .bin, .safetensors"),
        ("{src} {src}", "exists; --force replaces it"),
        ("{src} {dir}/a.pth --spec V-38-eSE", "did you mean V-39-eSE"),
        ("{src} {dir}/a.pth --spec V-39-eSE", "cannot be read as V-39-eSE"),
        ("{src} {dir}/a.pth --from seed", "no VoVNet backbone found"),
        ("{src} {dir}/a.pth --to seed", "cannot be written for seed"),
        ("{src} {dir}/no/a.pth", "there is no folder"),
        ("{dir}/none.pth {dir}/a.pth", "no checkpoint at"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(timm_file, tmp_path, capsys, words, message):
    words = words.format(src=timm_file, dir=tmp_path).split()
    before = timm_file.read_bytes()
    assert cli.main(["convert", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vovnet-fast convert: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []
    assert timm_file.read_bytes() == before


def test_force_replaces(timm_file, tmp_path):
    dst = tmp_path / "a.pth"
    dst.write_text("old")
    assert cli.main(["convert", str(timm_file), str(dst), "--force"]) == 0
    checkpoints.read(dst)


def test_specs_lists_all_within_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["specs"]) == 0
    out = capsys.readouterr().out
    for name in specs.names():
        assert f" {name} " in out
    assert "69,523,520" in out
    assert "…" not in out
    assert cli.main(["specs", "V-39-eSE"]) == 0
    assert "V-57" not in capsys.readouterr().out
    assert cli.main(["specs", "resnet"]) == 1


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """The file of a user who has measured on two machines."""
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VOVNET_FAST_TUNING_TABLE", raising=False)
    tuning._table.cache_clear()
    for machine, problem, engine in (
        ("an [H200]", "conv 3x3", "tma"),
        ("an [H200]", "conv 1x1", "aten"),
        ("an A100", "conv 3x3", "pointer"),
    ):
        tuning.table().put(machine, problem, engine)
    yield tuning.cache_file()
    tuning._table.cache_clear()


def test_tuning_shows_what_was_measured(tuned, capsys):
    assert cli.main(["tuning", "show"]) == 0
    words = capsys.readouterr().out.split()
    assert [w for w in words if w in ("[H200]", "A100", "tma", "aten", "pointer")] == [
        "A100", "pointer", "[H200]", "aten", "tma",
    ]  # fmt: skip
    assert cli.main(["tuning", "show", "--json", "--machine", "A100"]) == 0
    assert json.loads(capsys.readouterr().out) == {"an A100": {"conv 3x3": "pointer"}}
    assert cli.main(["tuning", "show", "--machine", "B200"]) == 1
    message = capsys.readouterr().err
    assert "no machine's name contains 'B200'; known are: an A100, an [H200]" in message
    tuned.unlink()
    tuning._table.cache_clear()
    assert cli.main(["tuning", "show"]) == 0
    assert "Nothing has been measured yet" in capsys.readouterr().out
    assert cli.main(["tuning", "export", str(tuned.with_name("a.json"))]) == 1
    assert "nothing to export: run a model on a GPU first" in capsys.readouterr().err


def test_tuning_has_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["tuning", "--help"])
    assert "usage: vovnet-fast tuning" in capsys.readouterr().out


def test_tuning_goes_from_machine_to_machine(tuned, tmp_path, monkeypatch, capsys):
    file = tmp_path / "h200.json"
    assert cli.main(["tuning", "export", str(file), "--machine", "H200"]) == 0
    assert f"2 choices of 1 machine(s) written to {file}" in capsys.readouterr().out
    assert cli.main(["tuning", "export", str(file)]) == 1
    assert "exists; --force replaces it" in capsys.readouterr().err
    measured = {"conv 3x3": Choice("tma"), "conv 1x1": Choice("aten")}
    assert tuning.load(file) == {"an [H200]": measured}

    monkeypatch.setenv("VOVNET_FAST_CACHE", str(tmp_path / "elsewhere"))
    tuning.table().put("an [H200]", "conv 3x3", "pointer")
    assert cli.main(["tuning", "import", str(file)]) == 0
    assert "2 choices of 1 machine(s) added to" in capsys.readouterr().out
    assert tuning.load(tuning.cache_file())["an [H200]"] == {
        "conv 3x3": Choice("pointer"),
        "conv 1x1": Choice("aten"),
    }
    assert cli.main(["tuning", "import", str(file), "--replace"]) == 0
    assert tuning.load(tuning.cache_file())["an [H200]"]["conv 3x3"].name == "tma"
    assert cli.main(["tuning", "export", str(file), "--force"]) == 0


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 3, "choices": {}}', '{"format": 1, "choices": {"m": "p"}}']
)
def test_a_broken_tuning_file_is_refused(tuned, tmp_path, capsys, content):
    before, file = tuned.read_text(), tmp_path / "broken.json"
    file.write_text(content)
    assert cli.main(["tuning", "import", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"{file} is no table of choices: " in error
    assert "make one with vovnet-fast tuning export" in error
    assert tuned.read_text() == before


def test_help_and_version():
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "vovnet_fast.tools.cli", *words], capture_output=True, text=True
        )

    assert run("--version").stdout.strip() == f"vovnet-fast {__version__}"
    for words in (["--help"], ["convert", "--help"], ["specs", "--help"]):
        assert "usage: vovnet-fast" in run(*words).stdout
    assert run().returncode == 2
