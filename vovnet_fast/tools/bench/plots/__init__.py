"""Pictures of measurements, for screens, for print in grey, and for colour-blind people.

Colours are Okabe and Ito's. Nothing is told apart by colour alone: there is a hatch, a marker, a
line style or a label beside it. Every function returns figures, or raises :class:`NothingToDraw`
with the reason.

* :mod:`~vovnet_fast.tools.bench.plots.pictures`: every picture by its name, written to files,
* :mod:`~vovnet_fast.tools.bench.plots.roofline`: operations under what the device can do,
* :mod:`~vovnet_fast.tools.bench.plots.networks`: speed, memory, and time against the batch,
* :mod:`~vovnet_fast.tools.bench.plots.blocks`: where the time goes in one block,
* :mod:`~vovnet_fast.tools.bench.plots.drawing`: what they share: sizes, colours, titles.
"""

from .drawing import NothingToDraw
from .pictures import PICTURES, Pictures, draw

__all__ = ["PICTURES", "NothingToDraw", "Pictures", "draw"]
