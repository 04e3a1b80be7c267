"""A tokenizer that follows its tokenizer.json exactly.

PaddleNLP's PretrainedTokenizerFast and its family classes change some behaviour: white space next to special tokens,
what decoding skips, padding set on the shared backend (which is not thread-safe). This class has the members that this
project and PaddleNLP's Trainer use, and does not import Paddle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from oarlock.data.tokenizers.library_errors import ON_A_TEXT, convert_errors
from oarlock.files import write_json, write_text_atomically

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# With this class name, PaddleNLP and transformers use tokenizer.json unchanged (transformers because it has no such
# class). With the name of a family's class, they build another tokenizer from the vocabulary.
SAVED_CLASS = "PretrainedTokenizerFast"


class FastTokenizer:
    """A tokenizer of the `tokenizers` library with the settings of tokenizer_config.json.

    Attributes:
        backend_tokenizer: of the `tokenizers` library, without truncation and padding.
        init_kwargs: content of tokenizer_config.json.
        special_tokens_map: the texts of bos_token, eos_token, ..., as far as they exist.
        name_or_path: the folder it was loaded from.
        template_files: chat_template.jinja and the files of chat_templates/, name -> text, to be saved again.
        model_input_names, padding_side, model_max_length: as in PaddleNLP's tokenizers.
    """

    is_fast = True

    def __init__(
        self,
        backend: Tokenizer,
        config: Mapping[str, Any],
        special: Mapping[str, str],
        name_or_path: str = "",
        template_files: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self.backend_tokenizer = backend
        self.init_kwargs = dict(config)
        self.special_tokens_map = dict(special)
        self.name_or_path = name_or_path
        self.template_files = dict(template_files or {})
        self.model_input_names = list(config.get("model_input_names") or ("input_ids", "attention_mask"))
        self.padding_side = str(config.get("padding_side") or "right")
        self.model_max_length = config.get("model_max_length")

    def __call__(
        self, text: str | Sequence[str], add_special_tokens: bool = True, return_attention_mask: bool = True
    ) -> dict[str, Any]:
        """Return input_ids (and attention_mask, all ones) of a text, or lists of them for a list of texts.

        Args:
            add_special_tokens: add the tokenizer's BOS and EOS tokens. A text that starts with BOS gets no second one.
        """
        texts = [text] if isinstance(text, str) else list(text)
        with convert_errors(ON_A_TEXT):
            rows = [row.ids for row in self.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if add_special_tokens:
            before, after = self._around
            rows = [(row if before and row[: len(before)] == before else before + row) + after for row in rows]
        found = {"input_ids": rows}
        if return_attention_mask:
            found["attention_mask"] = [[1] * len(row) for row in rows]
        return {name: values[0] for name, values in found.items()} if isinstance(text, str) else found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        return list(self(text, add_special_tokens, return_attention_mask=False)["input_ids"])

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens added before and after a text."""
        row = self.backend_tokenizer.encode("a", add_special_tokens=True)
        own = [i for i, added in enumerate(row.special_tokens_mask) if not added] or [len(row.ids)]
        return list(row.ids[: own[0]]), list(row.ids[own[-1] + 1 :])

    def decode(
        self,
        ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Decode token ids.

        Args:
            clean_up_tokenization_spaces: remove spaces before punctuation. The default is that of
                tokenizer_config.json, but off for BPE, whose spaces are those of the text (as in transformers 5).
        """
        row = [int(ids)] if isinstance(ids, int) else [int(token) for token in ids]
        with convert_errors(ON_A_TEXT):
            text = str(self.backend_tokenizer.decode(row, skip_special_tokens=skip_special_tokens))
        if clean_up_tokenization_spaces is None:
            asked = bool(self.init_kwargs.get("clean_up_tokenization_spaces", False))
            clean_up_tokenization_spaces = asked and type(self.backend_tokenizer.model).__name__ != "BPE"
        if clean_up_tokenization_spaces:  # the replacements of transformers' clean_up_tokenization, in its order
            for before, after in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")):
                text = text.replace(before, after)
            for before, after in ((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):
                text = text.replace(before, after)
        return text

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """Decode rows of token ids."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __len__(self) -> int:
        """Return the number of rows that an embedding needs: the largest id + 1."""
        return max(self.get_vocab().values(), default=-1) + 1

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id, including added tokens."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> added token."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token (that of the unknown token if there is none), or a list of ids."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Return the token of an id, or a list of tokens."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(token)) for token in ids]

    @property
    def all_special_tokens(self) -> list[str]:
        """All special tokens, the named ones first."""
        added = (token.content for _, token in sorted(self.added_tokens_decoder.items()) if token.special)
        return list(dict.fromkeys([*self.special_tokens_map.values(), *added]))

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens."""
        return [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]

    def _find_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """Text of the BOS token."""
        return self.special_tokens_map.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the BOS token."""
        return self._find_id("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the EOS token."""
        return self.special_tokens_map.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the EOS token."""
        return self._find_id("eos_token")

    @property
    def unk_token(self) -> str | None:
        """Text of the unknown token."""
        return self.special_tokens_map.get("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token."""
        return self._find_id("unk_token")

    @property
    def pad_token(self) -> str | None:
        """Text of the padding token. The default is EOS; padding is never trained on."""
        return self.special_tokens_map.get("pad_token", self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self._find_id("pad_token" if "pad_token" in self.special_tokens_map else "eos_token")

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json. They load as the same tokenizer.

        Chat templates are written where they were read from: tokenizer_config.json or their own files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(self.backend_tokenizer.to_str())
        # tokenizer.json contains all added tokens with their effective flags.
        config = {name: value for name, value in self.init_kwargs.items() if name != "added_tokens_decoder"}
        config |= {**self.special_tokens_map, "tokenizer_class": SAVED_CLASS}
        config.setdefault("clean_up_tokenization_spaces", False)
        write_text_atomically(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", self.special_tokens_map)
        for name, text in self.template_files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text_atomically(folder / name, text)
        return tuple(
            str(folder / name) for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        )
