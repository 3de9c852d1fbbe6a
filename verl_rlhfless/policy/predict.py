"""Predicts response lengths from earlier steps, and during a step from what its samples have generated so far.

The model is ``log(length) = level + slope * log(prompt) + prompt effect + noise``:

* The level is that of all lengths, and drifts with training. From step to step a Kalman filter follows it, so that a
  few samples move it little. Inside a step it is corrected by samples that have finished and by those that still run,
  of which only the least length is known (censored samples).
* The effect of a prompt is an EWMA over its visits, shrunk by how well effects have come back so far.
* An interval covers what is not known: the noise, the effect, and how far the level moves until the next step. Its
  shape is that of the standardised errors seen so far (``residuals``), so that 80 % means 80 %.

Invariants: a longer censored sample never lowers its own prediction; state round-trips through JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from verl_rlhfless.errors import DataError
from verl_rlhfless.policy.groups import LEAST_WITHIN, group_means, group_sizes, ridge_slope, spreads
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.residuals import NORMAL, learn_residuals, residuals_of
from verl_rlhfless.policy.snapshot import Batch, FloatArray, IntArray

FORMAT = "rlhfless-lengths/3"
PRIOR_SHARE_OF_CAP = 1 / 10
"""Median response on the very first step, as a share of the longest allowed one: the only guess that is not learnt."""

_EWMA_PROMPT, _EWMA_WANDER = 0.5, 0.2
"""Weights of the latest visit in a prompt's effect, and of the latest step in how far the level wanders."""

_MOST_SAMPLES = 512
"""Most samples of earlier steps that count beside a new step's: spreads and tails follow a model that changes."""

_EM_ROUNDS = 3
_UNSHIFTED_SAMPLES = 4.0
"""Samples of no shift that count beside a step's own: the first ones to end must not move all others."""

_TREND_KEPT, _TREND_RATE = 0.8, 0.25
"""Damping of the trend from step to step, and the share of a followed surprise that it takes up."""

_LEAST_WANDER = 0.02
"""Least standard deviation of the level's changes: it must follow when lengths begin to drift."""

_MOST_RECALL = 0.95
"""Most of a prompt's effect that counts as known, however well effects came back: the rest keeps intervals wide."""

_LEAST_RECURRING = 8
"""Fewer prompts that were visited before say nothing about how well effects come back."""

_TAIL_MARGIN = 1.25
"""How far beyond the longest response of late steps a tail may go."""

_TAIL_SAMPLES = 256
"""Samples of a step from which on its longest response bounds the tail."""

_LONGEST_KEPT = 0.8
"""Share of the longest response so far that still counts after a step without one as long."""


