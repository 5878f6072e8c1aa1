"""recover.py: what of a run holds, line by line; manifests rebuilt; a new beginning that loses nothing."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm.run.files import sign
from tests.cli.harness import Shell, is_alive, read, snapshot, wait_for
from tests.saves import flip_bit

RUN = "tiny"


def lines(shell: Shell, code: int, *args: str) -> dict[str, tuple[str, str]]:
    """What it says of each file: verdict and reason."""
    before = snapshot(shell.root)
    done = shell("recover", RUN, "--verbose", *args)
    assert done.returncode == code and done.stderr == "", done.stdout + done.stderr
    assert snapshot(shell.root) == before
    told = {}
    for line in done.stdout.splitlines()[:-1]:
        verdict, _, rest = line.partition(" ")
        what, _, why = rest.strip().partition(": ")
        told[what] = verdict, why
    return told


def test_of_a_finished_run_every_file_holds(finished: Shell) -> None:
    told = lines(finished, 0)
    assert {verdict for verdict, _ in told.values()} == {"holds"}
    names = " ".join(told)
    for part in ("config.yaml", "run.json", "events/", "metrics.jsonl", "heartbeat.json", "fence", "step-000000400",
                 "ema-000000400", "request.json", "shard-00001", "features-pixels-00001", "eval/"):  # fmt: skip
        assert part in names, part


def test_code_that_jobs_were_sent_with_is_missed(again: Shell) -> None:
    (again.root / RUN / "code.zip").unlink()
    assert lines(again, 1)["code.zip"][0] == "missing"


def test_what_does_not_hold_comes_last_each_once_and_what_holds_in_numbers(again: Shell) -> None:
    run = again.root / RUN
    flipped(run / "checkpoints" / "step-000000200.pt")
    (run / "checkpoints" / "step-000000400.json").unlink()
    said = again("recover", RUN).stdout.splitlines()
    at = said.index("What can be done:")
    assert [line.split()[0] for line in said[at - 2 : at]] == ["damaged"] * 2 and "2 of these" in said[-1]
    assert all(line.startswith("holds") for line in said[: at - 2])
    assert any(re.fullmatch(r"holds    samples/: \d+ files", line) for line in said) and len(said) < 20
    told = again.refused("sample", RUN, "--step", "200", "--set", "x")
    assert "there is no other" in told and "choose one" not in told


@pytest.mark.parametrize(("file", "helps"), [
    ("run.json", []), ("checkpoints/step-000000400.pt", ["--rebuild", "--start-over"]),
    ("checkpoints/ema-000000400.safetensors", []),
    ("{set}/shard-00001-of-00002.npz", ["launch/sample.py"]), ("{set}/features-pixels-00001-of-00002.npy", []),
])  # fmt: skip
def test_what_can_be_done_is_what_helps_with_what_does_not_hold(again: Shell, file: str, helps: list[str]) -> None:
    path = again.root / RUN / file.format(set=SET)
    path.unlink() if file == "run.json" else path.write_text("{")
    said = again("recover", RUN).stdout.splitlines()
    told = said[said.index("What can be done:") + 1 : -1]
    assert "rsync" in told[0] and len(told) == 1 + len(helps), told
    assert all(word in line for word, line in zip(helps, told[1:], strict=True))
    assert ("1 of these" in said[-1]) == ("does not hold" in said[-1])
    assert said[-1].endswith("and it goes on from step 400 of 400") == ("ema-" in file), said[-1]


def gone(path: Path) -> None:
    path.unlink()


def flipped(path: Path) -> None:
    flip_bit(path, path.stat().st_size // 2)


def renamed(path: Path) -> None:
    """Another field than the config's digest."""
    path.write_text(path.read_text().replace('"name": "tiny"', '"name": "tony"'))


def of_other_samples(path: Path) -> None:
    """And signed anew, as by another copy of the run."""
    path.write_text(json.dumps(sign({**json.loads(path.read_text()), "seed": 7})))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


