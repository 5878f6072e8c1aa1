"""ddpm/config/schema.py: what is wrong is said once, with the way out; what is right has one digest."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.config import reading
from ddpm.config.diffusion import Diffusion
from ddpm.config.reading import load, of_run
from ddpm.config.schema import Config, check_world_size
from ddpm.config.section import Section, build, field_keys
from ddpm.config.synonyms import SYNONYMS
from ddpm.config.train import Train
from ddpm.config.yaml import load_yaml
from ddpm.diffusion import schedule
from ddpm.diffusion.samplers import SAMPLERS, sample
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.paths import RunDir
from tests.conftest import PROJECT
from tests.training import make_config


def read(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RequestError) as e:
        read(tmp_path, text, *overrides)
    return str(e.value)


TWO_CLASSES = "data: {name: images, path: a.zip}\nmodel: {num_classes: 2}"
# key, value and what is allowed, or the way out, all in one message
BAD = {
    "train: {lr: fast}": ["train.lr", "'fast'", "a number", "0.0002"],
    "train: {lr: -1}": ["train.lr", "-1", "more than 0", "0.0002"],
    "train: {lr: 0}": ["train.lr", "more than 0"],
    "train: {lr: .nan}": ["train.lr", "nan", "finite"],
    "train: {lr: .inf}": ["train.lr", "inf", "finite"],
    "train: {lr: null}": ["train.lr", "None", "a number"],
    "train: {lr: true}": ["train.lr", "True", "a number"],
    "train: {lr: [1]}": ["train.lr", "[1]", "a number"],
    "train: {total_steps: 1.5}": ["train.total_steps", "1.5", "a whole number", "800000"],
    "train: {total_steps: 0}": ["train.total_steps", "0", "at least 1"],
    "train: {amp: on}": ["train.amp", "'on'", "'auto', 'bf16', 'fp16' or 'off'"],
    "train: {amp: false}": ["train.amp", "False", "'auto', 'bf16', 'fp16' or 'off'"],
    "train: {compile: maybe}": ["train.compile", "'maybe'", "'auto'", "true or false"],
    "train: {lrr: 1}": ["'train.lrr'", "did you mean 'train.lr'"],
    "lr: 1": ["'lr'", "did you mean 'train.lr'"],
    "training: {lr: 1}": ["'training'"],
    "train: 3": ["train = 3", "section of keys"],
    "data: null": ["data = None", "section of keys"],
    "1: 2": ["'1'", "name, seed, data.name", "--dry-run"],
    "? [1]\n: 2": ["[1]", "no key"],
    "- 1": ["keys and values", "list"],
    "just words": ["keys and values", "str"],
    "a: [": ["not valid YAML"],
    "seed: 1\nseed: 2": ["'seed'", "twice"],
    "train: {lr: 1.0, lr: 2.0}": ["'lr'", "twice"],
    "seed: 1.5e3": ["seed", "1500.0", "a whole number"],
    "seed: -1": ["seed", "-1", "at least 0"],
    "name: 17": ["name", "17", "a word, or a number in quotes"],
    "name: a/b": ["'a/b'", "A-Z"],
    "data: {name: mnist}": ["data.name", "'mnist'", "'cifar10', 'celeba', 'images' or 'digits'"],
    "data: {name: images}": ["data.path", "folder or a .zip"],
    "data: {image_size: 30}": ["data.image_size", "30", "8 must divide"],
    "data: {attributes: {Male: true}}": ["data.attributes", "Male", "data.name=cifar10", "celeba"],
    "data: {label_attributes: [Male]}": ["data.label_attributes", "Male", "data.name=cifar10", "celeba"],
    "data: {name: celeba, attributes: {Male: no}}": ["data.attributes.Male = 'no'", "true or false"],
    "data: {name: celeba, attributes: {Malee: false}}": ["data.attributes", "'Malee'", "did you mean Male", "Young"],
    "data: {name: celeba, label_attributes: [male]}": ["data.label_attributes", "'male'", "did you mean Male"],
    "data: {name: celeba, attributes: [Male]}": ["data.attributes", "['Male']", "keys and values"],
    "data: {name: celeba, label_attributes: Male}": [
        "data.label_attributes",
        "'Male'",
        "list, such as [Male, Smiling]",
    ],
    "data: {name: celeba, label_attributes: [Bald, Male, Bald]}": ["data.label_attributes", "'Male', 'Bald'", "once"],
    "data: {name: celeba, label_attributes: [Male, Bald]}": ["model.num_classes", "0", "must be 4", "'Male', 'Bald'"],
    "data: {name: celeba}\nmodel: {num_classes: 2}": ["model.num_classes", "2", "data.label_attributes", "must be 0"],
    "model: {channel_mults: [1, x]}": ["model.channel_mults", "'x'", "whole number", "(1, 2, 2, 2)"],
    "model: {channel_mults: []}": ["model.channel_mults", "[]", "one factor"],
    "model: {channel_mults: [1, 0]}": ["model.channel_mults", "0", ">= 1"],
    "model: {channel_mults: 2}": ["model.channel_mults", "2", "list, such as [1, 2]"],
    "model: {attention_resolutions: [7]}": ["model.attention_resolutions", "7", "[32, 16, 8, 4]"],
    "model: {attention_resolutions: [16, 16]}": ["model.attention_resolutions", "[16, 16]", "once"],
    "model: {num_classes: 5}": ["model.num_classes = 5", "data.name=cifar10 has 10 classes", "use 10, or 0"],
    "model: {attention_heads: 3}": ["model.attention_heads", "3", "256", "[1, 2, 4, 8"],
    "model: {base_channels: 33}": ["model.base_channels", "33", "even"],
    "model: {block: wide}": ["model.block", "'wide'", "'residual' or 'plain'"],
    "model: {attention_in: middle}": ["model.attention_in", "'middle'", "'both', 'encoder' or 'decoder'"],
    "model: {middle_attention: 1}": ["model.middle_attention", "1", "true or false"],
    "model: {downsample: max}": ["model.downsample", "'max'", "'conv', 'pool' or 'conv_asymmetric'"],
    "model: {upsample: bilinear}": ["model.upsample", "'bilinear'", "'conv' or 'transpose'"],
    "model: {norm_groups: 48}": ["model.norm_groups", "48", "128", "[1, 2, 4, 8, 16, 32, 64]"],
    "model: {norm_groups: 0}": ["model.norm_groups", "0", "at least 1"],
    "model: {time_embed_channels: 0}": ["model.time_embed_channels", "0", "at least 1"],
    "model: {dropout: 1.0}": ["model.dropout", "1.0", "less than 1"],
    "data: {background: plaid}": ["data.background = 'plaid'", "white, black, gray, or a colour as #20c0ff"],
    "diffusion: {beta_start: 0.5, beta_end: 0.1}": ["diffusion.beta_start", "0.5", "below"],
    "diffusion: {timesteps: 10}": ["diffusion.timesteps", "10", "at least 21"],
    "diffusion: {schedule: sigmoid}": ["diffusion.schedule", "'sigmoid'", "'linear', 'cosine' or 'dns'"],
    "diffusion: {schedule: dns, dns_offset: 0}": ["diffusion.dns_offset", "0", "more than 0"],
    "diffusion: {dns_offset: 1000}": ["diffusion.dns_offset = 1000.0", "schedule=linear", "leave it out", "use dns"],
    "diffusion: {schedule: cosine, beta_end: 0.01}": ["diffusion.beta_end = 0.01", "cosine", "0.02", "linear or dns"],
    "diffusion: {beta_end: 0.5}": ["diffusion.beta_end = 0.5", "1e-133", "t = 999", "float32", "0.02"],
    "diffusion: {schedule: dns, beta_end: 0.7}": ["diffusion.beta_end = 0.7", "float32"],
    "diffusion: {prediction: v}": ["diffusion.prediction", "'v'", "'eps'"],
    "diffusion: {loss: huber}": ["diffusion.loss", "'huber'", "'l2' or 'l1'"],
    "train: {total_steps: null}": ["train.total_steps", "None", "total_images", "total_epochs"],
    "train: {total_steps: 5, total_epochs: 2}": ["train.total_steps = 5", "train.total_epochs = 2", "only one"],
    "train: {total_images: 5, total_epochs: 2}": ["train.total_images = 5", "train.total_epochs = 2", "only one"],
    "train: {total_epochs: 0}": ["train.total_epochs", "0", "at least 1"],
    "train: {optimizer: sgd}": ["train.optimizer", "'sgd'", "'adam' or 'adamw'"],
    "train: {weight_decay: 0.1}": ["train.weight_decay", "0.1", "adamw"],
    "train: {label_dropout: 0.1}": ["train.label_dropout", "0.1", "model.num_classes"],
    "train: {label_dropout: 1.0}": ["train.label_dropout", "1.0", "less than 1"],
    "train: {ema_every_steps: 0}": ["train.ema_every_steps", "0", "at least 1"],
    "train: {ema_start_step: -1}": ["train.ema_start_step", "-1", "at least 0"],
    "train: {total_steps: 9, warmup_steps: 1, ema_every_steps: 10}": ["train.ema_every_steps = 10", "total_steps = 9"],
    "train: {total_steps: 9, warmup_steps: 1, ema_start_step: 10}": ["train.ema_start_step = 10", "total_steps = 9"],
    "train: {early_stop_window: 1}": ["train.early_stop_window", "1", "at least 2"],
    "train: {early_stop_below: 0}": ["train.early_stop_below", "0", "more than 0"],
    "train: {global_batch: 12, micro_batch: 5}": ["train.micro_batch", "5", "12", "[1, 2, 3, 4, 6, 12]"],
    "train: {lr_schedule: cosine, total_steps: 9, warmup_steps: 9}": ["train.warmup_steps", "9", "below"],
    "sample: {steps: 2000}": ["sample.steps", "2000", "1000"],
    "sample: {num_samples: 3, shards: 4}": ["sample.shards", "4", "3"],
    "sample: {sampler: euler}": ["sample.sampler", "'euler'", "'ancestral', 'ddim' or 'dpmpp_2m'"],
    "sample: {sampler: ancestral, eta: 0.5}": ["sample.eta = 0.5", "sampler=ancestral", "leave it out", "ddim"],
    "sample: {sampler: dpmpp_2m, eta: 1}": ["sample.eta = 1.0", "sampler=dpmpp_2m"],
    "sample: {guidance: -1}": ["sample.guidance", "-1", "at least 0"],
    "sample: {guidance: 2}": ["sample.guidance", "2.0", "model.num_classes = 0"],
    "sample: {guidance: 2}\nmodel: {num_classes: 10}": ["sample.guidance", "2.0", "train.label_dropout = 0.0"],
    "sample: {class_plan: [50000]}": ["sample.class_plan", "[50000]", "model.num_classes = 0"],
    "sample: {class_plan: []}": ["sample.class_plan", "[]", "model.num_classes = 0"],
    f"sample: {{class_plan: [1, 2]}}\n{TWO_CLASSES.replace('2', '3')}": [
        "sample.class_plan",
        "[1, 2]",
        "num_classes = 3",
        "one per",
    ],
    f"sample: {{class_plan: [40000, 2]}}\n{TWO_CLASSES}": ["sample.class_plan", "40002", "num_samples = 50000"],
    f"sample: {{class_plan: [50001, -1]}}\n{TWO_CLASSES}": ["sample.class_plan", "[50001, -1]", "0 or more"],
    "sample: {class_plan: 5}": ["sample.class_plan", "5", "list, such as [1, 2]"],
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_value_is_one_request_error_with_key_value_and_what_is_allowed(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert [w for w in BAD[text] if w not in message] == [], message
    assert "Traceback" not in message and "pydantic" not in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed: x\ntrain: {lr: -1, lrr: 2}\nlog: {every_steps: 0}")
    for key in ("seed", "train.lr ", "'train.lrr'", "log.every_steps"):
        assert key in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.compile=on", "train.compile = 'on': must be 'auto', or true or false (default 'auto')"),
        ("train.deterministic=3", "train.deterministic = 3: must be 'auto', or true or false (default 'auto')"),
        ("train.micro_batch=0", "train.micro_batch = 0: must be at least 1, or 'auto' (or leave it out)"),
    ],
)
def test_a_key_of_several_types_tells_in_one_line_all_that_it_takes(tmp_path: Path, override: str, line: str) -> None:
    assert refusal(tmp_path, "seed: 1", override) == f"command line: {line}"


def test_a_value_that_no_type_of_its_key_takes_is_one_line(tmp_path: Path) -> None:
    for key in sorted(set(field_keys(Config)) - {"data.attributes", "evaluate.milestones"}):  # these have keys
        assert len(refusal(tmp_path, "seed: 1", f"{key}={{no: key}}").splitlines()) == 1, key


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.name=image", ["did you mean 'images'?"]),
        ("sample.sampler=dpm", ["did you mean 'dpmpp_2m'?"]),
        ("train.lr", ["'train.lr'", "key=value"]),
        ("=3", ["key=value"]),
        ("evaluate.milestones.num_samples=6", ["evaluate.milestones is given as a whole", "'{key: value}'"]),
        ("trian.lr=1", ["'trian.lr'", "did you mean 'train.lr'?"]),
        ("train.loss=l1", ["'train.loss'", "did you mean 'diffusion.loss'"]),
        ("train.steps=9", ["'train.steps'", "'train.total_steps'?"]),
        ("sample.lr=9", ["'sample.lr'", "did you mean 'train.lr'?"]),
        ("train.momentum_of_adam=1", ["'train.momentum_of_adam'", "the nearest are train."]),
        ("train=1", ["'train'"]),
        ("train.lr=[", ["train.lr=[", "not valid YAML"]),
        ("train.lr=", ["train.lr", "None"]),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, words: list[str]) -> None:
    message = refusal(tmp_path, "seed: 1", override)
    assert all(w in message for w in words), message


def test_an_override_on_a_section_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "train" in refusal(tmp_path, "train: 3", "train.lr=1")


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "cifar10.yaml").touch()
    with pytest.raises(RequestError, match=r"cifar1\.yaml does not exist; did you mean .*cifar10\.yaml"):
        load(tmp_path / "cifar1.yaml")
    with pytest.raises(RequestError, match="cannot be read"):
        load(tmp_path)


def test_yaml_is_read_as_people_mean_it(tmp_path: Path) -> None:
    config = read(tmp_path, "train: {amp: off, lr: 1e-4, compile: false}\nname: no")
    assert (config.train.amp, config.train.lr, config.train.compile, config.name) == ("off", 1e-4, False, "no")
    config = read(tmp_path, "", "train.amp=off", "train.lr=2E-4", "data.flip=false", "model.channel_mults=[1, 1]")
    assert (config.train.amp, config.train.lr, config.data.flip) == ("off", 2e-4, False)
    assert config.model.channel_mults == (1, 1) and config.name == "c"
    assert read(tmp_path, "train: {lr: 1, grad_clip: null}").train.grad_clip is None


def test_the_default_config_is_the_file_of_that_name() -> None:
    assert load(PROJECT / "configs" / "cifar10.yaml") == Config(name="cifar10")


def test_the_file_of_the_defaults_shows_every_key() -> None:
    tree = load_yaml((PROJECT / "configs" / "cifar10.yaml").read_text(), "cifar10.yaml")
    shown = [f"{k}.{leaf}" for k, v in tree.items() if isinstance(v, dict) for leaf in v]
    assert {*shown, "name", "seed"} == set(field_keys(Config))


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_keeps_its_digest_through_yaml(tmp_path: Path, path: Path) -> None:
    config = load(path)
    again = read(tmp_path, config.to_yaml())
    assert again == config and again.digest() == config.digest()


@pytest.mark.parametrize("name", ["1e-4", "17", "no", "off", "1_000", "2026-11-20", "null", "0x1f", "1.", "-.5", "a"])
def test_any_allowed_name_survives_the_frozen_file(tmp_path: Path, name: str) -> None:
    config = Config(name=name)
    assert read(tmp_path, config.to_yaml()) == config


def test_numbers_survive_the_frozen_file(tmp_path: Path) -> None:
    config = make_config(train__lr=1e-5, train__ema_decay=0.1 + 0.2, train__amp="off", checkpoint__every_min=1e16)
    assert read(tmp_path, config.to_yaml()) == config


UNAFFECTED: dict[str, Any] = {
    "data__background": "black",
    "data__skip_damaged": True,
    "name": "other",
    "data__path": "/elsewhere",
    "train__total_steps": 99,
    "train__early_stop_below": 1e-3,
    "train__early_stop_window": 5,
    "train__micro_batch": 2,
    "train__compile": True,
    "train__deterministic": False,
    "train__max_rollbacks": 9,
    "checkpoint__every_min": 1.0,
    "checkpoint__every_steps": 5,
    "checkpoint__keep_last": 9,
    "checkpoint__milestone_every_steps": 7,
    "checkpoint__milestone_every_epochs": 7,
    "log__every_steps": 7,
    "log__grid_every_steps": 7,
    "log__grid_images": 7,
    "log__validate_every_steps": 6,
    "log__histogram_every_steps": 7,
    "log__wandb": "a project",
    "sample__num_samples": 9,
    "sample__sampler": "ancestral",
    "sample__steps": 3,
    "sample__eta": 0.5,
    "sample__guidance": 1.5,
    "sample__class_plan": [1, 7],
    "sample__clip_x_0": False,
    "sample__batch": 9,
    "sample__shards": 2,
    "sample__seed": 9,
    "sample__weights": "model",
    "sample__precision": "fp32",
    "evaluate__extractor": "pixels",
    "evaluate__reference": "test",
    "evaluate__milestones": {"num_samples": 600},
}
AFFECTED: dict[str, Any] = {
    "seed": 1,
    "data__name": "cifar10",
    "data__image_size": 16,
    "data__flip": False,
    "data__attributes": {"Male": True},
    "data__label_attributes": ["Male"],
    "model__base_channels": 16,
    "model__channel_mults": [1, 1],
    "model__blocks_per_level": 2,
    "model__attention_resolutions": [],
    "model__attention_heads": 2,
    "model__block": "plain",
    "model__attention_in": "decoder",
    "model__middle_attention": False,
    "model__downsample": "pool",
    "model__upsample": "transpose",
    "model__norm_groups": 4,
    "model__time_embed_channels": 8,
    "model__dropout": 0.5,
    "model__num_classes": 2,
    "diffusion__timesteps": 9,
    "diffusion__schedule": "dns",
    "diffusion__dns_offset": 8,
    "diffusion__loss": "l1",
    "diffusion__beta_start": 2e-4,
    "diffusion__beta_end": 0.003,
    "diffusion__variance": "fixed_small",
    "train__global_batch": 8,
    "train__lr": 0.02,
    "train__warmup_steps": 4,
    "train__lr_schedule": "cosine",
    "train__grad_clip": None,
    "train__amp": "off",
    "train__optimizer": "adamw",
    "train__weight_decay": 0.1,
    "train__label_dropout": 0.1,
    "train__ema_decay": 0.95,
    "train__ema_start_step": 2,
    "train__ema_every_steps": 2,
    "train__ema_warmup": True,
}
LABELLED = {"model__num_classes": 2, "train__label_dropout": 0.5}
NEEDED: dict[str, dict[str, Any]] = {
    "data__image_size": {"model__attention_resolutions": []},
    "data__attributes": {"data__name": "celeba"},
    "data__label_attributes": {"data__name": "celeba", "model__num_classes": 2, "data__label_attributes": ["Smiling"]},
    "diffusion__dns_offset": {"diffusion__schedule": "dns"},
    "train__label_dropout": {"model__num_classes": 2},
    "train__weight_decay": {"train__optimizer": "adamw"},
    "sample__guidance": LABELLED,
    "sample__class_plan": LABELLED,
}
"""What else a key asks for, before the change and after it."""
ONE_VALUE = {"diffusion.prediction"}
"""Keys that have one value today: changing it is not possible."""
LENGTHS = {"train.total_images", "train.total_epochs"}
"""Keys that a run's config no longer has: resolve_length."""


