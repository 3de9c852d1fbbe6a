"""What of a request's sampling parameters holds when it is cut and continues on another engine.

The tokens so far are prompt to the next engine, which counts, compares and constrains only what it generates itself.
Limits are lowered by what was generated, stop strings are looked for across the cut, and whatever depends on neither
the engine nor on how much it generated needs nothing. A request with any other parameter can't be continued.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GENERATED = "rlhfless_generated"
"""Key of ``extra_args``: how many tokens at the prompt's end are the response so far."""

_HOLD = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",  # counts the prompt too
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "max_tokens",
        "max_new_tokens",
        "min_tokens",
        "logprobs",
        "logprob_token_ids",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "logit_bias",
        "allowed_token_ids",
        "skip_reading_prefix_cache",
        "routed_experts_prompt_start",
    }
)


def lost_by_a_cut(params: Mapping[str, Any]) -> str | None:
    """Return the first parameter that is set and that a continuation would not keep, ``None`` if there is none."""
    is_set = {name: value is not None if name == "seed" else bool(value) for name, value in params.items()}
    return next((name for name in params if is_set[name] and name not in _HOLD), None)


def params_of_attempt(params: Mapping[str, Any], num_generated: int, budget_left: int) -> dict[str, Any]:
    """Return the parameters of the attempt that goes on after ``num_generated`` tokens."""
    attempt = {**params, "max_tokens": budget_left}
    attempt.pop("max_new_tokens", None)
    if num_generated and params.get("min_tokens"):
        attempt["min_tokens"] = max(0, params["min_tokens"] - num_generated)
    if num_generated and params.get("stop"):
        attempt["extra_args"] = {GENERATED: num_generated}
    return attempt
