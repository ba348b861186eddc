"""Two processes for what is distributed. They are forked from one that has imported torch.

That one has run nothing, unlike the tests' own: after a backward pass, none can be run in what was
forked from there. Started anew, each process would spend 5 to 8 seconds of its core on imports.
"""

import multiprocessing

import torch

IMPORTED = (
    "torch._dynamo",  # Which DDP asks for its settings.
    "torch.distributed.fsdp",
    "tests.fused",
    "tests.straight_line",
    "tests.tiny",
)


def run_two(worker, *args):
    """Call ``worker(rank, *args)`` in two processes, and wait.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them has failed; with its traceback.
    """
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    torch.multiprocessing.start_processes(worker, args, nprocs=2, start_method="forkserver")
