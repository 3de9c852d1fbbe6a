"""Loss is never silent: a batch that holds fewer samples than were asked for stops the run and names the lost groups.

Stock verl pads such a batch with synthetic samples and trains on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from verl_rlhfless.errors import SampleLossError


class RolloutLedger:
    """Counts the samples of each prompt group that were asked for and that came back."""

    def __init__(self, samples_per_prompt: int) -> None:
        self._samples_per_prompt = samples_per_prompt
        self._expected: dict[str, tuple[int, Any]] = {}

    def expect(self, batch: Mapping[str, Any]) -> None:
        """Note the groups of a submitted batch: ``uid``, data set row ``index`` and, where set, ``__rollout_n__``."""
        uids = list(batch["uid"])
        rows = list(batch["index"]) if "index" in batch else [None] * len(uids)
        counts = list(batch["__rollout_n__"]) if "__rollout_n__" in batch else [self._samples_per_prompt] * len(uids)
        self._expected.update({str(uid): (int(n), row) for uid, row, n in zip(uids, rows, counts, strict=True)})

    def check(self, keys: Iterable[str], num_groups: int) -> None:
        """Compare a sampled batch with what was submitted since the last check.

        Group filtering (DAPO) replaces groups, so a submitted group may be absent as long as ``num_groups`` are there.

        Args:
            keys: verl's trajectory keys, ``{uid}_{session}_{index}``.
            num_groups: Prompt groups that the batch must hold.

        Raises:
            SampleLossError: Samples are missing; the message names each group with its data set row.
        """
        sessions: dict[str, set[str]] = {}
        for key in keys:
            uid, session, _ = key.rsplit("_", 2)
            sessions.setdefault(uid, set()).add(session)
        expected, self._expected = self._expected, {}
        must_be_there = expected if len(sessions) < num_groups else sessions
        lost = []
        for uid in must_be_there:
            n, row = expected[uid]
            if len(sessions.get(uid, ())) < n:
                lost.append(f"group {uid} (data row {row}): {len(sessions.get(uid, ()))} of {n} samples")
        if lost:
            raise SampleLossError(
                f"{len(lost)} of {num_groups} prompt groups came back incomplete: {'; '.join(lost)}. Training "
                "on the rest would be silent loss, so the run stops: look for the replica or reward error above."
            )
