"""tests/soak.py for some seconds, in a process of its own, and that it would see what grows."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import PARTS, SLACK_BYTES, Held, grown


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is held there")
def test_nothing_grows():
    words = [sys.executable, "-m", "tests.soak", "--seconds", "8"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing grew\n")


def test_what_grows_is_named():
    held = [Held(1 << 30, 10, 3)] * (PARTS - 1)
    assert grown([*held, held[0]]) == []
    for last, word in (
        (Held((1 << 30) + SLACK_BYTES + 1, 10, 3), "memory"),
        (Held(1 << 30, 11, 3), "descriptors"),
        (Held(1 << 30, 10, 4), "threads"),
    ):
        [message] = grown([*held, last])
        assert message.startswith(word)