def test_the_digest_covers_every_key_that_changes_the_mathematics_and_no_other() -> None:
    covered = {k.replace("__", ".") for k in (*UNAFFECTED, *AFFECTED)}
    assert covered | ONE_VALUE | LENGTHS == set(field_keys(Config)), "a new key must be put into one of the two lists"
    for key, value in {**UNAFFECTED, **AFFECTED}.items():
        before = {"sample__num_samples": 8, **NEEDED.get(key, {})}
        same = make_config(**before).digest() == make_config(**{**before, key: value}).digest()
        assert same == (key in UNAFFECTED), key


def test_runs_of_before_a_key_existed_keep_their_digest() -> None:
    """What these two gave when the first runs were made."""
    assert Config().digest() == "4d1cd102100c1987b7dd9fed59f5845895726beea297aa4b1bbc970f2cf86a18"
    quickstart = load(PROJECT / "configs" / "quickstart.yaml")
    assert quickstart.digest() == "3bfa0d72fbebf650a0bf887acc83a0b4021d6dee8b9d9d5873ae363e2042b0b5"


def test_a_length_in_images_or_epochs_becomes_steps_rounded_up() -> None:
    by_steps = make_config(train__total_steps=7)
    assert by_steps.resolve_length(10) is by_steps
    in_images = make_config(train__total_steps=None, train__total_images=9)  # batches of 4
    assert in_images.resolve_length(10) == make_config(train__total_steps=3)
    in_epochs = make_config(train__total_steps=None, train__total_epochs=2)
    assert [in_epochs.resolve_length(n).train.total_steps for n in (4, 10, 11)] == [2, 5, 6]
    assert in_epochs.resolve_length(10) == make_config(train__total_steps=5)


