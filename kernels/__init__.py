"""Triton kernels and their launchers, a file an op, with a second one where its backward is long.

===========================  ====================================================
:mod:`.accumulate`           add and mask after another library's input gradient
:mod:`.batch_norm`           merge the batch's statistics, make of them what normalises
:mod:`.batch_norm_backward`  gradients of batch norm
:mod:`.conv`                 3x3 and 1x1 convolution, scale, shift, ReLU, pool partials or
                             statistics; its input gradient
:mod:`.conv_eight_bits`      3x3 and 1x1 convolution and ReLU in int8 and fp8, and sums for a pool
:mod:`.conv_weight_grad`     weight gradients of convolutions, with those of scale and shift
:mod:`.depthwise`            depthwise 3x3 convolution and its backward
:mod:`.depthwise_eight_bits` depthwise 3x3 convolution in int8 and fp8, and rounding images
:mod:`.epilogue`             scale, shift, ReLU, pool partials or statistics after another
                             library's convolution
:mod:`.ese`                  finish the pool, FC, gate; apply the gate, add the identity
:mod:`.ese_backward`         gradients of the gates, of the FC, and of what is gated
:mod:`.ese_eight_bits`       gates, and what applies them, in int8 and fp8
:mod:`.max_pool`             3x3 stride 2 max pool and its backward
:mod:`.pack`                 weights, transposed for the input gradient
===========================  ====================================================

Tensors are passed as views ``[N, H, W, C]`` with channel stride 1 and any batch,
row and pixel stride, so that a slot of a concat buffer, ``buffer[..., a:b]``, is a
legal input and output. Launchers write into the ``out`` that they are given,
synchronise with nothing, and return at once when there is nothing to compute.
They assert their own invariants only: arguments of users are checked one floor
up, in :mod:`vovnet_fast.ops`.

Importing these modules needs Triton and no GPU. With ``TRITON_INTERPRET=1`` set
before Triton is imported, every kernel runs on the CPU.
"""

from . import _compile_log

_compile_log.start()
