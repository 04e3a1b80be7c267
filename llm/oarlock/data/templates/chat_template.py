"""Chat templates: messages -> the text a model sees. Jinja, with transformers' names and rules.

One template makes the training text and is saved with the model (chat_template.jinja and tokenizer_config.json), so
that whoever serves the model asks it as it was trained.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from oarlock.data.records.messages import Message, normalize_messages, normalize_tools
from oarlock.data.templates.builtin import BUILT_IN
from oarlock.data.templates.jinja_environment import compile_template
from oarlock.data.templates.rendering import PreparedChat, RenderedChat, continued, place_of
from oarlock.data.templates.special_token_text import Words, spelling_pattern
from oarlock.data.templates.template_files import (
    DEFAULT,
    TEMPLATE_FILE,
    TOOL_USE,
    own_templates,
    read_template,
    save_templates,
)
from oarlock.data.templates.unrendered import check_rendered
from oarlock.data.tokenizers.load import special_spellings
from oarlock.errors import ConfigError, DataError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

__all__ = ["BUILT_IN", "TEMPLATE_FILE", "ChatTemplate", "PreparedChat", "RenderedChat", "choose_template"]

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_SHOWN = 200  # characters of a text in a message
_ANSWER = "answer9f2c"


@dataclass(frozen=True)
class ChatTemplate:
    """A template, ready to render.

    Attributes:
        name: a built-in name, "tokenizer", or the file it came from.
        source: Jinja text, self-contained.
        special_tokens: values of bos_token, eos_token, ...
        spellings: of all special tokens; in messages they are text, unless parse_special_tokens.
        others: the tokenizer's other templates by name, saved with this one.
        with_tools: the one that is taken where a conversation has tools, if it is another.
    """

    name: str
    source: str
    special_tokens: dict[str, str]
    spellings: tuple[str, ...] = ()
    parse_special_tokens: bool = False
    others: Mapping[str, str] = field(default_factory=dict)
    with_tools: str | None = None

    @property
    def identity(self) -> list[Any]:
        """All that the text of a conversation, and its tokens, depend on."""
        return [self.source, self.with_tools, self.special_tokens, self.spellings, self.parse_special_tokens]

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        tools: Any = None,
        documents: Any = None,
        variables: Mapping[str, Any] | None = None,
    ) -> PreparedChat:
        """Messages, checked and in the form that templates expect.

        Args:
            variables: more that the template may read (enable_thinking, ...).

        Raises:
            DataError: for a message that no template can be given (MessageError), naming it.
        """
        wrong = sorted(set(variables or {}) & set(_RESERVED))
        if wrong:
            raise DataError(f"{', '.join(wrong)} can't be given to a chat template as a variable")
        given: dict[str, Any] = {
            "messages": normalize_messages(messages),
            "tools": normalize_tools(tools),
            "documents": documents or None,
        }
        source = self.with_tools if self.with_tools is not None and given["tools"] else self.source
        words = Words(given, () if self.parse_special_tokens else self.spellings, source)
        given = {name: words.hide(value) for name, value in given.items()}
        return PreparedChat(
            self, source, given["messages"], given["tools"], given["documents"], dict(variables or {}), words
        )

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Any = None,
        documents: Any = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """The text of a conversation; with add_generation_prompt, up to where the answer begins.

        Args:
            continue_final_message: end the text with the last message's own words, for the model to go on from.

        Raises:
            MessageError: naming a message or field that is wrong.
            DataError: with the template's own complaint or failure, or what it leaves out.
        """
        chat = self.prepare(messages, tools=tools, documents=documents, variables=variables)
        check_rendered(chat, add_generation_prompt)
        if continue_final_message:
            return continued(chat)
        text, places = chat.run(add_generation_prompt=add_generation_prompt)
        marked, ends = chat.words.reveal(text, [place for block in places for place in block])
        return RenderedChat(marked, tuple(zip(ends[::2], ends[1::2], strict=True)))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, as render_chat gives it."""
        return self.render_chat(messages, add_generation_prompt=add_generation_prompt).text.text

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return spelling_pattern(tuple(sorted({*self.spellings, *filter(None, self.special_tokens.values())})))

    def special_in(self, text: str, start: int = 0) -> list[tuple[int, int]]:
        """Where a text with placeholders holds special tokens, which are the template's own."""
        return [found.span() for found in self._special.finditer(text, start)]

    @cached_property
    def _turn_ends(self) -> dict[str, tuple[str, str] | None]:
        return {}

    def turn_end(self, source: str | None = None) -> tuple[str, str] | None:
        """What the template puts after the words of a last answer, and the beginning of it that ends the turn.

        The turn ends behind the first special token after the words, and those that follow it at once; where there is
        none, behind all but white space. None where the template refuses a simple round.

        Args:
            source: of the template, where it is not this one's own but that for tools.
        """
        source = self.source if source is None else source
        if source not in self._turn_ends:
            chat = self.prepare([{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}])
            try:
                text, _ = dataclasses.replace(chat, source=source).run()
            except DataError:
                text = ""
            whole = text.rpartition(_ANSWER)[2]
            self._turn_ends[source] = (whole, whole[: self._end_of_turn(whole)]) if _ANSWER in text else None
        return self._turn_ends[source]

    def _end_of_turn(self, text: str) -> int:
        tokens = self.special_in(text)
        if not tokens:
            return len(text.rstrip() or text)
        end = tokens[0][1]
        for token_start, token_end in tokens[1:]:
            if token_start != end:
                break
            end = token_end
        return end

    @cached_property
    def end_marker(self) -> str:
        """What the template puts after an answer, up to the end token, at which generation stops."""
        end = (self.turn_end() or ("", ""))[1]
        eos = self.special_tokens.get("eos_token")
        return (end.split(eos)[0] if eos and eos in end else end).strip()

    def answer_in(self, text: str) -> str:
        """The answer in what a model said: without the end marker that the template puts before the end token."""
        return text.rstrip().removesuffix(self.end_marker) if self.end_marker else text

    def check(self) -> None:
        """Compile it and render a round.

        Raises:
            ConfigError: for a syntax error, or a template that gives no text.
        """
        for source in filter(None, (self.source, self.with_tools)):
            try:
                compile_template(source)
            except TemplateError as error:
                raise ConfigError(f"chat template {self.name}{place_of(error).rstrip(',')}: {error.message}") from error
            except RecursionError as error:
                raise ConfigError(f"chat template {self.name}: it nests too deeply") from error
        question: Message = {"role": "user", "content": "a"}
        try:
            chat = self.prepare([question, {"role": "assistant", "content": _ANSWER}])
            (prompt, _), (before, _), (whole, _) = chat.run([question], True), chat.run([question]), chat.run()
        except DataError as error:
            raise ConfigError(str(error)) from error
        begun = next((text for text in (prompt, before) if whole.startswith(text)), whole)
        if _ANSWER not in whole[len(begun) :]:
            raise ConfigError(
                f"chat template {self.name}: the text of a round does not begin with its prompt, so that the answer "
                f"can't be told from it (prompt {prompt[:_SHOWN]!r}, whole {whole[:_SHOWN]!r})"
            )

    def save(self, folder: str | Path) -> None:
        """Put the template beside a saved tokenizer, in both places where readers look for it."""
        save_templates(Path(folder), {DEFAULT: self.source, **self.others})


