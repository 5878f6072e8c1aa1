"""The package as a library: configs, networks, and trained models that are sampled into arrays.

Owns: how a run directory, or a file of EMA weights, becomes a `Model`. Must not know: launchers, or sample sets on
disk. sampling/generate.py computes samples, so that a request gives the same bytes here as in a job.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.config import reading, section
from ddpm.config.sample import kind_of
from ddpm.config.schema import Config
from ddpm.data.batches import Batches
from ddpm.data.labels import class_index
from ddpm.data.packed import pack
from ddpm.diffusion import schedule as schedules
from ddpm.diffusion.forward import Diffusion
from ddpm.errors import RequestError, shown
from ddpm.network import build
from ddpm.network.device import Device, as_device, with_fitting_threads
from ddpm.network.ema import EMA
from ddpm.network.unet import UNet
from ddpm.network.weights import load_network, read_metadata, read_safetensors, set_weights
from ddpm.run import generations
from ddpm.run.files import DamagedFile, parse_json, read_bytes, write_bytes
from ddpm.run.log import counted
from ddpm.run.paths import EXPORTED_CLASSES, EXPORTED_CONFIG, EXPORTED_WEIGHTS, RunDir
from ddpm.run.records import read_run
from ddpm.run.saving import ema_bytes
from ddpm.sampling.denoiser import Denoiser, eps_of
from ddpm.sampling.generate import sample_batch, sample_labels
from ddpm.sampling.pictures import as_output, check_output
from ddpm.sampling.request import CheckpointRef, Request, from_config, precision_of, usual_steps

PRECISIONS = ("fp32", "bf16")


# ---------------------------------------------------------------- parts for a training loop


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config in a YAML file, with `section.key=value` overrides. Raises RequestError for a mistake in it."""
    return reading.load(Path(path), [overrides] if isinstance(overrides, str) else overrides)


def build_model(config: Config, device: Device = None) -> UNet:
    """The config's network with initial weights from its seed, float32, in training mode, on `device`. RequestError for
    a device that this machine does not have."""
    return build.build_model(config, as_device(device), "fp32")


def build_diffusion(config: Config, device: Device = None) -> Diffusion:
    """The config's schedule with the forward process and the loss, its tables on `device`. RequestError as
    `build_model`."""
    return Diffusion(schedules.build(config.diffusion)).to(as_device(device))


def batches(
    config: Config, device: Device = None, *, cache: str | Path = "runs/.cache/data"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in the order of a training run: x_0 float32 (B, 3, H, W) in [-1, 1], labels int64 (B,).

    B is the config's global batch. The images are downloaded and packed into `cache` unless they are there. Raises
    RequestError for unusable data, EnvironmentLacks if it cannot be fetched or written.
    """
    _, packed = pack(config.data, "train", Path(cache).expanduser())
    size, where = config.train.global_batch, as_device(device)
    order = Batches(packed, seed=config.seed, attempt=0, global_batch=size, flip=config.data.flip)
    return (order.rows(step, 0, size, where) for step in itertools.count())


def save(
    weights: nn.Module | EMA,
    path: str | Path,
    *,
    config: Config | None = None,
    step: int = 0,
    classes: Sequence[str] = (),
) -> None:
    """Write a network's weights, or their average, as a float32 .safetensors file, for `load` and `submit.py --from`.

    config, classes: stored in it, so that `load` needs no config. step: stored too. Raises RequestError if `path`
    exists, does not end in .safetensors, or its folder does not exist.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise RequestError(f"{path}: name it NAME.safetensors")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}; make it first")
    said = {} if config is None else {"config": config.to_yaml()}
    said |= {"classes": json.dumps(list(classes))} if classes else {}
    state = {name: value.detach().float().cpu() for name, value in weights.state_dict().items()}
    try:
        write_bytes(path, ema_bytes(state, step, **said))
    except FileExistsError:
        raise RequestError(f"{path} exists: choose another name, or remove it") from None


# ---------------------------------------------------------------- a trained model


def load(
    path: str | Path,
    *,
    config: Config | str | Path | None = None,
    step: int | None = None,
    weights: str | None = None,
    device: Device = None,
    precision: str | None = None,
) -> Model:
    """The trained model in a run directory, in a folder that was exported from one, or in a .safetensors file of EMA
    weights with the `config` they belong to, which `save` may have kept in it.

    step: which checkpoint; None: the newest good one. weights: ema | model. precision: fp32 | bf16. For these two, None
    is what a sampling job takes: the config's sample.weights and sample.precision, whose `auto` is bf16 if the run was
    trained in it. A checkpoint's size and digest are verified; damaged ones that are passed over are named on stderr.
    Raises RequestError for something that does not exist or fit, DoNotRetry if all checkpoints of a run are damaged.
    """
    path = Path(path).expanduser()
    if weights not in (None, "ema", "model"):
        raise RequestError(f"weights = {weights!r}: use ema or model")
    if precision not in (None, *PRECISIONS):
        raise RequestError(f"precision = {precision!r}: use one of {', '.join(PRECISIONS)}")
    if path.is_file():
        return _load_file(path, config, step, weights, as_device(device), precision)
    if (path / EXPORTED_WEIGHTS).is_file() and config is None:
        weights_file, config = path / EXPORTED_WEIGHTS, path / EXPORTED_CONFIG
        return _load_file(weights_file, config, step, weights, as_device(device), precision, _exported_classes(path))
    run = RunDir(path)
    if not run.config.is_file():
        raise RequestError(f"{path}: no run directory (it has no config.yaml), and no file of weights")
    if config is not None:
        raise RequestError(f"config goes with a file of weights; {path} is a run and has its own: leave it out")
    return _load_run(run, step, weights, as_device(device), precision)


