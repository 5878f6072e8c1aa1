"""launch/cluster: what a site's words for GPUs, memory and limits become in a job."""

import argparse
import resource
from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from launch.cluster import slurm
from launch.cluster.job import Job
from launch.cluster.options import add_options, resolve
from launch.cluster.partitions import gpus_of, partitions
from launch.cluster.settling import settle
from launch.cluster.site import Site

SINFO = """\
gpu*|gpu:a100:4(S:0-1)|1-00:00:00
old|gpu:tesla:v100:4|infinite
mixed|gpu:a100:no_consume:4(S:0-1)|infinite
mixed|gpu:h100:8,lscratch:1000|infinite
plain|gpu:2|30:00
bare|gpu|infinite
cpu|(null)|2-00:00:00
memory|gpumem:80G,shard:gpu:8|infinite
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "run", lambda argv, **_: SINFO)
    monkeypatch.setattr(slurm, "available", lambda command="sbatch": True)
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)


def resolved(
    tmp_path: Path, *words: str, profile: str = "", stage: str = "train", also: str | None = None, **base: Any
) -> Site:
    parser = argparse.ArgumentParser()
    add_options(parser)
    if profile:
        (tmp_path / "site.yaml").write_text(profile)
        words = (*words, "--profile", str(tmp_path / "site.yaml"))
    return resolve(parser.parse_args(list(words)), base, stage, also=also)


def options(site: Site, stage: str) -> dict[str, Any]:
    shards = (0, 1) if stage == "sample" else ()
    return dict(Job(stage, RunDir(Path("/runs/tiny")), site, "" if stage == "train" else "set", shards).options())


def gpus(site: Site, stage: str) -> dict[str, Any]:
    return {k: v for k, v in options(site, stage).items() if "gpu" in k or "gres" in k}


@pytest.mark.parametrize(("gres", "found"), [
    ("gpu", [("", 1)]), ("gpu:4", [("", 4)]), ("gpu:a100:4(S:0-1)", [("a100", 4)]), ("gpu:a100", [("a100", 1)]),
    ("gpu:tesla:v100:4", [("tesla:v100", 4)]), ("gpu:a100:no_consume:4(S:0,1)", [("a100", 4)]),
    ("(null)", []), ("", []), ("lscratch:100,gpu:h100:8(IDX:0-7)", [("h100", 8)]), ("gpumem:80G,shard:gpu:8", []),
    ("gres/gpu=2", [("", 2)]),
])  # fmt: skip
def test_gpus_are_found_in_what_nodes_show_and_jobs_ask_for(gres: str, found: list[tuple[str, int]]) -> None:
    assert gpus_of(gres) == found


def test_a_partition_is_known_by_the_most_that_its_nodes_have(cluster: None) -> None:
    there = partitions()
    assert {name: p.gpus_per_node for name, p in there.items()} == {
        "gpu": 4, "old": 4, "mixed": 8, "plain": 2, "bare": 1, "cpu": 0, "memory": 0
    }  # fmt: skip
    assert [name for name, p in there.items() if p.is_default] == ["gpu"]
    assert there["mixed"].gpu_types == {"a100", "h100"} and there["gpu"].time_limit == "1-00:00:00"


@pytest.mark.parametrize(("words", "train", "one"), [
    (["--gpus-per-node", "4"], {"gpus-per-node": "4"}, {"gpus-per-node": "1"}),
    (["--gpus-per-node", "a100:4"], {"gpus-per-node": "a100:4"}, {"gpus-per-node": "a100:1"}),
    (["--gpus-per-node", "0"], {}, {}),
    (["--sbatch", "gres=gpu:a100:4"], {"gres": "gpu:a100:4"}, {"gres": "gpu:a100:1"}),
    (["--sbatch", "gres=gpu:4,lscratch:50"], {"gres": "gpu:4,lscratch:50"}, {"gres": "gpu:1,lscratch:50"}),
    (["--sbatch", "gres=lscratch:50", "--gpus-per-node", "2"], {"gpus-per-node": "2", "gres": "lscratch:50"},
     {"gpus-per-node": "1", "gres": "lscratch:50"}),
    (["--sbatch", "gpus=a100:8", "--gpus-per-node", "4", "--nodes", "2"], {"gpus": "a100:8"}, {"gpus": "a100:1"}),
    (["--sbatch", "gpus-per-task=a100:1", "--gpus-per-node", "4"], {"gpus-per-task": "a100:1"},
     {"gpus-per-task": "a100:1"}),
])  # fmt: skip
def test_training_asks_for_its_gpus_once_and_the_other_stages_for_one(
    tmp_path: Path, words: list[str], train: dict[str, str], one: dict[str, str]
) -> None:
    site = resolved(tmp_path, *words)
    assert gpus(site, "train") == train and gpus(site, "sample") == gpus(site, "evaluate") == one
    assert options(site, "train")["ntasks-per-node"] == str(site.num_gpus or 1)
    if "gpus-per-task" in train:
        assert (options(site, "train")["ntasks"], options(site, "sample")["ntasks"]) == ("4", "1")
    assert {options(site, stage)["ntasks-per-node"] for stage in ("sample", "evaluate")} == {"1"}


@pytest.mark.parametrize(("request_", "train", "one"), [
    ("gres", {"gres": "gpu:a100:2"}, {"gres": "gpu:a100:1"}),
    ("gpus-per-task", {"gpus-per-task": "a100:1"}, {"gpus-per-task": "a100:1"}),
    ("none", {}, {}),
    ("gpus-per-node", {"gpus-per-node": "a100:2"}, {"gpus-per-node": "a100:1"}),
])  # fmt: skip
def test_a_profile_says_by_which_option_its_site_wants_gpus_asked_for(
    tmp_path: Path, request_: str, train: dict[str, str], one: dict[str, str]
) -> None:
    site = resolved(tmp_path, profile=f"gpus_per_node: a100:2\ngpu_request: {request_}")
    assert gpus(site, "train") == train and gpus(site, "sample") == one and site.world_size == 2


def test_a_task_that_has_several_gpus_of_its_own_to_sample_has_a_rank_for_each_and_fewer_tasks(
    tmp_path: Path, cluster: None
) -> None:
    words = ("--gpus-per-node", "4", "--mem", "64G", "--max-parallel", "2")
    site = settle(resolved(tmp_path, *words, profile="sample: {gpus_per_node: 2}"), dry_run=False)
    asked = options(site, "sample")
    assert (asked["gpus-per-node"], asked["ntasks-per-node"], asked["mem"]) == ("a100:2", "2", "32G")
    job = Job("sample", RunDir(Path("/runs/tiny")), site, "set", tuple(range(3)))
    assert job.num_tasks == 2 and [job.shards_of(task) for task in (0, 1)] == [[0, 2], [1]]
    asked = options(site, "evaluate")
    assert (asked["gpus-per-node"], asked["ntasks-per-node"], asked["mem"]) == ("a100:1", "1", "16G")
    site = settle(resolved(tmp_path, "--gpus-per-node", "4", stage="sample", gpus_per_node=1), dry_run=False)
    assert (gpus(site, "sample"), options(site, "sample")["ntasks-per-node"]) == ({"gpus-per-node": "a100:4"}, "4")
    with pytest.raises(RequestError, match=r"--gpus-per-node 8: no node of gpu has more than 4; .*--tasks"):
        settle(resolved(tmp_path, profile="sample: {gpus_per_node: 8}"), dry_run=False)


@pytest.mark.parametrize(("partition", "asked"), [
    (None, "a100:1"), ("gpu", "a100:1"), ("old", "1"), ("mixed", "1"), ("plain", "1"), ("bare", "1"), ("cpu", None),
    ("memory", None), ("gpu,mixed", "1"),
])  # fmt: skip
def test_what_is_asked_for_by_itself_is_what_the_partition_shows(
    cluster: None, partition: str | None, asked: str | None
) -> None:
    site = settle(Site(partition=partition), dry_run=False)
    assert options(site, "train").get("gpus-per-node") == asked


@pytest.mark.parametrize(("words", "named"), [
    (["--gpus-per-node", "four"], ["gpus_per_node", "'four'", "a100:4"]),
    (["--gpus-per-node", "a100:0"], ["gpus_per_node", "a100:4"]),
    (["--gpus-per-node", "-1"], ["gpus_per_node", "'-1'"]),
    (["--gpus-per-node", "2", "--sbatch", "gres=gpu:4"], ["--gpus-per-node 2", "gres=gpu:4", "differ"]),
    (["--gpus-per-node", "a100:2", "--tasks-per-node", "3"], ["--tasks-per-node 3", "a100:2"]),
    (["--sbatch", "time=4h"], ["--sbatch time", "give --time"]), (["--sbatch", "job-name=x"], ["give --name"]),
    (["--sbatch", "part=gpu"], ["partition", "give --partition", "write another option's name out"]),
    (["--sbatch", "output=x"], ["--sbatch output", "leave it out"]),
    (["--mem", "8G", "--sbatch", "mem=9G"], ["--mem 8G", "mem=9G", "give one of them"]),
    (["--nodes", "0"], ["nodes = 0", "must be at least 1"]),
    (["--cpus-per-task", "0"], ["cpus_per_task = 0", "at least 1", "or leave it out"]),
    (["--tasks", "none"], ["tasks", "'none'", "auto"]), (["--tasks", "0"], ["tasks", "'0'"]),
])  # fmt: skip
def test_a_request_that_cannot_be_meant_names_itself_and_what_is_allowed(
    tmp_path: Path, words: list[str], named: list[str]
) -> None:
    with pytest.raises(RequestError) as refused:
        resolved(tmp_path, *words)
    assert [word for word in named if word not in str(refused.value)] == []


HERE = ["--cluster", "local"]


@pytest.mark.parametrize(("stage", "words", "told"), [
    ("sample", ["--nodes", "2"], "--nodes 2: a task of a sample job is on one node; for more at a time give --tasks"),
    ("sample", ["--tasks-per-node", "2"], "has a process for each of its GPUs, else one; .* or --gpus-per-node 2"),
    ("sample", ["--tasks-per-node", "2", "--gpus-per-node", "0"], "--tasks-per-node 2: a task of a sample job has"),
    ("evaluate", ["--tasks-per-node", "2"], "a task of an evaluation is one process; for more at a time give --tasks"),
    ("evaluate", ["--gpus-per-node", "a100:4"], "--gpus-per-node a100:4: a task of an evaluation uses one GPU; for"),
    ("evaluate", ["--sbatch", "gres=gpu:4"], "--gpus-per-node 4: a task of an evaluation uses one GPU"),
    ("sample", [*HERE, "--gpus-per-node", "2"], "a sample job here uses one GPU: leave it out"),
    ("sample", [*HERE, "--tasks-per-node", "2"], "a sample job here is one process: leave it out"),
    ("sample", [*HERE, "--tasks", "3"], "--tasks: nothing heeds this with --cluster local"),
    ("train", [*HERE, "--time", "1h", "--sbatch", "nice=1"], "--time, --sbatch: nothing heeds these .*leave them"),
    ("train", [*HERE, "--mem", "8G"], "--mem: nothing heeds this"),
])  # fmt: skip
def test_what_nothing_would_heed_is_refused_and_told_what_would_be(
    tmp_path: Path, stage: str, words: list[str], told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        resolved(tmp_path, *words, stage=stage)


def test_what_a_profile_or_the_training_says_of_all_stages_is_no_request_of_one(tmp_path: Path) -> None:
    site = resolved(tmp_path, stage="evaluate", nodes=4, tasks_per_node=4, gpus_per_node=4, time=60)
    assert options(site, "evaluate")["nodes"] == options(site, "evaluate")["ntasks-per-node"] == "1"
    site = resolved(tmp_path, "--gpus-per-node", "2", stage="sample", tasks_per_node=4, gpus_per_node=4, mem="400G")
    asked = options(site, "sample")
    assert (asked["gpus-per-node"], asked["ntasks-per-node"], asked["mem"]) == ("2", "2", "200G")
    resolved(tmp_path, "--nodes", "1", "--tasks-per-node", "2", "--gpus-per-node", "2", stage="sample")
    assert resolved(tmp_path, *HERE, "--cpus-per-task", "2", profile="partition: gpu\ntime: 1h").is_local


def test_options_of_sbatch_that_are_typed_for_a_stage_go_before_its_section_too(tmp_path: Path) -> None:
    profile = "gpus_per_node: 4\nmem: 400G\nsample: {mem_per_cpu: 4G, qos: low, sbatch: {nice: 5}}"
    words = [word for option in ("mem=9G", "qos=high", "nice=9", "gres=gpu:2,tmp:5") for word in ("--sbatch", option)]
    asked = options(resolved(tmp_path, *words, profile=profile, stage="sample"), "sample")
    assert (asked["mem"], asked["qos"], asked["nice"], asked["ntasks-per-node"]) == ("9G", "high", "9", "2")
    assert asked["gres"] == "gpu:2,tmp:5" and not {"mem-per-cpu", "gpus-per-node"} & asked.keys()


@pytest.mark.parametrize(("mem", "ranks", "share"), [
    ("32G", 4, "8G"), ("32G", 3, "10923M"), ("500M", 2, "250M"), ("1T", 3, "349526M"),
    ("1001", 2, "501"), ("0", 4, None), ("32G", 1, "32G"), (None, 4, None),
])  # fmt: skip
def test_a_stage_of_one_rank_asks_for_its_share_of_a_nodes_memory(
    mem: str | None, ranks: int, share: str | None
) -> None:
    site = Site(mem=mem, tasks_per_node=ranks, cpus_per_task=6)
    assert options(site, "train").get("mem") == mem
    for stage in ("sample", "evaluate"):
        assert options(site, stage).get("mem") == share and options(site, stage)["cpus-per-task"] == "6"


@pytest.mark.parametrize(("profile", "words", "train", "one"), [
    ("", ["--sbatch", "mem=400G", "--sbatch", "cpus-per-task=6"], ("400G", "6"), ("100G", "6")),
    ("sbatch: {mem: 400G}", [], ("400G", None), ("100G", None)),
    ("sbatch: {mem: 400G, cpus-per-task: 6}", ["--mem", "8G", "--cpus-per-task", "2"], ("8G", "2"), ("2G", "2")),
    ("sbatch: {mem-per-cpu: 4G}", ["--mem", "none"], (None, None), (None, None)),
    ("mem_per_gpu: 40G", ["--sbatch", "mem=400G"], ("400G", None), ("100G", None)),
])  # fmt: skip
def test_memory_and_cpus_that_are_asked_for_by_an_option_of_sbatchs_are_shared_out_as_by_ours(
    tmp_path: Path,
    profile: str,
    words: list[str],
    train: tuple[str | None, str | None],
    one: tuple[str | None, str | None],
) -> None:
    """64 sample tasks once asked for a whole node's memory each."""
    site = resolved(tmp_path, "--gpus-per-node", "4", *words, profile=profile)
    for stage, asked in (("train", train), ("sample", one), ("evaluate", one)):
        told = options(site, stage)
        assert (told.get("mem"), told.get("cpus-per-task")) == asked
        assert not {"mem-per-cpu", "mem-per-gpu"} & told.keys()


