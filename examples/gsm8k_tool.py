"""The tool of the multi-turn example: verl builds its schema from the signature and this docstring's form."""

from __future__ import annotations

import ast
import operator

from verl.tools.function_tool import function_tool

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@function_tool
def calculate(expression: str) -> str:
    """Calculate an arithmetic expression of numbers, + - * / and parentheses.

    Args:
        expression: What to calculate, such as (12 + 3) * 4.
    """
    try:
        return f"{_value(ast.parse(expression, mode='eval').body):g}"
    except (SyntaxError, ValueError, ZeroDivisionError) as error:
        return f"error: {error}"  # for the model to read: a wrong call is part of what it learns from


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("only numbers, + - * / and parentheses are understood")
