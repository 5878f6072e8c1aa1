"""A run that starts from another's weights: in each life before its first save, and after a rollback, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ddpm.config.schema import Config
from ddpm.errors import DoNotRetry, RequestError
from ddpm.network import start
from ddpm.run import generations
from ddpm.run.files import write_bytes
from ddpm.run.paths import RunDir
from tests.training import Killed, Life, assert_same_end, differences, events, live, make_config, make_run, poison


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("source") / "source")
    live(make_config(seed=5, checkpoint__every_steps=4, checkpoint__keep_last=9), run)
    return run


def begun(path: Path, source: RunDir, config: Config, weights: str = "ema") -> tuple[RunDir, dict[str, Any]]:
    """A run that is to start from the source's step 4, and its record."""
    run, found = make_run(path), start.of_run(source, 4, weights, config, print)
    write_bytes(run.start, found.data)
    return run, found.record


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_model_and_average_begin_with_the_weights_and_the_rest_afresh(tmp_path, source, weights):
    config = make_config(train__lr=0.003)
    run, record = begun(tmp_path / "run", source, config, weights)
    there = generations.load(source, 4)
    assert record == {
        "source": str(source.path),
        "step": 4,
        "weights": weights,
        "sha256": generations.verify(source, 4).sha256,
        "config_digest": make_config(seed=5).digest(),
        "start_sha256": record["start_sha256"],
    }
    assert differences(there["ema"], there["model"])
    with Life(config, run, start=record) as life:
        state = life.trainer.state.state_dict()
    for part in ("model", "ema"):
        assert differences(dict(state[part]), dict(there[weights])) == []
    assert state["step"] == 0 and state["optimizer"]["state"] == {}
    assert state["config_digest"] == config.digest()


def test_a_life_that_dies_before_its_first_save_takes_nothing_from_the_next(tmp_path, source):
    config = make_config()
    undisturbed, record = begun(tmp_path / "a", source, config)
    live(config, undisturbed, start=record)
    run, record = begun(tmp_path / "b", source, config)
    with pytest.raises(Killed), Life(config, run, start=record) as life:
        life.train(kill_at=3)
    assert run.steps_saved() == []
    live(config, run, start=record)
    assert_same_end(run, undisturbed, 8)
    seeds = make_run(tmp_path / "seeds")
    live(config, seeds)
    assert differences(generations.load(seeds, 8)["model"], generations.load(run, 8)["model"])


def test_a_rollback_with_nothing_saved_goes_back_to_the_weights(tmp_path, source):
    config = make_config()
    run, record = begun(tmp_path / "run", source, config)
    seen = []
    with Life(config, run, start=record) as life:
        poison(life.trainer, lambda t: t.at.step == 2 and t.at.attempt == 0)
        start_over = life.trainer.state.begin_with
        life.trainer.state.begin_with = lambda weights: (seen.append(weights), start_over(weights))
        life.train()
    assert "rollback" in events(run)
    assert [differences(dict(w), dict(generations.load(source, 4)["ema"])) for w in seen] == [[]]


def test_a_start_that_is_damaged_or_gone_ends_the_run_until_there_is_a_save(tmp_path, source):
    config = make_config()
    run, record = begun(tmp_path / "run", source, config)
    data = bytearray(run.start.read_bytes())
    data[-1] ^= 1
    run.start.write_bytes(data)
    life = Life(config, run, start=record)
    with pytest.raises(DoNotRetry, match=r"start\.safetensors is damaged: .* submit it again --from /"):
        life.trainer.resume()
    run.start.unlink()
    with pytest.raises(DoNotRetry, match=r"start\.safetensors is missing"):
        life.trainer.resume()
    assert life.fence is not None
    life.fence.release()
    data[-1] ^= 1
    run.start.write_bytes(data)
    with Life(config, run, start=record) as life:
        life.train(stop_at=[3])
    run.start.unlink()  # by now a checkpoint holds all
    live(config, run, start=record)


def test_what_does_not_fit_is_named_with_both_shapes(source):
    with pytest.raises(RequestError) as e:
        start.of_run(source, 8, "ema", make_config(model__base_channels=16), print)
    assert "such as bottleneck.attentions.0.norm.bias (16 there, 32 here), " in str(e.value)
    with pytest.raises(RequestError, match=r"has no checkpoint of step 5; it has \[4, 8\]"):
        start.of_run(source, 5, "ema", make_config(), print)


WRAPPED = {
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "DDP, compiled": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "compiled, DDP": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **{f"module.{k}": v for k, v in s.items()}},
    "ema_pytorch": lambda s: {
        **{f"online_model.{k}": v + 1 for k, v in s.items()},
        **{f"ema_model.{k}": v for k, v in s.items()},
        **{"initted": torch.tensor(True), "step": torch.tensor(9)},
    },
    "half": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("case", WRAPPED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_weights_as_others_write_them_is_the_same_start(tmp_path, source, case, suffix):
    config, state = make_config(), generations.load(source, 8)["ema"]
    if case == "half":
        state = {k: v.half().float() for k, v in state.items()}
    path = tmp_path / f"weights{suffix}"
    wrapped = {k: v.contiguous() for k, v in WRAPPED[case](state).items()}
    if suffix == ".pt":
        torch.save(wrapped, path)
    else:
        safetensors.torch.save_file(wrapped, path, metadata={"step": "last", "format": "pt"})
    found = start.of_file(path, None, config)
    assert differences(safetensors.torch.load(found.data), dict(state)) == []
    assert (found.record["step"], found.record["source"]) == (None, str(path))


def test_prefixes_stay_where_the_rest_does_not_fit(tmp_path, source):
    state = {f"module.{k}": v for k, v in generations.load(source, 8)["ema"].items()}
    state["module.head.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"module\.\S+ \(which the network does not have\)"):
        start.of_file(tmp_path / "w.pt", None, make_config())


def test_a_checkpoint_of_ours_or_a_frameworks_gives_the_set_that_is_asked_for(tmp_path, source):
    state = generations.load(source, 8)
    for weights in ("ema", "model"):
        found = start.of_file(source.checkpoint(8), weights, make_config())
        assert differences(safetensors.torch.load(found.data), dict(state[weights])) == []
    torch.save({"state_dict": state["ema"], "epoch": 3, "hyper": {"lr": "x"}}, tmp_path / "w.ckpt")
    found = start.of_file(tmp_path / "w.ckpt", None, make_config())
    assert differences(safetensors.torch.load(found.data), dict(state["ema"])) == []


def test_files_that_hold_no_weights_are_refused_in_words(tmp_path, source):
    config, path = make_config(), tmp_path / "w.pt"
    for content, told in [([1], "holds a list, not"), ({"net": {}, "opt": {}}, "holds a dict of net, opt, …, not")]:
        torch.save(content, path)
        with pytest.raises(RequestError, match=told):
            start.of_file(path, None, config)
    path.write_bytes(b"no pickle")
    with pytest.raises(RequestError, match="not a readable file of weights"):
        start.of_file(path, None, config)
    state = dict(generations.load(source, 8)["ema"])
    state["conv_in.bias"] = state["conv_in.bias"] * float("nan")
    torch.save(state, path)
    with pytest.raises(RequestError, match=r"conv_in\.bias is not finite"):
        start.of_file(path, None, config)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RequestError, match="holds one set of weights: leave --from-weights out"):
        start.of_file(tmp_path / "w.safetensors", "model", config)
