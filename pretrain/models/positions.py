"""Position tables for a grid of patches."""

import torch


def sincos2d(height: int, width: int, channels: int, temperature: float = 10_000.0) -> torch.Tensor:
    """Returns the fixed table of "Better plain ViT baselines" (MoCo v3's), float32 [1, height * width, channels].

    For column x and row y of each patch, in raster order: [sin(x w), cos(x w), sin(y w), cos(y w)]. Computed in
    float64; equal to google-research/big_vision posemb_sincos_2d. timm's builder gives another table.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    omega = temperature ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4 - 1))
    x_angles, y_angles = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega  # [patches, channels / 4]
    table = torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=1)
    return table.float()[None]
