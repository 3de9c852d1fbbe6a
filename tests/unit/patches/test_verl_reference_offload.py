"""A reference model on a CPU run is neither offloaded nor pinned, and a changed verl is refused by name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import verl_reference_offload


def test_verl_gets_no_offload_policy_where_it_asks_for_a_pinning_one() -> None:
    module: Any = ModuleType("transformer_impl")
    module.CPUOffloadPolicy = lambda pin_memory: "pins"
    verl_reference_offload._patch(module)
    assert module.CPUOffloadPolicy(pin_memory=True) is None
    assert module.CPUOffloadPolicy is not None, "verl asserts that torch knows the policy"


def test_a_verl_without_the_policy_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="CPUOffloadPolicy is gone"):
        verl_reference_offload._patch(ModuleType("transformer_impl"))
