"""What engines may leave in the folder for temporary files."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

# vLLM's rendezvous, its sockets (bare UUIDs, in a folder of ours), verl's sockets of a weight load, multiprocessing's.
_OF_ENGINES = re.compile(
    r"vllm_dist_|rlhfless-sockets-|rl-colocate-zmq-|pymp-|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
)


def files_of_engines() -> set[str]:
    """Return the names of the files that may be an engine's, of whichever run."""
    return {path.name for path in Path(tempfile.gettempdir()).iterdir() if _OF_ENGINES.match(path.name)}
