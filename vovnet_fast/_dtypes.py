"""Which dtype sums are kept in."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums, scales and shifts for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
