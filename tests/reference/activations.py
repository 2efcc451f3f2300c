"""Rounding of activations, one token at a time, for symmetric grids.

Integers divide in float32: a token's largest value lies half way between two codes, and float32 says which.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def int8_token(x: Tensor) -> Tensor:
    """One scale per token."""
    return torch.stack([_integers(row) for row in x.float().reshape(-1, x.shape[-1])]).double().reshape(x.shape)


def int8_tensor(x: Tensor, scale: float) -> Tensor:
    """One given scale; what is beyond the grid saturates."""
    return (x.float() / torch.tensor(scale)).round().double().clamp(-128, 127) * scale


def fp8_groups(x: Tensor, size: int) -> Tensor:
    """One scale per run of values of a token, the greatest on 448."""
    parts = x.double().reshape(-1, size)
    scale = parts.abs().amax(1, keepdim=True) / 448
    scale[scale == 0] = 1
    return ((parts / scale).float().to(torch.float8_e4m3fn).double() * scale).reshape(x.shape)


def nvfp4(x: Tensor, multiplier: float) -> Tensor:
    """Groups of 16 on FP4, their scales times `multiplier` on FP8, one element at a time."""
    out = []
    for part in x.double().reshape(-1, 16):
        scale = (part.abs().max() / 6 * multiplier).float().to(torch.float8_e4m3fn).double() / multiplier
        for value in part:
            distance = (FP4 - (value / scale).abs()).abs() if scale > 0 else FP4
            out.append(FP4[distance.argmin()] * scale * value.sign())
    return torch.stack(out).reshape(x.shape)


def _integers(row: Tensor) -> Tensor:
    scale = row.abs().max() / 127.5
    if scale == 0:
        return row
    return (row / scale).round().clamp(-128, 127) * scale