def test_words_that_are_asked_for_by_an_option_of_sbatchs_give_way_to_a_stages_own_and_are_known(
    tmp_path: Path, cluster: None
) -> None:
    """A QOS may allow more time than its partition, whichever way it was asked for."""
    words = ("--sbatch", "qos=long", "--sbatch", "account=lab", "--sbatch", "constraint=a", "--sbatch", "exclude=n1")
    site = resolved(tmp_path, "--partition", "gpu", "--time", "3d", *words, profile="sample: {qos: short, time: 1h}")
    settle(site, dry_run=False)
    train, sample = options(site, "train"), options(site, "sample")
    assert (train["qos"], sample["qos"], site.sbatch) == ("long", "short", {})
    for key, value in (("account", "lab"), ("constraint", "a"), ("exclude", "n1")):
        assert train[key] == sample[key] == value


def test_setup_may_be_a_line_or_a_block_of_them(tmp_path: Path) -> None:
    assert resolved(tmp_path, profile="setup: module load cuda").setup == ("module load cuda",)
    block = resolved(tmp_path, profile="setup: |\n  module load cuda\n  export A=1\n")
    assert block.setup == ("module load cuda", "export A=1")


@pytest.mark.parametrize("line", ["if true; then", "module load 'cuda", "export A=$(date", "touch {here} )"])
def test_setup_that_bash_cannot_read_is_refused_and_not_run(tmp_path: Path, line: str) -> None:
    here = tmp_path / "here"
    with pytest.raises(RequestError, match="bash cannot read"):
        resolved(tmp_path, profile=f"setup: |\n  touch {here}\n  {line.format(here=here)}\n")
    assert not here.exists()


