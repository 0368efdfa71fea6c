"""Documents as token ids: what is needed of a tokenizer, and how dialogues become text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from pipeline.errors import PlanError, Problem
from pipeline.quant.data.documents import Document, Message


class TextEncoder(Protocol):
    """What is needed to cut texts; `pipeline.quant.source.SourceTokenizer` is the real one."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Token ids that begin every prompt."""

    @property
    def separator(self) -> tuple[int, ...]:
        """Token ids between two documents."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens."""


class DialogueEncoder(TextEncoder, Protocol):
    """What is needed for dialogues and for the report, too."""

    @property
    def has_chat_template(self) -> bool:
        """Whether dialogues can be rendered."""

    def render(self, messages: Sequence[Message]) -> str:
        """The dialogue as text, by the tokenizer's chat template.

        Raises:
            ValueError: the template refuses it, for example an unknown role.
        """

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of rendered text: special tokens in it are what they say, none is added."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""


def check_chat_template(encoder: DialogueEncoder, where: str) -> None:
    """Raise PlanError when dialogues are asked for and the tokenizer has no template for them."""
    if not encoder.has_chat_template:
        raise PlanError(
            Problem(
                where,
                "the model's tokenizer has no chat template, so dialogues have no form",
                fix="put a chat_template.jinja beside the weights, or give plain text: `column:`",
            )
        )


def encode_document(document: Document, encoder: TextEncoder) -> list[int]:
    """Token ids of one document, without the prefix and the separator that windows add.

    Raises:
        PlanError: the chat template refuses a dialogue, or leaves a message out.
    """
    if document.messages is None:
        return encoder.encode(document.text)
    assert hasattr(encoder, "render"), "dialogues need an encoder that renders them"
    renderer = cast(DialogueEncoder, encoder)
    ids = renderer.encode_rendered(_rendered(document, renderer))
    prefix, separator = list(encoder.prefix), list(encoder.separator)
    if prefix and ids[: len(prefix)] == prefix:
        ids = ids[len(prefix) :]
    if separator and ids[-len(separator) :] == separator:
        ids = ids[: -len(separator)]
    return ids


def _rendered(document: Document, encoder: DialogueEncoder) -> str:
    assert document.messages is not None
    try:
        text = encoder.render(document.messages)
        if all(message.content.strip() in text for message in document.messages):
            return text
        lost = _lost_roles(document.messages, encoder)
    except ValueError as error:
        reason = str(error).strip().splitlines()
        raise PlanError(
            Problem(
                document.where,
                f"the chat template refuses the dialogue: {reason[0] if reason else 'no reason'}",
                allowed="roles and an order of turns that the model's template knows",
                fix=f"its roles are {', '.join(message.role for message in document.messages)}",
            )
        ) from error
    if lost:
        what = f"the chat template leaves out messages of role {', '.join(map(repr, lost))}"
        fix = "rename the role to one that the model's template knows"
        raise PlanError(Problem(document.where, what, fix=fix))
    return text  # templates may trim a content, such as the reasoning of an earlier turn


def _lost_roles(messages: Sequence[Message], encoder: DialogueEncoder) -> list[str]:
    """Roles whose messages do not come out at all, whatever they say."""
    marked = [Message(each.role, f"message{index:04}") for index, each in enumerate(messages)]
    text = encoder.render(marked)
    return sorted({each.role for each in marked if each.content not in text})
