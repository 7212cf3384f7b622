"""The STC connector v35: from SigLIP's patches to a third as many tokens, merged over space and time.

Source: arXiv:2406.07476, section 3.2; blocks after RegNet (arXiv:2003.13678) with layer norms.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn

from fastav.models._layers import mlp
from fastav.models.videollama2.scheme import MERGE


class LayerNorm2d(nn.LayerNorm):
    """A layer norm over the channels of a picture [batch, channels, height, width]."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every pixel over its channels."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """A convolution without bias, then a layer norm over channels."""

    def __init__(self, channels: int, out: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = LayerNorm2d(out)

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, out, height, width]."""
        return self.bn(self.conv(pixels))


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate that sees the mean of all."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, channels, height, width], same out."""
        gate = nn.functional.silu(self.fc1(pixels.mean((2, 3), keepdim=True)))
        return pixels * self.fc2(gate).sigmoid()


class Bottleneck(nn.Module):
    """1x1, depthwise 3x3, squeeze-excite, 1x1, plus the shortcut.

    The gate narrows to a quarter of the block's input channels, not of its own width.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, out, 1)
        self.conv2 = ConvNorm(out, out, 3, groups=out)
        self.se = SqueezeExcite(out, round(channels / 4))
        self.conv3 = ConvNorm(out, out, 1)
        self.downsample = ConvNorm(channels, out, 1) if channels != out else None

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, out, height, width]."""
        shortcut = pixels if self.downsample is None else self.downsample(pixels)
        pixels = nn.functional.silu(self.conv1(pixels))
        pixels = nn.functional.silu(self.conv2(pixels))
        return nn.functional.silu(self.conv3(self.se(pixels)) + shortcut)


class Stage(nn.ModuleDict):
    """Blocks `b1`, `b2`, ... one after another."""

    def __init__(self, depth: int, channels: int, out: int) -> None:
        super().__init__({f"b{i + 1}": Bottleneck(out if i else channels, out) for i in range(depth)})

    def forward(self, pixels: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, out, height, width]."""
        for block in self.values():
            pixels = block(pixels)
        return pixels


class StcConnector(nn.Module):
    """A stage per frame, a strided 3-D convolution over pairs of frames, a stage per pair, an MLP."""

    def __init__(self, channels: int, hidden: int, depth: int, mlp_depth: int) -> None:
        super().__init__()
        self.s1 = Stage(depth, channels, hidden)
        self.sampler = nn.Sequential(nn.Conv3d(hidden, hidden, MERGE, stride=MERGE), nn.SiLU())
        self.s2 = Stage(depth, hidden, hidden)
        self.readout = mlp(hidden, hidden, mlp_depth)

    def forward(
        self, patches: Float[Tensor, "videos frames patches channels"]
    ) -> Float[Tensor, "videos tokens hidden"]:
        """Tokens in the order time, row, column."""
        return self.readout(self.merged(patches))

    def merged(self, patches: Float[Tensor, "videos frames patches channels"]) -> Float[Tensor, "videos tokens hidden"]:
        """The tokens before the MLP."""
        videos, frames, count, _ = patches.shape
        side = math.isqrt(count)
        pixels = self.s1(patches.flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2))
        pixels = self.sampler(pixels.unflatten(0, (videos, frames)).transpose(1, 2))
        pairs = pixels.shape[2]
        pixels = self.s2(pixels.transpose(1, 2).flatten(0, 1))
        return pixels.flatten(2).transpose(1, 2).unflatten(0, (videos, pairs)).flatten(1, 2)
