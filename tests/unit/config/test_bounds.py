"""What a config may hold is bounded: hostile YAML is refused in a sentence and at once, and ordinary YAML is not."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from ddpm.config.reading import load
from ddpm.config.schema import Config
from ddpm.config.section import build, field_keys
from ddpm.config.yaml import MAX_CHARS, dump_yaml, load_yaml
from ddpm.errors import RequestError, shown
from launch.cluster.options import load_profile

LAUGHS = "\n".join(["a0: &a0 [lol, lol]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))])
LONG_WORD = f"word: &w {'x' * 50_000}\nmany: [{', '.join(['*w'] * 1000)}]"
CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000))])
MERGES = "\n".join(
    ["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10))]
)

HOSTILE = {
    "a billion laughs": LAUGHS,
    "one long word a thousand times": LONG_WORD,
    "a chain of aliases": CHAIN,
    "merges of merges": MERGES,
    "an alias of itself": "a: &a [*a]",
    "a mapping in itself": "a: &a {b: *a}",
    "brackets": "[" * 100_000,
    "brackets and words": "[a, " * 50_000,
    "braces": "{a: " * 50_000,
    "dashes": "- " * 100_000,
    "question marks": "? " * 100_000,
    "indented": "\n".join(" " * i + "a:" for i in range(600)),
    "an integer of thousands of digits": "a: " + "9" * 5000,
    "a shorter one": "a: " + "9" * 400,
    "a hexadecimal one": "a: 0x" + "f" * 5000,
    "a sexagesimal one": "a: !!int 1" + ":59" * 2000,
    "too long": "a: 1\n" * MAX_CHARS,
    "no date": "a: !!timestamp 2020-13-45",
    "no integer": "a: !!int word",
    "no time": "a: !!timestamp word",
    "no truth": "a: !!bool word",
    "a set as key": "? !!set {a}\n: b",
    "a class of Python's": "a: !!python/object/apply:os.system [echo]",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_in_a_sentence_and_at_once(case: str) -> None:
    began = time.process_time()
    with pytest.raises(RequestError) as e:
        load_yaml(HOSTILE[case], "there.yaml")
    assert time.process_time() - began < 5
    assert str(e.value).startswith("there.yaml: ") and len(str(e.value)) < 600 and "\n" not in str(e.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_as_a_file_a_profile_and_a_value(tmp_path: Path, case: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[case])
    for read in (lambda: load(path), lambda: load_profile(str(path))):
        with pytest.raises(RequestError) as e:
            read()
        assert "hostile.yaml" in str(e.value) and len(str(e.value)) < 600
    (tmp_path / "good.yaml").write_text("seed: 1\n")
    with pytest.raises(RequestError) as e:
        load(tmp_path / "good.yaml", [f"train.lr={HOSTILE[case].removeprefix('a: ')}"])
    assert len(str(e.value)) < 1000


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(RequestError, match="/dev/zero"):
        load(Path("/dev/zero"))


def test_ordinary_anchors_and_merge_keys_mean_what_they_say() -> None:
    text = "a: &base {x: 1, y: [1, 2]}\nb: {<<: *base, y: 3}\nc: *base\nd: {<<: [*base, {z: 4}]}\n"
    tree = load_yaml(text, "there.yaml")
    assert tree["b"] == {"x": 1, "y": 3} and tree["c"] == tree["a"] and tree["d"] == {"x": 1, "y": [1, 2], "z": 4}
    with pytest.raises(RequestError, match="'<<' stands twice"):
        load_yaml("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "there.yaml")
    lists = ", ".join(f"l{i}: *l" for i in range(300))
    assert len(load_yaml(f"l: &l [{', '.join(['1'] * 1000)}]\n{lists.replace(', ', chr(10))}", "t")) == 301


def test_numbers_that_a_config_may_hold_are_read() -> None:
    assert load_yaml("a: 9223372036854775807\nb: 0xff\nc: 1e-4\nd: -3", "t") == {
        "a": 2**63 - 1,
        "b": 255,
        "c": 1e-4,
        "d": -3,
    }
    plan = list(range(10_000))
    assert load_yaml(dump_yaml({"class_plan": plan}), "t") == {"class_plan": plan}


def test_a_value_in_a_message_is_no_longer_than_a_person_reads() -> None:
    assert shown("x") == "'x'" and shown(1.5) == "1.5"
    assert len(shown("x" * 10**6)) < 300
    assert shown(10**5000) == "a number of thousands of digits"


def test_a_long_wrong_value_or_key_is_shown_in_part(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    for override in (f"train.lr={'x' * 50_000}", f"train.{'x' * 50_000}=1", f"{'x' * 50_000}=1", "x" * 50_000):
        with pytest.raises(RequestError) as e:
            load(tmp_path / "c.yaml", [override])
        assert len(str(e.value)) < 3000


# ---------------------------------------------------------------- numbers that nothing could be made of

HUGE = 10**18
BEYOND = {
    "train.global_batch": HUGE,
    "diffusion.timesteps": HUGE,
    "model.base_channels": HUGE,
    "model.channel_mults": [1, HUGE],
    "model.blocks_per_level": HUGE,
    "model.num_classes": HUGE,
    "model.attention_heads": HUGE,
    "model.norm_groups": HUGE,
    "model.time_embed_channels": HUGE,
    "sample.num_samples": 10**30,
    "sample.shards": HUGE,
    "sample.batch": HUGE,
}


@pytest.mark.parametrize("key", BEYOND)
def test_a_count_that_nothing_could_hold_is_refused_by_its_key_and_at_once(tmp_path: Path, key: str) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    beside = {  # for which a message would list all that fits
        "train.global_batch": ["train.micro_batch=3"],
        "model.base_channels": ["model.norm_groups=7"],
        "model.channel_mults": ["model.norm_groups=7", "model.attention_resolutions=[]"],
        "sample.shards": ["sample.num_samples=1000000000"],
    }
    overrides = [f"{key}={BEYOND[key]}", *beside.get(key, [])]
    began = time.process_time()
    with pytest.raises(RequestError) as e:
        load(tmp_path / "c.yaml", overrides)
    assert key in str(e.value) and time.process_time() - began < 5


MAY_BE_NONE_AT_ALL = {
    "seed", "model.dropout", "model.num_classes", "train.weight_decay", "train.warmup_steps", "train.label_dropout",
    "train.ema_decay", "train.ema_start_step", "train.max_rollbacks", "sample.eta", "sample.seed",
}  # fmt: skip


@pytest.mark.parametrize("key", field_keys(Config))
def test_no_key_takes_less_than_nothing_and_few_take_nothing(key: str) -> None:
    for value in (-1, 0):
        *sections, leaf = key.split(".")
        tree: dict[str, object] = {leaf: value}
        for section in reversed(sections):
            tree = {section: tree}
        if value == 0 and key in MAY_BE_NONE_AT_ALL:
            build(Config, tree, "config")
            continue
        with pytest.raises(RequestError, match=re.escape(key)):
            build(Config, tree, "config")
