"""The targets of the comparison, held against what was simulated: met, missed, or out of reach.

Out of reach means that the same policies with true lengths miss it too; the figure that they reach stands beside it,
and the analytic bound where there is one. The distance to the oracle is out of reach where the same policies miss it
that know every prompt's true mean and spread: only who knows single samples beforehand comes nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A limit for one figure of an arm over long or other cells; ``is_least``: the figure must reach it from below.

    ``oracle`` is the arm that shows what can be reached.
    """

    text: str
    arm: str
    oracle: str
    limit: float
    figure: Callable[[Row, str], float]
    is_long: bool = True
    is_least: bool = False
    bound: str | None = None

    def is_met(self, value: float) -> bool:
        """Return whether a figure meets it."""
        return value >= self.limit if self.is_least else value <= self.limit


def _of(key: str) -> Callable[[Row, str], float]:
    return lambda row, arm: float(row["arms"][arm][key])


def _over(key: str, other: str) -> Callable[[Row, str], float]:
    return lambda row, arm: float(row["arms"][arm][key] / row["arms"][other][key])


TARGETS = (
    Target("step, times faster than stock", "ours", "oracle", 1.35, _of("x_stock"), is_least=True),
    Target("cost over stock's", "ours", "oracle", 0.55, _of("cost_stock")),
    Target("cost over RLHFuse's", "ours", "oracle", 0.87, _over("usd_per_step", "rlhfuse")),
    Target("cost over the best static's", "ours_notslower", "oracle_notslower", 0.60, _of("cost_best"),
           bound="notslower_cost_best"),
    Target("step over the best static's", "ours_notslower", "oracle_notslower", 1.0, _of("t_best")),
)  # fmt: skip
"""Means over cells."""

EACH = (
    Target("objective over RLHFuse's", "ours", "oracle", 1.0, _over("objective", "rlhfuse")),
    Target("objective over RLHFless'", "ours", "oracle", 1.0, _over("objective", "rlhfless_paper")),
    Target("objective over the oracle's", "ours", "oracle_prompts", 1.1, _over("objective", "oracle")),
    Target("step over the best static's", "ours", "oracle", 1.02, _of("t_best"), is_long=False),
    Target("cost over the best static's", "ours", "oracle", 1.0, _of("cost_best"), is_long=False),
)
"""In every cell."""


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one entry for each target whose arms ran in every cell that it speaks of."""
    found = []
    for target in (*TARGETS, *EACH):
        cells = [row for row in rows if row["is_long"] == target.is_long]
        needed = {target.arm, target.oracle, "oracle", "rlhfuse", "rlhfless_paper"}
        if not cells or not all(needed <= row["arms"].keys() for row in cells):
            continue
        found.append(_in_each(target, cells) if target in EACH else _in_the_mean(target, cells))
    return found


def _in_the_mean(target: Target, cells: Sequence[Row]) -> dict[str, Any]:
    value, oracle = (
        round(float(np.mean([target.figure(row, arm) for row in cells])), 3) for arm in (target.arm, target.oracle)
    )
    entry: dict[str, Any] = {"target": f"{target.text}: mean", "arm": target.arm, "limit": target.limit}
    entry |= {"cells": len(cells), "value": value, "with_true_lengths": oracle}
    if target.bound is not None:
        entry["bound"] = round(float(np.mean([row["bound"][target.bound] for row in cells])), 3)
    if target.is_met(value):
        return entry | {"verdict": "met"}
    return entry | {
        "verdict": "missed" if target.is_met(oracle) else f"out of reach: {oracle:g} even with true lengths"
    }


def _in_each(target: Target, cells: Sequence[Row]) -> dict[str, Any]:
    missed = {row["cell"]: round(target.figure(row, target.arm), 3) for row in cells}
    missed = {cell: value for cell, value in missed.items() if not target.is_met(value)}
    oracle = {row["cell"]: round(target.figure(row, target.oracle), 3) for row in cells if row["cell"] in missed}
    out = {cell: value for cell, value in oracle.items() if not target.is_met(value)}
    entry = {"target": f"{target.text}: each cell", "arm": target.arm, "limit": target.limit}
    entry |= {"cells": len(cells), "met": len(cells) - len(missed), "missed": missed, "out_of_reach": out}
    return entry | {"verdict": "met" if not missed else "out of reach" if len(out) == len(missed) else "missed"}
