"""What is known of a step's prompts before the first of them is submitted. Light to import."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_rlhfless.live.tickets import SampleKey
from verl_rlhfless.policy.snapshot import Batch

_CHARACTERS_PER_TOKEN = 4  # of English text; what is submitted tells the exact length


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its responses.

    Attributes:
        uid: verl's id of the prompt in this step.
        prompt_id: The prompt's id for ever: the same in every epoch.
        row: ``extra_info.index`` of its row in the data set; 0 where that is no number, which only a replay asks for.
        n: Responses asked for.
        prompt_tokens: Estimate of its length.
    """

    uid: str
    prompt_id: str
    row: int
    n: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Announcement:
    """One step's rollout.

    Attributes:
        step: verl's number of the training step.
        groups: In the order of the batch.
        max_response_tokens: Most tokens of a response.
    """

    step: int
    groups: tuple[Group, ...]
    max_response_tokens: int

    def batch(self) -> Batch:
        """Return the prompts as policies see them; a prompt that is there twice gets a second id."""
        sizes = [group.n for group in self.groups]
        return Batch(
            step=self.step,
            prompt_ids=_unique([group.prompt_id for group in self.groups]),
            group_of=np.repeat(np.arange(len(sizes)), sizes),
            prompt_tokens=np.repeat([group.prompt_tokens for group in self.groups], sizes),
            max_response_tokens=self.max_response_tokens,
        )

    def samples(self) -> tuple[SampleKey, ...]:
        """Return who each sample of the batch is."""
        return tuple(SampleKey(group.uid, session) for group in self.groups for session in range(group.n))


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        unique.append(f"{name}+{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return tuple(unique)


def announcement_of(prompts: Any, rollout: Any) -> Announcement:
    """Return what is known of a training batch before any prompt is tokenized."""
    uids = [str(uid) for uid in prompts["uid"]]
    rows = list(prompts["index"]) if "index" in prompts else [0] * len(uids)
    counts = list(prompts["__rollout_n__"]) if "__rollout_n__" in prompts else [rollout.n] * len(uids)
    texts = [_text(messages) for messages in prompts["raw_prompt"]]
    return Announcement(
        step=int(prompts["global_steps"]),
        groups=tuple(
            Group(
                uid=uid,
                prompt_id=hashlib.sha256(text.encode()).hexdigest()[:16],
                row=_row(row),
                n=int(n),
                prompt_tokens=min(rollout.prompt_length, len(text) // _CHARACTERS_PER_TOKEN + 1),
            )
            for uid, text, row, n in zip(uids, texts, rows, counts, strict=True)
        ),
        max_response_tokens=rollout.response_length,
    )


def _row(index: Any) -> int:
    """Return the number of a row; data sets name rows as they like (DAPO-Math's are UUIDs), and verl takes any."""
    try:
        return int(index)
    except (TypeError, ValueError):
        return 0


def _text(messages: Sequence[Any]) -> str:
    return json.dumps(list(messages), sort_keys=True, default=_digest)


def _digest(part: Any) -> str:
    """Return the same for an image or its bytes in every epoch; the text of an image holds its address."""
    data = (
        part if isinstance(part, bytes) else part.tobytes() if hasattr(part, "tobytes") else repr(type(part)).encode()
    )
    return hashlib.sha256(data).hexdigest()[:16]
