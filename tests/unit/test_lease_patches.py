"""The two patches that leases need: what they answer, what they undo, and that a changed upstream is refused."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.worker import Worker
from verl.single_controller.ray import base

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import ray_leased_devices, verl_worker_group

METHOD = "get_accelerator_ids_for_accelerator_resource"


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Apply the patch to a process whose lease gave it devices 2 and 3; Ray itself assigned what ``ray_ids`` says."""
    ray_ids: dict[str, list[Any]] = {}

    def stock(self: Any, resource_name: str, resource_regex: str) -> list[Any]:
        return ray_ids.get(resource_name, [])

    monkeypatch.setattr(Worker, METHOD, stock)
    monkeypatch.setenv("RLHFLESS_LEASED_DEVICES", "GPU:2,3")
    ray_leased_devices.apply()
    return ray_ids, lambda resource: getattr(Worker, METHOD)(None, resource, "")


def test_a_leased_process_knows_its_devices(patched: Any) -> None:
    _, answer = patched
    assert answer("GPU") == ["2", "3"]
    assert answer("TPU") == []


def test_devices_that_ray_assigned_win(patched: Any) -> None:
    ray_ids, answer = patched
    ray_ids["GPU"] = [1]
    assert answer("GPU") == [1]


def test_applying_twice_wraps_once(patched: Any) -> None:
    before = getattr(Worker, METHOD)
    ray_leased_devices.apply()
    assert getattr(Worker, METHOD) is before


def test_importing_the_patch_without_a_lease_changes_nothing() -> None:
    assert not hasattr(getattr(Worker, METHOD), "_rlhfless")


def test_a_changed_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFLESS_LEASED_DEVICES", "GPU:0")
    monkeypatch.setattr(Worker, METHOD, lambda self, resource_name: [])
    with pytest.raises(UnsupportedError, match=f"changed Worker.{METHOD}"):
        ray_leased_devices.apply()


def test_the_environment_keeps_the_users_external_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "users.module")
    env = ray_leased_devices.leased_devices_env("GPU", ("0", "3"))
    assert env == {
        "RLHFLESS_LEASED_DEVICES": "GPU:0,3",
        "VERL_USE_EXTERNAL_MODULES": "users.module,verl_rlhfless_patches.ray_leased_devices",
    }
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", env["VERL_USE_EXTERNAL_MODULES"])
    assert ray_leased_devices.leased_devices_env("GPU", ("0", "3")) == env


def trainer_module(group: object = base.RayWorkerGroup) -> Any:
    class PPOTrainer:
        def _setup(self) -> object:
            return RayWorkerGroup  # type: ignore[name-defined]  # noqa: F821

    return SimpleNamespace(RayWorkerGroup=group, PPOTrainer=PPOTrainer)


def test_the_installed_verl_has_the_expected_shape() -> None:
    verl_worker_group.check(trainer_module())


def test_the_trainers_worker_group_is_another_only_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_module()
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.v1", SimpleNamespace(trainer_base=trainer))
    other = type("Other", (base.RayWorkerGroup,), {})
    with pytest.raises(ZeroDivisionError), verl_worker_group.use(other):
        assert trainer.RayWorkerGroup is other
        raise ZeroDivisionError
    assert trainer.RayWorkerGroup is base.RayWorkerGroup


def test_a_trainer_without_the_global_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no module global RayWorkerGroup"):
        verl_worker_group.check(trainer_module(group=object))


def test_a_changed_worker_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.RayWorkerGroup, "_create_worker", lambda self, rank: None)
    with pytest.raises(UnsupportedError, match=r"RayWorkerGroup\._create_worker takes \('self', 'rank'\)"):
        verl_worker_group.check(trainer_module())
