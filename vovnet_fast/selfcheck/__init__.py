"""A function of a backend is trusted on a machine once it has computed right numbers there.

Functions run on small random tensors, and are compared with the reference: the error against
fp64 may be twice that of plain PyTorch in the same dtype, plus one rounding of the largest value
(in fp32 a few). Tensors lie in slots whose surroundings are NaN, so that whoever reads or writes
beside a slot is found out.

``auto`` asks for the functions that a call will use, in the dtype of its activations, before it
runs (:mod:`vovnet_fast.backends`), and has those checked that are not known: the slim check of
:mod:`.cases`. ``vovnet-fast doctor`` runs the thorough one, of everything.

What computes in eight bits is held against :mod:`vovnet_fast.arithmetic` (:mod:`.eight_bits`): the
numbers of int8 must be the same, those of fp8 a step apart at most.

A function that passed is remembered in ``verified.json`` beside the tuning file
(:mod:`vovnet_fast.tuning`), for this machine, this dtype, the code that computes it
(:mod:`.sources`), and, where it sums products in fp32, whether torch allows TF32. One that failed
is not: the next process checks it again.
"""

from .cases import CASES
from .runner import DTYPES, Row, run
from .sources import digest
from .tensors import Slot, disagreement, few_images
from .trust import launches, remembered, trusted, verdicts

__all__ = [
    "CASES",
    "DTYPES",
    "Row",
    "Slot",
    "digest",
    "disagreement",
    "few_images",
    "launches",
    "remembered",
    "run",
    "trusted",
    "verdicts",
]
