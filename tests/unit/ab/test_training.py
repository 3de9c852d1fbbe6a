"""One arm's command runs where and with what it should, is told step by step, and ends whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from verl_rlhfless.ab import training as module
from verl_rlhfless.ab.cluster import Cluster
from verl_rlhfless.ab.training import Training, train
from verl_rlhfless.errors import RlhflessError

STEP = '{"step": %d, "data": {"timing_s/step": 1.5%s}}'


@pytest.fixture
def arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """An arm on a cluster that is none, watched by nobody; its command is given by a test."""
    monkeypatch.setattr(module, "Observer", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(module, "_POLL_S", 0.01)

    @contextlib.contextmanager
    def cluster(environment: Mapping[str, str]) -> Iterator[Cluster]:
        yield Cluster("host:1", "run", environment, frozenset(), overrides=("from.cluster=1",))

    monkeypatch.setattr(Cluster, "leftovers", lambda self: ["process 7"])
    return Training((), tmp_path / "stock", cluster, {"COLOUR": "blue"}, cwd=tmp_path)


def run(arm: Training, program: str) -> tuple[module.ArmOutcome, list[str]]:
    said: list[str] = []
    return train(replace(arm, argv=["bash", "-c", program, "arm"]), said.append), said


def test_the_command_gets_the_environment_the_clusters_overrides_and_its_folder(arm: Training, tmp_path: Path) -> None:
    outcome, _ = run(arm, 'echo "$COLOUR $RAY_ADDRESS $RLHFLESS_OBSERVER_DIR $VERL_FILE_LOGGER_PATH $PWD $@"')
    folder = tmp_path / "stock"
    said = (folder / "train.log").read_text().split()
    assert said == ["blue", "host:1", str(folder), str(folder / "metrics.jsonl"), str(tmp_path), "from.cluster=1"]
    assert (outcome.exit_code, outcome.why, outcome.leftovers) == (0, None, ("process 7",))


def test_steps_are_told_as_they_come_and_a_validation_is_none(arm: Training) -> None:
    lines = ['{"step": 0, "data": {"val/reward": 1}}', STEP % (1, ', "critic/score/mean": 0.25'), STEP % (2, "")]
    printed = "; ".join(f"echo '{line}' >> stock/metrics.jsonl" for line in lines)
    _, said = run(arm, f"{printed}; printf '{STEP % (3, '')}' >> stock/metrics.jsonl")
    assert [line.split(",")[0] for line in said[1:]] == ["step 1 took 1.5 s (reward 0.250)", "step 2 took 1.5 s"]


def test_a_command_that_fails_says_why(arm: Training) -> None:
    outcome, _ = run(arm, "echo 'rlhfless: error: too few GPUs'; exit 3")
    assert outcome.exit_code == 3
    assert outcome.why is not None and outcome.why.startswith("verl ended with exit code 3: rlhfless: error: too few")


def test_a_command_that_does_not_end_is_ended(arm: Training) -> None:
    with pytest.raises(RlhflessError, match=r"did not end within 0\.2 s; see .*train\.log"):
        run(replace(arm, timeout_s=0.2), "sleep 600")


def test_a_script_that_ends_well_without_its_steps_has_failed(arm: Training) -> None:
    did = f"echo '{STEP % (1, '')}' > stock/metrics.jsonl; (echo 'ValueError: no memory'; exit 1) | tee log"
    outcome, _ = run(replace(arm, num_steps=2), did)
    assert outcome.exit_code == 0
    assert outcome.why is not None and outcome.why.startswith("verl ended after 1 of 2 steps: ValueError: no memory")
    assert run(replace(arm, num_steps=1), did)[0].why is None