def test_the_warm_up_is_compared_with_the_length_once_it_is_known() -> None:
    config = make_config(train__total_steps=None, train__total_epochs=1, train__lr_schedule="cosine")  # warm-up 3
    assert config.resolve_length(13).train.total_steps == 4
    with pytest.raises(RequestError, match=r"12 images: train.warmup_steps = 3: must be below train.total_steps = 3"):
        config.resolve_length(12)


@pytest.mark.parametrize(
    ("text", "overrides", "length"),
    [
        ("", [], (800000, None, None)),
        ("train: {total_epochs: 3}", [], (None, None, 3)),
        ("train: {total_steps: 5}", ["train.total_epochs=2"], (None, None, 2)),
        ("train: {total_epochs: 3}", ["train.total_steps=7"], (7, None, None)),
        ("train: {total_epochs: 3}", ["train.total_steps=7", "train.total_images=9"], (None, 9, None)),
        ("train: {total_steps: 5}", ["train.total_epochs=null"], (5, None, None)),
    ],
)
def test_the_last_word_on_the_length_wins(
    tmp_path: Path, text: str, overrides: list[str], length: tuple[int | None, ...]
) -> None:
    train = read(tmp_path, text, *overrides).train
    assert (train.total_steps, train.total_images, train.total_epochs) == length


