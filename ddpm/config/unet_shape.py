"""Which U-Nets can be built: the numbers that define one, and the conditions between them.

Owns: these checks, for the config (on a login node, so without torch) and for the network (network/unet.py). Must not
know: layers, weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CHOICES = {
    "block": ("residual", "plain"),
    "attention_in": ("both", "encoder", "decoder"),
    "downsample": ("conv", "pool", "conv_asymmetric"),
    "upsample": ("conv", "transpose"),
}

MAX_CHANNELS = 1 << 20
"""Most channels of a level: with more, its convolutions alone would take tens of terabytes."""


@dataclass(frozen=True)
class Structure:
    """The fields of the config's `model` section (ddpm/config/model.py explains them), and three more.

    ValueError for a structure that cannot be built: "FIELD = VALUE: what is allowed".
    """

    image_size: int
    """Height and width in pixels."""
    in_channels: int = 3
    base_channels: int = 128
    channel_mults: Sequence[int] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    block: str = "residual"
    attention_resolutions: Sequence[int] = (16,)
    attention_heads: int = 1
    attention_in: str = "both"
    middle_attention: bool = True
    downsample: str = "conv"
    upsample: str = "conv"
    norm_groups: int | None = None
    time_embed_channels: int | None = None
    dropout: float = 0.1
    num_classes: int = 0
    null_label: bool = False
    """Label num_classes stands for "no label" (classifier-free guidance)."""

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.base_channels * mult for mult in self.channel_mults]

    @property
    def sizes(self) -> list[int]:
        """Feature-map size of each level."""
        return [self.image_size >> level for level in range(len(self.channel_mults))]

    @property
    def embedding(self) -> int:
        """Width of the embedding of t and class that each block receives."""
        return self.time_embed_channels or 4 * self.base_channels

    @property
    def least_activation_bytes(self) -> int:
        """Lower bound of what training keeps for one image: the input of every block's second convolution in 16 bits,
        without which the gradient of its weights cannot be computed."""
        blocks = 2 * self.blocks_per_level + 1  # of the encoder and the decoder
        return sum(2 * blocks * width * size**2 for width, size in zip(self.widths, self.sizes, strict=True))

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the network, as network/unet.py builds it."""
        w0, emb, plain = self.base_channels, self.embedding, self.block == "plain"

        def conv(width_in: int, width_out: int, size: int = 3) -> int:
            return (width_in * size**2 + 1) * width_out

        def block(width_in: int, width_out: int) -> int:  # its norms are of two numbers a channel
            skip = conv(width_in, width_out, 1) if width_in != width_out and not plain else 0
            norms = 2 * (width_out + (width_out if plain else width_in))
            return conv(width_in, width_out) + conv(width_out, width_out) + (emb + 1) * width_out + norms + skip

        def attention(width: int) -> int:
            return conv(width, 3 * width, 1) + conv(width, width, 1) + 2 * width

        def side(name: str, size: int, width: int) -> int:
            return attention(width) if size in self.attention_resolutions and self.attention_in in ("both", name) else 0

        down = {"conv": 3, "conv_asymmetric": 3, "pool": 0}[self.downsample]
        up = {"conv": 3, "transpose": 2}[self.upsample]
        total, width, skips = conv(self.in_channels, w0), w0, [w0]
        levels = list(zip(self.sizes, self.widths, strict=True))
        for size, wide in levels:
            for _ in range(self.blocks_per_level):
                total, width = total + block(width, wide) + side("encoder", size, wide), wide
                skips.append(width)
            if size != self.sizes[-1]:
                total += conv(width, width, down) if down else 0
                skips.append(width)
        total += 2 * block(width, width) + (attention(width) if self.middle_attention else 0)
        for size, wide in reversed(levels):
            for _ in range(self.blocks_per_level + 1):
                total, width = total + block(width + skips.pop(), wide) + side("decoder", size, wide), wide
            total += conv(width, width, up) if size != self.sizes[0] else 0
        classes = (self.num_classes + self.null_label) * emb if self.num_classes else 0
        time = (w0 + 1) * 4 * w0 + (4 * w0 + 1) * emb
        return total + 2 * width + conv(width, self.in_channels) + classes + time

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "base_channels", "blocks_per_level", "attention_heads"):
            self._need(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("norm_groups", "time_embed_channels"):
            self._need(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1")
        for name, allowed in CHOICES.items():
            self._need(getattr(self, name) in allowed, name, f"allowed are {', '.join(allowed)}")
        self._need(0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)")
        self._need(self.num_classes >= 0, "num_classes", "must be 0 (unconditional) or more")
        self._need(not self.null_label or self.num_classes > 0, "null_label", "needs num_classes > 0")
        self._need(self.base_channels % 2 == 0, "base_channels", "must be even (half sines, half cosines of t)")
        mults, levels = self.channel_mults, len(self.channel_mults)
        self._need(levels > 0 and min(mults) >= 1, "channel_mults", "needs one factor >= 1 per level")
        most = MAX_CHANNELS // self.base_channels
        self._need(max(mults) <= most, "channel_mults", f"at most {most} here, for {MAX_CHANNELS} channels")
        divisor = 2 ** (levels - 1)
        fits = self.image_size % divisor == 0
        self._need(fits, "image_size", f"{levels} levels halve it {levels - 1} times, so {divisor} must divide it")
        for size in self.attention_resolutions:
            known = f"the network never has {size}x{size}; it has {self.sizes}"
            self._need(size in self.sizes, "attention_resolutions", known)
        twice = len(set(self.attention_resolutions)) < len(self.attention_resolutions)
        self._need(not twice, "attention_resolutions", "name each size once")
        attended = [w for size, w in zip(self.sizes, self.widths, strict=True) if size in self.attention_resolutions]
        self._need_divisor("attention_heads", attended + (self.widths[-1:] if self.middle_attention else []))
        # a residual block normalises what it is given: conv_in's width, or sums of these widths
        self._need_divisor("norm_groups", self.widths + ([self.base_channels] if self.block == "residual" else []))

    def _need(self, holds: bool, name: str, allowed: str) -> None:
        if not holds:
            value: Any = getattr(self, name)
            raise ValueError(f"{name} = {list(value) if isinstance(value, tuple) else value}: {allowed}")

    def _need_divisor(self, name: str, widths: Iterable[int]) -> None:
        """Check that the field, unless it is None, divides all of `widths`."""
        value, widths = getattr(self, name), list(widths)
        for width in widths if value is not None else ():
            if width % value:
                # a norm with a group for each channel would take away what t and class have added to them
                most = min(widths) - 1 if name == "norm_groups" else min(widths)
                common = [d for d in range(1, most + 1) if not any(w % d for w in widths)]
                self._need(False, name, f"does not divide the {width} channels of a level; use one of {common}")
