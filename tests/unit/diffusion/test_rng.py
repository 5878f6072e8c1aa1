"""ddpm/diffusion/rng.py: known answers, independence of place, and the distributions."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ddpm.diffusion import rng, tensor_draws
from ddpm.diffusion.philox import philox4x32

KEY = rng.key(0, "test")
FAR = (1 << 48) - 1


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _chunks(monkeypatch: pytest.MonkeyPatch, chunk: int, few: int) -> None:
    """few: threads for which NumPy is taken; with 0, torch is taken for more than `chunk`."""
    monkeypatch.setattr(tensor_draws, "CHUNK_CPU", chunk)
    monkeypatch.setattr(tensor_draws, "CHUNK_THREADS", chunk)
    monkeypatch.setattr(tensor_draws, "FEW_THREADS", few)


def _philox(*words: int, key: tuple[int, int]) -> list[int]:
    counter = tuple(torch.tensor([word]) for word in words)
    return [int(word) for word in philox4x32(counter, rng.Key(*key))]


# Random123's kat_vectors, philox 4x32 10
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert _philox(*counter, key=key) == list(answer)


def _reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def test_philox_agrees_with_unbounded_integers_under_broadcasting():
    element = torch.tensor([[0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]])
    row = torch.tensor([[3], [0xDEADBEEF], [0xFFFFFFFF]])
    words = philox4x32((element, row, torch.tensor([[7]]), row ^ 5), KEY)
    for i, j in itertools.product(range(3), range(5)):
        r = int(row[i, 0])
        expected = _reference_philox([int(element[0, j]), r, 7, r ^ 5], list(KEY))
        assert [int(word[i, j]) for word in words] == expected


def test_a_value_is_the_one_its_counter_names():
    """The layout that makes values portable: element e is word e % 4 of counter (e // 4, index, step, high bits)."""
    index, step = (3 << 32) + 5, (7 << 32) + 11
    values = rng.normal(KEY, torch.tensor([index]), step, (10,))[0].double()
    for e in (0, 1, 2, 3, 9):
        words = _reference_philox([e // 4, 5, 11, 3 << 16 | 7], list(KEY))
        first, second = words[e % 4 // 2 * 2 : e % 4 // 2 * 2 + 2]
        signed, theta = (w - 2**32 if w >= 2**31 else w for w in (first | 1, second))
        radius = math.copysign(math.sqrt(-2.0 * math.log(abs(signed) / 2**31)), signed)
        angle = theta / 2**31 * math.pi / 2
        expected = radius * (math.sin(angle) if e % 2 else math.cos(angle))
        # float32 rounding of each of some ten operations, on values of a few units
        assert values[e].item() == pytest.approx(expected, abs=2e-6)


def test_normals_follow_box_and_muller_in_float64():
    index = torch.arange(64)
    element = torch.arange(1024)[None]
    counter = (element, index[:, None], torch.tensor([[9]]), torch.tensor([[0]]))
    word_r, word_theta = philox4x32(counter, KEY)[:2]
    signed = (word_r | 1) - (word_r >= 2**31).long() * 2**32
    theta = word_theta - (word_theta >= 2**31).long() * 2**32
    u = signed.float().double() / 2**31  # rounded once: near u = 1 the radius magnifies this, and it is no error
    radius = (-2.0 * u.abs().log()).sqrt().copysign(u)
    expected = radius * (theta.double() / 2**31 * math.pi / 2).cos()
    values = rng.normal(KEY, index, 9, (1024, 4))[..., 0].double()
    # the cosine's polynomial 5e-8 and some ten roundings of 6e-8, on radii of about 5
    assert (values - expected).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (1,), (2, 3), (), (3, 32, 32), (16411,)])
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_a_normal_does_not_depend_on_its_batch(shape, num_rows):
    index = torch.arange(num_rows) * 977 + 13
    whole = rng.normal(KEY, index, 4, shape)
    assert whole.shape == (num_rows, *shape) and whole.dtype == torch.float32
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rng.normal(KEY, index[order], 4, shape), whole[order])
    for i in {0, num_rows // 2, num_rows - 1}:
        assert torch.equal(rng.normal(KEY, index[i : i + 1], 4, shape)[0], whole[i])
    if num_rows > 1:
        assert torch.equal(rng.normal(KEY, index[1::2], 4, shape), whole[1::2])  # a strided index, too


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 5, 7), (3, 17, 31)])
def test_a_normal_does_not_depend_on_library_threads_or_chunks(shape, monkeypatch):
    index = torch.arange(201)
    results = []
    for (few, threads), chunk in itertools.product(((2, 1), (0, 1), (0, 2)), (tensor_draws.CHUNK_CPU, 4096, 33333, 1)):
        rows = index if chunk > 1 else index[:9]
        torch.set_num_threads(threads)
        _chunks(monkeypatch, chunk, few)
        results.append(rng.normal(KEY, rows, 2, shape))
    for result in results[1:]:
        assert torch.equal(result, results[0][: len(result)])


