"""What a running cluster's processes get through the job arrives as it was, whatever a folder is called."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.ab.cluster import _inherited, check_address
from verl_rlhfless.errors import ConfigError


@given(value=st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1))
def test_any_value_survives_hydras_grammar(value: str) -> None:
    override = OverridesParser.create().parse_override(_inherited("NAME", value))
    assert override.key_or_group == "ray_kwargs.ray_init.runtime_env.env_vars.NAME"
    assert override.is_force_add() and override.value() == value


def test_the_address_of_a_client_is_refused() -> None:
    check_address("auto")
    check_address("10.0.0.1:6379")
    with pytest.raises(ConfigError, match="RAY_ADDRESS='ray://head:10001': is the address of a Ray client"):
        check_address("ray://head:10001")
