"""One-Shot Aggregation in one concat buffer: no concatenation, no copy between layers.

The buffer is ``[N, H, W, C_in + L * C_mid]``. Slot 0 holds the block's input, slot i the
output of layer i: every layer reads one slot and writes the next, and the 1x1 over the
concat reads the buffer as it lies.

The backward pass has one buffer of the same shape for the gradients. The 1x1 fills it;
then, from the last layer to the first, each layer's slot is complete when its turn
comes, and the gradient of its input is added into the slot before, in place, and masked
by the ReLU there.

==================  ==================================================================
:mod:`.params`      a block's parameters, the slots of its buffer, what it asks of a backend
:mod:`.forward`     a block from slot to slot, on a backend
:mod:`.backward`    its gradients
:mod:`.saving`      what the one pass keeps for the other, and how the rest is made again
:mod:`.library`     both passes as ops of ``torch.library``, and as an autograd Function
:mod:`.function`    :func:`osa_block`, the differentiable function
==================  ==================================================================
"""

from .backward import BlockGrads, run_backward
from .forward import BlockKept, run
from .function import osa_block, osa_block_with_statistics
from .params import BlockParams, check, input_slot, needs, new_buffer

__all__ = [
    "BlockGrads",
    "BlockKept",
    "BlockParams",
    "check",
    "input_slot",
    "needs",
    "new_buffer",
    "osa_block",
    "osa_block_with_statistics",
    "run",
    "run_backward",
]
