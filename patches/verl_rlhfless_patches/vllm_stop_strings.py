"""Let vLLM find a stop string that begins before a request was cut and ends after it.

Why: vLLM looks for stop strings in the text that it generates itself (``vllm/v1/engine/detokenizer.py``,
``BaseIncrementalDetokenizer.update``); a request that continues on another engine brings its response so far as
prompt, and one whose stop string spans the cut would run on past its end.
What: the detokenizer of a request that says how many tokens at the prompt's end are its response so far (``GENERATED``
of its ``extra_args``) begins with their text. As many of them as a stop string can span are enough. Whoever reads
token ids, as verl does, sees no difference.
Remove when: vLLM takes a request's output so far, or verl's servers check stop strings themselves.
"""

from __future__ import annotations

import copy
import functools
import inspect
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.sampling import GENERATED

_MODULE = "vllm.v1.engine.detokenizer"
_PARAMETERS = ["tokenizer", "request"]
_USED = ("stop_check_offset = len(self.output_text)", "output_text=self.output_text", "stop=self.stop")
_MOST_TOKENS_OF_A_CHARACTER = 4  # a token is at least one byte of UTF-8


def apply() -> None:
    """Patch vLLM's detokenizer now if its module is loaded, else right after its first import.

    Raises:
        UnsupportedError: vLLM changed it (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)


def _patch(module: ModuleType) -> None:
    detokenizer = module.IncrementalDetokenizer
    original = detokenizer.from_new_request
    if hasattr(original, "_rlhfless"):
        return
    source = inspect.getsource(module.BaseIncrementalDetokenizer.update)
    if list(inspect.signature(original).parameters) != _PARAMETERS or not all(line in source for line in _USED):
        raise UnsupportedError(f"vLLM changed {_MODULE}. Update {__name__} or pin vLLM.")

    @functools.wraps(original)
    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        made = original(tokenizer, request)
        num_generated = (request.sampling_params.extra_args or {}).get(GENERATED, 0)
        if num_generated and getattr(made, "stop", None):
            made.output_text = _text_before(original, tokenizer, request, num_generated, made.stop)
        return made

    from_new_request._rlhfless = True  # type: ignore[attr-defined]
    detokenizer.from_new_request = classmethod(from_new_request)


def _text_before(original: Any, tokenizer: Any, request: Any, num_generated: int, stop: list[str]) -> str:
    """Return the text of the last tokens before the cut, as vLLM itself makes it."""
    count = min(num_generated, _MOST_TOKENS_OF_A_CHARACTER * max(map(len, stop)))
    before = copy.copy(request)
    before.prompt_token_ids, tail = request.prompt_token_ids[:-count], request.prompt_token_ids[-count:]
    earlier = original(tokenizer, before)
    earlier.stop = []  # one that was passed over, because min_tokens asked for more, stays passed over
    earlier.update(list(tail), False)
    return str(earlier.output_text)
