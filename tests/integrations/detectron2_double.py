"""As much of detectron2's published interface as a backbone meets, for tests where it is missing.

Written from its documentation (``Backbone``, ``ShapeSpec``, ``Registry``, ``CfgNode``, ``FPN`` and
the names of their parts and keys), and only as exact as these tests need.
"""

import abc
import importlib
import types
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn


class Registry:
    """Functions by their names."""

    def __init__(self):
        self._found = {}

    def register(self):
        def add(function):
            assert function.__name__ not in self._found, f"{function.__name__} is registered twice"
            self._found[function.__name__] = function
            return function

        return add

    def get(self, name):
        return self._found[name]


@dataclass
class ShapeSpec:
    channels: object = None
    height: object = None
    width: object = None
    stride: object = None


class CfgNode(dict):
    """A dict whose items are attributes too."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Backbone(nn.Module, abc.ABC):
    def __init__(self):
        super().__init__()

    @abc.abstractmethod
    def forward(self):
        """Features by name."""

    @property
    def size_divisibility(self):
        return 0

    @property
    def padding_constraints(self):
        return {}


class LastLevelMaxPool(nn.Module):
    num_levels, in_feature = 1, "p5"

    def forward(self, x):
        return [F.max_pool2d(x, 1, 2)]


class FPN(Backbone):
    """Levels p2 to p5 of features of strides 4 to 32, and those of a top block."""

    def __init__(
        self, bottom_up, in_features, out_channels, norm="", top_block=None, fuse_type="sum"
    ):
        super().__init__()
        assert isinstance(bottom_up, Backbone)
        assert (norm, fuse_type) == ("", "sum"), "the double has no others"
        shapes = bottom_up.output_shape()
        self.bottom_up, self.in_features, self.top_block = bottom_up, in_features, top_block
        self._levels = {name: shapes[name].stride.bit_length() - 1 for name in in_features}
        for name, level in self._levels.items():
            self.add_module(
                f"fpn_lateral{level}", nn.Conv2d(shapes[name].channels, out_channels, 1)
            )
            self.add_module(f"fpn_output{level}", nn.Conv2d(out_channels, out_channels, 3, 1, 1))
        self._size_divisibility = shapes[in_features[-1]].stride

    @property
    def size_divisibility(self):
        return self._size_divisibility

    def forward(self, x):
        found = self.bottom_up(x)
        results, above = {}, None
        for name in reversed(self.in_features):
            level = self._levels[name]
            lateral = getattr(self, f"fpn_lateral{level}")(found[name])
            above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2)
            results[f"p{level}"] = getattr(self, f"fpn_output{level}")(above)
        results = dict(reversed(results.items()))
        if self.top_block is not None:
            source = {**found, **results}[self.top_block.in_feature]
            last = max(self._levels.values())
            for i, level in enumerate(self.top_block(source), start=last + 1):
                results[f"p{i}"] = level
        return results


def modules():
    """What ``sys.modules`` has to have."""
    found = {}
    for name, content in (
        ("detectron2", {}),
        ("detectron2.config", {"CfgNode": CfgNode}),
        ("detectron2.layers", {"ShapeSpec": ShapeSpec}),
        ("detectron2.modeling", {}),
        (
            "detectron2.modeling.backbone",
            {"BACKBONE_REGISTRY": Registry(), "FPN": FPN, "Backbone": Backbone},
        ),
        ("detectron2.modeling.backbone.fpn", {"LastLevelMaxPool": LastLevelMaxPool}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        module.__path__ = []
        found[name] = module
    return found


def installed():
    """Whether the real one can be imported."""
    try:
        importlib.import_module("detectron2.modeling")
    except ImportError:
        return False
    return True
