"""With the patch a stop string is found wherever a request was cut; an unknown vLLM is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest, detokenizer

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.sampling import params_of_attempt
from verl_rlhfless_patches import vllm_stop_strings

PROMPT = list(b"Q: </ 1 + 1? ")
ANSWER = "two </wrong> é </search> and on"


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, and vLLM with the patch as long as the test lasts."""
    names = {f"<0x{byte:02X}>": byte for byte in range(256)}
    fast = Tokenizer(models.BPE(names, [], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stock = detokenizer.IncrementalDetokenizer.__dict__["from_new_request"]
    monkeypatch.setattr(detokenizer.IncrementalDetokenizer, "from_new_request", stock)
    vllm_stop_strings._patch(detokenizer)
    vllm_stop_strings._patch(detokenizer)  # an actor launches one server after the other
    return PreTrainedTokenizerFast(tokenizer_object=fast)


def generate(tokenizer: Any, cut: int, **params: Any) -> str:
    """Return what vLLM lets through of the answer when the request is cut after ``cut`` tokens."""
    tokens, done = list(ANSWER.encode()), 0
    while True:
        attempt = SamplingParams(**params_of_attempt(params, done, 99))
        prompt = PROMPT + tokens[:done]
        request = EngineCoreRequest("r", prompt, None, attempt, None, 0.0, None, None, None)
        made = detokenizer.IncrementalDetokenizer.from_new_request(tokenizer, request)
        for token in tokens[done : cut if done < cut else None]:
            done += 1
            if made.update([token], False):
                return bytes(tokens[:done]).decode()
        assert made.output_token_ids == tokens[len(prompt) - len(PROMPT) : done], (
            "its text is before the cut, not its tokens"
        )
        if done == len(tokens):
            return ANSWER


@pytest.mark.parametrize("params", [{"stop": "</search>"}, {"stop": ["none", "é </search>"]}])
def test_a_stop_string_ends_a_response_wherever_it_was_cut(tokenizer: Any, params: dict[str, Any]) -> None:
    ends = {generate(tokenizer, cut, **params) for cut in range(len(ANSWER.encode()))}
    assert ends == {"two </wrong> é </search>"}


def test_what_the_prompt_holds_or_min_tokens_passed_over_stops_nothing(tokenizer: Any) -> None:
    ends = {generate(tokenizer, cut, stop="</", min_tokens=8) for cut in range(1, 13)}
    assert ends == {"two </wrong> é </"}


def test_an_unknown_vllm_is_refused() -> None:
    class Stock:
        @classmethod
        def from_new_request(cls, request: Any) -> None: ...

    module = ModuleType("detokenizer")
    module.__dict__.update(
        IncrementalDetokenizer=Stock, BaseIncrementalDetokenizer=detokenizer.BaseIncrementalDetokenizer
    )
    with pytest.raises(UnsupportedError, match="pin vLLM"):
        vllm_stop_strings._patch(module)
