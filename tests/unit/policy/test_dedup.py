"""Prefix deduplication on cases with a known answer."""

from __future__ import annotations

from verl_rlhfless.policy.dedup import PrefixTree, dedup


def expand(tree: PrefixTree) -> list[list[int]]:
    """Return the prompts that a tree was made of, in their order."""
    return [[token for node in tree.chain(i) for token in tree.tokens[node].tolist()] for i in range(len(tree.leaf))]


def test_levels_nest() -> None:
    system, few_shot = list(range(10)), list(range(100, 120))
    prompts = [system + few_shot + [i] for i in range(3)] + [[*system, 7, 8, 9]]
    tree = dedup([p for p in prompts for _ in range(4)])
    assert tree.num_tokens == 10 + 20 + 3 + 3
    assert expand(tree) == [p for p in prompts for _ in range(4)]


def test_a_prompt_that_is_the_prefix_of_another_adds_nothing() -> None:
    tree = dedup([[1, 2, 3, 4], [1, 2], [1, 2, 3]])
    assert tree.num_tokens == 4
    assert expand(tree) == [[1, 2, 3, 4], [1, 2], [1, 2, 3]]


def test_empty_prompts_and_an_empty_batch() -> None:
    assert expand(dedup([])) == []
    assert expand(dedup([[], [1], []])) == [[], [1], []]
