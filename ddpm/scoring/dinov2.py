"""DINOv2's features, by which FD-DINOv2 is defined: the class token of a vision transformer.

Oquab et al. 2023, "DINOv2: learning robust visual features without supervision" (arXiv:2304.07193); Stein et al. 2023,
"Exposing flaws of generative model evaluation metrics …" (arXiv:2306.04675), who measure with ViT-L/14 at 224x224. The
network is timm's, the weights are the authors' file. Must not know scores, or where features go.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.errors import EnvironmentLacks, RequestError

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
WEIGHTS_FILE = "dinov2_vitl14_pretrain.pth"
RESIZE = "bicubic to 224x224, antialiased"
_SIZE, _PATCH, _HEAD = 224, 14, 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's."""


def build(state: Mapping[str, Tensor]) -> nn.Module:
    """The transformer with these weights: x (B, 3, H, W) float32 in [0, 1] -> (B, d), d = 1024 for ViT-L.

    Raises EnvironmentLacks without timm, RequestError if the weights are not DINOv2's.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise EnvironmentLacks("evaluate.extractor=dinov2 needs timm: pip install 'ddpm-hpc[dinov2]'") from None
    try:
        width = state["cls_token"].shape[-1]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        network = VisionTransformer(
            img_size=_SIZE, patch_size=_PATCH, embed_dim=width, depth=depth, num_heads=width // _HEAD, init_values=1e-5,
            num_classes=0,
        )  # fmt: skip
        known = {**state, "pos_embed": _positions(state["pos_embed"])}
        known.pop("mask_token", None)  # of training alone
        network.load_state_dict(known)
    except (KeyError, ValueError, RuntimeError) as e:
        raise RequestError(f"the weights are not DINOv2's ({' '.join(str(e).split())[:200]})") from None
    return _Features(network).float().eval().requires_grad_(False)


class _Features(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(_SIZE, _SIZE), mode="bicubic", antialias=True)
        tokens: Tensor = self.network.forward_features((x - self.mean) / self.std)  # type: ignore[operator]
        return tokens[:, 0]


def _positions(embedding: Tensor) -> Tensor:
    """The positions (1, 1 + 37², d) of training at 518x518 as the authors' code has them at 224x224: with the offset of
    0.1 in its scale and no antialiasing. timm's own way differs in the third digit."""
    side, wanted = round((embedding.shape[1] - 1) ** 0.5), _SIZE // _PATCH
    of_class, of_patches = embedding[:, :1], embedding[:, 1:]
    if side != wanted:
        grid = of_patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = float(wanted + 0.1) / side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        of_patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([of_class, of_patches], dim=1)
