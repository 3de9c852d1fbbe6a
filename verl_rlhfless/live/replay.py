"""Replay: every response gets the length that a trace holds for it, so that all arms generate the same work.

The text stays the model's own; only where it ends is forced. Validation keeps its natural lengths.
"""

from __future__ import annotations

import math
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import ReplayConfig
from verl_rlhfless.errors import ConfigError, DataError, UnsupportedError
from verl_rlhfless.live.settings import settings_of
from verl_rlhfless.trace import read_trace

SINGLE_TURN_AGENT = "single_turn_agent"
"""The only agent loop whose lengths can be forced: one response is one engine request."""

_ROLLOUT = "actor_rollout_ref.rollout"


class ReplayPlan:
    """The forced length of every response of a run.

    Training step ``global_step`` replays step ``(global_step - 1) modulo the number of steps`` of the trace, a prompt
    the group ``row_index modulo the number of groups`` of that step, and a response the sample ``session_id modulo the
    number of samples`` of that group. With ``data.shuffle=False`` and ``data.train_batch_size`` at most the groups of
    the step a batch is consecutive rows, so the mapping is exact: no two prompts of a step replay the same group.

    Args:
        trace: Path of a trace in the format ``rlhfless-trace/1``.
        scale: Factor on every length.
        max_response_tokens: ``rollout.response_length``; each length is clamped to ``[1, max_response_tokens]``.

    Raises:
        DataError: The trace is missing or breaks a rule of its format.
        ConfigError: ``scale`` is not finite.
    """

    def __init__(self, trace: str | Path, scale: float, max_response_tokens: int) -> None:
        if not math.isfinite(scale):
            raise ConfigError("rlhfless.replay.scale", scale, "must be finite", "Use 1.0 for the recorded lengths.")
        self.min_samples = math.inf
        self._steps: list[tuple[array[int], array[int]]] = []  # all lengths of a step, and where each group starts
        for step in read_trace(trace):
            lengths, starts = array("I"), array("Q", [0])
            for group in step.groups:
                forced = (max(1, round(min(tokens * scale, max_response_tokens))) for tokens in group.response_tokens)
                lengths.extend(forced)
                starts.append(len(lengths))
                self.min_samples = min(self.min_samples, len(group.response_tokens))
            self._steps.append((lengths, starts))

    def forced_tokens(self, global_step: int, row_index: int, session_id: int) -> int:
        """Return how many tokens a response has.

        Args:
            global_step: Training step, from 1.
            row_index: Row of the prompt in the training data (``extra_info.index``).
            session_id: Which of the responses to the prompt, from 0.
        """
        lengths, starts = self._steps[(global_step - 1) % len(self._steps)]
        group = row_index % (len(starts) - 1)
        first, end = starts[group], starts[group + 1]
        return lengths[first + session_id % (end - first)]


plan_of = lru_cache(maxsize=1)(ReplayPlan)
"""A ``ReplayPlan`` that is read once per process: an agent loop is built for every response."""


def check_replay(config: DictConfig) -> ReplayConfig:
    """Return ``rlhfless.replay`` of a run after checking that it can work; nothing is started for it.

    Args:
        config: The whole configuration of ``verl.trainer.main_ppo``.

    Raises:
        ConfigError: A key that does not go with replay; the message has key, value, rule and action.
        UnsupportedError: An agent loop or a trainer that cannot replay.
        DataError: The trace is missing or malformed.
    """
    replay = settings_of(config).replay
    if replay.trace is None:
        return replay
    rollout = config.actor_rollout_ref.rollout
    _check_agent_loop(config, rollout)
    _check_lengths(config, rollout)
    plan = plan_of(replay.trace, replay.scale, rollout.response_length)
    if rollout.n > plan.min_samples:
        raise ConfigError(
            f"{_ROLLOUT}.n",
            rollout.n,
            f"must be <= {plan.min_samples}, the fewest samples of a group in {replay.trace}",
            "Ask for fewer responses, or replay a trace with more.",
        )
    return replay


def _check_agent_loop(config: DictConfig, rollout: Any) -> None:
    if OmegaConf.select(config, "trainer.use_v1") is False:
        raise UnsupportedError("trainer.use_v1=False: replay needs the v1 trainer. Set trainer.use_v1=True.")
    agent = rollout.agent.default_agent_loop
    if agent != SINGLE_TURN_AGENT:
        raise UnsupportedError(
            f"{_ROLLOUT}.agent.default_agent_loop={agent!r}: replay forces lengths of {SINGLE_TURN_AGENT} only. "
            f"Set it to {SINGLE_TURN_AGENT}, or drop rlhfless.replay.trace."
        )


def _check_lengths(config: DictConfig, rollout: Any) -> None:
    if config.data.shuffle:
        raise ConfigError(
            "data.shuffle",
            config.data.shuffle,
            "must be False with rlhfless.replay.trace: the row of a prompt picks its group of the trace",
            "Set data.shuffle=False.",
        )
    needed = rollout.prompt_length + rollout.response_length
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        raise ConfigError(
            f"{_ROLLOUT}.max_model_len",
            rollout.max_model_len,
            f"must be >= prompt_length + response_length = {needed} with rlhfless.replay.trace, else lengths are cut",
            "Raise it, or lower data.max_prompt_length or data.max_response_length.",
        )


def row_index(value: Any) -> int:
    """Return ``extra_info.index`` of a row as an integer.

    Raises:
        DataError: It is not an integer.
    """
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"extra_info.index={value!r}: must be the number of the row with rlhfless.replay.trace. Number the rows."
        ) from error
