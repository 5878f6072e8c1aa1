"""From images to features: the networks (or none) behind the Fréchet distance.

Owns the extractors and what identifies their features. Must not know scores, sample sets, runs or jobs.

`inception` is pytorch-fid's network (Seitzer 2020; the weights of Heusel et al. 2017, arXiv:1706.08500) with its exact
preprocessing, in float32. `dinov2` is the transformer of dinov2.py, `file:PATH` a network of the user's, named by its
sha256. `random-inception` is the same network with seeded random weights, `pixels` no network at all: both check the
wiring offline, and their numbers are no FID.
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import pickle
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.config.sample import EXTRACTORS, FILE
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.network.weights import why_unreadable
from ddpm.run import files
from ddpm.run.log import say
from ddpm.scoring import dinov2, network_file
from ddpm.scoring.record import file_extractor_name

VERSION = 1
"""Version of the features: raised if a change here changes their values, so that old ones are not reused."""
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256_PREFIX = "6726825d"
"""Of the published weights: by torch.hub's convention a file's name ends in it."""
_DOWNLOAD_TIMEOUT_S = 30


@dataclass(frozen=True)
class Extractor:
    """A function from images uint8 (B, H, W, 3), array or tensor, to features float32 (B, dim) on the CPU."""

    name: str
    dim: int
    weights_sha256: str | None
    """sha256 of the weights file, or of the bytes of random weights; None without weights."""
    resize: str
    """How images are resized to the network's input size."""
    forward: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    """x: (B, 3, H, W) float32 in [0, 1] on `device` -> (B, dim)."""
    device: torch.device = field(default=torch.device("cpu"), compare=False)
    classifier: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Weights (classes, dim) of the network's last layer, without bias, for the Inception Score; None without one."""

    @property
    def published(self) -> bool:
        """Whether the weights are the ones that FID is defined with; only then may a score be called `fid`."""
        return self.name == "inception" and (self.weights_sha256 or "").startswith(PUBLISHED_SHA256_PREFIX)

    @property
    def record(self) -> dict[str, Any]:
        """`extractor` of a score record."""
        return {"name": self.name, "weights_sha256": self.weights_sha256, "resize": self.resize}

    @property
    def digest(self) -> str:
        """A digest that identifies the features, up to the hardware's rounding."""
        return files.sha256_json([self.name, self.weights_sha256, self.resize, VERSION])

    def __call__(self, images: np.ndarray | Tensor) -> np.ndarray:
        x = torch.tensor(images) if isinstance(images, np.ndarray) else images  # a copy: memory maps are read-only
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"images are {x.dtype} {tuple(x.shape)}; expected uint8 (B, H, W, 3)")
        x = x.to(self.device).permute(0, 3, 1, 2).float() / 255
        # TF32, a GPU's default for convolutions, keeps 10 bits of mantissa: never for a reported score
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.forward(x).float().cpu().numpy()


