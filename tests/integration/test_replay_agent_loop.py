"""verl's own agent-loop worker, on verl's own configuration, sends requests with the lengths of the trace."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

agent_loop = pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="needs verl")

from tensordict import NonTensorData, NonTensorStack, TensorDict  # noqa: E402
from verl.trainer.ppo.v1 import agent_loop_tq  # noqa: E402
from verl.workers.rollout.replica import TokenOutput  # noqa: E402

from verl_rlhfless.demo.assets import arithmetic_problems, build_assets  # noqa: E402
from verl_rlhfless.errors import ConfigError  # noqa: E402
from verl_rlhfless.live.sample_log import read_samples  # noqa: E402
from verl_rlhfless.report.recorded_trace import record_trace  # noqa: E402
from verl_rlhfless_patches import verl_agent_loop_record, verl_agent_loop_replay  # noqa: E402

MAX_RESPONSE_TOKENS = 20
SAMPLING = {"temperature": 1.0, "top_p": 1.0}


class RecordingClient:
    """Stands for the servers: notes each request and answers with as many tokens as it asks for."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    async def generate(self, sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        self.requests.append(sampling_params)
        return TokenOutput(token_ids=[5] * sampling_params.get("max_tokens", 4))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_assets(tmp_path_factory.mktemp("assets"), arithmetic_problems(8, seed=0), seed=0).model


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    header = {
        "format": "rlhfless-trace/1", "name": "tiny", "unit": "tokens", "max_response_tokens": 100, "n": 2,
        "kind": "recorded", "source": "a run", "licence": "MIT", "note": "",
    }  # fmt: skip
    groups = [
        {"prompt_id": "p0", "prompt_tokens": 5, "response_tokens": [7, 30]},
        {"prompt_id": "p1", "prompt_tokens": 5, "response_tokens": [9, 11]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [header, {"step": 1, "epoch": 1, "groups": groups}]))
    return path


