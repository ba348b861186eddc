"""``vovnet-fast convert`` and what the disk, the file and the processor's owner do to it."""

import os
import stat

import pytest
import torch

from tests import straight_line
from tests.checkpoints.test_writing import largest_file
from tests.network.test_filling import BAD
from vovnet_fast import VoVNet, checkpoints
from vovnet_fast.compat import zip
from vovnet_fast.tools import cli

NAME = "V-19-slim-dw-eSE"


@pytest.fixture(scope="module")
def state():
    return straight_line.randomise(VoVNet(NAME)).state_dict()


@pytest.fixture
def source(tmp_path, state):
    (tmp_path / "from").mkdir()
    path = tmp_path / "from" / "source.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def target(tmp_path):
    (tmp_path / "to").mkdir()
    path = tmp_path / "to" / "target.pth"
    path.write_text("old")
    path.chmod(0o600)
    return path


def convert(source, target, *words):
    return cli.main(["convert", str(source), str(target), "--spec", NAME, "--force", *words])


def assert_refused(capsys, source, target, *messages):
    assert convert(source, target) == 1
    error = capsys.readouterr().err
    assert error.startswith("vovnet-fast convert: ")
    for message in messages:
        assert message in error
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == [target.name]


def test_a_full_disk_is_one_line(source, target, capsys):
    for room in (0, 20_000, 1_000_000):
        with largest_file(room):
            assert_refused(capsys, source, target, "cannot write", "as it was", target.name)
    assert convert(source, target) == 0


@pytest.mark.parametrize("kind", ["sparse", "quantised", "int8", "complex64", "fp8", "none"])
def test_what_is_no_weight_is_one_line(state, source, target, capsys, kind):
    key = "stage5.OSA5_1.concat.OSA5_1_concat/conv.weight"
    torch.save({**state, key: BAD[kind][0](state[key].clone())}, source)
    assert_refused(capsys, source, target, key, NOT_MADE.get(kind) or BAD[kind][1])


NOT_MADE = {
    "sparse": "is a sparse tensor, expected a plain tensor: to_dense() it",
    "quantised": "is a quantised tensor, expected a plain tensor: dequantize() it",
}
"""Tensors that no file is read as, so that their words are others than those of a state dict."""


def test_tied_tensors_and_views_of_one_memory(state, source, target):
    """All weights in one piece of memory, with a secret; two layers that are one."""
    floats = {k: v for k, v in state.items() if v.is_floating_point()}
    flat = torch.cat([v.flatten() for v in floats.values()] + [torch.full((1 << 20,), 1234.5)])
    parts = flat.split([v.numel() for v in floats.values()] + [1 << 20])
    flattened = {k: p.view(v.shape) for (k, v), p in zip(floats.items(), parts, strict=False)}
    first, second = (f"stage5.OSA5_1.layers.{i}.OSA5_1_{i}/pw_norm.weight" for i in (0, 1))
    flattened[second] = flattened[first]
    torch.save({**state, **flattened}, source)
    secret = torch.full((64,), 1234.5).numpy().tobytes()
    assert secret in source.read_bytes()
    for ending in (".pth", ".safetensors"):
        path = target.with_suffix(ending)
        assert convert(source, path) == 0
        assert secret not in path.read_bytes()
        assert path.stat().st_size < flat.nbytes - (1 << 22) + 200_000
        back = checkpoints.read(path)
        assert torch.equal(back[second], state[first])
        del flattened[second]
        assert all(torch.equal(back[k], v) for k, v in flattened.items())
        flattened[second] = flattened[first]


@pytest.mark.skipif(os.name != "posix", reason="modes, links and pipes are POSIX's")
def test_force_keeps_the_mode_and_goes_through_links(source, target, tmp_path, capsys):
    assert convert(source, target) == 0
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    link = tmp_path / "link.pth"
    link.symlink_to(target)
    before = target.read_bytes()
    assert convert(source, link, "--add-prefix", "backbone.") == 0
    assert link.is_symlink()
    assert target.read_bytes() != before
    for make, kind in ((os.mkdir, "a folder"), (os.mkfifo, "a pipe")):
        path = tmp_path / f"{make.__name__}.pth"
        make(path)
        assert convert(source, path) == 1
        assert f"it is no file but {kind}" in capsys.readouterr().err


def test_onto_itself(source, state):
    """The file that is read from is the one that is replaced."""
    assert convert(source, source, "--add-prefix", "backbone.") == 0
    back = checkpoints.read(source)
    assert all(torch.equal(back[f"backbone.{k}"], v) for k, v in state.items())