@dataclass(frozen=True, slots=True)
class LengthModel:
    """What was learnt from finished steps.

    Attributes:
        level: Mean log length of the latest steps; ``None`` before the first.
        trend: Expected change of it from step to step.
        doubt: Standard deviation of the error of ``level``.
        wander: Standard deviation of the changes from step to step that no trend explains.
        slope: Change of log length per log prompt token.
        log_prompt: Mean log prompt tokens to which ``level`` belongs.
        between / within: Standard deviation of prompt effects, and of samples inside a group.
        recall: Share of a remembered prompt effect that comes back.
        survival: Curve of the standardised errors (``residuals``).
        num_samples: How many samples the spreads and the curve rest on.
        longest: Longest response of the latest steps, from at least 256 samples; 0 = not known.
        effects: Prompt id -> effect (EWMA over visits), as far as the samples of a visit can tell it.
    """

    level: float | None = None
    trend: float = 0.0
    doubt: float = 0.5
    wander: float = 0.07
    slope: float = 0.0
    log_prompt: float = 0.0
    between: float = 0.6
    within: float = 0.9
    recall: float = 0.7
    survival: tuple[float, ...] = NORMAL
    num_samples: float = 16.0
    longest: float = 0.0
    effects: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the state as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LengthModel:
        """Return the state that ``to_json`` wrote.

        Raises:
            DataError: The text is no such state.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError(f"format must be {FORMAT!r}")
            effects = {str(key): _finite(value) for key, value in values.pop("effects").items()}
            level = values.pop("level")
            survival = tuple(_finite(value) for value in values.pop("survival"))
            if len(survival) != len(NORMAL):
                raise ValueError(f"survival must have {len(NORMAL)} values")
            scalars = {key: _finite(value) for key, value in values.items()}
            return cls(level=None if level is None else _finite(level), survival=survival, effects=effects, **scalars)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"length history: {error}. Delete the state file to start without history.") from error


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def predict(model: LengthModel, batch: Batch) -> Prediction:
    """Return the prediction before anything of the step has been generated."""
    mu, unknown = _expected(model, batch)
    level = 0.0 if model.level is None else model.doubt**2 + model.wander**2  # the first spreads are guesses, and wide
    sigma = np.sqrt(model.within**2 + unknown[batch.group_of] + level)
    reach, errors = _reach(model, batch.max_response_tokens, 0), residuals_of(model.survival)
    return Prediction(mu, sigma, reach, errors, float(unknown[batch.group_of].mean() / np.mean(sigma * sigma)))


def _expected(model: LengthModel, batch: Batch) -> tuple[FloatArray, FloatArray]:
    """Return each sample's expected log length, [B], and the variance of what is not known of its prompt, [G]."""
    if model.level is None:
        mu = np.full(batch.num_samples, math.log(max(1.0, batch.max_response_tokens * PRIOR_SHARE_OF_CAP)))
    else:
        log_prompt = np.log(np.maximum(batch.prompt_tokens, 1))
        mu = model.level + model.trend + model.slope * (log_prompt - model.log_prompt)
    is_known = np.array([prompt in model.effects for prompt in batch.prompt_ids])
    effect = np.array([model.effects.get(prompt, 0.0) for prompt in batch.prompt_ids])
    explained = is_known * min(model.recall, _MOST_RECALL) ** 2 * _told(model, group_sizes(batch))
    return mu + model.recall * effect[batch.group_of], model.between**2 * (1 - explained)


def _told(model: LengthModel, num_samples: IntArray) -> FloatArray:
    """Return the share of a prompt's effect that the mean of so many of its samples (any shape, >= 1) tells.

    The rest is their noise: ``between^2 / (between^2 + within^2 / n)``, the reliability of a mean.
    """
    told: FloatArray = model.between**2 / (model.between**2 + model.within**2 / num_samples)
    return told


def _reach(model: LengthModel, cap: int, seen: int) -> int:
    """Return how many tokens the tail goes to, at most ``cap``, where ``seen`` have been reached in this step.

    Log-normal tails without end would have the planner wait for samples that never come.
    """
    if model.longest <= 0:
        return cap
    return int(min(cap, _TAIL_MARGIN * max(model.longest, seen)))


def refine(
    model: LengthModel, prior: Prediction, batch: Batch, generated: IntArray, is_finished: FloatArray
) -> Prediction:
    """Return the prediction given what has been generated so far.

    Finished siblings are observations, unfinished ones are censored at what they have. Without any finished sample no
    interval gets narrower.

    Args:
        model: What was learnt from finished steps.
        prior: ``predict(model, batch)``.
        batch: The prompts.
        generated: [B] tokens so far.
        is_finished: [B] 1.0 where the sample is complete.
    """
    mu = _shifted(model, prior, batch, generated, is_finished)
    sigma = np.minimum(prior.sigma, _spread_left(model, batch, is_finished))
    cap = _reach(model, batch.max_response_tokens, int(generated.max()))
    return replace(prior, mu=mu, sigma=sigma, cap=max(prior.cap, cap))


