import dataclasses
import http.client
import importlib.util
import io
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.errors import EnvironmentLacks, RequestError, Stopped
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.paths import SampleSet
from ddpm.sampling.request import Request
from ddpm.sampling.shards import verify_shard, withdraw_shard
from ddpm.scoring import extractors
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.features import Progress, extract, kept_array, shard_features
from tests import sampling
from tests.conftest import requires


def random_images(n: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """torch's hub in an empty directory; yields where the weights belong."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints" / extractors.WEIGHTS_FILE
    torch.hub.set_dir(before)


# ---------------------------------------------------------------- extractors


def test_pixels_are_box_means_in_0_1() -> None:
    extractor = extractors.build_extractor("pixels", "cpu")
    images = random_images(3, 32)
    boxes = images.reshape(3, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    got = extractor(images)
    assert got.dtype == np.float32 and got.shape == (3, extractor.dim) == (3, 768)
    np.testing.assert_allclose(got.reshape(3, 3, 16, 16), boxes.transpose(0, 3, 1, 2), atol=1e-6)
    small = random_images(2, 8)  # repeated, not interpolated
    np.testing.assert_allclose(
        extractor(small).reshape(2, 3, 16, 16)[:, :, ::2, 1::2], small.transpose(0, 3, 1, 2) / 255, atol=1e-6
    )


def test_arrays_tensors_and_read_only_maps_give_the_same_features() -> None:
    extractor, images = extractors.build_extractor("pixels", "cpu"), random_images(2, 16)
    expected = extractor(images)
    images.flags.writeable = False
    np.testing.assert_array_equal(extractor(images), expected)
    np.testing.assert_array_equal(extractor(torch.from_numpy(images.copy())), expected)


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 3, 8, 8), np.uint8)])
def test_anything_but_uint8_rgb_is_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        extractors.build_extractor("pixels", "cpu")(images)


def test_an_unknown_extractor_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'vgg': use one of inception, dinov2, .*, or file:PATH"):
        extractors.build_extractor("vgg", "cpu")


def test_the_digest_is_of_name_weights_and_resize() -> None:
    base = Extractor("inception", 2048, "67", "r", forward=lambda x: x)
    same = dataclasses.replace(base, forward=lambda x: 2 * x, device=torch.device("meta"))
    others = [dataclasses.replace(base, **c) for c in ({"name": "x"}, {"weights_sha256": "68"}, {"resize": "s"})]
    assert same.digest == base.digest
    assert len({base.digest, *(o.digest for o in others)}) == 4


@pytest.mark.parametrize(
    ("name", "sha256", "published"),
    [
        ("inception", "6726825d" + "0" * 56, True),
        ("inception", "6726825e" + "0" * 56, False),
        ("random-inception", "6726825d" + "0" * 56, False),
        ("pixels", None, False),
    ],
)
def test_only_the_published_weights_are_published(name: str, sha256: str | None, published: bool) -> None:
    assert Extractor(name, 1, sha256, "", forward=lambda x: x).published is published


def test_tf32_is_off_while_features_are_computed() -> None:
    seen = []
    extractor = Extractor("x", 1, None, "", forward=lambda x: seen.append(torch.backends.cudnn.allow_tf32) or x)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        extractor(random_images(1, 4))
        assert seen == [False] and torch.backends.cudnn.allow_tf32


def test_random_inception_is_the_same_everywhere_and_tells_images_apart() -> None:
    before = torch.get_rng_state()
    extractor = extractors.build_extractor("random-inception", "cpu")
    # uniform weights are exact arithmetic on the generator's bits, so this digest holds on every machine
    assert extractor.weights_sha256 == "609dea4275497059622e7cbe385903f82747b823286cb0968befd0fb2e98af8d"
    assert torch.equal(torch.get_rng_state(), before)
    images = random_images(3, 32)
    images[0] //= 4
    images[1] = np.repeat(np.repeat(images[1, ::8, ::8], 8, 0), 8, 1)
    got = extractor(images)
    assert got.shape == (3, 2048) and np.isfinite(got).all()
    relative = [np.linalg.norm(got[i] - got[j]) / np.linalg.norm(got[i]) for i, j in ((0, 1), (1, 2), (0, 2))]
    assert min(relative) > 0.02
    assert (got.std(0) > 0).mean() > 0.5  # most features live


# ---------------------------------------------------------------- the weights file


def test_a_missing_weights_file_is_explained(hub: Path) -> None:
    with pytest.raises(EnvironmentLacks) as e:
        extractors.build_extractor("inception", "cpu")
    for part in (extractors.WEIGHTS_URL, str(hub), "evaluate.extractor=random-inception", "evaluate.extractor=pixels"):
        assert part in str(e.value)


def test_a_failed_download_is_explained_and_leaves_nothing(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "WEIGHTS_URL", (hub.parent / "nowhere.pth").as_uri())
    timeout = socket.getdefaulttimeout()
    with pytest.raises(EnvironmentLacks, match=r"could not be downloaded .*put it at"):
        extractors.ensure_inception_weights()
    assert list(hub.parent.iterdir()) == [] and socket.getdefaulttimeout() == timeout


def test_a_mirror_or_a_proxy_that_speaks_no_http_is_explained(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise http.client.BadStatusLine("SSH-2.0")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(EnvironmentLacks, match=r"could not be downloaded \(SSH-2.0\)"):
        extractors.ensure_inception_weights()


def test_a_download_with_another_hash_is_no_weights_file(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.pth").write_bytes(b"a login page")
    monkeypatch.setattr(extractors, "WEIGHTS_URL", (tmp_path / "other.pth").as_uri())
    with pytest.raises(EnvironmentLacks, match="invalid hash"):
        extractors.ensure_inception_weights()
    assert not hub.exists()
    monkeypatch.setattr(extractors, "PUBLISHED_SHA256_PREFIX", files.sha256_file(tmp_path / "other.pth")[:8])
    assert extractors.ensure_inception_weights() == hub and hub.read_bytes() == b"a login page"
    (tmp_path / "other.pth").unlink()
    assert extractors.ensure_inception_weights() == hub  # nothing is fetched twice


def test_weights_come_to_the_shared_folder_from_the_hub_or_the_network_and_are_read_there(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node's home is often no node's."""
    shared = extractors.beside(tmp_path / "cache" / "data")
    (tmp_path / "other.pth").write_bytes(b"a login page")
    monkeypatch.setattr(extractors, "WEIGHTS_URL", (tmp_path / "other.pth").as_uri())
    monkeypatch.setattr(extractors, "PUBLISHED_SHA256_PREFIX", files.sha256_file(tmp_path / "other.pth")[:8])
    there = tmp_path / "cache" / "weights" / hub.name
    assert extractors.ensure_inception_weights(shared) == there and there.read_bytes() == b"a login page"
    assert not hub.exists()  # nor is a home's room spent
    there.unlink()
    hub.parent.mkdir(parents=True, exist_ok=True)
    hub.write_bytes(b"of the hub")
    extractors.ensure_weights("inception", shared)
    assert there.read_bytes() == b"of the hub" and [p.name for p in shared.iterdir()] == [hub.name]
    hub.unlink()
    with pytest.raises(EnvironmentLacks, match=f"at {there} cannot be read"):
        extractors.build_extractor("inception", "cpu", shared=shared)
    there.rename(hub)
    with pytest.raises(EnvironmentLacks, match=f"at {hub} cannot be read"):  # of a run from before
        extractors.build_extractor("inception", "cpu", shared=shared)
    monkeypatch.setattr(os, "access", lambda *_: False)
    hub.unlink()
    assert extractors.ensure_inception_weights(shared) == hub  # another user's folder


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("content", "told"), {
    "truncated": (lambda: saved({"a": torch.zeros(1000)})[:2000], "cannot be read: that file is damaged, or not all"),
    "empty": (lambda: b"", "cannot be read: that file is empty"),
    "a login page": (lambda: b"<html>Sign in</html>", "cannot be read: that file is no file of torch's"),
    "malicious": (lambda: saved(Malicious()), "cannot be read: that file holds more than weights"),
    "no tensors": (lambda: saved([1, 2]), "cannot be used: that file holds no tensors by name"),
    "another network": (lambda: saved({"fc.weight": torch.zeros(2)}), "are of another network: .* not those of FID's"),
}.values())  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_weights_file_that_is_none_is_named_in_plain_words_with_the_next_step_and_never_executed(
    hub: Path, content: Callable[[], bytes], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.parent.mkdir(parents=True)
    hub.write_bytes(content())
    with pytest.raises(EnvironmentLacks, match=f"at {hub} {told}.*; fetch {extractors.WEIGHTS_URL}") as e:
        extractors.build_extractor("inception", "cpu")
    assert not (tmp_path / "executed").exists()
    assert not {"weights_only", "miniz", "PytorchStreamReader"} & set(re.findall(r"\w+", str(e.value)))


# ---------------------------------------------------------------- extraction


def counting(weights_sha256: str | None = None) -> tuple[Extractor, list[int]]:
    calls: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.mean((2, 3))

    return Extractor("tiny", 3, weights_sha256, "none", forward), calls


def test_extraction_goes_batch_by_batch_and_stops_between() -> None:
    extractor, calls = counting()
    images = random_images(10, 4)
    got = extract(extractor, images, batch=4)
    assert calls == [4, 4, 2]
    np.testing.assert_allclose(got, images.mean((1, 2)) / 255, atol=1e-6)
    polls = iter([None, "USR2"])
    with pytest.raises(Stopped, match="USR2"):
        extract(extractor, images, batch=4, stop_requested=lambda: next(polls))
    assert calls == [4, 4, 2, 4]


@pytest.fixture
def made(tmp_path: Path) -> tuple[SampleSet, Request]:
    """A set of two shards of seven samples each; only the second is published."""
    request = sampling.make_request(sampler="ddim", steps=1, num_samples=14, shards=2)
    sample_set = sampling.make_set(tmp_path / "run", request)
    make_shard(sample_set, request, 1)
    return sample_set, request


def make_shard(sample_set: SampleSet, request: Request, index: int, scale: float = 0.5) -> None:
    sampling.make_shard(sample_set, request, index, lambda x_t, t, labels: scale * x_t)


def test_features_of_a_shard_are_kept(made: tuple[SampleSet, Request]) -> None:
    sample_set, request = made
    extractor, calls = counting()
    first = shard_features(sample_set, request, 1, extractor)
    again = shard_features(sample_set, request, 1, extractor)
    assert calls == [7] and again.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(np.load(sample_set.path / "features-tiny-00001-of-00002.npy"), first)
    manifest = files.read_signed(sample_set.path / "features-tiny-00001-of-00002.json")
    assert set(manifest) == {
        "shard",
        "num",
        "sha256",
        "request_digest",
        "extractor_digest",
        "shard_sha256",
        "self_sha256",
    }
    with pytest.raises(FileNotFoundError):
        shard_features(sample_set, request, 0, extractor)


@pytest.mark.parametrize("what", ["npy", "manifest", "extractor", "shard"])
def test_features_are_computed_again_if_anything_under_them_changed(made: tuple[SampleSet, Request], what: str) -> None:
    sample_set, request = made
    extractor, calls = counting()
    shard_features(sample_set, request, 1, extractor)
    path = sample_set.features("tiny", 1, 2)
    if what == "npy":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    elif what == "manifest":
        path.with_suffix(".json").write_text("{}")
    elif what == "extractor":
        extractor, calls = counting("other weights")
        calls.append(7)
    else:
        withdraw_shard(sample_set, request, 1)
        make_shard(sample_set, request, 1, scale=0.1)
        for part in sample_set.path.glob("part/*"):
            raise AssertionError(part)
    got = shard_features(sample_set, request, 1, extractor)
    assert calls == [7, 7]
    np.testing.assert_allclose(got, verify_shard(sample_set, request, 1).images.mean((1, 2)) / 255, atol=1e-6)
    np.testing.assert_array_equal(shard_features(sample_set, request, 1, extractor), got)
    assert calls == [7, 7]


def test_kept_features_do_not_hide_a_damaged_shard(made: tuple[SampleSet, Request]) -> None:
    sample_set, request = made
    extractor, _ = counting()
    shard_features(sample_set, request, 1, extractor)
    path = sample_set.shard(1, 2)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedFile, match=r"shard-00001-of-00002.npz: its sha256"):
        shard_features(sample_set, request, 1, extractor)


