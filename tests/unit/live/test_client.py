"""What an error of a call says about its server."""

from __future__ import annotations

import pytest

pytest.importorskip("verl", reason="needs verl")

from ray import exceptions

from verl_rlhfless.live.client import _end_by
from verl_rlhfless.live.tickets import OutcomeKind


class EngineDeadError(Exception):
    """Named as vLLM's."""


def task_error(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("generate", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (exceptions.ActorDiedError(), OutcomeKind.LOST),
        (exceptions.OutOfMemoryError("the node ran low on memory"), OutcomeKind.LOST),
        (exceptions.NodeDiedError("gone"), OutcomeKind.LOST),
        (exceptions.WorkerCrashedError(), OutcomeKind.LOST),
        (task_error(EngineDeadError()), OutcomeKind.LOST),
        (exceptions.ActorUnavailableError("not now", b"0" * 16), OutcomeKind.CUT),
        (exceptions.OwnerDiedError("0" * 56, "", "stack"), OutcomeKind.CUT),
        (task_error(ValueError("too long")), OutcomeKind.FAILED),
        (task_error(MemoryError()), OutcomeKind.FAILED),
        (exceptions.TaskCancelledError(), OutcomeKind.FAILED),
    ],
)
def test_only_a_death_is_tried_again(error: Exception, kind: OutcomeKind) -> None:
    assert _end_by(error) is kind
