"""A model card in Markdown: what a model is, how it was trained, its scores, and how to use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddpm.config.schema import Config
from ddpm.data.labels import class_names
from ddpm.run.log import counted
from ddpm.scoring.record import SCORE_NAMES, Score, against, caution, ends, key_of, number, sampler_words

USE = """```python
import ddpm

model = ddpm.load(".")  # in this folder; from elsewhere, its path
images = model.sample(16, seed=0)  # uint8 (16, {size}, {size}, 3)
{of_class}```"""
OF_CLASS = "images = model.sample(16, labels=model.classes[0])  # of one class, or a label for each image{guided}\n"


def card(
    config: Config, record: dict[str, Any], manifest: dict[str, Any], sha256: str, scores: list[Score], *, name: str
) -> str:
    """The text of the card. record: run.json; manifest: of the exported checkpoint; sha256: of the weights file."""
    parts = [
        "---\nlibrary_name: ddpm-hpc\ntags: [diffusion, ddpm, unconditional-image-generation]\n---"
        if not config.model.num_classes
        else "---\nlibrary_name: ddpm-hpc\ntags: [diffusion, ddpm, class-conditional]\n---",
        f"# {name}",
        f"A diffusion model of {config.data.image_size}x{config.data.image_size} images: the exponential average of "
        f"its weights after {counted(manifest['step'], 'step', ',')}.",
        USE.format(size=config.data.image_size, of_class=_of_class(config)),
        "## Training",
        _table([("", ""), *_training(config, record, manifest)]),
        *_classes(config, record),
        "## Scores",
        _scores(scores),
        "## Files",
        _table([
            ("", ""),
            ("model.safetensors", f"sha256 `{sha256}`"),
            ("config.yaml", f"its mathematics has the digest `{config.digest()}`"),
            ("its checkpoint", f"sha256 `{manifest['sha256']}`, saved {manifest['created']}"),
        ]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _of_class(config: Config) -> str:
    guided = "; guidance=1.5 is possible" if config.train.label_dropout else ""
    return OF_CLASS.format(guided=guided) if config.model.num_classes else ""


def _training(config: Config, record: dict[str, Any], manifest: dict[str, Any]) -> list[tuple[str, str]]:
    data, train, versions = record.get("data") or {}, config.train, record.get("versions") or {}
    found = record.get("resolved") or {}
    lines = [
        (
            "data",
            config.data.name + (f", {counted(data['num_images'], 'image', ',')}" if data.get("num_images") else ""),
        ),
        ("digest of its pixels", f"`{data['digest']}`" if data.get("digest") else ""),
        ("seen", f"{counted(manifest['images'], 'image', ',')} in batches of {train.global_batch}"),
        ("network", f"U-Net, {config.model.base_channels} channels times {list(config.model.channel_mults)}"),
        ("noise", f"{counted(config.diffusion.timesteps, 'step')}, {config.diffusion.schedule}"),
        ("optimizer", f"{train.optimizer}, learning rate {train.lr:g}, {train.lr_schedule}"),
        ("labels", f"dropped with probability {train.label_dropout:g}, for guidance" if train.label_dropout else ""),
        ("average", f"decay {train.ema_decay:g}" + (", warmed up" if train.ema_warmup else "")),
        ("seed", str(config.seed)),
        (
            "on",
            f"{found.get('world_size', 1)} × {found['device']}, amp {found.get('amp')}" if "device" in found else "",
        ),
        ("code", f"ddpm-hpc {versions.get('ddpm-hpc', '?')}, commit {record.get('git') or 'unknown'}"),
        ("with", ", ".join(f"{k} {v}" for k, v in versions.items() if v and k in ("python", "torch", "numpy"))),
    ]
    return [(what, told) for what, told in lines if told]


def _classes(config: Config, record: dict[str, Any]) -> list[str]:
    rows = [(str(label), name) for label, name in enumerate(class_names(config, record))]
    return ["## Classes", _table([("label", "class"), *rows])] if rows else []


def _scores(scores: list[Score]) -> str:
    if not scores:
        return "None was computed of these weights."
    rows: list[tuple[str, ...]] = [
        ("score", "value", "95 %", "sampler", "evaluations", "samples", "features", "seed", "computed")
    ]
    for score in scores:
        r = score.record
        of = r.get("extractor") or {"name": "-"}  # bits per dimension have none, and no sampler
        sampler = r.get("sampler") or {"name": "-"}
        features = of["name"] + (f" (sha256 {of['weights_sha256'][:12]})" if of.get("weights_sha256") else "")
        rows.append((
            SCORE_NAMES[key_of(r)] + caution(r), number(r), " to ".join(ends(r)) or "-", sampler_words(sampler),
            str(r["nfe"]), against(r), features, str(r.get("seed", "-")), str(r.get("created", "-"))[:10],
        ))  # fmt: skip
    return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *others = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others))
