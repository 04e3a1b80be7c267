"""A tokenizer as its tokenizer.json says, with nothing of it changed on the way.

PaddleNLP's PretrainedTokenizerFast and its classes of single families do change some: white space beside special
tokens, what decoding leaves out, padding set on the shared backend (which keeps threads apart). This one has the
members that the project and PaddleNLP's Trainer use, and needs no paddle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from oarlock.data.tokenizers.library_errors import ON_A_TEXT, library_errors
from oarlock.files import write_json, write_text_atomically

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# PaddleNLP and transformers read a tokenizer.json as it stands where this class is named (the latter because it has no
# such class); the names of families make them build another tokenizer of the vocabulary.
SAVED_CLASS = "PretrainedTokenizerFast"


class FastTokenizer:
    """A tokenizer of the `tokenizers` library and what tokenizer_config.json says of it.

    Attributes:
        backend_tokenizer: of the `tokenizers` library; cuts and pads nothing.
        init_kwargs: the content of tokenizer_config.json.
        special_tokens_map: bos_token, eos_token, ... as they are written; only those that there are.
        name_or_path: the folder it came from.
        template_files: chat_template.jinja and those of chat_templates/, name -> text, to be saved again.
        model_input_names, padding_side, model_max_length: as PaddleNLP's tokenizers have them.
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
        """input_ids (and attention_mask, all ones) of a text, or a list of them for a list of texts.

        Args:
            add_special_tokens: the begin and end tokens that the tokenizer puts around a text; a text that begins with
                the begin token gets no second one.
        """
        texts = [text] if isinstance(text, str) else list(text)
        with library_errors(ON_A_TEXT):
            rows = [row.ids for row in self.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        if add_special_tokens:
            rows = [self.with_begin(row) + self._around[1] for row in rows]
        found = {"input_ids": rows}
        if return_attention_mask:
            found["attention_mask"] = [[1] * len(row) for row in rows]
        return {name: values[0] for name, values in found.items()} if isinstance(text, str) else found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text."""
        return list(self(text, add_special_tokens, return_attention_mask=False)["input_ids"])

    def with_begin(self, ids: list[int]) -> list[int]:
        """Ids with the tokens that the tokenizer puts before a text, where they do not stand there already."""
        before = self._around[0]
        return ids if before and ids[: len(before)] == before else before + ids

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens put before a text, and behind it."""
        row = self.backend_tokenizer.encode("a", add_special_tokens=True)
        own = [i for i, added in enumerate(row.special_tokens_mask) if not added] or [len(row.ids)]
        return list(row.ids[: own[0]]), list(row.ids[own[-1] + 1 :])

    def decode(
        self,
        ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids.

        Args:
            clean_up_tokenization_spaces: take out spaces before punctuation; by default as tokenizer_config.json says
                where the tokenizer is no BPE (whose spaces are the text's own), the rule of transformers 5.
        """
        row = [int(ids)] if isinstance(ids, int) else [int(token) for token in ids]
        with library_errors(ON_A_TEXT):
            text = str(self.backend_tokenizer.decode(row, skip_special_tokens=skip_special_tokens))
        if clean_up_tokenization_spaces is None:
            asked = bool(self.init_kwargs.get("clean_up_tokenization_spaces", False))
            clean_up_tokenization_spaces = asked and type(self.backend_tokenizer.model).__name__ != "BPE"
        return _cleaned(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __len__(self) -> int:
        """How many rows an embedding needs: the largest id and one."""
        return max(self.get_vocab().values(), default=-1) + 1

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id -> added token."""
        return dict(self.backend_tokenizer.get_added_tokens_decoder())

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token (of the unknown one for a token that there is not), or a list of them."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend_tokenizer.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or a list of them."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(token)) for token in ids]

    @property
    def all_special_tokens(self) -> list[str]:
        """All that are special as they are written, the named ones first."""
        added = (token.content for _, token in sorted(self.added_tokens_decoder.items()) if token.special)
        return list(dict.fromkeys([*self.special_tokens_map.values(), *added]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens]

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """The begin token."""
        return self.special_tokens_map.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Its id."""
        return self._id_of("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The end token."""
        return self.special_tokens_map.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return self._id_of("eos_token")

    @property
    def unk_token(self) -> str | None:
        """The unknown token."""
        return self.special_tokens_map.get("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        """Its id."""
        return self._id_of("unk_token")

    @property
    def pad_token(self) -> str | None:
        """The padding token; the end token where there is none (what is padded is never trained on)."""
        return self.special_tokens_map.get("pad_token", self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        """Its id."""
        return self._id_of("pad_token" if "pad_token" in self.special_tokens_map else "eos_token")

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, which give the same tokenizer again.

        Chat templates are written as they came, in tokenizer_config.json or in files of their own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.loads(self.backend_tokenizer.to_str())
        # All added tokens stand in tokenizer.json, with the flags that hold.
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


def _cleaned(text: str) -> str:
    """The replacements of transformers' clean_up_tokenization, in its order."""
    for before, after in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")):
        text = text.replace(before, after)
    for before, after in ((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):
        text = text.replace(before, after)
    return text