def choose_template(
    choice: str,
    tokenizer: PretrainedTokenizerBase,
    record_form: str,
    instruction_generation: bool = False,
    name: str | None = None,
    parse_special_tokens: bool = False,
) -> ChatTemplate:
    """The template that --chat_template asks for.

    auto: alpaca with --instruction_generation, else the tokenizer's own, else alpaca for Alpaca records, else plain.

    Args:
        name: which of the tokenizer's own, where it has several; "default" where not given, and, as in transformers,
            "tool_use" for conversations with tools.
        parse_special_tokens: special tokens that messages spell are special.

    Raises:
        ConfigError: when the tokenizer has none although it was asked for, or a file is missing or wrong.
    """
    own = own_templates(tokenizer)
    if choice == "auto":
        if instruction_generation:
            choice = "alpaca"
        elif own or name:
            choice = "tokenizer"
        else:
            choice = "alpaca" if record_form == "alpaca" else "plain"
    others, with_tools = own, None
    if choice == "tokenizer":
        source, others = _named(own, name)
        with_tools = own.get(TOOL_USE) if name is None else None
    elif name is not None:
        raise ConfigError(f"--chat_template_name {name} is one of the tokenizer's own, but --chat_template is {choice}")
    elif choice in BUILT_IN:
        begin = "{{ bos_token }}" if adds_bos(tokenizer) and "bos_token" not in BUILT_IN[choice] else ""
        source, others = begin + BUILT_IN[choice], {}
    else:
        path = Path(choice)
        if not path.is_file():
            known = ", ".join(("auto", "tokenizer", *BUILT_IN))
            raise ConfigError(f"--chat_template {choice}: no such file; known names are {known}")
        source, others = read_template(path), {}
    template = ChatTemplate(
        choice,
        source,
        special_tokens(tokenizer),
        special_spellings(tokenizer),
        parse_special_tokens,
        others,
        with_tools,
    )
    template.check()
    return template


def _named(own: Mapping[str, str], name: str | None) -> tuple[str, dict[str, str]]:
    """The text of one of a tokenizer's templates, and the others as they are saved beside it."""
    if not own:
        raise ConfigError("--chat_template tokenizer: this tokenizer has none; choose plain, alpaca or a Jinja file")
    chosen = name or DEFAULT
    if chosen not in own:
        wrong = f"none is named {chosen!r}" if name else "none of them is the default"
        raise ConfigError(
            f"the tokenizer's chat templates are {', '.join(sorted(own))}; {wrong}: choose with --chat_template_name"
        )
    others = {other: text for other, text in own.items() if other != DEFAULT}
    if chosen != DEFAULT and DEFAULT in own:
        others["base_default"] = own[DEFAULT]  # the chosen one is the saved model's default
    return own[chosen], others


def own_template(tokenizer: PretrainedTokenizerBase) -> str | None:
    """The Jinja template a tokenizer came with, if any (of several, the default)."""
    own = own_templates(tokenizer)
    return own.get(DEFAULT) or next(iter(own.values()), None)


def special_tokens(tokenizer: PretrainedTokenizerBase) -> dict[str, str]:
    """bos_token, eos_token, ... as text, for the template."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def adds_bos(tokenizer: PretrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with its begin-of-sequence token."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return bos is not None and len(ids) > 0 and ids[0] == bos
