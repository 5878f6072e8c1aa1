"""What metrics.jsonl says, as charts."""

from __future__ import annotations

from typing import Any

from launch.page.chart import MOST_POINTS, Line, Point, chart, finite, smoothed, thinned
from launch.page.markup import Html
from launch.page.words import digits

Metrics = list[dict[str, Any]]


def charts(metrics: Metrics, every: int = 1) -> list[Html]:
    """Loss, the norm of gradients, the learning rate. every: of the file's lines each so-many-th is in `metrics`."""
    rates = finite((m["step"], m["lr"]) for m in metrics)
    return [
        chart("Loss", [*_both(metrics, "loss", every), *_validation(metrics)], y="loss", log=True),
        chart("Norm of the gradient", _both(metrics, "grad_norm", every), y="norm", log=True),
        chart("Learning rate", [Line("as it was", thinned(rates), told=_ends(rates))], y="learning rate", zero=True),
    ]


def smooth_line(metrics: Metrics, key: str, name: str, colour: int, *, since: float) -> Line:
    """The running mean of a run among others, from step `since` on."""
    points = [point for point in smoothed(_points(metrics, key)) if point[0] >= since]
    return Line(name, thinned(points), colour=colour, told=f"{name}: {_ends(points)}")


def _both(metrics: Metrics, key: str, every: int) -> list[Line]:
    points = _points(metrics, key)
    odd = len(metrics) - len(points)
    lacks = f" ({odd} not finite)" if odd else ""
    which = "each line" if every == 1 else f"one line in {every}"
    raw = Line(f"{which}{lacks}", thinned(points), "raw")
    mean = smoothed(points)
    return [raw, Line("running mean", thinned(mean), told=f"running mean: {_ends(mean)}")]


def _validation(metrics: Metrics) -> list[Line]:
    """The line of the loss on held-out images, if the run computes it."""
    told = ((m["step"], m.get("validation_loss")) for m in metrics)
    points = finite(((at, value) for at, value in told if isinstance(value, float)), positive=True)
    words = [f"held-out images: {digits(value)} at step {at:,}" for at, value in points]
    return [Line("held-out images", points, "dots", 1, told_of_dots=words)] if 0 < len(points) <= MOST_POINTS else []


def _points(metrics: Metrics, key: str) -> list[Point]:
    return finite(((m["step"], m[key]) for m in metrics), positive=True)


def _ends(points: list[Point]) -> str:
    if not points:
        return "nothing"
    at, least = min(points, key=lambda point: point[1])
    step, last = points[-1]
    return f"{digits(last)} at step {step:,}, the least {digits(least)} at step {at:,}"
