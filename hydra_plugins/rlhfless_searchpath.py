"""Puts ``hydra_configs`` on Hydra's search path: ``+rlhfless=default`` composes without one on the command line.

Hydra imports this module in every Hydra application of the environment: it imports nothing but Hydra itself.
"""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf


def _environment() -> str:
    """Return what this process was started with, for `rlhfless ab`; in base 64, since values may look like keys."""
    return base64.b64encode(Path("/proc/self/environ").read_bytes()).decode()


OmegaConf.register_new_resolver("rlhfless.environment", _environment, replace=True)


class RlhflessSearchPathPlugin(SearchPathPlugin):
    """Appends the folder that holds the ``rlhfless`` group, wherever pip put it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append every portion of the namespace ``hydra_configs`` that holds our group.

        They are files, not ``pkg://``: Hydra can't read a namespace that several distributions share.
        """
        spec = importlib.util.find_spec("hydra_configs")
        portions = spec.submodule_search_locations if spec else None
        for portion in portions or ():
            if (Path(portion) / "rlhfless").is_dir():
                search_path.append(provider="verl_rlhfless", path=f"file://{portion}")
