"""A life that computes the statistics of a reference, alone or as one of several tasks. Loads torch."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.config import reading
from ddpm.data.packed import PackedImages
from ddpm.run.log import counted, say
from ddpm.run.records import data_of
from ddpm.scoring.against import open_reference
from ddpm.scoring.extractors import beside, build_extractor
from ddpm.scoring.reference import publish_statistics, reference_of
from launch.life import devices
from launch.life.life import Life
from launch.life.pace import shown


def save_statistics(life: Life, split: str, extractor: str, path: Path) -> int:
    """Write the statistics of the run's own images to `path`, and to where evaluations look for them."""
    run, env = life.run, life.env
    config, cache = reading.of_run(run), Path(data_of(run)["cache"])
    life.heed_stop()
    torch.set_num_threads(env.cpus)
    device, show = devices.one_device(env), shown("features of the reference")

    def compute() -> int:
        images = open_reference(run, config, split, life.stop)
        assert isinstance(images, PackedImages)  # of a split
        by = build_extractor(extractor, device, image_size=config.data.image_size, shared=beside(cache))
        made = reference_of(images, by, cache / "reference", progress=show, worker=life.worker)
        if not env.array_task:  # the first task's to write
            publish_statistics(path, made, images, by, env.token)
            say(f"{path}: statistics of {counted(len(images), 'image')} of {split}, {by.name} features")
        return life.leave(0)

    return life.result_of(compute)