def test_a_normal_does_not_depend_on_the_elements_after_it():
    index = torch.arange(5)
    long = rng.normal(KEY, index, 0, (1001,))
    for size in (1, 2, 3, 5, 100, 999):
        assert torch.equal(rng.normal(KEY, index, 0, (size,)), long[:, :size])
    assert torch.equal(rng.normal(KEY, index, 0, (7, 11, 13)).flatten(1), long)


def test_every_part_of_the_name_of_a_value_matters():
    index = torch.tensor([5])
    draws = [
        rng.normal(rng.key(seed, purpose, attempt), index + shift, step, (64,))
        for seed, purpose, attempt, shift, step in [
            (0, "noise", 0, 0, 0),
            (1, "noise", 0, 0, 0),
            (0, "other", 0, 0, 0),
            (0, "noise", 1, 0, 0),
            (0, "noise", 0, 1, 0),
            (0, "noise", 0, 0, 1),
        ]
    ]
    for a, b in itertools.combinations(draws, 2):
        assert not (a == b).any()


def test_large_steps_and_indices_do_not_wrap():
    places = (0, 1, 5, 1 << 16, 1 << 31, (1 << 31) + 5, 1 << 32, (1 << 32) + 5, 1 << 47, FAR)
    index = torch.tensor(places)
    rows = torch.cat([rng.normal(KEY, index, step, (8,)) for step in places])
    assert len(torch.unique(rows, dim=0)) == len(places) ** 2


@pytest.mark.parametrize("step", [-1, FAR + 1])
def test_a_step_out_of_range_is_refused(step):
    for draw in (lambda: rng.normal(KEY, torch.arange(2), step, (3,)), lambda: rng.permutation(KEY, step, 4)):
        with pytest.raises(ValueError, match=rf"step is {step}; .*2\*\*48"):
            draw()


@pytest.mark.parametrize("index", [-1, FAR + 1])
def test_an_index_out_of_range_is_refused(index):
    for draw in (
        lambda: rng.normal(KEY, torch.tensor([0, index]), 0, (3,)),
        lambda: rng.uniform_int(KEY, torch.tensor([0, index]), 0, 10),
    ):
        with pytest.raises(ValueError, match=r"index runs from .*2\*\*48"):
            draw()


def test_an_index_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"index is torch\.int32"):
        rng.normal(KEY, torch.arange(3, dtype=torch.int32), 0, (3,))


def test_no_samples_and_no_elements_give_empty_tensors():
    assert rng.normal(KEY, torch.arange(0), 0, (3, 4)).shape == (0, 3, 4)
    assert rng.normal(KEY, torch.arange(2), 0, (0, 4)).shape == (2, 0, 4)
    assert rng.uniform_int(KEY, torch.arange(0), 0, 5).shape == (0,)
    assert rng.permutation(KEY, 0, 0).shape == (0,)


def test_normals_are_standard_and_independent():
    # 2**20 fixed numbers; bounds are five standard errors of each statistic
    z = rng.normal(KEY, torch.arange(256), 1, (4096,)).double()
    error = 5.0 / math.sqrt(z.numel())
    assert abs(z.mean()) < error
    assert abs((z**2).mean() - 1) < error * math.sqrt(2)
    assert abs((z**3).mean()) < error * math.sqrt(15)
    assert abs((z**4).mean() - 3) < error * math.sqrt(96)
    for a, b in [
        (z[:, :-1], z[:, 1:]),  # the two of a pair, and neighbouring pairs
        (z[:, 0::2], z[:, 1::2]),
        (z[:, 0::2] ** 2 - 1, z[:, 1::2] ** 2 - 1),  # a pair shares its radius
        (z[:, :-4], z[:, 4:]),
        (z[:-1], z[1:]),
        (z, rng.normal(KEY, torch.arange(256), 2, (4096,)).double()),
    ]:
        scale = float(a.std() * b.std())
        assert abs((a * b).mean()) < 5.0 * scale / math.sqrt(a.numel())
    normal = torch.distributions.Normal(0.0, 1.0)
    for x in (-4.0, -2.0, -1.0, -0.1, 0.0, 0.1, 1.0, 2.0, 4.0):
        p = normal.cdf(torch.tensor(x, dtype=torch.float64)).item()
        assert abs((z < x).double().mean() - p) < 5.0 * math.sqrt(p * (1 - p) / z.numel())


