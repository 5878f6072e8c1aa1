"""A request that is wrong ends with exit code 2 and one message that names what is wrong; nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.harness import PROJECT, TINY_SET, Shell, png, read, snapshot, write_zip

CIFAR = str(PROJECT / "configs" / "cifar10.yaml")

# arguments of `submit.py tiny.yaml --cluster local`, and what the message must say
BAD = {
    "misspelt key": (["train.lerning_rate=1"], ["train.lerning_rate", "train."]),
    "misspelt key with a near match": (["train.warmup_step=1"], ["did you mean 'train.warmup_steps'"]),
    "misspelt section": (["trian.lr=1"], ["trian.lr", "train.lr"]),
    "a section as key": (["train=3"], ["'train' is a section", "train.lr"]),
    "no key": (["=3"], ["=3", "key=value"]),
    "word for a number": (["train.lr=fast"], ["train.lr", "fast", "number"]),
    "fraction for a count": (["train.total_steps=1.5"], ["train.total_steps", "1.5", "a whole number"]),
    "word for a list": (["model.channel_mults=2"], ["model.channel_mults", "list"]),
    "no value": (["train.lr="], ["train.lr", "None"]),
    "newline in a value": (["train.lr=1\n2"], ["train.lr"]),
    "no YAML": (["model.channel_mults=[1"], ["model.channel_mults=[1", "YAML"]),
    "negative": (["train.lr=-1"], ["train.lr", "-1", "more than 0"]),
    "infinite": (["train.lr=.inf"], ["train.lr", "finite"]),
    "dropout of one": (["model.dropout=1.0"], ["model.dropout", "less than 1"]),
    "seed beyond 63 bits": ([f"seed={2**63}"], ["seed", "less than"]),
    "unknown choice": (["sample.sampler=euler"], ["sample.sampler", "euler", "ddim"]),
    "micro_batch that does not divide": (["train.micro_batch=3"], ["train.micro_batch = 3", "[1, 2, 4, 8]"]),
    "an entity before a project": (
        ["log.wandb=a/b"],
        ["log.wandb = 'a/b': a project's name has 1 to 128 letters", "ENTITY/PROJECT is not taken"],
    ),
    "batch over three ranks": (["--tasks-per-node", "3"], ["global_batch = 8", "3 ranks", "[1, 2, 4, 8]"]),
    "two nodes on one machine": (["--nodes", "2"], ["--nodes 2", "--tasks-per-node"]),
    "no nodes": (["--nodes", "0"], ["nodes = 0"]),
    "data that is not there": (["data.name=images", "data.path=/nowhere"], ["data.path", "/nowhere", "does not exist"]),
    "images without a path": (["data.name=images"], ["data.path is needed"]),
    "validation without held-out images": (
        ["log.validate_every_steps=100"],
        ["log.validate_every_steps = 100", "no test split", "leave it out", "test/, beside train/"],
    ),
    "slash in the name": (["--name", "a/b"], ["run name 'a/b'"]),
    "space in the name": (["--name", "a b"], ["run name 'a b'"]),
    "leading dot": (["--name", ".a"], ["run name '.a'"]),
    "empty name": (["--name", ""], ["run name ''"]),
    "name in the config": (["name=a/b"], ["run name 'a/b'"]),
    "two configs": (["other.yaml"], ["more than one config file", "tiny.yaml other.yaml"]),
    "empty word": ([""], ["empty word"]),
    "time": (["--time", "soon"], ["time = 'soon'", "4h"]),
    "no time": (["--time", "0"], ["time = '0'"]),
    "mem": (["--mem", "lots"], ["mem = 'lots'", "32G"]),
    "partition with a space": (["--partition", "a b"], ["partition = 'a b'", "no spaces"]),
    "sbatch key": (["--sbatch", "Reservation=x"], ["--sbatch Reservation", "reservation=course"]),
    "sbatch key of ours": (["--sbatch", "output=x"], ["--sbatch output", "restarts"]),
    "beginning of a key of ours": (["--sbatch", "wra=true"], ["--sbatch wra", "wrap is set by the launcher"]),
    "gpus against tasks": (["--gpus-per-node", "2", "--tasks-per-node", "4"], ["--tasks-per-node 4"]),
    "then": (["--then", "sample,score"], ["--then sample,score", "sample,evaluate"]),
    "then evaluate alone": (["--then", "evaluate"], ["--then evaluate", "sample,evaluate"]),
    "one sample and its score": (
        ["--then", "sample,evaluate", "sample.num_samples=1", "sample.shards=1"],
        ["sample.num_samples = 1", "a score needs at least 2", "--then"],
    ),
    "profile": (["--profile", "locale"], ["--profile locale", "did you mean local?"]),
    "reference file": (
        ["--then", "sample,evaluate", "evaluate.reference=no.npz"],
        ["reference = /", "/elsewhere/no.npz"],
    ),
    "reference of one image": (
        ["--then", "sample,evaluate", "evaluate.reference=one"],
        ["/elsewhere/one: has one image", "at least 2"],
    ),
    "reference without images": (
        ["--then", "sample,evaluate", "evaluate.reference=none"],
        ["reference = /", "no images in this folder"],
    ),
    "split": (["--then", "sample,evaluate", "evaluate.reference=test"], ["reference = test", "['train']"]),
    "no epochs": (["train.total_epochs=0"], ["train.total_epochs", "0", "at least 1"]),
    "no length": (["train.total_steps=null"], ["train.total_steps", "total_epochs"]),
    "warm-up longer than the epochs": (
        ["train.total_epochs=1", "train.lr_schedule=cosine", "train.warmup_steps=225"],
        ["train.warmup_steps = 225", "train.total_steps = 225", "1797 images"],
    ),
    "epochs of data that is not there": (
        ["train.total_epochs=1", "data.name=images", "data.path=/nowhere"],
        ["data.path", "/nowhere", "does not exist"],
    ),
    "data of a user that there is not": (
        ["data.name=images", "data.path=~nobody-here/x"],
        ["data.path = ~nobody-here/x"],
    ),
    "misspelt option": (["--tasks-per-nod=e", "x"], ["--tasks-per-nod"]),
    "a number of thousands of digits": (["seed=" + "9" * 5000], ["seed=999", "a whole number of 5000 characters"]),
    "brackets without end": (["model.channel_mults=" + "[" * 50_000], ["model.channel_mults=[[", "levels deep"]),
    "a batch that nothing could hold": (["train.global_batch=1000000000000000"], ["train.global_batch", "at most"]),
    "a batch beyond this machine's memory": (
        ["train.global_batch=16777216", "model.base_channels=4096"],
        ["train.global_batch = 16777216", "keep at least", "train.micro_batch="],
    ),
    "scripts without a dry run": (["--verbose"], ["--verbose goes with --dry-run"]),
    "waiting for nothing": (["--prepare", "--wait"], ["--prepare queues nothing"]),
    "a time limit here": (
        ["--time", "1h", "--tasks", "2"],
        ["--time, --tasks: nothing heeds these", "--cluster slurm"],
    ),
    "unknown option": (["--partitoin", "gpu"], ["--partitoin", "did you mean --partition?"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_anything_is_written(shell: Shell, case: str) -> None:
    args, wanted = BAD[case]
    for folder in ("one", "none"):
        (shell.cwd / folder).mkdir()
    (shell.cwd / "one" / "0.png").write_bytes(png())
    message = shell.refused("submit", "tiny.yaml", "--cluster", "local", *args)
    assert [w for w in wanted if w not in message] == [], message
    assert not shell.root.exists()


CONFIGS: dict[str, tuple[bytes, str]] = {
    "a list": (b"- a\n- b\n", "found list"),
    "a word": (b"hello\n", "found str"),
    "not text": (b"\xff\xfe\x00", "cannot be read"),
    "a tab": (b"train:\n\tlr: 1\n", "not valid YAML"),
    "a key twice": (b"seed: 1\nseed: 2\n", "'seed' stands twice"),
    "a number as key": (b"1: 2\n", "unknown key '1'"),
    "an empty section": (b"log:\nseed: 1\n", "log = None: expected a section of keys (every_steps, "),
    "a billion laughs": (
        b"a0: &a0 [lol]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 12)),
        "more than fits with its aliases written out",
    ),
    "brackets without end": (b"[" * 100_000, "levels deep"),
    "far too long": (b"seed: 1 # " + b"x" * 300_000, "this is no config"),
    "an unknown section": (b"trainer: {lr: 1}\n", "unknown key 'trainer'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_file_that_is_no_config_is_refused(shell: Shell, case: str) -> None:
    content, wanted = CONFIGS[case]
    (shell.cwd / "bad.yaml").write_bytes(content)
    message = shell.refused("submit", "bad.yaml", "--cluster", "local")
    assert "bad.yaml" in message and wanted in message


def test_a_missing_config_file_is_named_with_its_nearest_match_wherever_the_user_stands(shell: Shell) -> None:
    assert f"did you mean {CIFAR}?" in shell.refused("submit", "configs/cifar11.yaml")
    assert "did you mean tiny.yaml?" in shell.refused("submit", "tyni.yaml")
    (shell.cwd / "none").mkdir()
    assert "no run there; name a run, or a config file" in shell.refused("submit", str(shell.cwd))
    (shell.cwd / "none" / "model.safetensors").touch()
    told = shell.refused("submit", "none")
    assert "python launch/submit.py none/config.yaml --from none --name NAME begins a run\n" in told


def test_a_run_to_go_on_that_is_not_there_is_spoken_of_as_a_run(shell: Shell) -> None:
    (shell.root / "there").mkdir(parents=True)
    (shell.root / "there" / "run.json").write_text("{}")
    message = shell.refused("submit", "runs/ther")
    assert "no run and no config file 'runs/ther'; in " in message and "there are: there (--root" in message
    assert message.endswith("did you mean there?\n"), message
    message = shell.refused("submit", "runs/NOSUCH")
    assert message.endswith("; python launch/submit.py --list shows the recipes\n") and ".yaml" not in message, message
    assert shell.refused("submit", "cifar10").endswith(f"did you mean {CIFAR}?\n")
    (shell.cwd / "tiny.yaml").unlink()
    message = shell.refused("submit", "NOSUCH.yaml")
    folder = str(PROJECT / "configs")
    assert f"there are, in {folder}: celeba-128.yaml, " in message and message.count(folder) == 1, message


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "no images": (lambda p: write_zip(p, {"a/readme.txt": b"x"}), "no images in this zip"),
    "empty": (lambda p: write_zip(p, {}), "no images in this zip"),
    "broken": (lambda p: p.write_bytes(b"PK\x03\x04 and then nothing"), "not a readable zip"),
    "truncated": (lambda p: p.write_bytes(write_zip(p, {"a/1.png": png()}).read_bytes()[:-30]), "not a readable zip"),
    "truncated image": (
        lambda p: write_zip(p, {"a/1.png": png(), "a/2.png": png()[:400]}),
        "a/2.png cannot be decoded",
    ),
    "text as image": (lambda p: write_zip(p, {"a/1.png": png(), "a/2.png": b"hello"}), "a/2.png cannot be decoded"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_zip_that_cannot_be_trained_on_is_refused_and_leaves_nothing(shell: Shell, case: str) -> None:
    write, wanted = DATA[case]
    write(shell.cwd / "images.zip")
    message = shell.refused("submit", "tiny.yaml", "--cluster", "local", "data.name=images", "data.path=images.zip")
    assert f"data.path = {shell.cwd}/images.zip" in message and wanted in message
    assert not shell.root.exists()


BAD_PROFILES = {
    "an unknown field": (b"partitionn: gpu\n", "did you mean 'partition'?"),
    "a list": (b"- a\n", "expected keys and values"),
    "sbatch as a list": (b"sbatch: [nice]\n", "sbatch = ['nice']"),
    "sbatch with a number as key": (b"sbatch: {2: 3}\n", "--sbatch 2"),
    "not text": (b"\xff", "cannot be read"),
    "braces without end": (b"{a: " * 50_000, "levels deep"),
    "a number of thousands of digits": (b"nodes: " + b"9" * 5000, "a whole number of 5000 characters"),
}


@pytest.mark.parametrize("case", BAD_PROFILES)
def test_a_broken_site_profile_is_refused(shell: Shell, case: str) -> None:
    content, wanted = BAD_PROFILES[case]
    (shell.cwd / "site.yaml").write_bytes(content)
    message = shell.refused("submit", "tiny.yaml", "--dry-run", "--profile", "site.yaml")
    assert "site.yaml" in message or "2" in wanted
    assert wanted in message


@pytest.mark.parametrize("script", ["sample", "evaluate", "status", "board"])
def test_an_unknown_run_is_refused_with_the_runs_there_are(shell: Shell, script: str) -> None:
    (shell.root / "there").mkdir(parents=True)
    (shell.root / "there" / "run.json").write_text("{}")
    message = shell.refused(script, "ther")
    assert "no run 'ther'" in message and "there are: there" in message


def test_a_checkpoint_set_or_split_that_does_not_exist_is_refused_with_those_that_do(finished: Shell) -> None:
    assert "no checkpoint of step 7; it has [200, 400]" in finished.refused("sample", "tiny", "--step", "7")
    assert "--steps 'x': must be a whole number" in finished.refused("sample", "tiny", "--steps", "x")
    assert "'bets' is neither a number nor best" in finished.refused("sample", "tiny", "--step", "bets")
    assert "sample set name 'a/b'" in finished.refused("sample", "tiny", "--set", "a/b")
    assert "sample.steps = 51: at most diffusion.timesteps = 50" in finished.refused("sample", "tiny", "--steps", "51")
    assert "no sample set 'no'; run tiny has ddim4-step400-seed0" in finished.refused("evaluate", "tiny", "--set", "no")
    assert "reference = test: digits has ['train']" in finished.refused("evaluate", "tiny", "--reference", "test")
    assert "use one of inception" in finished.refused("evaluate", "tiny", "--extractor", "vgg")
    assert "--prepare queues nothing" in finished.refused("sample", "tiny", "--prepare", "--wait")
    for other in ("--json", "--events"):
        assert "--watch shows runs as they stand" in finished.refused("status", "--watch", other)
    assert "--class cat --class 1: one class at a time" in finished.refused(
        "sample", "tiny", "--class", "cat", "--class", "1"
    )


def test_a_set_of_one_sample_is_not_scored(again: Shell) -> None:
    assert again("sample", "tiny", "--set", "one", "--num-samples", "1", "--shards", "1", "--prepare").returncode == 0
    assert "sample set one has 1 sample: a score needs at least 2" in again.refused("evaluate", "tiny", "--set", "one")


def test_a_set_begun_with_another_request_is_not_taken_for_the_one_asked_for(finished: Shell) -> None:
    args = ["tiny.yaml", "--cluster", "local", "--then", "sample,evaluate", "sample.num_samples=40"]
    assert "num_samples is 25 there and 40 asked for" in finished.refused("submit", *args)
    assert "num_samples is 25 there and 40" in finished.refused("sample", "tiny", "--num-samples", "40")


def test_a_set_of_another_step_is_not_taken_for_that_of_the_last(again: Shell) -> None:
    run = again.root / "tiny"
    shutil.rmtree(run / "samples" / TINY_SET)
    assert again("sample", "tiny", "--set", TINY_SET, "--step", "200", "--prepare").returncode == 0
    chain = ["tiny.yaml", "--cluster", "local", "--then", "sample,evaluate"]
    assert "checkpoint.step is 200 there and 400 asked for" in again.refused("submit", *chain)
    for path in run.glob("checkpoints/step-000000400.*"):  # the same is said before it is trained on
        path.unlink()
    assert "checkpoint.step is 200 there and 400 asked for" in again.refused("submit", *chain)


def test_what_the_sampler_has_no_use_for_is_refused(finished: Shell) -> None:
    eta = ["--sampler", "ancestral", "--eta", "0.5"]
    assert "eta = 0.5" in finished.refused("sample", "tiny", *eta)
    message = finished.refused("submit", "tiny.yaml", "--cluster", "local", "sample.sampler=dpmpp_2m", "sample.eta=0.5")
    assert "sample.eta = 0.5" in message
    for variance in ("fixed_small", "fixed_large"):  # whichever the config has
        message = finished.refused("sample", "tiny", "--variance", variance)
        assert f"variance = {variance}: only ancestral has one; with sampler = ddim leave it out" in message
    assert "invalid choice: 'small'" in finished.refused("sample", "tiny", "--variance", "small")


def test_classes_that_the_data_does_not_have_are_refused_without_the_data(shell: Shell) -> None:
    for option in ([], ["--dry-run"]):
        message = shell.refused("submit", "tiny.yaml", "data.name=cifar10", "model.num_classes=5", *option)
        assert "model.num_classes = 5" in message and "10" in message


def test_a_checkpoint_that_training_removes_while_a_set_of_it_is_asked_for_leaves_no_set(again: Shell) -> None:
    run = again.root / "tiny"
    fake_slurm(again)
    again.put("sinfo", f'/bin/rm {run}/checkpoints/step-000000200.*; echo "gpu|gpu:2"')
    done = again("sample", "tiny", "--set", "early", "--step", "200", "--cluster", "slurm", "--partition", "gpu")
    assert done.returncode == 2 and "checkpoint of step 200 was just removed" in done.stderr, done.stderr
    assert "there are [400]" in done.stderr and not (run / "samples" / "early").exists()


def test_a_run_with_other_mathematics_is_refused_by_the_key_and_left_as_it_is(shell: Shell) -> None:
    assert shell.submit("--prepare").returncode == 0
    for option in ([], ["--dry-run"]):
        message = shell.refused(
            "submit", "tiny.yaml", "--cluster", "local", "train.lr=2e-3", "log.every_steps=7", *option
        )
        assert "train.lr is 0.001 there and 0.002 here" in message and "log" not in message


def test_a_cosine_run_cannot_be_extended_because_its_learning_rate_depends_on_the_length(shell: Shell) -> None:
    assert shell.submit("train.lr_schedule=cosine", "--prepare").returncode == 0
    message = shell.refused(
        "submit", "tiny.yaml", "--cluster", "local", "train.lr_schedule=cosine", "train.total_steps=500"
    )
    assert "train.total_steps is 400 there and 500 here" in message
    message = shell.refused(
        "submit", "tiny.yaml", "--cluster", "local", "train.lr_schedule=cosine", "train.total_epochs=2"
    )
    assert "train.total_steps is 400 there and 450 here" in message
    assert "With train.lr_schedule=cosine the learning rate of every step follows from the length" in message
    both = ["train.lr_schedule=cosine", "train.total_steps=500", "train.lr=1e-3", "seed=1"]
    assert "follows from the length" not in shell.refused("submit", "tiny.yaml", "--cluster", "local", *both)


@pytest.mark.parametrize(("typed", "meant"), [
    (["--lr", "1e-4"], "train.lr=1e-4"), (["--total-steps=5"], "train.total_steps=5"),
    (["--data.path", "/x"], "data.path=/x"), (["--steps", "--wait"], "train.total_steps=… or sample.steps=…"),
    (["--batch-size", "32"], "train.global_batch=32 or sample.batch=32"),
    (["--partitoin", "gpu"], "--partition"),
])  # fmt: skip
def test_a_key_that_was_typed_as_an_option_is_recognised(shell: Shell, typed: list[str], meant: str) -> None:
    assert f"did you mean {meant}?" in shell.refused("submit", *typed)


def test_who_typed_a_wrong_value_is_told_and_not_the_file(finished: Shell) -> None:
    assert finished.refused("submit", "tiny.yaml", "train.lr=fast").startswith("error: command line: train.lr = 'fast'")
    assert finished.refused("sample", "tiny", "--steps", "60").startswith("error: command line: sample.steps = 60")
    (finished.cwd / "bad.yaml").write_text("train: {lr: fast}\n")
    for more in ([], ["train.total_steps=5"]):
        assert finished.refused("submit", "bad.yaml", *more).startswith("error: bad.yaml: train.lr = 'fast'")


def test_a_word_that_sbatch_would_not_know_is_refused_and_its_flags_are_not(shell: Shell) -> None:
    assert "--sbatch foo: needs a value" in shell.refused("submit", "--dry-run", "--sbatch", "foo")
    assert shell("submit", "--dry-run", "--sbatch", "exclusive").returncode == 0


def test_more_gpus_than_a_node_has_are_refused_before_anything_is_written(shell: Shell) -> None:
    fake_slurm(shell)
    shell.put("sinfo", 'echo "gpu|gpu:2"')
    asked = ["--cluster", "slurm", "--via", "sbatch", "--partition", "gpu", "--gpus-per-node", "4"]
    assert "no node of gpu has more than 2" in shell.refused("submit", "tiny.yaml", *asked)


@pytest.mark.parametrize("length", ["total_steps=100", "total_epochs=1", "total_images=3192"])
def test_a_run_is_not_made_shorter_than_it_is(finished: Shell, length: str) -> None:
    for option in ([], ["--dry-run"]):
        message = finished.refused("submit", "tiny.yaml", "--cluster", "local", f"train.{length}", *option)
        assert "already at step 400" in message


@pytest.mark.parametrize("words", [[], ["train.total_epochs=1"]])
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_a_name_that_something_else_has_is_refused(
    shell: Shell, make: Callable[[Path], None], words: list[str]
) -> None:
    shell.root.mkdir()
    make(shell.root / "tiny")
    assert "exists and is no run" in shell.refused("submit", "tiny.yaml", "--cluster", "local", *words)


def test_two_lengths_in_a_file_are_refused(shell: Shell) -> None:
    (shell.cwd / "two.yaml").write_text("train: {total_steps: 10, total_epochs: 1}\n")
    message = shell.refused("submit", "two.yaml", "--cluster", "local")
    assert "train.total_steps = 10, train.total_epochs = 1: only one" in message


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_root_that_cannot_be_written_is_what_the_machine_lacks(shell: Shell, below: str) -> None:
    (shell.cwd / "file").touch()
    args = ["tiny.yaml", "--cluster", "local", "--root", f"file{below}"]
    assert "choose another place with --root" in shell.refused("submit", *args, code=3)


# ---------------------------------------------------------------- SLURM that is not there, or says no


def test_slurm_asked_for_where_there_is_none_exits_3_and_names_the_way_out(shell: Shell) -> None:
    for args in ([], ["--cluster", "slurm"], ["--partition", "gpu"]):
        assert "--cluster local" in shell.refused("submit", "tiny.yaml", *args, code=3)
    assert not shell.root.exists()


@pytest.mark.parametrize(
    "args", [["train.lr=x"], ["--tasks-per-node", "3"], ["data.name=images", "data.path=/nowhere"], ["--then", "score"]]
)
def test_what_is_wrong_with_the_request_is_said_before_what_the_machine_lacks(shell: Shell, args: list[str]) -> None:
    shell.refused("submit", "tiny.yaml", *args, code=2)


def fake_slurm(shell: Shell) -> None:
    shell.put("sinfo", 'echo "gpu|gpu:2"; echo "long|(null)"')
    shell.put("squeue", "exit 0")
    shell.put("srun", "exit 1")
    shell.put("scontrol", "exit 1")
    shell.put("sbatch", 'echo "sbatch: error: Invalid account" >&2; exit 1')


def test_a_partition_that_does_not_exist_is_refused_with_the_nearest(shell: Shell) -> None:
    fake_slurm(shell)
    assert "did you mean gpu?" in shell.refused("submit", "tiny.yaml", "--partition", "gpus")
    assert "it has gpu, long" in shell.refused("submit", "tiny.yaml", "--partition", "xyz")
    assert not shell.root.exists()


@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_a_run_that_slurm_refuses_is_removed_again_and_its_words_are_passed_on(shell: Shell, via: str) -> None:
    fake_slurm(shell)
    done = shell("submit", "tiny.yaml", "--partition", "gpu", "--via", via)
    assert done.returncode == 2 and "Invalid account" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert [p for p in shell.root.iterdir() if p.name != ".cache"] == []


def test_a_machine_with_sbatch_but_no_srun_is_told_what_to_do(shell: Shell) -> None:
    fake_slurm(shell)
    (shell.bin / "srun").unlink()
    assert "--via sbatch" in shell.refused("submit", "tiny.yaml", "--partition", "gpu", code=3)


def test_a_run_that_was_there_before_survives_slurms_refusal(shell: Shell) -> None:
    fake_slurm(shell)
    assert shell.submit("--prepare").returncode == 0
    created = read(shell.root / "tiny" / "run.json")["created"]
    done = shell("submit", "tiny.yaml", "--partition", "gpu")
    assert done.returncode == 2, done.stderr
    assert json.loads((shell.root / "tiny" / "run.json").read_text())["created"] == created
    assert snapshot(shell.root / "tiny" / "checkpoints") == {}


# ---------------------------------------------------------------- data that changed, or is damaged


def classes_of(shell: Shell, *names: str) -> list[str]:
    """Words that submit images in class folders of these names, to a model of as many classes."""
    for i, name in enumerate(names):
        (shell.cwd / "images" / name).mkdir(parents=True)
        for j in range(4):
            (shell.cwd / "images" / name / f"{j}.png").write_bytes(png(8, seed=4 * i + j))
    return ["data.name=images", "data.path=images", f"model.num_classes={len(names)}"]


def test_a_run_is_not_gone_on_with_where_its_images_have_other_classes(shell: Shell) -> None:
    words = classes_of(shell, "cat", "dog")
    done = shell.submit("--prepare", *words)
    assert done.returncode == 0 and "\nclasses: 0 = cat (4), 1 = dog (4)\n" in done.stdout, done.stdout + done.stderr
    assert read(shell.root / "tiny" / "run.json")["labels"]["classes"] == {"cat": 4, "dog": 4}
    images = shell.cwd / "images"
    (images / "dog").rename(images / "hound")
    frozen = snapshot(shell.root / "tiny")
    done = shell.submit("--prepare", *words)
    assert done.returncode == 2 and "class 1 was 'dog' and is 'hound' now; put them back" in done.stderr, done.stderr
    (images / "hound").rename(images / "dog")
    for j in (0, 1):  # the order of all images stays
        (images / "dog" / f"{j}.png").rename(images / "cat" / f"{j + 4}.png")
    done = shell.submit("--prepare", *words)
    assert done.returncode == 2 and "'cat' had 4 images and has 6, 'dog' had 4" in done.stderr, done.stderr
    assert snapshot(shell.root / "tiny") == frozen


def test_a_model_without_classes_does_not_mind_what_they_are_called(shell: Shell) -> None:
    words = [*classes_of(shell, "cat", "dog")[:2]]
    assert shell.submit("--prepare", *words).returncode == 0
    (shell.cwd / "images" / "dog").rename(shell.cwd / "images" / "hound")
    done = shell.submit("--prepare", *words)
    assert done.returncode == 0, done.stderr
    (shell.cwd / "images" / "cat").rename(shell.cwd / "images" / "pussycat")  # the hounds come first now
    done = shell.submit("--prepare", *words)
    assert done.returncode == 2 and "begun with other pixels" in done.stderr and "'cat'" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["images.npy", "meta.json"])
def test_a_damaged_cache_stops_no_submission(shell: Shell, name: str) -> None:
    assert shell.submit("--prepare").returncode == 0
    (path,) = shell.root.glob(f".cache/data/*/{name}")
    good = path.read_bytes()
    path.unlink()
    if name == "images.npy":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    done = shell.submit("--prepare")
    assert done.returncode == 0 and "is damaged: packing it again" in done.stdout, done.stdout + done.stderr
    assert path.read_bytes() == good


def test_a_batch_larger_than_the_data_is_warned_of(shell: Shell) -> None:
    done = shell.submit("--prepare", "train.global_batch=1800")
    assert done.returncode == 0 and "train.global_batch = 1800: the data has 1797 images" in done.stderr, done.stderr
