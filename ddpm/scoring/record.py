"""The scores of a sample set on disk: their names and places, whether they are valid, and one line for each.

A set's first score is eval/SET.json; each further one, against another reference or by another extractor, is
eval/SET/REFERENCE-EXTRACTOR.json. None is ever overwritten. They are signed as manifests are; those from before they
were are read as they are. Must not know how a score is computed. Loads nothing heavy.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.errors import RequestError, RunBusy
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.log import plain
from ddpm.run.paths import ASIDE, RunDir, is_name, listed

if TYPE_CHECKING:
    from ddpm.config.sample import Evaluate

SCORE_NAMES = {"fid": "FID", "frechet_distance": "Fréchet distance", "bits_per_dim": "bits/dim"}
"""Key of the score in a record, which has exactly one of these -> its name for people."""
PROVENANCE = ("num_samples", "reference", "extractor", "checkpoint", "sampler", "nfe", "seed", "precision")
"""Keys for what a set's score was computed from; equal provenance means an equal score."""
_UNSIGNED = {*SCORE_NAMES, *PROVENANCE, "created", "command"}
"""Keys of scores from before signatures: an unsigned score with other keys has lost its signature."""
DIMENSIONS = {"inception": 2048, "random-inception": 2048, "pixels": 768}
"""Dimensions of features by extractor: for old scores that do not record them, and for files of statistics."""
PART_IMAGES = 4096
"""Number of a reference's images whose features are one file of the cache: a stop loses at most the work of one."""
FEW_SAMPLES = 10_000
"""With fewer samples a Fréchet distance is mostly bias, which is said beside the number."""


def key_of(record: Mapping[str, Any]) -> str:
    """The key of the record's score. KeyError if it has none."""
    for key in SCORE_NAMES:
        if key in record:
            return key
    raise KeyError(f"a record without a score: {', '.join(record)}")


def file_extractor_name(sha256: str) -> str:
    """The name of a file's network in scores, by its content, since the path may come to mean another file."""
    return f"file-{sha256[:12]}"


# ---------------------------------------------------------------- on disk


@dataclass(frozen=True)
class Score:
    """A score of a set on disk. `damage` says why it is not valid; `record` is then empty."""

    name: str
    """SET, or SET/REFERENCE-EXTRACTOR."""
    path: Path
    record: dict[str, Any]
    damage: str = ""


def read_score(path: Path) -> dict[str, Any]:
    """A score's record. Raises FileNotFoundError, or DamagedFile if its signature or form is wrong."""
    try:
        record = files.parse_json(files.read_bytes(path))
    except FileNotFoundError:
        raise
    except OSError as e:
        raise DamagedFile(f"{path.name}: cannot be read ({e.strerror})") from None
    except ValueError:
        raise DamagedFile(f"{path.name}: not JSON") from None
    if not isinstance(record, dict):
        raise DamagedFile(f"{path.name}: not a JSON object")
    if is_signed(record):
        if record["self_sha256"] != files.sign(record)["self_sha256"]:
            raise DamagedFile(f"{path.name}: its self_sha256 does not match its content")
    elif lost := record.keys() - _UNSIGNED:
        raise DamagedFile(f"{path.name}: it says {min(lost)} and has no self_sha256")
    if why := _malformed(record):
        raise DamagedFile(f"{path.name}: {why}")
    return record


def is_signed(record: Mapping[str, Any]) -> bool:
    return "self_sha256" in record


def _malformed(record: Mapping[str, Any]) -> str | None:
    """What in a record has not the form that its readers rely on; None if nothing."""
    keys = [key for key in SCORE_NAMES if key in record]
    if len(keys) != 1:
        return f"it has {' and '.join(keys) or 'no score'}"
    value = record[keys[0]]
    if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
        return f"its {keys[0]} is {value!r}, no number"
    ends = record.get(f"{keys[0]}_interval")
    if ends and not (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, float | int) for end in ends)):
        return f"its {keys[0]}_interval is {ends!r}"
    named = ("reference",) if keys == ["bits_per_dim"] else ("reference", "extractor", "sampler")
    for key, kind in (("num_samples", int), ("nfe", int), *((key, dict) for key in named)):
        if not isinstance(record.get(key), kind):
            return f"its {key} is {record.get(key)!r}"
    for key in named:
        if not isinstance(record[key].get("name"), str):
            return f"its {key} has no name"
    return None


def scores_of(run: RunDir, set_name: str) -> list[Score]:
    """Every score of a set, including damaged ones, the first one first."""
    first, further = run.score(set_name), run.further_scores(set_name)
    return [
        *_read({} if _has_scores(first) else {set_name: first}),
        *_read({f"{set_name}/{p.stem}": p for p in sorted(_scores_in(further), key=lambda p: p.stem)}),
    ]


