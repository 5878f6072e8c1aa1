"""What a compute node has, told by a job of doctor.py on it:

    python -m launch.checkup.node_report FILE

Written as JSON beside a file of the login node's, which shows that both see the same place.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ddpm.run.files import read_json, write_json
from launch.cluster import environment
from launch.cluster.inquiry import COMMANDS


def report(asked: Path) -> dict[str, Any]:
    """asked: the login node's file."""
    told: dict[str, Any] = {
        "sees": read_json(asked),
        "host": environment.host(),
        "time": time.time(),
        "python": sys.version.split()[0],
        "lacks": [name for name in COMMANDS if shutil.which(name) is None],
        "cpus": len(os.sched_getaffinity(0)),
        "tmp_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
    }
    try:
        import torch

        told |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
        if told["gpus"]:
            told["gpu"] = torch.cuda.get_device_name(0)
            told["sum"] = float(torch.ones(1024, device="cuda").sum())
            told["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as e:  # any error of a driver, a library or a device is a finding
        told["torch_error"] = f"{type(e).__name__}: {e}"
    return told


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write_json(where.with_suffix(".node.json"), report(where), replace=True)
