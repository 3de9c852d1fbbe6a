"""What the router adds to a request, and whether 16,384 waiting ones stall it: Ray actors, servers without a model.

In every part the samples of a rollout are announced and placed as a run's are, and servers report the new tokens of all
that runs to the router's journal; only what decides, a policy's looks, is left out. ``added``: one request at a time,
capacity available, while others run and are reported: our client, verl's client and a plain call of the server in turn;
what a client adds is its median less the plain call's. ``waiting``: all requests are in the router at once, a fraction
of them runs. ``gap`` is how long a server's place stays empty between two requests, from the end of one to the start of
the next, all calls included; ``control`` is a call of another kind while everything waits. ``cut``: from the decision
to move a running request until the other server has it.

    python -m benchmarks.router          # about 3 minutes; writes benchmarks/results/router.json
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import statistics
import time
import types
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray

from benchmarks import command
from benchmarks.controlled_router import new_router
from benchmarks.record import write_result
from verl_rlhfless.live.tickets import Delta, Part, SampleKey, ServerLimits

_REPEATS = 400
_REQUESTS, _WORKERS, _SERVERS, _PLACES, _SERVICE_S = 16_384, 4, 4, 32, 0.4
_WAIT_S = 600.0
_CUTS = 200
_TARGET_ADDED_MS, _TARGET_CUT_MS = 5.0, 100.0
_BESIDE = 64  # requests that run and are reported while single ones are timed
_TOKENS_PER_S = 40.0  # that a running request makes
_MAX_TOKENS, _MANY_TOKENS = 64, 65_536
_SETTLED_S = 2.0  # after this the router waits for no prompt that comes first in the plan


class Server:
    """Answers after a while with all tokens, reports them meanwhile, and notes how long its places stay empty."""

    def __init__(self, service_s: float, max_num_seqs: int | None) -> None:
        self._service_s, self._limits = service_s, ServerLimits(max_num_seqs)
        self._made: dict[str, int] = {}
        self._most: dict[str, int] = {}
        self._reporting: asyncio.Task[None] | None = None
        self._num_reported = 0
        self._ended: deque[float] = deque()
        self._gaps: list[float] = []
        self._starts: list[float] = []
        self._cuts: dict[str, asyncio.Event] = {}
        self._random = random.Random(1)

    async def report_to(self, router: Any, name: str, interval_s: float) -> ServerLimits:
        """Report new tokens to ``router`` from now on, as our server does."""
        if self._reporting is not None:
            self._reporting.cancel()
        self._reporting = asyncio.create_task(self._report(router, name, interval_s))
        return self._limits

    async def _report(self, router: Any, name: str, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            parts = []
            for attempt, made in self._made.items():
                new = min(int(interval_s * _TOKENS_PER_S), self._most[attempt] - 1 - made)  # an end is not reported
                if new > 0:
                    parts.append(Part(attempt, made, [1] * new, [0.0] * new))
                    self._made[attempt] += new
            if parts:
                self._num_reported += sum(len(part.tokens) for part in parts)
                await router.progress.remote(name, Delta(tuple(parts), None))

    async def generate(self, prompt_ids: list[int], request_id: str, **request: Any) -> Any:
        """Return verl's output, without verl."""
        self._starts.append(time.time())
        self._made[request_id], self._most[request_id] = 0, request["sampling_params"]["max_tokens"]
        if self._ended:
            self._gaps.append(time.perf_counter() - self._ended.popleft())
        cut = self._cuts[request_id] = asyncio.Event()
        service_s = self._service_s * self._random.uniform(0.5, 1.5)
        if self._most[request_id] > _MAX_TOKENS:
            service_s = _WAIT_S
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(cut.wait(), service_s)
        self._ended.append(time.perf_counter())
        del self._cuts[request_id]
        made, most = self._made.pop(request_id), self._most.pop(request_id)
        count = made if cut.is_set() else most
        return types.SimpleNamespace(
            token_ids=[1] * count,
            log_probs=[0.0] * count,
            stop_reason="aborted" if cut.is_set() else "completed",
            extra_fields={},
            routed_experts=None,
            num_preempted=None,
        )

    async def abort(self, attempts: Sequence[str]) -> None:
        """End attempts at once."""
        for attempt in attempts:
            self._cuts[attempt].set()

    async def starts(self) -> list[float]:
        """Return when each request came [s since the epoch]."""
        return self._starts

    async def num_reported(self) -> int:
        """Return how many tokens were reported to the router."""
        return self._num_reported

    async def gaps(self) -> list[float]:
        """Return the seconds that places stayed empty."""
        return self._gaps


