"""Read, check, rename and write VoVNet checkpoints of every published key layout.

Key layouts, for the first layer of the second stage:

=============================  =================================================
``native`` and ``detectron2``  ``stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight``
``timm``                       ``stages.0.blocks.0.conv_mid.0.conv.weight``
``seed`` (mmdet 1.2 port)      ``model.OSA_2.OSA2_1.layers.0.0.weight``
``torchhub`` (VoVNet.pytorch)  as ``native``, with ``classifier.weight`` beside it
``pytorchcv``                  ``features.stage1.unit1.branches.branch1.conv.weight``
=============================  =================================================

``native``, ``detectron2`` and ``torchhub`` share their keys and differ in what they
promise: ``native`` is the layout of this package's own modules, of any dialect;
``detectron2`` is a file that vovnet-detectron2, PETR and their relatives run as
the same function, ``torchhub`` one that the VoVNet of 2019 does. Converting and
loading refuse where no such function exists.

Nothing here executes code from a file: no pickle is unpickled. In files of
``torch.save`` whatever is no tensor (a trainer's log buffers, say) becomes an inert
placeholder; in pickles of NumPy arrays, detectron2's ``.pkl`` files, it is refused.

===================  ================================================================
:mod:`.files`        reading files of tensors
:mod:`.archives`     reading files of ``torch.save``: where their storages lie
:mod:`.tensors`      reading the pickles in them
:mod:`.arrays`       reading pickles of NumPy arrays
:mod:`.pickles`      a pickle as a list of instructions, for both
:mod:`.downloads`    files of http(s) addresses, kept
:mod:`.writing`      writing them
:mod:`.layouts`      what modules are called in every layout
:mod:`.fitting`      whether tensors fill an architecture, and which one
:mod:`.loading`      a model filled from a checkpoint
:mod:`.conversion`   a checkpoint renamed to another layout
===================  ================================================================
"""

from ..network.filling import CheckpointError
from .conversion import convert, convert_with_report
from .files import StateDict, read
from .fitting import Report, identify
from .layouts import LAYOUTS, Layout
from .loading import load
from .writing import write

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Layout",
    "Report",
    "StateDict",
    "convert",
    "convert_with_report",
    "identify",
    "load",
    "read",
    "write",
]
