"""Images, and a training step on them, as benchmarks run it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...compat import zip

Shape = tuple[int, int, int]
"""N, H, W of images with three channels."""


def image(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """``[N, 3, H, W]`` of normal numbers, the same ones for the same shape."""
    torch.manual_seed(1)
    x = torch.randn(shape[0], 3, *shape[1:], device=device, dtype=dtype)
    return x.to(memory_format=memory_format)


class TrainingStep:
    """Forward and backward pass; calling it leaves gradients of all parameters.

    Args:
        model: makes features of images; in fp32, as the images are.
        shape: of the images.
        device: of both.
        dtype: of the activations, by autocast. By default bf16 on a GPU, fp32 on a CPU.
        memory_format: of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.model, self.parameters = model, list(model.parameters())
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self._images = image(shape, torch.float32, device, memory_format)
        self._gradients: list[Tensor] = []

    def __call__(self) -> None:
        self.clear()
        self.backward(self.forward())

    def clear(self) -> None:
        """Forget gradients, and give their memory back."""
        for parameter in self.parameters:
            parameter.grad = None

    def forward(self) -> tuple[Tensor, ...]:
        """The features, and all that autograd keeps."""
        mixed = self.dtype != torch.float32
        narrow = self.dtype if mixed else None  # On a CPU torch 2.1 refuses fp32 where it is off.
        with torch.autocast(self._images.device.type, narrow, enabled=mixed):
            features: tuple[Tensor, ...] = self.model(self._images)
        return features

    def backward(self, features: tuple[Tensor, ...]) -> None:
        """Take gradients of the features back: normal numbers, the same for every model."""
        if not self._gradients:
            torch.manual_seed(2)
            # Drawn densely, so that the layout of the features does not matter.
            self._gradients = [
                torch.empty_like(f).copy_(torch.randn(f.shape, device=f.device)) for f in features
            ]
        torch.autograd.backward(features, self._gradients)

    def distance(self, gradients: list[Tensor]) -> float:
        """Of this step's gradients from others, of all parameters together, relative."""
        ours = [cast(Tensor, parameter.grad) for parameter in self.parameters]
        apart = sum((g - h).double().square().sum() for g, h in zip(ours, gradients, strict=True))
        return cast(Tensor, apart / sum(h.double().square().sum() for h in gradients)).sqrt().item()