def test_normals_at_the_ends_of_the_words_are_finite():
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    word_r, word_theta = (w.flatten() for w in torch.meshgrid(words, words, indexing="ij"))
    out = torch.empty(2, len(word_r))
    tensor_draws.box_muller(word_r, word_theta, out[0], out[1])
    assert out.isfinite().all()
    # |word_r| = 1 is the longest radius, sqrt(62 log 2)
    assert out.abs().max().item() == pytest.approx(math.sqrt(62 * math.log(2)), rel=1e-6)


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 1 << 31, (1 << 31) + 7, 1 << 32])
def test_uniform_integers_fill_their_range(high):
    u = rng.uniform_int(KEY, torch.arange(200_000), 3, high)
    assert u.dtype == torch.int64 and u.min() >= 0 and u.max() < high
    # five standard errors of the mean of a uniform
    assert abs(u.double().mean() - (high - 1) / 2) <= 5 * high / math.sqrt(12 * len(u))
    if high <= 1000:
        assert len(torch.bincount(u)) == high and torch.bincount(u).min() > 0
        expected = len(u) / high
        assert (torch.bincount(u) - expected).abs().max() <= 6 * math.sqrt(expected)


def test_uniform_integers_do_not_depend_on_their_batch():
    index = torch.arange(1000)
    whole = rng.uniform_int(KEY, index, 3, 1000)
    assert torch.equal(rng.uniform_int(KEY, index[17:600:3], 3, 1000), whole[17:600:3])
    assert not torch.equal(rng.uniform_int(KEY, index, 4, 1000), whole)


@pytest.mark.parametrize("high", [0, -3, (1 << 32) + 1])
def test_an_empty_or_too_wide_range_is_refused(high):
    with pytest.raises(ValueError, match=rf"high is {high}; .*2\*\*32"):
        rng.uniform_int(KEY, torch.arange(2), 0, high)


def test_coins_are_fair_and_change_with_the_step():
    index = torch.arange(100_000)
    first, second = rng.coin(KEY, index, 0), rng.coin(KEY, index, 1)
    assert first.dtype == torch.bool
    bound = 5 * 0.5 / math.sqrt(len(index))
    assert abs(first.double().mean() - 0.5) < bound
    assert abs((first ^ second).double().mean() - 0.5) < bound


def test_a_permutation_holds_every_number_once_and_changes_with_the_epoch():
    first, second = rng.permutation(KEY, 0, 5000), rng.permutation(KEY, 1, 5000)
    assert first.dtype == torch.int64
    assert torch.equal(first.sort().values, torch.arange(5000))
    assert (first == second).sum() < 10  # one place in common is expected
    assert torch.equal(first, rng.permutation(KEY, 0, 5000))


