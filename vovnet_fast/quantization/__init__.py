"""Networks in eight bits: calibrated on images, reported on, trained, and kept in files.

=========================  ============================================================
:mod:`.quantize`           :func:`vovnet_fast.quantize`, :func:`fine_tuning`
:mod:`.calibrating`        images in, ranges of all activations out
:mod:`.ranges`             histograms, and the calibrators that choose a range by them
:mod:`.formats`            int8 and fp8: scales, zero points, what values become
:mod:`.building`           integer layers out of folded weights and ranges
:mod:`.adjusting`          cross-layer equalisation, bias correction
:mod:`.walking`            the way through a network, for all who go it
:mod:`.floating`           who computes it in floating point
:mod:`.straight_through`   who computes the integers, with gradients
:mod:`.running`            the integers alone, from slot to slot
:mod:`.rehearsing`         what it will launch on a GPU
:mod:`.network`            the module that runs so
:mod:`.fine_tuning`        the module that trains
:mod:`.report`             what quantisation costs, by activation
:mod:`.layout`             a network as tensors by name
:mod:`.file`               that as a file
:mod:`.export`             the network as an ONNX file, in QDQ
:mod:`.onnx_graph`         the nodes of that
:mod:`.onnx_check`         what onnxruntime makes of it, and the integers
=========================  ============================================================

What is computed is in :mod:`vovnet_fast.arithmetic`, and in docs/quantization.md.
"""

from .fine_tuning import FineTuning
from .network import QuantizedVoVNet
from .quantize import fine_tuning
from .report import Report

__all__ = ["FineTuning", "QuantizedVoVNet", "Report", "fine_tuning"]
