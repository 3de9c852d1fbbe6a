"""What is saved of a trainer that lost its GPUs, and what its user reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.suspended_checkpoint import save_suspended


class Trainer:
    """Stands for verl's trainer in the rollout of step 4."""

    def __init__(self, folder: Path, refusal: str = "", failure: Exception | None = None) -> None:
        self.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=str(folder)))
        self.actor_rollout_wg = self
        self._settings = RlhflessConfig()
        self.global_steps = 4
        self.train_dataloader: Any = SimpleNamespace(state_dict=lambda: "after step 4")
        self.saved: list[Any] = []
        self._refusal, self._failure = refusal, failure

    def stay_on_host(self, timeout_s: float) -> None:
        if self._refusal:
            raise UnsupportedError(self._refusal)
        self.saved.append("stays on the host")

    def _save_checkpoint(self) -> None:
        if self._failure is not None:
            raise self._failure
        self.saved.append((self.global_steps, self.train_dataloader.state_dict()))


def test_the_last_update_is_saved_with_the_prompts_that_follow_it(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    text = save_suspended(trainer, 3, "after step 3")
    assert trainer.saved == ["stays on the host", (3, "after step 3")]
    assert f"The state after step 3 is in {tmp_path / 'global_step_3'}" in text
    assert "trainer.resume_mode=auto" in text


def test_a_checkpoint_that_is_there_is_not_saved_again(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    trainer = Trainer(tmp_path)
    assert "The state after step 3 is in" in save_suspended(trainer, 3, None)
    assert trainer.saved == []


def test_before_the_first_update_there_is_nothing_to_save(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    assert save_suspended(trainer, 0, None).startswith("No step was trained yet.")
    assert trainer.saved == []


@pytest.mark.parametrize(("last", "told"), [("2", "the last one is of step 2"), ("", "there is none")])
def test_a_state_that_can_not_be_read_on_the_host_is_told(tmp_path: Path, last: str, told: str) -> None:
    if last:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(last)
    text = save_suspended(Trainer(tmp_path, refusal="needs its device"), 3, None)
    assert f"No checkpoint of step 3 was saved (needs its device); {told}." in text


def test_a_checkpoint_that_can_not_be_written_does_not_hide_that_the_lease_was_lost(tmp_path: Path) -> None:
    text = save_suspended(Trainer(tmp_path, failure=OSError(28, "No space left on device")), 3, None)
    assert "No checkpoint of step 3 was saved" in text and "No space left on device" in text
