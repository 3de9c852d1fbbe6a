"""A user's recipe as a shell command that takes further overrides, and what can be refused before it is started.

Overrides are appended as ``"$@"``, so quoting, variables and assignments of the command mean what they mean in a shell.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_rlhfless.errors import ConfigError

MAIN = "verl.trainer.main_ppo"
_KEY = "COMMAND"
_SHELLS = ("bash", "sh", "zsh")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_FORWARDED = re.compile(r"\$(?:[@*]|\{[@*])")
_FORWARDED_WHOLE = re.compile(r'"\$(?:@|\{@[^}]*\})"')
_MAIN = re.compile(r"verl[./]trainer[./]main_ppo\b")
_OURS = re.compile(r"(?:^|[\s\"'])[+~]{0,2}rlhfless(?:[./@][\w./@]*)?=")
_MODE = re.compile(r"trainer\.v1\.trainer_mode=[\"']?(\w+)")
_OWN_CLUSTER = re.compile(r"\bray\s+(?:start|stop|job)\b")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training command whose last word may be followed by Hydra overrides.

    Attributes:
        text: The command as it was given.
        shell: What a shell runs: ``text``, with its script handed to bash.
        script: The script that the command runs; ``None`` = Python itself.
        folder: Working directory.
        splits_words: Whether the script hands overrides on as ``$@`` without quotes, which takes them apart at blanks.
    """

    text: str
    shell: str
    script: Path | None
    folder: Path
    splits_words: bool = False

    def argv(self, overrides: Sequence[str]) -> list[str]:
        """Return the command line that runs the recipe with ``overrides`` appended."""
        return ["bash", "-c", f'{self.shell} "$@"', "rlhfless-ab", *overrides]

    def check_words(self, words: Iterable[str]) -> None:
        """Refuse overrides, or parts of them, that the script would not hand on as they are.

        Raises:
            ConfigError: One has a blank, and the script takes words apart.
        """
        broken = next((word for word in words if self.splits_words and len(word.split()) > 1), None)
        if broken is not None:
            rule = f"hands overrides on without quotes, which takes {broken!r} apart at its blanks"
            raise ConfigError(_KEY, self.text, rule, 'Write "$@" instead of $@ in the script.')

    def digest(self) -> str:
        """Return a digest of the command, of the script's text and of the folder in which both are meant."""
        parts = [self.shell, str(self.folder), self.script.read_text() if self.script else ""]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def shell_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which ``python`` is the one that this package is installed in."""
    scripts = str(Path(sys.executable).parent)
    return {**environ, "PATH": os.pathsep.join([scripts, environ.get("PATH", os.defpath)])}


def hydra_quoted(value: object) -> str:
    """Return a value that Hydra takes as this text; commas, blanks and brackets would mean something else.

    In its quotes a backslash is one, unless it comes before a quote.
    """
    text = re.sub(r'(\\*)("|$)', lambda end: end[1] * 2 + ('\\"' if end[2] else ""), str(value))
    return f'"{text}"'


def parse_recipe(text: str, folder: Path) -> Recipe:
    """Return the recipe that ``text`` is: ``[A=1 ...] python -m verl.trainer.main_ppo ...``, or a script.

    Args:
        text: What the user gave.
        folder: Where it runs; a script's path is relative to it.

    Raises:
        ConfigError: It is not one command, not verl, a script that is missing or takes no overrides, or it chooses a
            trainer mode or keys of this plugin itself, which is what the arms do.
    """
    text = text.replace("\\\n", " ").strip()
    words = _words(text)
    first = next((i for i, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
    rest = words[first:]
    if not rest:
        raise ConfigError(_KEY, text, "runs nothing", f"Give `python -m {MAIN} ...` or a script.")
    name = _script_name(text, rest)
    if name is None:
        _check_is_verl(text, rest)
        _check_arms_own_keys(" ".join(rest))
        return Recipe(text, text, None, folder)
    script = (folder / os.path.expandvars(name)).expanduser()
    content = _script_text(name, script)
    _check_arms_own_keys("\n".join([content, *rest[1:]]))
    spelled = re.compile(rf"(?<!\S)(['\"]?){re.escape(name)}\1(?!\S)")
    shell = text if rest[0] in _SHELLS else spelled.sub(lambda found: f"bash {found[0]}", text, count=1)
    return Recipe(text, shell, script, folder, splits_words=not _FORWARDED_WHOLE.search(content))


def _words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise ConfigError(_KEY, text, f"is no shell command: {error}", "Close the quotes.") from None
    several = [word for word in words if word and set(word) <= set("();<>|&")] or ["\n"] * ("\n" in text)
    if several or any(word.startswith("#") for word in words):
        rule = f"must be one plain command, and has {several[0]!r}" if several else "must not have a comment"
        raise ConfigError(_KEY, text, rule, 'Put it into a script whose training command ends in "$@".')
    return words


def _script_name(text: str, words: Sequence[str]) -> str | None:
    if words[0] in _SHELLS:
        if len(words) < 2 or words[1].startswith("-"):
            raise ConfigError(_KEY, text, f"gives no script to {words[0]}", f"Write {words[0]} SCRIPT.sh.")
        return words[1]
    return words[0] if words[0].endswith((".sh", ".bash")) else None


def _check_is_verl(text: str, words: Sequence[str]) -> None:
    if words[0] == "ray":
        rule = "goes through Ray's own launcher, which takes no environment along"
        raise ConfigError(_KEY, text, rule, f"Set RAY_ADDRESS and give `python -m {MAIN} ...`.")
    is_module = any(pair == ("-m", MAIN) for pair in itertools.pairwise(words))
    if not is_module and not any(word.endswith("verl/trainer/main_ppo.py") for word in words):
        raise ConfigError(
            _KEY, text, "is not a verl training", f"Give `python -m {MAIN} ...` or a script that runs it."
        )


def _script_text(name: str, script: Path) -> str:
    """Return the script without its comments, after checking that it trains with verl and takes overrides."""
    if not script.is_file():
        raise ConfigError(_KEY, name, "no such script", f"Give an existing script, or `python -m {MAIN} ...`.")
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_KEY, name, f"cannot be read: {error}", "Give a shell script.") from None
    content = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    if not _MAIN.search(content):
        raise ConfigError(_KEY, name, f"does not run {MAIN}", "Give the script that starts the training itself.")
    if not _FORWARDED.search(content):
        rule = 'does not hand overrides on to verl: "$@" is missing'
        raise ConfigError(_KEY, name, rule, 'Append "$@" to its training command.')
    if _OWN_CLUSTER.search(content):
        rule = "starts, stops or submits to Ray itself"
        raise ConfigError(_KEY, name, rule, "Start the cluster first, set RAY_ADDRESS, and leave that to it.")
    return content


def _check_arms_own_keys(content: str) -> None:
    if match := _OURS.search(content):
        rule = "the recipe chooses parts of this plugin itself, which is what the arms do"
        found = content[match.start() :].split()[0].strip("\"'")
        raise ConfigError(_KEY, found, rule, "Remove it, or hand it to the plugin's arms by --plugin-override.")
    modes = [mode for mode in _MODE.findall(content) if mode != "sync"]
    if modes:
        rule = "the recipe chooses a trainer mode itself, which is what the arms do"
        raise ConfigError(_KEY, f"trainer.v1.trainer_mode={modes[0]}", rule, "Remove it, and name the mode in --arms.")
