"""What is measured: which model shapes, batches, contexts and prompts, and how often."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.shapes import MODELS, ModelShape

TINY = ModelShape("tiny", 128, 2, 4, 2, 32, 256, 512, is_tied=True)
"""What the kit checks itself with on a CPU."""
SHAPES = {name: MODELS[name] for name in ("qwen2.5-3b", "qwen2.5-7b")} | {"tiny": TINY}

_KV_SHARE = 0.7  # of the cache that a point may fill: what the engine adds for itself is not in the model


@dataclass(frozen=True, slots=True)
class Workload:
    """The points of one run.

    Attributes:
        batches: Requests that decode together.
        contexts: Tokens that each of them has before.
        most_tokens: Largest summed context of a point: it bounds the time of its prefill.
        prompts: Prompt tokens of a single request.
        iterations: Decode iterations that are timed together.
        repeats: Measurements of each figure.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    most_tokens: int
    prompts: tuple[int, ...]
    iterations: int
    repeats: int

    def decode_points(self, perf: EnginePerf) -> list[tuple[int, int]]:
        """Return the (batch, context) pairs that fit into the cache and the time."""
        held = min(self.most_tokens, _KV_SHARE * perf.kv_blocks * 16)
        return [(b, c) for c in self.contexts for b in self.batches if b * (c + self.iterations) <= held]

    @property
    def max_model_len(self) -> int:
        """The longest sample, with room for the tokens that are generated."""
        return max(*self.contexts, *self.prompts) + 2 * self.iterations


FULL = Workload((1, 8, 32, 128, 256), (256, 2048, 8192), 300_000, (512, 2048, 8192), iterations=48, repeats=3)
CHECK = Workload((1, 4), (32, 64), 1_000, (16, 64), iterations=4, repeats=2)


def write_model(folder: Path, shape: ModelShape) -> Path:
    """Write the ``config.json`` of a Qwen2 of this shape (no weights, no tokenizer), and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.is_tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    assert shape.head_dim * shape.heads == shape.hidden, "Qwen2 derives the head size"
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder
