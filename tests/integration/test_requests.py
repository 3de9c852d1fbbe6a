"""Requests through a real router and real server actors that are cut, drained, killed and that fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from benchmarks.controlled_router import new_router
from tests.integration.conftest import Cluster
from tests.integration.request_actors import INTERVAL_S, MODEL_LEN, RemoteClient, Server, client_config, response_to
from verl_rlhfless.errors import ReplicaError, UnsupportedError
from verl_rlhfless.live.client import ElasticClient, serving
from verl_rlhfless.live.tickets import RouterSettings, SampleKey

WAIT_S = 60.0
TOKENS, TOKEN_S = 40, 0.01
PARAMS = {"temperature": 0.0, "logprobs": True, "max_tokens": TOKENS}


@dataclass
class World:
    """Some servers behind a router, and a client of it."""

    servers: dict[str, Any]
    router: Any
    client: ElasticClient

    async def ask(self, prompt: list[int], **params: Any) -> Any:
        return await asyncio.wait_for(
            self.client.generate(f"r{prompt}", prompt_ids=prompt, sampling_params={**PARAMS, **params}), WAIT_S
        )

    async def ask_as(self, sample: SampleKey, prompt: list[int]) -> Any:
        with serving(sample):
            try:
                return await self.ask(prompt)
            finally:
                self.client.end_session(sample)

    async def tokens_at_least(self, server: str, num_tokens: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.servers[server].num_tokens.remote() < num_tokens:
                await asyncio.sleep(0.005)


NewWorld = Callable[..., World]


@pytest.fixture
def new_world(ray_cluster: Cluster) -> Iterator[NewWorld]:
    actors: list[Any] = []

    def start(num_servers: int, max_retries: int = 3, stranded_timeout_s: float = WAIT_S, **server: Any) -> World:
        servers = {f"s{i}": Server.remote(**({"token_s": TOKEN_S} | server)) for i in range(num_servers)}
        router = new_router(servers)
        actors.extend([router, *servers.values()])
        settings = RouterSettings(INTERVAL_S, max_retries, stranded_timeout_s)
        ray.get(router.configure.remote(settings), timeout=WAIT_S)
        client: ElasticClient = pickle.loads(ray.cloudpickle.dumps(ElasticClient(client_config(), router)))
        return World(servers, router, client)

    yield start
    for actor in actors:
        with contextlib.suppress(Exception):
            ray.kill(actor)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def check(output: Any, prompt: list[int], num_tokens: int = TOKENS) -> None:
    """The response is the one of an engine that nobody disturbed."""
    assert output.token_ids == response_to(prompt, num_tokens)
    assert output.log_probs == [-token / 1000 for token in output.token_ids]
    assert output.stop_reason == "completed"
    steps = [output.extra_fields[key] for key in ("global_steps", "min_global_steps", "max_global_steps")]
    assert steps == [7, 7, 7]


def prompts(count: int) -> list[list[int]]:
    return [[index + 1] * 8 for index in range(count)]


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(f"g{index // 2}", index % 2) for index in range(count)]


async def announced(world: World, count: int) -> list[asyncio.Task[Any]]:
    """Submit an announced rollout whose samples are all placed on the first server."""
    samples = keys(count)
    await world.router.announce.remote(samples, list(world.servers), TOKENS)
    await world.router.send_to.remote(list(range(count)), 0)
    return [
        asyncio.create_task(world.ask_as(sample, prompt))
        for sample, prompt in zip(samples, prompts(count), strict=True)
    ]


async def complete(world: World, tasks: list[asyncio.Task[Any]]) -> None:
    for output, prompt in zip(await asyncio.gather(*tasks), prompts(len(tasks)), strict=True):
        check(output, prompt)
    states, is_done, num_late = await world.router.states.remote()
    while not is_done:  # the last word of a session is posted, not waited for
        states, is_done, num_late = await world.router.states.remote()
    assert (set(states), num_late) == ({3}, 0)
    assert (await world.router.get_status.remote())["journaled_attempts"] == 0


def test_many_requests_get_their_own_responses_and_the_servers_share_them(new_world: NewWorld) -> None:
    world = new_world(2, token_s=0.0)

    async def scenario() -> None:
        outputs = await asyncio.gather(*[world.ask(prompt) for prompt in prompts(100)])
        for output, prompt in zip(outputs, prompts(100), strict=True):
            check(output, prompt)
        assert [(await server.seen.remote())[0] for server in world.servers.values()] == [50, 50]

    run(scenario())


def test_announced_samples_run_where_they_are_placed_and_as_many_as_the_server_takes(new_world: NewWorld) -> None:
    world = new_world(2, max_num_seqs=4, token_s=0.001)

    async def scenario() -> None:
        await complete(world, await announced(world, 20))
        assert [await server.seen.remote() for server in world.servers.values()] == [(20, 4), (0, 0)]

    run(scenario())


def test_a_planned_cut_continues_elsewhere_without_losing_a_token(new_world: NewWorld) -> None:
    world = new_world(2)

    async def scenario() -> None:
        tasks = await announced(world, 6)
        for at in (20, 100):
            await world.tokens_at_least("s0", at)
            await world.router.send_to.remote(random.Random(at).sample(range(6), 3), 1)
        await world.router.send_to.remote(list(range(6)), 0)
        await complete(world, tasks)
        assert (await world.servers["s1"].seen.remote())[0] >= 3

    run(scenario())


def test_a_cut_that_overtakes_its_request_is_kept_for_it(new_world: NewWorld) -> None:
    world = new_world(2)

    async def scenario() -> None:
        tasks = await announced(world, 4)
        for replica in (1, 0, 1, 0, 1):  # faster than requests reach their servers
            await world.router.send_to.remote(list(range(4)), replica)
        await complete(world, tasks)

    run(scenario())


def test_a_drained_replica_finishes_what_it_runs_and_gives_away_the_rest(new_world: NewWorld) -> None:
    world = new_world(2, max_num_seqs=2)

    async def scenario() -> None:
        tasks = await announced(world, 6)
        await world.tokens_at_least("s0", 10)
        await world.router.drain.remote(0)
        await complete(world, tasks)
        assert [(await server.seen.remote())[0] for server in world.servers.values()] == [2, 4]

    run(scenario())


async def raise_engine_death(world: World, server: str) -> None:
    await world.servers[server].die.remote(has_guard=False)


async def guarded_engine_death(world: World, server: str) -> None:
    await world.servers[server].die.remote(has_guard=True)


async def kill_actor(world: World, server: str) -> None:
    ray.kill(world.servers[server])


async def kill_process(world: World, server: str) -> None:
    world.servers[server].exit.remote()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("death", [raise_engine_death, guarded_engine_death, kill_actor, kill_process])
def test_the_death_of_a_replica_costs_no_sample(new_world: NewWorld, death: Any, share: float) -> None:
    world = new_world(2)

    async def scenario() -> None:
        tasks = await announced(world, 6)
        await world.tokens_at_least("s0", int(share * 6 * TOKENS))
        await death(world, "s0")
        await complete(world, tasks)
        assert await world.router.get_all_servers.remote() == ["s1"]

    run(scenario())


def test_what_nobody_announced_survives_a_death_too(new_world: NewWorld) -> None:
    world = new_world(2)

    async def scenario() -> None:
        tasks = [asyncio.create_task(world.ask(prompt)) for prompt in prompts(6)]
        await world.tokens_at_least("s0", 60)
        ray.kill(world.servers["s0"])
        for task, prompt in zip(tasks, prompts(6), strict=True):
            check(await task, prompt)

    run(scenario())


def test_tokens_that_were_reported_are_not_generated_again(new_world: NewWorld) -> None:
    world = new_world(2, token_s=0.05)

    async def scenario() -> None:
        task = asyncio.create_task(world.ask(prompts(1)[0]))
        await world.tokens_at_least("s0", 20)
        await asyncio.sleep(3 * INTERVAL_S)
        ray.kill(world.servers["s0"])
        await world.tokens_at_least("s1", 1)
        before = time.monotonic()
        check(await task, prompts(1)[0])
        assert time.monotonic() - before < 25 * 0.05  # about 17 tokens were left; all 40 take two seconds

    run(scenario())


def test_a_turn_with_several_deaths_fails_at_the_bound_and_says_how(new_world: NewWorld) -> None:
    world = new_world(4, max_retries=2)

    async def scenario() -> None:
        task = asyncio.create_task(world.ask(prompts(1)[0]))
        for server in ("s0", "s1", "s2"):
            await world.tokens_at_least(server, 1)
            ray.kill(world.servers[server])
        with pytest.raises(
            ReplicaError, match=r"died 3 times \(rlhfless.migration.max_retries=2\).*s2: ActorDiedError"
        ):
            await task
        assert (await world.servers["s3"].seen.remote())[0] == 0

    run(scenario())


def test_a_wrong_request_fails_at_once_and_alone(new_world: NewWorld) -> None:
    world = new_world(2)

    async def scenario() -> None:
        good = asyncio.create_task(world.ask([1] * 8))
        with pytest.raises(ValueError, match="leaves no room"):
            await world.ask([1] * MODEL_LEN)
        check(await good, [1] * 8)
        assert sum([(await server.seen.remote())[0] for server in world.servers.values()]) == 1
        assert await world.router.get_total_inflight.remote() == 0

    run(scenario())


def test_a_cancelled_request_gives_its_place_back(new_world: NewWorld) -> None:
    world = new_world(1, max_num_seqs=1)

    async def scenario() -> None:
        tasks = await announced(world, 2)
        await world.tokens_at_least("s0", 3)
        tasks[0].cancel()
        check(await tasks[1], prompts(2)[1])

    run(scenario())


def test_without_a_replica_a_request_ends_with_what_is_missing(new_world: NewWorld) -> None:
    world = new_world(1, stranded_timeout_s=0.3)

    async def scenario() -> None:
        task = asyncio.create_task(world.ask(prompts(1)[0]))
        await world.tokens_at_least("s0", 3)
        ray.kill(world.servers["s0"])
        with pytest.raises(ReplicaError, match=r"no rollout replica was up or starting for 0.3 s \(s0 lost: .*Died"):
            await task
        with pytest.raises(RuntimeError, match="No available servers in load balancer: no rollout replica was up"):
            await world.router.acquire_server.remote("x")

    run(scenario())


def test_a_request_waits_for_a_replica_that_comes(new_world: NewWorld) -> None:
    world = new_world(0)

    async def scenario() -> None:
        task = asyncio.create_task(world.ask(prompts(1)[0]))
        acquiring = world.router.acquire_server.remote("x")
        world.servers["late"] = Server.remote()
        await world.router.add_servers.remote(world.servers)
        check(await task, prompts(1)[0])
        assert (await acquiring)[0] == "late"
        await world.router.release_server.remote("late", request_id="x")

    run(scenario())


def test_turns_of_a_session_find_their_prefix_where_they_left_it(new_world: NewWorld) -> None:
    world = new_world(2, token_s=0.0)

    async def scenario() -> None:
        for _ in range(4):
            output = await world.client.generate("conversation", prompt_ids=[5] * 8, sampling_params=PARAMS)
            check(output, [5] * 8)
        assert [(await server.seen.remote())[0] for server in world.servers.values()] == [4, 0]

    run(scenario())


def test_a_response_without_log_probs_and_without_a_limit_keeps_to_verls_own(new_world: NewWorld) -> None:
    world = new_world(1, token_s=0.0)

    async def scenario() -> None:
        output = await world.client.generate("r", prompt_ids=[3] * 8, sampling_params={})
        assert (output.token_ids, output.log_probs) == (response_to([3] * 8, 64), None)
        output = await world.client.generate("r", prompt_ids=[3] * 520, sampling_params={"max_new_tokens": 900})
        assert len(output.token_ids) == 900
        output = await world.client.generate("r", prompt_ids=[3] * 520, sampling_params={})
        assert len(output.token_ids) == 56  # prompt and response share verl's length

    run(scenario())


def test_a_stock_client_is_served_too(new_world: NewWorld) -> None:
    world = new_world(2, token_s=0.0)

    async def scenario() -> None:
        from verl.workers.rollout.llm_server import LLMServerClient

        stock = LLMServerClient(client_config(), world.router)
        calls = [stock.generate(f"r{p}", prompt_ids=p, sampling_params=dict(PARAMS)) for p in prompts(10)]
        outputs = await asyncio.gather(*calls)
        assert [output.token_ids for output in outputs] == [response_to(p, TOKENS) for p in prompts(10)]
        async with asyncio.timeout(WAIT_S):
            while await world.router.get_total_inflight.remote():  # stock does not wait for its releases
                await asyncio.sleep(0.01)
        assert (await world.router.clear_sticky_cache.remote())["cleared_entries"] == 10
        await world.router.remove_servers.remote(["s0"])
        assert await world.router.get_all_servers.remote() == ["s1"]

    run(scenario())


def test_full_determinism_is_refused_where_placement_depends_on_time(new_world: NewWorld) -> None:
    world = new_world(1)
    ray.get(world.router.configure.remote(RouterSettings(is_deterministic=True)))
    with pytest.raises(UnsupportedError, match=r"rollout.full_determinism=True: our dispatcher"):
        ray.get(world.router.announce.remote(keys(2), ["s0"], TOKENS))


def test_a_worker_behind_a_disturbed_network_gets_every_response(new_world: NewWorld) -> None:
    """Ray itself breaks calls off: before they arrive, when their answer has left, and while they run."""
    world, count = new_world(2, max_retries=1000, max_num_seqs=4), 12
    kinds = ("req", "resp", "in_flight")
    chance = {f"num_lower_bound_{kind}_failures": 1 for kind in kinds} | {f"{kind}_failure_prob": 10 for kind in kinds}
    broken = {"CoreWorkerService.grpc_client.PushTask": {**chance, "num_failures": 10}}
    environment = {"env_vars": {"RAY_testing_rpc_failure": json.dumps(broken)}}
    client = RemoteClient.options(runtime_env=environment).remote()
    ray.get(world.router.announce.remote(keys(count), list(world.servers), TOKENS))
    ray.get(world.router.send_to.remote(list(range(count)), 0))
    outputs = ray.get(
        client.ask_all.remote(world.router, list(zip(keys(count), prompts(count), strict=True)), PARAMS), timeout=WAIT_S
    )
    for output, prompt in zip(outputs, prompts(count), strict=True):
        check(output, prompt)
    states, is_done, _ = ray.get(world.router.states.remote())
    assert is_done and set(states) == {3}
    ray.kill(client)
