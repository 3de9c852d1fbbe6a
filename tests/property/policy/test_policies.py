"""What must hold for every policy, whatever the batch: conservation, bounds, determinism, monotonicity, permutation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.unit.policy.test_dedup import expand
from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.dedup import dedup
from verl_rlhfless.policy.dispatch import balanced_groups, equal_length_blocks, place_orphans, spread
from verl_rlhfless.policy.fuse import fuse_gpus
from verl_rlhfless.policy.fusion_cut import cut_for_inference
from verl_rlhfless.policy.migrate import consolidate
from verl_rlhfless.policy.packing import packs
from verl_rlhfless.policy.paper_rules import global_cut, local_cut
from verl_rlhfless.policy.plan import Goal, plan_fleet
from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.prediction import exact
from verl_rlhfless.policy.snapshot import (
    FINISHED,
    GONE,
    READY,
    RUNNING,
    Batch,
    ReplicaView,
    RolloutView,
)
from verl_rlhfless.policy.stages import Lane, depth_edges, frontier, options_for, shrinking, stay

POOL = replace(cell(steps(1, 4, 2)).pool, warm=dict.fromkeys((1, 2, 4, 8), 16))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, np.ndarray]:  # type: ignore[type-arg]
    groups, n = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cap = draw(st.sampled_from([64, 1024, 16384]))
    lengths = np.clip(np.exp(rng.normal(np.log(cap / 8), 1.0, groups * n)), 1, cap).astype(np.int64)
    batch = Batch(
        1,
        tuple(f"p{i}" for i in range(groups)),
        np.repeat(np.arange(groups), n),
        np.repeat(rng.integers(1, 500, groups), n),
        cap,
    )
    return batch, lengths


@st.composite
def views(draw: st.DrawFn) -> RolloutView:
    batch, lengths = draw(batches())
    tps = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
    at = draw(st.integers(0, batch.max_response_tokens - 1))
    return view_at(batch, lengths, at, (tps, draw(st.integers(0, 2**32 - 1))))


def late_view(seed: int) -> RolloutView:
    """Return a rollout of which the longest few in a hundred samples still run, on part of the budget or on all."""
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(8, 33))
    lengths = np.clip(np.exp(rng.normal(rng.choice([7.0, 8.3]), 0.8, groups * 8)), 1, 16384).astype(np.int64)
    prompts = np.repeat(rng.integers(1, 500, groups), 8)
    batch = Batch(1, tuple(f"p{i}" for i in range(groups)), np.repeat(np.arange(groups), 8), prompts, 16384)
    tps = [[2] * 8, [4] * 4, rng.choice([1, 2, 4], rng.integers(2, 5)).tolist()][rng.choice(3, p=[0.2, 0.2, 0.6])]
    at = int(np.quantile(lengths, rng.uniform(0.7, 0.98))) - 1
    return view_at(batch, lengths, at, (tps, seed))


def view_at(batch: Batch, lengths: np.ndarray, at: int, fleet: tuple[list[int], int]) -> RolloutView:  # type: ignore[type-arg]
    """Return the rollout when every sample has ``at`` tokens or has finished, on a fleet by size and seed."""
    tps, seed = fleet
    generated = np.minimum(lengths, at)
    state = np.where(lengths <= at, FINISHED, RUNNING).astype(np.int8)
    replica_of = np.random.default_rng(seed).integers(0, len(tps), batch.num_samples)
    held = [int(((replica_of == r) & (state == RUNNING)).sum()) for r in range(len(tps))]
    replicas = tuple(
        ReplicaView(r, tp, READY if held[r] else GONE, 0, held[r], held[r] * 100) for r, tp in enumerate(tps)
    )
    done = int((batch.prompt_tokens + generated)[state == FINISHED].sum())
    num_done = int((state == FINISHED).sum())
    used = sum(r.tp for r in replicas if r.state == READY)
    return RolloutView(
        10.0, batch, POOL, generated, state, replica_of, replicas, 16 - used, done, num_done, 0, 16 - used
    )


@settings(deadline=None, max_examples=60)
@given(batches())
def test_quantiles_are_ordered_and_bounded_and_state_round_trips(case: tuple[Batch, np.ndarray]) -> None:  # type: ignore[type-arg]
    batch, lengths = case
    model = learn(LengthModel(), batch, lengths)
    for one in (LengthModel(), model, learn(model, batch, lengths)):
        q = predict(one, batch).quantiles()
        assert (q[:, 0] <= q[:, 1]).all()
        assert (q[:, 1] <= q[:, 2]).all()
        assert (q >= 1).all()
        assert (q <= batch.max_response_tokens).all()
        assert LengthModel.from_json(one.to_json()) == one


@settings(deadline=None, max_examples=60)
@given(batches(), st.integers(1, 10_000))
def test_survival_falls_with_depth_and_refinement_stays_finite(case: tuple[Batch, np.ndarray], at: int) -> None:  # type: ignore[type-arg]
    batch, lengths = case
    model = learn(LengthModel(), batch, lengths)
    generated = np.minimum(lengths, at)
    finished = (lengths <= at).astype(float)
    got = refine(model, predict(model, batch), batch, generated, finished)
    alive = got.alive_at(np.geomspace(1, batch.max_response_tokens + 1, 20))
    assert (np.diff(alive, axis=1) <= 1e-12).all()
    assert np.isfinite(got.mu).all()
    assert (got.sigma > 0).all()
    assert (got.mean(generated) >= np.minimum(generated, got.cap)).all()


@settings(deadline=None, max_examples=60)
@given(batches(), st.floats(0, 1), st.booleans())
def test_a_plan_places_every_sample_once_inside_the_budget(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    weight: float,
    is_notslower: bool,
) -> None:
    batch, lengths = case
    prior = predict(learn(LengthModel(), batch, lengths), batch)
    goal = Goal(cost_weight=weight, is_notslower=is_notslower)
    plan = plan_fleet(POOL, batch, prior, goal)
    assert sum(plan.fleet) <= POOL.num_gpus
    assert all(tp in POOL.perf for tp in plan.fleet)
    assert ((plan.replica_of >= 0) & (plan.replica_of < len(plan.fleet))).all()
    assert sorted(plan.order.tolist()) == list(range(batch.num_samples))
    assert plan.reason
    again = plan_fleet(POOL, batch, prior, goal)
    assert again.fleet == plan.fleet
    assert (again.replica_of == plan.replica_of).all()


@settings(deadline=None, max_examples=60)
@given(batches(), st.integers(3, 16), st.integers(3, 8), st.sets(st.integers(1, 4), min_size=1), st.floats(0, 1))
def test_no_fleet_of_a_plan_needs_more_than_the_nodes_have(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    num_gpus: int,
    gpus_per_node: int,
    sizes: set[int],
    weight: float,
) -> None:
    batch, lengths = case
    if max(sizes) > min(num_gpus, gpus_per_node):
        return
    perf = {tp: replace(POOL.perf[1], tp=tp) for tp in sizes}
    pool = replace(POOL, num_gpus=num_gpus, gpus_per_node=gpus_per_node, perf=perf, has_resident=False)
    fleet = plan_fleet(pool, batch, exact(lengths), Goal(cost_weight=weight)).fleet
    nodes, rest = divmod(num_gpus, gpus_per_node)
    assert is_packed(sorted(fleet, reverse=True), [gpus_per_node] * nodes + [rest])


def is_packed(fleet: list[int], free: list[int]) -> bool:
    """Return whether any placement at all fits."""
    if not fleet:
        return True
    ways = (at for at, gpus in enumerate(free) if gpus >= fleet[0])
    return any(is_packed(fleet[1:], [*free[:at], free[at] - fleet[0], *free[at + 1 :]]) for at in ways)


@settings(max_examples=300)
@given(st.lists(st.integers(1, 8), max_size=7), st.integers(1, 16), st.integers(1, 8), st.booleans())
def test_replicas_pack_only_where_a_placement_exists_and_wherever_each_size_divides_the_next(
    fleet: list[int], num_gpus: int, gpus_per_node: int, is_chain: bool
) -> None:
    if is_chain:
        fleet, gpus_per_node = [1 << (tp % 4) for tp in fleet], 8
    nodes, rest = divmod(num_gpus, gpus_per_node)
    exists = is_packed(sorted(fleet, reverse=True), [gpus_per_node] * nodes + [rest])
    assert exists or not packs(fleet, num_gpus, gpus_per_node)
    if is_chain:
        assert packs(fleet, num_gpus, gpus_per_node) is exists


@settings(deadline=None, max_examples=40)
@given(batches(), st.integers(1, 3), st.integers(0, 6))
def test_limits_on_replicas_and_deadlines_hold_or_are_refused(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    least: int,
    more: int,
) -> None:
    batch, lengths = case
    prior = predict(learn(LengthModel(), batch, lengths), batch)
    plan = plan_fleet(POOL, batch, prior, Goal(min_replicas=least, max_replicas=least + more, payback=0.0))
    assert plan.is_resident or least <= len(plan.fleet) <= least + more
    deadline = 1.1 * plan.predicted_step_s
    again = plan_fleet(POOL, batch, prior, Goal(max_step_s=deadline))
    assert again.predicted_step_s <= deadline


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 2000), st.floats(10, 4000), st.integers(100, 20_000))
def test_a_dearer_second_never_makes_the_future_longer_and_staying_is_never_better(
    count: int, context: float, cap: int
) -> None:
    options = options_for(POOL)
    edges = depth_edges(cap)
    middle = (edges[1:] + edges[:-1]) / 2
    alive = count * np.exp(-3 * middle / cap)
    lane = Lane(edges, alive, context, 1000.0, -np.expm1(-alive), 0.5)
    prices = np.array([0.0, 4.0, 16.0, 64.0, 1e6])
    best = frontier(POOL, options, lane, prices)
    worth = best.gpu_s + prices[:, None] * best.time_s
    fixed_s, fixed_g = stay(POOL, options, lane)
    assert (worth <= (fixed_g + prices[:, None] * fixed_s) * (1 + 1e-9)).all()
    assert (np.diff(best.time_s, axis=0) <= 1e-6 * best.time_s[1:]).all()
    assert (np.diff(best.gpu_s, axis=0) >= -1e-6 * best.gpu_s[1:]).all()


@given(st.sampled_from([(1,), (2, 4), (1, 2, 4, 8)]), st.integers(1, 2000))
def test_lanes_side_by_side_only_shrink_whatever_sizes_they_use(sizes: tuple[int, ...], count: int) -> None:
    options = options_for(POOL, sizes=sizes)
    edges = depth_edges(8000)
    alive = count * np.exp(-3 * edges[1:] / 8000)
    lane = Lane(edges, alive, 200.0, 0.0, -np.expm1(-alive), 0.5)
    first = shrinking(POOL, options, (lane,), np.array([1.0, 64.0, 1e6]))[0].first
    assert (options.tp[first] == options.tp).all()
    assert (options.count[first] <= options.count).all()


@settings(deadline=None, max_examples=60)
@given(batches(), st.integers(1, 7), st.randoms(use_true_random=False))
def test_dispatchers_load_replicas_alike_in_whatever_order_the_prompts_come(
    case: tuple[Batch, np.ndarray],  # type: ignore[type-arg]
    replicas: int,
    random: Random,
) -> None:
    batch, lengths = case
    groups = len(batch.prompt_ids)
    totals = np.bincount(batch.group_of, weights=lengths)
    assume(len(set(totals.tolist())) == groups)  # what is equal goes by position
    order = random.sample(range(groups), groups)
    shuffled = np.concatenate([np.flatnonzero(batch.group_of == group) for group in order])
    for place in (
        lambda load: balanced_groups(batch, load, [1.0] * replicas),
        lambda load: equal_length_blocks(batch, load, replicas),
    ):
        loads = []
        for load in (lengths.astype(float), lengths[shuffled].astype(float)):
            got = place(load)
            assert ((got >= 0) & (got < replicas)).all()
            loads.append(sorted(np.bincount(got, weights=load, minlength=replicas).tolist()))
        assert loads[0] == loads[1]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
@example(weights=[1, 1, 2], targets=2)
def test_spread_is_within_four_thirds_of_the_best_placement_and_permutes(weights: list[int], targets: int) -> None:
    """Longest processing time first: at most ``4/3 - 1/(3 m)`` of the optimum (Graham)."""
    weight, samples = np.array(weights, dtype=float), np.arange(len(weights))
    moves = spread(samples, list(range(targets)), [0.0] * targets, weight)
    assert sorted(np.concatenate([m.samples for m in moves]).tolist()) == samples.tolist()
    every = np.array(list(product(range(targets), repeat=len(weights))))
    best = np.stack([(every == target) @ weight for target in range(targets)]).max(axis=0).min()
    most = max(float(weight[m.samples].sum()) for m in moves)
    assert most <= (4 / 3 - 1 / (3 * targets)) * best + 1e-9
    shuffled = spread(samples[::-1].copy(), list(range(targets)), [0.0] * targets, weight)
    assert [m.samples.tolist() for m in moves] == [m.samples.tolist() for m in shuffled]


def test_migration_moves_only_unfinished_samples_each_at_most_once() -> None:
    seen: Counter[str] = Counter()

    def holds(seed: int) -> None:
        view, price = late_view(seed), 10 ** float(np.random.default_rng(seed).uniform(-1, 2.3))
        model = learn(LengthModel(), view.batch, np.maximum(view.generated, 1))
        finished = (view.state == FINISHED).astype(float)
        prediction = refine(model, predict(model, view.batch), view.batch, view.generated, finished)
        change = consolidate(view, prediction, price, 0.02, len(view.replicas))
        assert sum(change.starts) <= view.free_gpus
        reactions = {
            "consolidate": change.moves,
            "for inference": cut_for_inference(view, prediction).moves,
            "local": local_cut(view, 0.7),
            "global": global_cut(view, len(view.alive), 1),
        }
        for name, moves in reactions.items():
            seen[name] += bool(moves)
            moved = np.concatenate([m.samples for m in moves]) if moves else np.array([], dtype=np.int64)
            assert len(set(moved.tolist())) == len(moved)
            assert (view.state[moved] != FINISHED).all()
            for move in moves:
                assert view.replicas[move.replica].state == READY
                assert (view.replica_of[move.samples] != move.replica).all()
        seen["start"] += bool(change.starts)
        same = consolidate(view, prediction, price, 0.02, len(view.replicas))
        assert [m.samples.tolist() for m in same.moves] == [m.samples.tolist() for m in change.moves]

    for seed in range(120):
        holds(seed)
    assert len(seen) == 5 and min(seen.values()) >= 1, f"what is tested must happen: {seen}"


@settings(deadline=None, max_examples=60)
@given(views(), st.floats(0, 1000), st.floats(0, 200), st.booleans())
def test_fusion_never_takes_more_than_what_is_free(
    view: RolloutView, remaining: float, price: float, is_leased: bool
) -> None:
    assert 0 <= fuse_gpus(view, remaining, price, is_leased) <= max(0, view.fusible_gpus)
    assert fuse_gpus(view, 0.0, price, False) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000).map(late_view), st.sets(st.integers(0, 3)), st.booleans())
def test_orphans_all_get_a_home_on_survivors_or_on_a_new_replica_where_there_is_none(
    view: RolloutView, dead: set[int], is_last: bool
) -> None:
    dead = {r.replica for r in view.replicas if is_last or r.replica in dead}
    lost = view.alive[np.isin(view.replica_of[view.alive], list(dead))]
    assume(len(lost))
    replicas = tuple(replace(r, state=GONE) if r.replica in dead else r for r in view.replicas)
    starts, moves = place_orphans(replace(view, replicas=replicas), lost, (4, 2))
    assert sorted(np.concatenate([m.samples for m in moves]).tolist()) == lost.tolist()
    survivors = {r.replica for r in replicas if r.state != GONE}
    assert starts == (() if survivors else (2,))
    assert {m.replica for m in moves} <= (survivors or {len(replicas)})


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=24))
def test_dedup_is_lossless_minimal_and_does_not_depend_on_order(prompts: list[list[int]]) -> None:
    tree = dedup(prompts)
    assert expand(tree) == prompts
    prefixes = {tuple(p[: i + 1]) for p in prompts for i in range(len(p))}
    assert tree.num_tokens == len(prefixes)
    assert dedup(prompts[::-1]).num_tokens == tree.num_tokens
    assert all(parent < node for node, parent in enumerate(tree.parent))
