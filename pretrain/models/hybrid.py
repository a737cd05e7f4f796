"""The ResNet trunk of the hybrids: images [B, 3, H, W] -> a map [B, C, H / stride, W / stride], with timm's names.

Google's network (vision_transformer, models_resnet.py): post-activation bottlenecks, weight standardisation with
(w - mean) / (std + 1e-5), GroupNorm of 32 groups with eps 1e-6, asymmetric SAME padding. BiT's own network differs.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

NORM_GROUPS, NORM_EPS, STD_EPS = 32, 1e-6, 1e-5


class StdConv(nn.Conv2d):
    """A convolution without bias whose kernel is standardised per output channel, padded as TensorFlow's SAME."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), standardised(self.weight), stride=self.stride)


def standardised(kernel: torch.Tensor) -> torch.Tensor:
    """Returns a kernel [out, in, height, width] with mean 0 and population deviation 1 per output channel, nearly."""
    variance, mean = torch.var_mean(kernel.float(), dim=(1, 2, 3), correction=0, keepdim=True)
    return ((kernel - mean) / (variance.sqrt() + STD_EPS)).to(kernel.dtype)


def pad_same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Returns x padded so that a side H becomes ceil(H / stride); an odd pixel goes to the right and the bottom."""
    down, across = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
    return F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=value)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class Stem(nn.Module):
    """7x7 convolution and 3x3 max-pooling, each of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = StdConv(3, channels, 7, stride=2), _norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(pad_same(x, 3, 2, value=float("-inf")), 3, stride=2)


class Unit(nn.Module):
    """A bottleneck: 1x1, 3x3 (with the stride), 1x1 to four times the channels."""

    def __init__(self, channels_in: int, channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = StdConv(channels_in, channels, 1), _norm(channels)
        self.conv2, self.norm2 = StdConv(channels, channels, 3, stride), _norm(channels)
        self.conv3, self.norm3 = StdConv(channels, 4 * channels, 1), _norm(4 * channels)
        self.downsample = _shortcut(channels_in, 4 * channels, stride) if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """The projection of the first unit of a stage."""
    return nn.Sequential(OrderedDict(conv=StdConv(channels_in, channels_out, 1, stride), norm=_norm(channels_out)))


def _stage(channels_in: int, channels: int, num_units: int, stride: int) -> nn.Sequential:
    """Units of one width; the first one projects its shortcut, and has the stride."""
    first = Unit(channels_in, channels, stride, project=True)
    others = (Unit(4 * channels, channels, 1, project=False) for _ in range(num_units - 1))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(first, *others)))


def build_trunk(units: list[int], width: int) -> tuple[nn.Module, int]:
    """Returns the trunk and the channels of its map. Without stages it is the stem alone, as in R+Ti."""
    stem = Stem(width)
    if not units:
        return stem, width
    stages, channels = nn.Sequential(), width
    for number, num_units in enumerate(units):
        stages.append(_stage(channels, width * 2**number, num_units, stride=1 if number == 0 else 2))
        channels = 4 * width * 2**number
    return nn.Sequential(OrderedDict(stem=stem, stages=stages)), channels