class Worker:
    """An agent-loop worker that only generates."""

    def __init__(self, router: Any, server: Any = None) -> None:
        from verl.workers.rollout.llm_server import LLMServerClient

        from verl_rlhfless.live.client import ElasticClient

        rollout = {"name": "vllm", "prompt_length": 64, "response_length": 64, "max_model_len": None}
        rollout |= {"full_determinism": False, "enable_rollout_routing_replay": False}
        section = types.SimpleNamespace(**rollout)
        config: Any = types.SimpleNamespace(actor_rollout_ref=types.SimpleNamespace(rollout=section))
        self._ours, self._stock, self._server = ElasticClient(config, router), LLMServerClient(config, router), server

    async def _once(self, way: str, number: int) -> float:
        request = {"prompt_ids": [1] * 64, "sampling_params": _params(_MAX_TOKENS)}
        start = time.perf_counter()
        if way == "direct":
            await self._server.generate.remote(**request, request_id=f"r{number}")
        elif way == "stock":
            await self._stock.generate(f"stock{number}", **request)
        else:
            await self._ask(SampleKey(f"g{number}", 0), _MAX_TOKENS)
        return time.perf_counter() - start

    async def _ask(self, sample: SampleKey, max_tokens: int) -> Any:
        from verl_rlhfless.live.client import serving

        with serving(sample):
            output = await self._ours.generate(str(sample), prompt_ids=[1] * 64, sampling_params=_params(max_tokens))
        self._ours.end_session(sample)
        return output

    async def added(self) -> dict[str, list[float]]:
        """Return the seconds of single requests, each way in turn."""
        seconds: dict[str, list[float]] = {"direct": [], "stock": [], "ours": []}
        for number in range(_REPEATS):
            for way in seconds:
                seconds[way].append(await self._once(way, number))
        return {way: values[20:] for way, values in seconds.items()}  # first use connects

    async def generate_all(self, samples: list[SampleKey], max_tokens: int) -> int:
        """Submit all at once; return how many came back whole."""
        outputs = await asyncio.gather(*[self._ask(sample, max_tokens) for sample in samples])
        return sum(len(output.token_ids) == max_tokens for output in outputs)


def _params(max_tokens: int) -> dict[str, Any]:
    return {"max_tokens": max_tokens, "logprobs": True}


def _summary_ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(value * 1e3 for value in seconds)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * len(ordered))], "max": ordered[-1]}


def measure_added() -> dict[str, Any]:
    """Return what the clients add to a request while nothing is busy."""
    actor = ray.remote(num_cpus=0, max_concurrency=100)
    server = actor(Server).remote(0.0, None)
    router = new_router({"s0": server})
    beside, worker = (actor(Worker).remote(router, server) for _ in range(2))
    others = [SampleKey(f"beside{number}", 0) for number in range(_BESIDE)]
    samples = [*others, *(SampleKey(f"g{number}", 0) for number in range(_REPEATS))]
    ray.get(router.announce.remote(samples, ["s0"], _MANY_TOKENS), timeout=_WAIT_S)
    ray.get(router.send_to.remote(list(range(len(samples))), 0), timeout=_WAIT_S)
    running = beside.generate_all.remote(others, _MANY_TOKENS)
    time.sleep(_SETTLED_S)
    seconds = ray.get(worker.added.remote(), timeout=_WAIT_S)
    medians = {way: statistics.median(values) * 1e3 for way, values in seconds.items()}
    num_reported = ray.get(server.num_reported.remote())
    for handle in (server, router, beside, worker):
        ray.kill(handle)
    del running
    return {
        "running_beside": _BESIDE,
        "tokens_journaled": num_reported,
        "requests_each": len(seconds["ours"]),
        "median_ms": medians,
        "added_ms": {way: medians[way] - medians["direct"] for way in ("stock", "ours")},
    }


