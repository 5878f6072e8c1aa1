"""The request of bits per dimension: bits-per-dim/NAME/request.json. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.paths import BoundSet, RunDir, fit_name
from ddpm.sampling.request import CheckpointRef, differences, precision_of


@dataclass(frozen=True)
class BoundRequest:
    """Everything that the number depends on except the images: the fields of request.json, except its digest."""

    checkpoint: CheckpointRef
    weights: str
    split: str
    """`test` or `train`, of the run's data."""
    num_images: int | None
    """Number of images, chosen by the seed; None: all."""
    seed: int
    batch: int
    precision: str
    variance: str
    clip_x_0: bool

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of the fields."""
        return files.sha256_json(asdict(self))

    @property
    def name(self) -> str:
        """The name of its directory and of its score."""
        some = "" if self.num_images is None else f"-{self.num_images}"
        of = "" if self.weights == "ema" else f"-{self.weights}"
        return fit_name(f"bits-per-dim-{self.split}{some}-step{self.checkpoint.step}{of}-seed{self.seed}")

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> BoundRequest:
        """The request in request.json's content. Raises DamagedFile if its form or digest is wrong."""
        body = {k: v for k, v in record.items() if k != "digest"}
        try:
            request = cls(**{**body, "checkpoint": CheckpointRef(**body["checkpoint"])})
        except (KeyError, TypeError) as e:
            raise DamagedFile(f"this version cannot read it ({e})") from None
        if request.digest != record.get("digest"):
            raise DamagedFile("its digest does not match its content")
        return request


def request_of(
    run: RunDir, config: Config, checkpoint: CheckpointRef, split: str, num_images: int | None
) -> BoundRequest:
    """The request that the run's config makes for one checkpoint."""
    s = config.sample
    return BoundRequest(
        checkpoint, s.weights, split, num_images, s.seed, s.batch if num_images is None else min(s.batch, num_images),
        precision_of(config, run), config.diffusion.variance, s.clip_x_0,
    )  # fmt: skip


def publish(where: BoundSet, request: BoundRequest) -> None:
    """Publish the request, unless it exists already. Raises RequestError if there is another one under its name."""
    where.path.parent.mkdir(exist_ok=True)  # never the run itself, which may have been moved away
    where.path.mkdir(exist_ok=True)
    try:
        files.write_json(where.request, {**asdict(request), "digest": request.digest})
    except FileExistsError:
        there = read(where)
        if there != request:
            raise RequestError(
                f"{where.path} was begun with another request: {differences(there, request)}; ask for the same, or "
                f"remove it"
            ) from None


def read(where: BoundSet) -> BoundRequest:
    """The request. Raises RequestError if it is missing or damaged, OSError if it cannot be read."""
    try:
        record = files.parse_json(files.read_bytes(where.request))
        return BoundRequest.from_record(record if isinstance(record, dict) else {})
    except FileNotFoundError:
        raise RequestError(f"{where.request}: there is no such request") from None
    except (DamagedFile, ValueError, IsADirectoryError) as e:
        raise RequestError(f"{where.request} is damaged: {e}; remove {where.path}, and ask again") from None
