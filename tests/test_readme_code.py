"""What the pages tell a reader to write, type or import: it runs, or at least is understood."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

import vovnet_fast
from vovnet_fast.compat import zip
from vovnet_fast.tools import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(language: str, text: str) -> list[str]:
    """Blocks of code in a language."""
    return [code for found, code in FENCED.findall(text) if found == language]


def commands() -> list[str]:
    """Lines of shell, without comments, prompts and line breaks."""
    joined = "\n".join(blocks("sh", TEXT) + blocks("", TEXT)).replace("\\\n", " ")
    lines = (line.removeprefix("$ ").split(" #")[0].strip() for line in joined.splitlines())
    return list(dict.fromkeys(line for line in lines if re.match(r"(vovnet-fast|make) ", line)))


def test_the_first_program_runs(tmp_path, monkeypatch):
    (program,) = (block for block in blocks("python", README) if "checkpoints.load" in block)
    (file,) = re.findall(r'"(\S+\.pth)"', program)
    published = vovnet_fast.VoVNet("V-39-eSE").state_dict()
    names = {f"backbone.bottom_up.{name}": tensor for name, tensor in published.items()}
    torch.save({"model": names}, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    lasting: dict = {}
    exec(compile(program, "README.md", "exec"), lasting)
    shapes = re.findall(r"\[\d+(?:, \d+){3}\]", program)
    names = ("stage3", "stage4", "stage5")
    assert [str(list(lasting[name].shape)) for name in names] == shapes
    expected = lasting["model"](lasting["images"])
    for name, feature in zip(names, expected, strict=True):
        torch.testing.assert_close(lasting[name], feature.detach(), rtol=1e-3, atol=1e-3)


CONFIGS = [block for block in blocks("python", README) if "custom_imports" in block]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda text: re.findall(r"\w*backbone", text)[0])
def test_backbones_of_configs_are_built(config):
    registry = pytest.importorskip("mmdet.registry", exc_type=Exception)
    from mmengine.config import Config

    found = Config.fromstring(config, ".py")
    model = found.model
    backbone = model.get("img_backbone") or model.backbone
    backbone.pop("_delete_", None)
    built = registry.MODELS.build(backbone)
    assert type(built).__name__ == "VoVNetFast"
    if "neck" in model:
        assert tuple(model.neck.in_channels) == built.feature_channels


def test_there_are_configs():
    assert len(CONFIGS) == 2


COMMANDS = commands()


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("vovnet-fast ")])
def test_commands_are_understood(line):
    cli._parser().parse_args(shlex.split(line)[1:])


def test_there_are_commands():
    for word in ("bench", "compile", "convert", "explain", "export", "quantize", "specs", "tuning"):
        assert any(line.startswith(f"vovnet-fast {word}") for line in COMMANDS), word


def test_subcommands_in_prose_are_there():
    parser = cli._parser()
    (known,) = (action.choices for action in parser._actions if action.dest == "command")
    for name in set(re.findall(r"`vovnet-fast (\w+)", TEXT)):
        assert name in known, name


def test_modules_that_are_run_are_there():
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT)) - {"venv", "pip"}
    assert {"benchmarks.cpu", "vovnet_fast.aot"} <= modules
    for name in modules:
        assert importlib.util.find_spec(name) is not None, name


def test_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    for target in shown | set(re.findall(r"`make ([\w-]+)", TEXT)):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target
