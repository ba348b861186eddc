"""What threads and processes do to the ``cpu`` backend, in a process that has not computed yet:
``python -m tests.backends.threads_alone`` prints what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vovnet_fast

torch.set_num_threads(
    1
)  # Whoever forks with OpenMP's threads there hangs in a child that uses them.
torch.manual_seed(0)
MODEL = vovnet_fast.VoVNet("V-19-slim-dw-eSE").eval()
IMAGES = torch.randn(2, 3, 64, 64)


def features(network: torch.nn.Module) -> list[Tensor]:
    """Of a network, by the backend, several times: a frozen one repeats what it has recorded."""
    with torch.inference_mode(), vovnet_fast.use_backend("cpu"):
        for _ in range(3):
            found = network(IMAGES)
        return [feature.clone() for feature in found]


def os_threads() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


class Features(Dataset):
    """Computed where they are asked for: in the processes of a DataLoader."""

    def __init__(self, networks: list[torch.nn.Module]) -> None:
        self.networks = networks

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, list[Tensor]]:
        return torch.get_num_threads(), features(self.networks[index % 2])


def in_children(number: int, threads: int, networks: list[torch.nn.Module]) -> list[list[Tensor]]:
    """Features of as many forked processes, which run at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for i in range(number):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(threads)
                torch.save(features(networks[i % 2]), f"{folder}/{i}")
                os._exit(0)
            children.append(child)
        ended = [os.waitpid(child, 0)[1] for child in children]
        assert not any(ended), ended
        return [torch.load(path) for path in sorted(Path(folder).iterdir())]


def same(features: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, features, expected))


def main() -> None:
    networks = [vovnet_fast.freeze(MODEL), MODEL]
    cores = os.cpu_count() or 1
    many = in_children(2 * cores + 1, 2, networks)
    before = os_threads()
    torch.set_num_threads(1)
    frozen, alone = map(features, networks)
    changed, most = [], {}
    for number in (2, 4, 1, 3, 2):
        there = os_threads()
        torch.set_num_threads(number)
        before += os_threads() - there  # Torch 2.1 has a second pool, whose threads come and go.
        changed += [same(features(networks[0]), frozen), same(features(networks[1]), alone)]
        most[number] = max(most.get(number, 0), os_threads() - before)
    forked = in_children(2, 1, networks)
    loaded = list(DataLoader(Features(networks), batch_size=None, num_workers=2, timeout=120))
    json.dump(
        {
            "processes": [same(each, frozen) or same(each, alone) for each in many],
            "changed": changed,
            "threads": most,
            "forked": [same(each, frozen) or same(each, alone) for each in forked],
            "workers": [number for number, _ in loaded],
            "loaded": [same(each, frozen) or same(each, alone) for _, each in loaded],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