def test_permutations_of_three_are_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(rng.permutation(KEY, epoch, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    # 200 expected; five standard deviations
    assert all(abs(count - 200) < 5 * math.sqrt(1200 * 5 / 36) for count in counts.values())


def test_keys_and_seeds_are_frozen():
    """They name every image and every run made so far: a change here silently changes all of them."""
    assert rng.key(0, "noise") == (0x5051AB15, 0x7D4D8D40)
    assert rng.derive_seed(0, "dropout", 12, 3) == 2979915095612280238
    assert rng.permutation(rng.key(0, "order"), 2, 6).tolist() == [1, 3, 0, 2, 5, 4]


DIGEST_OF_NORMALS = """
import hashlib, torch
from ddpm.diffusion import rng, tensor_draws
from ddpm.diffusion.philox import philox4x32
for tensor_draws.FEW_THREADS, tensor_draws.CHUNK_THREADS in [(1 << 30, 1), (0, 1)]:
    bits = b"".join(
        rng.normal(rng.key(0, "noise"), torch.arange(2), 3, shape).view(torch.int32).numpy().astype("<i4").tobytes()
        for shape in [(3, 5, 7), (3, 32, 32)]
    )
    print(hashlib.sha256(bits).hexdigest())
"""


OLD_CPU = {
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "ATEN_CPU_CAPABILITY": "default",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 X86_V3 AVX512_SKX AVX512F AVX2 FMA3",  # as NumPy calls them now, and did before
}


@pytest.mark.parametrize("kind", [{}, OLD_CPU])
def test_the_bits_of_normals_are_frozen_on_every_kind_of_cpu(kind: dict[str, str]) -> None:
    """Correctly rounded operations leave no choice. Two samples of 105 and of 3,072 elements, by NumPy and by torch.

    The older CPU that the second case pretends to have gets other square roots from torch.
    """
    command = [sys.executable, "-c", DIGEST_OF_NORMALS]
    done = subprocess.run(command, env=os.environ | kind, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2162520163667a8daf7abf38004b1c9cb7bcbeff0d06afb6ff0197bcd28cdc4b"] * 2


def test_keys_and_seeds_of_neighbours_have_nothing_in_common():
    keys = [rng.key(s, p, a) for s in range(-3, 10) for p in ("noise", "flip", "1", "") for a in range(5)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= word < 2**32 for key in keys for word in key)
    seeds = [rng.derive_seed(s, "dropout", step, rank) for s in range(5) for step in range(20) for rank in range(5)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rng.derive_seed(1, "d", 23) != rng.derive_seed(1, "d", 2, 3) != rng.derive_seed(12, "d", 3)


def test_a_float_seed_is_refused():
    with pytest.raises(TypeError):
        rng.key(1.0, "noise")  # type: ignore[arg-type]


# ---------------------------------------------------------------- masks


def _mask(index: list[int], step: int = 4, layer: int = 2, num: int = 1001, probability: float = 0.3) -> torch.Tensor:
    return rng.keep_mask(rng.places(KEY, torch.tensor(index), step), layer, num, probability)


def test_an_element_of_a_mask_is_the_one_its_counter_names():
    index, step, layer = (3 << 32) + 5, (7 << 32) + 11, 9
    kept = _mask([index], step, layer, 29, 0.3)[0]
    for e in range(29):
        words = _reference_philox([layer << 24 | e // 8, 5, 11, 3 << 16 | 7], list(KEY))
        number = words[e % 8 // 2] >> 16 * (e % 2) & 0xFFFF
        signed = number - 2**16 if number >= 2**15 else number
        assert bool(kept[e]) is (signed >= round(0.3 * 2**16) - 2**15)


def test_a_mask_does_not_depend_on_its_batch_or_chunks(monkeypatch):
    index = [0, 7, 1 << 33, 12, 13]
    whole = _mask(index)
    for few in (1 << 30, 0):
        _chunks(monkeypatch, 100, few)
        assert torch.equal(_mask(index), whole)
    for i, one in enumerate(index):
        assert torch.equal(_mask([one])[0], whole[i])
    assert torch.equal(_mask(index, num=300), whole[:, :300])


@pytest.mark.parametrize("changes", [{"step": 5}, {"layer": 3}])
def test_masks_of_other_steps_layers_and_samples_are_unrelated(changes):
    one, other = _mask([0, 1], num=80_000, probability=0.5), _mask([0, 1], num=80_000, probability=0.5, **changes)
    for a, b in [(one[0], one[1]), (one[0], other[0]), (one[0], other[1])]:
        assert abs(float((a == b).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(80_000)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999])
def test_a_mask_keeps_the_share_that_it_says(probability):
    num = 1 << 20
    kept, share = _mask([1], num=num, probability=probability), rng.keep_share(probability)
    assert share == pytest.approx(1 - probability, abs=2**-17)
    deviation = math.sqrt(share * (1 - share) / num)
    assert abs(float(kept.float().mean()) - share) <= 5 * deviation
    for bit in range(8):  # each of the eight numbers of a counter
        assert abs(float(kept[:, bit::8].float().mean()) - share) <= 5 * deviation * math.sqrt(8)


def test_a_mask_that_no_counter_could_name_is_refused():
    for layer, num in ((256, 8), (-1, 8), (0, 0), (0, (1 << 27) + 1)):
        with pytest.raises(ValueError, match="layer is"):
            _mask([0], layer=layer, num=num)
