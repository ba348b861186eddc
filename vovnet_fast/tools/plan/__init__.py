"""What a forward pass has to do, counted without running it: launches, FLOP, bytes, a floor.

The fused path is counted from its own launches: the orchestration of
:mod:`vovnet_fast.ops` runs on meta tensors, which have shapes and no memory, and the
launches that it decides are collected instead of run. Eager is counted from the ATen
operations that the same model dispatches on meta tensors.

Bytes are compulsory traffic: each operand of a launch once, however often a kernel
reads it, as if no cache kept anything from one launch to the next. FLOP are those of
convolutions and fully connected layers, two a multiply-add.

================  ====================================================================
:mod:`.work`      what a launch has to do, sums by kind, and the floor under them
:mod:`.launches`  what each Triton kernel reads, writes and multiplies
:mod:`.aten`      the same of the ATen operations that run, recorded
:mod:`.forward`   a network's forward pass, fused and eager, and fused in eight bits
================  ====================================================================
"""

from .aten import AtenRecorder
from .forward import DTYPES, IMAGE_CHANNELS, Plan, check_input, plan_forward, quantized_work
from .launches import conv_weight, launch_work
from .work import H200_TBS, H200_TFLOPS, Rates, Row, Tally, Work

__all__ = [
    "DTYPES",
    "H200_TBS",
    "H200_TFLOPS",
    "IMAGE_CHANNELS",
    "AtenRecorder",
    "Plan",
    "Rates",
    "Row",
    "Tally",
    "Work",
    "check_input",
    "conv_weight",
    "launch_work",
    "plan_forward",
    "quantized_work",
]