@pytest.fixture
def build(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return ``build(*overrides)``: a worker of a run with these overrides, outside Ray and without servers."""
    verl_agent_loop_replay.apply()
    monkeypatch.setattr(agent_loop, "_agent_loop_registry", dict(agent_loop._agent_loop_registry))

    async def give_back(self: Any, output: Any, validate: bool, **_: Any) -> Any:
        return output  # stock pads, scores and stores it

    monkeypatch.setattr(agent_loop.AgentLoopWorker, "_agent_loop_postprocess", give_back)

    def build_worker(*overrides: str, worker_class: Any = agent_loop.AgentLoopWorker) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer",
                overrides=[
                    f"actor_rollout_ref.model.path={model}",
                    "actor_rollout_ref.rollout.name=vllm",
                    "actor_rollout_ref.rollout.n=2",
                    f"data.max_response_length={MAX_RESPONSE_TOKENS}",
                    "data.shuffle=False",
                    *overrides,
                ],
            )
        return worker_class(config, RecordingClient())

    return build_worker


def run(worker: Any, *samples: tuple[int, int], validate: bool = False) -> list[Any]:
    """Return the outputs for samples given as (row, session), as ``AgentLoopWorkerTQ`` runs them."""

    async def run_all() -> list[Any]:
        return [
            await worker._run_agent_loop(
                dict(SAMPLING),
                trajectory={"step": 1, "sample_index": row, "rollout_n": 0, "validate": validate},
                trace=False,
                session_id=session,
                agent_name="single_turn_agent",
                raw_prompt=[{"role": "user", "content": "What is 3 + 4?"}],
                global_steps=1,
                index=row,
                uid="u",
            )
            for row, session in samples
        ]

    return asyncio.run(run_all())


def test_responses_get_the_lengths_of_the_trace(build: Callable[..., Any], trace: Path) -> None:
    worker = build("+rlhfless=off", f"rlhfless.replay.trace={trace}")

    outputs = run(worker, (0, 0), (0, 1), (1, 0), (1, 1))

    lengths = [7, MAX_RESPONSE_TOKENS, 9, 11]  # 30 exceeds the response length of the run
    assert worker.llm_client.requests == [SAMPLING | {"max_tokens": n, "ignore_eos": True} for n in lengths]
    assert [len(output.response_ids) for output in outputs] == lengths
    assert [output.extra_fields["forced_tokens"] for output in outputs] == lengths


def test_validation_sends_the_requests_of_stock(build: Callable[..., Any], trace: Path) -> None:
    replaying, stock = build("+rlhfless=off", f"rlhfless.replay.trace={trace}"), build()

    (validated,) = run(replaying, (0, 0), validate=True)
    (plain,) = run(stock, (0, 0))

    assert replaying.llm_client.requests == stock.llm_client.requests == [SAMPLING]
    assert validated.model_dump(exclude={"metrics"}) == plain.model_dump(exclude={"metrics"})


def test_the_replay_loop_without_a_trace_is_stock(build: Callable[..., Any]) -> None:
    worker, stock = build(), build()
    agent_loop._agent_loop_registry["single_turn_agent"] = {
        "_target_": "verl_rlhfless.live.replay_agent_loop.ReplayAgentLoop"
    }
    (ours,) = run(worker, (0, 0))
    agent_loop._agent_loop_registry["single_turn_agent"] = {"_target_": verl_agent_loop_replay._STOCK_LOOP}
    (plain,) = run(stock, (0, 0))

    assert worker.llm_client.requests == stock.llm_client.requests == [SAMPLING]
    assert ours.model_dump(exclude={"metrics"}) == plain.model_dump(exclude={"metrics"})


def test_a_shuffled_run_does_not_start(build: Callable[..., Any], trace: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle=True"):
        build("+rlhfless=off", f"rlhfless.replay.trace={trace}", "data.shuffle=True")


def test_verls_training_worker_records_the_lengths_that_it_stores(
    build: Callable[..., Any], trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ``generate_sequences`` to the transfer queue, as the v1 trainer runs it; only the queue is a fake."""
    monkeypatch.undo()  # of the fixture: verl's own registry and postprocessing
    monkeypatch.setenv("RLHFLESS_OBSERVER_DIR", str(tmp_path))
    base = agent_loop.AgentLoopWorker
    monkeypatch.setattr(base, "__init__", base.__init__)  # which the patch replaces, for this test only
    stored: dict[str, int] = {}

    async def put(key: str, **_: Any) -> None: ...

    async def put_batch(keys: list[str], tags: list[dict[str, Any]], **_: Any) -> None:
        stored.update({key: tag["response_len"] for key, tag in zip(keys, tags, strict=True)})

    fakes = {"init": lambda: None, "async_kv_put": put, "async_kv_batch_put": put_batch}
    for name, fake in fakes.items():
        monkeypatch.setattr(agent_loop_tq.tq, name, fake)
    try:
        verl_agent_loop_record._patch(agent_loop)
        worker = build(
            "+rlhfless=off",
            f"rlhfless.replay.trace={trace}",
            worker_class=agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class,
        )
        asyncio.run(_generate(worker, validate=False))
        trained = dict(stored)
        asyncio.run(_generate(worker, validate=True))
    finally:
        del base._rlhfless_samples

    samples = list(read_samples(tmp_path))
    assert {f"{s.uid}_{s.session}_0": s.response_tokens for s in samples} == trained
    assert {(s.row, s.session): s.response_tokens for s in samples} == {
        (0, 0): 7, (0, 1): MAX_RESPONSE_TOKENS, (1, 0): 9, (1, 1): 11,
    }  # fmt: skip
    assert [s.prompt for s in samples if s.row == 0] != [s.prompt for s in samples if s.row == 1]
    ended = [{"step": sample.step, "data": {"timing_s/step": 1.0}} for sample in samples]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ended))
    assert record_trace(tmp_path, tmp_path / "recorded.jsonl").num_samples == 4, "validation is no training sample"


async def _generate(worker: Any, validate: bool) -> None:
    batch = TensorDict(
        {
            "uid": NonTensorStack("u0", "u1"),
            "raw_prompt": NonTensorStack(*[[{"role": "user", "content": f"What is {i} + 4?"}] for i in range(2)]),
            "index": NonTensorStack(0, 1),
        },
        batch_size=2,
    )
    batch["global_steps"], batch["validate"] = NonTensorData(1), NonTensorData(validate)
    await worker.generate_sequences(batch)
    await asyncio.gather(*worker.background_tasks)
