"""Faults in real vLLM engines while they generate: is any sample lost, doubled or wrong, and how long does it take?

Each round announces a rollout on two engines and on a third replica that is still starting, and kills one engine after
10, 50 or 90 % of the tokens or while it drains, and the starting one during its start or its weight load. Killed with
signal 9 are the engine's processes, the server actor, or both with all their children. Running samples are cut and
moved besides; cuts are no faults. ``recovery_s`` of a death under load is the time until the last sample that ran there
runs elsewhere.

    python -m benchmarks.faults [rounds]      # 31 rounds, about 25 minutes; writes benchmarks/results/faults.json
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import ray
import typer

from benchmarks import command
from benchmarks.controlled_router import new_router
from benchmarks.engines import Engines, warm_actor
from benchmarks.record import write_result
from verl_rlhfless.ab.cluster import private_cluster
from verl_rlhfless.config import WeightsConfig
from verl_rlhfless.demo.recipe import CPU_ENVIRONMENT
from verl_rlhfless.live.client import ElasticClient, serving
from verl_rlhfless.live.tickets import RouterSettings, SampleKey
from verl_rlhfless.live.weight_store import create_store
from verl_rlhfless.processes import ProcessKey, descendants, end_processes

_ROUNDS, _SAMPLES, _MAX_TOKENS, _WAIT_S = 31, 24, 448, 300.0
_STORE, _VERSION, _CLOSE_LOGITS = "faults", 1, 1e-4
_TARGET_FAULTS, _TARGET_RECOVERY_S = 60, 2.0
_SHARES, _KINDS = (0.1, 0.5, 0.9), ("engine", "server", "tree")


@dataclass
class Death:
    """One fault: what was killed, in which moment, and how long its samples stood still."""

    kind: str
    moment: str
    server: str
    at: float
    recovery_s: float | None = None


@dataclass
class Victim:
    """A server that can be killed without asking it."""

    actor: Any
    process: ProcessKey
    engine: tuple[ProcessKey, ...] = ()

    def kill(self, kind: str) -> float:
        """Kill a part of it; return when."""
        server = () if kind == "engine" else (self.process,)
        children = descendants(self.process[0]) if kind == "tree" else self.engine if kind == "engine" else ()
        at = time.monotonic()
        end_processes((*server, *children), 0.0)
        return at


class Publisher:
    """A trainer that only publishes the model's weights."""

    async def publish(self, path: str) -> None:
        """Publish version 1."""
        from transformers import AutoModelForCausalLM
        from verl.checkpoint_engine.base import CheckpointEngineRegistry

        from verl_rlhfless.live import weight_engine

        engine = CheckpointEngineRegistry.new(
            weight_engine.BACKEND, bucket_size=0, is_master=True, store_name=_STORE, bucket_mib=16
        )
        model = AutoModelForCausalLM.from_pretrained(path)
        weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
        await engine.send_weights(iter(weights), global_steps=_VERSION)