def build_extractor(
    name: str,
    device: torch.device | str,
    *,
    image_size: int = 32,
    shared: Path | None = None,
    warn: Callable[[str], None] = say,
) -> Extractor:
    """The extractor of that name (ddpm/config/sample.py lists them) on `device`. Downloads nothing.

    shared: the folder where published weights are looked for first; else, and where they are not there, torch's hub.
    image_size: of the images, for a file's network, which may know no other. warn: is told where the weights are not
    the published ones. Raises RequestError for another name, EnvironmentLacks where the weights file is missing or
    unreadable.
    """
    device = torch.device(device)
    if name.startswith(FILE):
        own, sha256, dim = network_file.load(Path(name.removeprefix(FILE)).expanduser(), device, image_size)
        return Extractor(file_extractor_name(sha256), dim, sha256, "its own", own, device)
    if name == "dinov2":
        where = _found(hub_path(dinov2.WEIGHTS_FILE), shared)
        state, sha256 = _load_weights(where, dinov2.WEIGHTS_URL)
        transformer = _built(dinov2.build, state, where, dinov2.WEIGHTS_URL).to(device)
        return Extractor(name, state["cls_token"].shape[-1], sha256, dinov2.RESIZE, transformer, device)
    if name == "pixels":
        return Extractor(name, 3 * 16 * 16, None, "box to 16x16", _pixels, device)
    if name == "inception":
        where = _found(hub_path(WEIGHTS_FILE), shared)
        state, sha256 = _load_weights(where, WEIGHTS_URL)
        if not sha256.startswith(PUBLISHED_SHA256_PREFIX):
            warn(f"weights={where} sha256={sha256} not the published ones: scores are frechet_distance, not fid")
    elif name == "random-inception":
        state, sha256 = random_weights()
    else:
        raise RequestError(f"evaluate.extractor = {name!r}: use one of {', '.join(EXTRACTORS)}, or {FILE}PATH")
    network = _inception(state) if name != "inception" else _built(_inception, state, where, WEIGHTS_URL)
    network = network.to(memory_format=torch.channels_last).to(device)

    def forward(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return network((2 * x - 1).contiguous(memory_format=torch.channels_last))

    classifier = state["fc.weight"].numpy() if name == "inception" else None
    resize = "bilinear to 299x299, align_corners=False, no antialiasing"
    return Extractor(name, 2048, sha256, resize, forward, device, classifier)


def _pixels(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 768): means over 16x16 boxes; smaller images repeat pixels, so that d never changes."""
    return F.adaptive_avg_pool2d(x, 16).flatten(1)


# ---------------------------------------------------------------- the network and its weights


def _architecture() -> nn.Module:
    """torchvision's Inception v3 with the blocks in which FID's differs, as pytorch-fid assembles it; on `meta`.

    pytorch-fid's own builder downloads its weights and unpickles them without restriction, hence these lines.
    """
    from pytorch_fid import inception as fid
    from torchvision.models import inception_v3

    with torch.device("meta"):  # no memory, and the global generator is left alone
        network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        for name, (channels, pool_features) in {"b": (192, 32), "c": (256, 64), "d": (288, 64)}.items():
            setattr(network, f"Mixed_5{name}", fid.FIDInceptionA(channels, pool_features))
        for name, channels_7x7 in {"b": 128, "c": 160, "d": 160, "e": 192}.items():
            setattr(network, f"Mixed_6{name}", fid.FIDInceptionC(768, channels_7x7))
        network.Mixed_7b = fid.FIDInceptionE_1(1280)
        network.Mixed_7c = fid.FIDInceptionE_2(2048)
    return network


def _inception(state: Mapping[str, Any]) -> nn.Module:
    """x (B, 3, 299, 299) in [-1, 1] -> pool3 features (B, 2048), with every batch-norm folded into its convolution.

    Folding and channels_last together are 1.5 to 1.9 times as fast on a CPU and change the features by 3e-7 relative,
    less than float32 itself is off (4e-7). Raises RequestError where the weights are another network's.
    """
    from torchvision.models.inception import BasicConv2d

    network = _architecture()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError:  # which names hundreds of them
        raise RequestError("its tensors are not those of FID's Inception, which is not torchvision's") from None
    network.float().eval().requires_grad_(False)
    network.fc = nn.Identity()
    for module in list(network.modules()):
        if isinstance(module, BasicConv2d):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return network


def random_weights(seed: int = 0) -> tuple[dict[str, Tensor], str]:
    """Seeded weights and the sha256 of their bytes. He's variance (arXiv:1502.01852) keeps features apart at any depth.

    Uniform, not normal: a shift and one rounding of the generator's bits, the same on every processor.
    """
    generator = torch.Generator().manual_seed(seed)
    state, digest = {}, hashlib.sha256()
    for name, like in _architecture().state_dict().items():
        if like.ndim > 1:
            bound = math.sqrt(6 / math.prod(like.shape[1:]))
            state[name] = (torch.rand(like.shape, generator=generator) - 0.5) * (2 * bound)
        else:
            one = name.endswith(("bn.weight", "running_var"))
            state[name] = torch.full(like.shape, float(one)).to(like.dtype)
        digest.update(state[name].numpy().tobytes())
    return state, digest.hexdigest()


def beside(cache: Path) -> Path:
    """The folder of weights that belongs to a folder of packed data: whoever sees one sees the other, unlike a home."""
    return cache.parent / "weights"


def hub_path(file: str) -> Path:
    """Where torch's hub, and with it pytorch-fid, keeps a file of weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def ensure_inception_weights(shared: Path | None = None) -> Path:
    """The weights file, downloaded if it is missing: for the login node, jobs may have no network.

    shared: the folder where it is to lie, instead of torch's hub. Raises EnvironmentLacks with the URL, the place and
    the alternatives.
    """
    path = _shared(hub_path(WEIGHTS_FILE), shared)
    if path.exists():
        return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)  # torch.hub sets none, and a firewall may just drop the packets
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(WEIGHTS_URL, str(path), hash_prefix=PUBLISHED_SHA256_PREFIX, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as e:  # RuntimeError: the hash differs
        raise EnvironmentLacks(_lacking(path, WEIGHTS_URL, f"could not be downloaded ({e})")) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _found(hub: Path, shared: Path | None) -> Path:
    """Where to read a file: in the shared folder if there is one, unless only the hub's folder has it."""
    path = shared / hub.name if shared else hub
    return hub if hub.exists() and not path.exists() else path


def _shared(hub: Path, shared: Path | None) -> Path:
    """Where a file is, or is to come: in the shared folder, where there is one, copied from the hub if it lies there.

    In the hub all the same where the folder cannot be written, as another user's.
    """
    if shared is None or (path := shared / hub.name).exists():
        return _found(hub, shared)
    try:
        shared.mkdir(parents=True, exist_ok=True)
        if not hub.exists():
            return path if os.access(shared, os.W_OK) else hub
        with files.publishing(path) as f, hub.open("rb") as source:
            shutil.copyfileobj(source, f, 1 << 20)
    except FileExistsError:  # another did so meanwhile
        pass
    except OSError as e:
        say(f"{shared} cannot be written ({e.strerror}): nodes need to see {hub}")
        return hub
    return path


def ensure_weights(name: str, shared: Path | None = None) -> None:
    """What an extractor needs is on this machine, downloaded if need be: for the login node.

    shared: the folder where published weights are to lie. Raises EnvironmentLacks, or RequestError for a file that
    there is not.
    """
    if name == "inception":
        ensure_inception_weights(shared)
    elif name == "dinov2" and not (path := _shared(hub_path(dinov2.WEIGHTS_FILE), shared)).exists():
        raise EnvironmentLacks(_lacking(path, dinov2.WEIGHTS_URL, f"are not at {path}"))
    elif name.startswith(FILE) and not Path(name.removeprefix(FILE)).expanduser().is_file():
        raise RequestError(f"evaluate.extractor = {name}: no such file")


def _lacking(path: Path, url: str, problem: str) -> str:
    which = "Inception" if url == WEIGHTS_URL else "DINOv2"
    return (
        f"the {which} weights {problem}; fetch {url} on a machine with a network and put it at {path}. To "
        f"check the wiring without them: evaluate.extractor=random-inception or evaluate.extractor=pixels (no FID)"
    )


def _load_weights(path: Path, url: str) -> tuple[dict[str, Tensor], str]:
    try:
        sha256 = files.sha256_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or any(not isinstance(v, Tensor) for v in state.values()):
            raise EnvironmentLacks(_lacking(path, url, f"at {path} cannot be used: that file holds no tensors by name"))
    except FileNotFoundError:
        raise EnvironmentLacks(_lacking(path, url, f"are not at {path}")) from None
    except OSError as e:
        raise EnvironmentLacks(_lacking(path, url, f"at {path} cannot be read ({e.strerror})")) from None
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        problem = f"at {path} cannot be read: that file {why_unreadable(path, e)}"
        raise EnvironmentLacks(_lacking(path, url, problem)) from None
    return state, sha256


def _built(
    build: Callable[[Mapping[str, Tensor]], nn.Module], state: Mapping[str, Tensor], path: Path, url: str
) -> nn.Module:
    """The network with the weights from `path`. Raises EnvironmentLacks if they are another network's."""
    try:
        return build(state)
    except RequestError as e:
        raise EnvironmentLacks(_lacking(path, url, f"at {path} are of another network: {e}")) from None
