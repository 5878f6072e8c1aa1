"""What torch-fidelity and prdc say of the features that test_peers.py scores: writes peers.json.

pip install --no-deps --target /tmp/peers torch-fidelity==0.4.0 prdc==0.2
PYTHONPATH=/tmp/peers:. python -m tests.unit.scoring.peers
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

KEPT = Path(__file__).with_name("peers.json")


def features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples (1300, 12), references (1100, 12) and a classifier (20, 12); frozen generator, so the same everywhere."""
    draws = np.random.RandomState(7)
    samples, references = draws.standard_normal((1300, 12)), 1.2 * draws.standard_normal((1100, 12)) + 0.2
    samples[:200] *= 0.3
    return samples.astype(np.float32), references.astype(np.float32), draws.standard_normal((20, 12))


def main() -> None:
    import torch
    from prdc import compute_prdc
    from torch_fidelity import metric_isc, metric_kid, metric_prc

    x, y, classifier = (torch.from_numpy(np.asarray(a, dtype=np.float64)) for a in features())
    said = {
        **metric_kid.kid_features_to_metric(x, y, verbose=False),
        **metric_isc.isc_features_to_metric(x @ classifier.T),
        **metric_prc.prc_features_to_metric(x, y, verbose=False),
    }
    theirs = compute_prdc(y.numpy(), x.numpy(), nearest_k=5)
    said |= {key: float(theirs[key]) for key in ("density", "coverage")}
    KEPT.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
