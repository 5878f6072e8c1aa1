"""Scores with what they were computed from: as tables, and by step."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm.scoring.record import (
    SCORE_NAMES,
    Score,
    against,
    caution,
    ends,
    half_width,
    key_of,
    limit,
    number,
    rounded,
    sampler_words,
    told,
    with_spread,
)
from launch.page.chart import Line, chart
from launch.page.markup import Column, Html, Part, join, note, table, tag
from launch.page.words import digits, moment

MOST = 60
"""Rows of a table."""
CURVE = 3
"""From so many scores on that differ in their step alone, these have a table of their own."""
MILESTONE = "milestone"
"""How sets of milestones begin."""
DIGEST = 12
"""Letters of a sha256 that are shown."""
Series = tuple[Any, ...]
ERRORS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What reading a record raises that is not of the form that ours have."""
MEASURES = (
    Column("limit", True), Column("kernel distance", True), Column("Inception Score", True),
    Column("precision", True), Column("recall", True), Column("density", True), Column("coverage", True),
    Column("rate", True), Column("distortion", True),
)  # fmt: skip
COLUMNS = (
    Column("score"), Column("value", True), Column("95 %"), Column("step", True), Column("sampler"),
    Column("evaluations", True), Column("samples"), Column("features"), Column("set", wraps=True),
)  # fmt: skip
PROVENANCE = (
    Column("set"), Column("checkpoint"), Column("weights"), Column("reference"), Column("extractor"), Column("seed"),
    Column("precision"), Column("computed, UTC"),
)  # fmt: skip
BY_STEP = (
    Column("step", True),
    Column("", True),
    Column("95 %"),
    *MEASURES,
    Column("checkpoint"),
    Column("computed, UTC"),
)


def tables(scores: Sequence[Score], classes: Sequence[str] = ()) -> Html:
    """All of them, with what they mean and what they were computed from; those of one kind by step on their own.

    classes: what the model's are called, by label.
    """
    if not scores:
        return note("No score was computed of this run.")
    curves = [of for of in by_step(scores).values() if len(of) >= CURVE]
    in_curves = {score.name for of in curves for score in of}
    single = [score for score in scores if score.name not in in_curves]
    few = {caution(score.record).strip(" ()") for score in scores if "extractor" in score.record} - {""}
    told = note("† ", "; ".join(sorted(few)), ": the distance is mostly its own bias.") if few else Html("")
    return join([_single(single) if single else Html(""), *map(_by_step, curves), told, _by_class(scores, classes)])


def _single(scores: Sequence[Score]) -> Html:
    shown, odd = scores[:MOST], 0
    rows: list[tuple[list[Part], ...]] = []
    for score in shown:
        try:
            rows.append((_row(score), [score.name, *_measures(score)], _provenance(score)))
        except ERRORS:
            odd += 1
    numbers, further, provenance = ([row[i] for row in rows] for i in range(3))
    parts: list[Part] = [table(COLUMNS, numbers)] if rows else []
    if any(cell for row in further for cell in row[1:]):
        parts += [tag("h3", "Further measures of the same samples"), table((Column("set"), *MEASURES), further)]
    parts += [tag("h3", "What they were computed from"), table(PROVENANCE, provenance, class_="small")] if rows else []
    for num, why in ((len(scores) - len(shown), "more in eval/"), (odd, "in eval/ of another form, not shown")):
        parts += [note(f"{num} {why}.")] if num else []
    return join(parts)


def _by_step(scores: Sequence[Score]) -> Html:
    """The table of scores of one kind, with what they share told once."""
    shown = scores[-MOST:]
    first = shown[0].record
    best = min(score.record[key_of(score.record)] for score in shown)
    rows = []
    for score in shown:
        r = score.record
        num: Part = tag("b", number(r)) if r[key_of(r)] == best else number(r)
        digest, computed = _digest("", r["checkpoint"].get("sha256")), moment(r.get("created", ""))
        rows.append([f"{_step(r):,}", num, " – ".join(ends(r)), *_measures(score), digest, computed])
    _, _, weights, reference, extractor, seed, precision, _ = _provenance(shown[0])
    of = [in_words(first), join(["reference ", reference]), join(["extractor ", extractor])]
    of += [f"{weights} weights" if weights else "", f"seed {seed}", str(precision)]
    mark = " †" if "extractor" in first and caution(first) else ""
    more = f" The first {len(scores) - len(shown)} are left out." if len(scores) > len(shown) else ""
    files = shown[-1].name.replace(str(_step(shown[-1].record)), "…")
    title = tag("h3", f"{SCORE_NAMES[key_of(first)]}{mark} by step")
    return join([title, table(BY_STEP, rows), note(join(filter(None, of), ", "), f"; eval/{files}.json.{more}")])


def _by_class(scores: Sequence[Score], classes: Sequence[str]) -> Html:
    """The table of sets whose classes were scored one by one: a line for each set."""
    rows: list[list[Part]] = []
    for score in scores[:MOST]:
        each = score.record.get(f"{key_of(score.record)}_per_class")
        if isinstance(each, list) and all(value is None or isinstance(value, int | float) for value in each):
            rows.append([score.name, *("–" if value is None else rounded(value, None) for value in each)])
    if not rows:
        return Html("")
    most = max(map(len, rows)) - 1
    names = [*classes, *map(str, range(len(classes), most))]
    columns = (Column("set"), *(Column(name, True) for name in names[:most]))
    whole = [row + [""] * (most + 1 - len(row)) for row in rows]
    why = note("Of each class's samples against its own images: fewer than of all, so larger than the distance above.")
    return join([tag("h3", "Class by class"), table(columns, whole), why])


