"""How long a convolution will take in a configuration, predicted instead of measured.

====================  =======================================================================
:mod:`.cost_model`    a layer, the work of a launch, and how long a device takes for that
:mod:`.cost_work`     the work of a configuration on a layer, and what is predicted of it
:mod:`.cost_choices`  configurations by prediction, and the one taken where nothing was measured
====================  =======================================================================

What is assumed is a named constant. None of it has been held against a device yet;
``vovnet-fast tuning regret`` does that, once there are times.
"""

from .cost_choices import (
    FAVOUR,
    STEADY,
    TIE,
    choices,
    configurations,
    predictions,
    ranked,
    static_choice,
)
from .cost_model import LAUNCH, WEIGHT_GRAD, Layer, Prediction, Work, predict_work
from .cost_work import predict, through_shared

__all__ = [
    "FAVOUR",
    "LAUNCH",
    "STEADY",
    "TIE",
    "WEIGHT_GRAD",
    "Layer",
    "Prediction",
    "Work",
    "choices",
    "configurations",
    "predict",
    "predict_work",
    "predictions",
    "ranked",
    "static_choice",
    "through_shared",
]