SET = "samples/ddim4-step400-seed0"
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # what: the file, what is done to it, the verdict
    "checkpoints/step-000000400": ("checkpoints/step-000000400.pt", flipped, "damaged"),
    "checkpoints/step-000000200": ("checkpoints/step-000000200.json", emptied, "damaged"),
    "checkpoints/ema-000000400.safetensors": ("checkpoints/ema-000000400.safetensors", flipped, "damaged"),
    "run.json": ("run.json", emptied, "damaged"),
    "run.json ": ("run.json", renamed, "damaged"),
    "eval/ddim4-step400-seed0.json": ("eval/ddim4-step400-seed0.json", of_other_samples, "damaged"),
    "config.yaml": ("config.yaml", gone, "missing"),
    "metrics.jsonl": ("metrics.jsonl", gone, "missing"),
    "fence": ("fence", emptied, "damaged"),
    f"{SET}/request.json": (f"{SET}/request.json", flipped, "damaged"),
    f"{SET}/shard-00000-of-00002.npz": (f"{SET}/shard-00000-of-00002.npz", flipped, "damaged"),
    f"{SET}/features-pixels-00000-of-00002.npy": (f"{SET}/features-pixels-00000-of-00002.npy", flipped, "damaged"),
}


def test_each_file_that_does_not_hold_is_named_with_its_reason_and_the_ways_on(again: Shell) -> None:
    run = again.root / RUN
    for what, (file, damage, verdict) in DAMAGE.items():
        kept = (run / file).read_bytes()
        damage(run / file)
        told = lines(again, 1)
        assert told[what.strip()][0] == verdict and told[what.strip()][1], (what, told)
        assert what != "config.yaml" or told["run.json"][0] == "holds", told
        (run / file).write_bytes(kept)
    assert lines(again, 0)
    for path in (run / SET).glob("shard-00001-*"):
        path.unlink()
    score, features = run / "eval" / "ddim4-step400-seed0.json", run / SET / "features-pixels-00001-of-00002.npy"
    for proof in (score, features):  # the other one alone
        kept = proof.read_bytes()
        proof.unlink()
        assert lines(again, 1)[f"{SET}/shard-00001-of-00002.npz"][0] == "missing"
        proof.write_bytes(kept)
    score.unlink()
    features.unlink()
    assert lines(again, 0)  # it may never have been made


