"""The functional forms, one file or folder an op: checks at one boundary, then a backend.

=========================  ==========================================================
:func:`conv_bn_relu`       convolution, folded batch norm, ReLU
:func:`ese`                effective Squeeze-Excitation, identity add
:func:`max_pool`           3x3 max pool, stride 2
:func:`osa_block`          One-Shot Aggregation in one concat buffer
:func:`features`           a whole VoVNet
=========================  ==========================================================

Tensors are PyTorch's ``[N, C, H, W]``; ``channels_last`` ones are used as they lie,
others are converted. Each op is registered with ``torch.library`` and has a fake, so
that ``torch.compile(fullgraph=True)`` sees no graph break. Which backend works is
said by :mod:`vovnet_fast.backends`. All but :func:`features` are differentiable once.
"""

from . import _checks, flops
from .chain import conv_bn_relu
from .conv import ConvParams, fold
from .ese import ese
from .features import NetworkParams, features
from .max_pool import max_pool
from .osa import BlockParams, osa_block

__all__ = [
    "BlockParams",
    "ConvParams",
    "NetworkParams",
    "conv_bn_relu",
    "ese",
    "features",
    "fold",
    "max_pool",
    "osa_block",
]

flops.let_count()
_checks.on_modes.append(flops.let_count)