def _shifted(
    model: LengthModel, prior: Prediction, batch: Batch, generated: IntArray, is_finished: FloatArray
) -> FloatArray:
    """Return the new ``mu``, [B]: moved by the shift of the whole distribution and, if unfinished, by its siblings.

    A few rounds of EM for a Tobit random-effects model: each censored sample is imputed by its conditional mean (E),
    then the shift and the groups' effects are estimated anew (M). Arguments as in ``refine``.
    """
    groups = len(batch.prompt_ids)
    size = np.bincount(batch.group_of, minlength=groups)
    is_open = (is_finished == 0) | (generated >= batch.max_response_tokens)  # its end is not known
    seen = np.log(np.maximum(generated, 1))
    known = np.where(is_open, 0.0, seen - prior.mu)
    known_sum = np.bincount(batch.group_of, weights=known, minlength=groups)
    rows = np.flatnonzero(is_open)
    group_of, mu, sigma, seen = batch.group_of[rows], prior.mu[rows], prior.sigma[rows], seen[rows]
    is_capped = is_finished[rows] > 0
    others = np.maximum(size - 1, 0)[group_of]  # what a sample has itself says nothing more about what it has left
    reliability = _told(model, np.maximum(others, 1))
    shift, effect = 0.0, np.zeros(len(rows))
    for _ in range(_EM_ROUNDS):
        expected = mu + shift + effect
        imputed = expected + sigma * prior.errors.gentle_beyond((seen - expected) / sigma)
        residual = np.where(is_capped, np.maximum(seen, imputed), imputed) - mu
        residual_sum = known_sum + np.bincount(group_of, weights=residual, minlength=groups)
        shift = float(residual_sum.sum() / (batch.num_samples + _UNSHIFTED_SAMPLES))
        effect = reliability * (residual_sum[group_of] - residual - shift * others) / np.maximum(others, 1)
    shifted = prior.mu + shift
    shifted[rows] += effect
    return shifted


def _spread_left(model: LengthModel, batch: Batch, is_finished: FloatArray) -> FloatArray:
    """Return the scale of the error, [B], that is left when some samples have finished.

    The noise of a sample, of variance w^2, stays. With f finished siblings the variance b^2 of a prompt effect becomes
    ``b^2 / (1 + f * b^2 / w^2)``, and each group adds ``f / (f * b^2 + w^2)`` to the precision of the level (normal
    posteriors).
    """
    finished = np.bincount(batch.group_of, weights=is_finished, minlength=len(batch.prompt_ids))
    between = model.between**2 / (1 + finished * model.between**2 / model.within**2)
    told = np.sum(finished / (finished * model.between**2 + model.within**2))
    level = 1 / (1 / (model.doubt**2 + model.wander**2) + told)
    spread: FloatArray = np.sqrt(model.within**2 + between[batch.group_of] + level)
    return spread


def learn(model: LengthModel, batch: Batch, lengths: IntArray) -> LengthModel:
    """Return the model after a step whose lengths, [B] int64, are all known.

    Level and trend follow by a filter of their own; spreads, slope, recall and the curve of errors are means that weigh
    a step by its samples, against at most ``_MOST_SAMPLES`` of earlier ones.
    """
    log_length = np.log(np.maximum(lengths, 1))
    log_prompt = np.log(np.maximum(batch.prompt_tokens, 1))
    group_length, group_prompt = group_means(batch, log_length), group_means(batch, log_prompt)
    known = min(model.num_samples, _MOST_SAMPLES)
    rate = batch.num_samples / (batch.num_samples + known)
    between, within = spreads(batch, log_length, (model.between, model.within))
    new = replace(model, between=_mix(model.between, between, rate), within=_mix(model.within, within, rate))
    new = _with_level(new, batch, group_length, float(log_prompt.mean()))
    new = replace(new, slope=_mix(model.slope, ridge_slope(group_prompt, group_length, between), rate))
    # errors are standardised by what is known after the step; the first step's spreads are its own, not the guesses
    scale = new if model.level is not None else replace(new, between=between, within=within)
    mu, unknown = _expected(replace(scale, trend=0.0), batch)
    left = _weights(new, batch)[1] - new.doubt**2  # of a mean that the level did not wholly follow: no sample's error
    variance = np.maximum(scale.within**2 + unknown[batch.group_of] - left, LEAST_WITHIN**2)
    assert new.level is not None
    seen = group_length - new.level - new.slope * (group_prompt - new.log_prompt)
    return replace(
        new,
        recall=_mix(model.recall, _recall(model, batch.prompt_ids, seen), rate),
        survival=learn_residuals(
            model.survival, (log_length - mu) / np.sqrt(variance), lengths >= batch.max_response_tokens, rate
        ),
        longest=max(_LONGEST_KEPT * model.longest, float(lengths.max())) if batch.num_samples >= _TAIL_SAMPLES else 0.0,
        effects=_remembered(model.effects, batch.prompt_ids, seen * _told(new, group_sizes(batch))),
        num_samples=known + batch.num_samples,
    )


