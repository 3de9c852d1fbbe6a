"""``rlhfless simulate`` and ``rlhfless trace`` from the outside."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.sim.cell import ARMS, DESCRIPTIONS
from verl_rlhfless.sim_cli import register
from verl_rlhfless.trace import read_trace

app = typer.Typer()
register(app)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and isinstance(result.exception, RlhflessError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def trace(folder: Path, *args: str) -> Path:
    path = folder / "t.jsonl.gz"
    run("trace", "generate", str(path), "--groups", "16", "--n", "4", "--mean", "300", "--steps-per-epoch", "2", *args)
    return path


def test_list_names_what_can_be_chosen() -> None:
    text = run("simulate", "--list")
    for name in ("l40s-16", "h100-16-spot", "llama2-70b", "rlhfless_paper", "ours_notslower", "B200"):
        assert name in text
    assert list(DESCRIPTIONS) == list(ARMS)
    assert DESCRIPTIONS["seer"] in text


def test_a_generated_trace_is_simulated_to_the_documented_json_and_a_picture(tmp_path: Path) -> None:
    path, out, picture = trace(tmp_path), tmp_path / "o.json", tmp_path / "o.png"
    args = ["simulate", str(path), "--model", "qwen2.5-3b", "--arms", "stock_sync,ours", "--json", str(out)]
    text = run(*args, "--plot", str(picture))
    record = json.loads(out.read_text())
    assert record["format"] == "rlhfless-sim/1"
    assert {"trace", "cluster", "model", "seed", "arms", "bound"} <= record["runs"][0].keys()
    assert [step["step"] for step in record["runs"][0]["arms"]["ours"]["steps"]] == [1, 2, 3, 4]
    assert "simulated" in text and "objective  " in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    first = out.read_bytes()
    run(*args)
    assert out.read_bytes() == first


def test_a_recipe_with_models_of_its_own_and_transfers_reach_the_simulation(tmp_path: Path) -> None:
    path = trace(tmp_path, "--mean", "3000")
    steps = {}
    for name, more in (("plain", ()), ("ppo", ("--recipe", "ppo-rm")), ("kv", ("--kv-transfer",))):
        out = tmp_path / f"{name}.json"
        run("simulate", str(path), "--model", "qwen2.5-3b", "--arms", "ours", "--json", str(out), *more)
        one = json.loads(out.read_text())["runs"][0]
        steps[name] = one["arms"]["ours"]["steps"]
        assert one["recipe"] == ("ppo-rm" if name == "ppo" else "grpo")
    assert steps["ppo"][0]["step_s"] > steps["plain"][0]["step_s"]
    assert sum(s["prefill_tokens"] for s in steps["kv"]) < sum(s["prefill_tokens"] for s in steps["plain"])


def test_measured_efficiencies_reach_the_simulation_and_only_that_of_their_gpu(tmp_path: Path) -> None:
    path, file = trace(tmp_path), tmp_path / "calibration_h100.json"
    args = ["simulate", str(path), "--model", "qwen2.5-3b", "--arms", "stock_sync"]
    measured = {"format": "rlhfless-calibration/1", "gpu": "H100", "efficiencies": {"hbm": 0.4, "launch_s": 3e-3}}
    file.write_text(json.dumps(measured))
    steps = {}
    for name, more in (("shipped", ()), ("measured", ("--calibration", str(file)))):
        out = tmp_path / f"{name}.json"
        run(*args, "--cluster", "h100-16", "--json", str(out), *more)
        steps[name] = json.loads(out.read_text())["runs"][0]["arms"]["stock_sync"]["steps"]
    assert steps["measured"][0]["gen_s"] > 1.5 * steps["shipped"][0]["gen_s"]
    with pytest.raises(RlhflessError, match=r"--calibration=.*H100, the cluster has L40S"):
        run(*args, "--cluster", "l40s-16", "--calibration", str(file))
    file.write_text("{")
    with pytest.raises(RlhflessError, match="cannot be read as JSON"):
        run(*args, "--cluster", "h100-16", "--calibration", str(file))


def test_the_same_seed_generates_the_same_bytes_and_stats_match_what_was_asked(tmp_path: Path) -> None:
    args = (
        "trace",
        "generate",
        str(tmp_path / "a.gz"),
        "--groups",
        "200",
        "--mean",
        "500",
        "--icc",
        "0.6",
        "--tail",
        "0.7",
    )
    run(*args)
    first = (tmp_path / "a.gz").read_bytes()
    run(*args)
    assert (tmp_path / "a.gz").read_bytes() == first
    rows = [line.split() for line in run("trace", "stats", str(tmp_path / "a.gz")).splitlines()]
    found = {key: float(value) for key, value in zip(rows[0], rows[1], strict=True)}
    assert found["mean"] == pytest.approx(500, rel=0.15)
    assert found["icc"] == pytest.approx(0.6, abs=0.12)


def test_drift_makes_later_steps_longer(tmp_path: Path) -> None:
    path = trace(tmp_path, "--drift", "1.5")
    lines = gzip.decompress(path.read_bytes()).splitlines()[1:]
    mean = [
        sum(sum(g["response_tokens"]) for g in step["groups"]) / (16 * 4)
        for step in (json.loads(line) for line in lines)
    ]
    assert mean[-1] > 2 * mean[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["simulate"], "TRACE"),
        (["simulate", "missing.jsonl"], r"missing\.jsonl"),
        (["simulate", "x", "--arms", "nobody"], "--arms='nobody'"),
        (["simulate", "x", "--cluster", "moon"], "--cluster='moon'"),
        (["simulate", "x", "--model", "gpt"], "--model='gpt'"),
        (["simulate", "x", "--wake-s", "-1"], "--wake-s"),
        (["simulate", "x", "--wake-s", "nan"], "--wake-s"),
        (["simulate", "x", "--cost-weight", "1.5"], r"--cost-weight=1\.5: must be from 0 to 1"),
        (["simulate", "x", "--parked-charge", "2"], "--parked-charge"),
        (["simulate", "x", "--seed", "-1"], "--seed"),
        (["simulate", "x", "--recipe", "dpo"], "--recipe='dpo': must be among grpo, ppo"),
        (["simulate", "x", "--json", "/nowhere/o.json"], "folder does not exist"),
        (["simulate", "x", "--json", "/"], "is a folder"),
        (["simulate", "x", "--plot", "o.txt"], r"must end in \.png"),
        (["trace", "generate", "/nowhere/t.gz"], "folder does not exist"),
        (["trace", "generate", "t.gz", "--icc", "2"], "--icc"),
        (["trace", "generate", "t.gz", "--seed", "-1"], "--seed=-1: must be >= 0"),
        (["trace", "generate", "t.gz", "--prompt-tokens", "10000000000000000"], "--prompt-tokens"),
        (["trace", "generate", "t.gz", "--max-response-tokens", "10000000000000000"], "--max-response-tokens"),
        (["trace", "generate", "/proc/t.gz"], "PATH='/proc/t.gz': cannot be written"),
        (["simulate", "x", "--json", "/proc/o.json"], "--json='/proc/o.json': cannot be written"),
        (["simulate", "x", "--plot", "/proc/o.png"], "--plot='/proc/o.png': cannot be written"),
        (["simulate", "x", "--json", "./x"], "--json='x': is another file of the same command"),
        (["simulate", "x", "--cluster", "c.json", "--json", "c.json"], "another file of the same command"),
        (["simulate", "x", "--model", "m.json", "--json", "m.json"], "another file of the same command"),
        (["simulate", "x", "--calibration", "y", "--json", "y"], "another file of the same command"),
        (["simulate", "x", "--json", "y.png", "--plot", "y.png"], "--plot='y.png': is another file"),
        (["trace", "stats", "missing.jsonl"], r"missing\.jsonl"),
    ],
)
def test_bad_input_is_one_clear_error(args: list[str], message: str) -> None:
    with pytest.raises(RlhflessError, match=message):
        run(*args)


def write(path: Path, lengths: list[int]) -> Path:
    """Write a trace of one prompt with these lengths."""
    header = {"format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "max_response_tokens": 10, "n": 1}
    header |= {"kind": "composed", "source": "s", "licence": "l", "note": ""}
    group = {"prompt_id": "a", "prompt_tokens": 0, "response_tokens": lengths}
    path.write_text(json.dumps(header) + "\n" + json.dumps({"step": 1, "epoch": 1, "groups": [group]}) + "\n")
    return path


def test_every_input_is_read_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("something was computed")

    good, bad = write(tmp_path / "good.jsonl", [3]), write(tmp_path / "bad.jsonl", [-3])
    monkeypatch.setattr("verl_rlhfless.sim_cli._run", fail)
    with pytest.raises(RlhflessError, match=r"bad\.jsonl, line 2"):
        run("simulate", str(good), str(bad))
    with pytest.raises(RlhflessError, match=r"training llama2-70b needs \d+ GB"):
        run("simulate", str(good), "--model", "qwen2.5-3b,llama2-70b")


def test_a_disk_that_fills_up_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(RlhflessError, match=r"--json='/dev/full': cannot be written: No space left"):
        run("simulate", str(write(tmp_path / "t.jsonl", [3])), "--arms", "stock_sync", "--json", "/dev/full")


def test_prompts_and_responses_without_tokens_give_a_record_of_numbers(tmp_path: Path) -> None:
    path, out = write(tmp_path / "t.jsonl", [3, 0]), tmp_path / "o.json"
    run("simulate", str(path), "--model", "qwen2.5-3b", "--arms", "stock_sync", "--json", str(out))
    bound = json.loads(out.read_text(), parse_constant=pytest.fail)["runs"][0]["bound"]
    assert all(value > 0 for value in bound.values())
    rows = [line.split() for line in run("trace", "stats", str(path)).splitlines()]
    assert dict(zip(rows[0], rows[1], strict=True))["p50"] == "2"  # of 0 and 3
    write(path, [0, 0])
    assert dict(zip(rows[0], run("trace", "stats", str(path)).splitlines()[1].split(), strict=True))["max"] == "0"


def test_the_largest_trace_that_may_be_asked_for_can_be_read(tmp_path: Path) -> None:
    path = trace(tmp_path, "--prompt-tokens", "1000000000", "--mean", "1000000000", "--drift", "10")
    assert len(list(read_trace(path))) == 4


def test_generation_says_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    args = ["--groups", "16", "--n", "4", "--steps-per-epoch", "2", "--mean", "900", "--max-response-tokens", "1000"]
    text = run("trace", "generate", str(path), *args)
    steps = list(read_trace(path))
    lengths = [tokens for step in steps for group in step.groups for tokens in group.response_tokens]
    mean = f"{sum(lengths) / len(lengths):.0f}"
    assert text == f"wrote {path}: 4 steps, 256 samples, mean length {mean} tokens after the cap of 1000\n"


def test_the_header_names_what_is_not_as_usual_and_names_may_stand_after_a_space(tmp_path: Path) -> None:
    args = ["simulate", str(write(tmp_path / "t.jsonl", [3])), "--model", "qwen2.5-3b", "--arms"]
    plain, *_ = run(*args, "stock_sync").splitlines()
    assert "recipe" not in plain and "wake" not in plain
    lines = run(*args, "ours, stock_sync", "--recipe", "ppo", "--kv-transfer", "--wake-s", "3").splitlines()
    for setting in ("recipe ppo", "keys and values are transferred", "wake 3 s"):
        assert setting in lines[0]
    assert [line.split()[0] for line in lines[2:5]] == ["stock_sync", "stock_sync_best_tp", "ours"]
