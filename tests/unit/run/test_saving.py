"""ddpm/run/saving.py: what was saved is whole, what nobody needs goes, one writer commits."""

import errno
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from ddpm.errors import DoNotRetry, RunBusy
from ddpm.run import files, generations, saving
from ddpm.run.fence import Fence
from ddpm.run.files import read_json, sha256_file, sign, write_json
from ddpm.run.paths import RunDir
from ddpm.run.saving import HostCopy
from ddpm.sampling.request import CheckpointRef
from ddpm.scoring import bound_request
from ddpm.scoring.bound_request import BoundRequest
from tests.saves import Unreadable, ask_for_samples, flip_bit, killed_before_its_manifest, save_all, saver, state_at
from tests.training import differences, live, make_config, make_run

# ---------------------------------------------------------------- what is saved


def test_a_manifest_holds_the_public_keys(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 5)
    manifest = read_json(run.manifest(5))
    assert manifest is not None and set(manifest) == {
        *("step", "images", "file", "bytes", "sha256", "config_digest", "world_size", "fence", "created"),
        "self_sha256",
    }
    assert (manifest["step"], manifest["images"], manifest["fence"]) == (5, 20, fence.token)
    save_all(run, fence, 6, is_milestone=lambda step: True)
    last = read_json(run.manifest(6))
    assert last is not None and set(last) == {*manifest, "ema_sha256"}
    assert last["ema_sha256"] == sha256_file(run.ema_weights(6))


@pytest.mark.parametrize("value", [numpy.float64(0.5), Path("x"), CheckpointRef(1, "")], ids=lambda v: type(v).__name__)
def test_a_state_that_no_later_life_could_load_is_not_saved(run: RunDir, fence: Fence, value: Any) -> None:
    """It would be called whole until it is needed."""
    with pytest.raises(DoNotRetry, match=rf"{type(value).__name__} at extra/best, .*TrainingState.state_dict"):
        saver(run, fence, []).save(state_at(5) | {"extra": {"best": value}}, wait=True)
    assert not [*run.checkpoints.iterdir()]


@pytest.mark.parametrize("value", saving.PLAIN, ids=str)
def test_what_may_be_saved_can_be_loaded(run: RunDir, fence: Fence, value: type) -> None:
    made = {torch.device: torch.device("cpu"), torch.dtype: torch.bfloat16, type(None): None}
    kept = made[value] if value in made else value()
    saver(run, fence, []).save(state_at(5) | {"extra": {"kept": [kept], "window": ()}}, wait=True)
    assert generations.load(run, 5)["extra"] == {"kept": [kept], "window": ()}


@pytest.mark.parametrize("damage", ["flip", "gone", "directory", "none"])
def test_ema_weights_that_were_damaged_are_set_aside_and_written_again_by_the_last_save(
    run: RunDir, fence: Fence, damage: str
) -> None:
    said: list[str] = []
    s = saver(run, fence, said)
    s.save(state_at(5), wait=True, final=True)
    path = run.ema_weights(5)
    good, manifest = path.read_bytes(), run.manifest(5).read_bytes()
    if damage == "flip":
        flip_bit(path, len(good) - 3)
    elif damage != "none":
        path.unlink()
    if damage == "directory":
        path.mkdir()
    s.save(state_at(5), wait=True, final=True)
    assert path.read_bytes() == good and run.manifest(5).read_bytes() == manifest
    assert [line for line in said if "ema-000000005.safetensors" in line] == [
        line for line in said if line.startswith("set aside")
    ]
    assert len(said) == (damage in ("flip", "directory"))


def test_ema_weights_from_before_they_had_a_digest_stay(run: RunDir, fence: Fence) -> None:
    s = saver(run, fence)
    s.save(state_at(5), wait=True, final=True)
    old = read_json(run.manifest(5)) or {}
    write_json(run.manifest(5), sign({k: v for k, v in old.items() if k != "ema_sha256"}), replace=True)
    flip_bit(run.ema_weights(5), 200)
    there = run.ema_weights(5).read_bytes()
    s.save(state_at(5), wait=True, final=True)
    assert run.ema_weights(5).read_bytes() == there