PROFILE = """
partition: gpu
time: 1d
gpus_per_node: a100:4
mem: 400G
sbatch: {nice: 5, exclusive: true}
sample: {partition: cheap, time: 2h, sbatch: {exclusive: null, qos: low}}
evaluate: {partition: cpu, gpus_per_node: 0, mem: 64G, cpus_per_task: 16}
"""


def test_a_profiles_sections_say_what_differs_for_a_stage(tmp_path: Path) -> None:
    site = resolved(tmp_path, profile=PROFILE)
    train, sample, score = (options(site, stage) for stage in ("train", "sample", "evaluate"))
    assert (train["partition"], train["time"], train["nice"], train["exclusive"]) == ("gpu", "1440", "5", True)
    assert (sample["partition"], sample["time"], sample["nice"], sample["qos"]) == ("cheap", "120", "5", "low")
    assert sample["gpus-per-node"] == "a100:1" and sample["mem"] == "100G" and "exclusive" not in sample
    assert (score["partition"], score["mem"], score["cpus-per-task"]) == ("cpu", "64G", "16")
    assert "gpus-per-node" not in score and score["exclusive"] is True and score["nodes"] == "1"


def test_what_is_typed_for_a_stage_goes_before_its_section_and_what_is_typed_for_training_does_not(
    tmp_path: Path,
) -> None:
    typed = ["--partition", "urgent", "--mem", "8G"]
    site = resolved(tmp_path, *typed, profile=PROFILE, stage="sample")
    sample = options(site, "sample")
    assert (sample["partition"], sample["time"], sample["mem"]) == (
        "urgent",
        "120",
        "8G",
    )  # its own, and no share of it
    site = resolved(tmp_path, *typed, profile=PROFILE)
    assert options(site, "train")["partition"] == "urgent" and options(site, "sample")["partition"] == "cheap"
    for also, partition in ((None, "cheap"), ("sample", "urgent")):  # as of milestones, which are sampled and scored
        site = resolved(tmp_path, *typed, profile=PROFILE, stage="evaluate", also=also)
        assert options(site, "evaluate")["partition"] == "urgent" and options(site, "sample")["partition"] == partition
    site = resolved(tmp_path, "--gpus-per-node", "4", stage="evaluate", also="sample")  # which takes four at a time
    assert [options(site, stage)["gpus-per-node"] for stage in ("sample", "evaluate")] == ["4", "1"]


