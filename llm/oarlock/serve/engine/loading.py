"""A model folder ready to be served: the decoder, the tokenizer, the template, the tokens that end an answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.templates.chat_template import ChatTemplate, choose_template
from oarlock.data.tokenizers.load import encode_marked, load_tokenizer
from oarlock.environment.console import log_once
from oarlock.environment.paddle_import import set_paddlenlp_log_level
from oarlock.errors import DataError, ModelError
from oarlock.files import GENERATION_FILE
from oarlock.model_config.generation_config import find_end_tokens, read_generation_config, read_sampling_defaults
from oarlock.model_config.load import read_config
from oarlock.model_config.model_folder import find_model_folder
from oarlock.model_config.sliding_window import find_window
from oarlock.models.build import ModelSource, build_model
from oarlock.serve.engine.adapters import LoraWeights, read_adapters
from oarlock.serve.engine.fused_decoder import fused_decoder, why_not_fused
from oarlock.serve.engine.generic_decoder import GenericDecoder
from oarlock.serve.engine.messages import render_prompt
from oarlock.serve.engine.prompts import Parsing, begin_tokens, begun, hidden_tokens
from oarlock.serve.engine.sampling_params import Prompt, RequestRefused

if TYPE_CHECKING:
    from oarlock.serve.engine.decoder import Decoder

_CONTEXT = ("max_position_embeddings", "max_sequence_length", "n_positions", "seq_length")
_LEAST_CONTEXT = 8  # tokens; what the decoders are tried with at their start has seven


@dataclass(frozen=True)
class Served:
    """What the engine works with.

    Attributes:
        name: of the model, for clients.
        context: tokens that the model was made for, prompt and answer together.
        ends: tokens that end an answer.
        defaults: how tokens are chosen where a request does not say, by generation_config.json.
        begin: tokens that a raw prompt begins with.
        special_tokens: those that decode() leaves out, and how they are written.
        parse_special_tokens: where a client's text is read as special tokens, see prompts.py.
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
            RequestRefused: when there are none, or they are no tokens of this model.
        """
        try:
            if prompt.messages is not None:
                ids = self._ids(render_prompt(self.template, prompt.messages, prompt.tools))
            elif prompt.text is not None:
                literal = self.parse_special_tokens == "none"
                ids = self._ids(MarkedText.of(prompt.text) if literal else MarkedText(prompt.text))
                ids = begun(ids, self.begin) if ids else []
            else:
                ids = prompt.token_ids or []
        except DataError as error:  # the template's own complaint
            raise RequestRefused(str(error)) from error
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise RequestRefused(f"the prompt is not valid text: {error.reason} at character {error.start}") from error
        if not ids:
            raise RequestRefused("the prompt is empty: it has no token")
        wrong = next((token for token in ids if not 0 <= token < self.decoder.vocabulary), None)
        if wrong is not None:
            raise RequestRefused(f"token {wrong} is not in the model's vocabulary of {self.decoder.vocabulary:,}")
        return list(ids)

    def _ids(self, marked: MarkedText) -> list[int]:
        marked.text.encode()
        with self._tokenizing:
            return encode_marked(self.tokenizer, [marked])[0].ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens."""
        with self._tokenizing:
            return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def end_of_turn(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Tokens and texts that the chat template puts at the end of an answer, where they are not the tokenizer's."""
        marker = self.template.end_marker
        if not marker:
            return (), ()
        ids = self._ids(MarkedText(marker))
        return ((ids[0],), ()) if len(ids) == 1 else ((), (marker,))


def open_served(model: str | Path, adapters: Mapping[str, Path], parse_special_tokens: Parsing = "prompts") -> Served:
    """Load a model folder and the adapters beside it.

    Raises:
        ModelError: when something is missing, or does not belong together.
    """
    set_paddlenlp_log_level("error")
    folder = find_model_folder(str(model), with_weights=True)
    config = read_config(folder)
    context = _context(config)
    if context < _LEAST_CONTEXT:
        raise ModelError(
            f"{folder / 'config.json'}: {context} token(s) at a time are too few for a question and its answer"
        )
    tokenizer = load_tokenizer(str(folder))
    generation = read_generation_config(folder)
    found = read_adapters(adapters, folder, config)
    dtype = _dtype(config)
    built = build_model(ModelSource(folder, config, from_weights=True), dtype=dtype)
    built.eval()
    return Served(
        name=folder.resolve().name,
        decoder=choose_decoder(built, found, context),
        tokenizer=tokenizer,
        template=choose_template("auto", tokenizer, "src_tgt", parse_special_tokens=parse_special_tokens == "all"),
        context=context,
        ends=frozenset(find_end_tokens(generation, config, tokenizer)),
        defaults=read_sampling_defaults(generation, str(folder / GENERATION_FILE)),
        adapters=tuple(found),
        begin=begin_tokens(tokenizer),
        special_tokens=hidden_tokens(tokenizer),
        parse_special_tokens=parse_special_tokens,
    )


def choose_decoder(model: Any, adapters: dict[str, LoraWeights], context: int) -> Decoder:
    """The fused one where it serves this model on this machine; said once. `model` is of no other use afterwards."""
    reason = why_not_fused(model)
    if reason:
        log_once(f"answers go through PaddleNLP's own forward, not the fused decoder: {reason}")
        return GenericDecoder(model, adapters)
    log_once("answers go through the fused decoder (float32 on the CPU)")
    return fused_decoder(model, adapters, context)


def _context(config: Any) -> int:
    """How many tokens the model was made for."""
    context = next((int(value) for name in _CONTEXT if (value := getattr(config, name, None))), 2048)
    window = find_window(config)
    if window and window < context:  # beyond it the model was trained to forget, which PaddleNLP's does not
        log_once(f"the model's context is cut from {context:,} to the {window:,} tokens of its sliding window")
        return window
    return context


def _dtype(config: Any) -> str:
    """That of the weights on a GPU; a CPU computes in float32."""
    stored = str(getattr(config, "dtype", None) or "float32")
    if paddle.device.get_device().startswith("gpu"):
        return stored if stored in ("float16", "bfloat16", "float32") else "float32"
    if stored in ("float16", "bfloat16"):
        log_once(f"{stored} on a CPU: answers are computed in float32")
    return "float32"
