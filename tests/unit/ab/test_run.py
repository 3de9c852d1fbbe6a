"""``rlhfless ab`` from options to exit code, with the recipe's composition and the training itself faked."""

from __future__ import annotations

import json
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.ab.test_arms import FACTS
from tests.unit.observed_run import elastic_run, stock_run
from verl_rlhfless.ab import run as module
from verl_rlhfless.ab.probe import RecipeFacts
from verl_rlhfless.ab.run import AbOptions, common_overrides, prepare
from verl_rlhfless.ab.training import ArmOutcome, Say, Training
from verl_rlhfless.cli import app
from verl_rlhfless.errors import ConfigError

COMMAND = "python -m verl.trainer.main_ppo data.x=1"
TINY = replace(
    FACTS, gpus_per_node=4, prompts=2, samples=2, mini_batch=2, is_fp32=True, environment={"VERL_PLATFORM": "cpu"}
)


class Fake:
    """Stands for Hydra and for verl: trainings leave the records of a run, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.facts: RecipeFacts = TINY
        self.trained: list[Training] = []
        self.failing: set[str] = set()
        self.checked: list[str] = []
        monkeypatch.setattr(module, "probe", lambda recipe: self.facts)
        monkeypatch.setattr(module, "check_arm", lambda recipe, name, *_: self.checked.append(name))
        monkeypatch.setattr(module, "train", self.train)
        monkeypatch.setattr(module, "count_gpus", lambda: 0)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(
            "verl_rlhfless.report.folder.draw_timelines", lambda *_, **__: None
        )  # tests of report/ draw
        monkeypatch.setattr(module.signal, "signal", lambda *_: None)

    def train(self, training: Training, say: Say) -> ArmOutcome:
        self.trained.append(training)
        name = training.folder.name
        if name in self.failing:
            return ArmOutcome(training.folder, 1, (), "verl ended with exit code 1: no memory")
        training.folder.mkdir(parents=True, exist_ok=True)
        if not (training.folder / "leases.jsonl").exists():
            run = (elastic_run if name == "elastic" else stock_run)(training.folder)
            for step in (1, 2):
                run.lengths(step, {0: [10, 20], 1: [30, 40]})
        return ArmOutcome(training.folder, 0, ())

    def names(self) -> list[str]:
        return [training.folder.name for training in self.trained]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    monkeypatch.chdir(tmp_path)
    return Fake(monkeypatch)


def ab(*arguments: str, command: str = COMMAND) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["ab", command, "--out", "out", "--steps", "2", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_sound_arms_end_with_0_a_record_and_a_report(fake: Fake, tmp_path: Path) -> None:
    code, out, _ = ab()
    assert code == 0 and fake.names() == ["stock", "elastic"]
    assert {"ab.json", "report.md", "recipe.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "arms stock, elastic, each on 4 GPUs of private Ray clusters" in out and "report.md" in out


def test_every_arm_gets_the_recipe_unchanged_and_only_further_overrides(fake: Fake, tmp_path: Path) -> None:
    ab("--plugin-override", "rlhfless.weights.bucket_mib=16")
    stock, elastic = fake.trained
    assert stock.argv[:3] == elastic.argv[:3] == ["bash", "-c", f'{COMMAND} "$@"']
    assert stock.cwd == elastic.cwd == tmp_path
    assert list(stock.argv[-2:]) == ["+rlhfless=off", "trainer.v1.trainer_mode=sync"]
    assert "rlhfless.weights.bucket_mib=16" in elastic.argv and "rlhfless.weights.bucket_mib=16" not in stock.argv
    assert "trainer.total_training_steps=2" in stock.argv and "trainer.total_training_steps=2" in elastic.argv
    assert stock.environment["VERL_PLATFORM"] == "cpu"


def test_a_failing_arm_ends_with_1_and_only_it_is_run_again(fake: Fake) -> None:
    fake.failing = {"stock"}
    code, out, _ = ab()
    assert code == 1 and fake.names() == ["stock", "elastic"]
    assert "stock: FAILED: verl ended with exit code 1: no memory" in out
    fake.failing = set()
    code, out, _ = ab()
    assert code == 0 and fake.names() == ["stock", "elastic", "stock"]
    assert "elastic: kept from an earlier run" in out


def test_our_arms_are_checked_before_any_runs_and_those_that_are_kept_are_not(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    ab()
    assert fake.checked == ["elastic"]
    ab("--arms", "stock,elastic,resident")
    assert fake.checked == ["elastic", "resident"]

    def refuse(recipe: object, name: str, *_: object) -> None:
        raise ConfigError("--arms", name, "cannot run", "Or leave this arm out.")

    monkeypatch.setattr(module, "check_arm", refuse)
    fake.trained.clear()
    code, _, errors = ab("--steps", "3")
    assert code == 2 and not fake.trained and "--arms='elastic': cannot run" in errors


def test_an_arm_that_was_trained_in_another_way_is_run_again(fake: Fake) -> None:
    ab()
    fake.facts = replace(TINY, trained="after a variable of the script, or a file of the configuration, has changed")
    ab()
    assert fake.names() == ["stock", "elastic", "stock", "elastic"]


def test_arms_of_a_trace_that_was_written_anew_are_run_again(fake: Fake, tmp_path: Path) -> None:
    header = {"format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "max_response_tokens": 10, "n": 1}
    header |= {"kind": "composed", "source": "s", "licence": "l", "note": ""}
    for tokens in (3, 3, 4):
        group = {"prompt_id": "p", "prompt_tokens": 1, "response_tokens": [tokens]}
        lines = [header, {"step": 1, "epoch": 1, "groups": [group]}]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ab("--arms", "stock", "--trace", "t.jsonl")
    assert fake.names() == ["stock", "stock"]


def test_a_recipe_that_goes_on_from_a_checkpoint_does_as_many_steps(fake: Fake, tmp_path: Path) -> None:
    options = AbOptions(COMMAND, tmp_path, "stock", 2)
    chosen = common_overrides(replace(TINY, first_step=120, epochs=30), options, tmp_path / "stock")
    assert {"trainer.total_training_steps=122", "trainer.total_epochs=122"} <= set(chosen)


def test_an_arm_that_another_commit_ran_is_run_again_and_the_record_names_the_commit(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, commit in enumerate(("0ld", "n0w"), start=1):
        made_by = {"commit": commit, "has_uncommitted_changes": False}
        monkeypatch.setattr(module, "code", lambda made_by=made_by: made_by)
        monkeypatch.setattr("verl_rlhfless.report.ab.code", lambda made_by=made_by: made_by)
        ab()
        assert fake.names() == ["stock", "elastic"] * number
    assert json.loads((tmp_path / "out" / "ab.json").read_text())["commit"] == "n0w"


def test_an_arm_that_is_added_later_joins_those_that_are_there(fake: Fake) -> None:
    ab("--arms", "stock")
    assert ab()[0] == 0 and fake.names() == ["stock", "elastic"]


def test_more_steps_are_another_run_of_the_same_recipe(fake: Fake) -> None:
    ab("--arms", "stock")
    code, _, _ = ab("--arms", "stock", "--steps", "3")
    assert code == 1, "the fake run has two steps, so the guard must fail"
    assert fake.names() == ["stock", "stock"]


def test_another_recipe_in_the_same_folder_is_refused_with_2_before_anything_runs(fake: Fake) -> None:
    ab()
    code, _, errors = ab(command=f"{COMMAND} data.y=2")
    assert code == 2 and len(fake.trained) == 2
    assert len(errors.splitlines()) == 1 and "comparison of another recipe" in errors


@pytest.mark.parametrize(
    ("arguments", "command", "says"),
    [
        (["--steps", "0"], COMMAND, "--steps=0: must be >= 1"),
        (["--arms", "stock,elastik"], COMMAND, "--arms='elastik': must be among"),
        (["--trainer-gpus", "9"], COMMAND, "--trainer-gpus=9"),
        (["--trace", "missing.jsonl"], COMMAND, "missing.jsonl"),
        (["--plugin-override", "word"], COMMAND, "must be a Hydra override"),
        (["--arm-timeout-h", "0"], COMMAND, "--arm-timeout-h=0.0: must be > 0"),
        (["--arm-timeout-h", "nan"], COMMAND, "--arm-timeout-h=nan: must be > 0"),
        (["--out", "recipe.sh/out"], COMMAND, "is a file"),
        (["--trace", "negative.jsonl"], COMMAND, "negative.jsonl, line 2"),
        ([], "missing.sh", "no such script"),
        ([], "python train.py", "is not a verl training"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(fake: Fake, arguments: list[str], command: str, says: str) -> None:
    Path("recipe.sh").write_text("")
    header = {"format": "rlhfless-trace/1", "name": "t", "unit": "tokens", "max_response_tokens": 10, "n": 1}
    header |= {"kind": "composed", "source": "s", "licence": "l", "note": ""}
    Path("negative.jsonl").write_text(json.dumps(header) + '\n{"step": -1, "epoch": 1, "groups": []}\n')
    code, _, errors = ab(*arguments, command=command)
    assert code == 2 and not fake.trained
    (line,) = errors.splitlines()
    assert line.startswith("rlhfless: error: ") and says in line


def test_without_gpus_or_the_cpu_platform_the_host_is_refused_and_a_running_cluster_is_not(fake: Fake) -> None:
    fake.facts = replace(TINY, environment={})
    options = AbOptions(COMMAND, Path("out"), "stock", 2)
    with pytest.raises(ConfigError, match="this host has 0 GPUs, and no Ray cluster is given"):
        prepare(options, {})
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert prepare(options, {"RAY_ADDRESS": address}).address == address
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS.*nothing answers there"):
        prepare(options, {"RAY_ADDRESS": address})
    fake.facts = replace(TINY, nnodes=2)
    with pytest.raises(ConfigError, match=r"trainer\.nnodes=2: needs a Ray cluster"):
        prepare(options, {})
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS.*Ray client"):
        prepare(options, {"RAY_ADDRESS": "ray://head:10001"})
    fake.facts = replace(TINY, environment={"RAY_ADDRESS": "auto"})
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS='auto': the recipe chooses its Ray cluster itself"):
        prepare(options, {})


def test_an_environment_in_which_verl_may_not_load_the_plugin_is_refused(fake: Fake) -> None:
    with pytest.raises(ConfigError, match="VERL_USE_EXTERNAL_PLUGINS='none'"):
        prepare(AbOptions(COMMAND, Path("out"), "stock", 2), {"VERL_USE_EXTERNAL_PLUGINS": "none"})


def test_a_terminal_that_is_closed_ends_the_arm_and_nohup_is_heeded() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        module._end_with_clusters()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        module._end_with_clusters()
        for number, code in [(signal.SIGHUP, 129), (signal.SIGTERM, 143)]:
            handler = signal.getsignal(number)
            assert callable(handler)
            with pytest.raises(SystemExit) as ended:
                handler(number, None)
            assert ended.value.code == code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_replayed_trace_and_a_running_cluster_need_a_little_more(fake: Fake, tmp_path: Path) -> None:
    facts = replace(TINY, ray_limits=("num_cpus",), epochs=30)
    options = AbOptions(COMMAND, tmp_path, "stock", 2, trace=Path("t,1.jsonl"))
    chosen = common_overrides(facts, options, tmp_path / "stock")
    assert f'rlhfless.replay.trace="{tmp_path}/t,1.jsonl"' in chosen and "data.shuffle=False" in chosen
    assert "ray_kwargs.ray_init.num_cpus=null" in chosen and "trainer.total_epochs=30" in chosen


def test_differences_of_probability_are_judged_by_what_the_recipe_computes_in(fake: Fake) -> None:
    options = AbOptions(COMMAND, Path("out"), "stock", 2)
    assert prepare(options, {}).comparison.limits.probs_diff == 1e-6
    fake.facts = replace(TINY, is_fp32=False)
    assert prepare(options, {}).comparison.limits.probs_diff is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report", "none"], "no such folder"),
        (["trace", "record", ".", "--out", "trace.txt"], "named *.jsonl"),
        (["trace", "record", "none", "--out", "trace.jsonl"], "no such folder"),
    ],
)
def test_bad_folders_are_one_line_and_exit_code_2(fake: Fake, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_recorded_arm_becomes_a_trace_and_a_report(fake: Fake, tmp_path: Path) -> None:
    ab()
    result = CliRunner().invoke(app, ["trace", "record", "out/stock", "--out", "trace.jsonl"])
    assert result.exit_code == 0, result.stderr
    assert "2 steps, 4 groups, 8 responses of 200 tokens" in result.stdout
    assert CliRunner().invoke(app, ["report", "out/stock"]).exit_code == 0


def test_the_commands_explain_themselves() -> None:
    for command in (["ab"], ["report"], ["trace", "record"]):
        result = CliRunner().invoke(app, [*command, "--help"])
        assert result.exit_code == 0 and "Usage" in result.stdout
