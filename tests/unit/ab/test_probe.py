"""What Hydra printed of a recipe becomes facts, whatever the recipe's script prints around it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from verl_rlhfless.ab.command import parse_recipe
from verl_rlhfless.ab.probe import RecipeFacts, _error_line, check_arm, probe
from verl_rlhfless.ab.probe import read_facts as read
from verl_rlhfless.errors import ConfigError

VALUES = {
    "gpus_per_node": "8", "nnodes": "2", "tp": "2", "prompts": "64", "samples": "8", "mini_batch": "32", "epochs": "3",
    "seed": "null", "mode": "sync", "use_v1": "true", "ours": "null", "rollout_dtype": "bfloat16", "switch": "false",
    "has_reward_pool": "false", "has_reward_model": "false", "reward_nnodes": "0", "reward_gpus_per_node": "8",
    "ray_num_cpus": "null", "ray_num_gpus": "null", "precision": "null", "strategy": "fsdp2", "ray_address": "null",
    "has_teachers": "false", "teacher_nnodes": "0", "teacher_gpus_per_node": "8", "resume_mode": "auto",
    "resume_from": "null", "logger": "[console, file]",
}  # fmt: skip
INHERITED = {"HOME": "/me", "PATH": "/bin"}


def read_facts(text: str, out: str) -> RecipeFacts:
    return read(text, out, INHERITED)


def printed(**changes: str) -> str:
    lr = changes.pop("lr", "1")
    environment = {**INHERITED, "PWD": "/", "A": "x", "BASH_FUNC_m%%": "() {", "PATH": "/b"}
    lines = [f"{key}: {value}" for key, value in {**VALUES, **changes}.items()]
    started_with = "\0".join(f"{name}={value}" for name, value in environment.items())
    encoded = base64.b64encode(started_with.encode()).decode()
    trained = ["trained:", "  actor:", f"    lr: {lr}", "    text: 'first", "", "      second'", "is_complete: true"]
    head = ["Mode: training", "# @package rlhfless_probe"]
    return "\n".join([*head, *lines, f"environment: {encoded}", *trained, "Epochs: 3", "Done!", ""])


def test_the_facts_are_those_that_hydra_resolved() -> None:
    facts = read_facts("run.sh", printed())
    assert (facts.trainer_gpus, facts.num_gpus, facts.tp, facts.seed) == (16, 16, 2, None)
    assert (facts.prompts, facts.samples, facts.mini_batch, facts.epochs) == (64, 8, 32, 3)
    assert (facts.is_fp32, facts.has_switch, facts.is_on_cpu, facts.ray_limits) == (False, True, False, ())
    assert facts.environment == {"A": "x", "PATH": "/b"} and facts.can_leave
    assert not read_facts("run.sh", printed(strategy="megatron")).can_leave


def test_a_pool_of_its_own_for_the_reward_counts_and_what_a_running_cluster_refuses_is_known() -> None:
    facts = read_facts(
        "r", printed(has_reward_model="true", has_reward_pool="true", reward_nnodes="1", ray_num_cpus="16")
    )
    assert (facts.trainer_gpus, facts.num_gpus, facts.ray_limits) == (16, 24, ("num_cpus",))
    assert not read_facts("r", printed(switch="null")).has_switch
    assert read_facts("r", printed(rollout_dtype="float32", precision="fp32")).is_fp32
    taught = printed(has_teachers="true", teacher_nnodes="1", teacher_gpus_per_node="4")
    assert read_facts("r", taught).num_gpus == 20


def test_recipes_that_train_in_another_way_have_another_digest() -> None:
    assert read_facts("r", printed()).trained == read_facts("r", printed()).trained
    assert read_facts("r", printed(lr="2")).trained != read_facts("r", printed()).trained


def test_a_recipe_that_goes_on_from_a_checkpoint_says_from_which_step() -> None:
    path = "/my/global_step_7/global_step_120"
    assert read_facts("r", printed(resume_mode="resume_path", resume_from=path)).first_step == 120
    assert read_facts("r", printed(resume_from=path)).first_step == 0


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("training...\n", "overrides do not reach verl"),
        (printed(use_v1="false"), "v0 trainer is not supported"),
        (printed(mode="separate_async"), "trainer_mode='separate_async'.*chooses a trainer mode"),
        (printed(ours="elastic"), "chooses parts of this plugin"),
        (printed(logger="[console, wandb]"), r"trainer\.logger=.*'wandb'.*Move \"\$@\" to the end"),
        (printed(ray_address="10.0.0.1:6379"), r"ray_init\.address='10.0.0.1:6379'.*not the one that is watched"),
        (printed(prompts="null"), r"data\.train_batch_size=None: must be a whole number from 1 on"),
        (printed(mini_batch="null"), r"ppo_mini_batch_size=None: must be a whole number from 1 on"),
        (printed(nnodes="two"), r"trainer\.nnodes='two': must be a whole number from 1 on"),
    ],
)
def test_a_recipe_that_cannot_be_compared_is_refused(out: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_facts("run.sh", out)


def test_hydras_own_words_are_shown_and_not_its_hints() -> None:
    lines = ["+ python -m x", "", "Could not override 'a.b'.", "Key 'a' is not in struct", "    full_key: a"]
    assert _error_line("\n".join(lines)) == "Could not override 'a.b'. Key 'a' is not in struct"
    assert _error_line("Traceback\n  File\nImportError: no x\n") == "ImportError: no x"
    assert _error_line("no x\n++ date\n") == "no x"
    assert _error_line("") == "it ended without a word"


def test_what_hydra_says_of_a_recipe_is_told_through_a_pipe_too(tmp_path: Path) -> None:
    for piped in ("", " 2>&1 | tee log"):
        (tmp_path / "run.sh").write_text(f'python -m verl.trainer.main_ppo no.such.key=1 "$@"{piped}')
        (tmp_path / "python").write_text("#!/bin/sh\necho \"Could not override 'no.such.key'.\" >&2; exit 1\n")
        (tmp_path / "python").chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("verl_rlhfless.ab.probe.shell_environment", lambda: {"PATH": f"{tmp_path}:/usr/bin:/bin"})
            with pytest.raises(ConfigError, match=r"verl does not accept it: Could not override 'no\.such\.key'"):
                probe(parse_recipe("run.sh", tmp_path))


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ("echo 'rlhfless: active: pool=elastic'", None),
        ("echo 'rlhfless: active: pool=elastic'; false  # merging a checkpoint that is not there", None),
        ("echo 'rlhfless: error: x=1: too much. Lower it.' >&2; false", "--arms='elastic': cannot run: x=1: too much"),
        ("echo 'rlhfless: error: x=1: too much. Lower it.' | tee log", "--arms='elastic': cannot run: x=1: too much"),
        ("echo 'ImportError: no x' >&2; false", "--arms='elastic': cannot run: ImportError: no x"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_another_one_runs(
    tmp_path: Path, said: str, refusal: str | None
) -> None:
    text = f'test "$RLHFLESS_CHECK_ONLY$RAY_ADDRESS" = 1here && test "$*" = "a=1 b=2" || exit 9\n{said}\nexit $?\n'
    (tmp_path / "run.sh").write_text(f'{text}python -m verl.trainer.main_ppo "$@"')
    recipe = parse_recipe("run.sh", tmp_path)
    if refusal is None:
        check_arm(recipe, "elastic", ["a=1", "b=2"], {"RAY_ADDRESS": "here"})
        return
    with pytest.raises(ConfigError, match=refusal):
        check_arm(recipe, "elastic", ["a=1", "b=2"], {"RAY_ADDRESS": "here"})