def _load_run(run: RunDir, step: int | None, weights: str | None, device: torch.device, precision: str | None) -> Model:
    config = reading.of_run(run)
    weights = weights or config.sample.weights
    chosen = generations.choose(run, step, _warn).step
    precision = precision or precision_of(config, run)
    network = load_network(config, run, chosen, weights, device, precision)
    return Model(config, network, precision=precision, step=chosen, weights=weights, classes=_classes_of(run))


def _classes_of(run: RunDir) -> list[str]:
    """The names of the classes that the run was trained on; [] if an old run does not record them."""
    labels = read_run(run).get("labels") if run.run_json.exists() else None
    return list(labels.get("classes") or {}) if isinstance(labels, dict) else []


def _exported_classes(folder: Path) -> list[str]:
    """The names of the classes in an exported folder; [] if it has no file of them."""
    path = folder / EXPORTED_CLASSES
    try:
        return list(map(str, parse_json(read_bytes(path))))
    except FileNotFoundError:
        return []
    except (OSError, DamagedFile, TypeError, ValueError):
        raise RequestError(f"{path}: no list of class names can be read from it; export again, or remove it") from None


def _load_file(
    path: Path,
    config: Config | str | Path | None,
    step: int | None,
    weights: str | None,
    device: torch.device,
    precision: str | None,
    classes: Sequence[str] = (),
) -> Model:
    run, step_of = RunDir(path.absolute().parent.parent), path.stem.removeprefix("step-")
    if path.suffix == ".pt" and step_of.isdecimal() and run.config.is_file():
        raise RequestError(f"{path} is a checkpoint of a run: load that, {str(run.path)!r} with step={int(step_of)}")
    said = read_metadata(path)
    if config is None and "config" in said:
        config = reading.of_text(said["config"], path)
    if config is None:
        raise RequestError(f"{path}: weights do not say what network they are of; give config=, a Config or its YAML")
    if step is not None or weights == "model":
        raise RequestError(f"{path} holds one step's EMA weights: step and weights go with a run directory")
    if not isinstance(config, Config):
        config = load_config(config)
    state, saved_at = read_safetensors(path)
    precision = precision or precision_of(config, None)
    network = build.build_model(config, device, precision)
    set_weights(network, state, str(path))
    try:
        classes = classes or list(map(str, json.loads(said["classes"])))
    except (KeyError, TypeError, ValueError):
        classes = []
    return Model(config, network.eval(), precision=precision, step=saved_at, classes=classes)


