"""The config's `model`: what `Structure` (unet_shape.py) checks once the image size is known."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ddpm.config.section import Ints, Section


class Model(Section):
    base_channels: int = Field(128, ge=8, le=2**16)
    """Width of the first level."""
    channel_mults: Ints = (1, 2, 2, 2)
    """Width of each level as a multiple of base_channels; each further level halves the resolution."""
    blocks_per_level: int = Field(2, ge=1, le=1000)
    """Of the encoder; a level of the decoder has one more, so that each takes one of the encoder's outputs."""
    block: Literal["residual", "plain"] = "residual"
    """`residual` (Wide ResNet, as in the paper), or `plain`: twice convolution, GroupNorm, SiLU with no way around."""
    attention_resolutions: Ints = (16,)
    """Feature-map sizes in pixels that get self-attention."""
    attention_heads: int = Field(1, ge=1, le=2**16)
    """Of every attention; must divide its channels."""
    attention_in: Literal["both", "encoder", "decoder"] = "both"
    """Where attention_resolutions apply."""
    middle_attention: bool = True
    """Self-attention between the bottleneck's two blocks."""
    downsample: Literal["conv", "pool", "conv_asymmetric"] = "conv"
    """A 3x3 convolution of stride 2 with zeros all around, the mean of 2x2, or that convolution with zeros below and
    right alone: TensorFlow's "same" padding, which Ho et al.'s code and published weights have."""
    upsample: Literal["conv", "transpose"] = "conv"
    """Nearest neighbour and a 3x3 convolution, or a transposed convolution (2x2, stride 2)."""
    norm_groups: int | None = Field(None, ge=1, le=2**16)
    """GroupNorm's groups; must divide the channels of every level, and be fewer: a group for each channel takes away
    what t and class have added to it. null: 32, or the most that divide both and are fewer than the channels."""
    time_embed_channels: int | None = Field(None, ge=1, le=2**20)
    """Width of the embedding of t and class that blocks are given; the MLP that makes it has 4 * base_channels inside.
    null: 4 * base_channels too."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Before the second convolution of every block."""
    num_classes: int = Field(0, ge=0, le=2**20)
    """0: unconditional. Otherwise each image's class index conditions every block."""
