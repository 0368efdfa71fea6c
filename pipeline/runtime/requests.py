"""What a user asks for, and every way in which that can be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import Problem, RequestError
from pipeline.runtime.sampling import MAX_SEED, SamplingOptions
from pipeline.runtime.tokenizer import TextTokenizer

MAX_STOP_WORDS = 16
MAX_STOP_WORD_CHARS = 256


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it. Building one checks nothing; `prepare_request` does.

    Attributes:
        prompt: text, its UTF-8 bytes, or token ids (used as they are, nothing added).
        max_tokens: the most tokens to generate.
        temperature: 0 is greedy. Left out, it is 1 if top_k or top_p ask for sampling, else 0.
        top_k: keep only the k most likely tokens; 0 is off.
        top_p: keep the most likely tokens up to this probability, in (0, 1]; 1 is off.
        seed: makes sampling repeatable, whatever else is being served at the same time.
        stop_words: texts that end the output; they are not part of it.
    """

    prompt: str | bytes | tuple[int, ...]
    max_tokens: int
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_words: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class RequestLimits:
    """What the engine was built for, in tokens.

    Attributes:
        max_input_len: longest prompt.
        max_seq_len: longest prompt and output together.
        vocab_size: token ids are below it.
    """

    max_input_len: int
    max_seq_len: int
    vocab_size: int


@dataclass(frozen=True)
class PreparedRequest:
    """A request that was found right, with its prompt as tokens."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingOptions
    stop_words: tuple[str, ...]


def prepare_request(
    request: GenerationRequest, tokenizer: TextTokenizer, limits: RequestLimits
) -> PreparedRequest:
    """Check everything and tokenize the prompt. Safe to call from several threads.

    Raises:
        RequestError: with every problem of the request, not only the first.
    """
    problems: list[Problem] = []
    prompt_ids = _prompt_ids(request.prompt, tokenizer, limits, problems)
    _check_max_tokens(request, len(prompt_ids), limits, problems)
    _check_sampling(request, problems)
    stop_words = _stop_words(request.stop_words, problems)
    if problems:
        raise RequestError(problems)
    return PreparedRequest(
        prompt_ids=prompt_ids,
        max_tokens=request.max_tokens,
        sampling=SamplingOptions(
            temperature=_temperature(request),
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        ),
        stop_words=stop_words,
    )


def _temperature(request: GenerationRequest) -> float:
    if request.temperature is not None:
        return request.temperature
    return 1.0 if request.top_k > 0 or request.top_p < 1.0 else 0.0


def _prompt_ids(
    prompt: str | bytes | tuple[int, ...],
    tokenizer: TextTokenizer,
    limits: RequestLimits,
    problems: list[Problem],
) -> tuple[int, ...]:
    """Tokens of the prompt; empty when it is wrong."""
    if len(prompt) == 0:
        problems.append(Problem("prompt", "it is empty", "at least one character or token"))
        return ()
    if isinstance(prompt, tuple):
        wrong = [token for token in prompt if not 0 <= token < limits.vocab_size]
        if wrong:
            problems.append(
                Problem("prompt", f"token id {wrong[0]}", f"0 to {limits.vocab_size - 1}")
            )
            return ()
        prompt_ids = prompt
    else:
        text = _decode_utf8(prompt, "prompt", problems)
        longest = limits.max_input_len * tokenizer.longest_token_chars
        if len(text) > longest:  # found without tokenizing megabytes
            problems.append(
                Problem(
                    where="prompt",
                    what=f"{len(text)} characters are more than {limits.max_input_len} tokens can hold",
                    allowed=f"at most max_input_len = {limits.max_input_len} tokens",
                    fix="shorten it, or build the engine with a larger max_input_len",
                )
            )
            return ()
        prompt_ids = tokenizer.encode(text) if text else ()
        if text and not prompt_ids:
            problems.append(Problem("prompt", f"{text[:40]!r} has no token in this vocabulary"))
    _check_prompt_length(len(prompt_ids), limits, problems)
    return prompt_ids


def _check_prompt_length(length: int, limits: RequestLimits, problems: list[Problem]) -> None:
    if length > limits.max_input_len:
        problems.append(
            Problem(
                where="prompt",
                what=f"it has {length} tokens",
                allowed=f"at most max_input_len = {limits.max_input_len}",
                fix="shorten it, or build the engine with a larger max_input_len",
            )
        )
    elif length >= limits.max_seq_len:
        problems.append(
            Problem(
                where="prompt",
                what=f"its {length} tokens leave no room for an answer",
                allowed=f"at most max_seq_len - 1 = {limits.max_seq_len - 1}",
                fix="shorten it, or build the engine with a larger max_seq_len",
            )
        )


def _check_max_tokens(
    request: GenerationRequest, prompt_length: int, limits: RequestLimits, problems: list[Problem]
) -> None:
    asked = request.max_tokens
    if asked <= 0:
        problems.append(Problem("max_tokens", f"{asked} is not positive", "1 or more"))
        return
    room = limits.max_seq_len - prompt_length
    too_long_already = prompt_length > limits.max_input_len or room <= 0
    if asked > room and not too_long_already:
        problems.append(
            Problem(
                where="max_tokens",
                what=(
                    f"{prompt_length} prompt tokens + {asked} = {prompt_length + asked} "
                    f"are more than max_seq_len = {limits.max_seq_len}"
                ),
                allowed=f"1 to {room} with this prompt",
                fix="ask for fewer tokens, or build the engine with a larger max_seq_len",
            )
        )


def _check_sampling(request: GenerationRequest, problems: list[Problem]) -> None:
    temperature, top_p, seed = request.temperature, request.top_p, request.seed
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        problems.append(Problem("temperature", f"{temperature:g}", "0 (greedy) or a larger number"))
    if request.top_k < 0:
        problems.append(Problem("top_k", f"{request.top_k} is negative", "0 (off) or more"))
    if not 0 < top_p <= 1:  # also refuses NaN
        problems.append(Problem("top_p", f"{top_p:g}", "above 0, at most 1 (off)"))
    if seed is not None and not 0 <= seed <= MAX_SEED:
        problems.append(Problem("seed", str(seed), "0 to 2**64 - 1"))


def _stop_words(words: tuple[str | bytes, ...], problems: list[Problem]) -> tuple[str, ...]:
    if len(words) > MAX_STOP_WORDS:
        problems.append(
            Problem("stop_words", f"there are {len(words)}", f"at most {MAX_STOP_WORDS}")
        )
        return ()
    texts = []
    for number, word in enumerate(words, start=1):
        where = f"stop_words, number {number}"
        if len(word) == 0:
            problems.append(Problem(where, "it is empty", "at least one character"))
            continue
        text = _decode_utf8(word, where, problems)
        if len(text) > MAX_STOP_WORD_CHARS:
            problems.append(
                Problem(where, f"it has {len(text)} characters", f"at most {MAX_STOP_WORD_CHARS}")
            )
        texts.append(text)
    return tuple(texts)


def _decode_utf8(text: str | bytes, where: str, problems: list[Problem]) -> str:
    """The text; empty when it is not valid Unicode."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(
                Problem(
                    where=where,
                    what=f"invalid UTF-8 at byte {error.start} (0x{text[error.start]:02x})",
                    allowed="UTF-8 text",
                )
            )
            return ""
    if _has_lone_surrogate(text):
        problems.append(Problem(where, "it has a lone surrogate", "valid Unicode text"))
        return ""
    return text


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
