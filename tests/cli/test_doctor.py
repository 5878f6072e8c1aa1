"""doctor.py where there is no cluster; tests/slurm/test_sites.py has it on one."""

import re

from tests.cli.harness import Shell
from tests.images import write_zip


def test_without_slurm_it_says_what_lacks_and_what_to_do(shell: Shell) -> None:
    done = shell("doctor", "tiny.yaml", "--partition", "gpu")
    assert done.returncode == 3 and done.stderr == ""
    assert "fail  no sbatch, srun, scontrol, squeue, scancel, sinfo here\n" in done.stdout
    assert "log in to the login node" in done.stdout


def test_a_slurm_that_does_not_answer_and_a_place_that_cannot_be_written_are_named(shell: Shell) -> None:
    for name in ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo"):
        shell.put(name, f'echo "{name}: error: Unable to contact slurm controller (connect failure)" >&2; exit 1')
    in_the_way = shell.cwd / "file"
    in_the_way.touch()
    done = shell("doctor", "tiny.yaml", "--root", str(in_the_way / "runs"))
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert f"fail  {in_the_way / 'runs'} cannot be written (Not a directory)" in done.stdout
    assert "fail  scontrol: error: Unable to contact slurm controller" in done.stdout
    assert "→ is this the login node, and SLURM_CONF" in done.stdout


def test_data_of_ones_own_are_looked_at_as_a_submission_does(shell: Shell) -> None:
    (shell.cwd / "empty").mkdir()
    write_zip(shell.cwd / "images.zip")
    words = ["tiny.yaml", "data.name=images"]
    done = shell("doctor", *words, "data.path=empty")
    assert "fail  data.path = empty: no images in this folder; expected CLASS/NAME.png" in done.stdout
    assert re.search(
        r"pass  data.path = images.zip: \d+ images to train on", shell("doctor", *words, "data.path=images.zip").stdout
    )


def test_the_space_is_that_of_the_config_given_whatever_its_file_says(shell: Shell) -> None:
    def told(*words: str) -> str:
        done = shell("doctor", *words, "checkpoint.milestone_every_steps=100", "train.total_steps=200")
        return re.search(r"a run has about (.*) in the end", done.stdout)[1]

    header = "# Network: 35,746,307 parameters.\n"
    (shell.cwd / "mine.yaml").write_text(header + "model: {base_channels: 8}\nsample: {num_samples: 10, shards: 1}\n")
    assert told("mine.yaml").endswith("MiB") and told("mine.yaml", "model.base_channels=256").endswith("GiB")


def test_what_makes_no_sense_is_refused(shell: Shell) -> None:
    assert "nothing to ask" in shell.refused("doctor", "--cluster", "local")
    assert "no such" in shell.refused("doctor", "--profile", "nowhere")
    for seconds in ("-3", "nan", "inf"):
        assert "more than 0, as 300" in shell.refused("doctor", "--probe", "--wait-s", seconds)
    assert "--wait-s 5: goes with --probe" in shell.refused("doctor", "--wait-s", "5")
    assert "configs/cifar10.yaml?" in shell.refused("doctor", "cifar-10.yaml")
    (shell.cwd / "there.yaml").touch()
    assert "exists; choose another name" in shell.refused("doctor", "--write-profile", "there.yaml")
    assert "not allowed" in shell.refused("doctor", "--write-profile", "../etc/x")
