"""The network eps(x_t, t): the U-Net of Ho et al. 2020, "Denoising diffusion probabilistic models", appendix B.

Owns: the structure, its checks and its initial weights. Must not know: schedules, losses, devices, precision, which
attention implementation or memory layout is fastest where (`fused_attention` is for others to choose).

Residual blocks (Wide ResNet, time embedding added inside), strided convolution down, nearest neighbour and convolution
up, self-attention at chosen resolutions and at the bottleneck. The last convolution of every block, every attention
output and the network's output start at zero, so a block begins as the identity and the network as eps = 0.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """eps(x_t, t) or, with num_classes > 0, eps(x_t, t, labels).

    image_size: height and width, divisible by 2**(levels - 1). channel_mults: channels of each level in units of
    base_channels (even), one level per entry, each half the size of the one before. attention_resolutions: sizes, of
    those that the levels have, at which every block is followed by attention; the bottleneck always has it.
    attention_heads: divides the channels wherever there is attention. dropout: in [0, 1). fused_attention: torch's
    scaled_dot_product_attention instead of two products and a softmax; `set_fused_attention` changes it later.
    Anything else is a ValueError that names the argument.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        attention_heads: int = 1,
        dropout: float = 0.1,
        num_classes: int = 0,
        fused_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [base_channels * mult for mult in channel_mults]
        sizes = [image_size >> level for level in range(len(widths))]
        _check(
            image_size=image_size,
            in_channels=in_channels,
            base_channels=base_channels,
            channel_mults=channel_mults,
            blocks_per_level=blocks_per_level,
            attention_resolutions=attention_resolutions,
            attention_heads=attention_heads,
            dropout=dropout,
            num_classes=num_classes,
        )
        self.image_size, self.in_channels = image_size, in_channels
        self.base_channels, self.num_classes = base_channels, num_classes
        embedding = 4 * base_channels
        self.time_mlp = nn.Sequential(nn.Linear(base_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.class_embedding = nn.Embedding(num_classes, embedding) if num_classes else None

        def block(width_in: int, width_out: int) -> nn.Module:
            return ResidualBlock(width_in, width_out, embedding, dropout)

        def attention(width: int) -> nn.Module:
            return Attention(width, attention_heads, fused_attention)

        def attention_at(size: int, width: int) -> nn.Module:
            return attention(width) if size in attention_resolutions else nn.Identity()

        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        width, skips = base_channels, [base_channels]
        self.encoder = nn.ModuleList()
        for level, (level_width, size) in enumerate(zip(widths, sizes, strict=True)):
            stage = Level()
            for _ in range(blocks_per_level):
                stage.add(block(width, level_width), attention_at(size, level_width))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                stage.resample = nn.Conv2d(width, width, 3, stride=2, padding=1)
                skips.append(width)
            self.encoder.append(stage)

        self.bottleneck = Level()
        self.bottleneck.add(block(width, width), attention(width))
        self.bottleneck.add(block(width, width), nn.Identity())

        self.decoder = nn.ModuleList()
        for level, (level_width, size) in reversed(list(enumerate(zip(widths, sizes, strict=True)))):
            stage = Level()
            for _ in range(blocks_per_level + 1):
                stage.add(block(width + skips.pop(), level_width), attention_at(size, level_width))
                width = level_width
            if level > 0:
                stage.resample = nn.Sequential(
                    nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)
                )
            self.decoder.append(stage)

        self.norm_out = _group_norm(width)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)
        self._reset_parameters()

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W) floating; t: int64 (B,), 0 .. T-1; labels: int64 (B,) in [0, num_classes).

        Returns eps, (B, C, H, W); its type is autocast's or the weights'. ValueError for a wrong shape, or for labels
        that are missing or not wanted. Dropout draws from torch's global generator in training mode.
        """
        if x_t.shape[1:] != (self.in_channels, self.image_size, self.image_size):
            expected = (self.in_channels, self.image_size, self.image_size)
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}; each image must be {expected}")
        dtype = self.conv_in.weight.dtype
        emb = self.time_mlp(timestep_embedding(t, self.base_channels).to(dtype))
        if (labels is None) != (self.class_embedding is None):
            given, wanted = ("missing", "needed") if labels is None else ("given", "not allowed")
            raise ValueError(f"labels are {given}; with num_classes={self.num_classes} they are {wanted}")
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(labels)
        emb = F.silu(emb)  # once for all blocks

        h = self.conv_in(x_t.to(dtype))
        skips = [h]
        for level in cast(Iterable[Level], self.encoder):
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(h, emb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        for block, attention in zip(self.bottleneck.blocks, self.bottleneck.attentions, strict=True):
            h = attention(block(h, emb))
        for level in cast(Iterable[Level], self.decoder):
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(block(torch.cat([h, skips.pop()], 1), emb))
            if level.resample is not None:
                h = level.resample(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def set_fused_attention(self, fused: bool) -> None:
        """Chooses the implementation in every attention of the network; the weights stay."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused = fused

    def _reset_parameters(self) -> None:
        """Fan-average uniform weights and zero biases, then zeros where a residual branch or the network ends."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv_2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.proj.weight)
        nn.init.zeros_(self.conv_out.weight)


class Level(nn.Module):
    """The blocks of one resolution, what follows each (attention or nothing), and the way to the next resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.resample: nn.Module | None = None

    def add(self, block: nn.Module, attention: nn.Module) -> None:
        self.blocks.append(block)
        self.attentions.append(attention)


