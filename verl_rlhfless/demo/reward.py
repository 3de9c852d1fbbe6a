"""The demo's rule-based reward, in the form that verl's ``reward.custom_reward_function`` expects."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """Return 1 for a response that ends in the right number, plus a share in [0, 1] for the digits in it.

    The dense share keeps GRPO's advantages away from zero while the model is still random.
    """
    numbers = _NUMBER.findall(solution_str)
    is_right = bool(numbers) and numbers[-1].replace(",", "").rstrip(".") == ground_truth
    digits = sum(character.isdigit() for character in solution_str)
    return float(is_right) + digits / max(1, len(solution_str))