@pytest.mark.parametrize(("profile", "named"), [
    ("- a", ["found a list", "keys and values", "configs/cluster/example.yaml"]),
    ("sbatch: {nice: [1]}", ["sbatch.nice = [1]", "a word or a number"]),
    ("account: [a]", ["account = ['a']", "must be a word"]), ("nodes: 1.5", ["nodes = 1.5", "must be a whole number"]),
    ("via: qsub", ["via = 'qsub'", "must be 'submitit' or 'sbatch'"]), ("mem: 32 GB", ["mem = '32 GB'", "32G"]),
    ("signal_lead_s: 2m", ["signal_lead_s = '2m'", "a whole number", "default 120"]),
])  # fmt: skip
def test_a_profile_that_cannot_be_meant_names_the_key_and_what_is_allowed_in_plain_words(
    tmp_path: Path, profile: str, named: list[str]
) -> None:
    with pytest.raises(RequestError) as refused:
        resolved(tmp_path, profile=profile)
    assert [word for word in named if word not in str(refused.value)] == [] and "input" not in str(refused.value)


def test_a_section_with_a_key_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"sample\.partitoin"):
        resolved(tmp_path, profile="sample: {partitoin: x}")


def test_what_a_run_was_submitted_with_is_kept_for_later_stages_as_it_was(tmp_path: Path) -> None:
    site = resolved(tmp_path, profile=PROFILE)
    kept = site.model_dump(mode="json", exclude_defaults=True)
    assert Site.model_validate(kept, strict=False) == site
    assert resolved(tmp_path, stage="sample", **Site.model_validate(kept, strict=False).model_dump()) == site


