"""`oarlock data tokenizer`: what it learns, what it writes, and what it refuses."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers import train_tokenizer as trained
from oarlock.data.tokenizers.fast_tokenizer import FastTokenizer
from oarlock.data.tokenizers.load import load_encoder, load_tokenizer
from oarlock.data.tokenizers.train_tokenizer import TokenizerOptions, split_into_pieces, train_tokenizer
from oarlock.errors import ConfigError, DataError

SENTENCES = [f"The river {name} is {i * 37} km long.\r\n\tIt flows north; 它流向北方 №{i} ǆ e\u0301.\n" for i, name in
             enumerate(["Elbe", "Rhine", "Danube", "Rhône", "Volga", "Loire"] * 40)]  # fmt: skip
HARD = " two  spaces\u3000and\u00a0more\t\r\n\n\n<|im_start|>it's 12345 e\u0301 ﬁ 🙂🇩🇪 \u200d\x00 end "


@pytest.fixture
def options(tmp_path) -> TokenizerOptions:
    (tmp_path / "text.txt").write_text("".join(SENTENCES), encoding="utf-8", newline="")
    return TokenizerOptions((str(tmp_path / "text.txt"),), tmp_path / "out", 330)


def test_the_folder_is_a_tokenizer_with_chat_template(options):
    report = train_tokenizer(options)
    tokenizer = load_tokenizer(str(options.output))
    assert len(tokenizer) == report.tokens == 330
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = choose_template("tokenizer", tokenizer, "").render(messages)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|><|endoftext|>\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and ids.count(2) == 2 and ids.count(0) == 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> FastTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("".join(SENTENCES), encoding="utf-8", newline="")
    train_tokenizer(TokenizerOptions((str(folder / "text.txt"),), folder / "out", 330))
    return load_tokenizer(str(folder / "out"))


@given(text=st.text(max_size=60))
@example(text=HARD)
@example(text="".join(map(chr, range(1, 0x3000))))
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_the_text_are_tokens_and_it_needs_fewer(options):
    report = train_tokenizer(options)
    assert len(load_tokenizer(str(options.output)).encode(" river")) == 1
    (own,) = report.inputs.values()
    assert own.held_out and own.trained and own.held_out_rate > 2 and own.trained_rate > 2
    assert not {*own.held_out} & {*own.trained}
    assert report.bytes + sum(len(piece.encode()) for piece in own.held_out) == len("".join(SENTENCES).encode())
    lines = "\n".join(report.describe(options.output))
    assert f"{own.held_out_rate:.2f}" in lines and "gave back every held-out text" in lines


def test_the_same_text_gives_the_same_files(options):
    train_tokenizer(options)
    train_tokenizer(replace(options, output=options.output.with_name("again")))
    for path in options.output.iterdir():
        assert path.read_bytes() == (options.output.with_name("again") / path.name).read_bytes()


@pytest.mark.parametrize(("digits", "merges", "longest"), [("one", 5, 1), ("three", 9, 3), ("any", 10, 6)])
def test_tokens_hold_as_many_digits_as_asked(options, digits, merges, longest):
    Path(options.inputs[0]).write_text("123456 words " * 200)
    train_tokenizer(replace(options, digits=digits, vocab_size=259 + merges))
    vocabulary = load_tokenizer(str(options.output)).get_vocab()
    assert max(len(token) for token in vocabulary if token.isdigit()) == longest


def test_without_chat_and_with_own_special_tokens(options):
    train_tokenizer(replace(options, chat=False, special_tokens=("</s>", "<sep>")))
    tokenizer = load_tokenizer(str(options.output))
    assert tokenizer.eos_token == "</s>" and "<|im_start|>" not in tokenizer.get_vocab()
    assert not (options.output / "chat_template.jinja").exists()
    assert load_encoder(str(options.output)).eos_id == 0
    assert tokenizer.encode("a<sep>b")[1] == 1


def test_all_forms_of_files_are_read(options, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    half = len(SENTENCES) // 2
    rows = [json.dumps({"content": text}) for text in SENTENCES[:half]]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    (folder / "b.csv").write_text("content\n" + "".join(f'"{text}"\n' for text in SENTENCES[half:]), newline="")
    (folder / "c.pdf").write_text("no text")
    report = train_tokenizer(replace(options, inputs=(str(folder), str(folder / "b.csv")), text_key="content"))
    held_out = [piece for own in report.inputs.values() for piece in own.held_out]
    total = len("".join(SENTENCES).encode())
    assert report.bytes + sum(len(piece.encode()) for piece in held_out) == total  # b.csv is read once
    assert report.left_out.count == 1


def test_of_a_large_text_evenly_spaced_pieces_are_taken(options):
    size = len("".join(SENTENCES).encode())
    report = train_tokenizer(replace(options, max_bytes=size // 4, vocab_size=300))
    assert report.share == pytest.approx(0.25, abs=0.01)
    assert report.bytes == pytest.approx(size / 4, rel=0.2)
    assert "about 25% of it" in next(report.describe(options.output))


def test_text_with_too_many_words_is_refused(options):
    words = " ".join("".join(chr(0x4E00 + (i * k) % 20000) for k in range(1, 40)) for i in range(3000))
    Path(options.inputs[0]).write_text(words, encoding="utf-8")
    with pytest.raises(DataError, match=r"more than 0\.02 GB of memory.*--max-megabytes 1"):
        train_tokenizer(replace(options, max_memory=20_000_000))
    assert not options.output.exists()


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"vocab_size": 259}, ConfigError, "it always has 256 bytes and 3 special tokens"),
        ({"vocab_size": 50000}, DataError, "give only .* tokens of pairs that occur 2 times"),
        ({"special_tokens": ("<|im_end|>",)}, ConfigError, "each has to be a different text"),
        ({"special_tokens": ("",)}, ConfigError, "each has to be a different text"),
        ({"inputs": ("nowhere.txt",)}, DataError, "no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused(options, changes, error, sentence):
    with pytest.raises(error, match=sentence):
        train_tokenizer(replace(options, **changes))
    assert not options.output.exists()


def test_a_bad_line_is_named_or_skipped(options, tmp_path):
    lines = [json.dumps({"text": text}) for text in SENTENCES]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines, '{"text": 3}', "{"]))
    bad = replace(options, inputs=(str(tmp_path / "bad.jsonl"),))
    with pytest.raises(DataError, match=rf"bad\.jsonl:{len(lines) + 1}: field 'text' holds int"):
        train_tokenizer(bad)
    report = train_tokenizer(replace(bad, skip_bad=True))
    assert report.bad_lines == 2 and report.first_bad is not None and report.first_bad.line == len(lines) + 1


def test_a_tokenizer_that_loses_text_is_refused(options, monkeypatch):
    original = trained.train_byte_level_bpe

    def lossy(*words, **names):
        from tokenizers import normalizers

        found = original(*words, **names)
        found.normalizer = normalizers.NFC()
        return found

    monkeypatch.setattr(trained, "train_byte_level_bpe", lossy)
    with pytest.raises(DataError, match="does not give back a text that begins"):
        train_tokenizer(options)
    assert not options.output.exists()


@given(text=st.text(alphabet="ab \n", max_size=200))
def test_pieces_make_up_the_text(text):
    pieces = list(split_into_pieces(text, 16))
    assert "".join(pieces) == text and all(0 < len(piece) <= 16 for piece in pieces)
