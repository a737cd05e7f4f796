"""Position tables for a grid of patches, and their resizing for another grid (ViT paper, D.4 and 3.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Grid(NamedTuple):
    """Patches down and across; a token of row y and column x has number y * width + x (raster order)."""

    height: int
    width: int


class Learned2d(nn.Module):
    """2-D learned positions: the entry of patch (x, y) is concat(X[x], Y[y]), each of half the channels (paper, D.4).

    The class token has no entry: the paper does not say what it gets, and its own vector can take any role.
    """

    def __init__(self, grid: Grid, channels: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(grid.width, channels // 2))
        self.y = nn.Parameter(torch.zeros(grid.height, channels // 2))

    def forward(self) -> torch.Tensor:
        """Returns the full table [1, patches, channels]."""
        return learned2d_table(self.x, self.y)


def learned2d_table(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns the table [1, height * width, channels] of an X table [width, channels / 2] and a Y table."""
    rows, columns = len(y), len(x)
    by_column, by_row = x[None].expand(rows, -1, -1), y[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=2).flatten(0, 1)[None]


def sincos2d(height: int, width: int, channels: int) -> torch.Tensor:
    """Returns the fixed table of "Better plain ViT baselines" (MoCo v3's), float32 [1, height * width, channels].

    For column x and row y of each patch, in raster order: [sin(x w), cos(x w), sin(y w), cos(y w)]. Computed in
    float64; equal to google-research/big_vision posemb_sincos_2d. timm's builder gives another table.
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    omega = 10_000.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4 - 1))
    x_angles, y_angles = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega  # [patches, channels / 4]
    table = torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=1)
    return table.float()[None]


def relative_offsets(patches: int, class_token: bool) -> torch.Tensor:
    """Returns which row of a relative table each (query, key) pair uses, int64 [tokens, tokens].

    Rows 0 .. 2 * patches - 2 are the 1-D raster offsets p_q - p_k (paper, D.4). The class token has no place in the
    raster: three further rows serve class -> patch, patch -> class and class -> class, as the paper leaves it open.
    """
    place = torch.arange(patches)
    offsets = place[:, None] - place[None, :] + patches - 1
    if not class_token:
        return offsets
    tokens = torch.empty(patches + 1, patches + 1, dtype=torch.int64)
    tokens[1:, 1:] = offsets
    tokens[0, 1:], tokens[1:, 0], tokens[0, 0] = 2 * patches - 1, 2 * patches, 2 * patches + 1
    return tokens


def num_relative_offsets(patches: int, class_token: bool) -> int:
    """Returns the rows of a relative table."""
    return 2 * patches - 1 + 3 * class_token


def resize_table(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Returns learned positions [1, slots + patches, D] for another grid; leading slots (class token) stay as they are.

    Corner-aligned bilinear interpolation, which is Google's `scipy.ndimage.zoom(order=1)` (vision_transformer
    checkpoint.py, big_vision resample_posemb). Half-pixel interpolation, as timm's reader has it, is another function.
    """
    slots = table.shape[1] - old.height * old.width
    if old == new:
        return table
    grid = table[:, slots:].unflatten(1, tuple(old)).permute(0, 3, 1, 2)  # [1, D, height, width]
    resized = F.interpolate(grid, size=tuple(new), mode="bilinear", align_corners=True)
    return torch.cat([table[:, :slots], resized.flatten(2).transpose(1, 2)], dim=1)


def resize_axis(table: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the X or Y table [places, channels] of 2-D positions for another number of places, by the same rule."""
    if len(table) == size:
        return table
    return F.interpolate(table.T[None], size=size, mode="linear", align_corners=True)[0].T