def _row(score: Score) -> list[Part]:
    r, key = score.record, key_of(score.record)
    mark = " †" if "extractor" in r and caution(r) else ""
    return [
        SCORE_NAMES[key] + mark, tag("b", number(r)), " – ".join(ends(r)), f"{_step(r):,}", _sampler(r),
        f"{r['nfe']:,}", against(r), str((r.get("extractor") or {}).get("name", "")), score.name,
    ]  # fmt: skip


def value(record: Mapping[str, Any]) -> str:
    """A score's number with half of its interval: `4.21 ± 0.05`."""
    half = half_width(record)
    return number(record) + (f" ± {rounded(half, half)}" if half else "")


def in_words(record: Mapping[str, Any]) -> str:
    """What stands beside the number: its sampler, evaluations, samples and reference."""
    return told(record).partition(", ")[2] or against(record)


def _step(record: Mapping[str, Any]) -> int:
    return int(record["checkpoint"]["step"])


def _sampler(record: Mapping[str, Any]) -> str:
    sampler = record.get("sampler")  # bits per dimension, and images that no run made, have none
    return sampler_words(sampler) if sampler else ""


def _measures(score: Score) -> list[Part]:
    r = score.record
    manifold = r.get("manifold") or {}
    measures = [manifold.get(key) for key in ("precision", "recall", "density", "coverage")]
    cells: list[Part] = [limit(r), with_spread(r, "kid") or with_spread(r, "kernel_distance")]
    cells.append(with_spread(r, "inception_score"))
    cells += ["" if value is None else f"{value:.3f}" for value in measures]
    cells += ["" if r.get(key) is None else digits(r[key]) for key in ("rate", "distortion")]
    return cells


def _provenance(score: Score) -> list[Part]:
    r = score.record
    reference, extractor = r["reference"], r.get("extractor") or {}
    of = " ".join(filter(None, [str(reference["name"]), str(reference.get("split") or "")]))
    return [
        score.name, _digest("", r["checkpoint"].get("sha256")), str(r["checkpoint"].get("weights", "")),
        _digest(of, reference.get("digest")), _digest(extractor.get("name", ""), extractor.get("weights_sha256")),
        str(r.get("seed", "")), str(r.get("precision", "")), moment(r.get("created", "")),
    ]  # fmt: skip


def _digest(name: str, sha256: object) -> Part:
    shown = tag("code", str(sha256)[:DIGEST], title=sha256) if sha256 else Html("")
    return join(filter(None, [name, shown]), " ")


# ---------------------------------------------------------------- by step


def by_step(scores: Sequence[Score]) -> dict[Series, list[Score]]:
    """Scores that differ in their checkpoint alone, by step, where there are several: what they have in common is the
    key."""
    found: dict[Series, dict[int, Score]] = {}
    for score in reversed(scores):  # the newest last
        r = score.record
        try:
            of = [str(r.get(key)) for key in ("num_samples", "sampler", "nfe", "seed", "precision")]
            digests = [str(r["reference"].get("digest")), str((r.get("extractor") or {}).get("weights_sha256"))]
            series = (
                key_of(r),
                against(r),
                *of,
                *digests,
                (r.get("extractor") or {}).get("name"),
                r["checkpoint"].get("weights"),
            )
            found.setdefault(series, {})[_step(r)] = score
        except ERRORS:
            continue
    several = {series: [of[step] for step in sorted(of)] for series, of in found.items() if len(of) > 1}
    return dict(sorted(several.items(), key=lambda item: -len(item[1])))


def curve(series: Sequence[Score], name: str = "", colour: int = 0) -> Line:
    """One of these as a line of a chart."""
    points, intervals, words = [], [], []
    for score in series:
        r = score.record
        step, num = _step(r), float(r[key_of(r)])
        low, high = r.get(f"{key_of(r)}_interval") or (num, num)
        points.append((step, num))
        intervals.append((float(low), float(high)))
        words.append(f"{name}{': ' if name else ''}step {step:,}: {told(r)}")
    first = series[0].record
    return Line(
        name or f"{in_words(first)}; bars: 95 %", points, "dots", colour, told_of_dots=words, intervals=intervals
    )


def charts(scores: Sequence[Score], until: int, most: int = 2) -> list[Html]:
    """The longest of the series."""
    every = list(by_step(scores).items())[:most]
    return [by_step_chart(series, [curve(of)], until) for series, of in every]


def by_step_chart(series: Series, lines: Sequence[Line], until: int) -> Html:
    values = [num for line in lines for _, num in line.points]
    name = SCORE_NAMES[series[0]]
    return chart(f"{name} by step", lines, y=name, log=min(values) > 0 and max(values) > 3 * min(values), until=until)


def commands(scores: Sequence[Score]) -> list[str]:
    """The commands that computed the scores, as their records say; those of milestones are left out."""
    found = (score.record.get("command") for score in scores if not score.name.startswith(MILESTONE))
    return list(dict.fromkeys(shlex.join(map(str, words)) for words in found if isinstance(words, list) and words))
