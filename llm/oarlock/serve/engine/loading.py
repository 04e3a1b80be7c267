"""A model folder, loaded to be served: decoder, tokenizer, chat template, the tokens that end an answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paddle

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.templates.chat_template import ChatTemplate, choose_template
from oarlock.data.tokenizers.load import encode_marked, load_tokenizer
from oarlock.environment.console import log_once
from oarlock.environment.paddle_import import set_paddlenlp_log_level
from oarlock.errors import DataError, ModelError, RequestRefused
from oarlock.files import GENERATION_FILE
from oarlock.merge.deltas import find_deltas
from oarlock.merge.inputs import WeightedAdapter
from oarlock.model_config.generation_config import find_end_tokens, read_generation_config, read_sampling_defaults
from oarlock.model_config.load import find_model_class, read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models.build import ModelSource, build_model
from oarlock.models.load_finetuned import check_base
from oarlock.peft.adapter_folder import Base
from oarlock.peft.open_adapter import open_lora
from oarlock.serve.config import Parsing
from oarlock.serve.engine.decoder import Decoder, LoraWeights
from oarlock.serve.engine.fused_decoder import explain_not_fused, load_fused_decoder
from oarlock.serve.engine.generic_decoder import GenericDecoder
from oarlock.serve.engine.messages import read_messages, read_tools
from oarlock.serve.request import Prompt

_CONTEXT = ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length")
_LEAST_CONTEXT = 8  # tokens; the decoders are tried with seven when they start


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, as the engine uses it.

    Attributes:
        name: shown to clients.
        context: tokens that the model was made for, prompt and answer together.
        ends: tokens that end an answer.
        adapters: names of the LoRA adapters.
        defaults: sampling parameters of requests that set none, from generation_config.json.
        begin: tokens that a raw prompt begins with.
        special_tokens: the tokens that decode() leaves out, and their spelling.
        parse_special_tokens: where a client's text is read as special tokens.
    """

    name: str
    decoder: Decoder
    tokenizer: Any
    template: ChatTemplate
    context: int
    ends: frozenset[int]
    adapters: tuple[str, ...] = ()
    defaults: Mapping[str, float | int] = field(default_factory=dict)
    begin: tuple[int, ...] = ()
    special_tokens: Mapping[int, str] = field(default_factory=dict)
    parse_special_tokens: Parsing = "prompts"
    # The `tokenizers` library refuses to be used from two threads where PaddleNLP changes its padding.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt.

        Raises:
            RequestRefused: when there are none, or they are not tokens of this model.
        """
        try:
            if prompt.messages is not None:
                ids = self._tokenize(render_prompt(self.template, prompt.messages, prompt.tools))
            elif prompt.text is not None:
                literal = self.parse_special_tokens == "none"
                ids = self._tokenize(MarkedText.mark_all(prompt.text) if literal else MarkedText(prompt.text))
                if ids and tuple(ids[: len(self.begin)]) != self.begin:
                    ids = [*self.begin, *ids]
            else:
                ids = list(prompt.token_ids or ())
        except DataError as error:  # the template's own complaint
            raise RequestRefused(str(error)) from error
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise RequestRefused(f"the prompt is not valid text: {error.reason} at character {error.start}") from error
        if not ids:
            raise RequestRefused("the prompt is empty: it has no token")
        wrong = next((token for token in ids if not 0 <= token < self.decoder.vocabulary), None)
        if wrong is not None:
            raise RequestRefused(f"token {wrong} is not in the model's vocabulary of {self.decoder.vocabulary:,}")
        return ids

    def _tokenize(self, marked: MarkedText) -> list[int]:
        marked.text.encode()
        with self._tokenizing:
            return list(encode_marked(self.tokenizer, [marked])[0].ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        with self._tokenizing:
            return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def end_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Tokens and texts with which the chat template ends an answer, if they are not the tokenizer's."""
        marker = self.template.end_marker
        if not marker:
            return (), ()
        ids = self._tokenize(MarkedText(marker))
        return ((ids[0],), ()) if len(ids) == 1 else ((), (marker,))


