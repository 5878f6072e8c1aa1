"""Work on many items by a few threads, whose results come in the order of the items. Must not know what the work is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
MOST_THREADS = 4
"""However many CPUs this process may use: a login node has other users, and only one thread writes in any case."""


def in_order(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """make(item) of each item, as `map` gives it, but made by threads, which are a few items ahead of whoever takes
    them. It must be work that lets go of Python's lock. Nothing goes on once the iterator is closed, or has raised."""
    threads, left = min(MOST_THREADS, len(os.sched_getaffinity(0))), iter(items)
    if threads > 1:
        pool, ahead = ThreadPoolExecutor(threads), deque[Future[Made]]()
        try:
            for item in left:
                try:
                    ahead.append(pool.submit(make, item))
                except RuntimeError:  # this user has no thread left
                    left = chain([item], left)
                    break
                if len(ahead) == 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    yield from map(make, left)
