"""The checkpoint of a trainer that lost its GPUs while it was suspended: verl's own, read from the host.

On a GPU platform it was not run yet. There the ranks use the context that they kept on their devices for verl's
barriers and for the random state, and no other device memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl_rlhfless.errors import RlhflessError

_TRACKER = "latest_checkpointed_iteration.txt"  # verl's


class _DataState:
    """Stands for the data loader while verl saves it: its state before the prompts of the lost step were taken."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> Any:
        return self._state


def save_suspended(trainer: Any, step: int, data_state: Any) -> str:
    """Save a suspended trainer, as its last act, and return a sentence that says where the run goes on from.

    Args:
        trainer: verl's trainer, whose worker group is suspended.
        step: The last step whose update it holds.
        data_state: Where its data loader was after that step.
    """
    folder = Path(trainer.config.trainer.default_local_dir)
    again = "Start the same command again, with trainer.resume_mode=auto, when the GPUs are free."
    if step == 0:
        return "No step was trained yet. Start the same command again when the GPUs are free."
    saved = _saved_step(folder)
    if saved != step:
        try:
            trainer.actor_rollout_wg.stay_on_host(trainer._settings.pool.resume_timeout_s)
            trainer.global_steps, trainer.train_dataloader = step, _DataState(data_state)
            trainer._save_checkpoint()
        except Exception as error:  # noqa: BLE001  told with what ends the run: the lease that did not come back
            last = f"the last one is of step {saved}" if saved else "there is none"
            why = str(error) if isinstance(error, RlhflessError) else repr(error)
            return f"No checkpoint of step {step} was saved ({why}); {last}. {again}"
    return f"The state after step {step} is in {folder / f'global_step_{step}'}. {again}"


def _saved_step(folder: Path) -> int | None:
    tracker = folder / _TRACKER
    return int(tracker.read_text()) if tracker.exists() else None
