"""With the patch ranks meet without leaving a file; an unknown vLLM is refused."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import vllm_file_store


def _module() -> ModuleType:
    module = ModuleType("multiproc_executor")
    module.__dict__.update(get_file_store_init_method=lambda: f"file://{tempfile.gettempdir()}/vllm_dist_0")
    return module


def _meet(url: str, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    torch.distributed.barrier()
    torch.distributed.barrier(torch.distributed.new_group([0, 1]))  # the store is read after the rendezvous too


def test_ranks_meet_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module = _module()
    vllm_file_store._patch(module)
    vllm_file_store._patch(module)  # vLLM may call its plugins twice
    url = module.get_file_store_init_method()
    ranks = [multiprocessing.get_context("fork").Process(target=_meet, args=(url, rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_two_engines_never_share_one() -> None:
    assert vllm_file_store.unnamed_file() != vllm_file_store.unnamed_file()


def test_a_vllm_whose_workers_meet_at_a_port_is_left_alone() -> None:
    module = ModuleType("multiproc_executor")
    vllm_file_store._patch(module)
    assert not hasattr(module, "get_file_store_init_method")


def test_an_unknown_vllm_is_refused() -> None:
    module = _module()
    module.__dict__.update(get_file_store_init_method=lambda folder: folder)

    with pytest.raises(UnsupportedError, match="pin vLLM"):
        vllm_file_store._patch(module)
