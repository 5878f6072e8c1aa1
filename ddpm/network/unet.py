"""The network eps(x_t, t): the U-Net of Ho et al. 2020, "Denoising diffusion probabilistic models", appendix B.

Owns: how the layers of blocks.py make a network of a given structure (config/unet_shape.py), and how it begins. Must
not know: schedules, losses, devices, precision, or which attention and memory layout is fastest on a device: callers
choose.

The default is theirs: residual blocks, strided convolution down, nearest neighbour and convolution up, self-attention
at chosen resolutions and at the bottleneck. The last convolution of every residual block, every attention output and
the network's output start at zero, so such a block begins as the identity and any network as eps = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.config.unet_shape import Structure
from ddpm.network import fused
from ddpm.network.blocks import (
    Attention,
    PlainBlock,
    ResidualBlock,
    downsample,
    group_norm,
    reset_parameters,
    shifts,
    upsample,
)
from ddpm.network.dropout import number_layers


class UNet(nn.Module):
    """eps(x_t, t) or, with num_classes > 0, eps(x_t, t, labels).

    structure: the fields of Structure; image_size is required. ValueError naming a field that cannot be built.
    fused_attention: as in `Attention`; `set_fused_attention` changes it.
    Initial weights are float32, drawn from torch's global generator.
    """

    own_kernels = False
    by_sample = ("conv_in.bias",)

    def __init__(self, *, fused_attention: bool = True, **structure: Any) -> None:
        super().__init__()
        s = Structure(**structure)
        self.image_size, self.in_channels = s.image_size, s.in_channels
        self.base_channels, self.num_classes = s.base_channels, s.num_classes
        hidden = 4 * s.base_channels
        self.time_mlp = nn.Sequential(nn.Linear(s.base_channels, hidden), nn.SiLU(), nn.Linear(hidden, s.embedding))
        self.class_embedding = nn.Embedding(s.num_classes + s.null_label, s.embedding) if s.num_classes else None
        self.conv_in = nn.Conv2d(s.in_channels, s.base_channels, 3, padding=1)
        self.encoder, skips = _encoder(s)
        self.bottleneck = _bottleneck(s)
        self.decoder = _decoder(s, skips)
        self.norm_out = group_norm(s.widths[0], s.norm_groups)
        self.conv_out = nn.Conv2d(s.widths[0], s.in_channels, 3, padding=1)
        reset_parameters(self)
        number_layers(self)
        nn.init.zeros_(self.conv_out.weight)
        self.set_fused_attention(fused_attention)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """x_t: (B, C, H, W) floating; t: int64 (B,), 0 .. T-1; labels: int64 (B,) in [0, num_classes).

        With null_label a label may also be num_classes: "no label". Returns eps, (B, C, H, W), in autocast's type or
        the weights'. ValueError for a wrong shape, or for labels that are missing or not allowed. In training mode
        dropout draws its masks for `places` (of rng.places), or without them from torch's global generator.
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
        emb = F.silu(emb)  # computed once for all blocks

        way = (_Own if self.own_kernels else _Torch)(self, emb, places)
        h = way.conv(self.conv_in, x_t.to(dtype))
        skips = [h]
        for level in cast(Iterable[Level], self.encoder):
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(way.block(block, h))
                skips.append(h)
            if level.resample is not None:
                h = way.conv(level.resample, h)
                skips.append(h)
        for block, attention in zip(self.bottleneck.blocks, self.bottleneck.attentions, strict=True):
            h = attention(way.block(block, h))
        for level in cast(Iterable[Level], self.decoder):
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = attention(way.block(block, way.join(h, skips.pop())))
            if level.resample is not None:
                h = way.conv(level.resample, h)
        return way.end(h)

    def _apply(self, *given: Any, **options: Any) -> UNet:
        """torch calls this for whatever moves or casts the network. Our kernels may not serve there: until they are
        chosen again, torch's compute it."""
        self.set_own_kernels(False)
        return super()._apply(*given, **options)

    def set_own_kernels(self, own: bool) -> None:
        """Choose whether fused.py's kernels compute the layers between convolutions: on a GPU, channels last."""
        fused.choose(self, own)

    def set_fused_attention(self, fused: bool) -> None:
        """Choose `fused` of every Attention of the network; weights stay."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused = fused


class _Torch:
    """The steps of a forward pass, by the layers themselves."""

    def __init__(self, network: UNet, emb: Tensor, places: Tensor | None) -> None:
        self.network, self.emb, self.places = network, emb, places

    def conv(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        return out

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = block(x, self.emb, self.places)
        return out

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)

    def end(self, x: Tensor) -> Tensor:
        out: Tensor = self.network.conv_out(F.silu(self.network.norm_out(x)))
        return out


class _Own(_Torch):
    """The steps of a forward pass by fused.py's kernels, for a network of residual blocks."""

    def __init__(self, network: UNet, emb: Tensor, places: Tensor | None) -> None:
        super().__init__(network, emb, places)
        blocks = [m for m in network.modules() if isinstance(m, ResidualBlock)]
        self._shifts = dict(zip(blocks, shifts(blocks, emb), strict=True))

    def conv(self, layer: nn.Module, x: Tensor) -> Tensor:
        return fused.conv(x, layer) if type(layer) is nn.Conv2d else super().conv(layer, x)

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(block, ResidualBlock)
        return block.by_own_kernels(x, self._shifts[block], self.places)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return fused.concat(a, b)

    def end(self, x: Tensor) -> Tensor:
        x, _ = fused.norm_act(x, self.network.norm_out, silu=True)
        return fused.conv_to_few(x, self.network.conv_out)


