"""A comparison as Markdown: arms against the first one, steps, predictions, guards, and what it was measured with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from verl_rlhfless.report.predictions import Prediction
from verl_rlhfless.report.table import is_asynchronous

_UNKNOWN = "-"
_Format = Callable[[Any], str]
_SECONDS: _Format = "{:,.1f}".format
_COUNT: _Format = "{:,.0f}".format
_COLUMNS: tuple[tuple[str, str, _Format], ...] = (
    ("step s", "step_s", _SECONDS),
    ("gen s", "gen_s", _SECONDS),
    ("leased GPU-s", "gpu_s_allocated", _SECONDS),
    ("busy", "gpu_s_busy", _SECONDS),
    ("idle", "gpu_s_idle", _SECONDS),
    ("start-up", "gpu_s_startup", _SECONDS),
    ("parked", "gpu_s_parked", _SECONDS),
    ("max GPUs", "max_gpus", _COUNT),
    ("replicas", "num_replicas", _COUNT),
    ("samples", "num_samples", _COUNT),
    ("response tokens", "response_tokens", _COUNT),
    ("reward", "reward_mean", "{:.3f}".format),
    ("prob. diff", "rollout_probs_diff_max", "{:.1e}".format),
)
_COMPARED = ("step_s", "gpu_s_allocated", "gpu_s_busy", "gpu_s_idle", "gpu_s_startup")
_WARM_UP = 1


def markdown(record: Mapping[str, Any], planned: Mapping[str, Sequence[Prediction]], figures: Mapping[str, str]) -> str:
    """Return the report.

    Args:
        record: An ``rlhfless-ab/1`` record.
        planned: What was predicted and measured, by arm.
        figures: Paths of pictures, relative to the report, by title.
    """
    arms = record["arms"]
    parts = ["# Comparison of arms" if len(arms) != 1 else f"# Run {next(iter(arms))}", *_setting(record)]
    parts += [f"**{name} failed:** {why}" for name, why in (record.get("failed") or {}).items()]
    if arms:
        parts += ["## Whole run", _totals(arms), _LEGEND, *_ratios(arms)]
    if any(map(is_asynchronous, arms.values())):
        parts.append(r"\* asynchronous: trains on samples of older weights, which is another algorithm.")
    if figures:
        parts += ["## Who leased what", *(f"{title}:\n\n![{title}]({path})" for title, path in figures.items())]
    if arms:
        parts += ["## Steps", _steps(arms)]
    if any(planned.values()):
        parts += ["## Predicted and measured", _predictions(planned)]
    if record["guards"]:
        parts += ["## Guards", _guards(record["guards"])]
    if record.get("overrides"):
        parts += ["## Overrides of each arm", *_overrides(record["overrides"])]
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "leased = busy + idle + start-up, from the first grant to the last release; step s, gen s and reward are means "
    "over the steps. A GPU is *busy* while a trainer phase runs or its engine has a request, *starting up* from its "
    "grant to its first use. *Parked* are engines that sleep without a lease, at no charge. - = not known. Validation "
    "is in the GPU-seconds but not in step s, which is verl's own timer; gen s is its wait for samples, before which "
    "an elastic step has begun to start replicas. Arms run one after another: the first one also fills the caches "
    "(files of the model, compiled kernels) that later ones find at their start."
)


def _setting(record: Mapping[str, Any]) -> list[str]:
    lines = []
    recipe = record.get("recipe")
    if recipe:
        lines.append(f"Recipe, {recipe['steps']} steps:\n\n```bash\n{recipe['text']}\n```")
    if "versions" in record:
        stack = ", ".join(f"{name} {version or 'missing'}" for name, version in record["versions"].items())
        host = record["hardware"]
        lines.append(
            f"{host['gpus_declared']} GPUs{_gpu_names(host)}; {host['cpu']}, {host['cores']} cores, "
            f"{host['memory_bytes'] / 2**30:.0f} GiB; seed {record['seed']}; {stack}."
        )
    return lines


def _gpu_names(host: Mapping[str, Any]) -> str:
    names = ", ".join(dict.fromkeys(host.get("gpus") or ()))  # records of the first versions name none
    return f" ({names})" if names else ""


def _name(name: str, arm: Mapping[str, Any]) -> str:
    return rf"{name}\*" if is_asynchronous(arm) else name


def _totals(arms: Mapping[str, Any]) -> str:
    rows = [[_name(name, arm), *_cells(arm["total"]), _cell(arm["total"], "wall_s")] for name, arm in arms.items()]
    return _table(["arm", *(title for title, _, _ in _COLUMNS), "wall s"], rows)


def _ratios(arms: Mapping[str, Any]) -> list[str]:
    """Return the steps after the warm-up that both did, each arm divided by the first one."""
    steps = {name: {step["step"]: step for step in arm["steps"][_WARM_UP:]} for name, arm in arms.items()}
    first, *others = arms
    rows = []
    for name in others:
        both = sorted(steps[first].keys() & steps[name].keys())
        of, reference = ([steps[arm][step] for step in both] for arm in (name, first))
        if both:
            ratios = (_ratio(_mean_of(of, key), _mean_of(reference, key)) for key in _COMPARED)
            rows.append([_name(name, arms[name]), str(len(both)), *ratios])
    if not rows:
        return []
    titles = {key: title for title, key, _ in _COLUMNS}
    head = f"Steps after the first that both did, divided by those of {first} (means; start and warm-up left out):"
    return [head, _table(["arm", "steps", *(titles[key] for key in _COMPARED)], rows)]


def _mean_of(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [step[key] for step in steps if step[key] is not None]
    return sum(known) / len(known) if len(known) == len(steps) else None


def _ratio(value: float | None, reference: float | None) -> str:
    return _UNKNOWN if value is None or not reference else f"{value / reference:.2f}"


def _steps(arms: Mapping[str, Any]) -> str:
    rows = [[_name(name, arm), str(step["step"]), *_cells(step)] for name, arm in arms.items() for step in arm["steps"]]
    return _table(["arm", "step", *(title for title, _, _ in _COLUMNS)], rows)


def _predictions(planned: Mapping[str, Sequence[Prediction]]) -> str:
    rows = [
        [
            name,
            str(one.step),
            one.figure,
            f"{one.predicted:,.1f}",
            _UNKNOWN if one.measured is None else f"{one.measured:,.1f}",
            _UNKNOWN if one.error is None else f"{100 * one.error:+.0f} %",
        ]
        for name, found in planned.items()
        for one in found
    ]
    return _table(["arm", "step", "figure", "predicted", "measured", "error"], rows)


def _guards(guards: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [guard["name"], _figure(guard["value"]), _figure(guard["limit"]), "ok" if guard["ok"] else "**FAILED**"]
        for guard in guards
    ]
    return _table(["guard", "value", "limit", "verdict"], rows)


def _overrides(overrides: Mapping[str, Sequence[str]]) -> list[str]:
    return ["\n".join([f"`{name}`:", "", "```text", *values, "```"]) for name, values in overrides.items()]


def _figure(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3g}"


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [_cell(figures, key, form) for _, key, form in _COLUMNS]


def _cell(figures: Mapping[str, Any], key: str, form: _Format = _SECONDS) -> str:
    value = figures[key]
    return _UNKNOWN if value is None else form(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
