"""What some recipes need beside overrides: a coarse reward, and a model that always calls a tool."""

from __future__ import annotations

import json
from typing import Any

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser

TOOL_FORMAT = "rlhfless_always"
"""``multi_turn.format`` that makes every answer a call of the tool: a random model never writes one."""


def coarse_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """Return 1 for one response in four, whatever it says: a third of the groups agree, and DAPO's filter drops them.

    What a model can learn would soon have every group agree, and verl generates until enough groups don't.
    """
    return float(sum(solution_str.encode()) % 4 == 0)


@ToolParser.register(TOOL_FORMAT)
class AlwaysCalls(ToolParser):
    """Reads a call of ``count_digits`` with the answer itself out of every answer."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list[FunctionCall]]:
        """Return the answer and one call."""
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        return text, [FunctionCall(name="count_digits", arguments=json.dumps({"text": text}))]
