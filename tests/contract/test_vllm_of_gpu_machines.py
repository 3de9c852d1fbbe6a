"""The vLLM that ``verl[vllm]`` selects on a GPU machine is older than the one on CPU: what we patch and call is there.

Its wheel is downloaded, and its Python code imported without a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PATCHES = """
import importlib, vllm
assert vllm.__version__ == {version!r} and vllm.__file__.startswith({folder!r}), vllm.__file__
from verl_rlhfless_patches import vllm_file_store, vllm_fork_server, vllm_shm_spin, vllm_stop_strings, vllm_worker_hook
for patch in (vllm_file_store, vllm_fork_server, vllm_shm_spin, vllm_stop_strings, vllm_worker_hook):
    patch.apply()
for module in (
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.engine.utils",
    "vllm.distributed.device_communicators.shm_broadcast",
    "vllm.v1.engine.detokenizer",
    "vllm.v1.worker.gpu_worker",
):
    importlib.import_module(module)
"""
PRELOAD = """
import sys
from vllm.platforms import current_platform
assert not current_platform.is_cpu()
import verl_rlhfless.live.engine_preload
ready = set(sys.modules)
assert "vllm.v1.worker.gpu_worker" in ready
import torch
assert not torch.cuda.is_initialized()
import verl_rlhfless.live.engine_worker
kernels = {name for name in sys.modules if ".fla.ops" in name or "flash_linear_attention" in name}
assert kernels, "nothing that asks CUDA for its device is imported any more: the fork server can import verl too"
assert not kernels & ready, sorted(kernels & ready)
"""
ENGINE = """
import inspect
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor
import verl_rlhfless.live.server
for name in ("sleep", "wake_up", "collective_rpc", "abort", "shutdown", "errored", "vllm_config"):
    assert hasattr(AsyncLLM, name) or f"self.{name} =" in inspect.getsource(AsyncLLM), name
assert "level" in inspect.signature(AsyncLLM.sleep).parameters
assert "self.output_handler" in inspect.getsource(AsyncLLM)
assert "self.request_states" in inspect.getsource(OutputProcessor)
"""


@pytest.fixture(scope="module")
def gpu_vllm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a folder with that vLLM, and its version."""
    (version,) = (found[1] for text in requires("verl") or () if (found := re.match(r"vllm==([\w.]+);", text)))
    folder = tmp_path_factory.mktemp("vllm")
    download = ("download", "-q", "--no-deps", "--only-binary=:all:", f"vllm=={version}", "-d", str(folder))
    subprocess.run([sys.executable, "-m", "pip", *download], check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    wheel.unlink()
    return folder, version


@pytest.mark.parametrize("code", [PATCHES, PRELOAD, ENGINE], ids=["patches", "preload", "engine"])
def test_what_we_build_on_is_there(gpu_vllm: tuple[Path, str], code: str) -> None:
    folder, version = gpu_vllm
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    environment.pop("VERL_PLATFORM", None)
    source = code.replace("{version!r}", repr(version)).replace("{folder!r}", repr(str(folder)))

    ended = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=300)

    assert ended.returncode == 0, ended.stderr[-3000:]
