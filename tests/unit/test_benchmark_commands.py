"""Every benchmark explains itself: who asks for its help starts nothing, and reads what it measures."""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
import warnings
from pathlib import Path

import pytest

import benchmarks

_FOLDER = Path(benchmarks.__file__).parent
COMMANDS = sorted(path.stem for path in _FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [*COMMANDS, "gpu"])
def test_help_is_printed_and_nothing_started(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module(f"benchmarks.{name}")  # what it imports may run programs
    for action in ("benchmarks.record.write_result", "ray.init", "subprocess.run", "tempfile.TemporaryDirectory"):
        monkeypatch.setattr(action, lambda *_, **__: pytest.fail("the benchmark was started"))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, about modules that are imported already
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "usage" in said.lower() and "--help" in said
    path = _FOLDER / ("gpu/__main__.py" if name == "gpu" else f"{name}.py")
    opening, *_ = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")
    assert opening and " ".join(opening.split()) in " ".join(said.split())
