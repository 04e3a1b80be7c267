"""Chat templates: Jinja templates that render messages to text, with the names and rules of transformers.

The template that renders the training text is saved with the model (chat_template.jinja and tokenizer_config.json), so
that a server builds its prompts the same way.
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
from oarlock.data.templates.rendering import PreparedChat, RenderedChat, describe_line, render_continued
from oarlock.data.templates.special_token_text import Words, compile_spellings
from oarlock.data.templates.template_files import (
    DEFAULT,
    TEMPLATE_FILE,
    TOOL_USE,
    load_own_templates,
    read_template,
    save_templates,
)
from oarlock.data.templates.unrendered import check_rendered
from oarlock.data.tokenizers.load import list_special_spellings
from oarlock.errors import ConfigError, DataError

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

__all__ = ["BUILT_IN", "TEMPLATE_FILE", "ChatTemplate", "PreparedChat", "RenderedChat", "choose_template"]

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_MAX_SHOWN = 200  # characters of a text in an error message
_ANSWER = "answer9f2c"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, ready to render.

    Attributes:
        name: a built-in name, "tokenizer", or a file.
        source: self-contained Jinja text.
        special_tokens: values of bos_token, eos_token, ...
        spellings: of all special tokens. In messages they are plain text, unless parse_special_tokens is set.
        others: the tokenizer's other templates by name, saved with this one.
        with_tools: the template for conversations with tools, if it differs.
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
        """Return everything that the text and the tokens of a conversation depend on."""
        return [self.source, self.with_tools, self.special_tokens, self.spellings, self.parse_special_tokens]

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        tools: Any = None,
        documents: Any = None,
        variables: Mapping[str, Any] | None = None,
    ) -> PreparedChat:
        """Check messages and convert them to the form that templates expect.

        Args:
            variables: further template variables (enable_thinking, ...).

        Raises:
            DataError: for an invalid message (MessageError), with its number.
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
        """Render a conversation; with add_generation_prompt, up to the start of the answer.

        Args:
            continue_final_message: end the text with the content of the last message, for the model to continue.

        Raises:
            MessageError: for an invalid message or field, with its name.
            DataError: if the template refuses the messages, fails, or omits a part of them.
        """
        chat = self.prepare(messages, tools=tools, documents=documents, variables=variables)
        check_rendered(chat, add_generation_prompt)
        if continue_final_message:
            return render_continued(chat)
        text, places = chat.run(add_generation_prompt=add_generation_prompt)
        marked, ends = chat.words.reveal(text, [place for block in places for place in block])
        return RenderedChat(marked, tuple(zip(ends[::2], ends[1::2], strict=True)))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of render_chat()."""
        return self.render_chat(messages, add_generation_prompt=add_generation_prompt).text.text

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return compile_spellings(tuple(sorted({*self.spellings, *filter(None, self.special_tokens.values())})))

    def find_special(self, text: str, start: int = 0) -> list[tuple[int, int]]:
        """Return the [start, end) of special tokens in a text whose user text has placeholders."""
        return [found.span() for found in self._special.finditer(text, start)]

    @cached_property
    def _turn_ends(self) -> dict[str, tuple[str, str] | None]:
        return {}

    def find_turn_end(self, source: str | None = None) -> tuple[str, str] | None:
        """Return what the template writes after the content of a last answer, and the part of it that ends the turn.

        The turn ends after the first special token and those directly following it. If there is none, it ends at the
        last character that is not white space. Returns None if the template refuses a simple conversation.

        Args:
            source: of the template, if not its own (the one for tools).
        """
        source = self.source if source is None else source
        if source not in self._turn_ends:
            chat = self.prepare([{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}])
            try:
                text, _ = dataclasses.replace(chat, source=source).run()
            except DataError:
                text = ""
            rest = text.rpartition(_ANSWER)[2]
            tokens = self.find_special(rest)
            end = tokens[0][1] if tokens else len(rest.rstrip() or rest)
            for token_start, token_end in tokens[1:]:
                if token_start != end:
                    break
                end = token_end
            self._turn_ends[source] = (rest, rest[:end]) if _ANSWER in text else None
        return self._turn_ends[source]

    @cached_property
    def end_marker(self) -> str:
        """The text between an answer and the end token, at which generation stops."""
        end = (self.find_turn_end() or ("", ""))[1]
        eos = self.special_tokens.get("eos_token")
        return (end.split(eos)[0] if eos and eos in end else end).strip()

    def extract_answer(self, text: str) -> str:
        """Return generated text without the end marker that the template writes before the end token."""
        return text.rstrip().removesuffix(self.end_marker) if self.end_marker else text

    def check(self) -> None:
        """Compile the template and render a sample conversation.

        Raises:
            ConfigError: for a syntax error, or a template that does not render the answer.
        """
        for source in filter(None, (self.source, self.with_tools)):
            try:
                compile_template(source)
            except TemplateError as error:
                raise ConfigError(
                    f"chat template {self.name}{describe_line(error).rstrip(',')}: {error.message}"
                ) from error
            except RecursionError as error:
                raise ConfigError(f"chat template {self.name}: nested too deeply") from error
        question: Message = {"role": "user", "content": "a"}
        try:
            chat = self.prepare([question, {"role": "assistant", "content": _ANSWER}])
            (prompt, _), (before, _), (whole, _) = chat.run([question], True), chat.run([question]), chat.run()
        except DataError as error:
            raise ConfigError(str(error)) from error
        begun = next((text for text in (prompt, before) if whole.startswith(text)), whole)
        if _ANSWER not in whole[len(begun) :]:
            raise ConfigError(
                f"chat template {self.name}: the text of a conversation does not start with its prompt, so the "
                f"answer can't be found (prompt {prompt[:_MAX_SHOWN]!r}, text {whole[:_MAX_SHOWN]!r})"
            )

    def save(self, folder: str | Path) -> None:
        """Save the template in both places of a tokenizer folder where readers look for it."""
        save_templates(Path(folder), {DEFAULT: self.source, **self.others})


def choose_template(
    choice: str,
    tokenizer: PretrainedTokenizerBase,
    record_form: str,
    instruction_generation: bool = False,
    name: str | None = None,
    parse_special_tokens: bool = False,
) -> ChatTemplate:
    """Choose the template for --chat_template.

    auto: alpaca with --instruction_generation, else the tokenizer's own, else alpaca for Alpaca records, else plain.

    Args:
        name: of the tokenizer's templates, if it has several. The default is "default" and, as in transformers,
            "tool_use" for conversations with tools.
        parse_special_tokens: whether spelled special tokens in messages become special tokens.

    Raises:
        ConfigError: if the tokenizer has no template although one is needed, or a file is missing or invalid.
    """
    own = load_own_templates(tokenizer)
    if choice == "auto":
        if instruction_generation:
            choice = "alpaca"
        elif own or name:
            choice = "tokenizer"
        else:
            choice = "alpaca" if record_form == "alpaca" else "plain"
    others, with_tools = own, None
    if choice == "tokenizer":
        source, others = _select_template(own, name)

        with_tools = own.get(TOOL_USE) if name is None else None
    elif name is not None:
        raise ConfigError(f"--chat_template_name {name} needs --chat_template tokenizer, but that is {choice}")
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
        {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        list_special_spellings(tokenizer),
        parse_special_tokens,
        others,
        with_tools,
    )
    template.check()
    return template


def _select_template(own: Mapping[str, str], name: str | None) -> tuple[str, dict[str, str]]:
    """Return one of the tokenizer's templates, and the others under the names they are saved with."""
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
        others["base_default"] = own[DEFAULT]  # the chosen template becomes the default of the saved model
    return own[chosen], others


def find_own_template(tokenizer: PretrainedTokenizerBase) -> str | None:
    """Return the tokenizer's own Jinja template, if any (its default, if there are several)."""
    own = load_own_templates(tokenizer)
    return own.get(DEFAULT) or next(iter(own.values()), None)


def adds_bos(tokenizer: PretrainedTokenizerBase) -> bool:
    """Return whether the tokenizer adds its BOS token to texts."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return bos is not None and len(ids) > 0 and ids[0] == bos