def test_litter_of_other_systems_is_no_part_of_a_run_and_what_cannot_be_looked_into_hides_nothing_else(
    again: Shell,
) -> None:
    run = again.root / RUN
    for path in [p for p in run.rglob("*") if p.is_file() and p.parent.name not in ("tb", "logs")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    for path in [*(run / SET).glob("shard-*"), *(run / "events").glob("*.jsonl")]:
        shutil.copy(path, path.with_name(f"{path.stem} (copy){path.suffix}"))
    (run / "samples" / "lost+found").mkdir()
    assert {verdict for verdict, _ in lines(again, 0).values()} == {"holds"}
    (told,) = json.loads(again("status", RUN, "--json").stdout)
    assert told["samples"] == {"ddim4-step400-seed0": "2/2"} and told["problem"] is None
    (run / "checkpoints" / "step-000000500.json").symlink_to("/not/mounted")
    (told,) = json.loads(again("status", RUN, "--json").stdout)
    assert told["state"] == "complete" and told["saved_step"] == 400
    for name in ("events", "grids", f"{SET}/part", "checkpoints/set-aside"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).touch()
    bad = {what: why for what, (verdict, why) in lines(again, 1).items() if verdict in ("damaged", "missing")}
    assert set(bad) == {"events/", "grids/", SET, "checkpoints/set-aside/", "checkpoints/step-000000500",
                        "checkpoints/ by events/"}, bad  # fmt: skip
    assert all("Not a directory" in why or "/not/mounted" in why for why in bad.values())
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    told_of = lines(again, 1)
    assert told_of["checkpoints/"][0] == "damaged" and told_of[f"{SET}/request.json"][0] == "holds"


def test_where_every_checkpoint_is_damaged_all_say_that_none_goes_on(again: Shell) -> None:
    run = again.root / RUN
    for path in (run / "checkpoints").glob("step-*.pt"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    lines_told = again("recover", RUN).stdout.splitlines()
    verdicts = [line.split()[0] for line in lines_told[: lines_told.index("What can be done:")]]
    assert verdicts == sorted(verdicts, key="damaged".__eq__) and "damaged" in verdicts  # last, where they are seen
    told = lines_told[-1]
    assert told.endswith("a submission would be refused (none of its checkpoints holds)")
    done = again.submit("train.total_steps=500")
    assert done.returncode == 2 and "every checkpoint in" in done.stderr and "--rebuild" in done.stderr, done.stderr
    assert "it goes on from" not in done.stdout and "Traceback" not in done.stderr
    for words in (("export", RUN, "out"), ("sample", RUN, "--set", "x")):
        refused = again(*words)
        assert refused.returncode == 2 and "--start-over, or submit under" in refused.stderr, refused.stderr


def test_a_run_without_its_config_is_not_taken_for_another_recipe(again: Shell) -> None:
    run = again.root / RUN
    (run / "config.yaml").unlink()
    told = again.refused("submit", str(run), "--cluster", "local")
    anew = f"{run}/config.yaml is missing: restore it, or submit the run as it was begun, which writes it anew: python "
    assert anew in told and "did you mean" not in told
    (run / "run.json").write_text(json.dumps({"command": ["python", "launch/submit.py", str(run), "seed=0"]}))
    assert f"{run}/config.yaml is missing: restore it from a copy of the run" in again.refused("submit", str(run))


def test_a_copy_without_manifests_is_refused_by_submit_and_mended_by_rebuilding_them(again: Shell) -> None:
    run = again.root / RUN
    manifests = {p: p.read_bytes() for p in (run / "checkpoints").glob("step-*.json")}
    for path in manifests:
        path.unlink()
    message = again.refused("submit", "tiny.yaml", "--cluster", "local")
    assert "step-000000400.pt has no manifest" in message
    assert "rsync -a --checksum" in message and "launch/recover.py" in message and "--start-over" in message
    told = lines(again, 1)
    assert told["checkpoints/step-000000400"] == ("damaged", "no manifest; --rebuild makes one where it proves itself")
    done = again("recover", RUN, "--rebuild")
    assert done.returncode == 0, done.stdout + done.stderr
    for path, before in manifests.items():
        here, then = read(path), json.loads(before)
        assert here["rebuilt"] is True
        differ = {k for k in here.keys() | then.keys() if here.get(k) != then.get(k)}
        assert differ == {"rebuilt", "fence", "created", "self_sha256"}
    assert "rebuilt manifest" in lines(again, 0)["checkpoints/step-000000400"][1]
    done = again.submit("--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    nothing = "every checkpoint has its manifest: nothing to rebuild (without --rebuild: whether they hold)\n"
    assert again("recover", RUN, "--rebuild").stdout == nothing


def test_a_checkpoint_that_no_event_tells_of_may_be_anothers_and_one_that_events_deny_gets_no_manifest(
    again: Shell,
) -> None:
    run = again.root / RUN
    for path in (run / "events").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for event in (e for e in lines if e["event"] == "checkpoint"):
            sha256 = event.pop("sha256")  # as before events told it
            if event["step"] == 400:  # as if another run's lay there
                event["sha256"] = sha256[::-1]
        path.write_text("".join(json.dumps(event) + "\n" for event in lines))
    for path in (run / "checkpoints").glob("step-*.json"):
        path.unlink()
    done = again("recover", RUN, "--rebuild")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "step-000000400.pt: is not what this run saved at step 400" in done.stdout
    assert "step-000000200.pt: it fits the config, but no event tells of its save" in done.stdout
    (here,) = (read(path) for path in (run / "checkpoints").glob("step-*.json"))
    assert here["step"] == 200 and "run_id" not in here and "data_digest" not in here


def test_a_checkpoint_that_does_not_prove_itself_gets_no_manifest(again: Shell) -> None:
    checkpoints = again.root / RUN / "checkpoints"
    flipped(checkpoints / "step-000000400.pt")
    (checkpoints / "step-000000400.json").unlink()
    (checkpoints / "step-000000200.pt").rename(checkpoints / "step-000000300.pt")
    (checkpoints / "step-000000200.json").unlink()
    done = again("recover", RUN, "--rebuild")
    assert done.returncode == 1 and not list(checkpoints.glob("*.json")), done.stdout
    assert "step-000000300.pt: holds step 200" in done.stdout and done.stdout.count("left as it is") == 2


def test_a_config_that_was_changed_is_named_before_any_checkpoint_is_held_against_it(again: Shell) -> None:
    config = again.root / RUN / "config.yaml"
    (again.root / RUN / "checkpoints" / "step-000000400.json").unlink()
    config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
    assert "config.yaml was changed" in again.refused("recover", RUN, "--rebuild")
    (again.root / RUN / "run.json").unlink()  # nothing tells of it then but the checkpoints
    assert "belongs to other mathematics" in again("recover", RUN, "--rebuild").stdout


def test_what_proves_nothing_is_left_as_it_is_with_its_damaged_manifest(again: Shell) -> None:
    checkpoints = again.root / RUN / "checkpoints"
    flipped(checkpoints / "step-000000400.pt")
    for step in (200, 400):
        manifest = checkpoints / f"step-{step:09d}.json"
        manifest.write_text(manifest.read_text().replace('"created": "2', '"created": "3'))
    before = manifest.read_bytes()
    done = again("recover", RUN, "--rebuild")
    assert done.returncode == 1 and "step-000000400.pt" in done.stdout and "left as it is" in done.stdout, done.stdout
    assert manifest.read_bytes() == before
    assert [p.name for p in (checkpoints / "set-aside").iterdir()] == ["step-000000200.json"]
    assert read(checkpoints / "step-000000200.json")["rebuilt"] is True


def test_one_odd_name_does_not_keep_the_others_from_being_rebuilt(again: Shell) -> None:
    checkpoints = again.root / RUN / "checkpoints"
    for step in (200, 400):
        (checkpoints / f"step-{step:09d}.json").unlink()
    (checkpoints / "step-000000001.pt").symlink_to("nowhere")
    (checkpoints / "step-000000002.pt").mkdir()
    odd = ["step-300.pt", "step-٣.pt", "step-٠٠٠٠٠٠٣٠٠.pt"]
    for name in odd:
        shutil.copy(checkpoints / "step-000000200.pt", checkpoints / name)
    done = again("recover", RUN, "--rebuild")
    assert done.returncode == 1 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.count("rebuilt  ") == 2 and done.stdout.count("left as it is") == 5, done.stdout
    assert all(name in done.stdout for name in [*odd, "step-000000001.pt", "step-000000002.pt"])


def test_a_new_beginning_on_purpose_removes_nothing_and_ends_with_the_same_bits(again: Shell) -> None:
    run = again.root / RUN
    shutil.rmtree(run / "checkpoints")
    before = {p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in ("lock", "fence")}
    assert "events/ tells of saved step 400" in again.refused("submit", "tiny.yaml", "--cluster", "local")
    done = again("recover", RUN, "--start-over")
    assert done.returncode == 0, done.stdout + done.stderr
    assert before <= {p.read_bytes() for p in run.rglob("*") if p.is_file()}
    (aside,) = run.glob("set-aside-*")
    assert {p.name for p in aside.iterdir()} == {
        "events", "tb", "grids", "samples", "eval", "heartbeat.json", "metrics.jsonl",
    }  # fmt: skip
    done = again.submit("--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 20
    losses = [[r["loss"] for r in map(json.loads, where.read_text().splitlines())]
              for where in (run / "metrics.jsonl", aside / "metrics.jsonl")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize("lost", ["config.yaml", "run.json"])
def test_a_new_beginning_without_what_a_submission_needs_says_so(again: Shell, lost: str) -> None:
    (again.root / RUN / lost).unlink()
    advised = again("recover", RUN).stdout.partition("What can be done:")[2]
    assert "rsync" in advised and "--rebuild" not in advised and "--start-over" not in advised, advised
    done = again("recover", RUN, "--start-over")
    assert done.returncode == 0 and "it cannot go on as it is: " in done.stdout, done.stdout + done.stderr
    assert f"{lost} is missing" in done.stdout and "begins at step 0" not in done.stdout
    done = again.submit("--prepare")  # as it is told where config.yaml is lost
    assert (done.returncode == 0) == (lost == "config.yaml"), done.stdout + done.stderr


def test_folders_that_are_kept_elsewhere_stay_there_and_what_is_set_aside_can_be_reached(again: Shell) -> None:
    run, scratch = again.root / RUN, again.root.parent / "scratch"
    scratch.mkdir()
    for name in ("checkpoints", "metrics.jsonl"):
        (run / name).rename(scratch / name)
        (run / name).symlink_to(Path("../../scratch") / name)
    before = {p.name: p.read_bytes() for p in (scratch / "checkpoints").iterdir()}
    lines = (scratch / "metrics.jsonl").read_bytes()
    done = again("recover", RUN, "--start-over")
    assert done.returncode == 0, done.stdout + done.stderr
    (aside,) = run.glob("set-aside-*")
    assert {p.name: p.read_bytes() for p in (aside / "checkpoints").iterdir()} == before
    assert (aside / "metrics.jsonl").read_bytes() == lines and not (run / "metrics.jsonl").exists()
    assert (run / "checkpoints").resolve() == (scratch / "checkpoints").resolve()
    assert (run / "checkpoints").is_dir() and not list((run / "checkpoints").iterdir())


def test_a_folder_that_is_a_link_to_nothing_is_no_damage_of_other_files_and_its_mending_is_told(again: Shell) -> None:
    run = again.root / RUN
    (run / "checkpoints").rename(run.parent / "kept")
    (run / "checkpoints").symlink_to("/not/mounted")
    told = again("recover", RUN).stdout
    assert not re.search("^(damaged|missing) +(config.yaml|metrics|fence)", told, re.MULTILINE), told
    assert f"ln -sfn WHERE-IT-IS {run}/checkpoints" in told and "--rebuild" not in told and "Errno" not in told, told
    done = again("recover", RUN, "--start-over")
    assert done.returncode == 0 and "submit it again, and it begins at step 0" in done.stdout, done.stdout + done.stderr
    (aside,) = run.glob("set-aside-*")
    assert str((aside / "checkpoints").readlink()) == "/not/mounted"


@pytest.mark.parametrize("what", ["--rebuild", "--start-over"])
def test_a_run_that_a_live_job_holds_is_left_alone(again: Shell, what: str) -> None:
    with (again.root / RUN / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(b'{"job": "17", "restart": 0, "host": "n1"}\n')
        lock.flush()
        assert "held by job 17" in again.refused("recover", RUN, what)


def test_a_run_at_work_is_checked_and_not_changed(shell: Shell) -> None:
    done = shell.submit("train.total_steps=100000")
    assert done.returncode == 0, done.stdout + done.stderr
    pid = int(done.stdout.split("pid ")[1].split(";")[0])
    run = shell.root / RUN
    wait_for(lambda: (run / "heartbeat.json").exists(), "training")
    assert "is at work or in the queue" in shell("recover", RUN, "--start-over").stderr
    os.kill(pid, 15)
    wait_for(lambda: not is_alive(pid), "the end")


def test_what_is_no_run_is_said(shell: Shell) -> None:
    shell.root.mkdir()
    assert "no run 'nothing'" in shell.refused("recover", "nothing")


def test_what_tells_of_another_run_is_refused_by_name_and_a_renamed_run_goes_on(again: Shell) -> None:
    run, other = again.root / RUN, again.root / "renamed"
    record = read(run / "run.json")
    own = {key: value for key, value in record.items() if key != "self_sha256"}
    (run / "run.json").write_text(json.dumps(sign({**own, "run_id": "f" * 32})))  # as of a sibling with this config
    for script, *args in (["submit", "tiny.yaml", "--cluster", "local"], ["sample", RUN, "--dry-run"]):
        assert "step-000000400.json: is of another run (run_id" in again.refused(script, *args)
    job, out = again("jobs", "train", str(run)), again("export", RUN, str(again.cwd / "out"))
    for told in (job.stdout, out.stderr):
        assert "step-000000400.json: is of another run (run_id" in told, told
    assert (job.returncode, out.returncode) == (78, 2)
    assert "is of another run" in json.loads(again("status", RUN, "--json").stdout)[0]["problem"]
    assert "is of another run" in lines(again, 1)["checkpoints/step-000000400"][1]
    (run / "run.json").write_text(json.dumps(record))
    (run / "start.safetensors").write_bytes(b"of a sibling")
    assert "start.safetensors is there, and" in again.refused("submit", "tiny.yaml", "--cluster", "local")
    assert lines(again, 1)["start.safetensors"][0] == "damaged"
    (run / "start.safetensors").unlink()
    run.rename(other)
    again.submit("--name", "renamed", "train.total_steps=420", "--prepare")
    (other / "start.safetensors").write_bytes(b"of a sibling")
    job = again("jobs", "train", str(other))
    assert job.returncode == 78 and "start.safetensors is there, and" in job.stdout, job.stdout + job.stderr
    (other / "start.safetensors").unlink()
    done = again.submit("--name", "renamed", "train.total_steps=420", "--wait")
    assert done.returncode == 0 and read(other / "run.json")["run_id"] == record["run_id"], done.stdout + done.stderr
    assert read(other / "checkpoints" / "step-000000420.json")["run_id"] == record["run_id"]