def _with_level(model: LengthModel, batch: Batch, group_length: FloatArray, log_prompt: float) -> LengthModel:
    """Return the model whose level has followed a step: a Kalman filter with a damped trend (Holt).

    The level is expected to be ``level + trend``, with the variance ``doubt^2 + wander^2``. A step shows it with
    ``noise``: the variance of what its few prompts and samples leave open. So it follows the surprise by the gain
    ``(doubt^2 + wander^2) / (noise + doubt^2 + wander^2)``, and its variance becomes ``gain * noise``. A surprise
    beyond noise and doubt says that the level wanders, and so at once how far to follow.

    Args:
        model: Before, but for the spreads.
        batch: The prompts.
        group_length: [G] mean log lengths.
        log_prompt: Mean log prompt tokens, to which the new level belongs.
    """
    mu, _ = _expected(model, batch)
    weight, noise = _weights(model, batch)
    surprise = float(weight @ (group_length - group_means(batch, mu)))
    if model.level is None:
        return replace(model, level=float(mu[0]) + surprise, doubt=math.sqrt(noise), log_prompt=log_prompt)
    wandered = _mix(model.wander**2, surprise**2 - noise - model.doubt**2, _EWMA_WANDER)
    wander = max(math.sqrt(max(wandered, 0.0)), _LEAST_WANDER)
    gain = 1 - noise / (noise + model.doubt**2 + wander**2)
    return replace(
        model,
        level=model.level + model.trend + model.slope * (log_prompt - model.log_prompt) + gain * surprise,
        trend=_TREND_KEPT * (model.trend + _TREND_RATE * gain * surprise),
        doubt=math.sqrt(gain * noise),
        wander=wander,
        log_prompt=log_prompt,
    )


def _weights(model: LengthModel, batch: Batch) -> tuple[FloatArray, float]:
    """Return how much each group's mean, [G], tells of the level, and the variance of what they tell together."""
    _, unknown = _expected(model, batch)
    told = 1 / (unknown + model.within**2 / group_sizes(batch))
    return told / told.sum(), float(1 / told.sum())


def _mix(old: float, new: float, rate: float) -> float:
    """Return the mean in which the new value has the weight ``rate``."""
    return (1 - rate) * old + rate * new


def _remembered(effects: Mapping[str, float], prompt_ids: tuple[str, ...], seen: FloatArray) -> dict[str, float]:
    """Return the effects of prompts after a visit of ``prompt_ids``, [G], with the effects ``seen``, [G]."""
    after = dict(effects)
    for prompt, value in zip(prompt_ids, seen.tolist(), strict=True):
        after[prompt] = _mix(after[prompt], value, _EWMA_PROMPT) if prompt in after else value
    return after


def _recall(model: LengthModel, prompt_ids: tuple[str, ...], seen: FloatArray) -> float:
    """Return how much of the remembered effects came back; the old value when too few prompts recur.

    The slope, from 0 to 1, of the regression of new effects on remembered ones through the origin.

    Args:
        model: Before the step.
        prompt_ids: [G] prompts of the step.
        seen: [G] their effects in it.
    """
    pairs = [
        (model.effects[p], value) for p, value in zip(prompt_ids, seen.tolist(), strict=True) if p in model.effects
    ]
    if len(pairs) < _LEAST_RECURRING:
        return model.recall
    old, new = np.array(pairs).T
    return float(np.clip(old @ new / (old @ old + 1e-9), 0.0, 1.0))
