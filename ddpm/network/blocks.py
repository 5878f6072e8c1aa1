"""The U-Net's layers: two kinds of block, self-attention, downsampling and upsampling.

Owns: these layers and what starts at zero in each. Residual block and attention are those of Ho et al. 2020 (appendix
B: a Wide ResNet block with the time embedding added inside); the plain block is the double convolution of
Ronneberger et al. 2015, "U-Net", with GroupNorm and SiLU. Must not know: the network that they make.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.network import fused
from ddpm.network.attention import attention
from ddpm.network.dropout import Dropout


class ResidualBlock(nn.Module):
    """x (B, width_in, H, W), emb (B, embedding) -> (B, width_out, H, W); places: of rng.places, for dropout's masks."""

    by_sample = ("conv_2.bias", "skip.bias")
    """Parameters whose gradients fused.py's kernels give sample by sample."""

    def __init__(self, width_in: int, width_out: int, embedding: int, dropout: float, groups: int | None) -> None:
        super().__init__()
        self.norm_1 = group_norm(width_in, groups)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.embed = nn.Linear(embedding, width_out)
        self.norm_2 = group_norm(width_out, groups)
        self.dropout = Dropout(dropout)
        self.conv_2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, places: Tensor | None = None) -> Tensor:
        # on a GPU by_own_kernels computes this: change both, or say has_kernels = False in this class
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.embed(emb)[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h)), places))
        return self.skip(x) + h

    def by_own_kernels(self, x: Tensor, shift: Tensor, places: Tensor | None) -> Tensor:
        """`forward` by fused.py's kernels. shift: (B, width_out), what `shifts` has computed for this block."""
        h, x = fused.norm_act(x, self.norm_1, silu=True)
        h = F.conv2d(h, self.conv_1.weight, padding=1)
        h, _ = fused.norm_act(h, self.norm_2, silu=True, shift=shift, dropout=self.dropout, places=places)
        h = F.conv2d(h, self.conv_2.weight, padding=1)
        bias, of_skip = cast(Tensor, self.conv_2.bias), None
        if isinstance(self.skip, nn.Conv2d):
            x, of_skip = fused.pointwise(x, self.skip.weight), self.skip.bias
        return fused.add(x, h, bias, of_skip)


def shifts(blocks: Sequence[ResidualBlock], emb: Tensor) -> tuple[Tensor, ...]:
    """What each block adds after its first convolution (embedding and the convolution's bias), from one matrix product
    for all blocks: (B, width_out) each. emb: (B, embedding)."""
    weight, bias = torch.cat([b.embed.weight for b in blocks]), torch.cat([b.embed.bias for b in blocks])
    of_convolutions = torch.cat([cast(Tensor, b.conv_1.bias) for b in blocks])
    return (F.linear(emb, weight, bias) + of_convolutions).split([b.conv_1.out_channels for b in blocks], 1)


class PlainBlock(nn.Module):
    """Twice convolution, GroupNorm, SiLU, without a skip connection; shapes as in ResidualBlock."""

    has_kernels = False

    def __init__(self, width_in: int, width_out: int, embedding: int, dropout: float, groups: int | None) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm_1 = group_norm(width_out, groups)
        self.embed = nn.Linear(embedding, width_out)
        self.dropout = Dropout(dropout)
        self.conv_2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.norm_2 = group_norm(width_out, groups)

    def forward(self, x: Tensor, emb: Tensor, places: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm_1(self.conv_1(x)))
        h = h + self.embed(emb)[:, :, None, None]
        return F.silu(self.norm_2(self.conv_2(self.dropout(h, places))))


class Attention(nn.Module):
    """Self-attention over the H W positions, (B, C, H, W) -> the same; 1x1 convolutions beat linear layers in fp32.

    fused: use torch's scaled_dot_product_attention instead of two products and a softmax; may be changed at any time.
    own_kernels: use fused.py's kernels and attention.py; set by UNet.set_own_kernels.
    """

    by_sample = ("qkv.bias", "proj.bias")

    def __init__(self, width: int, heads: int, groups: int | None = None) -> None:
        super().__init__()
        self.heads, self.fused, self.own_kernels = heads, True, False
        self.norm = group_norm(width, groups)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.own_kernels:
            h, x = fused.norm_act(x, self.norm, silu=False)
            h = fused.pointwise(h, self.qkv.weight, self.qkv.bias)
            h = fused.pointwise(attention(h, self.heads), self.proj.weight)
            return fused.add(x, h, cast(Tensor, self.proj.bias))
        batch, width, height, breadth = x.shape
        per_head = width // self.heads
        # (B, heads, channels of a head, positions), a view in either memory layout. The fused kernels of a GPU want the
        # channels side by side, which channels_last gives; otherwise torch takes its own plain path.
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, per_head, height * breadth).unbind(1)
        if self.fused:
            h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        else:
            weights = torch.softmax((q.mT * per_head**-0.5) @ k, dim=-1)
            h = v @ weights.mT
        return x + self.proj(h.reshape(batch, width, height, breadth))


class AsymmetricConv(nn.Conv2d):
    """3x3, stride 2, zeros below and right alone: TensorFlow's "same" padding of even sizes, as in Ho et al.'s code."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class NearestConv(nn.Sequential):
    """Doubles height and width by nearest neighbours, then a 3x3 convolution."""

    own_kernels = False
    by_sample = ("1.bias",)

    def __init__(self, width: int) -> None:
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return fused.conv(fused.double(x), cast(nn.Conv2d, self[1])) if self.own_kernels else super().forward(x)


def downsample(kind: str, width: int) -> nn.Module:
    """(B, width, H, W) -> (B, width, H/2, W/2). kind: conv | pool | conv_asymmetric."""
    if kind == "pool":
        return nn.AvgPool2d(2)
    return AsymmetricConv(width) if kind == "conv_asymmetric" else nn.Conv2d(width, width, 3, stride=2, padding=1)


def upsample(kind: str, width: int) -> nn.Module:
    """(B, width, H, W) -> (B, width, 2H, 2W). kind: conv (after nearest neighbour) | transpose (Ronneberger's)."""
    if kind == "transpose":
        return nn.ConvTranspose2d(width, width, 2, stride=2)
    return NearestConv(width)


def group_norm(width: int, groups: int | None) -> nn.GroupNorm:
    """GroupNorm (Wu & He 2018) of `width` channels, with the epsilon of Ho et al.'s code.

    groups None: 32 as in the paper, or the largest divisor of 32 that divides the channels; never one group for each
    channel, which would remove what t and class have added to it.
    """
    most = math.gcd(32, width)
    return nn.GroupNorm(groups or (most // 2 if 1 < most == width else most), width, eps=1e-6)


def reset_parameters(network: nn.Module) -> None:
    """Fan-average uniform weights and zero biases, then zeros where a residual branch ends (Ho et al.'s code)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            # a transposed convolution of stride 2 reads a quarter of its kernel for each output: twice the weight
            nn.init.xavier_uniform_(module.weight, 2.0 if isinstance(module, nn.ConvTranspose2d) else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv_2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.proj.weight)
