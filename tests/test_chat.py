"""Chats: templates, prompts that are asked in them, and one conversation in one cache."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ctxprune.cli.chat import _stoppable
from ctxprune.cli.main import main
from ctxprune.pruner.checkpoints.checkpoint import load_off, load_tokenizer
from ctxprune.pruner.checkpoints.convert import convert
from ctxprune.pruner.config import ChatConfig, GenerateConfig
from ctxprune.pruner.conversation import ChatTemplate, Conversation
from ctxprune.pruner.device import place
from ctxprune.pruner.engine.handle import handle_of
from ctxprune.pruner.errors import CtxpruneError
from ctxprune.pruner.generation import generate

END = "<|endoftext|>"
SAID = "{{ message['role'][0] }}: {{ message['content'] }}"
ASK = "{% if add_generation_prompt %}a: {% endif %}"
TEMPLATE = "{% for message in messages %}" + SAID + END + "{% endfor %}" + ASK
# What is not the last answer loses its words.
REWRITES = TEMPLATE.replace(
    SAID,
    "{{ message['role'][0] }}: {{ message['content'] if message['role'] != 'assistant' else '' }}",
)
MESSAGES = ["I saw the sea", "and the boats", "who is he", "tell me more", "the old captain"]
LEVELS = {0.8: (0.2, 0.3, 0.1, 0.2)}


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, as if it had been taught to chat."""
    folder = tmp_path_factory.mktemp("chat") / "m"
    convert(None, folder, {"levels": LEVELS, "tuned": 0.8})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def conversation_of(
    folder: Path, config: ChatConfig, *, policy: str = "gate", template: str = TEMPLATE
) -> tuple[Any, Conversation]:
    """A model in double precision, and a conversation with it."""
    model = load_off(folder, place("cpu", "float64"))
    sparsity = 0.0 if config.sparsity is None else config.sparsity
    handle_of(model).use(policy, sparsity, max_rows=config.max_rows)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    return model, Conversation(model, tokenizer, config)


def is_one_pass(model: Any, ids: list[int], answers: list[tuple[int, int]]) -> bool:
    """Whether answers, from one place to another, are the best tokens of a pass over all."""
    with torch.no_grad():
        best = model(torch.tensor([ids]), use_cache=False).logits[0].argmax(dim=-1).tolist()
    return all(ids[start:stop] == best[start - 1 : stop - 1] for start, stop in answers)


@pytest.mark.parametrize(
    ("policy", "sparsity"), [("gate", 0.0), ("gate", 0.5), ("h2o", 0.0), ("sink", 0.5)]
)
def test_fifty_turns_take_constant_memory_and_are_the_text_of_one_pass(
    chat_folder: Path, policy: str, sparsity: float
) -> None:
    config = ChatConfig(sparsity=sparsity, max_rows=256, max_new_tokens=7)
    model, conversation = conversation_of(chat_folder, config, policy=policy)
    places, held = [], []
    for turn in range(50):
        answer = conversation.say(MESSAGES[turn % len(MESSAGES)])
        assert answer.savings is not None and not answer.reread
        places.append((len(conversation.ids) - answer.tokens, len(conversation.ids)))
        held.append(answer.savings)
    assert sum(stop - start for start, stop in places) > 200
    assert len({savings.kv_bytes for savings in held}) == 1
    assert max(savings.rows for savings in held) <= 256
    assert held[-1].tokens > 700 and held[-1].rows > (200 if sparsity == 0 else 100)
    assert held[-1].kv_bytes < held[-1].dense_kv_bytes
    assert is_one_pass(model, conversation.ids, places)


def test_only_what_is_new_is_read(chat_folder: Path) -> None:
    model, conversation = conversation_of(chat_folder, ChatConfig(max_rows=64, max_new_tokens=5))
    read: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for text in MESSAGES:
        conversation.say(text)
    assert sum(read) <= len(conversation.ids) and max(read) < 20
    assert conversation.messages[-1]["role"] == "assistant"


def test_without_eviction_a_conversation_is_dense(chat_folder: Path) -> None:
    model, conversation = conversation_of(chat_folder, ChatConfig(max_new_tokens=5))
    answers = [conversation.say(text) for text in MESSAGES]
    assert all(answer.savings is None for answer in answers)
    end = len(conversation.ids)
    assert is_one_pass(model, conversation.ids, [(end - answers[-1].tokens, end)])


def test_a_stopped_answer_is_kept(chat_folder: Path) -> None:
    model, conversation = conversation_of(chat_folder, ChatConfig(max_rows=64, max_new_tokens=20))
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    answer = conversation.say("tell me more", stopped=stopped)
    assert (answer.tokens, answer.ended) == (3, False)
    after = conversation.say("go on")
    assert not after.reread and conversation.messages[1]["content"] == answer.text
    assert is_one_pass(model, conversation.ids, [(len(conversation.ids) - after.tokens, -1)])