class WatchedClient(ElasticClient):
    """Notes when and where each attempt of a ticket starts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.starts: dict[str, list[tuple[float, str]]] = {}

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        name, server = await super()._acquire_server(request_id, **extra)
        self.starts.setdefault(request_id.rpartition(".")[0], []).append((time.monotonic(), name))
        return name, server

    def recovery_s(self, death: Death) -> float | None:
        """Return how long the samples that ran on a dead server stood still; ``None`` when none ran there."""
        gaps = []
        for starts in self.starts.values():
            before = [name for at, name in starts if at < death.at]
            after = [at for at, _ in starts if at >= death.at]
            if before and before[-1] == death.server and after:
                gaps.append(after[0] - death.at)
        return max(gaps, default=None)


@dataclass
class Trial:
    """Engines behind a router, what they generate when nobody disturbs them, and what became of the faults."""

    engines: Engines
    router: Any
    prompts: list[list[int]]
    lengths: list[int]
    rng: random.Random
    calm: list[list[int]] = field(default_factory=list)
    servers: dict[str, Victim] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    num_close: int = 0
    wrong: list[str] = field(default_factory=list)

    async def ask(self, client: ElasticClient, index: int) -> Any:
        """Return the response of a sample, with its length forced."""
        params = {"temperature": 0.0, "logprobs": True, "max_tokens": self.lengths[index], "ignore_eos": True}
        return await client.generate(f"r{index}", prompt_ids=self.prompts[index], sampling_params=params)

    async def add_server(self) -> None:
        """Start an engine, load its weights, and let it take requests."""
        actor = warm_actor()
        name, _ = await self.engines.start(actor)
        await actor.pull_weights.remote(_VERSION, _STORE, _WAIT_S)
        self.servers[name] = Victim(actor, await actor.process.remote(), await actor.engine_processes.remote())
        await self.router.add_servers.remote({name: actor})

    async def round(self, number: int) -> None:
        """Generate all samples once, with two deaths and some cuts."""
        keys = [SampleKey(f"{number}-{index}", 0) for index in range(_SAMPLES)]
        names = list(self.servers)
        client = WatchedClient(self.engines.config, self.router)
        await self.router.announce.remote(keys, names, _MAX_TOKENS)
        starting = await self.router.start_replica.remote()
        for replica in range(3):
            await self.router.send_to.remote(list(range(replica, _SAMPLES, 3)), (0, 1, starting)[replica])

        async def sample(index: int) -> Any:
            with serving(keys[index]):
                output = await self.ask(client, index)
            client.end_session(keys[index])
            return output

        tasks = [asyncio.create_task(sample(index)) for index in range(_SAMPLES)]
        faults = [self.kill_running(names[0], number), self.kill_starting(starting, number)]
        cutting = asyncio.create_task(self.cut())
        deaths = await asyncio.wait_for(asyncio.gather(*faults), _WAIT_S)
        outputs = await asyncio.wait_for(asyncio.gather(*tasks), _WAIT_S)
        cutting.cancel()
        self.check(number, outputs)
        self.deaths += [dataclasses.replace(death, recovery_s=client.recovery_s(death)) for death in deaths]

    async def kill_running(self, name: str, number: int) -> Death:
        """Kill a server under load; every fifth one drains."""
        share, is_draining = _SHARES[number % 3], number % 5 == 4
        while await self.router.num_tokens.remote() < share * sum(self.lengths):
            await asyncio.sleep(0.02)
        if is_draining:
            await self.router.remove_servers.remote([name])
        victim = self.servers.pop(name)
        kind = _KINDS[number // 3 % 3]
        death = Death(kind, "drain" if is_draining else f"{share:.0%}", name, victim.kill(kind))
        await asyncio.sleep(1.0)
        end_processes((*victim.engine, victim.process), 30.0)  # after its requests were answered
        return death

    async def kill_starting(self, replica: int, number: int) -> Death:
        """Kill a replica that samples wait for, during its start or its weight load."""
        actor, kind = warm_actor(), _KINDS[1 + number % 2]
        await actor.wait_until_warm.remote()
        victim = Victim(actor, await actor.process.remote())
        if number % 4 < 2:
            moment, work = "start", asyncio.create_task(self.engines.start(actor))
            await asyncio.sleep(self.rng.uniform(0.5, 4.0))
        else:
            await self.engines.start(actor)
            moment, work = "load", asyncio.create_task(_pull(actor))
            await asyncio.sleep(self.rng.uniform(0.0, 0.1))
        death = Death(kind, moment, f"replica {replica}", victim.kill(kind))
        with contextlib.suppress(ray.exceptions.RayError):
            await work
        await self.router.lose_replica.remote(replica)
        return death

    async def cut(self) -> None:
        """Move a few samples at a time to the engine that nobody kills, until this is cancelled."""
        while True:
            await asyncio.sleep(self.rng.uniform(0.2, 0.6))
            await self.router.send_to.remote(self.rng.sample(range(_SAMPLES), 4), 1)

    def check(self, number: int, outputs: list[Any]) -> None:
        """Compare lengths and tokens with a calm run; another token counts as right where two logits are equal."""
        for index, (output, calm) in enumerate(zip(outputs, self.calm, strict=True)):
            if len(output.token_ids) != self.lengths[index] or len(output.log_probs) != self.lengths[index]:
                self.wrong.append(f"round {number}, sample {index}: {len(output.token_ids)} tokens")
            elif output.token_ids != calm:
                same = next(i for i, (a, b) in enumerate(zip(output.token_ids, calm, strict=True)) if a != b)
                gap = self.engines.logit_gap(self.prompts[index] + calm[:same])
                self.num_close += 1
                if gap >= _CLOSE_LOGITS:
                    self.wrong.append(f"round {number}, sample {index}: token {same}, logits {gap:g} apart")


async def _pull(actor: Any) -> None:
    await actor.pull_weights.remote(_VERSION, _STORE, _WAIT_S)


async def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Return what became of the faults."""
    engines = Engines(folder, f"data.max_response_length={_MAX_TOKENS}", "actor_rollout_ref.rollout.max_model_len=768")
    store = create_store(_STORE, WeightsConfig(name="store", bucket_mib=16))
    path = engines.config.actor_rollout_ref.model.path
    publisher = ray.remote(num_cpus=0)(Publisher).remote()
    await publisher.publish.remote(path)
    router = new_router({})
    await router.configure.remote(RouterSettings(max_retries=10))
    rng = random.Random(11)
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 200))] for _ in range(_SAMPLES)]
    trial = Trial(engines, router, prompts, [rng.randrange(1, _MAX_TOKENS + 1) for _ in range(_SAMPLES)], rng)
    attempts = 0
    for number in range(rounds):
        await asyncio.gather(*[trial.add_server() for _ in range(2 - len(trial.servers))])
        if not number:
            calm = ElasticClient(engines.config, router)
            trial.calm = [(await trial.ask(calm, index)).token_ids for index in range(_SAMPLES)]
            attempts = -(await router.get_status.remote())["attempts"]
        await trial.round(number)
        print(f"round {number}: {[f'{d.kind}/{d.moment}: {d.recovery_s}' for d in trial.deaths[-2:]]}", flush=True)
    status = await router.get_status.remote()
    _, is_done, late = await router.states.remote()
    recoveries = [death.recovery_s for death in trial.deaths if death.recovery_s is not None]
    for victim in trial.servers.values():
        end_processes((*victim.engine, victim.process), 30.0)
    del store, publisher
    return {
        "rounds": rounds,
        "faults": len(trial.deaths),
        "faults_by": dict(sorted(Counter(f"{death.kind} at {death.moment}" for death in trial.deaths).items())),
        "samples": rounds * _SAMPLES,
        "attempts": attempts + status["attempts"],
        "samples_lost_or_wrong": trial.wrong,
        "late_or_double_messages": late,
        "all_complete": is_done,
        "other_of_two_close_logits": trial.num_close,
        "recovery_s": {
            "deaths_that_hit_running_samples": len(recoveries),
            "median": statistics.median(recoveries),
            "max": max(recoveries),
        },
        "target": {"faults": _TARGET_FAULTS, "lost": 0, "median_recovery_s": _TARGET_RECOVERY_S},
    }


def main(rounds: Annotated[int, typer.Argument(min=1)] = _ROUNDS) -> None:
    """Measure on a private cluster and write the record."""
    os.environ.update(CPU_ENVIRONMENT)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, private_cluster(1, CPU_ENVIRONMENT):
        results = asyncio.run(measure(Path(folder), rounds))
    write_result("faults", {"load_average_before": load, **results}, command=f"python -m benchmarks.faults {rounds}")


if __name__ == "__main__":
    command.run(main, __doc__)
