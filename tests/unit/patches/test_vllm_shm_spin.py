"""With the patch no reader spins or sleeps long; an unknown vLLM is refused."""

from __future__ import annotations

from types import ModuleType

import pytest

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import vllm_shm_spin


def fake_module() -> ModuleType:
    class SpinCondition:
        def __init__(self, is_reader: bool, context: object, notify_address: str, busy_loop_s: float = 1) -> None:
            self.busy_loop_s = busy_loop_s
            self.polled_ms: list[int | None] = []

        def wait(self, timeout_ms: int | None = None) -> None:
            self.polled_ms.append(timeout_ms)

    module = ModuleType("shm_broadcast")
    module.__dict__.update(SpinCondition=SpinCondition, SPINLOOP_EXT_ENABLED=True)
    return module


def test_spin_is_off_and_polls_are_short() -> None:
    module = fake_module()
    vllm_shm_spin._patch(module)
    vllm_shm_spin._patch(module)  # vLLM may call its plugins twice

    condition = module.SpinCondition(is_reader=True, context=None, notify_address="ipc://x", busy_loop_s=1)
    for timeout_ms in (None, 5000, 1, 0):
        condition.wait(timeout_ms=timeout_ms)

    assert condition.busy_loop_s == 0
    assert condition.polled_ms == [2, 2, 1, 0]
    assert module.SPINLOOP_EXT_ENABLED is False


@pytest.mark.parametrize("change", ["no class", "no wait", "other wait", "other init", "no switch"])
def test_an_unknown_vllm_is_refused(change: str) -> None:
    module = fake_module()
    if change == "no class":
        del module.SpinCondition
    elif change == "no wait":
        del module.SpinCondition.wait
    elif change == "other wait":
        module.SpinCondition.wait = lambda self, timeout_s=None: None
    elif change == "other init":
        module.SpinCondition.__init__ = lambda self, context: None
    else:
        del module.SPINLOOP_EXT_ENABLED

    with pytest.raises(UnsupportedError, match="pin vLLM"):
        vllm_shm_spin._patch(module)
