"""The section on a run's life: a timeline and a table of when it waited, trained, saved and lost time; its goodput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddpm.run.events import life_of
from ddpm.run.files import seconds
from launch.page.clock import Clock, clock
from launch.page.facts import Facts
from launch.page.markup import Column, Html, Part, join, note, table, tag
from launch.page.words import at, duration
from launch.terminal import goodput, history
from launch.terminal.goodput import LifeKey, Period

KINDS = {
    "queued": "waiting in the queue",
    "start_up": "starting",
    "kept": "training that was saved",
    "pending": "training since the last save",
    "lost": "training that was lost",
    "stopping": "saving at a stop, and waiting for the end",
    "sample": "sampling",
    "evaluate": "scoring",
}
LANES = {"training": ("queued", *goodput.KINDS), "samples": ("sample",), "scores": ("evaluate",)}
WIDTH, LEFT, TOP, LANE, GAP = 960, 74, 8, 22, 9
MOST_BARS, MOST_LIVES = 1500, 30
WAITS = ("queued", "held")

Event = dict[str, Any]


def periods(facts: Facts) -> list[Period]:
    """What the run did and waited for, in order of time."""
    held = goodput.periods(facts.events, facts.beat, facts.made)
    found = [*held, *_waits(facts, held), *_stages(facts)]
    return sorted(found, key=lambda period: period.begin)


def _waits(facts: Facts, held: Sequence[Period]) -> list[Period]:
    """The times in the queue: from a submission, or the end of a job's life, to the job's next life."""
    began: dict[LifeKey, float] = {}
    ended: dict[LifeKey, float] = {}
    for period in held:
        began[period.life] = min(began.get(period.life, period.begin), period.begin)
        ended[period.life] = max(ended.get(period.life, period.end), period.end)
    sent = (e for e in facts.events if e["event"] == "submitted" and str(e.get("stage", "train")).startswith("train"))
    submitted = {life_of(e)[0]: seconds(e["time"]) for e in sent}
    found = []
    for (job, restart), begin in began.items():
        since = ended.get((job, restart - 1)) if restart else submitted.get(job)
        if since is not None and since < begin:
            found.append(Period((job, restart), "queued", since, begin))
    waiting = [job for job in submitted if (job, 0) not in began]
    if facts.row["state"] in WAITS and waiting:
        found.append(Period((waiting[-1], 0), "queued", submitted[waiting[-1]], facts.made))
    elif facts.row["state"] in WAITS and ended:
        (job, restart), since = max(ended.items(), key=lambda item: item[1])
        found.append(Period((job, restart + 1), "queued", since, facts.made))
    return [period for period in found if period.begin < period.end]


def _stages(facts: Facts) -> list[Period]:
    """Sampling and scoring: from the first sign of a job's life to the last one that it gave of the stage."""
    spans: dict[tuple[LifeKey, str], list[float]] = {}
    for e in facts.events:
        if e["event"] != "submitted" and (stage := e.get("stage")) in ("sample", "evaluate"):
            begin = e.get("since") or e["time"]
            spans.setdefault((life_of(e), stage), []).extend((seconds(begin), seconds(e["time"])))
    return [Period(life, stage, min(times), max(times)) for (life, stage), times in spans.items()]


# ---------------------------------------------------------------- as a picture


def timeline(facts: Facts) -> Html:
    every = periods(facts)
    spans = [(p.begin, p.end) for p in every if p.end > p.begin]
    if not spans:
        return note("events/ tells of no time that the run was at work.")
    when = clock(spans)
    lanes = {name: [p for p in every if p.kind in kinds] for name, kinds in LANES.items()}
    lanes = {name: own for name, own in lanes.items() if own}
    parts, bottom = [], TOP + len(lanes) * (LANE + GAP)
    parts += _time_axis(when, bottom)
    for i, (name, own) in enumerate(lanes.items()):
        top = TOP + i * (LANE + GAP)
        parts.append(tag("text", name, x=0, y=top + LANE / 2, dy=".32em"))
        parts += _bars(own, when, top)
        if name == "training":
            parts += _saves(facts.events, when, top + LANE)
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {bottom + 26}", role="img", aria_label="The run's life by time")
    left_out = max(0, max(len(_joined(own, when)) for own in lanes.values()) - MOST_BARS)
    told = note(f"The {left_out} shortest stretches of time are not drawn.") if left_out else Html("")
    return join([tag("div", svg, class_="scroll timeline", tabindex=0), told])


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - 4)


def _time_axis(when: Clock, bottom: float) -> list[Html]:
    parts, free = [], 0.0
    for share, name in when.ticks(7):
        x, half = _x(share), 3.6 * len(name)
        parts.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP - 4, y2=bottom, class_="grid"))
        if x - half >= free and x + half <= WIDTH:
            parts.append(tag("text", name, x=f"{x:.1f}", y=bottom + 14, text_anchor="middle"))
            free = x + half + 14
    for share, took in when.breaks():
        told = tag("title", f"nothing for {duration(took)}")
        parts.append(tag("text", told, "⁄⁄", x=f"{_x(share):.1f}", y=bottom + 3, text_anchor="middle", class_="break"))
    parts.append(tag("text", "UTC", x=0, y=bottom + 14, class_="label"))
    return parts


def _bars(own: Sequence[Period], when: Clock, top: float) -> list[Html]:
    bars = _joined(own, when)
    if len(bars) > MOST_BARS:
        longest = sorted(bars, key=lambda p: p.end - p.begin, reverse=True)[:MOST_BARS]
        bars = sorted(longest, key=lambda p: p.begin)
    return [_bar(period, when, top) for period in bars]


