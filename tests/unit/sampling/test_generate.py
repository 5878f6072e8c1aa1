import contextlib
import dataclasses
import errno
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddpm.config.diffusion import VARIANCES
from ddpm.diffusion import rng, schedule
from ddpm.errors import DoNotRetry, RequestError, Stopped
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.paths import SampleSet
from ddpm.sampling import denoiser
from ddpm.sampling.denoiser import Denoiser, Replays
from ddpm.sampling.generate import generate_shard
from ddpm.sampling.parts import Part, read_part, write_part
from ddpm.sampling.request import Request, shard_range
from ddpm.sampling.shards import codes, missing_shards, unpack_png, verify_shard
from tests.sampling import IN_EVERY_WAY, digests_in_every_way, make_request, make_set

STEPS = make_request().steps
SHAPE = (3, 6, 5)


class Net(nn.Module):
    """A small network that counts its calls, wants exactly `batch` rows, and is told where each row lies."""

    def __init__(self, batch: int, num_classes: int = 0, null_label: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
            self.classes = nn.Embedding(max(num_classes + null_label, 1), 3)
        self.batch, self.calls = batch, 0

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        assert x_t.shape == (self.batch, *SHAPE) and t.shape == (self.batch,)
        self.calls += 1
        eps = self.layers(x_t) + t[:, None, None, None] / 100
        # as a kernel whose rounding depends on the row would, but visibly
        eps = eps + 0.3 * torch.arange(self.batch)[:, None, None, None]
        return eps if labels is None else eps + self.classes(labels)[:, :, None, None]


def run_shard(
    sample_set: SampleSet,
    request: Request,
    index: int,
    net: Any = None,
    *,
    schedule_: schedule.Schedule | None = None,
    variance: str = "fixed_large",
    num_classes: int = 0,
    **kwargs: Any,
) -> dict[str, Any]:
    denoiser = Denoiser(
        eps=net or Net(request.batch),
        schedule=schedule_ or schedule.linear(100, 1e-4, 0.02),
        image_shape=SHAPE,
        variance=variance,
        num_classes=num_classes,
        device=torch.device("cpu"),
    )
    return generate_shard(sample_set, request, index, denoiser, **kwargs)


def all_shards(tmp_path: Path, request: Request, num_classes: int = 0) -> tuple[np.ndarray, np.ndarray]:
    sample_set = make_set(tmp_path / "run", request, f"s{request.shards}")
    guided = request.guidance is not None
    for index in range(request.shards):
        net = Net(request.batch * (2 if guided else 1), num_classes, null_label=guided)
        run_shard(sample_set, request, index, net, num_classes=num_classes)
    shards = [verify_shard(sample_set, request, i) for i in range(request.shards)]
    return np.concatenate([s.images for s in shards]), np.concatenate([s.labels for s in shards])


def stop_after(polls: int) -> Any:
    left = iter(range(polls))
    return lambda: None if next(left, None) is not None else "SIGTERM"


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


# ---------------------------------------------------------------- what sample i is


@pytest.mark.parametrize(
    ("changes", "num_classes"),
    [
        ({}, 0),
        ({"sampler": "ddim", "eta": 1.0}, 4),
        ({"sampler": "dpmpp_2m"}, 0),
        ({"guidance": 1.5, "class_plan": [20, 0, 30, 3]}, 4),
        ({"sampler": "dpmpp_2m", "guidance": 0.5}, 4),
    ],
)
def test_every_sharding_gives_the_same_bytes(tmp_path: Path, changes: dict[str, Any], num_classes: int) -> None:
    request = make_request(**changes)
    images, labels = all_shards(tmp_path, request, num_classes)
    assert images.shape == (53, 6, 5, 3) and images.dtype == np.uint8 and len(np.unique(images)) > 100
    for shards in (3, 1):
        again, again_labels = all_shards(tmp_path, dataclasses.replace(request, shards=shards), num_classes)
        assert again.tobytes() == images.tobytes()
        assert again_labels.tobytes() == labels.tobytes()
    expected = np.arange(53) % num_classes if num_classes else np.full(53, -1)
    if request.class_plan is not None:
        expected = np.array([0] * 20 + [2] * 30 + [3] * 3)
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("name", IN_EVERY_WAY)
def test_a_unet_gives_the_same_bytes_in_every_way_that_a_set_is_made(tmp_path: Path, name: str) -> None:
    """tests/gpu asks the same of a GPU, in bf16 too, which takes minutes on a CPU that has none."""
    request = dataclasses.replace(IN_EVERY_WAY[name], precision="fp32")
    digests, _ = digests_in_every_way(tmp_path / "run", request, torch.device("cpu"))
    assert len(digests) == 3 and len(set(digests.values())) == 1


def test_labels_reach_the_row_of_their_sample(tmp_path: Path) -> None:
    request = make_request(num_samples=5, shards=1, batch=4)
    seen = []

    def eps_model(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return x_t

    sample_set = make_set(tmp_path / "run", request)
    run_shard(sample_set, request, 0, eps_model, num_classes=3)
    assert seen == [[0, 1, 2, 0]] * STEPS + [[1, 0, 0, 0]] * STEPS  # sample 4, of class 1, and unused rows


def test_guided_rows_come_with_their_labels_and_then_without(tmp_path: Path) -> None:
    request = make_request(num_samples=5, shards=1, batch=4, guidance=1.5, class_plan=[1, 1, 3])
    seen = []

    def eps_model(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(x_t[:4], x_t[4:]) and t.shape == (8,)
        seen.append(labels.tolist())
        return x_t

    manifest = run_shard(make_set(tmp_path / "run", request), request, 0, eps_model, num_classes=3)
    assert seen == [[0, 1, 2, 2, 3, 3, 3, 3]] * STEPS + [[2, 0, 0, 0, 3, 3, 3, 3]] * STEPS
    assert manifest["nfe"] == 2 * STEPS


def test_guidance_of_weight_0_is_the_labelled_network_and_more_is_not(tmp_path: Path) -> None:
    def eps_model(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.9 * x_t + 0.1 * labels.view(-1, 1, 1, 1)

    images = {}
    for weight in (None, 0.0, 2.0):
        request = make_request(num_samples=14, shards=2, guidance=weight)
        sample_set = make_set(tmp_path / "run", request, f"w{weight}")
        run_shard(sample_set, request, 1, eps_model, num_classes=4)
        images[weight] = verify_shard(sample_set, request, 1).images.tobytes()
    assert images[0.0] == images[None] != images[2.0]


def test_without_clipping_images_are_clipped_only_at_the_end(tmp_path: Path) -> None:
    schedule_ = schedule.linear(100, 1e-4, 0.02)
    images = {}
    for clip in (True, False):
        request = make_request(sampler="ddim", num_samples=7, shards=1, clip_x_0=clip)
        sample_set = make_set(tmp_path / "run", request, f"clip-{clip}")
        run_shard(sample_set, request, 0, lambda x_t, t, labels: 0.6 * x_t, schedule_=schedule_)
        images[clip] = verify_shard(sample_set, request, 0).images
    x_t = rng.normal(rng.key(5, "x_T"), torch.arange(7), 0, SHAPE).double()
    kept = schedule_.respace(STEPS)
    for i in reversed(range(STEPS)):
        alpha_bar, prev = kept.alpha_bar[i], kept.alpha_bar_prev[i]
        x_0 = (x_t - (1 - alpha_bar).sqrt() * 0.6 * x_t) / alpha_bar.sqrt()
        x_t = prev.sqrt() * x_0 + (1 - prev).sqrt() * 0.6 * x_t
    expected = ((x_t + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert (expected == 255).any() and (expected < 255).any()
    assert np.abs(images[False] - expected).max() <= 0.5 + 1e-2  # the nearest level, but for float32
    assert not np.array_equal(images[True], images[False])


def test_the_variance_of_a_request_comes_before_the_configs(tmp_path: Path) -> None:
    images = {}
    for asked in (None, "fixed_small", "fixed_large"):
        for configured in VARIANCES:
            request = make_request(num_samples=7, shards=1, variance=asked)
            sample_set = make_set(tmp_path / "run", request, f"{asked}-{configured}")
            run_shard(sample_set, request, 0, variance=configured)
            images[asked, configured] = verify_shard(sample_set, request, 0).images.tobytes()
    small, large = images[None, "fixed_small"], images[None, "fixed_large"]
    assert small != large
    for configured in VARIANCES:
        assert (images["fixed_small", configured], images["fixed_large", configured]) == (small, large)


def test_the_value_of_a_sample_follows_from_its_index(tmp_path: Path) -> None:
    request = make_request(sampler="ddim", steps=1, num_samples=11, shards=2, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    one_step = schedule.Schedule.from_beta(torch.tensor([0.3], dtype=torch.float64))
    for index in range(2):
        run_shard(sample_set, request, index, lambda x_t, t, labels: 0.9 * x_t, schedule_=one_step)
    x_T = rng.normal(rng.key(request.seed, "x_T"), torch.tensor([8]), 0, SHAPE)[0]
    x_0 = (x_T - 0.3**0.5 * (0.9 * x_T)) / 0.7**0.5
    expected = ((x_0.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    got = verify_shard(sample_set, request, 1).images[8 - 5]
    assert np.abs(got - expected).max() <= 0.5 + 1e-3  # the nearest level, wherever the float arithmetic is the same
    assert len(np.unique(got)) > 20


def test_unused_rows_of_a_batch_are_zeros(tmp_path: Path) -> None:
    request = make_request(num_samples=6, shards=2, batch=4, sampler="ancestral")
    rows = []
    run_shard(
        make_set(tmp_path / "run", request),
        request,
        1,
        lambda x_t, t, labels: rows.append(x_t.abs().amax((1, 2, 3)) > 0) or torch.zeros_like(x_t),
    )
    assert [r.tolist() for r in rows] == [[True, True, False, True]] * STEPS  # samples 3, 4, 5 in rows 3, 0, 1


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("polls", range(0, 14))
def test_a_stop_at_any_step_loses_at_most_a_batch(tmp_path: Path, polls: int) -> None:
    request = make_request(num_samples=20, shards=2, batch=4)  # shard 1: samples 10 to 19, in three batches
    reference = make_set(tmp_path / "run", request, "reference")
    run_shard(reference, request, 1)

    sample_set, net = make_set(tmp_path / "run", request), Net(4)
    polls_a_batch = STEPS  # one before it, and one after each step but the last
    if polls < 3 * polls_a_batch:
        with pytest.raises(Stopped, match="SIGTERM"):
            run_shard(sample_set, request, 1, net, stop_requested=stop_after(polls))
        assert missing_shards(sample_set, request) == [0, 1]
        finished = polls // polls_a_batch
        assert len(list(sample_set.part.glob("[!.]*"))) == finished if finished else not sample_set.part.exists()
        net.calls = 0
        progress: list[tuple[int, int]] = []
        run_shard(sample_set, request, 1, net, progress=lambda *p: progress.append(p))
        assert net.calls == (3 - finished) * STEPS
        assert progress == [(4, 10), (8, 10), (10, 10)]
    else:
        run_shard(sample_set, request, 1, net, stop_requested=stop_after(polls))
    assert sample_set.shard(1, 2).read_bytes() == reference.shard(1, 2).read_bytes()


def test_a_kill_between_npz_and_manifest_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(files, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run_shard(sample_set, request, 0)
    assert sample_set.shard(0, 8).exists() and 0 in missing_shards(sample_set, request)
    net = Net(request.batch)
    run_shard(sample_set, request, 0, net)
    assert net.calls == 0  # its batch was finished
    assert verify_shard(sample_set, request, 0).first == 0


def test_only_temporaries_of_the_own_shard_are_removed(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    sample_set.part.mkdir()
    own = [sample_set.path / ".tmp-shard-00000-of-00008.npz.x.1", sample_set.part / ".tmp-000000000-6.npz.x.1"]
    others = [sample_set.path / ".tmp-shard-00001-of-00008.npz.x.1", sample_set.part / ".tmp-000000006-7.npz.x.1"]
    for path in own + others:
        path.touch()
    run_shard(sample_set, request, 0)
    assert not any(p.exists() for p in own) and all(p.exists() for p in others)


def test_shards_leave_each_others_parts_alone_and_the_last_one_tidies_up(tmp_path: Path) -> None:
    request = make_request(num_samples=20, shards=2, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    with pytest.raises(Stopped):
        run_shard(sample_set, request, 1, stop_requested=stop_after(2 * STEPS))
    run_shard(sample_set, request, 0)
    assert sorted(p.name for p in sample_set.part.iterdir()) == ["000000010-4.npz", "000000014-4.npz"]
    run_shard(sample_set, request, 1)
    assert not sample_set.part.exists()


def test_a_shard_that_other_code_began_names_both(tmp_path: Path) -> None:
    request = make_request(num_samples=20, shards=2, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    with pytest.raises(Stopped):
        run_shard(sample_set, request, 1, stop_requested=stop_after(2 * STEPS), code="b")
    assert run_shard(sample_set, request, 1, code="a")["code"] == "a+b"
    assert run_shard(sample_set, request, 0, code="a")["code"] == "a"
    assert codes(sample_set, request) == ["a", "b"]


def test_a_twin_that_published_first_is_accepted(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    manifest = run_shard(sample_set, request, 2, progress=lambda *_: run_shard(sample_set, request, 2) and None)
    assert manifest == verify_shard(sample_set, request, 2).manifest


# ---------------------------------------------------------------- damage


def test_a_damaged_part_is_computed_again_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = make_request(num_samples=20, shards=2, batch=4)
    reference = make_set(tmp_path / "run", request, "reference")
    run_shard(reference, request, 1)
    sample_set, net = make_set(tmp_path / "run", request), Net(4)
    with pytest.raises(Stopped):
        run_shard(sample_set, request, 1, net, stop_requested=stop_after(2 * STEPS))
    flip_byte(sample_set.part / "000000014-4.npz", 400)
    net.calls = 0
    run_shard(sample_set, request, 1, net)
    assert net.calls == 2 * STEPS
    assert "000000014-4.npz damaged, computing these samples again" in capsys.readouterr().out
    assert sample_set.shard(1, 2).read_bytes() == reference.shard(1, 2).read_bytes()


def test_no_flipped_byte_of_a_part_changes_a_sample(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    part = Part(np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8), 3)
    write_part(sample_set, request, 0, part, "")
    path = sample_set.part / "000000000-6.npz"
    good, rejected = path.read_bytes(), 0
    for position in range(0, len(good), 3):
        path.write_bytes(good)
        flip_byte(path, position)
        got = read_part(sample_set, request, 0, 6)
        rejected += got is None
        assert got is None or (got.images.tobytes(), got.nfe) == (part.images.tobytes(), 3)
    assert rejected > len(good) / 3 / 2
    path.write_bytes(good)
    assert read_part(sample_set, dataclasses.replace(request, seed=6), 0, 6) is None  # of another request


@pytest.mark.parametrize("victim", ["npz", "json", "truncated", "gone"])
def test_a_damaged_shard_is_noticed_and_made_again(tmp_path: Path, victim: str) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    run_shard(sample_set, request, 3)
    shard, manifest = sample_set.shard(3, 8), sample_set.shard_manifest(3, 8)
    good = shard.read_bytes(), manifest.read_bytes()
    if victim == "npz":
        flip_byte(shard, 500)
    elif victim == "json":
        flip_byte(manifest, manifest.read_bytes().index(b'"first": ') + 10)
    elif victim == "truncated":
        shard.write_bytes(good[0][:-10])
    else:
        shard.unlink()
    with pytest.raises(DamagedFile, match="shard-00003-of-00008"):
        verify_shard(sample_set, request, 3)
    run_shard(sample_set, request, 3)
    assert (shard.read_bytes(), manifest.read_bytes()) == good


def test_a_good_shard_returns_at_once(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    manifest = run_shard(sample_set, request, 7)
    net = Net(7)
    assert run_shard(sample_set, request, 7, net) == manifest and net.calls == 0
    assert [manifest[k] for k in ("shard", "first", "num", "nfe")] == [7, 46, 7, STEPS]
    assert set(manifest) == {"shard", "first", "num", "sha256", "request_digest", "nfe", "self_sha256"}
    assert manifest["sha256"] == files.sha256_file(sample_set.shard(7, 8))


def test_a_copied_shard_is_found_even_with_a_forged_manifest(tmp_path: Path) -> None:
    request = make_request(num_samples=56)
    sample_set = make_set(tmp_path / "run", request)
    manifest = run_shard(sample_set, request, 2)
    sample_set.shard(3, 8).write_bytes(sample_set.shard(2, 8).read_bytes())
    files.write_json(sample_set.shard_manifest(3, 8), files.sign({**manifest, "shard": 3, "first": 21}))
    with pytest.raises(DamagedFile, match="begins at sample 14, not at 21"):
        verify_shard(sample_set, request, 3)


def test_missing_shards_are_those_without_a_manifest_of_this_request(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    assert missing_shards(sample_set, request) == list(range(8))
    for index in (1, 4, 5):
        run_shard(sample_set, request, index)
    flip_byte(sample_set.shard_manifest(4, 8), 30)
    assert missing_shards(sample_set, request) == [0, 2, 3, 4, 6, 7]
    other = dataclasses.replace(request, seed=6)
    assert missing_shards(sample_set, other) == list(range(8))


def test_output_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    request = make_request()
    sample_set = make_set(tmp_path / "run", request)
    with pytest.raises(
        DoNotRetry, match=r"samples 6 to 12 are not finite: the ema weights of step 12.*--precision fp32"
    ):
        run_shard(sample_set, request, 1, lambda x_t, t, labels: x_t * float("nan"))
    assert missing_shards(sample_set, request) == list(range(8))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "num_classes", "message"),
    [
        ({"guidance": 1.0}, 0, "guidance = 1.0: the model has no classes"),
        ({"class_plan": [50, 3]}, 3, r"class_plan = \[50, 3\]: needs one count for each of the model's 3 classes"),
        ({"class_plan": [53]}, 0, "the model's 0 classes"),
    ],
)
def test_a_request_that_the_model_has_no_classes_for_is_refused(
    tmp_path: Path, changes: dict[str, Any], num_classes: int, message: str
) -> None:
    request = make_request(**changes)
    with pytest.raises(RequestError, match=message):
        run_shard(make_set(tmp_path / "run", request), request, 0, num_classes=num_classes)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(RequestError, match="sampler = 'euler': use one of ancestral, ddim, dpmpp_2m"):
        make_request(sampler="euler")


@pytest.mark.parametrize(("num_samples", "shards"), [(50_000, 64), (53, 8), (7, 7), (1, 1), (1000, 3)])
def test_shards_tile_the_samples_evenly(num_samples: int, shards: int) -> None:
    ranges = [shard_range(num_samples, shards, i) for i in range(shards)]
    assert [i for first, num in ranges for i in range(first, first + num)] == list(range(num_samples))
    assert max(n for _, n in ranges) - min(n for _, n in ranges) <= 1


@pytest.mark.parametrize("index", [-1, 8])
def test_a_shard_outside_the_set_is_refused(index: int) -> None:
    with pytest.raises(RequestError, match="from 0 to 7"):
        shard_range(53, 8, index)


# ---------------------------------------------------------------- the rest


def test_pngs_are_the_samples(tmp_path: Path) -> None:
    request = make_request(num_samples=9, shards=2, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    with pytest.raises(FileNotFoundError):
        unpack_png(sample_set, request, tmp_path / "png")
    assert not (tmp_path / "png").exists()
    for index in range(2):
        run_shard(sample_set, request, index)
    whole = sample_set.shard(1, 2).read_bytes()
    sample_set.shard(1, 2).write_bytes(whole[:-1])
    with pytest.raises(DamagedFile):
        unpack_png(sample_set, request, tmp_path / "png")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    sample_set.shard(1, 2).write_bytes(whole)
    unpack_png(sample_set, request, tmp_path / "png")
    images = np.concatenate([verify_shard(sample_set, request, i).images for i in range(2)])
    assert len(list((tmp_path / "png").glob("*"))) == 9 + 1  # and .unpacked, which says what they are
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "png" / f"{i:06d}.png")), image)
    assert unpack_png(sample_set, request, tmp_path / "png") == tmp_path / "png"  # again: nothing to do
    (tmp_path / "png" / "000003.png").unlink()
    with pytest.raises(RequestError, match="does not hold this set's 9 images"):
        unpack_png(sample_set, request, tmp_path / "png")


def test_a_disk_that_is_full_while_a_set_is_unpacked_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(num_samples=4, shards=1, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    run_shard(sample_set, request, 0)

    def save(image: Image.Image, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match=r"No space left .*/png'"):
        unpack_png(sample_set, request, tmp_path / "png")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_of_two_who_unpack_a_set_at_once_both_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(num_samples=9, shards=2, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    for index in range(2):
        run_shard(sample_set, request, index)
    others = iter([lambda: unpack_png(sample_set, request, tmp_path / "png")])

    def meanwhile(*asked: Any) -> Any:
        for other in others:
            other()
        return verify_shard(*asked)

    monkeypatch.setattr("ddpm.sampling.shards.verify_shard", meanwhile)
    assert unpack_png(sample_set, request, tmp_path / "png") == tmp_path / "png"
    assert len(list((tmp_path / "png").glob("*.png"))) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["png", "run"]


def test_the_pngs_of_classes_lie_in_folders_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(num_samples=9, shards=1, batch=4)
    sample_set = make_set(tmp_path / "run", request)
    run_shard(sample_set, request, 0)
    shard = verify_shard(sample_set, request, 0)._replace(labels=np.arange(9) % 4)
    monkeypatch.setattr("ddpm.sampling.shards.verify_shard", lambda *_: shard)
    there = unpack_png(sample_set, request, tmp_path / "png", ["cät", "../a b", "2"])
    found = sorted(str(p.relative_to(there)) for p in there.rglob("*.png"))
    assert found == [
        f"{folder}/{i:06d}.png" for n, folder in enumerate(("0-c-t", "1-a-b", "2", "3")) for i in range(n, 9, 4)
    ]
    assert unpack_png(sample_set, request, there) == there  # again: nothing to do


@pytest.mark.parametrize("of_old", [False, True], ids=["says what it holds", "of old"])
def test_the_pngs_of_another_request_are_not_taken_for_this_ones(tmp_path: Path, of_old: bool) -> None:
    sets = []
    for seed in (5, 6):
        request = make_request(num_samples=9, shards=2, batch=4, seed=seed)
        sets.append((make_set(tmp_path / f"run{seed}", request), request))
        for index in range(2):
            run_shard(*sets[-1], index)
    unpack_png(*sets[0], tmp_path / "png")
    if of_old:
        (tmp_path / "png" / ".unpacked").unlink()
    assert unpack_png(*sets[0], tmp_path / "png") == tmp_path / "png"
    with pytest.raises(RequestError, match="does not hold this set's 9 images"):
        unpack_png(*sets[1], tmp_path / "png")


@pytest.fixture
def recorded_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where evaluations of a played GPU are recorded and replayed: its streams are named by their GPU and number. The
    first of the list is the current GPU."""
    on, made = ["another"], itertools.count()

    class Graph:
        def replay(self) -> None:
            on.append(on[0])

    @contextlib.contextmanager
    def recording(graph: Graph, stream: str) -> Iterator[None]:
        on.append(stream)  # its GPU becomes the current one
        yield

    @contextlib.contextmanager
    def made_current(gpu: torch.device) -> Iterator[None]:
        before, on[0] = on[0], str(gpu)
        yield
        on[0] = before

    played = {"CUDAGraph": Graph, "device": made_current, "Stream": lambda gpu: f"{gpu} {next(made)}"}
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(denoiser, "recorded", recording)
    denoiser._stream_of.cache_clear()
    yield on
    denoiser._stream_of.cache_clear()


def evaluated(times: int) -> None:
    replays = Replays(lambda x_t, t, labels: x_t + 1)
    for _ in range(times):
        replays(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), None)


def test_evaluations_are_recorded_and_replayed_on_the_gpu_of_their_images_whichever_is_current(
    recorded_on: list[str],
) -> None:
    evaluated(4)  # the third is recorded; it and the fourth are replayed
    assert recorded_on == ["another", "cpu 0", "cpu", "cpu"]


def test_each_thread_has_one_stream_for_its_recordings(recorded_on: list[str]) -> None:
    """With a graph torch drops what matrix products on its stream work in."""
    with ThreadPoolExecutor(1) as other:
        for _ in range(2):
            evaluated(3)
            other.submit(evaluated, 3).result()
    streams = [where for where in recorded_on if " " in where]
    assert streams == ["cpu 0", "cpu 1"] * 2
