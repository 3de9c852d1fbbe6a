"""The demo refuses bad options at once, in one line with key, value, rule and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_rlhfless.cli import app, main
from verl_rlhfless.demo.run import DemoOptions, run_demo
from verl_rlhfless.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, r"--steps=0: must be >= 1"),
        ({"seed": -1}, r"--seed=-1: must be between 0 and"),
        ({"arms": ("stok",)}, r"--arms='stok': must be among stock, elastic"),
        ({"arms": ("stock", "stock")}, "must name each arm once"),
        ({"columns": ("warm",)}, r"--columns='warm': must be among unpaced, parked, cold"),
        ({"columns": ("cold", "cold")}, "must name each column once"),
    ],
)
def test_bad_option(tmp_path: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DemoOptions(out=tmp_path, **options)  # type: ignore[arg-type]


def test_a_replayed_trace_brings_its_own_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data=.*does not go with a replayed trace"):
        DemoOptions(out=tmp_path, data=tmp_path / "d.jsonl", ablate=True)


def test_ablation_runs_every_part_on_and_off(tmp_path: Path) -> None:
    assert [arm.name for arm in DemoOptions(out=tmp_path).chosen_arms()] == ["stock", "elastic"]
    names = [arm.name for arm in DemoOptions(out=tmp_path, arms=("stock", "resident"), ablate=True).chosen_arms()]
    assert names[:3] == ["stock", "resident", "resident-router-only"]
    assert set(names[3:]) == {f"resident-no-{part}" for part in ("dispatcher", "dedup", "migration")}


def test_output_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=r"--out=.* is a file"):
            DemoOptions(out=out)


def test_a_file_that_fails_while_the_command_runs_is_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "log"))

    monkeypatch.setattr("verl_rlhfless.demo.run.run_demo", fail)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("rlhfless: error: ") and "No space left on device" in line


def test_names_may_stand_after_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[DemoOptions] = []
    monkeypatch.setattr("verl_rlhfless.demo.run.run_demo", lambda options: chosen.append(options) or 0)
    names = ["--arms", "stock, elastic", "--columns", "parked, cold"]
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path), *names]).exit_code == 0
    assert (chosen[0].arms, chosen[0].columns) == (("stock", "elastic"), ("parked", "cold"))


def test_data_smaller_than_a_step(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n')
    with pytest.raises(ConfigError, match="at least 8 problems"):
        run_demo(DemoOptions(out=tmp_path, data=path))


def test_missing_data_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        run_demo(DemoOptions(out=tmp_path / "out", data=tmp_path / "missing.jsonl"))
    assert not (tmp_path / "out").exists()


def test_command_line_prints_one_line_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rlhfless", "demo", "--out", str(tmp_path), "--arms", "stok"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlhfless: error: --arms='stok'")


def test_version_and_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip()
    assert "demo" in CliRunner().invoke(app, ["--help"]).output
