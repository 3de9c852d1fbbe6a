"""A recipe runs as a shell runs it, with overrides at its end; what cannot work is refused before anything starts."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_rlhfless.ab.command import parse_recipe, shell_environment
from verl_rlhfless.errors import ConfigError

MAIN = "python -m verl.trainer.main_ppo"


def run(argv: list[str], folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the arguments that ``python`` would see: a shell script stands for it."""
    fake = folder / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\0" "$(env -0 | base64 -w0)" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/me"}
    out = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, check=True, timeout=30).stdout
    encoded, *arguments = out.decode().split("\0")[:-1]
    import base64

    pairs = [pair.partition("=") for pair in base64.b64decode(encoded).decode().split("\0") if pair]
    return {name: value for name, _, value in pairs}, arguments


def test_a_command_keeps_its_assignments_quotes_and_variables_and_gets_the_overrides_last(tmp_path: Path) -> None:
    text = f"A=1 B='two words' {MAIN} data.x=$HOME/x \\\n  'trainer.logger=[\"console\"]'"
    recipe = parse_recipe(text, tmp_path)
    environment, arguments = run(recipe.argv(["a.b=[1,2]", 'c="d e"']), tmp_path)
    assert (environment["A"], environment["B"]) == ("1", "two words")
    assert arguments[2:] == ["data.x=/home/me/x", 'trainer.logger=["console"]', "a.b=[1,2]", 'c="d e"']
    assert recipe.script is None


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1), max_size=4),
    overrides=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), max_size=3),
)
def test_any_quoted_command_arrives_word_by_word(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], overrides: list[str]
) -> None:
    words = [f"data.x={word}" for word in words]
    folder = tmp_path_factory.mktemp("run")
    recipe = parse_recipe(f"{MAIN} {shlex.join(words)}", folder)
    assert run(recipe.argv(overrides), folder)[1] == ["-m", "verl.trainer.main_ppo", *words, *overrides]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_whatever_is_given_is_a_recipe_or_one_config_error(text: str) -> None:
    try:
        assert "main_ppo" in parse_recipe(text, Path("/nowhere")).text
    except ConfigError as error:
        assert error.rule and error.action


def script(folder: Path, body: str) -> Path:
    path = folder / "run.sh"
    path.write_text(f"#!/bin/bash\n# a comment with rlhfless.pool=off and $@\n{body}\n")
    return path


def test_a_script_runs_under_bash_with_its_own_arguments_first(tmp_path: Path) -> None:
    script(tmp_path, f'export SIZE=7B\nN=4\n{MAIN} trainer.n_gpus_per_node=$N "$@"')
    for text in ("run.sh x=1", "./run.sh x=1", "bash run.sh x=1", "A=b bash run.sh x=1"):
        recipe = parse_recipe(text, tmp_path)
        environment, arguments = run(recipe.argv(["y=2"]), tmp_path)
        assert arguments[2:] == ["trainer.n_gpus_per_node=4", "x=1", "y=2"], text
        assert environment["SIZE"] == "7B"


@pytest.mark.parametrize("text", ["'my runs/run.sh' x=1", '"my runs/run.sh" x=1', "A=run.sh ./run.sh x=1"])
def test_a_script_is_found_whatever_is_spelled_like_it(tmp_path: Path, text: str) -> None:
    for folder in (tmp_path, tmp_path / "my runs"):
        folder.mkdir(exist_ok=True)
        script(folder, f'{MAIN} "$@"')
    assert run(parse_recipe(text, tmp_path).argv(["y=2"]), tmp_path)[1][2:] == ["x=1", "y=2"]


def test_a_script_that_takes_words_apart_is_refused_when_one_has_a_blank(tmp_path: Path) -> None:
    for forwarded, splits in [("$@", True), ("$*", True), ("${@:1}", True), ('"$@"', False), ('"${@:1}"', False)]:
        script(tmp_path, f"{MAIN} {forwarded}")
        recipe = parse_recipe("run.sh", tmp_path)
        assert recipe.splits_words == splits
        recipe.check_words(["/out", "a=1"])
    recipe.check_words(["/my out"])
    script(tmp_path, f"{MAIN} $@")
    with pytest.raises(ConfigError, match=r"takes '/my out' apart at its blanks. Write \"\$@\" instead of \$@"):
        parse_recipe("run.sh", tmp_path).check_words(["/out", "/my out"])