class Model:
    """A trained network, and everything else that its samples depend on.

    network: the config's, in eval mode, on any device. precision: fp32 | bf16, in which it is evaluated. step, weights:
    where it comes from, for messages. classes: names by label; by default their numbers.
    """

    def __init__(
        self,
        config: Config,
        network: UNet,
        *,
        precision: str = "fp32",
        step: int = 0,
        weights: str = "ema",
        classes: Sequence[str] = (),
    ) -> None:
        self.config, self.network = config, network
        self.precision, self.step, self.weights = precision, step, weights
        num = config.model.num_classes
        self.classes = list(classes) if len(classes) == num else [str(i) for i in range(num)]
        self.schedule = schedules.build(config.diffusion)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def __repr__(self) -> str:
        size, num = self.config.data.image_size, sum(p.numel() for p in self.network.parameters())
        classes = f", {counted(len(self.classes), 'class')}" if self.classes else ""
        return (
            f"<Model {self.config.name}: {self.weights} of step {self.step:,}, {num:,} parameters, "
            f"{size}x{size}{classes}, {self.precision} on {self.device}>"
        )

    def to(self, device: Device) -> Model:
        """Move the network to `device` and return the model. None: a GPU if there is one, else the CPU.

        Raises RequestError for a device that this machine does not have.
        """
        self.network.to(as_device(device))
        return self

    def save(self, path: str | Path) -> None:
        """Write the weights by `ddpm.save`, with all that `load` needs to restore this model. Raises as that."""
        save(self.network, path, config=self.config, step=self.step, classes=self.classes)

    def eps(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The noise that the network predicts for x_t: float32 (B, C, H, W), without gradients.

        x_t: (B, C, H, W) floating; t: int64 (B,), 0 .. T-1; labels: int64 (B,), for a model with classes, where
        num_classes means "no label" if it was trained with label_dropout. All on `device`. ValueError for others.
        """
        config = self.config
        _check_whole("t", t, len(x_t), config.diffusion.timesteps)
        if labels is not None and config.model.num_classes:
            _check_whole("labels", labels, len(x_t), config.model.num_classes + (config.train.label_dropout > 0))
        return eps_of(self.network, self.precision)(x_t, t, labels)

    def sample(
        self,
        num: int,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        labels: int | str | Sequence[int | str] | np.ndarray | Tensor | None = None,
        seed: int | None = None,
        batch: int | None = None,
        clip_x_0: bool | None = None,
        variance: str | None = None,
        output: str = "numpy",
    ) -> Any:
        """Sample images 0 .. num-1 of a request: uint8 (num, H, W, 3). output: numpy; torch, the same bytes as a
        tensor, uint8 (num, 3, H, W), on the CPU; pil, a list of RGB pictures.

        Arguments that are None are taken from the config's `sample` section; steps of a sampler that is not the
        config's are 100 for ddim, 20 for dpmpp_2m, all timesteps for ancestral. labels: one class for all images, by
        its index or its name in `classes`, or (num,) of them; None: the classes in turn. batch: rows of every network
        call, used or not; by default at most `num`. variance: fixed_large | fixed_small, of ancestral sampling; None:
        the config's diffusion.variance.

        Image i is a function of (seed, i) and the request: on the same device it has the bytes of a run's sample set
        with the same sampler, steps, eta, guidance, labels, batch, variance and precision. Raises RequestError for
        values that the config does not allow, DoNotRetry if the network's output is not finite.
        """
        check_output(output)
        asked = {
            "sampler": sampler,
            "steps": steps,
            "eta": eta,
            "guidance": guidance,
            "seed": seed,
            "batch": batch,
            "clip_x_0": clip_x_0,
        }
        request = self._request(num, {name: value for name, value in asked.items() if value is not None}, variance)
        denoiser = Denoiser.of(self.config, self.network, self.precision)
        classes = sample_labels(request, 0, num, denoiser.num_classes) if labels is None else self._labels(labels, num)
        firsts = range(0, num, request.batch)
        with with_fitting_threads(self.config, request.batch, self.device):
            parts = [sample_batch(request, denoiser, first, classes[first : first + request.batch]) for first in firsts]
        return as_output(np.concatenate([part.images for part in parts]), output)

    def _request(self, num: int, asked: dict[str, Any], variance: str | None) -> Request:
        """The request for `num` images, checked like a config."""
        tree = self.config.model_dump()
        changes: dict[str, Any] = {"num_samples": num, "shards": 1, "class_plan": None}
        if "sampler" in asked:
            changes["steps"] = usual_steps(self.config, asked["sampler"])
            if not kind_of(asked["sampler"]).has_eta:
                changes["eta"] = 0.0  # the config's eta is meant for its own sampler
        tree["sample"] |= {**changes, **asked}
        config = section.build(Config, tree, "sample()")
        request = from_config(config, CheckpointRef(self.step, ""), self.precision, variance)
        return replace(request, batch=asked.get("batch", request.batch), weights=self.weights)

    def _labels(self, labels: int | str | Sequence[int | str] | np.ndarray | Tensor, num: int) -> np.ndarray:
        """The label of each image, int64 (num,). Raises RequestError."""
        classes = self.config.model.num_classes
        if not classes:
            raise RequestError("labels: the model has no classes (model.num_classes = 0); leave them out")
        many: Any = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
        is_one = isinstance(many, str) or not isinstance(many, Iterable) or getattr(many, "ndim", 1) == 0

        def index(label: Any) -> Any:
            return class_index(label, self.classes, "labels") if isinstance(label, str) else label

        try:
            given = np.asarray([index(x) for x in ([many] * num if is_one else many)])
        except ValueError:  # lists of several lengths
            given = np.empty(0, object)
        if given.shape != (num,) or given.dtype.kind not in "iu" or ((given < 0) | (given >= classes)).any():
            told = f"labels = {shown(labels)}" if is_one else f"labels of shape {given.shape}, {given.dtype}"
            raise RequestError(
                f"{told}: must be {num} whole numbers, one per image, "
                f"from 0 to {classes - 1} (model.num_classes = {classes})"
            )
        return given.astype(np.int64)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)  # not stdout: what a script prints may be data


def _check_whole(name: str, values: Tensor, num: int, below: int) -> None:
    if values.shape != (num,) or values.is_floating_point() or bool(((values < 0) | (values >= below)).any()):
        raise ValueError(f"{name} of shape {tuple(values.shape)}: must be {num} whole numbers from 0 to {below - 1}")
