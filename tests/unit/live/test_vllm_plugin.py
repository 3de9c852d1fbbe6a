"""The environment decides which part of the instrument a vLLM process gets; without it vLLM is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from verl_rlhfless.live.vllm_plugin import install_in_vllm
from verl_rlhfless_patches import vllm_file_store, vllm_shm_spin, vllm_worker_hook

PACE = '{"base_ms": 40}'


@pytest.mark.parametrize(
    ("environment", "installed"),
    [
        ({}, set()),
        ({"VERL_PLATFORM": "cuda"}, set()),
        ({"VERL_PLATFORM": "cpu"}, {"spin"}),
        ({"RLHFLESS_OBSERVER_DIR": "logs"}, {"hook"}),
        ({"RLHFLESS_PACE": PACE}, {"spin", "hook"}),
        ({"VERL_PLATFORM": "CPU ", "RLHFLESS_OBSERVER_DIR": "logs"}, {"spin", "hook"}),
        ({"RLHFLESS_LEASE": "rlhfless/replica/r0"}, {"file store"}),
    ],
)
def test_only_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], installed: set[str]
) -> None:
    applied: set[str] = set()
    for name in ("RLHFLESS_LEASE", "VERL_PLATFORM", "RLHFLESS_OBSERVER_DIR", "RLHFLESS_PACE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(vllm_file_store, "apply", lambda: applied.add("file store"))
    monkeypatch.setattr(vllm_shm_spin, "apply", lambda: applied.add("spin"))
    monkeypatch.setattr(vllm_worker_hook, "apply", lambda: applied.add("hook"))

    install_in_vllm()

    assert applied == installed


def test_the_entry_point_imports_nothing_heavy() -> None:
    code = "import sys, verl_rlhfless.live.vllm_plugin; print(*{m.split('.')[0] for m in sys.modules})"

    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert not {"torch", "ray", "verl", "vllm", "omegaconf", "numpy"} & set(modules.split())
