"""The config's `model`: the U-Net. `Structure` (unet_shape.py) checks it once the image size is known."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ddpm.config.section import Ints, Section


class Model(Section):
    base_channels: int = Field(128, ge=8, le=2**16)
    """Channels of the first level."""
    channel_mults: Ints = (1, 2, 2, 2)
    """Channels of each level as a multiple of base_channels; each level has half the resolution of the one before."""
    blocks_per_level: int = Field(2, ge=1, le=1000)
    """Blocks in each level of the encoder. A level of the decoder has one more, so that each of its blocks takes one of
    the encoder's outputs."""
    block: Literal["residual", "plain"] = "residual"
    """`residual` (Wide ResNet, as in the paper), or `plain`: twice convolution, GroupNorm, SiLU, without a skip."""
    attention_resolutions: Ints = (16,)
    """Feature-map sizes in pixels that get self-attention."""
    attention_heads: int = Field(1, ge=1, le=2**16)
    """Heads of every self-attention; must divide its channels."""
    attention_in: Literal["both", "encoder", "decoder"] = "both"
    """Which half of the U-Net has the self-attention of attention_resolutions."""
    middle_attention: bool = True
    """Self-attention between the bottleneck's two blocks."""
    downsample: Literal["conv", "pool", "conv_asymmetric"] = "conv"
    """`conv`: a 3x3 convolution of stride 2 with zeros all around; `pool`: the mean of 2x2; `conv_asymmetric`: the
    convolution with zeros below and right alone, TensorFlow's "same" padding, as in Ho et al.'s code and weights."""
    upsample: Literal["conv", "transpose"] = "conv"
    """`conv`: nearest neighbour, then a 3x3 convolution; `transpose`: a transposed convolution (2x2, stride 2)."""
    norm_groups: int | None = Field(None, ge=1, le=2**16)
    """Groups of every GroupNorm; must divide the channels of every level, and should be fewer: a group for each channel
    removes what t and class have added to it. null: the largest
    divisor of 32 that divides the channels and is smaller than them."""
    time_embed_channels: int | None = Field(None, ge=1, le=2**20)
    """Width of the embedding of t and class that each block receives; the hidden layer of its MLP has 4 *
    base_channels. null: 4 * base_channels."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability before the second convolution of every block."""
    num_classes: int = Field(0, ge=0, le=2**20)
    """Number of classes: the class of an image conditions every block. 0: unconditional."""