# ---------------------------------------------------------------- a network of one's own, and DINOv2


class Halves(torch.nn.Module):
    """Means of the upper and the lower half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, -1)).mean((3, 4)).flatten(1)


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_network_from_a_file_makes_features_and_is_named_by_its_sha256(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"halves{suffix}"
    if suffix == ".pt":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torch.jit.save(torch.jit.script(Halves()), path)
    else:
        batch = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(Halves(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch), path)
    extractor = extractors.build_extractor(f"file:{path}", "cpu", image_size=8)
    sha256 = files.sha256_file(path)
    assert (extractor.name, extractor.weights_sha256, extractor.dim) == (f"file-{sha256[:12]}", sha256, 6)
    images = random_images(5, 8)
    expected = images.reshape(5, 2, 4, 8, 3).mean((2, 3)).transpose(0, 2, 1).reshape(5, 6) / 255
    np.testing.assert_allclose(extractor(images), expected, atol=1e-6)
    assert not extractor.published and extractor.classifier is None


def test_a_file_that_is_no_network_or_makes_no_features_is_refused(tmp_path: Path) -> None:
    for name in ("a.pt", "a.pt2"):
        (tmp_path / name).write_bytes(b"no network")
        with pytest.raises(RequestError, match=f"file:.*{name} cannot be used: it is no file of torch's; save the "):
            extractors.build_extractor(f"file:{tmp_path / name}", "cpu")
    (tmp_path / "weights.pt").write_bytes(saved({"a": torch.zeros(2)}))
    with pytest.raises(RequestError, match="it holds something else, as weights alone; save the network itself"):
        extractors.build_extractor(f"file:{tmp_path / 'weights.pt'}", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "relu.pt")
    with pytest.raises(RequestError, match=r"it makes no features \(2, d\)"):
        extractors.build_extractor(f"file:{tmp_path / 'relu.pt'}", "cpu")
    with pytest.raises(RequestError, match="no such file"):
        extractors.ensure_weights(f"file:{tmp_path / 'none.pt'}")


def transformer(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """DINOv2 written down once more, without timm: a class token (B, d) of x (B, 3, H, W), normalised."""
    d = state["cls_token"].shape[-1]

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return y @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        centred = y - y.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return centred * scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    y = torch.cat([state["cls_token"].expand(len(x), 1, d), tokens], 1) + state["pos_embed"]
    for block in (f"blocks.{i}" for i in range(2)):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", y)).unflatten(-1, (3, heads, -1)).unbind(2)
        weights = torch.einsum("bnhc,bmhc->bhnm", q, k).div((d // heads) ** 0.5).softmax(-1)
        attended = linear(f"{block}.attn.proj", torch.einsum("bhnm,bmhc->bnhc", weights, v).flatten(2))
        y = y + attended * state[f"{block}.ls1.gamma"]
        h = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", y))
        h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
        y = y + linear(f"{block}.mlp.fc2", h) * state[f"{block}.ls2.gamma"]
    return norm("norm", y)[:, 0]


def random_dinov2(d: int, side: int) -> dict[str, torch.Tensor]:
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + side**2, d), "mask_token": (1, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 14, 14), "patch_embed.proj.bias": (d,)}
    for block in ("blocks.0", "blocks.1"):
        sizes = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, (out, into) in sizes.items():
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.{n}.{w}": (d,) for n in ("norm1", "norm2") for w in ("weight", "bias")}
        shapes |= {f"{block}.ls{i}.gamma": (d,) for i in (1, 2)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(shape, generator=generator) / d**0.5 for k, shape in shapes.items()}


def test_dinov2s_features_are_those_of_another_implementation_with_the_same_weights(hub: Path) -> None:
    requires(importlib.util.find_spec("timm"), "timm is not installed", "pip install 'ddpm-hpc[dinov2]'")
    state = random_dinov2(128, 37)
    path = hub.with_name("dinov2_vitl14_pretrain.pth")
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    extractor = extractors.build_extractor("dinov2", "cpu")
    assert (extractor.dim, extractor.weights_sha256) == (128, files.sha256_file(path))
    images = random_images(2, 32)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = torch.nn.functional.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 128).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    expected = transformer(state, (x - mean) / std, heads=2).numpy()
    assert np.abs(extractor(images) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_dinov2_without_its_weights_or_with_others_is_explained(hub: Path) -> None:
    with pytest.raises(
        EnvironmentLacks, match=r"the DINOv2 weights are not at .*; fetch https://dl.fbaipublicfiles.com"
    ):
        extractors.ensure_weights("dinov2")
    requires(importlib.util.find_spec("timm"), "timm is not installed", "pip install 'ddpm-hpc[dinov2]'")
    path = hub.with_name("dinov2_vitl14_pretrain.pth")
    path.parent.mkdir(parents=True)
    torch.save({"cls_token": torch.zeros(1, 1, 128)}, path)
    with pytest.raises(EnvironmentLacks, match=f"at {path} are of another network: .* not DINOv2's .*; fetch https://"):
        extractors.build_extractor("dinov2", "cpu")


def test_progress_reads_the_manifest_of_each_part_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {i: (tmp_path / f"part-{i}.npy", {"part": i}) for i in range(20)}
    read: list[str] = []
    really = files.read_signed
    monkeypatch.setattr(files, "read_signed", lambda path: read.append(path.name) or really(path))
    progress, done = Progress(parts), []
    for i, (path, expected) in parts.items():
        kept_array(path, expected, (1,), lambda: np.zeros(1), "")
        read.clear()
        done.append(len(progress.there()))
        assert read == [f"part-{i}.json"]
    assert done == [*range(1, 21)]
