"""What follows the gradients of a step as three kernels, for GPUs: their norm; what depends on it alone; clipping, Adam
and the average of the weights in one pass through memory.

Owns: how these are computed from chunks, given as numbered addresses. Must not know: tensors, layouts, optimizers. Adam
is torch's fused one for GPUs, operation for operation, but for its bias corrections, which are computed in float64.
Every sum has an order of its own, so the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

CHUNK = 2048
"""Elements of a chunk: side by side in memory, of one parameter, whose last chunk may have less. 16 divides
its addresses; that of its gradient if it is whole."""
ROW = 5
"""Numbers of a chunk in the table of places, int64 (chunks, 5): addresses of the weights, of both moments and of the
average, and how many elements there are."""
SUMMED = 4096
"""How many of the chunks' sums are added at a time."""
_ANY = ["chunks", "counters"]
"""Numbers of which no value has a kernel of its own."""


@triton.jit
def _at(address, i, WHOLE: tl.constexpr):
    """Places of float32 from an address on. WHOLE: 16 divides it, and so words of four can be moved at a time."""
    begin = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(begin, 16) + i if WHOLE else begin + i


@triton.jit
def _inside(i, num, WHOLE: tl.constexpr):
    """Which of a chunk's elements there are; for a whole one no mask that would take them one by one."""
    return tl.full(i.shape, True, tl.int1) if WHOLE else i < num


@triton.jit
def _gradient(address, i, inside, WHOLE: tl.constexpr):
    """A chunk's gradient, float32; at an odd address it is bf16, float32's upper half, and begins a byte before."""
    if address % 2 == 1:
        begin = (address - 1).to(tl.pointer_type(tl.uint16))
        begin = tl.multiple_of(begin, 16) if WHOLE else begin
        half = tl.load(begin + i, mask=inside, other=0).to(tl.uint32)
        g = (half << 16).to(tl.float32, bitcast=True)  # not every GPU has bf16
    else:
        g = tl.load(_at(address, i, WHOLE), mask=inside, other=0.0)
    return g


