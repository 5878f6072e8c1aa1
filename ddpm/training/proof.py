"""Checks a checkpoint without a manifest, and makes a manifest for it if it proves to be the run's own.

A manifest's sha256 is the only full proof that bytes are those that were saved. Without it, these are checked: the
checksums of the archive; that it loads without code; that step, config digest and all shapes are the run's; and the
sha256 in the run's event of that save. Without such an event, another run's checkpoint of the same config would pass.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from ddpm.config.schema import Config
from ddpm.network.build import build_model
from ddpm.run import generations, unfinished
from ddpm.run.events import read_events
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile, now, sha256_file, write_json
from ddpm.run.log import counted
from ddpm.run.paths import RunDir
from ddpm.run.records import identity
from ddpm.run.saving import ema_bytes, manifest_of


def rebuild_manifest(run: RunDir, step: int, config: Config, fence: Fence, log: Callable[[str], None]) -> None:
    """Publish a manifest, marked as rebuilt, for the .pt of `step`; a damaged manifest is set aside.

    Raises DamagedFile, with nothing changed, if the .pt does not pass the checks.
    """
    path = run.checkpoint(step)
    told = [e for e in read_events(run) if e.get("event") == "checkpoint" and e.get("step") == step]
    saved, sha256 = {e["sha256"] for e in told if e.get("sha256")}, sha256_file(path)
    if saved and sha256 not in saved:
        raise DamagedFile(f"{path.name}: is not what this run saved at step {step} (another's, or changed since)")
    state = _proved(run, step, config)
    if not saved:
        log(f"unproved {path}: it fits the config, but no event tells of its save: if another run of the same "
            f"config, seed and all, saved it on other images, nothing would show it")  # fmt: skip
    ema = {}
    if run.ema_weights(step).exists():  # whatever it holds now: what it must hold is in the .pt
        ema = {"ema_sha256": hashlib.sha256(ema_bytes(state["ema"], step)).hexdigest()}
    by = {"world_size": told[-1].get("world_size") if told else None, "fence": fence.token, "created": now()}
    own = identity(run) if saved else {}
    manifest = manifest_of(state, path.name, path.stat().st_size, sha256, **by, rebuilt=True, **own, **ema)
    fence.check()
    unfinished.set_aside(run, [run.manifest(step)], "damaged", log)
    write_json(run.manifest(step), manifest, token=str(fence.token), may_publish=fence.check)


def _proved(run: RunDir, step: int, config: Config) -> dict[str, Any]:
    """The state in the .pt of `step`. Raises DamagedFile if it does not pass the checks."""
    path = run.checkpoint(step)
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        state = generations.load(run, step)
    except OSError:
        raise
    except Exception as e:  # zipfile, pickle and torch raise a dozen kinds, depending on which bit flipped
        raise DamagedFile(f"{path.name}: does not load ({type(e).__name__}: {e})") from None
    if bad is not None:
        raise DamagedFile(f"{path.name}: the checksum of {bad} in it does not hold")
    try:
        wrong = _wrong(state, step, config)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise DamagedFile(f"{path.name}: is no state of training ({type(e).__name__}: {e})") from None
    if wrong:
        raise DamagedFile(f"{path.name}: {wrong}")
    return state


def _wrong(state: dict[str, Any], step: int, config: Config) -> str:
    """For a message: how a loaded state differs from what this run's must be at `step`; "" if it does not."""
    if state["step"] != step or state["images"] != step * config.train.global_batch:
        return f"holds step {state['step']} after {counted(state['images'], 'image')}"
    if state["config_digest"] != config.digest():
        return f"belongs to other mathematics (config digest {state['config_digest'][:12]})"
    model = build_model(config, torch.device("meta"), "off")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for part in ("model", "ema"):
        if {name: value.shape for name, value in state[part].items()} != shapes:
            return f"its {part} is not of the config's shapes"
        if not all(bool(value.isfinite().all()) for value in state[part].values()):
            return f"its {part} is not finite"
    # parameter groups may be in another order than the network's parameters
    moments, of = state["optimizer"]["state"], [p.shape for p in model.parameters()]
    kept = [value for named in moments.values() for value in named.values() if isinstance(value, torch.Tensor)]
    if moments.keys() not in (set(), {*range(len(of))}) or any(value.shape not in (*of, ()) for value in kept):
        return "its optimizer is not of the config's shapes"
    whole = state["extra"].keys() >= {"attempt", "rollbacks", "skipped_steps", "window"}
    return "" if whole else "its extra is not whole"
