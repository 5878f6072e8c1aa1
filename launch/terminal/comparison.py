"""`evaluate.py --compare`: scores of several sets as a table, each against the first."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from ddpm.config import reading
from ddpm.config.sample import Evaluate
from ddpm.errors import RequestError
from ddpm.run.log import plain
from ddpm.run.paths import RunDir, check_name
from ddpm.scoring.compare import check_comparable, difference
from ddpm.scoring.record import SCORE_NAMES, caution, ends, key_of, limit, number, rounded, sampler_words, scores_of
from launch.queue.sets import score_by, wrong_with
from launch.terminal import console, streams

UNCUT = 10_000
"""Width of the table in a pipe, so that no name is cut."""


def chosen_scores(
    run: RunDir | None, words: list[str], root: str | None, reference: str | None, extractor: str | None
) -> dict[str, dict[str, Any]]:
    """The score record of each SET (of `run`) or RUN/SET, by its word. Raises RequestError if there is no such score.

    reference, extractor: which of a set's scores; None: as in its run's config.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        where, slash, name = word.rpartition("/")
        of = console.find_run(where, root) if slash else run
        if of is None:
            raise RequestError(f"--compare {word}: of which run? give RUN/{word}, or the run first")
        check_name(name, "sample set name")
        if name not in (there := [s.name for s in of.sample_sets() if s.request.exists()]):
            prefix = f"{where}/" if slash else ""
            has = f"has {', '.join(prefix + other for other in there)}" if there else "has none yet"
            raise RequestError(f"--compare {word}: no such sample set; run {of.name} {has}")
        config = reading.of_run(of).evaluate
        asked = Evaluate(reference=reference or config.reference, extractor=extractor or config.extractor)
        score = score_by(of, name, asked)
        if score is None:
            damaged = list(filter(None, (wrong_with(of, s) for s in scores_of(of, name))))
            raise RequestError(
                f"--compare {word}: no score against {asked.reference} by {asked.extractor}"
                + (f" ({plain('; '.join(damaged))})" if damaged else "")
                + f": python launch/evaluate.py {of.quoted} --set {name}{_asked(asked, config)}"
            )
        found[word] = score.record
    if len(found) < 2:
        raise RequestError("--compare: give at least two different sets")
    return found


def _asked(asked: Evaluate, default: Evaluate) -> str:
    """The options of evaluate.py that compute the score that was asked for."""
    pairs = (("reference", asked.reference, default.reference), ("extractor", asked.extractor, default.extractor))
    return "".join(f" --{option} {shlex.quote(value)}" for option, value, usual in pairs if value != usual)


def print_comparison(scores: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the table, or JSON. Raises RequestError if the scores cannot be compared."""
    check_comparable(scores)
    first = next(iter(scores.values()))
    if as_json:
        apart = {word: None if record is first else difference(first, record) for word, record in scores.items()}
        rows = [{"set": word, "score": scores[word], "difference": d and d._asdict()} for word, d in apart.items()]
        print(json.dumps(rows, indent=1))
        return
    from rich.table import Table

    key = key_of(first)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("set", "sampler", "evaluations", "samples", SCORE_NAMES[key], "95 %", "difference, 95 %", "limit"):
        table.add_column(name, justify="left" if name in ("set", "sampler") else "right",
                         overflow="fold")  # fmt: skip
    for word, record in scores.items():
        cells = [sampler_words(record["sampler"]), str(record["nfe"]), f"{record['num_samples']:,}", number(record)]
        cells += [" to ".join(ends(record)) or "-"]
        cells += ["" if record is first else _told(first, record), limit(record) or "-"]
        table.add_row(*(plain(cell) for cell in (word, *cells)))
    width = None if sys.stdout.isatty() else UNCUT
    terminal = streams.drawing(sys.stdout, width=width, markup=False, highlight=False, emoji=False)
    terminal.print(table)
    for word, record in scores.items():
        if why := caution(record):
            terminal.print(plain(f"{word}:{why}"), soft_wrap=True)
    if len({record["num_samples"] for record in scores.values()}) > 1:
        way = "compare their limits" if all(map(limit, scores.values())) else "to compare them, make as many of each"
        terminal.print(f"they are of different numbers of samples, and so biased differently: {way}", soft_wrap=True)


def _told(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    value, half, means = *(d := difference(a, b)), d.means_something
    if half is None:
        return f"{rounded(value, None)} ± ?"
    sign = "+" if value > 0 else ""
    return f"{sign}{rounded(value, half)} ± {rounded(half, half)}" + ("" if means else ", may be none")
