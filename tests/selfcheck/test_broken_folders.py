"""Whatever the folder of verdicts is like, a forward pass neither ends nor waits because of it."""

import fcntl
import multiprocessing
import os
import time

import pytest
import torch

from tests.extension_cases import require
from tests.tiny import TINY
from vovnet_fast import VoVNet, _files, backends, tuning
from vovnet_fast.compat import zip
from vovnet_fast.network import decision
from vovnet_fast.selfcheck import trust


def nested(folder):
    (folder / "verified.json").write_text("[" * 100_000 + "]" * 100_000)


def a_pipe(folder):
    os.mkfifo(folder / "verified.json")


def a_folder(folder):
    (folder / "verified.json").mkdir()


def a_loop(folder):
    (folder / "verified.json").symlink_to(folder / "verified.json")


def not_a_folder(folder):
    folder.rmdir()
    folder.write_text("a file")


STATES = (nested, a_pipe, a_folder, a_loop, not_a_folder)


@pytest.fixture
def forward(tmp_path, monkeypatch):
    require("cpu")
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("VOVNET_FAST_CACHE", str(folder))
    monkeypatch.setattr(decision, "CPU_PIXELS", 0)
    monkeypatch.setattr(_files, "LOCK_SECONDS", 0.2)
    model, x = VoVNet(TINY["depthwise"]).eval(), torch.randn(1, 3, 40, 40)

    def run():
        # As in a new process.
        backends._decide.cache_clear()
        tuning._table.cache_clear()
        trust._verdicts.clear()
        with torch.no_grad():
            assert model.decide(x).op
            return model(x)

    with torch.no_grad(), backends.use_backend("reference"):
        expected = model(x)
    yield folder, run, expected
    backends._decide.cache_clear()
    tuning._table.cache_clear()


def assert_right(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_broken_folder(state, forward):
    folder, run, expected = forward
    state(folder)
    assert_right(run(), expected)


def _hold(folder, held):
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    held.set()
    time.sleep(60)


def test_a_lock_that_is_held_for_ever(forward):
    folder, run, expected = forward
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=_hold, args=(folder, held))
    holder.start()
    try:
        assert held.wait(10)
        begin = time.monotonic()
        assert_right(run(), expected)
        assert time.monotonic() - begin < 40
    finally:
        holder.kill()
        holder.join()