@triton.jit
def _squares(partial, gradient, num, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    i = tl.arange(0, CHUNK)
    g = _gradient(gradient, i, _inside(i, num, WHOLE), WHOLE)
    tl.store(partial, tl.sum(g * g, 0))


@triton.jit
def squares_kernel(partials, places, gradients, CHUNK: tl.constexpr, ROW: tl.constexpr):
    """partials: float32 (chunks,), the sum of squares of each chunk's gradient. gradients: int64 (chunks,), where they
    are, as of `_gradient`."""
    chunk = tl.program_id(0)
    num, gradient = tl.load(places + chunk * ROW + 4), tl.load(gradients + chunk)
    if num == CHUNK:
        _squares(partials + chunk, gradient, num, CHUNK, True)
    else:
        _squares(partials + chunk, gradient, num, CHUNK, False)


@triton.jit
def _power(base, exponent):
    """base ** exponent, float64, of a whole number below 2 ** 24, up to which float32 counts."""
    power = (exponent * 0 + 1).to(tl.float64)
    base = power * base
    for _ in range(24):
        power = tl.where(exponent % 2 == 1, power * base, power)
        base = base * base
        exponent = exponent // 2
    return power


@triton.jit(do_not_specialize=_ANY)
def factors_kernel(
    factors, norm, finite, sum_of_losses, sum_of_norms, counts, partials, loss, lr, chunks, counters, max_norm, beta_1,
    beta_2, decay, SUMMED: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """By one program: the gradient's norm; whether it and the loss are finite; what `update_kernel` needs of both.

    factors: float32 (5,): finite (1 or 0), clipping's, Adam's step size, the root of its second bias correction, by how
    much of itself AdamW lets a weight decay. counts: float32 (counters,), each parameter's finite steps, all the same.
    sum_of_losses, sum_of_norms: of the window, to which these are added, the norm if it is finite.
    """
    parameter = tl.arange(0, COUNTERS)
    count = tl.load(counts + parameter, mask=parameter < counters, other=0.0)
    totals = tl.zeros((SUMMED,), tl.float32)
    for begin in range(0, chunks, SUMMED):
        chunk = begin + tl.arange(0, SUMMED)
        totals += tl.load(partials + chunk, mask=chunk < chunks, other=0.0)
    of_all = tl.sqrt_rn(tl.sum(totals, 0))
    of_loss = tl.load(loss)
    norm_is_finite = tl.abs(of_all) < float("inf")
    is_finite = norm_is_finite & (tl.abs(of_loss) < float("inf"))
    taken = tl.where(is_finite, 1.0, 0.0)
    exponent = (tl.max(count, 0) + 1.0).to(tl.int32)
    correction_1 = (1.0 - _power(beta_1, exponent)).to(tl.float32)
    correction_2 = (1.0 - _power(beta_2, exponent)).to(tl.float32)
    rate = tl.load(lr)
    all_losses = tl.load(sum_of_losses) + of_loss
    all_norms = tl.load(sum_of_norms) + tl.where(norm_is_finite, of_all, 0.0)
    tl.debug_barrier()  # all threads have read what is changed from here on
    tl.store(counts + parameter, count + taken, mask=parameter < counters)
    tl.store(sum_of_losses, all_losses)
    tl.store(sum_of_norms, all_norms)
    tl.store(norm, of_all)
    tl.store(finite, is_finite.to(tl.uint8))
    tl.store(factors, taken)
    tl.store(factors + 1, tl.minimum(tl.div_rn(max_norm, of_all + 1e-6), 1.0))
    tl.store(factors + 2, tl.div_rn(rate, correction_1))
    tl.store(factors + 3, tl.sqrt_rn(correction_2))
    tl.store(factors + 4, rate * decay)


@triton.jit
def _adam(weight, g, first, second, factors, inside, beta_1, beta_2, decay, eps, ADAMW: tl.constexpr):
    """Move a chunk's weights and moments, if the gradient is finite; returns the weights."""
    taken = tl.broadcast_to(tl.load(factors), inside.shape) > 0.0
    clip, size, root, lost = tl.load(factors + 1), tl.load(factors + 2), tl.load(factors + 3), tl.load(factors + 4)
    g *= clip
    before = tl.load(weight, mask=inside, other=0.0)
    w = before
    if ADAMW:
        w = tl.fma(-lost, w, w)
    else:
        g = tl.fma(w, decay, g)
    m = tl.load(first, mask=inside, other=0.0)
    v = tl.load(second, mask=inside, other=0.0)
    m = tl.fma(beta_1, m, (1.0 - beta_1) * g)  # torch writes fma(-beta, g, g): the same, as 1 - beta is exact
    v = tl.fma(beta_2, v, (1.0 - beta_2) * (g * g))
    w -= tl.div_rn(size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(first, m, mask=inside & taken)
    tl.store(second, v, mask=inside & taken)
    tl.store(weight, w, mask=inside & taken)
    return tl.where(taken, w, before)


@triton.jit
def _average(average, w, share, inside):
    """Move a chunk's average by its share of the way to the weights; by 0 it keeps its bits, by 1 it takes theirs."""
    due = inside & (tl.broadcast_to(share, inside.shape) > 0.0)
    e = tl.load(average, mask=due, other=0.0)
    e = tl.where(share < 0.5, tl.fma(share, w - e, e), tl.fma(e - w, 1.0 - share, w))
    tl.store(average, tl.where(share == 1.0, w, e), mask=due)


@triton.jit
def _move(
    row, gradient, factors, share, num, beta_1, beta_2, decay, eps, CHUNK: tl.constexpr, ADAM: tl.constexpr,
    ADAMW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, CHUNK)
    inside, weight = _inside(i, num, WHOLE), _at(tl.load(row), i, True)
    if ADAM:
        first, second = _at(tl.load(row + 1), i, True), _at(tl.load(row + 2), i, True)
        g = _gradient(tl.load(gradient), i, inside, WHOLE)
        w = _adam(weight, g, first, second, factors, inside, beta_1, beta_2, decay, eps, ADAMW)
    else:
        w = tl.load(weight, mask=inside, other=0.0)
    _average(_at(tl.load(row + 3), i, True), w, share, inside)


@triton.jit
def update_kernel(
    places, gradients, factors, share, beta_1, beta_2, decay, eps, CHUNK: tl.constexpr, ROW: tl.constexpr,
    ADAM: tl.constexpr, ADAMW: tl.constexpr,
):  # fmt: skip
    """Move a chunk's weights, its moments and their average; without ADAM the average alone.

    gradients, factors: as above. share: float32 (), how much of the way to the weights the average goes.
    """
    row, gradient = places + tl.program_id(0) * ROW, gradients + tl.program_id(0)
    num, by = tl.load(row + 4), tl.load(share)
    if num == CHUNK:
        _move(row, gradient, factors, by, num, beta_1, beta_2, decay, eps, CHUNK, ADAM, ADAMW, True)
    else:
        _move(row, gradient, factors, by, num, beta_1, beta_2, decay, eps, CHUNK, ADAM, ADAMW, False)


def padded(num: int) -> int:
    """The next power of two, which a program can count to."""
    return int(triton.next_power_of_2(num))