def render_prompt(template: ChatTemplate, messages: Any, tools: Any) -> MarkedText:
    """Put messages and tools into a chat template, up to where the answer begins.

    Raises:
        RequestRefused: naming what can't be read.
        DataError: naming what the template refuses, or leaves out.
    """
    read = read_messages(messages)
    described = read_tools(tools)
    try:
        rendered = template.render_chat(read, add_generation_prompt=True, tools=described).text
    except DataError as error:
        # A template that refuses does not name the message. What templates lack most often is the result of a tool.
        i = next((i for i, message in enumerate(read) if message["role"] == "tool"), None)
        if i is None or "messages[" in str(error):
            raise
        raise RequestRefused(f"messages[{i}] (role {messages[i]['role']}): {error}") from error
    for i, message in enumerate(read):
        if message["role"] == "tool" or "name" not in message:  # the name of a tool is in its call too
            continue
        bare = [*read[:i], {k: v for k, v in message.items() if k != "name"}, *read[i + 1 :]]
        if template.render_chat(bare, add_generation_prompt=True, tools=described).text.text == rendered.text:
            raise RequestRefused(f"messages[{i}].name: the model's chat template writes no names; leave it out")
    return rendered


def open_served_model(
    model: str | Path, adapters: Mapping[str, Path], parse_special_tokens: Parsing = "prompts"
) -> ServedModel:
    """Load a model folder and LoRA adapters of this model.

    Raises:
        ModelError: when something is missing, or does not belong together.
    """
    set_paddlenlp_log_level("error")
    folder = find_model_folder(str(model), with_weights=True)
    config = read_config(folder)
    context = next((int(value) for name in _CONTEXT if (value := getattr(config, name, None))), 2048)
    if context < _LEAST_CONTEXT:
        raise ModelError(
            f"{folder / 'config.json'}: {context} token(s) at a time are too few for a question and its answer"
        )
    tokenizer = load_tokenizer(str(folder))
    generation = read_generation_config(folder)
    weights = read_adapters(adapters, folder, config)
    dtype = str(getattr(config, "dtype", None) or "float32")
    if not paddle.device.get_device().startswith("gpu"):
        if dtype in ("float16", "bfloat16"):
            log_once(f"{dtype} on a CPU: answers are computed in float32")
        dtype = "float32"
    elif dtype not in ("float16", "bfloat16"):
        dtype = "float32"
    built = build_model(ModelSource(folder, config, from_weights=True), dtype=dtype)
    built.eval()
    if reason := explain_not_fused(built):
        log_once(f"answers go through PaddleNLP's own forward, not the fused decoder: {reason}")
        decoder: Decoder = GenericDecoder(built, weights)
    else:
        log_once("answers go through the fused decoder (float32 on the CPU)")
        decoder = load_fused_decoder(built, weights, context)  # the model can't be used otherwise afterwards
    return ServedModel(
        name=folder.resolve().name,
        decoder=decoder,
        tokenizer=tokenizer,
        template=choose_template("auto", tokenizer, "src_tgt", parse_special_tokens=parse_special_tokens == "all"),
        context=context,
        ends=frozenset(find_end_tokens(generation, config, tokenizer)),
        defaults=read_sampling_defaults(generation, str(folder / GENERATION_FILE)),
        adapters=tuple(weights),
        begin=find_begin_tokens(tokenizer),
        special_tokens=find_special_tokens(tokenizer),
        parse_special_tokens=parse_special_tokens,
    )


def read_adapters(adapters: Mapping[str, Path], folder: Path, config: Any) -> dict[str, LoraWeights]:
    """The weights of each LoRA adapter, by its name.

    Args:
        folder, config: of the base model.

    Raises:
        ModelError: when one is not a LoRA adapter, or of another base.
    """
    found: dict[str, LoraWeights] = {}
    base = Base.from_folder(str(folder), folder) if adapters else None
    for name, place in adapters.items():
        adapter = open_lora(place, "served with a base")
        assert base is not None
        check_base(adapter.base, base)
        deltas = find_deltas(WeightedAdapter(adapter, 1.0), find_model_class(config), config)
        found[name] = {delta.layer: delta.read_matrices() for delta in deltas}
    return found


def find_begin_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that a tokenizer puts before a text. (An end token that it appends has no place in a prompt.)"""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)])


def find_special_tokens(tokenizer: Any) -> dict[int, str]:
    """The special tokens, which the text of an answer does not show, and their spelling."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    return {token: added.content for token, added in backend.get_added_tokens_decoder().items() if added.special}
