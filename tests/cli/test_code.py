"""The code of a run is frozen with it: what is edited later changes no run that was begun before, but on purpose."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.harness import Shell, events, read
from tests.conftest import PROJECT


class Checkout:
    """A copy of the project, which may be edited."""

    def __init__(self, shell: Shell, where: Path) -> None:
        self.shell = shell
        self.path = where
        for name in ("ddpm", "launch", "slurm", "configs"):
            # with its bytecode, which takes longer to make than to copy; not what another test is just making of it
            shutil.copytree(PROJECT / name, where / name, ignore=shutil.ignore_patterns("*.pyc.*"))

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.path / name).read_text()
        assert old in text
        (self.path / name).write_text(text.replace(old, new))

    def __call__(self, script: str, *words: str) -> subprocess.CompletedProcess[str]:
        argv, options = self.shell.command(script, *words)
        options["env"] |= {"PYTHONPATH": ""}
        argv = [sys.executable, str(self.path / "launch" / f"{script}.py"), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=240, **options)

    def train(self, steps: int, *words: str) -> subprocess.CompletedProcess[str]:
        return self("submit", "tiny.yaml", f"train.total_steps={steps}", "--cluster", "local", "--wait", *words)


def logs(run: Path) -> str:
    return "".join(p.read_text() for p in sorted(run.joinpath("logs").glob("*.out")))


@pytest.mark.long
def test_code_edited_after_a_run_was_begun_is_run_only_where_it_is_asked_for(shell: Shell, tmp_path: Path) -> None:
    checkout, run = Checkout(shell, tmp_path / "checkout"), shell.root / "tiny"
    begun = checkout.train(2)
    assert begun.returncode == 0 and "code:" not in begun.stdout, begun.stdout + begun.stderr

    checkout.edit("ddpm/training/step.py", "\nclass Step:", '\nprint("edited")\n\n\nclass Step:')
    kept = checkout.train(4)
    assert kept.returncode == 0 and "edited" not in logs(run), kept.stdout + kept.stderr
    said = "this checkout has ddpm/training/step.py +3 -0. --code new takes it"
    assert "code: run tiny keeps its own, " in kept.stderr and said in kept.stderr

    new = checkout.train(6, "--code", "new")
    assert new.returncode == 0 and "edited" in logs(run), new.stdout + new.stderr
    assert "code: from now on that of this checkout" in new.stdout and "step.py +3 -0" in new.stdout
    codes = [e["code"] for e in events(run) if e["event"] == "allocated"]
    assert codes == [e["code"] for e in events(run) if e["event"] == "submitted"]
    assert codes[0] == codes[1] != codes[2] and len(codes) == 3

    packed = (run / "code.zip").read_bytes()
    (run / "code.zip").unlink()
    shutil.rmtree(shell.root / ".cache" / "code")
    checkout.edit("ddpm/training/step.py", 'print("edited")', 'print("edited again")')
    gone = checkout.train(8)
    assert gone.returncode == 2, gone.stderr
    assert f"code.zip is not there, and jobs of the run were last sent with {codes[2]}" in gone.stderr
    (run / "code.zip").write_bytes(packed)

    checkout.edit("ddpm/training/trainer.py", "\nclass ", "\nclass class ")
    broken = checkout.train(8)
    assert broken.returncode == 0, broken.stdout + broken.stderr
    refused = checkout.train(10, "--code", "new")
    assert refused.returncode == 2 and "trainer.py, line" in refused.stderr and "Traceback" not in refused.stderr
    assert "no job could run this code (invalid syntax)" in refused.stderr


def test_new_code_is_refused_while_a_job_goes_on_with_the_old(shell: Shell, tmp_path: Path) -> None:
    checkout = Checkout(shell, tmp_path / "checkout")
    shell.put("sbatch", "echo 101")
    shell.put("squeue", 'echo "101 101 PENDING"')
    shell.put("sinfo", 'echo "gpu|gpu:2"')
    shell.put("scontrol", "exit 1")
    words = ("tiny.yaml", "--cluster", "slurm", "--via", "sbatch", "--partition", "gpu")
    assert (queued := checkout("submit", *words)).returncode == 0, queued.stderr
    checkout.edit("ddpm/training/step.py", "\nclass Step:", '\nprint("edited")\n\n\nclass Step:')
    again = checkout("submit", *words, "--code", "new")
    assert again.returncode == 2 and "--code new: job 101 of run tiny would go on" in again.stderr, again.stderr


@pytest.mark.long
def test_a_set_that_other_code_has_made_is_told_of_and_its_score_names_that_code(shell: Shell, tmp_path: Path) -> None:
    checkout, run = Checkout(shell, tmp_path / "checkout"), shell.root / "tiny"
    assert checkout.train(2).returncode == 0
    words = ("sample", "tiny", "--num-samples", "4", "--shards", "2", "--set", "mine", "--cluster", "local", "--wait")
    first = checkout(*words)
    assert first.returncode == 0 and "warning" not in first.stderr, first.stdout + first.stderr
    made_by = read(run / "samples" / "mine" / "shard-00000-of-00002.json")["code"]
    assert made_by == next(e["code"] for e in events(run) if e["event"] == "allocated")

    checkout.edit("ddpm/diffusion/samplers.py", "SAMPLERS: dict", "# another sampler\nSAMPLERS: dict")
    kept = checkout(*words)
    told = f"shards of mine were made by the code {made_by}; this checkout has ddpm/diffusion/samplers.py +1 -0"
    assert kept.returncode == 0 and f"{told}. To sample with that, give another --set and --code new" in kept.stderr

    (run / "samples" / "mine" / "shard-00001-of-00002.json").unlink()
    refused = checkout(*words, "--steps", "3", "--code", "new")
    assert refused.returncode == 2 and "exists with another request: steps" in refused.stderr, refused.stderr
    assert "code:" not in refused.stdout and not list(run.glob("code-*.zip"))
    mixed = checkout(*words, "--code", "new")
    assert mixed.returncode == 0 and f"{told}. To sample with that, give another --set\n" in mixed.stderr, mixed.stderr
    (run / "samples" / "mine" / "shard-00000-of-00002.json").unlink()
    back = checkout(*words, "--code", made_by)
    other = f"; the code {made_by} has ddpm/diffusion/samplers.py +0 -1. To sample with that, give another --set\n"
    assert back.returncode == 0 and other in back.stderr, back.stderr
    scored = checkout("evaluate", "tiny", "--set", "mine", "--cluster", "local", "--wait", "--json")
    assert scored.returncode == 0, scored.stderr
    codes = read(run / "eval" / "mine.json")["samples_code"]
    assert len(codes) == 2 and made_by in codes


@pytest.mark.long
def test_a_sampler_that_the_runs_own_code_does_not_know_is_refused_before_its_set_is_begun(
    shell: Shell, tmp_path: Path
) -> None:
    checkout, run = Checkout(shell, tmp_path / "checkout"), shell.root / "tiny"
    assert checkout.train(2).returncode == 0
    checkout.edit("ddpm/config/sample.py", '"dpmpp_2m": Kind(20)', '"dpmpp_2m": Kind(20), "mine": Kind(3)')
    checkout.edit("ddpm/diffusion/samplers.py", '"dpmpp_2m": dpmpp_2m', '"dpmpp_2m": dpmpp_2m, "mine": ddim')
    words = ("sample", "tiny", "--sampler", "mine", "--num-samples", "4", "--cluster", "local", "--wait")
    refused = checkout(*words)
    assert refused.returncode == 2 and "sample.sampler = 'mine'" in refused.stderr, refused.stderr
    assert "--code new" in refused.stderr and not (run / "samples" / "mine3-step2-seed0").exists()
    complete = checkout.train(2, "--code", "new")
    assert complete.returncode == 0 and "--code new: nothing is left to be made" in complete.stderr, complete.stderr
    assert not list(run.glob("code-*.zip"))
    made = checkout(*words, "--code", "new")
    assert made.returncode == 0 and (run / "samples" / "mine3-step2-seed0").exists(), made.stdout + made.stderr


@pytest.mark.long
def test_a_run_that_has_saved_nothing_takes_the_mended_code_by_itself(shell: Shell, tmp_path: Path) -> None:
    checkout, run = Checkout(shell, tmp_path / "checkout"), shell.root / "tiny"
    checkout.edit("ddpm/training/step.py", "\nclass Step:", "\nthis_is_a_mistake\n\n\nclass Step:")
    failed = checkout.train(2)
    assert failed.returncode == 1 and "NameError" in failed.stdout + failed.stderr
    checkout.edit("ddpm/training/step.py", "\nthis_is_a_mistake\n\n\n", "\n# mended\n")
    kept = checkout.train(2, "--code", "kept")
    assert kept.returncode == 1 and "NameError" in kept.stdout + kept.stderr
    mended = checkout.train(2)
    assert mended.returncode == 0 and "code: from now on that of this checkout" in mended.stdout, mended.stderr
    assert len(list(run.glob("code-*.zip"))) == 1