class Level(nn.Module):
    """The blocks of one resolution, what follows each (attention or nothing), and the change to the next resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.resample: nn.Module | None = None

    @property
    def by_sample(self) -> tuple[str, ...]:
        """As in blocks.py: the bias of a convolution that fused.conv computes."""
        return ("resample.bias",) if type(self.resample) is nn.Conv2d else ()

    def add(self, block: nn.Module, attention: nn.Module) -> None:
        """Append a block, and what follows it."""
        self.blocks.append(block)
        self.attentions.append(attention)


def _encoder(s: Structure) -> tuple[nn.ModuleList, list[int]]:
    """The levels, largest resolution first, and the widths of all skips to the decoder, conv_in's first."""
    levels, width, skips = nn.ModuleList(), s.base_channels, [s.base_channels]
    for size, level_width in zip(s.sizes, s.widths, strict=True):
        level = Level()
        for _ in range(s.blocks_per_level):
            level.add(_block(s, width, level_width), _attention_at(s, "encoder", size, level_width))
            width = level_width
            skips.append(width)
        if size != s.sizes[-1]:
            level.resample = downsample(s.downsample, width)
            skips.append(width)
        levels.append(level)
    return levels, skips


def _bottleneck(s: Structure) -> Level:
    level, width = Level(), s.widths[-1]
    level.add(_block(s, width, width), _attention(s, width) if s.middle_attention else nn.Identity())
    level.add(_block(s, width, width), nn.Identity())
    return level


def _decoder(s: Structure, skips: list[int]) -> nn.ModuleList:
    """The levels, smallest resolution first; each block also takes one skip, the last one first."""
    levels, width = nn.ModuleList(), s.widths[-1]
    for size, level_width in reversed(list(zip(s.sizes, s.widths, strict=True))):
        level = Level()
        for _ in range(s.blocks_per_level + 1):
            block = _block(s, width + skips.pop(), level_width)
            level.add(block, _attention_at(s, "decoder", size, level_width))
            width = level_width
        if size != s.sizes[0]:
            level.resample = upsample(s.upsample, width)
        levels.append(level)
    return levels


def _block(s: Structure, width_in: int, width_out: int) -> nn.Module:
    kind = ResidualBlock if s.block == "residual" else PlainBlock
    return kind(width_in, width_out, s.embedding, s.dropout, s.norm_groups)


def _attention(s: Structure, width: int) -> nn.Module:
    return Attention(width, s.attention_heads, s.norm_groups)


def _attention_at(s: Structure, side: str, size: int, width: int) -> nn.Module:
    wanted = size in s.attention_resolutions and s.attention_in in ("both", side)
    return _attention(s, width) if wanted else nn.Identity()


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of t at frequencies from 1 down to 1/10000 in geometric steps, as in Ho et al.'s code.

    t: int64 (B,); width: even. Returns float32 (B, width): bf16 could not tell t = 998 from t = 999.
    """
    half = width // 2
    place = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(place * (-math.log(10000.0) / max(half - 1, 1)))
    angle = t.to(torch.float32)[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