@pytest.mark.parametrize(("partition", "time", "refused"), [
    ("gpu", 1441, True), ("gpu", 1440, False), ("plain", 31, True), ("plain", 30, False), ("mixed", 99999, False),
    ("gpu,cpu", 2880, False), ("gpu,cpu", 2881, True), (None, 1441, True),
])  # fmt: skip
def test_a_time_limit_that_no_partition_allows_is_refused_before_anything_is_queued(
    cluster: None, partition: str | None, time: int, refused: bool
) -> None:
    site = Site(partition=partition, time=time)
    if not refused:
        settle(site, dry_run=False)
        return
    with pytest.raises(RequestError, match="wait for ever") as error:
        settle(site, dry_run=False)
    assert "allows" in str(error.value) and "ask for less" in str(error.value)


def test_a_stages_own_partition_is_checked_and_decides_whether_it_has_a_gpu(cluster: None, tmp_path: Path) -> None:
    site = settle(resolved(tmp_path, profile="partition: gpu\nevaluate: {partition: cpu}"), dry_run=False)
    assert gpus(site, "evaluate") == {} and gpus(site, "sample") == {"gpus-per-node": "a100:1"}
    with pytest.raises(RequestError, match="--partition cpx"):
        settle(resolved(tmp_path, profile="evaluate: {partition: cpx}"), dry_run=False)