def _scores_in(further: Path) -> list[Path]:
    """The files of scores in a directory; none where it is the first score of a set that is called like it, less .json,
    as sets may be that are older than the rule against such names."""
    if not further.is_dir():
        return []
    return [p for p in listed(further) if p.suffix == ".json" and p.name[0] != "." and is_name(p.stem)]


def _has_scores(first: Path) -> bool:
    """Whether the further scores of a set that is called NAME.json lie where the first one of NAME would."""
    return bool(_scores_in(first))


def score_with(run: RunDir, set_name: str, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a set's score that was computed from just this."""
    records = (score.record for score in scores_of(run, set_name))
    return next((r for r in records if {key: r.get(key) for key in provenance} == provenance), None)


def all_scores(run: RunDir) -> list[Score]:
    """Every score of every set of a run."""
    names = {
        p.stem if p.suffix == ".json" and not _has_scores(p) else p.name for p in listed(run.eval) if _is_a_sets(p)
    }
    return [score for name in sorted(names) for score in scores_of(run, name)]


def best_founded_first(scores: Iterable[Score], asked: Evaluate | None) -> list[Score]:
    """Valid scores of a run, those that say most of it first: of the most images; FID before other distances; against
    the reference and by the extractor that its config asks for; of the latest step; of the most evaluations an image;
    the newest. Bits per dimension come last. asked: of the config; None where it cannot be read."""

    def worth(score: Score) -> tuple[Any, ...]:
        r = score.record
        step = (r.get("checkpoint") or {}).get("step")
        is_asked = asked is not None and (
            Path(asked.reference).name in (r["reference"].get("split"), r["reference"].get("name")),
            (r.get("extractor") or {}).get("name") == asked.extractor,
        )
        key = key_of(r)
        latest = step if isinstance(step, int) else 0
        return (
            *(key != "bits_per_dim", r["num_samples"], key == "fid", is_asked or (False, False)),
            *(latest, r["nfe"], str(r.get("created", ""))),
        )

    return sorted(scores, key=worth, reverse=True)


def _is_a_sets(path: Path) -> bool:
    """Of a file that somebody has copied, as `X (copy).json`, the name tells that it is none."""
    named = path.name[0] != "." and is_name(path.name)
    return named and (path.suffix == ".json" or (path.is_dir() and ASIDE not in path.name))


def _read(paths: Mapping[str, Path]) -> Iterator[Score]:
    for name, path in paths.items():
        try:
            yield Score(name, path, read_score(path))
        except FileNotFoundError:
            pass
        except DamagedFile as e:
            yield Score(name, path, {}, str(e))


def publish_score(run: RunDir, set_name: str, record: Mapping[str, Any], token: str = "") -> Path:
    """Write a score without overwriting another; returns its path. A damaged file in its place is moved aside."""
    signed = files.sign(dict(record))
    word = f"{_called(record['reference'])}-{(record.get('extractor') or {}).get('name', 'bound')}"
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", word).lstrip(".-")[:80] or "score"
    of = _provenance(record)
    further = run.further_scores(set_name)
    places = [run.score(set_name), further / f"{word}.json", further / f"{word}-{files.sha256_json(of)[:12]}.json"]
    for path in places:
        if _has_scores(path):
            continue
        if path.parent.is_file():
            raise RequestError(
                f"{path.parent} is a score of set {path.parent.stem}, where further scores of set {set_name} would "
                f"lie: sample into a set of another name, with --set OTHERNAME, and score that"
            )
        for folder in (run.eval, path.parent):
            folder.mkdir(exist_ok=True)  # never the run itself, which may have been moved away
        try:
            if _provenance(read_score(path)) == of:
                return path  # a twin of this evaluation was faster
            continue
        except FileNotFoundError:
            pass
        except DamagedFile:
            path.rename(path.with_name(f"{path.name}{ASIDE}{secrets.token_hex(4)}"))
        with contextlib.suppress(FileExistsError):  # somebody's, who came between
            files.write_json(path, signed, token=token)
            return path
    raise RunBusy(f"other evaluations are writing the scores of {set_name}; score it again")


def _provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in PROVENANCE}


# ---------------------------------------------------------------- for people


