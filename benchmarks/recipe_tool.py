"""A tool for the multi-turn recipe, in a file of its own: verl registers what it finds in it."""

from __future__ import annotations

from verl.tools.function_tool import function_tool


@function_tool
def count_digits(text: str) -> str:
    """Count the digits of a text.

    Args:
        text: The text.
    """
    return f"{sum(character.isdigit() for character in text)} digits"
