"""What some recipes need beside overrides: two rewards, coarse and of a model, and a model that always calls a tool."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser

TOOL_FORMAT = "rlhfless_always"
"""``multi_turn.format`` that makes every answer a call of the tool: a random model never writes one."""


def coarse_score(data_source: str, solution_str: str, ground_truth: str, **_: Any) -> float:
    """Return 1 for one response in four, whatever it says: a third of the groups agree, and DAPO's filter drops them.

    What a model can learn would soon have every group agree, and verl generates until enough groups don't.
    """
    return float(sum(solution_str.encode()) % 4 == 0)


async def model_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    reward_router_address: str,
    reward_model_tokenizer: Any,
    **_: Any,
) -> float:
    """Return the logit that the reward model has for a response.

    verl 0.9.1 asks a reward model without such a function too, but then its agent loop misses ``reward_extra_info``.
    """
    asked = {
        "model": reward_model_tokenizer.name_or_path,
        "input": f"Is this {ground_truth}? {solution_str}",
        "use_activation": False,
    }
    url = f"http://{reward_router_address}/classify"
    async with aiohttp.ClientSession() as session, session.post(url, json=asked) as answer:
        answer.raise_for_status()
        return float((await answer.json())["data"][0]["probs"][0])


@ToolParser.register(TOOL_FORMAT)
class AlwaysCalls(ToolParser):
    """Reads a call of ``count_digits`` with the answer itself out of every answer."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list[FunctionCall]]:
        """Return the answer and one call."""
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        return text, [FunctionCall(name="count_digits", arguments=json.dumps({"text": text}))]
