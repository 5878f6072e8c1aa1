"""Batches of images: ours, flipped, beside a folder of PNG files through torchvision with two workers."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm.data.batches import Batches
from tools.bench.figures import Figure, Result
from tools.bench.measure import Bench
from tools.bench.workloads import noise_images

BATCH = 128


def row(bench: Bench) -> Result:
    from torchvision import datasets, transforms

    images = noise_images(bench.pick(gpu=4096, cpu=4096, small=256))
    torch.set_num_threads(bench.threads)
    batches = Batches(images, seed=0, attempt=0, global_batch=BATCH, flip=True)
    at = itertools.count()
    batches.rows(next(at), 0, BATCH, bench.device)
    own = BATCH / bench.median(lambda: batches.rows(next(at), 0, BATCH, bench.device), rounds=7, calls=20)
    with tempfile.TemporaryDirectory() as where:
        (Path(where) / "class").mkdir()
        for i, image in enumerate(np.asarray(images.images)):
            Image.fromarray(image).save(Path(where) / "class" / f"{i}.png")
        change = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                     transforms.Normalize([0.5] * 3, [0.5] * 3)])  # fmt: skip
        folder = datasets.ImageFolder(where, change)
        loader = torch.utils.data.DataLoader(folder, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
        all(x is not None for x, _ in loader)  # workers start
        theirs = len(folder) / bench.median(lambda: all(x is not None for x, _ in loader), rounds=3, warm_up=0)
    return Result([Figure(f"batches of {BATCH}, flipped", own, "images/s"),
                   Figure("an ImageFolder, 2 workers", theirs, "images/s"),
                   Figure("ours to theirs", own / theirs, "x", at_least=bench.goal(cpu=40))])  # fmt: skip