@pytest.mark.parametrize("settled", [None, False, 0.0, 0.25])
def test_a_manifest_tells_at_which_change_of_the_loss_training_settled(
    run: RunDir, fence: Fence, settled: float | None
) -> None:
    state = state_at(5)
    state["extra"]["early_stopped"] = settled
    saver(run, fence).save(state, wait=True)
    manifest = generations.verify(run, 5).manifest
    if settled is None or settled is False:
        assert "early_stopped" not in manifest
    else:
        assert manifest["early_stopped"] == settled and type(manifest["early_stopped"]) is float


def test_a_trainers_checkpoint_has_the_public_keys_and_loads_without_unpickling_code(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    live(make_config(train__total_steps=2), run)
    state = torch.load(run.checkpoint(2), weights_only=True)
    assert set(state) == {"model", "ema", "optimizer", "scaler", "step", "images", "config_digest", "extra"}
    assert (state["step"], state["images"]) == (2, 8)
    assert state["config_digest"] == make_config(train__total_steps=2).digest()
    assert set(state["model"]) == set(state["ema"]) and differences(state["model"], state["ema"])


def test_the_last_ema_weights_are_readable_by_anyone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = make_run(tmp_path)
    live(make_config(train__total_steps=2), run)
    ema = {k: v.contiguous() for k, v in generations.load(run, 2)["ema"].items()}
    assert differences(load_file(run.ema_weights(2)), ema) == []


def test_a_save_holds_the_moment_it_was_called_at(run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, changing the same tensors, while the writer has yet to begin."""
    go, write = threading.Event(), torch.save

    def late(*args: Any) -> None:
        assert go.wait(30)
        write(*args)

    monkeypatch.setattr(torch, "save", late)
    s, state = saver(run, fence), state_at(5)
    s.save(state)
    state["model"]["w"].zero_()
    go.set()
    s.wait()
    assert differences(generations.load(run, 5), state_at(5)) == []


def test_host_buffers_are_reused_and_never_shared_between_tensors() -> None:
    copy, state = HostCopy(), state_at(1)
    first = copy.take(state)
    second = copy.take(state_at(2))
    assert first["model"]["w"].data_ptr() == second["model"]["w"].data_ptr()
    assert second["model"]["w"].data_ptr() != second["ema"]["w"].data_ptr() != state["ema"]["w"].data_ptr()
    assert differences(second, state_at(2)) == []


# ---------------------------------------------------------------- retention


def test_retention_keeps_the_last_milestones_and_those_that_samples_or_a_bound_name(run: RunDir, fence: Fence) -> None:
    ask_for_samples(run, "fid", 2)
    at = CheckpointRef(1, "ab" * 32)
    bound = BoundRequest(at, "ema", "test", None, 0, 8, "fp32", "fixed_large", True)
    bound_request.publish(run.bound_set(bound.name), bound)
    s = saver(run, fence, keep_last=2, is_milestone=lambda step: step == 3)
    for step in (1, 2, 3, 4, 5, 6):
        s.save(state_at(step), wait=True)
    assert run.steps_saved() == [6, 5, 3, 2, 1]
    assert sorted(p.stem for p in run.checkpoints.glob("*.pt")) == [f"step-{k:09d}" for k in (1, 2, 3, 5, 6)]
    assert run.ema_weights(3).exists()


def test_the_weights_of_a_former_end_go_with_its_checkpoint(run: RunDir, fence: Fence) -> None:
    s = saver(run, fence, keep_last=1)
    s.save(state_at(2), wait=True, final=True)
    assert run.ema_weights(2).exists()
    s.save(state_at(3), wait=True)
    assert run.steps_saved() == [3] and not run.ema_weights(2).exists()


def test_the_best_milestone_is_kept_and_nothing_is_removed_while_it_cannot_be_told(run: RunDir, fence: Fence) -> None:
    write_json(run.milestones, sign({"best": {"step": 1}}))
    save_all(run, fence, 1, 2, 3, keep_last=1)
    assert run.steps_saved() == [3, 1]
    run.milestones.write_text(run.milestones.read_text().replace('"step": 1', '"step": 2'))
    log: list[str] = []
    save_all(run, fence, 4, keep_last=1, log=log)
    assert run.steps_saved() == [4, 3, 1] and "milestones.json: its self_sha256" in log[-1]


REQUESTS = {
    "cannot be read": lambda whole: whole,
    "torn": lambda whole: whole[:9],
    "another step in it": lambda whole: whole.replace('"step": 1', '"step": 2'),
    "another key in it": lambda whole: whole.replace("checkpoint", "checkpoins"),
    "no digest": lambda whole: whole.replace("digest", "digess"),
    "empty": lambda whole: "",
    "gone": lambda whole: None,
}


@pytest.mark.parametrize("how", REQUESTS)
def test_nothing_is_removed_while_a_request_is_not_as_it_was_published_and_that_is_said_once(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    request = ask_for_samples(run, "fid", 1)
    (request.parent / "shard-00000-of-00001.npz").write_bytes(b"an image")
    whole = request.read_text()
    said: list[str] = []
    with monkeypatch.context() as m:
        if (damaged := REQUESTS[how](whole)) is None:
            request.unlink()
        else:
            request.write_text(damaged)
        Unreadable(m, {request: 99 if how == "cannot be read" else 0})
        s = saver(run, fence, said, keep_last=1)
        for step in (1, 2, 3):
            s.save(state_at(step), wait=True)
    assert run.steps_saved() == [3, 2, 1]
    (line,) = said
    assert "checkpoint saved: step=1; older ones cannot be removed now" in line and str(request) in line
    request.write_text(whole)
    save_all(run, fence, 4, keep_last=1)
    assert run.steps_saved() == [4, 1]


def moved_away(path: Path) -> Path:
    """As where an archive is not mounted; returns where it is meanwhile."""
    path.rename(path.with_name(".archived"))
    path.symlink_to("/not/mounted")
    return path.with_name(".archived")


@pytest.mark.parametrize("what", ["set", "request", "bound", "milestones", "samples"])
def test_nothing_is_removed_while_a_link_leads_to_what_names_a_checkpoint(run: RunDir, fence: Fence, what: str) -> None:
    request = ask_for_samples(run, "fid", 1)
    paths = {"set": request.parent, "request": request, "milestones": run.milestones, "samples": run.samples}
    path = paths.get(what, run.bound_set("b").path)
    if what == "bound":
        path.mkdir(parents=True)
    elif what == "milestones":
        write_json(path, sign({"best": {"step": 1}}))
        shutil.rmtree(request.parent)
    archived = moved_away(path)
    said: list[str] = []
    save_all(run, fence, 1, 2, 3, keep_last=1, log=said)
    assert run.steps_saved() == [3, 2, 1]
    assert "older ones cannot be removed now" in said[0] and str(path) in said[0]
    path.unlink()
    archived.rename(path)
    save_all(run, fence, 4, keep_last=1)
    assert run.steps_saved() == [4, 1]  # the request's, or the best


def test_nothing_is_removed_while_a_set_has_half_a_shard_and_no_request(run: RunDir, fence: Fence) -> None:
    request = ask_for_samples(run, "fid", 1)
    request.unlink()
    run.sample_set("fid").part.mkdir()
    save_all(run, fence, 1, 2, keep_last=1)
    assert run.steps_saved() == [2, 1]


def test_a_run_taken_over_while_it_looks_what_to_remove_removes_nothing(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, fence, 1, 2)
    sample_sets = RunDir.sample_sets

    def taken_over(run: RunDir) -> Any:
        run.fence.write_text("99\n")
        return sample_sets(run)

    monkeypatch.setattr(RunDir, "sample_sets", taken_over)
    with pytest.raises(RunBusy):
        save_all(run, fence, 3, keep_last=1)
    assert run.steps_saved() == [3, 2, 1]


def test_a_damaged_newer_generation_never_pushes_out_a_good_one(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 5, 10, keep_last=2)
    flip_bit(run.checkpoint(10), 100)
    save_all(run, fence, 7, keep_last=1)  # a life that resumed at 5, stopped at 7
    good = generations.newest_good(run, print)
    assert good is not None and good.step == 7


def test_what_does_not_hold_takes_no_place_among_the_last_that_are_kept(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 1, 2, 3, 4, keep_last=4)
    flip_bit(run.manifest(4), 40)
    flip_bit(run.checkpoint(3), 100)
    said: list[str] = []
    s = save_all(run, fence, 5, keep_last=2, log=said)
    assert run.steps_saved() == [5, 2]
    assert {p.name for p in (run.checkpoints / "set-aside").glob("*.pt")} == {f"step-{k:09d}.pt" for k in (3, 4)}
    run.manifest(9).symlink_to("/not/mounted")
    s.save(state_at(6), wait=True)
    run.checkpoint(6).unlink()
    s.save(state_at(7), wait=True)
    assert [generations.verify(run, step).step for step in run.steps_saved() if step != 6] == [7, 5]
    assert run.manifest(9).is_symlink()  # what it led to may be back


ODD: dict[str, Callable[[Path], object]] = {
    "folder of a temporary's name": lambda there: (there / ".tmp-foo").mkdir(),
    "folder of a sign's name": lambda there: (there / ".saving-step-000000003.x").mkdir(),
    "file for set-aside": lambda there: (there / "set-aside").touch(),
    "link to nothing for set-aside": lambda there: (there / "set-aside").symlink_to("/not/mounted"),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_thing_among_the_checkpoints_makes_no_save_fail(run: RunDir, fence: Fence, what: str) -> None:
    save_all(run, fence, 1)
    ODD[what](run.checkpoints)
    shutil.copy(run.checkpoint(1), run.checkpoint(2))  # without a manifest: to be set aside
    said: list[str] = []
    s = saver(run, fence, said)
    assert "set-aside" in said[0]
    for step in (3, 4):
        s.save(state_at(step), wait=True)
    assert run.steps_saved() == [4, 3, 1] and len(said) == 1


def test_a_new_writer_removes_stale_temporaries_and_half_generations_alone(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 5)
    (run.checkpoints / ".tmp-step-000000009.pt.1.77").write_bytes(b"half")
    killed_before_its_manifest(run, 9)
    run.ema_weights(4).write_bytes(b"kept, when its generation was removed by hand")
    saver(run, fence)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "ema-000000004.safetensors",
        "step-000000005.json",
        "step-000000005.pt",
    ]


def test_a_checkpoint_without_a_manifest_that_no_save_left_here_is_moved_aside_and_named(
    run: RunDir, fence: Fence
) -> None:
    """By a copy that lacks manifests, or a clean-up of small files. A copy of a leftover tells nothing either."""
    save_all(run, fence, 5)
    killed_before_its_manifest(run, 9)
    run.checkpoint(8).write_bytes(b"whose?")
    sign = next(run.checkpoints.glob(".saving-*"))
    copy = sign.with_name("copy")
    copy.write_bytes(sign.read_bytes())
    copy.rename(sign)
    said: list[str] = []
    s = saver(run, fence, said)
    s.save(state_at(6), wait=True)
    assert [line.split(" reason=")[0] for line in said] == [
        "set aside: step-000000008.pt",
        "set aside: step-000000009.pt, ema-000000009.safetensors",
    ]
    aside = run.checkpoints / "set-aside"
    assert (aside / "step-000000008.pt").read_bytes() == b"whose?"
    assert sorted(p.name for p in aside.iterdir()) == [
        "ema-000000009.safetensors",
        "step-000000008.pt",
        "step-000000009.pt",
    ]
    assert run.steps_saved() == [6, 5] and not list(run.checkpoints.glob(".*"))


def test_what_is_set_aside_takes_no_place_of_what_was_before(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 5)
    for content in (b"one", b"two", b"three"):
        run.checkpoint(9).write_bytes(content)
        saver(run, fence)
    names = {p.name: p.read_bytes() for p in (run.checkpoints / "set-aside").iterdir()}
    assert names == {"step-000000009.pt": b"one", "step-000000009.pt.2": b"two", "step-000000009.pt.3": b"three"}


def test_rejected_generations_are_moved_aside_and_not_removed(run: RunDir, fence: Fence) -> None:
    """One beyond the step that training goes on from, and one of a step that is saved again: each may be good."""
    save_all(run, fence, 5, 7, 10)
    flip_bit(run.checkpoint(10), 100)
    flip_bit(run.manifest(7), 20)
    damaged = run.checkpoint(10).read_bytes(), run.manifest(7).read_bytes()
    save_all(run, fence, 7)
    aside = run.checkpoints / "set-aside"
    assert ((aside / "step-000000010.pt").read_bytes(), (aside / "step-000000007.json").read_bytes()) == damaged
    assert run.steps_saved() == [7, 5] and generations.verify(run, 7).step == 7


def test_a_generation_half_way_to_its_manifest_is_saved_again(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 5)
    killed_before_its_manifest(run, 7)
    run.ema_weights(9).write_bytes(b"without any .pt")
    s = saver(run, fence)
    for step in (7, 9):
        s.save(state_at(step), wait=True, final=True)
    assert differences(generations.load(run, 7), state_at(7)) == []
    assert generations.verify(run, 7).step == 7


def test_a_verified_generation_is_not_written_again(run: RunDir, fence: Fence) -> None:
    save_all(run, fence, 5)
    before = run.checkpoint(5).stat().st_mtime_ns, run.manifest(5).read_bytes()
    save_all(run, fence, 5)
    assert (run.checkpoint(5).stat().st_mtime_ns, run.manifest(5).read_bytes()) == before


# ---------------------------------------------------------------- failing writes


def test_a_generation_that_cannot_be_read_is_saved_again(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, fence, 3)
    with monkeypatch.context() as m:
        Unreadable(m, {run.checkpoint(3): 2})
        save_all(run, fence, 3)
    assert generations.verify(run, 3).step == 3


@pytest.mark.parametrize("where", ["fsync", "link"])
def test_a_failed_write_is_told_and_the_next_save_works(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    said: list[str] = []
    s = saver(run, fence, said)
    s.save(state_at(1), wait=True)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr("os.fsync" if where == "fsync" else "ddpm.run.files.rename_new", refuse)
        s.save(state_at(2))
        s.wait(raising=False)
        with pytest.raises(OSError, match="No space left"):
            s.save(state_at(3), wait=True)
    assert run.steps_saved() == [1] and not list(run.checkpoints.glob(".tmp-*"))
    assert [line.split(" error=")[0] for line in said] == ["checkpoint failed: step=2", "checkpoint failed: step=3"]
    s.save(state_at(4), wait=True)
    assert run.steps_saved() == [4, 1]


def test_a_disk_with_too_little_space_is_not_filled_to_the_brim_first(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = saver(run, fence)
    usage = shutil.disk_usage(run.path)
    with monkeypatch.context() as m:
        m.setattr("ddpm.run.saving.shutil.disk_usage", lambda path: usage._replace(free=saving.SPARE_BYTES))
        m.setattr(torch, "save", lambda *_: pytest.fail("began to write"))
        with pytest.raises(OSError, match="free for a checkpoint of") as failed:
            s.save(state_at(1), wait=True)
    assert failed.value.errno == errno.ENOSPC and not run.steps_saved()
    s.save(state_at(2), wait=True)
    assert run.steps_saved() == [2]


def small_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Checkpoints lie on a disk of `size` bytes beyond what is spared; it tells of its room and holds what fits."""
    usage = shutil.disk_usage(run.path)

    def told(_: Path) -> Any:
        used = sum(p.stat().st_size for p in run.checkpoints.iterdir())
        return usage._replace(free=size - used + saving.SPARE_BYTES)

    monkeypatch.setattr("ddpm.run.saving.shutil.disk_usage", told)


@pytest.mark.parametrize("later_life", [False, True])
@pytest.mark.parametrize("failing", ["json", "safetensors"])
def test_failed_saves_take_no_room_from_those_to_come(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch, failing: str, later_life: bool
) -> None:
    """The disk has room for two generations and the EMA weights of one."""
    s = saver(run, fence, keep_last=1)
    s.save(state_at(1), wait=True)
    one, link = run.checkpoint(1).stat().st_size, files.rename_new
    small_disk(run, monkeypatch, 2 * one + one // 2)

    def refuse(tmp: Path, path: Path) -> None:
        if path.name.endswith(failing):
            raise OSError(errno.EIO, "Input/output error")
        link(tmp, path)

    with monkeypatch.context() as m:
        m.setattr("ddpm.run.files.rename_new", refuse)
        for step in (2, 3):
            with pytest.raises(OSError, match="Input/output error"):
                s.save(state_at(step), wait=True, final=True)
    (saver(run, fence, keep_last=1) if later_life else s).save(state_at(4), wait=True, final=True)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "ema-000000004.safetensors",
        "step-000000004.json",
        "step-000000004.pt",
    ]


def test_a_save_without_room_for_its_ema_weights_does_not_begin(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = saver(run, fence, is_milestone=lambda step: step == 2)
    small_disk(run, monkeypatch, saving.num_bytes(state_at(2)) + 1000)
    with pytest.raises(OSError, match="free for a checkpoint of"):
        s.save(state_at(2), wait=True)
    with pytest.raises(OSError, match="free for a checkpoint of"):
        s.save(state_at(3), wait=True, final=True)
    assert list(run.checkpoints.iterdir()) == []


def test_what_cannot_be_removed_makes_no_save_fail(run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    s = saver(run, fence, said, keep_last=1)
    s.save(state_at(1), wait=True)
    unlink = Path.unlink

    def refuse(path: Path, **options: Any) -> None:
        if path == run.manifest(1):
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, **options)

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", refuse)
        s.save(state_at(2), wait=True)
    assert said == ["checkpoint saved: step=2; older ones cannot be removed now: [Errno 5] Input/output error"]
    assert [generations.verify(run, step).step for step in run.steps_saved()] == [2, 1]
    s.save(state_at(3), wait=True)
    assert run.steps_saved() == [3]


def test_leftovers_that_cannot_be_removed_end_no_life(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, fence, 1)
    killed_before_its_manifest(run, 2)

    def refuse(path: Path, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    said: list[str] = []
    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", refuse)
        saver(run, fence, said)
    assert said == ["what a failed save left cannot be removed: [Errno 5] Input/output error"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError()])
def test_an_error_that_is_no_full_disk_is_told_at_once_and_not_swallowed(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", broken)
    said: list[str] = []
    s = saver(run, fence, said)
    s.save(state_at(1))
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    assert said == [f"checkpoint failed: step=1 error={error!r}"]
    with pytest.raises(type(error)):
        s.save(state_at(2))


# ---------------------------------------------------------------- one writer


def test_a_fenced_out_writer_publishes_nothing(run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is taken over between the .pt and its manifest, or after it began to write."""
    s = save_all(run, fence, 1)
    run.fence.write_text("99\n")
    with pytest.raises(RunBusy):
        s.save(state_at(2), wait=True)
    run.fence.write_text(f"{fence.token}\n")
    write = torch.save

    def taken_over(*args: Any) -> None:
        write(*args)
        run.fence.write_text("99\n")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", taken_over)
        with pytest.raises(RunBusy):
            s.save(state_at(2), wait=True)
    assert sorted(p.name for p in run.checkpoints.glob("[!.]*")) == ["step-000000001.json", "step-000000001.pt"]


def test_an_orphan_that_wakes_deletes_nothing_of_its_heir(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept between its check and its writing; the heir has a .pt whose manifest is about to follow."""
    s = saver(run, fence)
    verify = generations.verify

    def sleep(run: RunDir, step: int) -> Any:
        run.fence.write_text("99\n")
        run.checkpoint(step).write_bytes(b"the heir's")
        return verify(run, step)

    monkeypatch.setattr(generations, "verify", sleep)
    with pytest.raises(RunBusy):
        s.save(state_at(2), wait=True)
    assert run.checkpoint(2).read_bytes() == b"the heir's"


def test_what_cannot_be_read_just_now_is_kept_beside_the_last_ones(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, fence, 1, 2, keep_last=2)
    verify_again = saving.verify_again

    def away(run: RunDir, step: int) -> Any:
        if step == 2:
            raise OSError(errno.EIO, "Input/output error")
        return verify_again(run, step)

    monkeypatch.setattr(saving, "verify_again", away)
    save_all(run, fence, 3, keep_last=2)
    assert run.steps_saved() == [3, 2, 1]


def test_a_folder_in_which_no_set_was_begun_frees_and_keeps_nothing(run: RunDir, fence: Fence) -> None:
    run.bound_set("empty").path.mkdir(parents=True)
    save_all(run, fence, 1, 2, keep_last=1)
    assert run.steps_saved() == [2]