# ---------------------------------------------------------------- as people write it


@pytest.mark.parametrize(("profile", "words", "asked"), [
    ("mem_per_cpu: 4G", [], {"mem-per-cpu": "4G"}),
    ("mem: 32G", ["--mem-per-gpu", "40G"], {"mem-per-gpu": "40G"}),
    ("mem_per_gpu: 40G", ["--mem", "8G"], {"mem": "8G"}),
    ("mem: 32G", ["--mem", "none"], {}),
    ("mem: 0", [], {"mem": "0"}),
    ("", [], {}),
])  # fmt: skip
def test_memory_is_asked_for_in_one_way_that_of_the_last_who_said_it(
    tmp_path: Path, profile: str, words: list[str], asked: dict[str, str]
) -> None:
    site = resolved(tmp_path, *words, profile=profile)
    assert {k: v for k, v in options(site, "train").items() if k.startswith("mem")} == asked


def test_memory_of_two_kinds_is_refused_and_a_sections_own_goes_before_trainings(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="mem and mem_per_cpu"):
        resolved(tmp_path, profile="mem: 1G\nmem_per_cpu: 1G")
    site = resolved(tmp_path, profile="mem_per_gpu: 40G\nevaluate: {mem: 9G}")
    memory = {stage: {k for k in options(site, stage) if k.startswith("mem")} for stage in ("sample", "evaluate")}
    assert memory == {"sample": {"mem-per-gpu"}, "evaluate": {"mem"}}


