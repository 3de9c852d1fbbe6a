"""Every response gets the length of the trace; whatever would break that is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.errors import ConfigError, DataError, UnsupportedError
from verl_rlhfless.live.replay import ReplayPlan, check_replay, row_index

LENGTHS = [[[10, 20], [30, 40], [50, 60]], [[1, 2, 3], [0, 100, 5]]]
"""Of two steps, by group and sample."""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    header = {
        "format": "rlhfless-trace/1", "name": "tiny", "unit": "tokens", "max_response_tokens": 100, "n": 2,
        "kind": "recorded", "source": "a run", "licence": "MIT", "note": "",
    }  # fmt: skip
    steps = [
        {
            "step": i,
            "epoch": 1,
            "groups": [{"prompt_id": f"p{j}", "prompt_tokens": 5, "response_tokens": g} for j, g in enumerate(groups)],
        }
        for i, groups in enumerate(LENGTHS)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [header, *steps]))
    return path


def config(trace: Path | None, **overrides: object) -> DictConfig:
    cfg = OmegaConf.create(
        {
            "rlhfless": {"replay": {"trace": None if trace is None else str(trace), "scale": 1.0}},
            "data": {"shuffle": False, "train_batch_size": 2},
            "trainer": {"use_v1": True},
            "actor_rollout_ref": {
                "rollout": {
                    "n": 2,
                    "prompt_length": 20,
                    "response_length": 80,
                    "max_model_len": None,
                    "agent": {"default_agent_loop": "single_turn_agent"},
                }
            },
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value)
    return cfg


def test_step_row_and_session_pick_the_sample(trace: Path) -> None:
    plan = ReplayPlan(trace, scale=1.0, max_response_tokens=1000)

    assert [[plan.forced_tokens(1, row, s) for s in range(2)] for row in range(3)] == LENGTHS[0]
    assert [plan.forced_tokens(2, 1, session) for session in range(3)] == [1, 100, 5]  # a length of 0 becomes 1


def test_a_batch_of_consecutive_rows_uses_every_group_once(trace: Path) -> None:
    plan = ReplayPlan(trace, scale=1.0, max_response_tokens=1000)

    for first_row in range(7):
        firsts = sorted(plan.forced_tokens(1, row, 0) for row in range(first_row, first_row + 3))
        assert firsts == [10, 30, 50]


def test_the_trace_repeats_when_the_run_is_longer(trace: Path) -> None:
    plan = ReplayPlan(trace, scale=1.0, max_response_tokens=1000)

    assert plan.forced_tokens(3, 0, 1) == plan.forced_tokens(1, 0, 1) == 20
    assert plan.forced_tokens(1, 0, 3) == 20  # a baseline that asks for more samples than the trace holds


@pytest.mark.parametrize(
    ("scale", "limit", "expected"),
    [(0.5, 1000, 30), (0.01, 1000, 1), (2.0, 1000, 120), (2.0, 70, 70), (1e300, 70, 70)],
)
def test_scale_and_clamp(trace: Path, scale: float, limit: int, expected: int) -> None:
    assert ReplayPlan(trace, scale, limit).forced_tokens(1, 2, 1) == expected


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_no_number_is_refused(trace: Path, scale: float) -> None:
    with pytest.raises(ConfigError, match=r"rlhfless\.replay\.scale"):
        ReplayPlan(trace, scale, 100)


def test_a_good_run_passes(trace: Path) -> None:
    assert check_replay(config(trace)).trace == str(trace)


@pytest.mark.parametrize("rlhfless", [None, {}, {"replay": {"trace": None}}])
def test_a_run_without_replay_is_not_looked_at(rlhfless: object) -> None:
    cfg = OmegaConf.create({"data": {"shuffle": True}} | ({} if rlhfless is None else {"rlhfless": rlhfless}))

    assert check_replay(cfg).trace is None


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("data.shuffle", True, ConfigError),
        ("actor_rollout_ref.rollout.n", 3, ConfigError),
        ("actor_rollout_ref.rollout.max_model_len", 99, ConfigError),
        ("rlhfless.replay.scale", 0, ConfigError),
        ("actor_rollout_ref.rollout.agent.default_agent_loop", "tool_agent", UnsupportedError),
        ("trainer.use_v1", False, UnsupportedError),
    ],
)
def test_what_does_not_go_with_replay_is_named(trace: Path, key: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        check_replay(config(trace, **{key: value}))

    assert key in str(caught.value)
    assert repr(value) in str(caught.value)


def test_the_limits_themselves_are_allowed(trace: Path) -> None:
    check_replay(config(trace, **{"actor_rollout_ref.rollout.max_model_len": 100}))


def test_a_missing_or_malformed_trace_is_named(trace: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        check_replay(config(trace.with_name("absent.jsonl")))
    trace.write_text(trace.read_text() + "{\n")
    with pytest.raises(DataError, match="line 4"):
        check_replay(config(trace))


def test_rows_must_be_numbered() -> None:
    assert row_index("12") == 12
    with pytest.raises(DataError, match=r"extra_info\.index='gsm8k-12'"):
        row_index("gsm8k-12")
