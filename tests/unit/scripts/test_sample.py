"""What launch/sample.py makes of a command line."""

import pytest

from ddpm.errors import RequestError
from launch.sample import class_plan


def test_a_number_that_the_classes_do_not_divide_is_refused_with_those_next_to_it() -> None:
    assert class_plan("balanced", 99, 3) == [33] * 3
    for num, near in ((100, "--num-samples 99 or 102"), (2, "--num-samples 3")):
        with pytest.raises(RequestError, match=f"{near}$"):
            class_plan("balanced", num, 3)
