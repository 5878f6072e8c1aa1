"""What the config names, the rooms above it do: no name without its work, and no work without a name."""

from typing import get_args

from ddpm.config import model as of_networks
from ddpm.config import sample as of_samples
from ddpm.config import schema, section
from ddpm.config.diffusion import Diffusion
from ddpm.config.train import WITHOUT_LENGTH, Train
from ddpm.diffusion import samplers, schedule
from ddpm.training import optimizer


def names(section: type, field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))  # type: ignore[attr-defined]


def test_every_sampler_that_may_be_asked_for_is_there() -> None:
    assert names(of_samples.Sample, "sampler") == of_samples.SAMPLERS.keys() == samplers.SAMPLERS.keys()


def test_every_noise_schedule_that_may_be_asked_for_is_there() -> None:
    assert names(Diffusion, "schedule") == schedule.SCHEDULES.keys()


def test_every_learning_rate_schedule_that_may_be_asked_for_is_there() -> None:
    assert names(Train, "lr_schedule") == optimizer.SCHEDULES.keys()
    moving = {name for name, share in optimizer.SCHEDULES.items() if len({share(i / 100) for i in range(101)}) > 1}
    assert moving == optimizer.SCHEDULES.keys() - set(
        WITHOUT_LENGTH
    )  # what depends on the length is part of the mathematics


def test_a_key_of_another_network_is_none_of_the_u_nets() -> None:
    class Model(of_networks.Model):
        patch: int = 2
        """Of a transformer."""

    class Mine(schema.Config):
        model: Model = Model()

    config = section.build(Mine, {"model": {"patch": 4}}, "test")
    assert config.model.patch == 4 and config.network == schema.Config().network
