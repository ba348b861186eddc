"""cuDNN's graph API as an engine of :func:`.triton.conv`: one kernel, from a slot into a slot.

The graph is convolution, scale, shift and ReLU; cuDNN compiles it into one kernel that reads
and writes the slots where they lie, at the pixel stride of their concat buffer. (Through ATen
the slot is first copied together, and the result once more by the epilogue.) In eight bits it is
convolution, bias, multiplier, clamp and rounding, an engine of :func:`.triton.eight_bits.conv`.

It is driven through NVIDIA's frontend, an optional dependency (``vovnet-fast[cudnn]``), with
the cuDNN that torch has loaded. What cuDNN refuses is not offered; the logger
``vovnet_fast.cudnn_graph`` says why at level DEBUG, as :func:`why_none` does.

==================  ==================================================================
:mod:`.installed`   whether the frontend and the library are there, and fit torch
:mod:`.problems`    what a plan depends on, and what is not put to cuDNN at all
:mod:`.plans`       graphs, and the plans that cuDNN ranks for them
:mod:`.engine`      what is on offer for a layer, and running it
==================  ==================================================================
"""

from .engine import PLANS, engines, run, why_none
from .installed import MIN_CAPABILITY, MIN_CUDNN, why_not
from .plans import NAME, NEAREST, Plans, Refused
from .problems import Operand, Problem, describe, operand, refusal

__all__ = [
    "MIN_CAPABILITY",
    "MIN_CUDNN",
    "NAME",
    "NEAREST",
    "PLANS",
    "Operand",
    "Plans",
    "Problem",
    "Refused",
    "describe",
    "engines",
    "operand",
    "refusal",
    "run",
    "why_none",
    "why_not",
]
