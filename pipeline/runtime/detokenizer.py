"""Token ids to text, piece by piece, and stop words found in that text.

A token is not a piece of text: a character can be spread over four tokens, and whether a token begins
with a space depends on its predecessor. So a small window of tokens is decoded together, and only what
the newest token added is released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 8

Decode = Callable[[Sequence[int]], str]


class IncrementalDetokenizer:
    """Text of a growing list of tokens.

    The pieces joined equal what decoding prompt and output together adds to the prompt, with two
    deliberate exceptions. A character that the end cuts in half is dropped: a replacement character
    there would be text that the model never wrote. And with byte-fallback vocabularies, where one
    invalid byte makes decoders discard its valid neighbours, a character once complete stays.

    Args:
        decode: ids to text, special tokens left out.
        prompt_ids: the tokens before the first output token, for the space at the border.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        tail = list(prompt_ids[-CONTEXT_TOKENS:])
        # A window that decodes to nothing (special tokens only) hides whether text came before it.
        self._window = tail if decode(tail) else list(prompt_ids)
        self._read = len(self._window)  # the text of window[:_read] has been released
        self._released = decode(self._window)

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now complete, often empty in mid-character."""
        self._window.append(token_id)
        pending = self._pending()
        if not pending or pending.endswith(REPLACEMENT):
            return ""
        self._slide()
        return pending

    def finish(self) -> str:
        """Text still held back, without the half character at its end."""
        pending = self._pending().rstrip(REPLACEMENT)
        self._slide()
        return pending

    def _pending(self) -> str:
        text = self._decode(self._window)
        if text.startswith(self._released):
            return text[len(self._released) :]
        # Byte fallback: a new invalid byte spoiled released characters; decode the new tokens alone.
        return self._decode(self._window[self._read :])

    def _slide(self) -> None:
        newest = self._window[self._read :]
        released = self._decode(newest)
        if released:
            self._window, self._released = newest, released
        else:  # a lone space that decoders strip at the beginning: keep the older tokens before it
            self._released = self._decode(self._window)
        self._read = len(self._window)


class StopWordFilter:
    """Passes text on until a stop word is complete; never releases the beginning of one.

    The word that is complete first wins, and of those the longest; so the result does not depend on
    how the text was cut into pieces. Neither the word nor what follows is released.
    """

    def __init__(self, stop_words: Sequence[str]) -> None:
        assert all(stop_words), "an empty stop word matches everywhere"
        self._words = tuple(stop_words)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what may be released. Afterwards `stopped` tells whether a word was found."""
        if self.stopped:
            return ""
        self._held += text
        found = self._first_match()
        if found is not None:
            released, self._held, self.stopped = self._held[:found], "", True
            return released
        keep = self._start_of_a_word()
        released, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return released

    def finish(self) -> str:
        """The held text: no word can be completed any more."""
        released, self._held = self._held, ""
        return released

    def _first_match(self) -> int | None:
        """Where the stop word begins that is complete first; None when there is none."""
        matches = [
            (begin + len(word), begin)
            for word in self._words
            if (begin := self._held.find(word)) >= 0
        ]
        return min(matches)[1] if matches else None

    def _start_of_a_word(self) -> int:
        """Length of the longest end of the held text that begins a stop word."""
        longest = max((len(word) for word in self._words), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            ending = self._held[len(self._held) - length :]
            if any(word.startswith(ending) for word in self._words):
                return length
        return 0