def test_a_pass_that_breaks_off_leaves_a_conversation_that_goes_on(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = conversation_of(chat_folder, ChatConfig(max_rows=64, max_new_tokens=5))
    model, conversation = conversation_of(chat_folder, ChatConfig(max_rows=64, max_new_tokens=5))
    for each in (whole, conversation):
        each.say(MESSAGES[0])

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.base_model.register_forward_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        conversation.say(MESSAGES[1])
    hook.remove()
    assert conversation.say(MESSAGES[1]).text == whole.say(MESSAGES[1]).text
    assert conversation.messages == whole.messages


def test_a_template_that_rewrites_is_read_again(chat_folder: Path) -> None:
    config = ChatConfig(max_rows=64, max_new_tokens=5)
    _, conversation = conversation_of(chat_folder, config, template=REWRITES)
    answers = [conversation.say(text) for text in MESSAGES[:3]]
    assert [answer.reread for answer in answers] == [False, True, True]
    text = load_tokenizer(chat_folder).decode(conversation.ids)
    expected = "".join(f"u: {m}{END}a: {END}" for m in MESSAGES[:2]) + f"u: {MESSAGES[2]}{END}a: "
    assert text == expected + answers[2].text


def test_reset_forgets(chat_folder: Path) -> None:
    config = ChatConfig(max_rows=64, max_new_tokens=5, system="You sail.")
    _, conversation = conversation_of(chat_folder, config)
    first = conversation.say(MESSAGES[0])
    conversation.say(MESSAGES[1])
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "You sail."}]
    assert conversation.say(MESSAGES[0]) == first


@pytest.mark.parametrize(
    ("template", "eos", "trained", "ends"),
    [
        (TEMPLATE, 0, True, [0]),
        (TEMPLATE, [0, 7], True, [0, 7]),
        (TEMPLATE.replace(END, "<end>"), 0, False, [0, 9]),
        (TEMPLATE.replace(END, "<end>"), [0, 9], True, [0, 9]),
        (TEMPLATE.replace(END, "\n"), 0, False, [0]),
    ],
    ids=["eos", "one of several", "a base model", "an end of turn", "no special token"],
)
def test_where_an_answer_ends(
    tokenizer: PreTrainedTokenizerFast, template: str, eos: Any, trained: bool, ends: list[int]
) -> None:
    own: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END)
    own.add_special_tokens({"additional_special_tokens": ["<end>"]})
    end = own.convert_tokens_to_ids("<end>")
    own.chat_template = template
    as_ids = {9: end}
    eos = [as_ids.get(i, i) for i in eos] if isinstance(eos, list) else eos
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))
    found = ChatTemplate(model, own)
    assert (found.trained, found.ends) == (trained, sorted(as_ids.get(i, i) for i in ends))


def test_a_refusal_of_the_template_is_an_error(chat_folder: Path) -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    config = ChatConfig(system="You sail.")
    _, conversation = conversation_of(chat_folder, config, template=template + TEMPLATE)
    with pytest.raises(CtxpruneError, match="no system"):
        conversation.say("hello")


def test_generate_asks_where_a_template_was_learned(chat_folder: Path) -> None:
    model = load_off(chat_folder, place("cpu", "float32"))
    handle_of(model).use("gate", 0.8)
    tokenizer = load_tokenizer(chat_folder)
    text = "I saw the sea"
    wholes = {}
    for chat in (None, True, False):
        pieces: list[str] = []
        config = GenerateConfig((text,), chat=chat, max_new_tokens=12)
        done = generate(model, tokenizer, config, pieces.append)
        assert "".join(pieces).strip() == done.texts[0].strip() and END not in done.texts[0]
        assert done.chat == (chat is not False)
        wholes[chat] = done.texts[0]
    assert wholes[None] == wholes[True] and not wholes[True].startswith(text)
    assert wholes[False].startswith(text)
    asked = generate(model, tokenizer, GenerateConfig((f"u: {text}{END}a: ",), chat=False,
                                                      max_new_tokens=12))  # fmt: skip
    assert asked.texts[0].endswith(wholes[True].strip())


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, typed: str = "") -> int | str | None:
    """Run the command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["ctxprune", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_takes_a_line_a_turn(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(chat_folder), "--max-rows", "48", "--max-new-tokens", "6"]
    typed = "I saw the sea\n\nand the boats\n/reset\nI saw the sea\n/exit\nnever read\n"
    assert run(["chat", *options], monkeypatch, typed) == 0
    shown = capsys.readouterr()
    answers = shown.out.splitlines()
    assert len(answers) == 3 and answers[0] == answers[2] and END not in shown.out
    told = [line for line in shown.err.splitlines() if line.startswith("[")]
    assert len(told) == 3 and all("rows a layer" in line and " MB" in line for line in told)
    assert shown.err.splitlines()[0].startswith("loading the model: cpu")
    assert run(["chat", *options], monkeypatch, "/rest\n") == 2
    assert "did you mean `/reset`?" in capsys.readouterr().err


def test_a_model_without_a_template_cannot_chat(
    embedded_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for arguments in (["chat"], ["generate", "--chat", "hello"]):
        command, *rest = arguments
        assert run([command, "--model", str(embedded_folder), *rest], monkeypatch) == 2
        assert "has no chat template" in capsys.readouterr().err


def test_generate_says_that_it_asks(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["generate", "--model", str(chat_folder), "--max-new-tokens", "6", "I saw"]
    assert run(options, monkeypatch) == 0
    asked = capsys.readouterr()
    assert "`--no-chat` continues the text instead" in asked.err and "I saw" not in asked.out
    assert run([*options, "--no-chat"], monkeypatch) == 0
    continued = capsys.readouterr()
    assert "--no-chat" not in continued.err and continued.out.startswith("I saw")
    assert run([*options, "--json"], monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chat"] is True and told["savings"]["rows"] > 0


def test_ctrl_c_asks_an_answer_to_end_and_twice_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _stoppable() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
