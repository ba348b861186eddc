"""Hours of use in minutes, on demand: memory stays constant, no descriptor or thread is left.

``python -m tests.soak --seconds 600`` prints what was held at the end of every tenth of the time,
and exits with 1 if it grew. tests/test_soak.py does it for some seconds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import os
import pickle
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress

from tests.tiny import TINY
from vovnet_fast import VoVNet, backends, checkpoints, freeze, use_backend
from vovnet_fast.network import decision

PARTS = 10
SLACK_BYTES = 24 << 20
"""What an allocator keeps more at one time than at another."""


class Held(NamedTuple):
    """By the process, at a time."""

    memory: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        return cls(memory, len(os.listdir("/proc/self/fd")), threading.active_count())


def soak(seconds: float, seed: int = 0) -> list[Held]:
    """Use networks in every way for so long.

    Returns:
        what was held after each of :data:`PARTS` parts, the first of which is for warming up.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    models = {name: VoVNet(spec) for name, spec in TINY.items()}
    names = ["auto", "reference"] + [n for n in ("cpu",) if backends.why_not(n, None) is None]
    found: list[Held] = []
    with tempfile.TemporaryDirectory() as folder, Progress(disable=not sys.stderr.isatty()) as bar:
        # What is imported, measured and allocated once.
        for name, action, model in itertools.product(names, ACTIONS, models.values()):
            with use_backend(name):
                action(model, torch.randn(2, 3, 70, 70), Path(folder))
        task = bar.add_task("soak", total=seconds)
        begin = time.monotonic()
        while len(found) < PARTS:
            model = models[draw.choice(sorted(models))]
            x = torch.randn(draw.randint(1, 2), 3, draw.randint(33, 70), draw.randint(33, 70))
            with use_backend(draw.choice(names)):
                draw.choice(ACTIONS)(model, x, Path(folder))
            passed = time.monotonic() - begin
            bar.update(task, completed=passed)
            if passed > (len(found) + 1) * seconds / PARTS:
                found.append(Held.now())
    return found


def _train(model: VoVNet, x: torch.Tensor, folder: Path) -> None:
    model.train()
    sum(y.square().mean() for y in model(x)).backward()  # type: ignore[union-attr]
    model.zero_grad()


def _infer(model: VoVNet, x: torch.Tensor, folder: Path) -> None:
    with torch.inference_mode():
        model.eval()(x)


def _freeze(model: VoVNet, x: torch.Tensor, folder: Path) -> None:
    frozen = freeze(model, dtype=random.choice((torch.float32, torch.bfloat16)))
    with torch.no_grad():
        for _ in range(4):
            frozen(x)
    frozen.refresh()
    pickle.loads(pickle.dumps(frozen))(x)


def _threads(model: VoVNet, x: torch.Tensor, folder: Path) -> None:
    frozen = freeze(model)
    threads = [threading.Thread(target=frozen, args=(x,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _copy(model: VoVNet, x: torch.Tensor, folder: Path) -> None:
    twin = copy.deepcopy(model).eval()
    handle = next(twin.stage3.children()).register_forward_hook(lambda *_: None)
    with torch.no_grad():
        twin(x)
        handle.remove()
        twin(x)


def _files(model: VoVNet, x: torch.Tensor, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "a.pth")
    checkpoints.load(model, str(folder / "a.pth"))
    (folder / "b.pth").write_bytes((folder / "a.pth").read_bytes()[:1000])
    try:
        checkpoints.load(model, str(folder / "b.pth"))
    except checkpoints.CheckpointError:
        return
    raise AssertionError("half a file was loaded")


ACTIONS = (_train, _infer, _freeze, _threads, _copy, _files)


def grown(found: list[Held]) -> list[str]:
    """What the process held more of at the end than when it was warm."""
    first, *_, last = found[PARTS // 2 :]
    wrong = []
    if last.memory > first.memory + SLACK_BYTES:
        wrong.append(f"memory grew from {first.memory >> 20} to {last.memory >> 20} MiB")
    if last.descriptors > first.descriptors:
        wrong.append(f"descriptors grew from {first.descriptors} to {last.descriptors}")
    if last.threads > first.threads:
        wrong.append(f"threads grew from {first.threads} to {last.threads}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    options = parser.parse_args()
    decision.CPU_PIXELS = decision.CPU_PIXELS_TRAINING = 0  # Maps are small here.
    found = soak(options.seconds, options.seed)
    for held in found:
        print(
            f"{held.memory >> 20:6} MiB {held.descriptors:4} descriptors {held.threads:3} threads"
        )
    wrong = grown(found)
    print("\n".join(wrong) or "nothing grew")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
