"""Two runs in one Ray cluster: the second one ends before it takes a sample of the first, and leaves it alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl")

from transfer_queue import interface
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live import own_queue
from verl_rlhfless.live.request_trainer import RequestTrainer


def joined(monkeypatch: pytest.MonkeyPatch, job: str | None) -> list[Any]:
    """Let this process, of job 02000000, have joined the queue of a job; return what verl sets up or ends then."""
    done: list[Any] = []
    handle = SimpleNamespace(_actor_id=SimpleNamespace(job_id=SimpleNamespace(hex=lambda: job)))
    monkeypatch.setattr(interface, "_TQ_CONTROLLER", handle if job else None)
    monkeypatch.setattr(interface.ray, "kill", done.append)
    here = SimpleNamespace(get_job_id=lambda: "02000000")
    monkeypatch.setattr(own_queue.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(PPOTrainerSync, "init", lambda self: done.append("set up"))
    return done


def test_a_run_that_joined_the_queue_of_another_one_is_refused_and_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = joined(monkeypatch, "01000000")
    with pytest.raises(UnsupportedError, match=r"another run of verl \(Ray job 01000000\) uses this cluster"):
        RequestTrainer.__new__(RequestTrainer).init()
    interface.close()
    assert done == []


@pytest.mark.parametrize("job", ["02000000", None])
def test_a_queue_of_this_run_is_used(monkeypatch: pytest.MonkeyPatch, job: str | None) -> None:
    done = joined(monkeypatch, job)
    RequestTrainer.__new__(RequestTrainer).init()
    assert done == ["set up"]
