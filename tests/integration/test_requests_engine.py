"""Real vLLM engines that are cut and killed: every sample completes with its length and the tokens of a calm run."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray

from benchmarks.controlled_router import new_router
from benchmarks.engines import Engines
from tests.integration.conftest import Cluster
from verl_rlhfless.live.client import ElasticClient, serving
from verl_rlhfless.live.tickets import RouterSettings, SampleKey

pytest.importorskip("vllm", reason="needs vLLM")
pytestmark = pytest.mark.slow

SAMPLES, WAIT_S, CLOSE_LOGITS = 24, 120.0, 1e-4


@dataclass
class Trial:
    """Two engines, a router, and what an undisturbed run generates."""

    engines: Engines
    servers: dict[str, Any]
    router: Any
    prompts: list[list[int]]
    lengths: list[int]
    calm: list[list[int]]
    more: list[dict[str, Any]]

    async def ask(self, client: ElasticClient, index: int) -> Any:
        params = {"temperature": 0.0, "logprobs": True, "max_tokens": self.lengths[index], "ignore_eos": True}
        params |= self.more[index]
        return await client.generate(f"r{index}", prompt_ids=self.prompts[index], sampling_params=params)

    def new_client(self) -> ElasticClient:
        return ElasticClient(self.engines.config, self.router)

    async def undisturbed(self) -> list[list[int]]:
        client = self.new_client()
        return [(await self.ask(client, index)).token_ids for index in range(SAMPLES)]

    async def rollout(self, disturb: Callable[[Trial], Awaitable[None]]) -> list[Any]:
        """Generate all samples, placed on the first server, and disturb them; return the outputs."""
        keys = [SampleKey(f"g{index}", 0) for index in range(SAMPLES)]

        client = self.new_client()

        async def sample(index: int) -> Any:
            with serving(keys[index]):
                output = await self.ask(client, index)
            client.end_session(keys[index])
            return output

        await self.router.announce.remote(keys, list(self.servers), 256)
        await self.router.send_to.remote(list(range(SAMPLES)), 0)
        tasks = [asyncio.create_task(sample(index)) for index in range(SAMPLES)]
        await disturb(self)
        async with asyncio.timeout(WAIT_S):
            outputs = await asyncio.gather(*tasks)
            while not (await self.router.states.remote())[1]:  # the end of the last sample is on its way still
                await asyncio.sleep(0.01)
        return outputs

    async def wait_for_share(self, share: float) -> None:
        """Return when about this share of the tokens is generated."""
        async with asyncio.timeout(WAIT_S):
            while await self.router.num_tokens.remote() < share * sum(self.lengths):
                await asyncio.sleep(0.01)

    def check(self, outputs: list[Any]) -> int:
        """All lengths are exact and all tokens right; return how many responses took the other of two equal logits."""
        differing = [i for i, output in enumerate(outputs) if output.token_ids != self.calm[i]]
        assert [len(output.token_ids) for output in outputs] == self.lengths
        assert [len(output.log_probs) for output in outputs] == self.lengths
        for i in differing:
            position = next(
                p for p, (a, b) in enumerate(zip(outputs[i].token_ids, self.calm[i], strict=True)) if a != b
            )
            gap = self.engines.logit_gap(self.prompts[i] + self.calm[i][:position])
            assert gap < CLOSE_LOGITS, f"sample {i} differs at {position}, where the best two logits are {gap} apart"
        return len(differing)


@pytest.fixture(scope="module")
def trial(ray_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    engines = Engines(
        tmp_path_factory.mktemp("engines"),
        "data.max_response_length=256",
        "actor_rollout_ref.rollout.max_model_len=768",
    )

    async def start() -> Trial:
        servers = dict(await asyncio.gather(engines.start(), engines.start()))
        router = new_router(servers)
        await router.configure.remote(RouterSettings(progress_interval_s=0.1))
        rng = random.Random(7)
        prompts = [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 200))] for _ in range(SAMPLES)]
        lengths = [rng.randrange(1, 256) for _ in range(SAMPLES)]
        made = Trial(engines, servers, router, prompts, lengths, [], [{}] * SAMPLES)
        made.calm = await made.undisturbed()
        return made

    made = asyncio.run(start())
    try:
        yield made
    finally:
        for actor in (made.router, *made.servers.values()):
            ray.kill(actor)


def test_vllms_own_http_endpoints_answer_too(trial: Trial) -> None:
    request = {
        "model": trial.engines.config.actor_rollout_ref.model.path,
        "prompt": trial.prompts[0],
        "max_tokens": trial.lengths[0],
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    for address in trial.servers:
        headers = {"Content-Type": "application/json"}
        body = urllib.request.Request(f"http://{address}/v1/completions", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(body, timeout=WAIT_S) as answer:
            assert json.load(answer)["choices"][0]["token_ids"] == trial.calm[0]


async def cut_at_random_points(trial: Trial) -> list[Any]:
    async def disturb(trial: Trial) -> None:
        rng = random.Random(3)
        for cut in range(12):
            await asyncio.sleep(rng.uniform(0.0, 0.2))
            await trial.router.send_to.remote(rng.sample(range(SAMPLES), 8), cut % 2)

    before = (await trial.router.get_status.remote())["attempts"]
    outputs = await trial.rollout(disturb)
    attempts = (await trial.router.get_status.remote())["attempts"] - before
    assert attempts >= 2 * SAMPLES, "hardly anything was cut"
    return outputs


def test_cuts_at_random_points_change_no_token(trial: Trial) -> None:
    assert trial.check(asyncio.run(cut_at_random_points(trial))) <= 1


def test_a_stop_string_that_spans_a_cut_ends_the_response(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trial.engines.config.actor_rollout_ref.model.path)
    letters = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).isalnum()]
    monkeypatch.setattr(trial, "lengths", [160] * SAMPLES)
    monkeypatch.setattr(trial, "more", [{"allowed_token_ids": letters}] * SAMPLES)

    async def scenario() -> tuple[list[list[int]], list[Any]]:
        endless = await trial.undisturbed()
        stops = [tokenizer.decode(tokens[5:120]) for tokens in endless]  # whatever is cut is cut within one
        trial.more = [{"allowed_token_ids": letters, "stop": stop, "min_tokens": 100} for stop in stops]
        return await trial.undisturbed(), await cut_at_random_points(trial)

    calm, outputs = asyncio.run(scenario())
    assert min(map(len, calm)) > 100 and max(map(len, calm)) <= 120
    differing = [i for i, output in enumerate(outputs) if output.token_ids != calm[i]]
    assert len(differing) <= 1, f"samples {differing} have {[len(outputs[i].token_ids) for i in differing]} tokens"


def test_a_killed_engine_and_a_killed_server_cost_no_sample(trial: Trial) -> None:
    async def kill_engine(trial: Trial) -> None:
        await trial.wait_for_share(0.5)
        (server, *_) = trial.servers.values()
        for pid, _ in await server.engine_processes.remote():
            os.kill(pid, signal.SIGKILL)

    async def kill_server(trial: Trial) -> None:
        await trial.wait_for_share(0.3)
        (server, *_) = trial.servers.values()
        pid, _ = await server.process.remote()
        os.kill(pid, signal.SIGKILL)

    async def scenario() -> None:
        trial.check(await trial.rollout(kill_engine))
        name, dead = next(iter(trial.servers.items()))
        assert name not in await trial.router.get_all_servers.remote()
        await dead.stop_engine.remote(30.0)
        del trial.servers[name]
        trial.servers = dict([await trial.engines.start(dead)]) | trial.servers  # the actor outlived its engine
        await trial.router.add_servers.remote(trial.servers)
        trial.check(await trial.rollout(kill_server))

    asyncio.run(scenario())