def _bar(period: Period, when: Clock, top: float) -> Html:
    x, end = _x(when(period.begin)), _x(when(period.end))
    (job, restart), took = period.life, duration(period.end - period.begin)
    told = f"{KINDS[period.kind]}: {took}, from {at(period.begin)} to {at(period.end)} UTC, job {job}.{restart}"
    low, height = (top + LANE / 2 - 2, 4) if period.kind == "queued" else (top, LANE)
    width = f"{max(end - x, 0.8):.1f}"
    return tag("rect", tag("title", told), x=f"{x:.1f}", y=low, width=width, height=height, class_=f"k {period.kind}")


def _joined(own: Sequence[Period], when: Clock) -> list[Period]:
    """What follows itself in the same life as one; of what would lie on itself, one."""
    found: list[Period] = []
    for period in own:
        last = found[-1] if found else None
        if last and (last.life, last.kind) == (period.life, period.kind) and period.begin - last.end < 1:
            found[-1] = last._replace(end=max(last.end, period.end))
        elif not last or last.kind != period.kind or _x(when(period.end)) - _x(when(last.begin)) >= 0.5:
            found.append(period)
    return found


def _saves(events: Sequence[Event], when: Clock, bottom: float) -> list[Html]:
    places: dict[str, list[str]] = {}
    for e in events:
        if e["event"] in ("checkpoint", "save_failed") and e.get("stage", "train") == "train":
            word = "refused" if e["event"] == "save_failed" else f"step {e.get('step', 0):,}"
            places.setdefault(f"{_x(when(seconds(e['time']))):.0f}", []).append(word)
    return [
        tag("path", tag("title", f"saved: {words[0] if len(words) == 1 else f'{words[0]} to {words[-1]}'}"),
            d=f"M{x} {bottom}v5", class_="save")
        for x, words in places.items()
    ]  # fmt: skip


# ---------------------------------------------------------------- in words


def goodput_table(facts: Facts) -> Html:
    """How long each kind took, with its colour in the timeline; of the time on nodes, in percent."""
    every = periods(facts)
    spent = {kind: sum(p.end - p.begin for p in every if p.kind == kind) for kind in KINDS}
    held = sum(spent[kind] for kind in goodput.KINDS)
    rows = []
    for kind, name in KINDS.items():
        if not spent[kind]:
            continue
        of_held = f"{spent[kind] / held:.1%}" if kind in goodput.KINDS and held else ""
        rows.append([tag("span", "", class_=f"swatch {kind}"), name, duration(spent[kind]), of_held])
    if not rows:
        return Html("")
    share = facts.row["goodput"]
    told = "" if share is None else f"Goodput {share:.1%}: the share of the time on nodes that ended in saved steps. "
    columns = (Column(""), Column(""), Column("time", True), Column("of that on nodes", True))
    return join([table(columns, rows, class_="kinds"), note(told, "Ticks under the timeline are saves.")])


def _trains(event: Event) -> bool:
    """Whether it is of a training job's life."""
    return event["event"] != "submitted" and event.get("stage", "train") == "train"


def number(facts: Facts) -> int:
    """The number of lives of its training."""
    return len({life_of(e) for e in facts.events if _trains(e)})


def lives_table(facts: Facts) -> Html:
    """Each life of a training job: when, where, from which step to which, and how it ended."""
    spans: dict[LifeKey, list[Period]] = {}
    for period in periods(facts):
        spans.setdefault(period.life, []).append(period)
    own: dict[LifeKey, list[Event]] = {}
    for e in history.clear(facts.run, facts.events):
        if _trains(e):
            own.setdefault(life_of(e), []).append(e)
    lives = list(own)
    rows = [_life(life, own[life], spans.get(life, []), facts) for life in lives[-MOST_LIVES:]]
    more = len(lives) - len(rows)
    if not rows:
        return Html("")
    return join(
        [table(LIFE, rows), note(f"{more} earlier lives are left out; status.py --events has them.") if more else ""]
    )


LIFE = (
    Column("life"), Column("host"), Column("waited", True), Column("began, UTC"), Column("lasted", True),
    Column("steps", True), Column("code"), Column("ended"),
)  # fmt: skip


def _life(life: LifeKey, events: Sequence[Event], spans: Sequence[Period], facts: Facts) -> list[Part]:
    held = [p for p in spans if p.kind in goodput.KINDS]
    waited = sum(p.end - p.begin for p in spans if p.kind == "queued")
    begin = min((p.begin for p in held), default=seconds(events[0]["time"]))
    lasted = duration(max(p.end for p in held) - begin) if held else ""
    steps = [e["step"] for e in events if e.get("step") is not None]
    code = next((str(e["code"]) for e in events if e.get("code")), "")
    return [
        f"{life[0]}.{life[1]}", str(events[0].get("host", "")), duration(waited) if waited else "", at(begin), lasted,
        f"{min(steps):,} – {max(steps):,}" if steps else "", code[:8], _ending(events, facts),
    ]  # fmt: skip


def _ending(events: Sequence[Event], facts: Facts) -> str:
    """How a life ended, as its last event tells."""
    last = next((e for e in reversed(events) if e["event"] not in ("checkpoint", "save_failed")), events[-1])
    why = str(last.get("reason") or "").replace("_", " ")
    match last["event"]:
        case "finished":
            return "finished"
        case "failed":
            return f"failed: {why}" if why else "failed"
        case "requeued":
            return f"put back: {why}" if why else "put back"
        case "cancelled":
            return "scancel"
        case "stop_requested":
            return f"stopped: {why}" if why else "stopped"
    beats = bool(facts.beat) and life_of(facts.beat) == life_of(events[0])
    if beats and facts.row["state"] in ("running", "starting", "suspended", "completing"):
        return "goes on"
    return "without a word"
