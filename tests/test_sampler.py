"""Truncated sampling and its log-probabilities, against brute force in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from grpo_engine.sampler import (
    Entropies,
    draw,
    entropy_of,
    pad_kept,
    truncate,
    truncated_logprobs,
    whole_logprobs,
)
from grpo_engine.seeding import derive_seed, normals, numpy_generator, seeded_initialization, uniforms

LARGEST = math.nextafter(1.0, 0.0)  # the largest number below 1 that a float64 holds


@dataclass(frozen=True)
class Case:
    """Logits and the settings of a truncation."""

    logits: list[list[float]]
    temperature: float
    top_k: int
    top_p: float
    suppressed: tuple[int, ...]

    def mask(self) -> Tensor:
        mask = torch.zeros(len(self.logits[0]), dtype=torch.bool)
        mask[list(self.suppressed)] = True
        return mask

    def truncate(self) -> tuple[Tensor, Tensor]:
        return truncate(
            torch.tensor(self.logits),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            suppressed=self.mask(),
        )


def brute_force(case: Case, row: list[float]) -> list[tuple[int, float]]:
    """(token, probability) by falling probability: temperature, then top-k, then top-p, then renormalised."""
    weights = {i: math.exp(x / case.temperature) for i, x in enumerate(row) if i not in case.suppressed}
    order = sorted(weights, key=lambda i: -weights[i])
    if case.top_k:
        order = order[: case.top_k]
    total = sum(weights[i] for i in order)
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if case.top_p < 1.0:
            assume(abs(mass - case.top_p) > 1e-5)  # on the edge itself, rounding decides
            if kept and mass >= case.top_p:
                break
        kept.append(token)
        mass += weights[token] / total
    left = sum(weights[i] for i in kept)
    return [(token, weights[token] / left) for token in kept]


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    size = draw_(st.integers(2, 12))
    row = st.lists(st.integers(-40, 40), min_size=size, max_size=size, unique=True)  # no ties: their order is free
    rows = draw_(st.lists(row, min_size=1, max_size=4))
    return Case(
        [[value / 8 for value in values] for values in rows],
        draw_(st.sampled_from([0.3, 0.7, 1.0, 1.2, 3.0])),
        draw_(st.integers(0, 14)),
        draw_(st.just(1.0) | st.floats(0.01, 0.99)),
        tuple(draw_(st.sets(st.integers(0, size - 1), max_size=size - 1))),
    )


# -- truncate ------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(cases())
def test_truncation_is_temperature_then_top_k_then_top_p(case: Case) -> None:
    kept, logprobs = case.truncate()
    expected = [brute_force(case, row) for row in case.logits]
    assert kept.shape == logprobs.shape == (len(expected), max(map(len, expected)))
    for row, pairs in enumerate(expected):
        count = len(pairs)
        assert kept[row, :count].tolist() == [token for token, _ in pairs]
        assert logprobs[row, :count].exp().tolist() == pytest.approx([p for _, p in pairs], rel=1e-4)
        assert kept[row, count:].tolist() == [-1] * (kept.shape[1] - count)
        assert torch.isneginf(logprobs[row, count:]).all()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_at_least_one_token_is_kept_and_never_a_suppressed_one(case: Case) -> None:
    kept, logprobs = case.truncate()
    assert (kept >= 0).any(dim=1).all()
    assert not set(case.suppressed) & set(kept.flatten().tolist())
    assert logprobs.exp().sum(dim=1).tolist() == pytest.approx([1.0] * len(case.logits), abs=1e-5)


def test_truncation_by_hand() -> None:
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().unsqueeze(0)
    # Cut to the likeliest 3: .4 .3 .2 become .444 .333 .222; the first two reach .7, so the third goes.
    kept, logprobs = truncate(logits, temperature=1.0, top_k=3, top_p=0.7)
    assert kept.tolist() == [[0, 2]]
    assert logprobs.exp()[0].tolist() == pytest.approx([4 / 7, 3 / 7], rel=1e-6)
    # Of all four, two reach only .7 < .75: the third stays.
    kept, _ = truncate(logits, temperature=1.0, top_k=0, top_p=0.75)
    assert kept.tolist() == [[0, 2, 3]]
    # Temperature 1/2 squares the odds: .16 .09 .04 .01 of .30.
    _, logprobs = truncate(logits, temperature=0.5, top_k=0, top_p=1.0)
    assert logprobs.exp()[0].tolist() == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], rel=1e-5)


def test_a_vanishing_top_p_keeps_the_likeliest_token_alone() -> None:
    kept, logprobs = truncate(torch.tensor([[1.0, 3.0, 2.0]]), temperature=1.0, top_k=0, top_p=1e-9)
    assert kept.tolist() == [[1]]
    assert logprobs.tolist() == [[0.0]]


def test_half_precision_logits_are_truncated_in_float32() -> None:
    logits = (normals(0, (5, 50)) * 3).to(torch.bfloat16)
    kept, logprobs = truncate(logits, temperature=1.3, top_k=20, top_p=0.9)
    wide_kept, wide_logprobs = truncate(logits.float(), temperature=1.3, top_k=20, top_p=0.9)
    assert logprobs.dtype == torch.float32
    assert torch.equal(kept, wide_kept)
    assert torch.equal(logprobs, wide_logprobs)


# -- draw ----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 1000) | st.none(), min_size=1, max_size=14).filter(any),
    st.floats(0.0, LARGEST),
)
def test_a_draw_inverts_the_cumulative_distribution(weights: list[int | None], uniform: float) -> None:
    """None: a token of probability 0, suppressed or padding, wherever it stands."""
    alive = [index for index, weight in enumerate(weights) if weight is not None]
    row = torch.full((len(weights),), -torch.inf)
    row[alive] = torch.tensor([weight for weight in weights if weight is not None]).log().log_softmax(dim=0)
    probabilities = row[alive].double().exp().tolist()
    target = uniform * math.fsum(probabilities)
    mass, expected = 0.0, -1
    for index, probability in zip(alive, probabilities, strict=True):
        mass += probability
        assume(abs(mass - target) > 1e-12 or index == alive[-1])
        if expected < 0 and mass > target:
            expected = index
    if expected < 0:  # rounding at the upper end
        expected = alive[-1]
    assert draw(row.unsqueeze(0), torch.tensor([uniform], dtype=torch.float64)).item() == expected


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_kept_token() -> None:
    logprobs = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
    uniform = torch.tensor([0.0, 0.4999, 0.5001, 0.7499, 0.7501, LARGEST], dtype=torch.float64)
    assert draw(logprobs.expand(len(uniform), -1), uniform).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_the_upper_end_never_draws_padding(width: int) -> None:
    logprobs = (normals(width, (64, width)) * 5).log_softmax(dim=-1)
    padded = torch.nn.functional.pad(logprobs, (0, 9), value=-torch.inf)
    for uniform in (LARGEST, 1.0 - 2.0**-24):
        drawn = draw(padded, torch.full((64,), uniform, dtype=torch.float64))
        assert int(drawn.max()) < width


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.sampled_from([1, 5, 64, 65, 700]),
    sharpness=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 10_000),
)
def test_nothing_truncated_is_the_distribution_of_a_truncation_that_keeps_all(
    vocabulary: int, sharpness: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(6, vocabulary, generator=generator)
    suppressed = torch.rand(vocabulary, generator=generator) < 0.3
    suppressed[int(torch.randint(vocabulary, (), generator=generator))] = False
    uniform = torch.rand(6, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1.0 - 2**-24])
    logprobs = whole_logprobs(logits, temperature=1.3, suppressed=suppressed)
    kept, sorted_logprobs = truncate(logits, temperature=1.3, top_k=0, top_p=1.0, suppressed=suppressed)
    expected = torch.full_like(logits, -torch.inf)
    for row in range(6):
        alive = kept[row] >= 0
        expected[row, kept[row, alive]] = sorted_logprobs[row, alive]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    assert not suppressed[draw(logprobs, uniform)].any()


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_whole_row_without_numbers_is_refused(bad: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1] = bad
    with pytest.raises(ValueError, match="not numbers"):
        whole_logprobs(logits, temperature=1.0)


def test_drawn_frequencies_match_the_truncated_distribution() -> None:
    logits = normals(3, (1, 30)) * 1.5
    kept, logprobs = truncate(logits, temperature=1.2, top_k=12, top_p=0.9)
    count = 20_000
    uniform = uniforms([derive_seed(0, "frequencies", k) for k in range(count)], 1)[:, 0]
    drawn = draw(logprobs.expand(count, -1), uniform)
    observed = torch.bincount(drawn, minlength=kept.shape[1]).double()
    expected = logprobs[0].double().exp() * count
    assert float(expected.min()) > 5
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    # The same test tells that distribution from the untruncated one restricted to the same tokens at T = 1.
    other = logits[0, kept[0]].double().softmax(dim=0) * count
    assert stats.chisquare(observed, other * observed.sum() / other.sum()).pvalue < 1e-9


# -- entropy and log-probabilities ---------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(cases())
def test_entropy_is_exact_over_the_kept_tokens(case: Case) -> None:
    _, logprobs = case.truncate()
    expected = [-sum(p * math.log(p) for _, p in brute_force(case, row)) for row in case.logits]
    assert entropy_of(logprobs).tolist() == pytest.approx(expected, abs=1e-5)


def test_entropy_by_hand() -> None:
    logprobs = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.5, 0.25, 0.125, 0.125]]).log()
    expected = [math.log(4), 0.0, math.log(2), 1.75 * math.log(2)]
    assert entropy_of(logprobs).tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_logprobs_of_the_same_logits_equal_those_sampled_from(case: Case) -> None:
    kept, logprobs = case.truncate()
    rows, places = torch.nonzero(kept >= 0, as_tuple=True)
    again, entropies = truncated_logprobs(
        torch.tensor(case.logits)[rows],
        kept[rows, places],
        kept[rows],
        temperature=case.temperature,
        suppressed=case.mask(),
    )
    torch.testing.assert_close(again, logprobs[rows, places], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, entropy_of(logprobs)[rows], atol=1e-6, rtol=1e-6)


def test_without_truncation_no_kept_set_gives_the_same_as_the_full_one() -> None:
    logits, tokens = normals(1, (6, 40)), torch.arange(6)
    suppressed = torch.zeros(40, dtype=torch.bool)
    suppressed[30:] = True
    kept, _ = truncate(logits, temperature=0.8, top_k=0, top_p=1.0, suppressed=suppressed)
    with_set = truncated_logprobs(logits, tokens, kept, temperature=0.8, suppressed=suppressed)
    without = truncated_logprobs(logits, tokens, None, temperature=0.8, suppressed=suppressed)
    for one, other in zip(with_set, without, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    by_hand = (logits[:, :30] / 0.8).log_softmax(dim=-1)
    torch.testing.assert_close(without[0], by_hand[torch.arange(6), tokens], atol=1e-6, rtol=1e-6)


def test_a_token_outside_its_kept_set_is_impossible() -> None:
    kept = torch.tensor([[2, 0, -1], [1, -1, -1]])
    logprobs, _ = truncated_logprobs(torch.zeros(2, 4), torch.tensor([3, 1]), kept, temperature=1.0, suppressed=None)
    assert logprobs.tolist() == [-math.inf, 0.0]


def test_new_weights_are_measured_over_the_old_kept_set() -> None:
    # Under new logits token 3 is likeliest, but it was not kept, so the mass of the kept ones is still 1.
    new = torch.tensor([[1.0, 2.0, 0.0, 9.0]])
    kept = torch.tensor([[0, 1]])
    logprobs, _ = truncated_logprobs(new, torch.tensor([0]), kept, temperature=1.0, suppressed=None)
    assert logprobs.item() == pytest.approx(-math.log(1 + math.e), rel=1e-6)


def test_the_gradient_is_that_of_the_renormalised_softmax() -> None:
    temperature = 0.7
    logits = normals(5, (3, 8)).requires_grad_()
    kept = torch.tensor([[4, 1, 0, 7], [2, 3, -1, -1], [6, -1, -1, -1]])
    tokens = torch.tensor([1, 2, 6])
    logprobs, entropies = truncated_logprobs(logits, tokens, kept, temperature=temperature, suppressed=None)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    expected = torch.zeros(3, 8)
    for row in range(3):
        inside = kept[row][kept[row] >= 0]
        expected[row, inside] = -(logits[row, inside] / temperature).softmax(dim=0).detach() / temperature
        expected[row, tokens[row]] += 1 / temperature
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(entropies.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert float(gradient[2].abs().max()) == 0.0  # the entropy of a single kept token cannot change
    assert float(gradient[0, kept[0]].abs().min()) > 0.0


def test_kept_sets_of_different_widths_are_padded_into_one_tensor() -> None:
    steps = [torch.tensor([[5, 3], [1, -1]]), torch.tensor([[2], [4]]), torch.tensor([[0, 1, 2], [3, 4, -1]])]
    assert pad_kept(steps).tolist() == [
        [[5, 3, -1], [2, -1, -1], [0, 1, 2]],
        [[1, -1, -1], [4, -1, -1], [3, 4, -1]],
    ]


# -- the random numbers --------------------------------------------------------------------------------


def test_a_derived_seed_depends_on_every_part_and_its_boundaries() -> None:
    parts: list[tuple[Any, ...]] = [(0, "sample", 1, "a", 2), (1, "sample", 1, "a", 2), (0, "latent", 1, "a", 2)]
    parts += [(0, "sample", 2, "a", 2)]
    parts += [(0, "sample", 1, "b", 2), (0, "sample", 1, "a", 3), (0, "sample", 1, "a2"), (0, "sample", 12, "a")]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "sample", 1, "a", 2) == seeds[0]


def test_a_rows_numbers_do_not_depend_on_its_neighbours() -> None:
    together = uniforms([11, 12, 13], 6)
    assert torch.equal(uniforms([12], 6)[0], together[1])
    assert torch.equal(uniforms([13, 11], 6), together[[2, 0]])
    assert float(together.min()) >= 0.0 and float(together.max()) < 1.0


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first = (uniforms([3], 4), normals(3, (4,)), numpy_generator(0, "order", 1).permutation(9).tolist())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = (uniforms([3], 4), normals(3, (4,)), numpy_generator(0, "order", 1).permutation(9).tolist())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and first[2] == second[2]
    torch.set_rng_state(state)
    with seeded_initialization(7):
        one = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    with seeded_initialization(7):
        assert torch.equal(torch.rand(3), one)


@pytest.mark.parametrize("kept", [None, torch.tensor([[3, 1, 0], [2, 0, -1]])])
def test_entropies_that_are_only_measured_have_no_gradient_and_those_not_wanted_are_zero(kept: Tensor | None) -> None:
    values = torch.tensor([[0.3, 1.0, -0.5, 2.0], [1.5, 0.0, 0.7, -1.0]])
    found = {}
    for wanted in get_args(Entropies):
        logits = values.clone().requires_grad_()
        logprobs, entropies = truncated_logprobs(
            logits, torch.tensor([1, 2]), kept, temperature=0.9, suppressed=None, entropies=wanted
        )
        (of_tokens,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
        found[wanted] = logprobs.detach(), of_tokens, entropies
    for logprobs, of_tokens, _ in found.values():
        torch.testing.assert_close((logprobs, of_tokens), found["learned"][:2], rtol=0, atol=0)
    learned, measured, none = (found[name][2] for name in ("learned", "measured", "none"))
    assert learned.requires_grad and not measured.requires_grad and not none.requires_grad
    torch.testing.assert_close(measured, learned.detach(), rtol=0, atol=0)
    assert measured.min() > 0.1 and none.tolist() == [0.0, 0.0]
