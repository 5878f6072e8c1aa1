"""What an earlier commit left in fixture/, made usable: copied, its paths put right, and gone on with as a user would.

Only processes, files and ddpm's public names: modules may move. Floating-point sums differ between kinds of CPU, so
every process here computes with AVX2 at most and one thread, and an end is compared in two ways: bit for bit where
this machine computes as the one did that made the fixture (`kind`), and within a tolerance everywhere.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PROJECT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FIXTURE = HERE / "fixture"
IMAGES = FIXTURE / "images.zip"
RUNS = ("killed", "sampled")
NOWHERE = Path("/fixture")
"""What stands in the fixture's files for the directory that held them."""
TEST_SPLIT_TOO = ["evaluate.reference=test", "--then", "sample,evaluate", "--prepare"]
"""Words that have submit.py pack both splits of the images, and queue nothing."""

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "HASWELL",
}
"""What torch, oneDNN, MKL and numpy may use, so that newer CPUs of the same maker give the same bits."""
RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Tolerance of losses, norms and scores on another kind of CPU."""
LEVELS = 1
"""By which a sample's pixel may differ there, of 255."""


def environment(home: Path) -> dict[str, str]:
    """One core, a terminal of 100 columns, and a PATH on which there is no scheduler."""
    kept = {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "TMPDIR")}
    fixed = {"PATH": str(home / "bin"), "HOME": str(home), "DDPM_RUNS": str(home / "made"), "DDPM_CPUS": "1"}
    fixed["CUDA_VISIBLE_DEVICES"] = ""
    told = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**kept, **fixed, **told, **threads, **(PINNED if _has_avx2() else {})}


def _has_avx2() -> bool:
    cpu = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpu.exists() and "avx2" in cpu.read_text()


class Machine:
    """A directory with runs, the images and a project: each call is a process in the project, as a user's is."""

    def __init__(self, home: Path, project: Path = PROJECT) -> None:
        self.home, self.project, self.root = home, project, home / "made"
        (home / "bin").mkdir(parents=True)
        self.root.mkdir()

    def bring(self, name: str) -> Path:
        """A copy of one of the fixture's runs, unpacked, with the paths in its files put right. Its data is not packed:
        a job packs it again from the images."""
        run = self.root / name
        shutil.copytree(FIXTURE / name, run)
        for empty in ("eval", "grids", "samples"):  # git keeps no empty directory
            (run / empty).mkdir(exist_ok=True)
        for path in list(run.rglob("*.xz")):
            path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
            path.unlink()
        self.bring_inputs()
        for path in (run / "config.yaml", run / "run.json"):
            path.write_text(path.read_text().replace(str(NOWHERE), str(self.home)))
        return run

    def bring_inputs(self) -> None:
        """The images, and the two configs as they were submitted."""
        if not (self.home / IMAGES.name).exists():
            shutil.copy(IMAGES, self.home)
            for name in RUNS:
                text = (FIXTURE / f"{name}.yaml").read_text()
                (self.home / f"{name}.yaml").write_text(text.replace("images.zip", str(self.home / IMAGES.name)))

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """python WORDS in the project."""
        done = self.run([sys.executable, *words])
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done

    def run(self, argv: list[str], **env: str) -> subprocess.CompletedProcess[str]:
        surroundings = {**environment(self.home), **env}
        return subprocess.run(argv, capture_output=True, text=True, cwd=self.project, env=surroundings, timeout=300)

    def kind(self) -> dict[str, str]:
        """What decides the bits of a floating-point sum here: where it is the same, so are they."""
        code = "import json, numpy, torch; print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.__version__"
        capability, torch_version, numpy_version = json.loads(self("-c", f"{code}, numpy.__version__]))").stdout)
        vendor = re.search(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text()) if _has_avx2() else None
        return {
            "machine": platform.machine(),
            "vendor": vendor[1] if vendor else "",
            "instructions": capability,
            "torch": torch_version,
            "numpy": numpy_version,
        }


# ---------------------------------------------------------------- what came out


def read(path: Path) -> Any:
    """A JSON file, or what of it is compressed."""
    return json.loads(lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_text())


def packed(machine: Machine) -> dict[str, Any]:
    """What is in the data cache: each packed split by the key that it is found under."""
    cache = machine.root / ".cache" / "data"
    return {path.parent.name: read(path) for path in sorted(cache.glob("*/meta.json"))}


DIGESTS = """
import json, sys, ddpm
asked = json.loads(sys.argv[1])
print(json.dumps({name: ddpm.load_config(path, words).digest() for name, (path, words) in asked.items()}))
"""


def config_digests(machine: Machine, asked: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """The digest of each config file with its overrides, by the name that it is asked for under."""
    return dict(json.loads(machine("-c", DIGESTS, json.dumps(asked)).stdout))


def submit(machine: Machine, config: str, *words: str) -> Path:
    """launch/submit.py on this machine; the run's directory, however far it got."""
    local = ["--cluster", "local", "--cpus-per-task", "1", *words]
    machine("launch/submit.py", config, *local)
    return machine.root / Path(config).stem


def state(run: Path, step: int) -> dict[str, Any]:
    """A checkpoint's model, ema and optimizer: each tensor and number by its path, and the small rest as it is."""
    saved = torch.load(run / "checkpoints" / f"step-{step:09d}.pt", weights_only=True)
    return {
        "tensors": {k: _described(v) for k, v in _flat(saved).items() if isinstance(v, torch.Tensor)},
        "values": {k: v for k, v in _flat(saved).items() if not isinstance(v, torch.Tensor)},
    }


def _described(tensor: torch.Tensor) -> list[Any]:
    """The beginning of the sha256 of its type, shape and bytes; and its norm, for other kinds of CPU."""
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = hashlib.sha256(head + tensor.contiguous().numpy().tobytes()).hexdigest()
    return [digest[:16], float(f"{tensor.double().norm():.6g}")]


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{key}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, sub in enumerate(tree) for k, v in _flat(sub, f"{key}/{i}").items()}
    return {key: tree}


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "images_per_s")} for line in lines]


def shards(run: Path, set_name: str) -> dict[str, dict[str, Any]]:
    """Each shard's arrays by its name."""
    return {p.name: dict(np.load(p)) for p in sorted((run / "samples" / set_name).glob("shard-*.npz"))}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def score(run: Path, set_name: str) -> dict[str, Any]:
    """eval/SET.json without when it was made, and with its run's path as the fixture has it."""
    record = read(run / "eval" / f"{set_name}.json")
    del record["created"]
    record["command"] = [word.replace(str(run.parents[1]), str(NOWHERE)) for word in record["command"]]
    return dict(record)


def results(run: Path, step: int) -> dict[str, Any]:
    """What training left, in a form that can be kept and compared."""
    weights = run / "checkpoints" / f"ema-{step:09d}.safetensors"
    return {
        "state": state(run, step),
        "metrics": metrics(run),
        "grid_sha256": sha256(np.asarray(Image.open(run / "grids" / f"step-{step:09d}.png")).tobytes()),
        "ema_sha256": sha256(weights.read_bytes()),
        "checkpoint_sha256": read(run / "checkpoints" / f"step-{step:09d}.json")["sha256"],
        "files": sorted(p.relative_to(run).as_posix() for d in ("checkpoints", "grids") for p in (run / d).iterdir()),
    }
