"""The only registration point, named by the entry point ``verl.plugins``.

verl imports this module at the end of every ``import verl``, in vLLM's children too: it must stay light, and it
must not change anything unless the run asks for it. verl swallows exceptions raised here, so a failure ends the
process with one line instead.
"""

from __future__ import annotations

import os
from types import ModuleType

import wrapt

from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.logs import configure_logging
from verl_rlhfless.live.variables import OBSERVER_DIR_VARIABLE, PACE_VARIABLE, is_cpu_platform


def _register_trainer(_: ModuleType) -> None:
    from verl_rlhfless.live import trainer  # noqa: F401  registers itself with verl's trainer registry


def _install_replay(_: ModuleType) -> None:
    from verl_rlhfless_patches import verl_agent_loop_replay

    verl_agent_loop_replay.apply()


def _install_sample_log(_: ModuleType) -> None:
    from verl_rlhfless_patches import verl_agent_loop_record

    verl_agent_loop_record.apply()


def register() -> None:
    """Register the platform at once and everything else when verl imports the module that it extends."""
    configure_logging()
    if is_cpu_platform():
        from verl_rlhfless.live import cpu

        cpu.register()
    pace = os.environ.get(PACE_VARIABLE)
    if pace:
        from verl_rlhfless.live.pacing import PaceModel
        from verl_rlhfless_patches import verl_training_pace

        verl_training_pace.apply(PaceModel.parse(pace))
    wrapt.register_post_import_hook(_register_trainer, "verl.trainer.ppo.v1")
    wrapt.register_post_import_hook(_install_replay, "verl.experimental.agent_loop.agent_loop")
    if os.environ.get(OBSERVER_DIR_VARIABLE):
        wrapt.register_post_import_hook(_install_sample_log, "verl.experimental.agent_loop.agent_loop")


try:
    register()
except RlhflessError as error:
    raise SystemExit(f"rlhfless: error: {error}") from error
