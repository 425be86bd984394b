"""What builders share: weights that make every attention matter, masks, and calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter so that activations keep their size through the model.

    Initialisers of real models make attention nearly uniform, or, with gates at zero, keep it from
    the output altogether; errors would not show. Vectors stay near what they are: ones or zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            noise *= math.prod(parameter.shape[1:]) ** -0.5  # the fan-in
        else:
            noise = parameter.data.float().mean().round() + 0.1 * noise
        parameter.data.copy_(noise)
    return module.eval().requires_grad_(False)


def tokens(batch: int, length: int, vocabulary: int = 128, seed: int = 1) -> Tensor:
    """Random token numbers, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 2) -> Tensor:
    """Normal random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def padding(batch: int, length: int, pads: int, side: str) -> Tensor:
    """A 2-D attention mask: the last row has ``pads`` tokens of padding, all others none."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    if side == "right":
        mask[-1, length - pads :] = 0
    else:
        mask[-1, :pads] = 0
    return mask
