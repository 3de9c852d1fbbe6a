"""Work that is added, moved and placed: nothing is lost, forecasts come true, and greed never loses to one replica."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.property.policy.test_decisions import shuffled
from tests.property.policy.test_policies import POOL, batches
from verl_rlhfless.policy.affinity import PrefixBook, affine_groups
from verl_rlhfless.policy.balance import Outlook, Workload, WorkUnits, assign, best_move, run_starts
from verl_rlhfless.policy.dispatch import balanced_groups
from verl_rlhfless.policy.placement import place
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray, SharedPrefix

FLEETS = st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4)


@st.composite
def works(draw: st.DrawFn) -> tuple[Outlook, Workload, list[WorkUnits]]:
    """Return an outlook, and the work of one to four replicas with their units, each of some siblings."""
    batch, lengths = draw(batches())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    fleet = draw(FLEETS)
    replica_of = rng.integers(len(fleet), size=len(batch.prompt_ids))[batch.group_of]
    outlook = outlook_on(batch, lengths, np.lexsort((batch.group_of, replica_of)))
    work, held = Workload([POOL.perf[tp] for tp in fleet], outlook.width), []
    ends = np.searchsorted(replica_of[outlook.samples], range(len(fleet) + 1))
    for replica, (begin, end) in enumerate(pairwise(ends.tolist())):
        first = run_starts(batch.group_of[outlook.samples[begin:end]])
        held.append(outlook.units(slice(begin, end), first, rng.integers(0, 500, len(first)).astype(float)))
        for unit in range(len(first)):
            work.add(replica, held[-1], unit)
    return outlook, work, held


def outlook_on(batch: Batch, lengths: IntArray, samples: IntArray) -> Outlook:
    return Outlook.build(exact(lengths), batch, np.zeros_like(lengths), samples, POOL.trainer.shape)


@settings(max_examples=60)
@given(works(), st.integers(0, 3), st.floats(0, 500))
def test_what_is_added_ends_no_earlier_and_as_forecast_and_leaves_nothing_when_it_goes(
    case: tuple[Outlook, Workload, list[WorkUnits]], at: int, prefill: float
) -> None:
    _, work, held = case
    replica = at % work.num_replicas
    before_s, units = work.end_s(), next(units for units in held if len(units.first)).with_prefill(prefill)
    forecast_s = work.end_with_s(units, 0)
    work.add(replica, units, 0)
    after_s = work.end_s()
    assert after_s[replica] == pytest.approx(forecast_s[replica]) and after_s[replica] >= before_s[replica] - 1e-9
    assert (np.delete(after_s, replica) == np.delete(before_s, replica)).all()
    work.remove(replica, units, 0)
    assert work.end_s() == pytest.approx(before_s, abs=1e-6)


def test_the_best_move_takes_from_the_last_replica_and_gains_what_it_says() -> None:
    num_moves = 0

    @settings(max_examples=80)
    @given(works(), st.floats(0, 3000))
    def holds(case: tuple[Outlook, Workload, list[WorkUnits]], again: float) -> None:
        nonlocal num_moves
        _, work, held = case
        before_s = work.end_s()

        def prefill(units: WorkUnits, replica: int) -> FloatArray:
            return np.full(len(units.first), again)

        found = best_move(work, held.__getitem__, range(work.num_replicas), prefill)
        assert found == best_move(work, held.__getitem__, range(work.num_replicas), prefill)
        if found is None:
            return
        num_moves += 1
        source, unit, target, gain = found
        assert before_s[source] == before_s.max() and before_s[target] == before_s.min() and 0 < gain <= 1
        work.remove(source, held[source], unit)
        work.add(target, held[source].with_prefill(again), unit)
        assert work.end_s()[[source, target]].max() == pytest.approx((1 - gain) * before_s[source], abs=1e-6)

    holds()
    assert num_moves, "what is tested must happen"


@settings(max_examples=60)
@given(works(), st.data())
def test_without_one_unit_all_others_are_as_before(
    case: tuple[Outlook, Workload, list[WorkUnits]], data: st.DataObject
) -> None:
    units = next(units for units in case[2] if len(units.first))
    gone = data.draw(st.integers(0, len(units.first) - 1))
    kept, rest = units.without(gone), [unit for unit in range(len(units.first)) if unit != gone]
    assert [kept.members(i).tolist() for i in range(len(rest))] == [units.members(unit).tolist() for unit in rest]
    assert (kept.curves == units.curves[:, rest]).all() and (kept.volume == units.volume[:, rest]).all()


@settings(max_examples=60)
@given(batches(), FLEETS, st.booleans())
def test_every_sample_gets_a_place_and_the_last_replica_ends_no_later_than_any_one_alone(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    fleet: list[int],
    keeps_groups: bool,
) -> None:
    batch, lengths = case
    perf, outlook = [POOL.perf[tp] for tp in fleet], outlook_on(batch, lengths, np.arange(batch.num_samples))

    def end_s(replica_of: IntArray) -> float:
        work = Workload(perf, outlook.width)
        for group, replica in sorted(set(zip(batch.group_of.tolist(), replica_of.tolist(), strict=True))):
            here = np.flatnonzero((batch.group_of == group) & (replica_of == replica))
            part, prompt = outlook_on(batch, lengths, here), batch.prompt_tokens[here[:1]].astype(float)
            work.add(replica, part.units(slice(None), np.zeros(1, dtype=np.int64), prompt), 0)
        return float(work.end_s().max())

    placed = place(batch, exact(lengths), perf, keeps_groups)
    assert len(placed) == batch.num_samples and ((placed >= 0) & (placed < len(fleet))).all()
    assert (placed == place(batch, exact(lengths), perf, keeps_groups)).all()
    if keeps_groups:
        alone_s = min(end_s(np.full(batch.num_samples, replica)) for replica in range(len(fleet)))
        assert end_s(placed) <= alone_s * (1 + 1e-9)


@settings(max_examples=40)
@given(works(), FLEETS)
def test_assigned_units_are_all_in_the_workload_afterwards(
    case: tuple[Outlook, Workload, list[WorkUnits]], fleet: list[int]
) -> None:
    outlook, _, held = case
    units = next(units for units in held if len(units.first))
    work = Workload([POOL.perf[tp] for tp in fleet], outlook.width)
    for unit, replica in enumerate(assign(work, units)):
        work.remove(replica, units, unit)
    assert work.end_s() == pytest.approx(np.zeros(len(fleet)), abs=1e-6)


@st.composite
def prefixed(draw: st.DrawFn) -> tuple[Batch, np.ndarray]:  # type: ignore[type-arg]
    """Return a batch some of whose prompts begin alike, and the work of each sample."""
    batch, lengths = draw(batches())
    _, first = np.unique(batch.group_of, return_index=True)
    shares = draw(st.lists(st.sampled_from(["", "a", "b"]), min_size=len(first), max_size=len(first)))
    prompts = [(name, int(tokens)) for name, tokens in zip(shares, batch.prompt_tokens[first], strict=True)]
    prefixes = tuple(SharedPrefix(name, max(1, tokens // 2)) if name else None for name, tokens in prompts)
    return replace(batch, prefixes=prefixes), lengths.astype(float)


@settings(max_examples=60)
@given(prefixed(), st.integers(1, 6), st.floats(0, 50), st.randoms(use_true_random=False))
def test_prompts_that_begin_alike_are_placed_whatever_their_order_and_the_names_of_what_they_share(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    replicas: int,
    prefill_load: float,
    random: Random,
) -> None:
    batch, load = case
    placed = affine_groups(batch, load, replicas, prefill_load)
    assert ((placed >= 0) & (placed < replicas)).all()
    named = tuple(p and replace(p, name={"a": "z", "b": "y"}[p.name]) for p in batch.prefixes)
    assert (affine_groups(replace(batch, prefixes=named), load, replicas, prefill_load) == placed).all()
    bare = replace(batch, prefixes=())
    assert (affine_groups(bare, load, replicas, prefill_load) == balanced_groups(batch, load, [1.0] * replicas)).all()
    totals = np.bincount(batch.group_of, weights=load)
    assume(len(set(totals.tolist())) == len(totals))  # what is equal goes by position
    order = random.sample(range(len(totals)), len(totals))
    other, samples = shuffled(batch, order)
    other = replace(other, prefixes=tuple(batch.prefixes[group] for group in order))
    assert (affine_groups(other, load[samples], replicas, prefill_load) == placed[samples]).all()


@settings(max_examples=60)
@given(prefixed(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_replica_knows_all_of_a_prompt_that_it_has_and_never_more(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    replicas: int,
    random: Random,
) -> None:
    batch, _ = case
    book, has = PrefixBook(batch, replicas), set()
    assert all((book.known_tokens(sample) == 0).all() for sample in range(batch.num_samples))
    for sample in random.sample(range(batch.num_samples), min(8, batch.num_samples)):
        replica = random.randrange(replicas)
        before = book.known_tokens(sample)
        book.add(sample, replica)
        has.add((int(batch.group_of[sample]), replica))
        after = book.known_tokens(sample)
        assert after[replica] == batch.prompt_tokens[sample] >= before[replica]
        assert (np.delete(after, replica) == np.delete(before, replica)).all()
    for sample in range(batch.num_samples):
        prefix = batch.prefixes[batch.group_of[sample]]
        for replica, known in enumerate(book.known_tokens(sample)):
            is_whole = (int(batch.group_of[sample]), replica) in has
            assert known == batch.prompt_tokens[sample] if is_whole else known <= (prefix.tokens if prefix else 0)