@pytest.mark.parametrize("forwarded", ['"$@"', "$@", "${@}", '"${@:1}"', "$*"])
def test_every_way_to_hand_arguments_on_is_known(tmp_path: Path, forwarded: str) -> None:
    script(tmp_path, f"{MAIN} {forwarded}")
    assert parse_recipe("run.sh", tmp_path).script == tmp_path / "run.sh"


def test_the_digest_follows_the_command_and_the_text_of_its_script(tmp_path: Path) -> None:
    path = script(tmp_path, f'{MAIN} a=1 "$@"')
    first = parse_recipe("run.sh", tmp_path).digest()
    assert parse_recipe("run.sh", tmp_path).digest() == first
    assert parse_recipe("run.sh b=2", tmp_path).digest() != first
    path.write_text(path.read_text().replace("a=1", "a=2"))
    assert parse_recipe("run.sh", tmp_path).digest() != first


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "runs nothing"),
        ("A=1", "runs nothing"),
        ("python train.py", "is not a verl training"),
        ("python -m verl.trainer.main_ppo_v0", "is not a verl training"),
        (f"{MAIN} 'a", "is no shell command"),
        (f"{MAIN} | tee log", r"must be one plain command, and has '\|'"),
        (f"{MAIN} > log", "must be one plain command, and has '>'"),
        (f"cd x && {MAIN}", "must be one plain command"),
        (f"{MAIN} a=1 # the first", "must not have a comment"),
        (f"{MAIN}\n{MAIN}", "must be one plain command"),
        (f"ray job submit -- {MAIN}", "Ray's own launcher"),
        ("bash", "gives no script to bash"),
        ("missing.sh", "no such script"),
        (f"{MAIN} +rlhfless=default", r"^\+rlhfless=default=.*|chooses parts of this plugin"),
        (f"{MAIN} rlhfless.pool.max_gpus=4", "chooses parts of this plugin"),
        (f"{MAIN} rlhfless/planner=fixed", "chooses parts of this plugin"),
        (f"{MAIN} trainer.v1.trainer_mode=rlhfless_sync", "trainer_mode=rlhfless_sync.*chooses a trainer mode"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_recipe(text, tmp_path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (f"{MAIN} a=1", 'does not hand overrides on to verl: "\\$@" is missing'),
        (f"# {MAIN}\npython train.py $@", "does not run verl.trainer.main_ppo"),
        (f'{MAIN} trainer.v1.trainer_mode=colocate_async "$@"', "chooses a trainer mode"),
        (f'{MAIN} +rlhfless=resident "$@"', "chooses parts of this plugin"),
        (f'ray start --head\n{MAIN} "$@"', "starts, stops or submits to Ray itself"),
    ],
)
def test_a_script_that_cannot_work_is_refused_at_once(tmp_path: Path, body: str, says: str) -> None:
    script(tmp_path, body)
    with pytest.raises(ConfigError, match=says):
        parse_recipe("run.sh", tmp_path)


def test_verls_own_mode_and_names_that_only_look_like_ours_are_fine(tmp_path: Path) -> None:
    text = f"{MAIN} trainer.v1.trainer_mode=sync trainer.project_name=rlhfless_test data.x=/my/rlhfless/data"
    assert parse_recipe(text, tmp_path).text == text
    (tmp_path / "rlhfless").mkdir()
    script(tmp_path / "rlhfless", f'source rlhfless/bin/activate\n{MAIN} "$@"')
    assert parse_recipe("bash rlhfless/run.sh", tmp_path).script is not None


def test_python_is_the_one_of_this_package() -> None:
    program = "import sys, json; print(json.dumps(sys.prefix))"
    out = subprocess.run(["python", "-c", program], env=shell_environment(), capture_output=True, text=True, timeout=30)
    import sys

    assert json.loads(out.stdout) == sys.prefix
