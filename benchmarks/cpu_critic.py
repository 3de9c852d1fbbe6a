"""Lets verl load a critic on a CPU. Loaded in every process of a run through ``VERL_USE_EXTERNAL_MODULES``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt


def _load_critics_without_flash_attention(module: ModuleType) -> None:
    """Replace how verl loads a critic: with flash attention whatever the recipe says, which a CPU lacks."""
    from transformers import AutoModelForTokenClassification

    def load(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        return AutoModelForTokenClassification.from_pretrained(
            local_path, dtype=torch_dtype, config=model_config, attn_implementation="sdpa"
        )

    module.load_valuehead_model = load  # type: ignore[attr-defined]


wrapt.register_post_import_hook(_load_critics_without_flash_attention, "verl.utils.model")
