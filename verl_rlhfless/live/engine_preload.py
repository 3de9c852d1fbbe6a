"""What a fork server imports before any engine is asked of it (see ``verl_rlhfless_patches.vllm_fork_server``).

Importing this module ties the process to its parent and imports all that an engine and its worker run.
"""

from __future__ import annotations

from verl_rlhfless.processes import die_with_parent

die_with_parent()  # first: a server actor that is killed during the imports must not leave its fork server behind

import importlib  # noqa: E402

from vllm.platforms import current_platform  # noqa: E402

# Nothing of verl on a GPU: its worker extension imports kernels that initialise CUDA, which no fork of this process
# could use then. Each worker imports it by itself, as in stock.
_OF_DEVICE = (
    ("verl_rlhfless.live.engine_worker", "vllm.v1.worker.cpu_worker")
    if current_platform.is_cpu()
    else ("vllm.v1.worker.gpu_worker",)
)
_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader",
    *_OF_DEVICE,
)

for _module in _MODULES:
    importlib.import_module(_module)