@pytest.mark.parametrize(("written", "minutes"), [
    ("12:00:00", 720), ("90:00", 90), ("1-12:00:00", 2160), ("30", 30), ("4h", 240), ("'30:00'", 30), ("90m", 90),
    ("2d", 2880), ("1d12h", 2160),
])  # fmt: skip
def test_a_time_limit_may_be_written_as_people_or_as_slurm_write_it(tmp_path: Path, written: str, minutes: int) -> None:
    assert resolved(tmp_path, profile=f"time: {written}").time == minutes
    assert options(resolved(tmp_path, "--time", written.strip("'")), "train")["time"] == str(minutes)


@pytest.mark.parametrize("words", [["--time", "1:30"], ["--time", "10:00"]])
def test_a_time_that_slurm_and_people_read_otherwise_is_refused_with_both_readings(
    tmp_path: Path, words: list[str]
) -> None:
    with pytest.raises(RequestError, match=r"minutes and .* to SLURM, .* hours and .* to people; write \d+m, or 00:"):
        resolved(tmp_path, *words)


def test_numbers_in_a_profile_are_the_words_that_they_are_written_as(tmp_path: Path) -> None:
    site = resolved(tmp_path, profile="account: 00123\nqos: 7\nsbatch: {begin: 16:00, deadline: 2026-12-01}")
    asked = options(site, "train")
    assert (asked["account"], asked["qos"], asked["begin"], asked["deadline"]) == ("00123", "7", "16:00", "2026-12-01")
    with pytest.raises(RequestError, match="nodes = '010'"):
        resolved(tmp_path, profile="nodes: 010")


def test_a_section_may_be_merged_from_another(tmp_path: Path) -> None:
    site = resolved(tmp_path, profile="sample: &one {time: 1h, mem: 4G}\nevaluate: {<<: *one, mem: 8G}")
    assert (options(site, "evaluate")["time"], options(site, "evaluate")["mem"]) == ("60", "8G")


@pytest.mark.parametrize(("time", "lead", "warned"), [(1, 120, True), (2, 120, True), (3, 120, False), (4, 120, False)])
def test_a_limit_that_leaves_no_time_to_work_is_warned_of(time: int, lead: int, warned: bool) -> None:
    told = Site(time=time, signal_lead_s=lead).warnings()
    assert bool(told) == warned and all("ask for more" in line and f"{time * 20} s" in line for line in told)


@pytest.mark.parametrize(
    ("limit", "tight", "wide"),
    [("CPU", 10**6, -1), ("AS", 2**46, -1), ("FSIZE", 2**46, -1), ("NPROC", 4095, 4096), ("NOFILE", 1023, 1024)],
)
def test_what_a_login_node_limits_its_shells_to_is_not_taken_over_by_jobs(limit: str, tight: int, wide: int) -> None:
    kind = getattr(resource, f"RLIMIT_{limit}")
    before = soft, hard = resource.getrlimit(kind)
    if hard != -1 and max(soft, wide) > hard:
        pytest.skip(f"{limit} is limited here")
    told = []
    try:
        for least in (tight, wide):
            resource.setrlimit(kind, (least, hard))
            told.append(options(Site(), "train").get("propagate"))
    finally:
        resource.setrlimit(kind, before)
    assert told == ["CORE", None]
