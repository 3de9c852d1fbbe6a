"""Our messages reach whoever runs verl, in verl's format and at verl's level (``VERL_LOGGING_LEVEL``).

verl does this for its own logger only, because packages that it imports set the root logger to errors.
"""

from __future__ import annotations

import logging
import os
import sys


def configure_logging() -> None:
    """Let the loggers of this package write to standard error, whatever the root logger is set to."""
    level = os.getenv("VERL_LOGGING_LEVEL", "INFO")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s:%(asctime)s:%(message)s"))
    ours = logging.getLogger("verl_rlhfless")
    ours.handlers = [handler]
    ours.setLevel(level)
    ours.propagate = False
