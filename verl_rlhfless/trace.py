"""Reader of length traces, ``rlhfless-trace/1``: how long every response of a recorded or composed run was.

JSON Lines, optionally gzipped. The first line is the header, each later line one training step. The reader streams (one
step in memory at a time) and refuses whatever breaks a rule of the format with path, line number and rule.
"""

from __future__ import annotations

import difflib
import gzip
import json
import reprlib
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from verl_rlhfless.errors import DataError, why

FORMAT = "rlhfless-trace/1"
KINDS = ("recorded", "composed")
MAX_SAMPLES = 4096
"""Most responses to one prompt."""

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_COUNT = 2**53  # the largest range in which JSON numbers are exact everywhere
_TEXTS = ("name", "source", "licence", "note")
_HEADER_KEYS = ("format", "unit", "max_response_tokens", "n", "kind", *_TEXTS)
_STEP_KEYS = ("step", "epoch", "groups")
_GROUP_KEYS = ("prompt_id", "prompt_tokens", "response_tokens")
_GROUP_OPTIONS = ("prefix_id", "prefix_tokens", "turns", "score_s", "min_start_s")


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """Where a trace comes from and what bounds its lengths.

    Attributes:
        name: Short name of the trace.
        max_response_tokens: No response is longer.
        n: Responses per prompt that the run asked for; a group may hold another number.
        kind: ``recorded`` (counted from one policy's real output) or ``composed`` (drawn from the statistics that
            ``note`` names).
        source: Where the lengths or the statistics were taken from.
        licence: Licence of the source.
        note: Anything a reader of the figures has to know.
    """

    name: str
    max_response_tokens: int
    n: int
    kind: str
    source: str
    licence: str
    note: str


