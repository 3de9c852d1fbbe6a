"""What a run tells its user arrives, although packages that verl imports silence the root logger."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_TOLD = """
import logging
import verl.trainer.ppo.v1.agent_loop_tq
logging.getLogger("verl_rlhfless.live.fleet").info("rlhfless: step 3: the reason")
logging.getLogger("verl_rlhfless.live.router").error("rlhfless: a replica is lost")
"""


@pytest.mark.parametrize(("level", "expected"), [("INFO", 1), ("WARNING", 0)])
def test_our_messages_are_seen_once_at_verls_level(level: str, expected: int) -> None:
    environ = os.environ | {"VERL_LOGGING_LEVEL": level}
    run = [sys.executable, "-c", _TOLD]
    told = subprocess.run(run, env=environ, capture_output=True, text=True, timeout=300, check=True).stderr
    assert told.count("rlhfless: step 3: the reason") == expected
    assert told.count("rlhfless: a replica is lost") == 1
