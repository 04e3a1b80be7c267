"""oarlock chat: which turns of a conversation are kept, and the program in a pipe and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys

import pytest

from helpers import LLM, reset_signals, run_program
from oarlock.cli.commands import chat as chat_command
from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.models.generate import ask_model
from oarlock.sampling.params import SamplingParams
from oarlock.serve.chat import AnswerFailed, Chat
from oarlock.serve.config import EngineConfig
from oarlock.serve.engine.engine import Engine
from oarlock.serve.engine.loading import ServedModel
from oarlock.serve.request import PromptTooLong
from support.scripted_engine import Letters, Script

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '<' if m['role'] == 'user' }}{% endfor %}"


@pytest.fixture
def engine():
    made = []

    def make(context=64, ends=()):
        made.append(
            Engine(
                ServedModel("s", Script(), Letters({}), ChatTemplate("t", TEMPLATE, {}), context, frozenset(ends)),
                EngineConfig(),
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close(drain=False)


def test_a_conversation_is_kept_and_reset(engine):
    chat = Chat(engine(), SamplingParams(max_tokens=3), system="be brief")
    assert "".join(chat.ask("hi")) == "=>?"  # what follows "<"
    assert chat.messages == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "=>?"},
    ]  # fmt: skip
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_whitespace_around_an_answer_is_stripped(engine):
    sampling = SamplingParams(max_tokens=6, min_tokens=6)
    chat = Chat(engine(), sampling)
    chat._stream_texts = lambda question: iter([" ", "\n a", " ", "b", " \n", " "])
    assert "".join(chat.ask("x")) == "a b" and chat.messages[-1]["content"] == "a b"


def test_the_oldest_turns_are_dropped_when_the_context_is_full(engine):
    chat = Chat(engine(context=24), SamplingParams(max_tokens=4))
    for i in range(6):
        "".join(chat.ask(f"word{i}"))
    assert chat.dropped == 4 and [m["content"] for m in chat.messages[::2]] == ["word4", "word5"]
    with pytest.raises(PromptTooLong):
        list(chat.ask("x" * 30))


def test_a_failed_answer_leaves_the_conversation_as_it_was(engine):
    one = engine()

    def fails(tokens):
        raise MemoryError("full")

    one._model.decoder.fails = fails
    chat = Chat(one, SamplingParams(max_tokens=4))
    with pytest.raises(AnswerFailed, match="full"):
        list(chat.ask("hi"))
    assert chat.messages == []


def test_lines_of_a_pipe(engine, monkeypatch, capsys):
    one = engine(context=40)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\n/reset\n/what\nyou\n" + "x" * 50 + "\nme\n/quit\nno\n"))
    assert chat_command.talk(Chat(one, SamplingParams(max_tokens=2))) == 1  # one of them was too long
    out, err = capsys.readouterr()
    assert out == "=>\n" * 3 and "may have 40" in err and "/quit leaves" in err and "new conversation" in err


def test_ctrl_c_ends_an_answer_but_not_the_program(engine, monkeypatch, capsys):
    chat = Chat(engine(), SamplingParams(max_tokens=4))

    def pieces(question):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_stream_texts", pieces)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert chat_command.talk(chat) == 0
    assert capsys.readouterr().out == "half ...\n" * 2 and chat.messages[1]["content"] == "half"


def test_the_program_in_a_pipe(tiny_model):
    result = run_program("oarlock", "chat", str(tiny_model), "--max-tokens", "5", input="hello\nRepeat. / river\n")
    assert result.returncode == 0, result.stderr
    ((_, answer),) = ask_model(str(tiny_model), ["hello"], 5)
    assert result.stdout.startswith(f"{answer}\n") and answer and len(result.stdout) > len(answer) + 2
    assert "decoder" not in result.stdout and "fused decoder" in result.stderr


def test_wrong_arguments_are_refused(tiny_model):
    result = run_program("oarlock", "chat", str(tiny_model), "--temperature", "-1", input="")
    assert result.returncode == 2 and "temperature must be from 0 to 100" in result.stderr


def test_the_program_in_a_terminal(tiny_model):
    """A user types, presses Ctrl-C at the prompt, and leaves."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "oarlock", "chat", str(tiny_model), "--max-tokens", "5"]
    environment = {**os.environ, "PYTHONPATH": str(LLM), "TERM": "dumb"}
    how = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment, "start_new_session": True}
    with subprocess.Popen(words, preexec_fn=reset_signals, **how) as program:
        os.close(theirs)
        seen = ""

        def until(text, count, remind=None):
            nonlocal seen
            for _ in range(60):  # five minutes, against a test that hangs
                while seen.count(text) < count and select.select([ours], [], [], 5)[0]:
                    seen += os.read(ours, 4096).decode(errors="replace")
                if seen.count(text) >= count:
                    return
                if remind:
                    remind()
            raise AssertionError(seen)

        def press_ctrl_c():
            program.send_signal(signal.SIGINT)

        try:
            until("\r\n> ", 1)
            os.write(ours, b"hello\n")
            until("\r\n> ", 2)
            # Only a hint. (Between readline's prompt and its wait for a key, Python defers signals.)
            press_ctrl_c()
            until("/quit leaves", 2, remind=press_ctrl_c)
            os.write(ours, b"/quit\n")
            assert program.wait(300) == 0
        finally:
            program.kill()
            os.close(ours)
