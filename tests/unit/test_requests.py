"""Every way in which a request can be wrong, and what is made of a right one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.errors import RequestError
from pipeline.runtime.requests import GenerationRequest, RequestLimits, prepare_request
from pipeline.runtime.sampling import SamplingOptions
from pipeline.runtime.tokenizer import TextTokenizer
from tests.triton.tokenizers_for_tests import byte_level, save

LIMITS = RequestLimits(max_input_len=20, max_seq_len=32, vocab_size=420)
GOOD = GenerationRequest(prompt="The dog", max_tokens=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(save(byte_level(), tmp_path_factory.mktemp("tokenizer")))


def _errors(request: GenerationRequest, tokenizer: TextTokenizer) -> list[str]:
    with pytest.raises(RequestError) as caught:
        prepare_request(request, tokenizer, LIMITS)
    return [str(problem) for problem in caught.value.problems]


WRONG: list[tuple[GenerationRequest, str]] = [
    (replace(GOOD, prompt=""), "prompt: it is empty; allowed: at least one character or token"),
    (replace(GOOD, prompt=b""), "prompt: it is empty; allowed: at least one character or token"),
    (replace(GOOD, prompt=()), "prompt: it is empty; allowed: at least one character or token"),
    (
        replace(GOOD, prompt=b"a\xe2("),
        "prompt: invalid UTF-8 at byte 1 (0xe2); allowed: UTF-8 text",
    ),
    (
        replace(GOOD, prompt="a\ud800"),
        "prompt: it has a lone surrogate; allowed: valid Unicode text",
    ),
    (replace(GOOD, prompt=(1, 420)), "prompt: token id 420; allowed: 0 to 419"),
    (replace(GOOD, prompt=(-1,)), "prompt: token id -1; allowed: 0 to 419"),
    (
        replace(GOOD, prompt=(5,) * 21),
        "prompt: it has 21 tokens; allowed: at most max_input_len = 20; "
        "fix: shorten it, or build the engine with a larger max_input_len",
    ),
    (
        replace(GOOD, prompt="x" * 100_000),
        "prompt: 100000 characters are more than 20 tokens can hold; "
        "allowed: at most max_input_len = 20 tokens; "
        "fix: shorten it, or build the engine with a larger max_input_len",
    ),
    (replace(GOOD, max_tokens=0), "max_tokens: 0 is not positive; allowed: 1 or more"),
    (replace(GOOD, max_tokens=-7), "max_tokens: -7 is not positive; allowed: 1 or more"),
    (
        replace(GOOD, prompt=(5,) * 20, max_tokens=13),
        "max_tokens: 20 prompt tokens + 13 = 33 are more than max_seq_len = 32; "
        "allowed: 1 to 12 with this prompt; "
        "fix: ask for fewer tokens, or build the engine with a larger max_seq_len",
    ),
    (replace(GOOD, temperature=-0.1), "temperature: -0.1; allowed: 0 (greedy) or a larger number"),
    (
        replace(GOOD, temperature=math.nan),
        "temperature: nan; allowed: 0 (greedy) or a larger number",
    ),
    (
        replace(GOOD, temperature=math.inf),
        "temperature: inf; allowed: 0 (greedy) or a larger number",
    ),
    (replace(GOOD, top_k=-1), "top_k: -1 is negative; allowed: 0 (off) or more"),
    (replace(GOOD, top_p=0.0), "top_p: 0; allowed: above 0, at most 1 (off)"),
    (replace(GOOD, top_p=1.1), "top_p: 1.1; allowed: above 0, at most 1 (off)"),
    (replace(GOOD, top_p=math.nan), "top_p: nan; allowed: above 0, at most 1 (off)"),
    (replace(GOOD, seed=-1), "seed: -1; allowed: 0 to 2**64 - 1"),
    (replace(GOOD, seed=2**64), "seed: 18446744073709551616; allowed: 0 to 2**64 - 1"),
    (replace(GOOD, stop_words=("x",) * 17), "stop_words: there are 17; allowed: at most 16"),
    (
        replace(GOOD, stop_words=("x", "")),
        "stop_words, number 2: it is empty; allowed: at least one character",
    ),
    (
        replace(GOOD, stop_words=(b"\x80",)),
        "stop_words, number 1: invalid UTF-8 at byte 0 (0x80); allowed: UTF-8 text",
    ),
    (
        replace(GOOD, stop_words=("y" * 257,)),
        "stop_words, number 1: it has 257 characters; allowed: at most 256",
    ),
]


@pytest.mark.parametrize(("request_", "error"), WRONG, ids=[error[:40] for _, error in WRONG])
def test_wrong(request_: GenerationRequest, error: str, tokenizer: TextTokenizer) -> None:
    assert _errors(request_, tokenizer) == [error]


def test_all_problems_are_listed(tokenizer: TextTokenizer) -> None:
    request = GenerationRequest(
        b"\xff", max_tokens=0, temperature=-1, top_k=-1, top_p=2, seed=-1, stop_words=("", b"\xff")
    )
    assert [error.partition(":")[0] for error in _errors(request, tokenizer)] == [
        "prompt",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "stop_words, number 1",
        "stop_words, number 2",
    ]


def test_a_prompt_as_long_as_the_sequence_leaves_no_room(tokenizer: TextTokenizer) -> None:
    limits = RequestLimits(max_input_len=32, max_seq_len=32, vocab_size=420)
    with pytest.raises(RequestError) as caught:
        prepare_request(replace(GOOD, prompt=(5,) * 32), tokenizer, limits)
    assert str(caught.value) == (
        "prompt: its 32 tokens leave no room for an answer; allowed: at most max_seq_len - 1 = 31; "
        "fix: shorten it, or build the engine with a larger max_seq_len"
    )


def test_the_limits_themselves_are_allowed(tokenizer: TextTokenizer) -> None:
    request = GenerationRequest(
        (419,) * 20,
        max_tokens=12,
        top_p=1.0,
        seed=2**64 - 1,
        stop_words=("y" * 256, *("x",) * 15),
    )
    prepared = prepare_request(request, tokenizer, LIMITS)
    assert prepared.prompt_ids == (419,) * 20
    assert prepared.max_tokens == 12


def test_text_and_its_bytes_are_the_same_prompt(tokenizer: TextTokenizer) -> None:
    text = "Grüße 🙂"
    prepared = prepare_request(replace(GOOD, prompt=text), tokenizer, LIMITS)
    assert prepared == prepare_request(replace(GOOD, prompt=text.encode()), tokenizer, LIMITS)
    assert prepared.prompt_ids == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        (GOOD, 0.0),
        (replace(GOOD, top_k=5), 1.0),
        (replace(GOOD, top_p=0.9), 1.0),
        (replace(GOOD, top_p=0.9, temperature=0.0), 0.0),
        (replace(GOOD, temperature=0.3), 0.3),
    ],
)
def test_temperature_left_out_means_greedy_unless_sampling_is_asked_for(
    given: GenerationRequest, temperature: float, tokenizer: TextTokenizer
) -> None:
    sampling = prepare_request(given, tokenizer, LIMITS).sampling
    assert sampling == SamplingOptions(temperature, given.top_k, given.top_p, given.seed)