def told(record: Mapping[str, Any]) -> str:
    """A score in one line, with what it was computed from: `FID 4.21, ddim 100, 50,000 vs train`."""
    key = key_of(record)
    if key == "bits_per_dim":
        return plain(f"{number(record)} {SCORE_NAMES[key]}, bound of {_share(record)}, {record['nfe']} an image")
    words = [f"{SCORE_NAMES[key]} {number(record)}{caution(record)}"]
    if sampler := record.get("sampler"):  # images that no run made have none
        words.append(sampler_words(sampler, record["nfe"]))
        words += ["class plan"] if sampler.get("class_plan") else []
    if (weights := (record.get("checkpoint") or {}).get("weights", "ema")) != "ema":
        words.append(f"{weights} weights")
    words.append(against(record))
    words += [] if key == "fid" else [f"{record['extractor']['name']} features"]
    return plain(", ".join(words))


def sampler_words(sampler: Mapping[str, Any], nfe: int | None = None) -> str:
    """A sampler, with what of it is not as usual: `ddim (eta 0.5, guided 1.5)`; with evaluations: `ddim 100 (…)`."""
    more = [f"eta {sampler['eta']:g}"] if isinstance(sampler.get("eta"), float | int) and sampler["eta"] else []
    more += [str(sampler["variance"])] if sampler.get("variance") else []
    more += ["unclipped"] if sampler.get("clip_x_0") is False else []
    more += [f"guided {sampler['guidance']:g}"] if isinstance(sampler.get("guidance"), float | int) else []
    name = str(sampler["name"]) + (f" {nfe}" if nfe is not None else "")
    return name + (f" ({', '.join(more)})" if more else "")


def curve_of(record: Mapping[str, Any]) -> str:
    """A name that scores of different steps share if they are otherwise alike: fid/ddim-100-50000-train."""
    sampler = record.get("sampler") or {"name": "bound"}
    guided = f"-guided{sampler['guidance']:g}" if isinstance(sampler.get("guidance"), float | int) else ""
    words = [f"{sampler['name']}{guided}", record["nfe"], record["num_samples"], _called(record["reference"])]
    key = key_of(record)
    words += [record["extractor"]["name"]] if key == "frechet_distance" else []
    return f"{key}/" + re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(map(str, words)))


def _share(record: Mapping[str, Any]) -> str:
    """`10,000 of test`, or `500 of the 10,000 of test (seed 0)`."""
    num, of, split = record["num_samples"], record["reference"].get("num_images"), _called(record["reference"])
    return f"{num:,} of {split}" if num == of else f"{num:,} of the {of:,} of {split} (seed {record['seed']})"


def against(record: Mapping[str, Any]) -> str:
    """`50,000 vs train`."""
    return f"{record['num_samples']:,} vs {_called(record['reference'])}"


def _called(reference: Mapping[str, Any]) -> str:
    split = reference.get("split")
    return str(split if split in ("train", "test") else reference["name"])


def number(record: Mapping[str, Any]) -> str:
    """The score rounded to what its interval supports; three digits without an interval."""
    key = key_of(record)
    return rounded(record[key], half_width(record))


def half_width(record: Mapping[str, Any]) -> float | None:
    """Half width of the score's interval; None for an old record without one."""
    ends = record.get(f"{key_of(record)}_interval")
    return None if not ends else (ends[1] - ends[0]) / 2


def ends(record: Mapping[str, Any]) -> list[str]:
    """Both ends of the score's interval, rounded as it is; none where the record has none."""
    return [rounded(end, half_width(record)) for end in record.get(f"{key_of(record)}_interval") or ()]


def limit(record: Mapping[str, Any]) -> str:
    """The score for infinitely many samples, rounded as it is; "" where the record has none."""
    value = record.get(f"{key_of(record)}_infinity")
    return "" if value is None else rounded(value, half_width(record))


def with_spread(record: Mapping[str, Any], key: str) -> str:
    """A further measure and the deviation that stands beside it: `0.0021 ± 0.0004`; "" where the record has none."""
    if (value := record.get(key)) is None:
        return ""
    spread = record.get(f"{key}_std")
    return rounded(value, spread) + (f" ± {rounded(spread, spread)}" if spread else "")


def rounded(value: float, uncertain_by: float | None) -> str:
    """`value` rounded to its first uncertain digit."""
    if not uncertain_by or not math.isfinite(uncertain_by):
        digits = 2 if not value else 2 - math.floor(math.log10(abs(value)))
    else:
        digits = -math.floor(math.log10(uncertain_by))
    digits = min(digits, 6)
    return f"{round(value, digits):.{max(digits, 0)}f}"


def caution(record: Mapping[str, Any]) -> str:
    """What of the numbers of samples makes the score mean less than it seems to; begins with a blank."""
    num = record["num_samples"]
    dimensions = record.get("dimensions", DIMENSIONS.get(record["extractor"]["name"], 0))
    if num < dimensions:
        return f" (fewer samples than the {dimensions:,} dimensions)"
    return f" (under {FEW_SAMPLES:,} samples)" if num < FEW_SAMPLES else ""
