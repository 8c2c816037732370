"""`ctxprune chat`: one conversation, in a cache of constant size."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctxprune.cli.console import complain, fail, read_lines, say, stream
from ctxprune.cli.options import (
    TEXT,
    Device,
    DeviceMap,
    Dtype,
    Level,
    MaxRows,
    Model,
    Policy,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    option,
    settings,
)
from ctxprune.cli.workspace import current
from ctxprune.pruner.config import ChatConfig
from ctxprune.pruner.errors import CtxpruneError, choose

if TYPE_CHECKING:
    from ctxprune.pruner.conversation import Answer, Conversation

EXAMPLES = """
Examples:

  ctxprune chat --max-rows 256

  ctxprune chat --model ./smol --system "Answer in one sentence." --temperature 0.7

  printf 'My name is Ada.\\nWhat is my name?\\n' | ctxprune chat
"""

COMMANDS = {"/reset": "begin anew", "/exit": "leave, as Ctrl-D does"}


def chat(
    ctx: typer.Context,
    model: Model = None,
    system: System = None,
    max_new_tokens: Annotated[
        int | None, option("Tokens of an answer, at most", ChatConfig.max_new_tokens, TEXT)
    ] = None,
    stop: Stop = None,
    sparsity: Level = None,
    policy: Policy = None,
    max_rows: MaxRows = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
) -> None:
    """Talk to an instruct model; the conversation takes constant memory, however long it is.

    Ctrl-C stops an answer; /reset begins anew; /exit or Ctrl-D leaves.

    From a pipe, every line is a message.

    Rows a layer: those of the sparsity at the tuned context, or of the cap.

    With `--sparsity 0` they are those of the cap alone.
    """
    config = ChatConfig(**settings(ctx, ChatConfig))
    folder = current(model)
    from ctxprune.pruner.checkpoints.checkpoint import load_off, load_tokenizer
    from ctxprune.pruner.conversation import Conversation
    from ctxprune.pruner.device import place
    from ctxprune.pruner.engine.handle import handle_of

    loaded = load_off(folder, place(config.device, config.dtype, config.device_map), say)
    handle = handle_of(loaded)
    level = handle.config.tuned if config.sparsity is None else config.sparsity
    handle.use(config.policy, level, max_rows=config.max_rows)
    conversation = Conversation(loaded, load_tokenizer(folder), config)
    if handle.policy is None:
        say("nothing is evicted: the cache grows; give `--max-rows N`, or tune the model")
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        say("; ".join(f"{name}: {what}" for name, what in COMMANDS.items()))
    for line in _typed() if at_terminal else read_lines():
        try:
            if not _obey(line.strip(), conversation):
                break
        except CtxpruneError as error:
            if not at_terminal:
                raise
            fail(error)


def _typed() -> Iterator[str]:
    """Lines that are typed, until the end of them."""
    import readline  # noqa: F401 - lines can be edited, and had again

    while True:
        try:
            with _on_ctrl_c(_give_up):
                line = input("> ")
        except EOFError:
            return
        except _GivenUp:
            complain("\n/exit or Ctrl-D leaves")
            continue
        yield line


class _GivenUp(Exception):
    """Ctrl-C was pressed where a line is typed."""


def _give_up(*_: Any) -> None:
    raise _GivenUp


def _obey(line: str, conversation: Conversation) -> bool:
    """Do what a line says, whether it is a command or a message; returns whether to go on.

    Raises:
        CtxpruneError: it is a command that is not known, or the model cannot answer.
    """
    if line.startswith("/") and " " not in line:
        command = choose("command", line, COMMANDS)
        if command == "/reset":
            conversation.reset()
            say("the conversation begins anew")
        return command != "/exit"
    if line:
        with _stoppable() as stopped:
            answer = conversation.say(line, stream, stopped)
        _tell(answer)
    return True


def _tell(answer: Answer) -> None:
    """What the cache holds after an answer."""
    if answer.reread:
        say("the chat template rewrites what was said before, so all of it was read again")
    ending = "" if answer.ended else "cut; "
    if answer.savings is None:
        say(f"[{ending}{answer.seen:,} tokens read, dense]")
    else:
        say(f"[{ending}{answer.savings.brief}]")


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed inside: once it asks for an end, twice it interrupts."""
    pressed = False

    def press(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    with _on_ctrl_c(press):
        yield lambda: pressed


@contextmanager
def _on_ctrl_c(do: Callable[..., None]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, do)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
