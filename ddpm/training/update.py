"""The update of weights, moments and average by the kernels of update_kernels.py, once a step's gradients are there.

Owns: where all of it lies in memory, as the kernels are told. The state and its format stay those of torch's Adam. Must
not know: where gradients come from, what a step is, how it is recorded: only that what is recorded runs later.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from ddpm.network.fused import work_on
from ddpm.training.optimizer import bare
from ddpm.training.progress import Window

_WORD_BYTES = 16
"""Bytes that a GPU reads at a time, if they lie together."""
_NONE: Mapping[nn.Parameter, Tensor] = MappingProxyType({})


class Update:
    """Moves `model`, the moments of its `optimizer` and `average`, a copy of `model`.

    adam: whether steps of the optimizer are taken here, which `is_adam` must allow; its moments are made if there are
    none yet. Else the average alone is moved. max_norm: to which gradients are clipped, or infinity. As long as this is
    used, all of them stay where they are in memory.
    """

    def __init__(
        self, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, *, adam: bool, max_norm: float
    ) -> None:
        from ddpm.training import update_kernels

        self._kernels, self.adam, self._max_norm = update_kernels, adam, max_norm
        group = optimizer.param_groups[0] if adam else {"eps": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0}
        self._adamw, self._eps = isinstance(optimizer, torch.optim.AdamW), group["eps"]
        beta_1, beta_2 = torch.tensor(group["betas"]).tolist()  # in float32, as the kernels have them
        self._numbers = {"beta_1": beta_1, "beta_2": beta_2, "decay": group["weight_decay"]}
        self._parameters = list(model.parameters())
        for e, p in zip(average.parameters(), self._parameters, strict=True):
            assert p.data_ptr() % _WORD_BYTES == 0 and p.dtype == torch.float32
            e.data = _as_it_lies(e.detach(), p)
        weights, averages = list(self._parameters), list(average.parameters())
        first, second = self._moments(optimizer) if adam else (weights, weights)  # the kernels do not look at them
        self._find_chunks([p.numel() for p in weights])
        columns = [self._addresses([t.data_ptr() for t in tensors]) for tensors in (weights, first, second, averages)]
        device = weights[0].device
        self._places = torch.from_numpy(np.stack([*columns, self._sizes], 1)).to(device)
        self._gradients = torch.zeros(len(self._of), dtype=torch.int64, device=device)
        self._partials, self._factors = torch.zeros(len(self._of), device=device), torch.zeros(5, device=device)
        self._wanted: list[tuple[int, bool]] = []
        """Where the gradients of the last call lie, and whether they are narrow."""
        self._told: list[tuple[int, bool]] = []
        """Where the device was told that they lie."""

    def _moments(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Adam's moments by parameter. Its counts of steps become parts of one tensor, `_counts`."""
        for p in self._parameters:
            if not optimizer.state[p]:
                zeros = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        states = [optimizer.state[p] for p in self._parameters]
        self._counts = torch.stack([state["step"] for state in states])
        for state, p, count in zip(states, self._parameters, self._counts, strict=True):
            moments = {name: _as_it_lies(state[name], p) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=count, **moments)
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]

    def _find_chunks(self, sizes: Sequence[int]) -> None:
        """Divide the tensors into chunks. `_of`: the tensor of each chunk; `_begin`: its first element there; `_sizes`:
        how many elements it has."""
        most, of_each = self._kernels.CHUNK, np.array(sizes)
        chunks = -(-of_each // most)
        self._of = np.repeat(np.arange(len(sizes)), chunks)
        first = np.arange(len(self._of)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self._begin, self._sizes = first * most, np.minimum(of_each[self._of] - first * most, most)

    def _addresses(self, begins: Sequence[int], narrow: Sequence[bool] | None = None) -> np.ndarray:
        """The address of each chunk, int64 (chunks,), from those of the tensors. narrow: which tensors are in bf16: the
        kernels know them by an odd address."""
        odd = np.array(narrow)[self._of] if narrow else np.zeros(len(self._of), np.int64)
        found: np.ndarray = np.array(begins)[self._of] + self._begin * np.where(odd, 2, 4) + odd
        return found

    def __call__(
        self, loss: Tensor, lr: Tensor, share: Tensor, window: Window, narrow: Mapping[nn.Parameter, Tensor] = _NONE
    ) -> tuple[Tensor, Tensor]:
        """Clip the parameters' gradients, take a step of Adam, move the average by `share` of its way to the weights.

        loss, lr, share: float32 (), on the device. window: to which loss and norm are added. narrow: gradients in
        bf16, in place of the parameters' own. Returns the gradient's norm, float32 (), and whether it and the loss are
        finite, bool (): if not, weights, moments and counts stay.
        """
        gradients = []
        for p in self._parameters:
            g = narrow.get(p, p.grad)
            assert g is not None and g.dtype in (p.dtype, torch.bfloat16), "a parameter has no gradient"
            whole = p.numel() >= self._kernels.CHUNK  # of a smaller tensor the elements are read one by one
            gradients.append(_as_it_lies(g, p, _WORD_BYTES if whole else g.itemsize))
        self._wanted = [(g.data_ptr(), g.dtype == torch.bfloat16) for g in gradients]
        if not recording(loss.device):
            self.tell()
        kernels, chunks, counters = self._kernels, len(self._of), len(self._counts)
        norm, finite = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.uint8)
        with torch.cuda.device_of(loss):
            kernels.squares_kernel[(chunks,)](
                self._partials, self._places, self._gradients, CHUNK=kernels.CHUNK, ROW=kernels.ROW, num_warps=4
            )
            kernels.factors_kernel[(1,)](
                self._factors, norm, finite, window.loss, window.grad_norm, self._counts, self._partials, loss, lr,
                chunks, counters, self._max_norm, **self._numbers, SUMMED=kernels.SUMMED,
                COUNTERS=kernels.padded(counters), num_warps=8,
            )  # fmt: skip
        self._move(share, adam=True)
        return norm, finite.view(torch.bool)

    def average(self, share: Tensor) -> None:
        """Move the average alone."""
        self._move(share, adam=False)

    def compile(self) -> None:
        """Launch the kernels so that they are compiled, and nothing changes. The parameters have gradients."""
        device = self._gradients.device
        lr, share = torch.zeros(2, device=device)
        if self.adam:
            self(torch.full((), math.nan, device=device), lr, share, Window.empty(device))
        else:
            self.average(share)

    def _move(self, share: Tensor, *, adam: bool) -> None:
        kernels = self._kernels
        with torch.cuda.device_of(share):
            kernels.update_kernel[(len(self._of),)](
                self._places, self._gradients, self._factors, share, **self._numbers, eps=self._eps,
                CHUNK=kernels.CHUNK, ROW=kernels.ROW, ADAM=adam, ADAMW=self._adamw, num_warps=8,
            )  # fmt: skip

    def tell(self) -> None:
        """Tell the device where the gradients of the last call lie. If that was recorded, this is called before it is
        replayed, as a copy from the host cannot be recorded with it."""
        if self._told == self._wanted:
            return
        begins, narrow = zip(*self._wanted, strict=True)
        addresses = torch.from_numpy(self._addresses(begins, narrow))
        if self._gradients.is_cuda:
            addresses = addresses.pin_memory()  # pinned memory is not used again before the copy is done
        self._gradients.copy_(addresses, non_blocking=True)
        self._told = self._wanted


def is_adam(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether the optimizer's steps are those of these kernels: torch's Adam or AdamW, of all weights in one group. A
    class that is derived from them and takes other steps is not."""
    if inspect.unwrap(type(optimizer).step) not in {inspect.unwrap(kind.step) for kind in (Adam, AdamW)}:
        return False
    group, *others = optimizer.param_groups
    weights = [*model.parameters()]
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)) == isinstance(optimizer, AdamW)
    whole = not others and len(group["params"]) == len(weights) and all(map(operator.is_, group["params"], weights))
    return whole and decoupled and all(p.requires_grad for p in weights) and not (group["amsgrad"] or group["maximize"])


@functools.cache
def serves(device: torch.device) -> bool:
    """Whether these kernels work on the device: on a GPU they are tried once, and a warning says why they do not."""
    if not work_on(device):
        return False
    try:
        check(device)
    except Exception as e:  # from Triton, from the compiler that it calls, or from a driver
        warnings.warn(f"updates on {device} take torch's kernels: {type(e).__name__}: {e}", stacklevel=2)
        return False
    return True


def check(device: torch.device) -> None:
    """Raises AssertionError where two steps are not torch's clipping, Adam and average, to rounding."""

    def waves(first: float) -> list[Tensor]:
        return [torch.arange(first, first + size, device=device).sin() for size in (3, 2048, 5000)]

    def ends(kind: type[torch.optim.Optimizer], own: bool) -> list[Tensor]:
        model, average = nn.ParameterList(waves(0.0)), nn.ParameterList(waves(0.5))
        optimizer = bare(kind)(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
        loss, (lr, share) = torch.ones((), device=device), torch.tensor([0.01, 0.3], device=device)
        update = Update(model, average, optimizer, adam=True, max_norm=9.0) if own else None
        for step in (1.0, 2.0):
            for p, gradient in zip(model.parameters(), waves(step), strict=True):
                p.grad = gradient
            if update is not None:
                update(loss, lr, share, Window.empty(device))
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 9.0)
                optimizer.step()
                torch._foreach_lerp_([e.detach() for e in average], [p.detach() for p in model], 0.3)
        return [t.detach() for t in (*model, *average)]

    for kind in (torch.optim.Adam, torch.optim.AdamW):
        for one, other, before in zip(ends(kind, True), ends(kind, False), waves(0.0) + waves(0.5), strict=True):
            assert (one - other).norm() <= 1e-3 * (other - before).norm(), f"{kind.__name__}: other than torch's"


def recording(device: torch.device) -> bool:
    """Whether work for the device is recorded now, and done when that is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _as_it_lies(t: Tensor, weight: Tensor, word_bytes: int = _WORD_BYTES) -> Tensor:
    """t, or a copy of it that lies in memory as its weight does: kernels walk through both side by side.

    word_bytes: what must divide its address.
    """
    strides = zip(t.stride(), weight.stride(), t.shape, strict=True)
    alike = all(a == b for a, b, size in strides if size > 1)
    whole = t.data_ptr() % word_bytes == 0
    return t if alike and whole else torch.empty_like(weight, dtype=t.dtype, requires_grad=False).copy_(t)
