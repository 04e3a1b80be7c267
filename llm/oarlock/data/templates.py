"""Chat templates: messages -> the text a model sees. Jinja, with Hugging Face's names and rules.

One template makes the training text and is saved with the model (chat_template.jinja and tokenizer_config.json), so
that whoever serves the model asks it as it was trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from oarlock.data.records import Message
from oarlock.errors import ConfigError, DataError
from oarlock.files import write_json, write_text_atomically

if TYPE_CHECKING:
    from paddlenlp.transformers import PretrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"


def _end(marker: str) -> str:
    """An answer's end: the format's own marker, then the tokenizer's where it is another: generation stops at that."""
    return marker + "{% if eos_token != '" + marker + "' %}{{ eos_token }}{% endif %}"


_ANSWER = "{{ message['content'] }}{{ eos_token }}"
BUILT_IN = {
    # The text as it is: what PaddleNLP's finetune_generation does with src and tgt.
    "plain": "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    + _ANSWER
    + "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}",
    # Stanford Alpaca's two prompts (tatsu-lab/stanford_alpaca, train.py), with and without an input.
    "alpaca": """\
{% for message in messages %}{% if message['role'] == 'assistant' %}"""
    + _ANSWER
    + """{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% elif message['input'] %}\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{{ message['instruction'] }}

### Input:
{{ message['input'] }}

### Response:{% else %}\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{{ message['instruction'] or message['content'] }}

### Response:{% endif %}{% endfor %}""",
    # Llama 2 chat (meta-llama/llama, generation.py): the system text stands in the first question, every round begins
    # with the begin-of-sequence token.
    "llama2": "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.index0 > 0 and messages[loop.index0 - 1]['role'] == 'user' %}"
    "{{ raise_exception('two questions follow each other') }}{% endif %}"
    "{{ bos_token }}[INST] "
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + message['content'].strip() }}"
    "{% else %}{{ message['content'].strip() }}{% endif %} [/INST]"
    "{% elif message['role'] == 'assistant' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'user' %}"
    "{{ raise_exception('an answer must follow a question') }}{% endif %}"
    "{{ ' ' + message['content'].strip() + ' ' }}{{ eos_token }}"
    "{% elif loop.index0 > 0 %}{{ raise_exception('a system text may only come first') }}"
    "{% endif %}{% endfor %}",
    # ChatML (openai/openai-python, chatml.md).
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + _end("<|im_end|>") + "{% else %}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # <|system|> S <|endoftext|> <|prompter|> Q <|endoftext|> <|assistant|> A <|endoftext|>, OpenAssistant's words.
    "openassistant": "{% for message in messages %}{% if not loop.first %} {% endif %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }} "
    + _end("<|endoftext|>")
    + "{% else %}"
    "{{ '<|system|> ' if message['role'] == 'system' else '<|prompter|> ' }}{{ message['content'] }} <|endoftext|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}",
}


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox and whitespace rules of transformers' chat templates."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """A template, ready to render.

    Attributes:
        name: a built-in name, "tokenizer", or the file it came from.
        source: Jinja text, self-contained.
        special_tokens: values of bos_token, eos_token, ...
    """

    name: str
    source: str
    special_tokens: dict[str, str]

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except TemplateError as error:
            place = f", line {line}" if (line := getattr(error, "lineno", None)) else ""
            raise ConfigError(f"chat template {self.name}{place}: {error.message}") from error

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; with add_generation_prompt, up to where the answer begins.

        Raises:
            DataError: with the template's own complaint (a role it does not know, for example) or failure.
        """
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except TemplateError as error:
            raise DataError(f"chat template {self.name} refuses these messages: {error.message}") from error
        except Exception as error:  # a template is a program: it may add text to a number
            raise DataError(f"chat template {self.name} fails: {type(error).__name__}: {error}") from error

    @cached_property
    def end_marker(self) -> str:
        """What the template puts after an answer, up to the end token, at which generation stops."""
        answer = "answer-9f2c"
        whole = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}])
        end = whole.rpartition(answer)[2] if answer in whole else ""
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
        question: Message = {"role": "user", "content": "a"}
        try:
            whole = self.render([question, {"role": "assistant", "content": "b"}])
            prompt = self.render([question], add_generation_prompt=True)
        except DataError as error:
            raise ConfigError(str(error)) from error
        if not whole.startswith(prompt) or len(whole) <= len(prompt):
            raise ConfigError(
                f"chat template {self.name}: the text of a round does not begin with its prompt, so that the answer "
                f"can't be told from it (prompt {prompt!r}, whole {whole!r})"
            )

    def save(self, folder: str | Path) -> None:
        """Put the template beside a saved tokenizer, in both places where readers look for it."""
        folder = Path(folder)
        write_text_atomically(folder / TEMPLATE_FILE, self.source)
        config_file = folder / "tokenizer_config.json"
        if config_file.is_file():
            config = json.loads(config_file.read_text(encoding="utf-8"))
            write_json(config_file, {**config, "chat_template": self.source})


def choose_template(
    choice: str, tokenizer: PretrainedTokenizerBase, record_form: str, instruction_generation: bool = False
) -> ChatTemplate:
    """The template that --chat_template asks for.

    auto: alpaca with --instruction_generation, else the tokenizer's own, else alpaca for Alpaca records, else plain.

    Raises:
        ConfigError: when the tokenizer has none although it was asked for, or a file is missing or wrong.
    """
    own = own_template(tokenizer)
    if choice == "auto":
        if instruction_generation:
            choice = "alpaca"
        elif own is not None:
            choice = "tokenizer"
        else:
            choice = "alpaca" if record_form == "alpaca" else "plain"
    if choice == "tokenizer":
        if own is None:
            raise ConfigError(
                "--chat_template tokenizer: this tokenizer has none; choose plain, alpaca or a Jinja file"
            )
        source = own
    elif choice in BUILT_IN:
        begin = "{{ bos_token }}" if adds_bos(tokenizer) and "bos_token" not in BUILT_IN[choice] else ""
        source = begin + BUILT_IN[choice]
    else:
        path = Path(choice)
        if not path.is_file():
            known = ", ".join(("auto", "tokenizer", *BUILT_IN))
            raise ConfigError(f"--chat_template {choice}: no such file; known names are {known}")
        source = path.read_text(encoding="utf-8")
    template = ChatTemplate(choice, source, special_tokens(tokenizer))
    template.check()
    return template


def own_template(tokenizer: PretrainedTokenizerBase) -> str | None:
    """The Jinja template a tokenizer came with, if any (PaddleNLP keeps only its compiled form)."""
    source = (getattr(tokenizer, "init_kwargs", None) or {}).get("chat_template")
    if isinstance(source, str):
        return source
    folder = getattr(tokenizer, "name_or_path", "") or ""
    for name in (TEMPLATE_FILE, "tokenizer_config.json"):
        path = Path(folder) / name
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            found = text if name == TEMPLATE_FILE else json.loads(text).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def special_tokens(tokenizer: PretrainedTokenizerBase) -> dict[str, str]:
    """bos_token, eos_token, ... as text, for the template."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def adds_bos(tokenizer: PretrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with its begin-of-sequence token."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return bos is not None and len(ids) > 0 and ids[0] == bos