@dataclass(frozen=True, slots=True)
class TraceGroup:
    """The responses to one prompt in one step.

    Attributes:
        prompt_id: Recurs when the same prompt is visited again in a later epoch; unique in a step.
        prompt_tokens: Length of the prompt.
        response_tokens: Length of each response.
        prefix_id: Name of a prefix that other prompts share, ``None`` when there is none.
        prefix_tokens: Length of that prefix, part of ``prompt_tokens``.
        turns: Tokens of each turn, one tuple per response, which they add up to; ``None`` for a single turn.
        score_s: Seconds that the reward of each response takes; ``None`` when unknown.
        min_start_s: Earliest start within the step [s].
    """

    prompt_id: str
    prompt_tokens: int
    response_tokens: tuple[int, ...]
    prefix_id: str | None = None
    prefix_tokens: int = 0
    turns: tuple[tuple[int, ...], ...] | None = None
    score_s: tuple[float, ...] | None = None
    min_start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One training step: every group that was generated in it."""

    step: int
    epoch: int
    groups: tuple[TraceGroup, ...]


def read_header(path: str | Path) -> TraceHeader:
    """Return the header of the trace at ``path``.

    Raises:
        DataError: The file is missing, unreadable or empty, or its first line breaks a rule.
    """
    for line in _lines(Path(path)):
        return line.header()
    raise DataError(
        f"{path}: the file is empty; a trace starts with a header line. Give a file in the format {FORMAT}."
    )


def read_trace(path: str | Path) -> Iterator[TraceStep]:
    """Return an iterator over the steps of the trace at ``path``, in order; the header is checked at once.

    Raises:
        DataError: At once as in ``read_header``; while iterating when a line breaks a rule, and at the end when there
            was no step.
    """
    return _steps(Path(path), read_header(path))


def _steps(path: Path, header: TraceHeader) -> Iterator[TraceStep]:
    """Yield the steps that follow the header, in increasing order."""
    previous: int | None = None
    for line in _lines(path):
        if line.number == 1:
            continue
        step = line.step(header)
        if previous is not None and step.step <= previous:
            line.fail(f"step={step.step}: steps must increase, and the line before holds step {previous}")
        previous = step.step
        yield step
    if previous is None:
        raise DataError(f"{path}: the trace has a header but no step. Add one line per training step.")


def _lines(path: Path) -> Iterator[_Line]:
    """Yield the lines of a file, numbered from 1; whatever keeps it from being read is a ``DataError``."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                yield _Line(path, number, raw)
    except (OSError, EOFError, zlib.error) as error:
        place = f"{path}, line {number + 1}" if number else f"{path}"
        raise DataError(f"{place}: cannot be read: {why(error)}. Give a readable, complete file.") from error
    except ValueError as error:  # a path with a null byte
        raise DataError(f"{str(path)!r}: cannot be opened: {error}. Give a readable file.") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if it is gzipped, whatever its name."""
    with open(path, "rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        if not is_gzip:
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]  # GzipFile is a binary stream; typeshed does not say so


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a trace, and the checks of everything that may stand in it."""

    path: Path
    number: int
    raw: bytes

    def fail(self, rule: str) -> NoReturn:
        """Refuse the line: it breaks a rule, which is told with the value."""
        raise DataError(f"{self.path}, line {self.number}: {rule}. FORMATS.md describes the format {FORMAT}.")

    def header(self) -> TraceHeader:
        """Return the header that this line is."""
        record = self._object(self._parse(), "the header", _HEADER_KEYS)
        if record["format"] != FORMAT:
            self.fail(f"format={_short(record['format'])}: must be {FORMAT!r}")
        if record["unit"] != "tokens":
            self.fail(f"unit={_short(record['unit'])}: must be 'tokens'")
        if record["kind"] not in KINDS:
            self.fail(f"kind={_short(record['kind'])}: must be one of {', '.join(KINDS)}")
        n = self._count(record["n"], "n")
        if not 1 <= n <= MAX_SAMPLES:
            self.fail(f"n={n}: must be between 1 and {MAX_SAMPLES}")
        texts = {key: self._text(record[key], key) for key in _TEXTS}
        limit = self._count(record["max_response_tokens"], "max_response_tokens")
        return TraceHeader(max_response_tokens=limit, n=n, kind=record["kind"], **texts)

    def step(self, header: TraceHeader) -> TraceStep:
        """Return the step that this line is."""
        record = self._object(self._parse(), "a step", _STEP_KEYS)
        groups = record["groups"]
        if not isinstance(groups, list) or not groups:
            self.fail("groups: must be a list with at least one group")
        checked = tuple(self._group(group, f"groups[{i}]", header) for i, group in enumerate(groups))
        (prompt_id, visits), *_ = Counter(group.prompt_id for group in checked).most_common(1)
        if visits > 1:
            self.fail(f"prompt_id={_short(prompt_id)}: must be unique in a step")
        return TraceStep(self._count(record["step"], "step"), self._count(record["epoch"], "epoch"), checked)

    def _group(self, value: object, key: str, header: TraceHeader) -> TraceGroup:
        record = self._object(value, key, _GROUP_KEYS, _GROUP_OPTIONS)
        prompt_id = self._text(record["prompt_id"], f"{key}.prompt_id")
        prompt_tokens = self._count(record["prompt_tokens"], f"{key}.prompt_tokens")
        response_tokens = self._counts(record["response_tokens"], f"{key}.response_tokens")
        if not 1 <= len(response_tokens) <= MAX_SAMPLES:
            self.fail(f"{key}.response_tokens: has {len(response_tokens)} entries, must have 1 to {MAX_SAMPLES}")
        longest = max(response_tokens)
        if longest > header.max_response_tokens:
            self.fail(f"{key}.response_tokens: {longest} exceeds max_response_tokens={header.max_response_tokens}")
        if len(record) == len(_GROUP_KEYS):
            return TraceGroup(prompt_id, prompt_tokens, response_tokens)
        options = self._options(record, key, num_samples=len(response_tokens))
        for i, (turns, tokens) in enumerate(zip(options.get("turns", ()), response_tokens, strict=False)):
            if sum(turns) != tokens:
                self.fail(f"{key}.turns[{i}]: add up to {sum(turns)}, must be response_tokens[{i}]={tokens}")
        if options.get("prefix_tokens", 0) > prompt_tokens:
            self.fail(f"{key}.prefix_tokens={options['prefix_tokens']}: must be <= prompt_tokens={prompt_tokens}")
        return TraceGroup(prompt_id, prompt_tokens, response_tokens, **options)

    def _options(self, record: Mapping[str, Any], key: str, num_samples: int) -> dict[str, Any]:
        """Return the optional fields of a ``TraceGroup`` that a group has."""
        options: dict[str, Any] = {}
        if "prefix_id" in record:
            options["prefix_id"] = self._text(record["prefix_id"], f"{key}.prefix_id")
        if "prefix_tokens" in record:
            options["prefix_tokens"] = self._count(record["prefix_tokens"], f"{key}.prefix_tokens")
        if "turns" in record:
            per_sample = self._per_sample(record["turns"], f"{key}.turns", num_samples)
            options["turns"] = tuple(self._counts(turns, f"{key}.turns[{i}]") for i, turns in enumerate(per_sample))
        if "score_s" in record:
            score = record["score_s"]  # one figure for all samples, or one for each
            per_sample = score if isinstance(score, list) else [score] * num_samples
            checked = self._per_sample(per_sample, f"{key}.score_s", num_samples)
            options["score_s"] = tuple(self._seconds(value, f"{key}.score_s") for value in checked)
        if "min_start_s" in record:
            options["min_start_s"] = self._seconds(record["min_start_s"], f"{key}.min_start_s")
        return options

    def _parse(self) -> object:
        try:
            return json.loads(self.raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8: {error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            self.fail(f"not one JSON object: {error}")

    def _object(
        self, value: object, what: str, required: Collection[str], optional: Collection[str] = ()
    ) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{what}: must be a JSON object, got {_short(value)}")
        for key in required:
            if key not in value:
                self.fail(f"{what}: lacks the key {key!r}")
        if len(value) > len(required):
            for key in value:
                if key not in required and key not in optional:
                    close = difflib.get_close_matches(key, [*required, *optional], n=1)
                    self.fail(f"{what}: unknown key {_short(key)}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return value

    def _text(self, value: object, key: str) -> str:
        if not isinstance(value, str):
            self.fail(f"{key}={_short(value)}: must be a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"{key}={_short(value)}: holds half of a surrogate pair")
        return value

    def _count(self, value: object, key: str) -> int:
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:  # bool is an int, and not a count
            self.fail(f"{key}={_short(value)}: must be an integer >= 0 (at most 2**53)")
        return value

    def _counts(self, values: object, key: str) -> tuple[int, ...]:
        if not isinstance(values, list):
            self.fail(f"{key}={_short(values)}: must be a list of integers >= 0")
        if values and not (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= _MAX_COUNT):
            for i, value in enumerate(values):
                self._count(value, f"{key}[{i}]")
        return tuple(values)

    def _per_sample(self, values: object, key: str, num_samples: int) -> list[Any]:
        if not isinstance(values, list) or len(values) != num_samples:
            self.fail(f"{key}={_short(values)}: must be a list with one entry for each of the {num_samples} responses")
        return values

    def _seconds(self, value: object, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_COUNT:
            self.fail(f"{key}={_short(value)}: must be a number of seconds >= 0")
        return float(value)


def _short(value: object) -> str:
    return reprlib.repr(value)