class ResidualBlock(nn.Module):
    """(B, width_in, H, W), (B, embedding) -> (B, width_out, H, W)."""

    def __init__(self, width_in: int, width_out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = _group_norm(width_in)
        self.conv_1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.embed = nn.Linear(embedding, width_out)
        self.norm_2 = _group_norm(width_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.embed(emb)[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H W positions, (B, C, H, W) -> the same; 1x1 convolutions beat linear layers in fp32."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm = _group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
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


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of t at frequencies from 1 down to 1/10000 in geometric steps, as in Ho et al.'s code.

    t: int64 (B,); width: even. Returns float32 (B, width): bf16 could not tell t = 998 from t = 999.
    """
    half = width // 2
    place = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(place * (-math.log(10000.0) / max(half - 1, 1)))
    angle = t.to(torch.float32)[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _group_norm(width: int) -> nn.GroupNorm:
    """32 groups as in the paper, or the most that divide both 32 and the channels; its epsilon is that of Ho's code."""
    return nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)


def _check(
    *,
    image_size: int,
    in_channels: int,
    base_channels: int,
    channel_mults: Sequence[int],
    blocks_per_level: int,
    attention_resolutions: Sequence[int],
    attention_heads: int,
    dropout: float,
    num_classes: int,
) -> None:
    counts = {
        "image_size": image_size,
        "in_channels": in_channels,
        "base_channels": base_channels,
        "blocks_per_level": blocks_per_level,
        "attention_heads": attention_heads,
    }
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if base_channels % 2:
        raise ValueError(f"base_channels is {base_channels}; it must be even (half sines, half cosines of t)")
    if not channel_mults or min(channel_mults) < 1:
        raise ValueError(f"channel_mults is {list(channel_mults)}; it needs at least one entry, each at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; it must be 0 (unconditional) or more")
    divisor = 2 ** (len(channel_mults) - 1)
    if image_size % divisor:
        raise ValueError(
            f"image_size is {image_size}; with {len(channel_mults)} channel_mults it must be a multiple of {divisor}"
        )
    sizes = [image_size >> level for level in range(len(channel_mults))]
    absent = [size for size in attention_resolutions if size not in sizes]
    if absent:
        raise ValueError(f"attention_resolutions has {absent}; this network's resolutions are {sizes}")
    attended = {size: base_channels * mult for size, mult in zip(sizes, channel_mults, strict=True)}
    for size, width in attended.items():
        if (size in attention_resolutions or size == sizes[-1]) and width % attention_heads:
            raise ValueError(
                f"attention_heads is {attention_heads}; it must divide the {width} channels at resolution {size}"
            )
