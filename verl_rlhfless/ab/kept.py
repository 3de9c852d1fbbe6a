"""What a comparison keeps in its folder, so that it can be taken up again: the recipe, and every finished arm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlhfless.ab.training import ArmOutcome
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.report.observed import ROLLOUT_FOLDER

RECIPE_FILE = "recipe.json"
OUTCOME_FILE = "outcome.json"
CHECKPOINT_FOLDER = "checkpoints"
HYDRA_FOLDER = "hydra"
_WRITTEN_BY_VERL = (ROLLOUT_FOLDER, CHECKPOINT_FOLDER, HYDRA_FOLDER)


@dataclass(frozen=True, slots=True)
class Kept:
    """The folder of a comparison.

    Attributes:
        out: The folder.
        recipe: What all arms have in common, as plain JSON; ``text`` and ``digest`` name it.
        versions: Of the stack that the arms are run with, of a checkout of this package its commit, the host's GPUs,
            how the recipe trains, and the trace's text.
    """

    out: Path
    recipe: Mapping[str, Any]
    versions: Mapping[str, Any]

    def check(self) -> None:
        """Check that the folder is this comparison's, or nobody's.

        Raises:
            ConfigError: It holds the arms of another recipe.
        """
        before = _read(self.out / RECIPE_FILE)
        if before is not None and before.get("digest") != self.recipe["digest"]:
            rule = f"holds a comparison of another recipe, {before.get('text')!r}"
            raise ConfigError("--out", str(self.out), rule, "Name another folder, or delete this one.")
        if before is None and any(self.out.glob(f"*/{OUTCOME_FILE}")):
            rule = f"holds arms of a recipe that is not known: {RECIPE_FILE} is missing or broken"
            raise ConfigError("--out", str(self.out), rule, "Name another folder, or delete this one.")

    def claim(self) -> None:
        """Make the folder this comparison's."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RECIPE_FILE).write_text(json.dumps(self.recipe, indent=2) + "\n")

    def finished(self, name: str, argv: list[str]) -> ArmOutcome | None:
        """Return how the arm ended when it was run with the same command and versions and did not fail."""
        record = _read(self.out / name / OUTCOME_FILE)
        if record is None or record.get("made_by") != self._made_by(argv):
            return None
        outcome = record["outcome"]
        if outcome["exit_code"] != 0 or outcome["why"] is not None:
            return None
        return ArmOutcome(self.out / name, 0, tuple(outcome["leftovers"]))

    def keep(self, name: str, argv: list[str], outcome: ArmOutcome) -> None:
        """Note how the arm ended."""
        record = {"made_by": self._made_by(argv), "outcome": outcome.as_json()}
        outcome.folder.mkdir(parents=True, exist_ok=True)
        (outcome.folder / OUTCOME_FILE).write_text(json.dumps(record, indent=2) + "\n")

    def forget(self, name: str) -> None:
        """Remove what an earlier run of the arm left: verl would resume from its checkpoints."""
        (self.out / name / OUTCOME_FILE).unlink(missing_ok=True)
        for folder in _WRITTEN_BY_VERL:
            shutil.rmtree(self.out / name / folder, ignore_errors=True)

    def _made_by(self, argv: list[str]) -> dict[str, Any]:
        return {"recipe": self.recipe["digest"], "argv": argv, "versions": dict(self.versions)}


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object at ``path``; ``None`` when there is none or a killed run tore it."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None
