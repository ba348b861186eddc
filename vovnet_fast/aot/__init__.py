"""Compile every Triton kernel in every shipped configuration, without a GPU.

``python -m vovnet_fast.aot --arch sm_90`` prints what each compilation needs: a
configuration that spills, or a main loop that lost its bulk copies, is visible
before any GPU runs it. The tests hold the same rows against limits.

====================  =================================================================
:mod:`.job`           one kernel to compile
:mod:`.convolutions`  the jobs of the convolutions, forward and backward
:mod:`.elementwise`   those of everything else
:mod:`.eight_bits`    those of int8 and fp8
:mod:`.compiler`      compiling a job, disassembling, and counting instructions
:mod:`.shipped`       all jobs of an architecture, and their rows: compiled, or known
:mod:`.resources`     the tables of ``kernels/resources/``, written anew
``__main__``          the command, and its table
====================  =================================================================

Launch plans are made from meta tensors by the very code that makes them for real
ones, and their arguments are specialised as Triton's launcher does it.
"""

from .compiler import Row, compile_job, compile_launch, disassemble, examine
from .job import ARCHITECTURES, Job, capability
from .shipped import jobs, look_up, read, rows

__all__ = [
    "ARCHITECTURES",
    "Job",
    "Row",
    "capability",
    "compile_job",
    "compile_launch",
    "disassemble",
    "examine",
    "jobs",
    "look_up",
    "read",
    "rows",
]
