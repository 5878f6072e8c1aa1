"""--help and --dry-run load no torch, ask nobody and write nothing; what they print is what would be queued."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.config import reading
from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from ddpm.sampling.request import CheckpointRef
from launch import first, sample
from launch.queue.naming import name_of
from launch.queue.sets import request_for
from launch.terminal import faults
from tests.celeba import write_celeba
from tests.cli.harness import PROJECT, Shell, png, snapshot, write_zip

SCRIPTS = ["submit", "sample", "evaluate", "status", "board", "logs", "cancel", "remove", "export",
           "report", "doctor", "recover"]  # fmt: skip
SHELL_SCRIPTS = sorted([*(p for p in PROJECT.glob("slurm/*") if p.suffix != ".md"), *PROJECT.glob("tools/**/*.sh")])


def imports(shell: Shell, script: str, *args: str) -> tuple[str, set[str]]:
    """What the script printed, and the top-level packages that it imported."""
    argv, options = shell.command(script, *args)
    done = subprocess.run([argv[0], "-X", "importtime", *argv[1:]], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s*([\w.]+)$", done.stderr, re.M)
    assert "argparse" in names, "importtime printed nothing"
    return done.stdout, {name.split(".")[0] for name in names}


def dry_run(shell: Shell, *args: str) -> str:
    done = shell("submit", *args, "--dry-run", "--verbose")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_torch_and_shows_an_example(shell: Shell, script: str) -> None:
    text, loaded = imports(shell, script, "--help")
    assert f"python launch/{script}.py" in text
    assert loaded.isdisjoint({"torch", "torchvision", "sklearn", "PIL"})
    assert not shell.root.exists()


# measured on an idle 2-core machine: 0.18 s and 0.21 s (0.3 s with --then)
@pytest.mark.parametrize("args", [[], ["--then", "sample,evaluate"], ["--via", "sbatch"], ["--cluster", "local"]])
def test_dry_run_loads_no_torch_and_touches_nothing(shell: Shell, args: list[str]) -> None:
    text, loaded = imports(shell, "submit", "--dry-run", *args)
    assert "nothing was written or queued" in text and "name: cifar10" in text
    assert loaded.isdisjoint({"torch", "torchvision", "sklearn", "PIL"})
    assert not shell.root.exists()


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("sample", ["tiny", "--dry-run"]),
        ("evaluate", ["tiny", "--dry-run"]),
        ("status", ["--json"]),
        ("status", []),
        ("status", ["--events"]),
        ("status", ["--compare"]),
        ("logs", ["tiny"]),
        ("remove", ["tiny"]),
        ("board", ["--dry-run"]),
    ],
)
def test_looking_at_a_run_loads_no_torch_and_touches_nothing(finished: Shell, script: str, args: list[str]) -> None:
    before = snapshot(finished.root)
    _, loaded = imports(finished, script, *args)
    assert "torch" not in loaded
    assert snapshot(finished.root) == before


def test_dry_run_prints_the_config_that_would_be_frozen(shell: Shell) -> None:
    shown = dry_run(shell, "tiny.yaml", "train.lr=5e-4", "--name", "other", "--cluster", "local")
    assert shell.submit("train.lr=5e-4", "--name", "other", "--prepare").returncode == 0
    assert (shell.root / "other" / "config.yaml").read_text() in shown
    assert f"# run directory: {shell.root}/other" in shown


def test_a_dry_run_begins_with_what_is_asked_for_and_shows_scripts_where_they_are_wanted(shell: Shell) -> None:
    text = shell("submit", "--dry-run", "--time", "4h", "--nodes", "2", "--gpus-per-node", "a100:4").stdout
    model, data, steps, gpus, limit, cpus = text.splitlines()[:6]
    assert model.startswith("# model: U-Net without classes, 35.7 M parameters, channels 128 256 256 256")
    assert data.startswith("# data: cifar10, downloaded where it is missing, 32x32, 50,000 images")
    assert steps == "# steps: 800,000 of 128 images: 102,400,000 images (2,048 epochs)"
    assert gpus.startswith("# GPUs: 4 a100 on each of 2 nodes, 16 images a rank and step; about 3 GPU hours at 8,779")
    assert limit.startswith("# time: 4 h 00 min a job; 120 s before its end the run saves, goes back into the queue")
    assert cpus.startswith("# CPUs: as many as SLURM gives unasked, often one a rank; --cpus-per-task 4")
    for words in (["--cpus-per-task", "4"], ["--sbatch", "cpus-per-gpu=4"]):
        assert "# CPUs" not in shell("submit", "--dry-run", "--gpus-per-node", "4", *words).stdout
    assert "# CPUs" not in shell("submit", "--dry-run").stdout
    assert "#SBATCH" not in text and "--verbose shows the exact job script" in text
    assert "GPU hours unknown here" in shell("submit", "--dry-run", "model.base_channels=64").stdout
    small = shell("submit", "--dry-run", "tiny.yaml", "train.global_batch=2000", "--cluster", "local")
    assert "train.global_batch = 2000: the data has 1797 images" in small.stderr and "GPU hours" not in small.stdout


def test_a_dry_run_of_a_sweep_is_a_table_of_its_runs_and_what_is_asked_for_each(shell: Shell) -> None:
    swept = ["--sweep", "train.lr=1e-3,2e-3", "--sweep", "train.global_batch=8,16"]
    text, loaded = imports(shell, "submit", "tiny.yaml", *swept, "--cluster", "local", "--dry-run")
    assert "torch" not in loaded and not shell.root.exists()
    assert "# 4 runs, each:\n#   model: U-Net" in text
    assert "tiny-lr_2e-3-global_batch_16  0.002     16                  new\n" in text
    assert "# tiny-lr_1e-3-global_batch_8: steps: 400 of 8 images" in text


def test_a_run_is_called_after_its_data_and_recipe_where_nobody_says(shell: Shell) -> None:
    write_zip(shell.cwd / "my cats.zip", {f"{i}.png": png(16, i) for i in range(9)})
    cats = ["data.name=images", "data.path=my cats.zip"]

    def name(*args: str) -> str:
        return re.search(r"# run directory: \S+/(\S+)", dry_run(shell, *args, "train.global_batch=2"))[1]  # type: ignore[index]

    assert (
        name(*cats) == "my-cats" and name(str(PROJECT / "configs" / "cifar10-cosine.yaml"), *cats) == "my-cats-cosine"
    )
    assert name("tiny.yaml") == "tiny" and name("tiny.yaml", *cats) == "tiny"
    assert name(*cats, "--name", "cifar10") == "cifar10" and name(*cats, "name=cifar10") == "cifar10"
    (shell.cwd / "torchvision").mkdir()
    assert name("data.path=torchvision") == "cifar10"  # the same images elsewhere
    assert name("data.path=my cats.zip") == "my-cats"  # others, though the config says cifar10
    (shell.root / "cifar10").mkdir(parents=True)  # begun when the file's name was enough
    (shell.root / "cifar10" / "config.yaml").write_text(f"data: {{name: images, path: '{shell.cwd}/my cats.zip'}}\n")
    config = reading.load(
        PROJECT / "configs" / "cifar10.yaml", ["data.name=images", f"data.path={shell.cwd}/my cats.zip"]
    )
    assert name_of(config, shell.root) == "cifar10" and name_of(config, shell.cwd) == "my-cats"


def test_a_dry_run_refuses_data_that_is_not_there(shell: Shell) -> None:
    assert "data.path = " in shell.refused("submit", "--dry-run", "data.name=images", "data.path=nothing")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_its_environment_says_which_line_to_type(shell: Shell, script: str) -> None:
    argv, options = shell.command(script, "a run")
    done = subprocess.run([argv[0], "-S", "-E", *argv[1:]], capture_output=True, text=True, **options)
    assert done.returncode == 3 and done.stdout == "" and "Traceback" not in done.stderr
    assert f". {PROJECT}/tools/env.sh && python {argv[1]} 'a run'" in done.stderr and "lacks pydantic" in done.stderr


@pytest.mark.parametrize("tool", ["prefetch", "inspect_config", "convert_diffusers", "unpack_data"])
def test_a_tool_without_its_environment_says_so_too(tool: str) -> None:
    argv = [sys.executable, "-S", "-E", str(PROJECT / "tools" / f"{tool}.py")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 3 and "lacks pydantic" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "version", "told"),
    [("pydantic", "1.10.17", "pip install 'pydantic>=2.7'"), ("PyYAML", "5.4.1", "pip install 'pyyaml>=6.0'"),
     ("torch", "2.6.0a0+ecf3bae", ""), ("torch", "2.10.0", ""), ("torch", "unknown", "")],
)  # fmt: skip
def test_a_package_that_is_too_old_is_named_before_it_is_loaded(
    shell: Shell, package: str, version: str, told: str
) -> None:
    metadata = shell.cwd / f"{package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    argv, options = shell.command("submit", "--help")
    options["env"]["PYTHONPATH"] = os.pathsep.join([str(shell.cwd), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    assert done.returncode == (3 if told else 0) and "Traceback" not in done.stderr
    assert not told or (told in done.stderr and version in done.stderr)


def test_packages_that_a_module_shows_of_another_python_are_left_out(shell: Shell) -> None:
    own, other = (shell.cwd / "lib" / f"python3.{minor}" / "site-packages" for minor in (sys.version_info[1], 9))
    for place in (own, other):
        (place / "yaml").mkdir(parents=True)
        (place / "yaml" / "__init__.py").write_text("raise ImportError('of another Python')\n")
    argv, options = shell.command("submit", "--cluster", "local", "--dry-run", str(shell.cwd / "tiny.yaml"))
    before = os.environ.get("PYTHONPATH", "")
    for place, code in ((other, 0), (own, 1)):
        options["env"]["PYTHONPATH"] = os.pathsep.join([f"{place}/", before])  # Python takes the / away
        done = subprocess.run(argv, capture_output=True, text=True, **options)
        assert done.returncode == code, done.stderr


def test_a_library_of_another_compiler_is_named_with_the_variable_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = ImportError("IMPORTANT\n\nOriginal error was: /lib/libstdc++.so.6: version `GLIBCXX_3.4.29' not found\n")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert faults.words(error) is None
    monkeypatch.setenv("LD_LIBRARY_PATH", "/apps/gcc/4.8/lib64")
    told = faults.words(error) or ""
    assert told.startswith("/lib/libstdc++.so.6: version") and "LD_LIBRARY_PATH=/apps/gcc/4.8/lib64" in told
    assert faults.words(ImportError("No module named 'wandb'")) is None


def test_the_least_versions_that_scripts_ask_for_are_those_of_the_project() -> None:
    asked = re.findall(r'^  "([a-z]+)>=([0-9.]+)[",]', (PROJECT / "pyproject.toml").read_text(), re.M)
    assert {first.PACKAGES.get(name, name): least for name, least in first.NEEDED.items()}.items() <= set(asked)


EXAMPLES = [line.split("  ") for line in sample.EXAMPLES.splitlines() if "python launch/sample.py" in line]


@pytest.mark.parametrize("words", [e[1].split()[2:] for e in EXAMPLES], ids=" ".join)
def test_what_the_help_of_sampling_shows_can_be_asked_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    run = RunDir(tmp_path)
    shutil.copy(PROJECT / "configs" / f"{words[0]}.yaml", run.config)
    run.run_json.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    args = sample.parse()
    config = sample.sampling_config(args, run, None)
    assert request_for(run, config, CheckpointRef(1, ""), args.variance).num_samples > 0


def test_another_sampler_than_the_configs_does_not_take_over_its_eta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("sample: {eta: 0.5}\n")
    for sampler, eta in (("ancestral", 0.0), ("dpmpp_2m", 0.0), ("ddim", 0.5)):
        monkeypatch.setattr(sys, "argv", ["sample.py", "run", "--sampler", sampler])
        assert sample.sampling_config(sample.parse(), run, None).sample.eta == eta


@pytest.mark.parametrize(("words", "shards"), [([], 4), (["--num-samples", "3"], 3), (["--num-samples", "9"], 4)])
def test_a_small_set_has_no_more_shards_than_samples_unless_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], shards: int
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("sample: {num_samples: 64, shards: 4}\n")
    monkeypatch.setattr(sys, "argv", ["sample.py", "run", *words])
    assert sample.sampling_config(sample.parse(), run, None).sample.shards == shards
    monkeypatch.setattr(sys, "argv", ["sample.py", "run", "--num-samples", "3", "--shards", "4"])
    with pytest.raises(RequestError, match="shards = 4: at most"):
        sample.sampling_config(sample.parse(), run, None)


@pytest.mark.parametrize("word", ["-big cat", "3", "8"])
def test_one_class_goes_by_its_name_or_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    run = RunDir(tmp_path)
    run.config.write_text("data: {name: images, path: pets}\nmodel: {num_classes: 9}\nsample: {num_samples: 64}\n")
    names = ["dog", "3", "owl", "-big cat", *"abcde"]  # a name comes first
    run.run_json.write_text(json.dumps({"labels": {"classes": dict.fromkeys(names, 2)}}))
    label = {"-big cat": 3, "3": 1, "8": 8}[word]
    monkeypatch.setattr(sys, "argv", ["sample.py", "run", f"--class={word}", "--num-samples", "70"])
    plan = sample.sampling_config(sample.parse(), run, None).sample.class_plan
    assert plan == tuple(70 * (i == label) for i in range(9))
    told = "--class 3: the class of that name, number 1; for number 3: --class='-big cat'\n" if word == "3" else ""
    assert capsys.readouterr().err == told
    for words, told in ((["--class", "cow"], "--class: no class 'cow'; there are dog, 3, owl, -big cat, a"),
                        (["--class", "Big cat"], "; did you mean '-big cat'"),
                        (["--class", "9"], "--class: no class '9'")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["sample.py", "run", *words])
        with pytest.raises(RequestError, match=told):
            sample.sampling_config(sample.parse(), run, None)
    run.config.write_text("{}\n")
    with pytest.raises(RequestError, match="the model has no classes"):
        sample.sampling_config(sample.parse(), run, None)


# ---------------------------------------------------------------- how long


def frozen_steps(text: str) -> int:
    """The length in a frozen config or a dry run, which must be in steps alone."""
    assert "total_images: null" in text and "total_epochs: null" in text, text
    (steps,) = re.findall(r"total_steps: (\d+)", text)
    return int(steps)


@pytest.mark.parametrize(
    ("recipe", "steps"), [("cifar10-64-standard", 23_438), ("cifar10-cosine", 97_657), ("celeba-64", 254_329)]
)
def test_epochs_of_known_data_are_shown_as_steps(shell: Shell, recipe: str, steps: int) -> None:
    text = dry_run(shell, str(PROJECT / "configs" / f"{recipe}.yaml"), "--then", "sample")
    assert frozen_steps(text) == steps and f"-step{steps}-" in text
    assert not shell.root.exists()


def test_epochs_of_faces_that_are_yet_to_be_chosen_are_shown_as_epochs(shell: Shell) -> None:
    smiling = [str(PROJECT / "configs" / "celeba-64.yaml"), "data.attributes={Smiling: true}", "--then", "sample"]
    text = dry_run(shell, *smiling)
    assert "# steps: 200 epochs of 128 images a step (steps known once the data is packed)" in text
    assert "# then: sample, of a set that is named after the last step" in text and "total_epochs: 200" in text
    assert "None" not in text and "celeba-64-train" in text and "celeba-64-sample" not in text
    brief = [*smiling, "train.total_images=1000", "train.ema_warmup=true"]
    assert frozen_steps(dry_run(shell, *brief)) == 8  # of 128: any data will do


@pytest.mark.parametrize(("words", "steps"), [(["train.total_epochs=2"], 450), (["train.total_images=400"], 50)])
def test_a_length_in_epochs_or_images_is_frozen_in_steps_as_the_dry_run_shows(
    shell: Shell, words: list[str], steps: int
) -> None:
    shown = dry_run(shell, "tiny.yaml", *words, "--cluster", "local", "--then", "sample")
    assert f" ddim4-step{steps}-seed0 " in shown
    assert shell.submit(*words, "--prepare").returncode == 0
    frozen = (shell.root / "tiny" / "config.yaml").read_text()
    assert frozen in shown and frozen_steps(frozen) == steps  # of 8 images, of which there are 1,797


@pytest.mark.parametrize(("words", "num"), [([], 40), (["data.attributes={Smiling: true}"], 14)])
def test_epochs_of_faces_become_steps_of_as_many_as_were_packed(shell: Shell, words: list[str], num: int) -> None:
    """Also where the known size would say otherwise: what lies where a download would have put it is less."""
    write_celeba(shell.root / ".cache" / "data" / "celeba", zipped=True)
    words = ["data.name=celeba", *words, "train.total_epochs=4", "train.ema_warmup=true"]
    for _ in range(2):  # the second goes by what the first has kept
        done = shell.submit(*words, "--prepare")
        assert done.returncode == 0 and f"{num} images" in done.stdout, done.stderr
        assert frozen_steps((shell.root / "tiny" / "config.yaml").read_text()) == num * 4 / 8
    assert frozen_steps(dry_run(shell, "tiny.yaml", *words)) == num * 4 / 8


def test_epochs_of_a_run_are_of_the_images_that_it_was_made_for(shell: Shell) -> None:
    write_zip(shell.cwd / "a.zip", {f"{i}.png": png(16, i) for i in range(9)} | {"test/1.png": png()})
    words = ["data.name=images", "data.path=a.zip", "train.total_epochs=9", "train.ema_warmup=true"]
    assert frozen_steps(dry_run(shell, "tiny.yaml", *words)) == 11
    assert shell.submit(*words, "--prepare").returncode == 0
    (shell.cwd / "a.zip").unlink()
    assert frozen_steps(dry_run(shell, "tiny.yaml", *words)) == 11


def test_the_same_command_with_more_epochs_extends_a_run_and_the_same_length_otherwise_said_is_complete(
    again: Shell,
) -> None:
    assert "run tiny is complete: 400 steps" in again.submit("train.total_images=3200").stdout  # 400 steps of 8
    assert again.submit("train.total_epochs=2", "--prepare").returncode == 0
    assert frozen_steps((again.root / "tiny" / "config.yaml").read_text()) == 450


# ---------------------------------------------------------------- resources


OPTIONS = [
    *("--partition", "gpu,long", "--account", "lab", "--qos", "high", "--constraint", "a100|h100", "--exclude", "n1"),
    *("--time", "4h", "--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "6", "--mem", "32G"),
    *("--sbatch", "reservation=course", "--sbatch", "exclusive"),
]
WANTED = {
    "partition=gpu,long", "account=lab", "qos=high", "exclude=n1", "time=240", "nodes=2", "ntasks-per-node=4",
    "gpus-per-node=4", "cpus-per-task=6", "mem=32G", "reservation=course", "requeue", "open-mode=append",
    "signal=USR2@120", "exclusive", "constraint=a100|h100",
}  # fmt: skip


def sbatch_options(text: str, via: str) -> list[set[str]]:
    """The sbatch options of each job that a dry run shows, without the quotes that shell and sbatch take off."""
    text = text.replace("'", "")
    if via == "submitit":
        jobs = text.split("#!/bin/bash")[1:]
        return [set(re.findall(r"^#SBATCH --(\S+)$", job, re.M)) for job in jobs]
    return [set(re.findall(r"--([a-z]\S*)", line)) for line in re.findall(r"^sbatch --parsable.*$", text, re.M)]


@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_every_resource_option_reaches_the_script_on_both_paths(shell: Shell, via: str) -> None:
    text = dry_run(shell, "tiny.yaml", *OPTIONS, "--via", via)
    (options,) = sbatch_options(text, via)
    assert options >= WANTED, WANTED - options
    assert f"output={shell.root}/tiny/logs/train-%j.out" in options


def test_a_script_of_submitit_is_shown_with_the_flags_that_go_before_what_a_user_has_exported(shell: Shell) -> None:
    for job in dry_run(shell, "tiny.yaml", *OPTIONS, "--then", "sample,evaluate").split(", via submitit:\n")[1:]:
        flags = next(line for line in job.splitlines() if line.startswith("sbatch "))
        (in_script,) = sbatch_options(job, "submitit")
        assert set(re.findall(r"--([a-z]\S*)", flags.replace("'", ""))) == in_script - {"wckey=submitit"}


@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_the_chain_is_a_training_job_an_array_over_the_shards_and_a_score(shell: Shell, via: str) -> None:
    text = dry_run(
        shell,
        "tiny.yaml",
        *OPTIONS,
        "--via",
        via,
        "--then",
        "sample,evaluate",
        "sample.shards=8",
        "--max-parallel",
        "3",
    )
    train, sample, score = sbatch_options(text, via)
    assert "array=0-2%3" in sample and not any(o.startswith("array") for o in train | score)
    for later in (sample, score):
        assert later >= {"nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "account=lab", "requeue"}
    assert [next(o for o in job if o.startswith("job-name=")) for job in (train, sample, score)] == [
        "job-name=tiny-train",
        "job-name=tiny-sample",
        "job-name=tiny-evaluate",
    ]


@pytest.mark.parametrize(("limit", "lead"), [("4h", 120), ("6m", 120), ("3m", 60), ("1m", 20)])
def test_the_early_signal_takes_at_most_a_third_of_a_short_limit(shell: Shell, limit: str, lead: int) -> None:
    done = shell("submit", "tiny.yaml", "--time", limit, "--dry-run", "--verbose")
    assert f"signal=USR2@{lead}" in sbatch_options(done.stdout, "submitit")[0]
    assert ("ask for more" in done.stderr) is (limit == "1m"), done.stderr


@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_without_a_time_limit_the_partitions_own_holds(shell: Shell, via: str) -> None:
    (options,) = sbatch_options(dry_run(shell, "tiny.yaml", "--via", via), via)
    assert options and not any(o.startswith("time") for o in options)


def test_a_profile_is_overridden_by_the_command_line(shell: Shell) -> None:
    (shell.cwd / "site.yaml").write_text(
        "partition: slow\ntime: 2h\nmem: 1G\nsbatch: {nice: 100}\nsetup: [module load x]"
    )
    (options,) = sbatch_options(dry_run(shell, "tiny.yaml", "--profile", "site.yaml", "--partition", "gpu"), "submitit")
    assert options >= {"partition=gpu", "time=120", "mem=1G", "nice=100"}


def test_dry_run_on_this_machine_shows_the_processes(shell: Shell) -> None:
    text = dry_run(shell, "tiny.yaml", "--cluster", "local", "--tasks-per-node", "2", "--then", "sample,evaluate")
    run = f"{shell.root}/tiny"
    assert "--nproc-per-node=2" in text and f"-m launch.jobs train {run}\n" in text
    assert f"-m launch.jobs sample {run} ddim4-step400-seed0 --shards 0-1\n" in text
    assert f"-m launch.jobs evaluate {run} ddim4-step400-seed0\n" in text and "SBATCH" not in text


def test_later_stages_show_what_would_run_where_the_run_was_submitted_to(finished: Shell) -> None:
    shown = finished("sample", "tiny", "--set", "more", "--shards", "3", "--dry-run", "--verbose").stdout
    assert "--shards 0-2\n" in shown and "SBATCH" not in shown
    script = finished(
        "sample", "tiny", "--set", "more", "--shards", "3", "--cluster", "slurm", "--dry-run", "--verbose"
    ).stdout
    assert "#SBATCH --array=0-2%3" in script
    assert "launch.jobs evaluate" in finished("evaluate", "tiny", "--dry-run", "--verbose").stdout
    for more in ([], ["--cluster", "slurm"]):
        gpu = finished("sample", "tiny", "--set", "more", "--partition", "gpu", *more, "--dry-run", "--verbose").stdout
        assert "--partition=gpu" in gpu and "--gpus-per-node=1" in gpu  # of a run that was made here, too


def test_later_stages_show_their_job_scripts_when_asked_as_a_submission_does(finished: Shell) -> None:
    end = "# dry run: nothing was written or queued; --verbose shows the exact"
    asked = ["tiny", "--cluster", "slurm", "--partition", "gpu", "--dry-run"]
    shown = finished("sample", *asked, "--set", "more").stdout
    assert "#!/bin/bash" not in shown and "{'" not in shown and shown.endswith(f"{end} job script\n"), shown
    assert "# request:\ncheckpoint: {step: 400, sha256: " in shown and "\nsampler: ddim\n" in shown, shown
    assert "# sample: 2 tasks; GPUs of each: 1 on one node; time: no --time, so the partition's\n" in shown, shown
    for more, said in (
        ([], "# score: of sample set ddim4-step400-seed0, against train, by pixels\n"),
        (["--bits-per-dim", "--reference", "train"], "# bits-per-dim"),
        (["--save-stats", "x.npz"], "# statistics: of train, by pixels, to "),
    ):
        shown = finished("evaluate", *asked, *more).stdout
        assert said in shown and "#!/bin/bash" not in shown and shown.endswith(f"{end} job script\n"), shown
    for script in ("sample", "evaluate"):
        shown = finished(script, *asked, "--verbose").stdout
        assert "#!/bin/bash" in shown and shown.endswith("# dry run: nothing was written or queued\n"), shown
        assert "--verbose goes with --dry-run" in finished.refused(script, "tiny", "--verbose")


@pytest.mark.parametrize("via", ["submitit", "sbatch"])
def test_the_printed_scripts_are_bash_even_below_a_hostile_directory(shell: Shell, via: str) -> None:
    hostile = shell.cwd / "it's a $HOME & (more)"
    text = dry_run(shell, "tiny.yaml", "--root", str(hostile), "--via", via)
    script = text.partition("#!/bin/bash")[2] if via == "submitit" else text.partition("via sbatch:\n")[2]
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert script and done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda p: p.name)
def test_shell_scripts_parse(path: Path) -> None:
    if path.suffix not in (".sh", ".sbatch"):
        pytest.fail(f"{path}: neither .sh nor .sbatch")
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_templates_without_their_arguments_say_how_they_are_used(tmp_path: Path) -> None:
    for path in sorted(PROJECT.glob("slurm/*.sbatch")):
        done = subprocess.run(["bash", str(path)], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0 and f"slurm/{path.name} runs/NAME" in done.stderr


def test_a_template_that_is_submitted_from_elsewhere_ends_and_says_what_to_do(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    for path in sorted(PROJECT.glob("slurm/*.sbatch")):
        argv = ["bash", str(path), "runs/NAME", "SET"]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 2 and "submit from the project's root" in done.stderr, done.stderr


def after_supervise(tmp_path: Path, command: str, **env: str) -> str:
    """What `command` prints in a batch shell that has sourced slurm/supervise.sh, as a job of the run runs/NAME."""
    (tmp_path / "runs" / "NAME").mkdir(parents=True)
    (tmp_path / "runs" / "NAME" / "config.yaml").touch()
    given = {"DDPM_HOME": str(PROJECT), "DDPM_PYTHON": "true", "DDPM_RUN": "runs/NAME", "DDPM_STAGE": "train"}
    script = f". {PROJECT}/slurm/supervise.sh >/dev/null || exit 2; {command}"
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", **given, **env}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("cdpath", [".", "other"])
def test_a_run_is_found_though_the_user_has_a_cdpath(tmp_path: Path, cdpath: str) -> None:
    (tmp_path / "other" / "runs" / "NAME").mkdir(parents=True)
    shown = after_supervise(tmp_path, 'echo "$DDPM_RUN"', CDPATH=str(tmp_path / cdpath))
    assert shown == str(tmp_path / "runs" / "NAME")


@pytest.mark.parametrize("asked", ["", "6"])
def test_ranks_get_the_cpus_that_were_asked_for_and_sruns_own_choice_where_none_were(
    tmp_path: Path, asked: str
) -> None:
    env = {"SLURM_CPUS_PER_TASK": asked} if asked else {}
    assert after_supervise(tmp_path, 'echo "${SRUN_CPUS_PER_TASK-unset}"', **env) == (asked or "unset")


def test_a_full_log_is_no_missing_file(tmp_path: Path) -> None:
    command = f". {PROJECT}/slurm/supervise.sh >/dev/full && trap - EXIT && echo on"
    assert after_supervise(tmp_path, command).endswith("on")


# ---------------------------------------------------------------- by hand


def typed(shell: Shell, said: str) -> list[list[str]]:
    """The lines that --prepare printed, typed in another directory: DDPM_HOME, and the words, of each sbatch."""
    shell.put("sbatch", 'printf \'%s\\n\' "$DDPM_HOME" "$@" ""')
    lines = "\n".join(line for line in said.splitlines() if " sbatch " in line)
    env = {"PATH": str(shell.bin)}
    done = subprocess.run(["/bin/bash", "-c", lines], capture_output=True, text=True, cwd=shell.cwd, env=env)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [block.splitlines() for block in done.stdout.strip().split("\n\n")]


def test_the_line_that_prepare_prints_for_training_works_anywhere(shell: Shell) -> None:
    root = shell.cwd / "it's a $HOME"
    done = shell.submit("--root", str(root), "--account", "lab", "--prepare")
    assert done.returncode == 0, done.stderr
    ((home, *words),) = typed(shell, done.stdout)
    assert Path(home).parent == root / ".cache" / "code"
    assert {"--account=lab", "--export=ALL", "--requeue"} <= set(words)
    assert words[-2:] == [f"{home}/slurm/train.sbatch", str(root / "tiny")] and Path(words[-2]).is_file()


def test_the_lines_that_prepare_prints_for_sampling_ask_for_all_that_a_submission_would(again: Shell) -> None:
    again.put("sbatch", "exit 1")
    again.put("sinfo", 'echo "gpu|gpu:2"')
    again.put("scontrol", 'echo "MaxArraySize = 2"')
    asked = [
        "--partition",
        "gpu",
        "--account",
        "lab",
        "--qos",
        "high",
        "--time",
        "1h",
        "--mem",
        "8G",
        "--gpus-per-node",
        "2",
    ]
    sampling = ["--set", "many", "--shards", "3", "--cluster", "slurm", *asked]
    done = again("sample", "tiny", *sampling, "--prepare")
    assert done.returncode == 0 and "3 of 3 shards to make" in done.stdout, done.stderr
    ((home, *words),) = typed(again, done.stdout)
    assert Path(home).parent == again.root / ".cache" / "code"
    assert words[-5:] == ["many", "--shards", "0-2", "--tasks", "2"]
    wanted = {"account=lab", "qos=high", "time=60", "mem=8G", "gpus-per-node=2", "array=0-1%16"}
    assert {f"--{option}" for option in wanted} <= set(words)


def test_a_set_that_is_complete_needs_no_line(again: Shell) -> None:
    done = again("sample", "tiny", "--prepare")
    assert done.returncode == 0 and "0 of 2 shards" in done.stdout and "sbatch" not in done.stdout, done.stderr


def test_output_may_be_cut_short_or_go_to_a_terminal_without_unicode(shell: Shell) -> None:
    argv, options = shell.command("submit", "--help")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    options["env"]["PYTHONIOENCODING"] = "ascii"
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    assert done.returncode == 0 and "configs/quickstart.yaml" in done.stdout, done.stderr


def test_a_full_disk_below_the_output_is_one_message(shell: Shell) -> None:
    argv, options = shell.command("submit", "--dry-run")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, **options)
    assert done.returncode == 3 and done.stderr.startswith("error: No space left") and "Traceback" not in done.stderr


def test_a_dry_run_of_a_run_that_is_there_plans_what_is_left_of_it(finished: Shell) -> None:
    def told(*words: str) -> str:
        done = finished.submit("--dry-run", *words)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    before = snapshot(finished.root)
    text = told("--then", "sample,evaluate", "--verbose")
    assert "# training: complete at step 400, and nothing would be queued\n" in text
    assert all(word not in text for word in ("# steps", "# GPUs", "# time", "# then", "launch.jobs", "--verbose"))
    text = told("--then", "sample", "sample.seed=9", "--verbose")
    assert "# training: complete at step 400\n" in text and "# then: sample\n" in text and "jobs train" not in text
    assert "jobs sample" in text and "# steps" not in text
    longer = told("train.total_steps=800", "--verbose")
    assert "6,400 images" in longer.partition("; it goes on from step 400\n")[0] and "jobs train" in longer
    text = told("--sweep", "seed=0,1")
    assert "tiny-seed_0" in text and "new" in text and snapshot(finished.root) == before
