"""A trace is cut and scaled to the demo, and the least prefill is what a prefix cache can't avoid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_rlhfless.ab.arms import ablated
from verl_rlhfless.demo.recipe import ELASTIC, STOCK
from verl_rlhfless.demo.workload import Size, default_trace, fit, least_prefill
from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.trace import read_header, read_trace


def write_trace(path: Path, *steps: dict[str, list[int]]) -> Path:
    header = {
        "format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "max_response_tokens": 1000, "n": 4,
        "kind": "recorded", "source": "s", "licence": "l", "note": "",
    }  # fmt: skip
    lines = [header] + [
        {
            "step": number,
            "epoch": 1,
            "groups": [{"prompt_id": p, "prompt_tokens": 9, "response_tokens": r} for p, r in groups.items()],
        }
        for number, groups in enumerate(steps, 1)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def lengths(path: Path) -> list[list[list[int]]]:
    return [[list(group.response_tokens) for group in step.groups] for step in read_trace(path)]


def test_lengths_and_cap_are_scaled_and_extra_samples_left_out(tmp_path: Path) -> None:
    source = write_trace(tmp_path / "t.jsonl", {"a": [1000, 400, 1, 7], "b": [10, 20, 30, 40]})
    work = fit(source, tmp_path, Size(2, 3, 100), seed=1)
    assert work.scale == 0.1
    assert lengths(work.trace) == [[[100, 40, 1], [1, 2, 3]]]
    assert read_header(work.trace).max_response_tokens == 100


def test_prompts_that_come_again_keep_their_row(tmp_path: Path) -> None:
    source = write_trace(
        tmp_path / "t.jsonl", {"a": [10] * 4, "b": [20] * 4}, {"c": [30] * 4, "b": [21] * 4}, {"a": [11] * 4}
    )
    work = fit(source, tmp_path, Size(2, 4, 1000), seed=1)
    assert lengths(work.trace) == [[[10] * 4, [20] * 4], [[11] * 4, [21] * 4]]
    assert len(work.problems) == 2


def test_a_trace_that_never_comes_back_has_new_prompts_in_every_step(tmp_path: Path) -> None:
    source = write_trace(tmp_path / "t.jsonl", {"a": [10] * 4, "b": [20] * 4}, {"c": [30] * 4, "d": [21] * 4})
    work = fit(source, tmp_path, Size(2, 4, 1000), seed=1)
    assert len(lengths(work.trace)) == 2 and len(work.problems) == 4


def test_a_trace_that_is_too_small_is_refused(tmp_path: Path) -> None:
    source = write_trace(tmp_path / "t.jsonl", {"a": [10] * 4})
    with pytest.raises(ConfigError, match=r"--trace=.*at least 2 groups of 4 responses"):
        fit(source, tmp_path, Size(2, 4, 100), seed=1)
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        fit(tmp_path / "missing.jsonl", tmp_path, Size(2, 4, 100), seed=1)


def test_the_default_trace_has_a_long_tail_and_recurring_prompts(tmp_path: Path) -> None:
    work = fit(default_trace(tmp_path / "d.jsonl", seed=1), tmp_path, Size(16, 16, 256), seed=1)
    all_lengths = sorted(n for step in lengths(work.trace) for group in step for n in group)
    assert len(lengths(work.trace)) == 8 and len(work.problems) == 16
    assert all_lengths[-1] == 256 > 4 * all_lengths[len(all_lengths) // 2]


@pytest.mark.parametrize(
    ("prompts", "samples", "least"),
    [
        ([[1, 2, 3, 4, 5]], 1, 5),
        ([[1, 2, 3, 4, 5]], 3, 4 + 3),  # one full block of four once, the last token for everybody
        ([[1, 2, 3, 4]], 3, 12),  # no full block before the last token
        ([[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 0, 6, 7, 8, 9]], 2, 4 + 4 + 4 + 2 * 2),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 1, 4 + 2),
    ],
)
def test_least_prefill_at_the_granularity_of_blocks(prompts: list[list[int]], samples: int, least: int) -> None:
    assert least_prefill(prompts, samples, block=4) == least


def test_ablation_leaves_out_one_part_at_a_time_and_nothing_of_stock() -> None:
    assert ablated(STOCK) == [STOCK]
    names = [arm.name for arm in ablated(ELASTIC)]
    assert names == [
        "elastic",
        "elastic-router-only",
        "elastic-no-dispatcher",
        "elastic-no-dedup",
        "elastic-no-migration",
        "elastic-no-fusion",
        "elastic-no-parking",
    ]
