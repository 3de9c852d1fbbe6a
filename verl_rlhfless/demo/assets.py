"""The demo's own model, tokenizer and data: built from a seed, nothing is downloaded."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_rlhfless.errors import DataError

_MAX_VOCABULARY = 2048
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with the number that a right answer ends in."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Assets:
    """Paths that the recipe needs."""

    model: Path
    train: Path
    validation: Path


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a random Qwen3."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


MODEL_SIZE = ModelSize(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, head_dim=32)
"""The demo's: about 0.6 million parameters."""


def arithmetic_problems(count: int, seed: int) -> list[Problem]:
    """Return ``count`` additions and subtractions of two-digit numbers."""
    rng = random.Random(seed)
    problems = []
    for _ in range(count):
        a, b = rng.randint(0, 99), rng.randint(0, 99)
        sign = rng.choice("+-")
        problems.append(Problem(f"What is {a} {sign} {b}?", str(a + b if sign == "+" else a - b)))
    return problems


def read_problems(path: Path) -> list[Problem]:
    """Return the problems of a JSON Lines file in GSM8K's form: ``question``, and ``answer`` ending in ``#### 42``.

    Raises:
        DataError: The file is missing, empty or malformed; the message names path and line.
    """
    if not path.is_file():
        raise DataError(f"--data {path}: no such file. Give a JSON Lines file with `question` and `answer`.")
    problems = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                problems.append(_parse_problem(line, f"--data {path}, line {number}"))
    if not problems:
        raise DataError(f"--data {path}: the file is empty. It needs at least one problem.")
    return problems


def _parse_problem(line: str, where: str) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}). Write one object per line."
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
        raise DataError(f"{where}: needs the strings `question` and `answer`.")
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    if "####" not in row["answer"] or not answer:
        raise DataError(f"{where}: `answer` must end in `#### <number>`.")
    return Problem(row["question"], answer)


def build_assets(folder: Path, problems: list[Problem], seed: int, size: ModelSize = MODEL_SIZE) -> Assets:
    """Write a tiny random Qwen3, a byte-level BPE tokenizer trained on the problems, and two parquet files.

    The model has tied embeddings and is stored in fp32.
    """
    assets = Assets(folder / "model", folder / "train.parquet", folder / "validation.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer([f"{problem.question} #### {problem.answer}" for problem in problems])
    tokenizer.save_pretrained(assets.model)
    _build_model(assets.model, tokenizer, seed, size)
    _write_rows(assets.train, problems, "train")
    _write_rows(assets.validation, problems[:8], "validation")
    return assets


def _build_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=4096,
    )


def _build_model(folder: Path, tokenizer: Any, seed: int, size: ModelSize) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),  # verl masks logits beyond it, which would bend every log-prob
                hidden_size=size.hidden,
                intermediate_size=size.intermediate,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.kv_heads,
                head_dim=size.head_dim,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=0.05,
            )
        ).to(torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)


def _write_rows(path: Path, problems: list[Problem], split: str) -> None:
    import pandas

    rows = [
        {
            "data_source": "rlhfless/demo",
            "prompt": [{"role": "user", "content": problem.question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"split": split, "index": index},
        }
        for index, problem in enumerate(problems)
    ]
    pandas.DataFrame(rows).to_parquet(path)
