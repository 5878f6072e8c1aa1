"""The Inception Score: how sure the classifier is of each image, and how varied its answers are.

Salimans et al. 2016, "Improved techniques for training GANs" (arXiv:1606.03498), section 4: exp of the mean divergence
KL(p(y|x) || p(y)), in ten parts. The parts are torch-fidelity's. Must not know images, files or which weights are the
published ones.
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

SPLITS = 10
SEED = 2020


class InceptionScore:
    """Sums over features that come in the order of their samples; nothing of a sample is kept.

    num: of samples, at least SPLITS. classifier: (classes, d), the last layer without its bias, as the score has been
    computed from the start. With q = mean p, the mean divergence of a part is mean(p log p) - q log q, so that sums are
    enough.
    """

    def __init__(self, num: int, classifier: np.ndarray) -> None:
        ends = [i * num // SPLITS for i in range(SPLITS + 1)]
        self.part_of = np.empty(num, dtype=np.int64)
        self.part_of[np.random.RandomState(SEED).permutation(num)] = np.repeat(np.arange(SPLITS), np.diff(ends))
        self.classifier = classifier.astype(np.float64)
        self.p = np.zeros((SPLITS, len(classifier)))
        self.p_log_p = np.zeros(SPLITS)
        self.seen = 0

    def add(self, features: np.ndarray) -> None:
        """The next features (n, d)."""
        log_p = log_softmax(features.astype(np.float64) @ self.classifier.T, axis=1)
        p = np.exp(log_p)
        parts = self.part_of[self.seen : self.seen + len(features)]
        np.add.at(self.p, parts, p)
        np.add.at(self.p_log_p, parts, (p * log_p).sum(axis=1))
        self.seen += len(features)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts."""
        assert self.seen == len(self.part_of)
        num = np.bincount(self.part_of, minlength=SPLITS)
        q = self.p / num[:, None]
        log_q = np.log(q, where=q > 0, out=np.zeros_like(q))
        scores = np.exp(self.p_log_p / num - (q * log_q).sum(axis=1))
        return float(scores.mean()), float(scores.std())
