"""Talking to a model: its chat template, and one conversation that goes on in one cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from ctxprune.pruner.config import ChatConfig
from ctxprune.pruner.data import by_template, encode
from ctxprune.pruner.device import input_device
from ctxprune.pruner.engine.cache import PrunedCache
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.finite import check_numbers
from ctxprune.pruner.savings import Savings
from ctxprune.pruner.untrusted import Generation

Message = dict[str, str]
# Stands for an answer where a template is asked how it ends one.
ANSWER = "an-answer"
# What a layer of a dense cache calls its tensors.
HELD = ("keys", "values")


class ChatTemplate:
    """How a tokenizer writes down a conversation, and where an answer of the model ends.

    Attributes:
        ends: ids that end an answer: those of the generation config, and the template's own.
        trained: the model ends a text where its template ends an answer, so it was taught it.

    Raises:
        CtxpruneError: the tokenizer has no template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise CtxpruneError(
                "this model has no chat template, so it was not made to chat",
                "take an instruct model, or continue a text with `ctxprune generate --no-chat`",
            )
        self._tokenizer = tokenizer
        own: Any = getattr(model.generation_config, "eos_token_id", None)
        known = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        end = self._end_of_turn()
        self.trained = end is not None and end in known
        self.ends: list[int] = sorted({*known, end} - {None})

    @property
    def ending(self) -> dict[str, Any]:
        """What transformers' `generate` is told of the end of an answer."""
        return {"eos_token_id": self.ends, "pad_token_id": self.ends[0]} if self.ends else {}

    def render(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """A conversation as text; `ask`: up to where the model's answer begins.

        Raises:
            CtxpruneError: the template refuses it.
        """
        return by_template(self._tokenizer, messages, ask=ask)

    def _end_of_turn(self) -> int | None:
        """The special token that the template writes behind an answer, if there is one."""
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        _, found, rest = self.render(asked, ask=False).rpartition(ANSWER)
        ids = encode(self._tokenizer, rest) if found else []
        special = {*self._tokenizer.all_special_ids}
        special |= {i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special}
        return next((i for i in ids if i in special), None)


def opening(config: ChatConfig) -> list[Message]:
    """The messages before the first one of the user."""
    return [] if config.system is None else [{"role": "system", "content": config.system}]


@dataclass(frozen=True)
class Answer:
    """An answer, and what the cache holds after it.

    Attributes:
        text: of the answer. tokens: that it has.
        ended: whether the model ended it; else it was cut at the limit, or stopped.
        reread: whether the conversation was read again from its start.
        seen: tokens that were read so far.
        savings: None where nothing is evicted.
    """

    text: str
    tokens: int
    ended: bool
    reread: bool
    seen: int
    savings: Savings | None


class Conversation:
    """One conversation, in one cache: each turn, only what is new is read.

    It evicts as the model's handle was told when the conversation began.

    Attributes:
        ids: of all that was read and written so far; the last one may not be in the cache yet.
        messages: of the system, the user and the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ChatConfig
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._config = config
        self._template = ChatTemplate(model, tokenizer)
        self._handle = handle_of(model)
        torch.manual_seed(config.seed)
        self.messages = opening(config)
        self.ids: list[int] = []
        self._text = ""  # what the ids stand for, but for special tokens of an answer
        self._cache = self._handle.cache()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = opening(self._config)
        self._forget()

    def say(
        self,
        text: str,
        on_text: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Say something to the model, and let it answer.

        Args:
            on_text: receives the answer as it is written.
            stopped: asked after every token whether the answer ends here; it is kept.

        Raises:
            CtxpruneError: the template refuses the message, or there are no positions left.
        """
        messages, rendered, ids, reread = self._asked(text)
        new = self._write(ids, on_text, stopped)
        ended = bool(new) and new[-1] in self._template.ends
        # The token that ends an answer was not read; the template brings it with the next message.
        new = new[: len(new) - ended]
        answer = self._tokenizer.decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(answer, str)
        self.ids, self._text = ids + new, rendered + answer
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        pruned = self._cache if isinstance(self._cache, PrunedCache) else None
        return Answer(
            answer,
            len(new),
            ended,
            reread,
            len(self.ids) - (not ended),
            None if pruned is None else pruned.savings,
        )

    def hear(self, text: str, answer: str) -> Tensor:
        """Say something to the model, and give it an answer as if it had written that.

        Returns:
            Logits (tokens of the answer, vocabulary): what the model would have written instead
            of each.

        Raises:
            CtxpruneError: the template refuses the message.
        """
        messages, rendered, ids, _ = self._asked(text)
        given = encode(self._tokenizer, answer)
        unread = [*ids, *given][self._cache.get_seq_length() :]
        with torch.inference_mode():
            logits: Tensor = self._model(
                torch.tensor([unread], device=input_device(self._model)),
                past_key_values=self._cache,
                logits_to_keep=len(given) + 1,
            ).logits
        self.ids, self._text = ids + given, rendered + answer
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return logits[0, :-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache: of its pages, or of the keys and values that a dense one has read."""
        if isinstance(self._cache, PrunedCache):
            return self._cache.nbytes
        held = [getattr(layer, name, None) for layer in self._cache.layers for name in HELD]
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))

    def _asked(self, text: str) -> tuple[list[Message], str, list[int], bool]:
        """The conversation with a message of the user.

        Returns:
            Its messages, text and ids up to where the answer begins, and whether it has to be
            read again from its start.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self._template.render(messages)
        reread = not rendered.startswith(self._text)
        if reread:
            self._forget()
        # What was written stays as it is: the rest begins behind it.
        rest = rendered[len(self._text) :]
        return messages, rendered, self.ids + encode(self._tokenizer, rest), reread

    def _forget(self) -> None:
        self.ids, self._text = [], ""
        self._cache = self._handle.cache()

    def _write(
        self, ids: list[int], on_text: Callable[[str], None] | None, stopped: Callable[[], bool]
    ) -> list[int]:
        """The ids that the model writes behind these, of which the cache has read the first."""
        options: dict[str, Any] = self._config.sampling
        if on_text is not None:
            options["streamer"] = Streamer(self._tokenizer, on_text, skip_prompt=True)
        if self._config.stop:
            options |= {"stop_strings": list(self._config.stop), "tokenizer": self._tokenizer}
        prompt = torch.tensor([ids], device=input_device(self._model))
        write: Any = self._model.generate
        try:
            with as_told(self._model):
                written = write(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    past_key_values=self._cache,
                    stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
                    logits_processor=LogitsProcessorList([Numbers()]),
                    **self._template.ending,
                    **options,
                )
        except CtxpruneError:
            raise
        except BaseException:
            # Some layers may have read more than others: the next turn begins with an empty cache.
            self._forget()
            raise
        new: list[int] = written[0, len(ids) :].tolist()
        return new


@contextmanager
def as_told(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's `generate` does what it is told, not what its own settings would have.

    Those that `Generation` names are heeded. Others ask for code of the hub, or for other outputs.
    """
    before: Any = model.generation_config
    heeded = {name: getattr(before, name, None) for name in Generation.__annotations__}
    model.generation_config = GenerationConfig(**heeded)
    try:
        yield
    finally:
        model.generation_config = before


class Streamer(TextStreamer):
    """transformers' streamer, with the text handed on instead of printed."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None],
        *,
        skip_prompt: bool = False,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive words as soon as they are sure."""
        self._on_text(text + "\n" * stream_end)


class Numbers(LogitsProcessor):
    """Ends a text whose next token would be drawn from what is no number."""

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        """The scores (b, vocabulary) as they are.

        Raises:
            CtxpruneError: some are NaN.
        """
        check_numbers(scores, "the model's predictions")
        return scores


class _Stop(StoppingCriteria):
    """Ends a text when somebody wants it."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """(b,) bool: the same for all."""
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device)
