import subprocess
import sys

import pytest
import torch

from vovnet_fast import VoVNet, __version__, checkpoints, cli, specs

from . import straight_line


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


def test_help_and_version():
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "vovnet_fast.cli", *words], capture_output=True, text=True
        )

    assert run("--version").stdout.strip() == f"vovnet-fast {__version__}"
    for words in (["--help"], ["convert", "--help"], ["specs", "--help"]):
        assert "usage: vovnet-fast" in run(*words).stdout
    assert run().returncode == 2