def measure_cuts() -> dict[str, Any]:
    """Return how long a running request is on its way from one server to the other."""
    actor = ray.remote(num_cpus=0, max_concurrency=100)
    servers = [actor(Server).remote(_WAIT_S, None) for _ in range(2)]
    router = new_router({f"s{index}": server for index, server in enumerate(servers)})
    worker = actor(Worker).remote(router)
    sample = SampleKey("g", 0)
    ray.get(router.announce.remote([sample], ["s0", "s1"], _MANY_TOKENS), timeout=_WAIT_S)
    ray.get(router.send_to.remote([0], 0), timeout=_WAIT_S)
    running = worker.generate_all.remote([sample], _MANY_TOKENS)
    seconds, decided = [], time.time()
    for number in range(_CUTS + 1):
        server = servers[number % 2]
        while len(starts := ray.get(server.starts.remote(), timeout=_WAIT_S)) <= number // 2:
            time.sleep(0.005)
        seconds.append(starts[-1] - decided)
        decided = time.time()
        ray.get(router.send_to.remote([0], (number + 1) % 2), timeout=_WAIT_S)
    for handle in (worker, router, *servers):
        ray.kill(handle)
    del running
    return {"cuts": _CUTS, "target_ms": _TARGET_CUT_MS, "decision_to_next_server_ms": _summary_ms(seconds[1:])}


def measure_waiting(service_s: float) -> dict[str, Any]:
    """Return how requests flow while all others wait."""
    actor = ray.remote(num_cpus=0, max_concurrency=2000)
    servers = {f"s{i}": actor(Server).remote(service_s, _PLACES) for i in range(_SERVERS)}
    router = new_router(servers)
    workers = [actor(Worker).remote(router) for _ in range(_WORKERS)]
    samples = [SampleKey(f"g{index}", 0) for index in range(_REQUESTS)]
    ray.get([worker.__ray_ready__.remote() for worker in workers], timeout=_WAIT_S)
    ray.get(router.announce.remote(samples, list(servers), _MAX_TOKENS), timeout=_WAIT_S)
    for index in range(_SERVERS):
        ray.get(router.send_to.remote(list(range(index, _REQUESTS, _SERVERS)), index), timeout=_WAIT_S)
    start = time.perf_counter()
    shares = [worker.generate_all.remote(samples[i::_WORKERS], _MAX_TOKENS) for i, worker in enumerate(workers)]
    control: list[float] = []
    while ray.wait(shares, num_returns=len(shares), timeout=0.1)[1]:
        called = time.perf_counter()
        ray.get(router.get_status.remote(), timeout=_WAIT_S)
        control.append(time.perf_counter() - called)
    seconds = time.perf_counter() - start
    completed = sum(ray.get(shares))
    gaps = [gap for server in servers.values() for gap in ray.get(server.gaps.remote())]
    num_reported = sum(ray.get([server.num_reported.remote() for server in servers.values()]))
    late = ray.get(router.states.remote())[2]
    for handle in (router, *workers, *servers.values()):
        ray.kill(handle)
    ideal = _REQUESTS / (_SERVERS * _PLACES) * service_s
    return {
        "completed": completed,
        "late_or_double": late,
        "tokens_journaled": num_reported,
        "seconds": seconds,
        "seconds_of_service_alone": ideal,
        "grants_per_s": _REQUESTS / seconds,
        "gap_ms": _summary_ms(gaps),
        "control_ms": _summary_ms(control),
    }


def main() -> None:
    """Measure and record."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    load = os.getloadavg()[0]
    ray.init("local", num_cpus=8, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    try:
        added = measure_added()
        results: dict[str, Any] = {
            "load_average_before": load,
            "target_added_ms": _TARGET_ADDED_MS,
            "added": added,
            "is_met": added["added_ms"]["ours"] <= _TARGET_ADDED_MS,
            "cut": measure_cuts(),
            "tokens": {"of_a_request": _MAX_TOKENS, "per_s_of_a_running_one": _TOKENS_PER_S},
            "waiting": {"requests": _REQUESTS, "workers": _WORKERS, "servers": _SERVERS, "places_each": _PLACES},
            "waiting_paced": {"service_s": _SERVICE_S, **measure_waiting(_SERVICE_S)},
            "waiting_as_fast_as_it_goes": measure_waiting(0.0),
        }
    finally:
        ray.shutdown()
    write_result("router", results, command="python -m benchmarks.router")


if __name__ == "__main__":
    command.run(main, __doc__)
