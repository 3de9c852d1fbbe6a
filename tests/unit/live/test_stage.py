"""What the router is told of a step, and whose every turn is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_rlhfless.live import stage
from verl_rlhfless.live.announcement import announcement_of
from verl_rlhfless.live.client import _sample
from verl_rlhfless.live.stage import StageManager, StageWorker, Turns
from verl_rlhfless.live.tickets import SampleKey

ROLLOUT = SimpleNamespace(n=4, prompt_length=64, response_length=32)


def prompts(*texts: str, **more: Any) -> TensorDict:
    batch = TensorDict(
        {
            "uid": NonTensorStack(*[f"u{i}" for i in range(len(texts))]),
            "raw_prompt": NonTensorStack(*[[{"role": "user", "content": text}] for text in texts]),
            "index": NonTensorStack(*range(len(texts))),
            **more,
        },
        batch_size=len(texts),
    )
    batch["global_steps"] = NonTensorData(7)
    return batch


def test_a_step_is_announced_with_its_groups() -> None:
    announced = announcement_of(prompts("a" * 80, "b"), ROLLOUT)
    assert announced.step == 7 and announced.max_response_tokens == 32
    assert [(g.uid, g.row, g.n) for g in announced.groups] == [("u0", 0, 4), ("u1", 1, 4)]
    assert announced.groups[0].prompt_tokens > announced.groups[1].prompt_tokens > 0
    assert announced.samples()[:5] == (*(SampleKey("u0", s) for s in range(4)), SampleKey("u1", 0))


def test_a_prompt_has_the_same_id_in_every_epoch_and_another_prompt_another_one() -> None:
    first, second = announcement_of(prompts("a", "b"), ROLLOUT), announcement_of(prompts("b", "a"), ROLLOUT)
    assert [g.prompt_id for g in first.groups] == [g.prompt_id for g in second.groups][::-1]
    assert len({g.prompt_id for g in first.groups}) == 2


def test_rows_may_be_named_by_text_as_in_dapo_math() -> None:
    named = prompts("a", "b", index=NonTensorStack("9a9b6eb4-a1cb-49d1", "7"))
    assert [g.row for g in announcement_of(named, ROLLOUT).groups] == [0, 7]


def test_a_prompt_with_an_image_has_the_same_id_in_every_epoch() -> None:
    def prompt_id(colour: str) -> str:
        image = Image.new("RGB", (8, 8), colour)
        batch = prompts("what is it?")
        batch["raw_prompt"] = NonTensorStack([{"role": "user", "content": [{"type": "image", "image": image}]}])
        return announcement_of(batch, ROLLOUT).groups[0].prompt_id

    assert prompt_id("red") == prompt_id("red") != prompt_id("blue")


def test_a_group_may_have_its_own_number_of_samples() -> None:
    announced = announcement_of(prompts("a", "b", __rollout_n__=NonTensorStack(1, 8)), ROLLOUT)
    assert [g.n for g in announced.groups] == [1, 8]
    assert announced.batch().num_samples == 9


def test_a_long_prompt_counts_no_more_than_verl_lets_through() -> None:
    assert announcement_of(prompts("a" * 10_000), ROLLOUT).groups[0].prompt_tokens == 64


class Router:
    def __init__(self) -> None:
        self.announced: list[Any] = []
        self.once = SimpleNamespace(remote=self._once)

    def _once(self, call: str, method: str, announced: Any) -> None:
        assert method == "announce"
        self.announced.append(announced)


@pytest.mark.parametrize(("validate", "expected"), [(False, 1), (True, 0)])
def test_training_is_announced_before_it_is_submitted_and_validation_is_not(
    monkeypatch: pytest.MonkeyPatch, validate: bool, expected: int
) -> None:
    router, order = Router(), []
    manager = StageManager.__new__(StageManager)
    manager.llm_client, manager.rollout_config = SimpleNamespace(_load_balancer=router), ROLLOUT
    manager.agent_loop_workers = [object()]
    monkeypatch.setattr(stage.ray, "get", lambda value, **_: order.append("announced") or (0,))
    monkeypatch.setattr(AgentLoopManagerTQ, "generate_sequences", lambda self, batch: order.append("submitted"))
    batch = prompts("a")
    if validate:
        batch["validate"] = NonTensorData(True)
    manager.generate_sequences(batch)
    assert len(router.announced) == expected
    assert order == ["announced", "submitted"][1 - expected :]


def test_a_worker_gets_the_prompts_of_its_share_in_the_order_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    router, submitted = Router(), []
    manager = StageManager.__new__(StageManager)
    manager.llm_client, manager.rollout_config = SimpleNamespace(_load_balancer=router), ROLLOUT
    manager.agent_loop_workers = [object(), object()]
    monkeypatch.setattr(stage.ray, "get", lambda value, **_: (4, 2, 0, 1, 3))
    monkeypatch.setattr(AgentLoopManagerTQ, "generate_sequences", lambda self, batch: submitted.append(batch))
    manager.generate_sequences(prompts("a", "b", "c", "d", "e"))
    shares = [list(chunk["uid"]) for chunk in submitted[0].chunk(2)]
    assert shares == [["u2", "u0", "u1"], ["u4", "u3"]]
    assert submitted[0]["global_steps"] == 7
    (announced,) = router.announced
    assert [group.uid for group in announced.groups] == ["u0", "u1", "u2", "u3", "u4"], "in the order of the batch"


class Client:
    def __init__(self) -> None:
        self.ended: list[SampleKey] = []

    def end_session(self, sample: SampleKey) -> None:
        self.ended.append(sample)


def run_sample(monkeypatch: pytest.MonkeyPatch, validate: bool, error: Exception | None = None) -> tuple[Any, Client]:
    """Return the sample that the client saw during a run of one agent loop, and the client."""
    seen: list[Any] = []
    worker = StageWorker.__new__(StageWorker)
    worker.llm_client, worker._turns = Client(), Turns()
    stock = AgentLoopWorkerTQ.__ray_metadata__.modified_class

    async def loop(self: Any, sampling_params: Any, trajectory: Any, *, agent_name: str, **kwargs: Any) -> None:
        seen.append(_sample.get())
        if error is not None:
            raise error
        await self._agent_loop_postprocess("output", trajectory["validate"], **kwargs)

    async def postprocess(self: Any, output: Any, validate: bool, **kwargs: Any) -> None:
        assert validate or self.llm_client.ended, "a sample has ended before its reward is computed"

    monkeypatch.setattr(stock, "_run_agent_loop", loop)
    monkeypatch.setattr(stock, "_agent_loop_postprocess", postprocess)
    work = worker._run_agent_loop({}, {"validate": validate}, agent_name="a", uid="u1", session_id=3)
    asyncio.run(work)
    return seen[0], worker.llm_client


def test_every_turn_of_a_training_sample_is_known_and_its_end_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, client = run_sample(monkeypatch, validate=False)
    assert sample == SampleKey("u1", 3)
    assert client.ended == [SampleKey("u1", 3)]
    assert _sample.get() is None


def test_validation_belongs_to_no_announced_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, client = run_sample(monkeypatch, validate=True)
    assert sample is None and client.ended == []


def test_a_sample_that_fails_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="too long"):
        run_sample(monkeypatch, validate=False, error=ValueError("too long"))


def test_what_a_sample_sends_leaves_before_the_next_agent_loop_is_built() -> None:
    built, sent = [], []

    async def sample(turns: Turns, number: int) -> None:
        await turns.take()
        built.append(number)
        asyncio.get_running_loop().call_soon(lambda: sent.append(len(built)))

    async def all_at_once() -> None:
        turns = Turns()
        await asyncio.gather(*[sample(turns, number) for number in range(5)])

    asyncio.run(all_at_once())
    assert built == [0, 1, 2, 3, 4]
    assert sent == [1, 2, 3, 4, 5], "as many were built when each message left"
