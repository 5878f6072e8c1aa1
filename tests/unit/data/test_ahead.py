"""ddpm/data/ahead.py: threads that decode pictures change nothing but the time, and none outlives its work."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm.config.data import Data
from ddpm.data import ahead, decoding, sources
from ddpm.data.packed import pack
from ddpm.errors import RequestError, Stopped
from tests.cli.harness import write_zip


@pytest.fixture(autouse=True)
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 64)
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)


def on(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    """As where this process may use so many CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def drawn(items: range, seen: list[int]) -> Iterator[int]:
    for item in items:
        seen.append(item)
        yield item


def test_results_come_in_order_from_a_few_threads_that_are_a_few_items_ahead() -> None:
    seen: list[int] = []
    third = threading.Event()

    def make(item: int) -> tuple[int, str]:
        if item == 0:
            assert third.wait(10)  # done after those that come later
        if item == 3:
            third.set()
        return item, threading.current_thread().name

    found = ahead.in_order(make, drawn(range(100), seen))
    first = next(found)
    assert first[0] == 0 and len(seen) == 2 * ahead.MOST_THREADS
    done = [first, *found]
    assert [item for item, _ in done] == list(range(100))
    assert len({name for _, name in done}) <= ahead.MOST_THREADS


@pytest.mark.parametrize("allowed", [0, 2])
def test_where_a_user_may_have_no_more_threads_the_rest_is_done_without(
    monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    real, begun = threading.Thread.start, list[threading.Thread]()

    def start(thread: threading.Thread) -> None:
        if len(begun) == allowed:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        real(thread)

    def make(item: int) -> int:
        time.sleep(0.001)
        return item

    monkeypatch.setattr(threading.Thread, "start", start)
    assert list(ahead.in_order(make, range(50))) == list(range(50)) and len(begun) == allowed


def test_nothing_is_at_work_once_an_item_has_failed_or_nobody_takes_more() -> None:
    seen: list[int] = []
    begun: list[int] = []

    def make(item: int) -> int:
        begun.append(item)
        time.sleep(0.002)
        return 1 // (item - 5)

    with pytest.raises(ZeroDivisionError):
        list(ahead.in_order(make, drawn(range(100), seen)))
    assert len(seen) <= 5 + 2 * ahead.MOST_THREADS
    found = ahead.in_order(make, range(6, 100))
    next(found)
    found.close()  # type: ignore[attr-defined]
    last = len(begun)
    time.sleep(0.02)
    assert len(begun) == last


def picture(i: int) -> bytes:
    raw = io.BytesIO()
    kind = "RGBA" if i % 5 == 0 else "RGB"
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9 + i % 3, 9, 3), np.uint8)).convert(kind).save(
        raw, "PNG"
    )
    return raw.getvalue() if i % 7 else b"damaged"


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_is_packed_and_what_is_told_is_the_same_on_one_cpu_and_on_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    members = {f"{'ab'[i % 2]}/{i:02d}.png": picture(i) for i in range(60)}
    path = tmp_path / "f"
    if kind == "zip":
        write_zip(path, members)
    for name, content in members.items() if kind == "folder" else ():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    found: list[Any] = []
    for cpus in (1, 64):
        on(monkeypatch, cpus)
        data, cache = Data(name="images", path=str(path), image_size=8), tmp_path / f"cache{cpus}"
        with pytest.raises(RequestError) as e:
            pack(data, "train", cache)
        key, packed = pack(data.model_copy(update={"skip_damaged": True}), "train", cache)
        files = {p.name: p.read_bytes() for p in (cache / key).iterdir()}
        found.append((str(e.value), files))
        assert len(packed) == 51
    assert found[0] == found[1]


def test_a_stop_while_it_is_packed_leaves_nothing(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {f"a/{i:03d}.png": picture(8) for i in range(600)})
    with pytest.raises(Stopped):
        pack(
            Data(name="images", path=str(path), image_size=8),
            "train",
            tmp_path / "cache",
            stop_requested=lambda: "STOP",
        )
    assert list((tmp_path / "cache").iterdir()) == []


def test_pillow_has_loaded_its_formats_before_several_threads_look_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it does at the first picture of a rare one: a thread that looks meanwhile may find none for a good one."""
    loaded, begun, real = list[int](), list[int](), ahead.in_order

    def in_order(*of: Any) -> Any:
        begun.append(len(loaded))
        return real(*of)

    monkeypatch.setattr(Image, "init", lambda: loaded.append(1))
    monkeypatch.setattr(ahead, "in_order", in_order)
    for num in (4, 5):
        source = sources.images(write_zip(tmp_path / f"{num}.zip", {f"a/{i}.png": picture(8) for i in range(num)}))
        assert len(list(sources.read(source, "train", 8, tmp_path))) == num
    assert begun == [1]  # one part is one thread's


def test_of_large_pictures_one_is_decoded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 80)
    path = write_zip(tmp_path / "a.zip", {f"a/{i:02d}.png": picture(8) for i in range(24)})
    at_work, most, real = 0, [0], decoding.to_square

    def square(*args: Any) -> np.ndarray:
        nonlocal at_work
        at_work += 1
        most.append(at_work)
        time.sleep(0.001)
        at_work -= 1
        return real(*args)

    monkeypatch.setattr(decoding, "to_square", square)
    pack(Data(name="images", path=str(path), image_size=8), "train", tmp_path / "cache")
    assert max(most) == 1 and len(most) == 25