def test_an_average_that_would_never_be_one_is_refused_once_the_length_is_known() -> None:
    config = make_config(train__total_steps=None, train__total_epochs=1, train__ema_every_steps=4)  # batches of 4
    assert config.resolve_length(13).train.total_steps == 4
    with pytest.raises(RequestError, match=r"12 images: train.ema_every_steps = 4: at most train.total_steps = 3"):
        config.resolve_length(12)


def test_a_config_that_other_code_wrote_says_where_that_code_is(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text("train: {lr_schedule: decay}\n")
    with pytest.raises(RequestError, match="must be 'constant' or 'cosine'") as e:
        of_run(run)
    assert "checkout" not in str(e.value)
    run.code.touch()
    for read_it in (of_run, lambda run: load(run.config, ["train.lr=1"])):
        with pytest.raises(RequestError, match=r"that checkout, or from what .*run/code\.zip unpacks to"):
            read_it(run)
    with pytest.raises(RequestError, match=r"train\.lr") as e:
        run.config.write_text("train: {}\n")
        load(run.config, ["train.lr=fast"])
    assert "checkout" not in str(e.value)


def test_a_key_that_is_added_leaves_the_digests_of_runs_from_before_it() -> None:
    class Weighted(Diffusion):
        snr_gamma: float | None = None

    class Later(Config):
        diffusion: Weighted = Weighted()

    assert Later().digest() == Config().digest()
    assert Later(diffusion=Weighted(snr_gamma=5.0)).digest() != Config().digest()


@pytest.mark.parametrize("steps", [0, 5])
def test_a_default_that_was_changed_since_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The file was not: it says what it always said."""
    run, config = RunDir(tmp_path / "run"), Config(train=Train(ema_start_step=steps))
    run.path.mkdir()
    run.config.write_text(config.to_yaml())
    files.write_json(run.run_json, {"schema": 1, "config_digest": config.digest()})
    assert of_run(run).digest() == config.digest()

    class Changed(Train):
        ema_start_step: int = 5

    class Later(Config):
        train: Changed = Changed()

    monkeypatch.setattr(reading, "Config", Later)
    with pytest.raises(RequestError, match=r"was changed, or the default of train\.ema_start_step was in ddpm/config"):
        of_run(run)


@pytest.mark.parametrize("kind", ["linear", "dns"])
@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_the_least_alpha_bar_that_is_allowed_is_that_of_the_schedule(
    monkeypatch: pytest.MonkeyPatch, kind: str, timesteps: int
) -> None:
    words = {"timesteps": timesteps, "schedule": kind, "beta_start": 1e-5, "beta_end": 1.2e-4 * timesteps}
    last = float(schedule.build(Diffusion(**words)).alpha_bar[-1])
    monkeypatch.setattr("ddpm.config.diffusion.LEAST_ALPHA_BAR", last * (1 - 1e-6))
    Diffusion(**words)
    monkeypatch.setattr("ddpm.config.diffusion.LEAST_ALPHA_BAR", last * (1 + 1e-6))
    with pytest.raises(ValueError, match="float32"):
        Diffusion(**words)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m"])
def test_the_noisiest_schedule_that_is_allowed_can_be_sampled(sampler: str) -> None:
    diffusion = Diffusion(beta_end=0.158)
    with pytest.raises(ValueError, match="float32"):
        Diffusion(beta_end=0.17)
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    coefficients = SAMPLERS[sampler](schedule.build(diffusion), 20)
    drawn = sample(lambda x_t, t: 0.9 * x_t, coefficients, x_T, noise=lambda t: torch.ones_like(x_T))
    assert drawn.x_0.isfinite().all()


def test_what_is_allowed_and_hardly_meant_is_warned_of(tmp_path: Path) -> None:
    assert [w for path in (PROJECT / "configs").glob("*.yaml") for w in load(path).warnings()] == []
    (blind,) = read(tmp_path, "", "model.norm_groups=128").warnings()
    assert blind.startswith("model.norm_groups = 128: a group for each channel of level 0,")
    (short,) = read(tmp_path, "", "train.total_steps=100", "train.ema_warmup=true").warnings()
    assert short.startswith("train.warmup_steps = 5000: train.total_steps = 100 ") and "train.warmup_steps=10" in short
    brief = ["train.total_steps=100", "train.ema_warmup=true"]
    assert read(tmp_path, "", *brief, "train.warmup_steps=100").warnings() != []
    assert read(tmp_path, "", *brief, "train.warmup_steps=10").warnings() == []


@pytest.mark.parametrize(
    ("words", "share"),
    [
        (["train.total_steps=100"], "99%"),
        (["train.total_steps=5000"], "61%"),
        (["train.total_steps=5000", "train.ema_start_step=4000"], "90%"),
        (["train.total_steps=5000", "train.ema_every_steps=10"], "95%"),
        (["train.total_steps=5000", "train.ema_decay=0.999"], ""),
        (["train.total_steps=5000", "sample.weights=model"], ""),
        (["train.total_steps=50000"], ""),
        (["train.total_epochs=1"], ""),  # it is told once the data is counted
    ],
)
def test_an_average_that_has_hardly_begun_to_move_is_warned_of(tmp_path: Path, words: list[str], share: str) -> None:
    told = read(tmp_path, "", "train.warmup_steps=0", *words).warnings()
    assert len(told) == bool(share) and all(f"{share} of the weights that it began with" in line for line in told)


def test_what_belongs_together_is_accepted(tmp_path: Path) -> None:
    guided = f"{TWO_CLASSES}\ntrain: {{label_dropout: 0.1}}\nsample: {{guidance: 2, num_samples: 64}}"
    assert read(tmp_path, guided, "sample.class_plan=[60, 4]").sample.class_plan == (60, 4)
    faces = read(tmp_path, "", "data.name=celeba", "data.label_attributes=[Male, Smiling]", "model.num_classes=4")
    assert faces.data.label_attributes == ("Male", "Smiling")
    kept = read(tmp_path, "", "data.name=celeba", "data.attributes={5_o_Clock_Shadow: false}")
    assert kept.data.attributes == {"5_o_Clock_Shadow": False}
    assert read(tmp_path, kept.to_yaml()) == kept
    assert read(tmp_path, "diffusion: {schedule: cosine, timesteps: 10}\nsample: {steps: 10}").diffusion.timesteps == 10


def test_length_changes_the_digest_where_the_learning_rate_depends_on_it() -> None:
    cosine = {"train__lr_schedule": "cosine"}
    assert make_config(**cosine).digest() != make_config(**cosine, train__total_steps=9).digest()


def test_every_key_is_documented_where_it_is_declared() -> None:
    sections = [f.annotation for f in Config.model_fields.values() if isinstance(f.annotation, type(Section))]
    fields = {f"{s.__name__}.{k}": f for s in sections if issubclass(s, Section) for k, f in s.model_fields.items()}
    assert "Train.total_steps" in fields and [key for key, field in fields.items() if not field.description] == []


def test_a_config_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        make_config().train.lr = 1.0  # type: ignore[misc]


def test_a_batch_that_does_not_divide_lists_what_does() -> None:
    config = make_config(train__global_batch=12, train__micro_batch=2)
    assert [check_world_size(config, n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(RequestError, match=re.escape("[1, 2, 3, 4, 6, 12]")):
        check_world_size(config, 5)
    with pytest.raises(RequestError, match=r"micro_batch = 2 .*share of 3 .*\[1, 3\]"):
        check_world_size(config, 4)


def test_build_names_where_a_tree_came_from() -> None:
    with pytest.raises(RequestError, match=r"^somewhere: unknown key"):
        build(Config, {"lrr": 1}, "somewhere")


@pytest.mark.parametrize(("written", "steps"), [("1e6", 1_000_000), ("1_000_000", 1_000_000), ("2E+3", 2000)])
def test_a_number_of_steps_may_be_written_as_people_do(written: str, steps: int) -> None:
    config = load(PROJECT / "configs" / "cifar10.yaml", [f"train.total_steps={written}", "train.lr=1e0"])
    assert config.train.total_steps == steps and config.train.lr == 1.0


@pytest.mark.parametrize("written", ["12:00", "010", "1.5e0", "2026-12-01", "1e-6"])
def test_what_is_no_number_of_steps_is_not_read_as_another(written: str) -> None:
    with pytest.raises(RequestError, match=r"train\.total_steps"):
        load(PROJECT / "configs" / "cifar10.yaml", [f"train.total_steps={written}"])


@pytest.mark.parametrize(("typed", "answer"), [
    ("train.learning_rate", "did you mean 'train.lr'?"), ("trian.lr", "did you mean 'train.lr'?"),
    ("batch_size", "did you mean 'train.global_batch' or 'sample.batch'?"),
    ("train.batch_size", "did you mean 'train.global_batch'?"), ("epochs", "did you mean 'train.total_epochs'?"),
    ("num_steps", "did you mean 'train.total_steps' or 'sample.steps'?"),
    ("train.steps", "did you mean 'train.total_steps'?"), ("mixed_precision", "did you mean 'train.amp'?"),
    ("train.foo", "the nearest are train.total_epochs, train.label_dropout, train.early_stop_below; --dry-run"),
])  # fmt: skip
def test_a_key_of_another_trainer_is_answered_with_ours(tmp_path: Path, typed: str, answer: str) -> None:
    assert answer in refusal(tmp_path, "", f"{typed}=1")


def test_whatever_others_call_a_key_is_one_of_ours() -> None:
    assert {key for keys in SYNONYMS.values() for key in keys} <= set(field_keys(Config))
