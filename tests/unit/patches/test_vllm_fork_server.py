"""The fork server starts engines only while what it forks can use CUDA; else vLLM does it its own way."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import vllm_fork_server

_NOT_INITIALIZED = 3  # what CUDA's driver answers in a fork of a process that has initialised it


def _module(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType(vllm_fork_server._MODULE)
    module.get_mp_context = lambda: multiprocessing.get_context("spawn")
    monkeypatch.setitem(sys.modules, vllm_fork_server._MODULE, module)
    return module


def _driver(monkeypatch: pytest.MonkeyPatch, answer: int | None) -> None:
    def load(name: str) -> Any:
        assert name == "libcuda.so.1"
        if answer is None:
            raise OSError("no such library")
        return SimpleNamespace(cuInit=lambda flags: answer)

    monkeypatch.setattr(vllm_fork_server.ctypes, "CDLL", load)


@pytest.mark.parametrize("answer", [None, 0, 100], ids=["no driver", "a device", "no device"])
def test_a_fork_that_can_use_cuda_ends_well(monkeypatch: pytest.MonkeyPatch, answer: int | None) -> None:
    _driver(monkeypatch, answer)
    vllm_fork_server._initialise_cuda()


def test_a_fork_that_cannot_use_cuda_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _driver(monkeypatch, _NOT_INITIALIZED)
    with pytest.raises(SystemExit) as ended:
        vllm_fork_server._initialise_cuda()
    assert ended.value.code == 1


@pytest.mark.parametrize(("exit_code", "is_usable"), [(0, True), (1, False), (-11, False)])
def test_a_fork_server_is_judged_by_a_fork_that_asks_for_cuda(
    monkeypatch: pytest.MonkeyPatch, exit_code: int, is_usable: bool
) -> None:
    calls = []
    probe = SimpleNamespace(start=lambda: calls.append("start"), join=lambda: calls.append("join"), exitcode=exit_code)

    def process(target: Any) -> Any:
        calls.append(target)
        return probe

    monkeypatch.setattr(vllm_fork_server, "_Context", lambda: SimpleNamespace(Process=process))
    assert vllm_fork_server.can_start_engines() is is_usable
    assert calls == [vllm_fork_server._initialise_cuda, "start", "join"]


def test_vllm_gets_the_fork_server_until_it_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(monkeypatch)
    vllm_fork_server._patch(module)
    assert module.get_mp_context().get_start_method() == "forkserver"
    assert vllm_fork_server.withdraw()
    assert not vllm_fork_server.withdraw()
    assert module.get_mp_context().get_start_method() == "spawn"


def test_an_unknown_vllm_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="pin vLLM"):
        vllm_fork_server._patch(ModuleType("utils"))


@pytest.mark.parametrize("is_usable", [True, False])
def test_a_warm_server_gives_a_spoilt_fork_server_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_usable: bool
) -> None:
    from verl_rlhfless.live.warm_server import WarmServer

    module = _module(monkeypatch)
    vllm_fork_server._patch(module)
    monkeypatch.setattr(vllm_fork_server, "can_start_engines", lambda: is_usable)
    with caplog.at_level(logging.WARNING):
        asyncio.run(WarmServer.wait_until_warm(SimpleNamespace()))  # type: ignore[arg-type]
        asyncio.run(WarmServer.wait_until_warm(SimpleNamespace()))  # type: ignore[arg-type]
    assert module.get_mp_context().get_start_method() == ("forkserver" if is_usable else "spawn")
    assert caplog.text.count("initialises CUDA") == (not is_usable)
