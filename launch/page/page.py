"""The page of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddpm import __version__
from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile
from ddpm.run.log import counted
from ddpm.scoring.record import SCORE_NAMES, key_of
from launch.page import curves, lives, pictures, recipe, scores
from launch.page.facts import Facts
from launch.page.markup import Html, Part, document, join, note, section, tag
from launch.page.style import STYLE
from launch.page.words import at, digits
from launch.terminal import faults
from launch.terminal.side_by_side import SMOOTHED_LINES, smoothed_loss

MOST_NAMED = 12


def of_run(facts: Facts) -> str:
    """The whole page."""
    parts = [
        shown(_head, facts),
        _damage(facts),
        section("Scores", shown(_scores, facts)),
        section("Curves", shown(_charts, facts)),
        section("Samples by step", shown(pictures.grids, facts.run), shown(_whose_turn, facts)),
        section(
            "Life", shown(lives.timeline, facts), shown(lives.goodput_table, facts), shown(lives.lives_table, facts)
        ),
        section("Config", shown(recipe.config, facts)),
        section("Where it came from", shown(recipe.origin, facts)),
        section("To make it again", shown(recipe.again, facts)),
        foot(facts.made, str(facts.run.path)),
    ]
    return document(facts.run.name, *parts, style=STYLE)


def shown(part: Callable[..., Html], *args: Any) -> Html:
    """A part of a page; where what it reads is not of the form that ours has, a line that says so, and the rest of the
    page is there all the same."""
    try:
        return part(*args)
    except (*scores.ERRORS, ArithmeticError, OSError, DamagedFile, DDPMError) as e:
        return note(f"This cannot be shown: {faults.words(e) or f'{type(e).__name__}: {e}'}")


def foot(made: float, of: str) -> Html:
    return tag("footer", f"Made {at(made)} UTC of {of} by ddpm-hpc {__version__}.")


def _head(facts: Facts) -> Html:
    return join([tag("h1", facts.run.name), tag("p", _lead(facts), class_="lead"), _figures(facts)])


def _lead(facts: Facts) -> str:
    """What was trained, in a line."""
    c = facts.config
    if c is None:
        return f"{facts.row['state']}, {counted(facts.row['step'], 'step', ',')}"
    size, images = c.data.image_size, (facts.record.get("data") or {}).get("num_images")
    of = f"{counted(images, 'image', ',')}" if images else "images"
    kind = counted(c.model.num_classes, "class") if c.model.num_classes else "no classes"
    return (
        f"A diffusion model of {c.data.name}, {of} of {size}×{size}, {kind}; batches of {c.train.global_batch}, "
        f"{c.diffusion.timesteps:,} {c.diffusion.schedule} noise steps. As of {at(facts.made)} UTC: "
        f"{facts.row['state']}."
    )


def _figures(facts: Facts) -> Html:
    row, best = facts.row, next(iter(facts.scores), None)
    loss = smoothed_loss(facts.metrics)
    found: list[tuple[str, str, str]] = []
    if best is not None:
        r = best.record
        of = f"{scores.in_words(r)}, step {r['checkpoint']['step']:,}"
        found.append((SCORE_NAMES[key_of(r)], scores.value(r), of))
    percent = f"{100 * row['step'] // row['total_steps']} % of {row['total_steps']:,}" if row["total_steps"] else ""
    found.append(("step", f"{row['step']:,}", percent))
    if loss is not None:
        found.append(("loss", digits(loss), f"mean of {SMOOTHED_LINES} lines"))
    if row["images_per_s"] is not None:
        found.append(("images a second", f"{row['images_per_s']:,.0f}", "last told"))
    if row["goodput"] is not None:
        num = lives.number(facts)
        lives_told = f"{num} lives" if num > 1 else "one life"
        found.append(("goodput", f"{row['goodput']:.1%}", lives_told))
    items = [tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in found]
    return tag("dl", *items, class_="figures")


def _charts(facts: Facts) -> Html:
    last = facts.metrics[-1]["step"] if facts.metrics else facts.row["step"]
    parts: list[Part] = [*scores.charts(facts.scores, last), *curves.charts(facts.metrics, facts.every)]
    if not any(parts):
        return note("metrics.jsonl has no lines.")
    epoch = next((m["epoch"] for m in reversed(facts.metrics) if m["epoch"] > 0), None)
    per = f"An epoch is {facts.metrics[-1]['step'] / epoch:,.0f} steps." if epoch else ""
    return join([tag("div", *parts, class_="charts"), note(per) if per else Html("")])


def _scores(facts: Facts) -> Html:
    named = (facts.record.get("labels") or {}).get("classes")
    return scores.tables(facts.scores, list(named) if isinstance(named, dict) else ())


def _whose_turn(facts: Facts) -> Html:
    """Which classes the grids show, and that their samples are no set's."""
    classes = facts.config.model.num_classes if facts.config else 0
    if not classes:
        return Html("")
    named = (facts.record.get("labels") or {}).get("classes")
    names = f": {', '.join(list(named)[:MOST_NAMED])}{', …' if len(named) > MOST_NAMED else ''}" if named else ""
    return note(f"The classes in turn, row by row, without guidance{names}.")


def _damage(facts: Facts) -> Html:
    if not facts.damage:
        return Html("")
    return tag("div", *(tag("p", f"{words[0].upper()}{words[1:]}") for words in facts.damage if words), class_="warn")
