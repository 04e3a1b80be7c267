"""Tokenizer folders: what is read, what is refused by name, and what is written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oarlock.data.examples.marked_text import MarkedText
from oarlock.data.tokenizers.load import compute_tokenizer_fingerprint, encode_marked, load_encoder, load_tokenizer
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.errors import ModelError
from oarlock.hub import downloads
from tokenizer_layouts import QWEN2_WORDS, SHAPES, TEXTS, save, sentencepiece_model

PLAIN = [text for text in TEXTS if "{" not in text]


def folder_of(tmp_path: Path, name: str, **changes: object) -> Path:
    tokenizer, config = SHAPES[name][0]()
    return save(tmp_path / name, tokenizer, {**config, **changes}, SHAPES[name][1])


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}], ids=str)
def test_paddlenlps_sentencepiece_layout_equals_sentencepiece(tmp_path, kind, settings):
    import sentencepiece

    size = {"vocab_size": 640} if kind == "unigram" else {}
    model = sentencepiece_model(tmp_path, kind, **settings, **size)
    model = model.rename(tmp_path / "sentencepiece.bpe.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=str(model)), load_tokenizer(str(tmp_path))
    for text in PLAIN:
        if kind == "unigram" and text == "x" * 40:  # several segmentations have the same score
            continue
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
        # PaddleNLP's Llama adds a begin token to every text.
        assert ours(text)["input_ids"] == [1, *theirs.encode(text)]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")


def test_spaces_around_special_tokens_are_kept(tmp_path):
    """PaddleNLP's Qwen2 class loses the newline that every template puts after <|im_end|>."""
    ours = load_tokenizer(str(folder_of(tmp_path, "qwen2")))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|> a "
    assert ours.decode(ours(text)["input_ids"]) == text
    encoder = load_encoder(str(tmp_path / "qwen2"))
    assert encoder.encode(["a\nb "])[0].tolist() == ours("a\nb ")["input_ids"]


def test_the_begin_token_occurs_once(tmp_path):
    folder = folder_of(tmp_path, "llama2 first")
    content = json.loads((folder / "tokenizer.json").read_text())
    around = {"single": ["<s>", "A", "</s>"]}
    content["post_processor"]["single"] = [
        {"Sequence": {"id": word, "type_id": 0}} if word == "A" else {"SpecialToken": {"id": word, "type_id": 0}}
        for word in around["single"]
    ]
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(folder))
    words = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert tokenizer("hi")["input_ids"] == [1, *words, 2]
    assert tokenizer("<s>hi")["input_ids"].count(1) == 1


def test_a_begin_token_equal_to_the_end_token(tmp_path):
    tokenizer, config = SHAPES["gpt2"][0]()
    folder = save(tmp_path / "opt", None, config | {"add_bos_token": True}, "opt")
    tokenizer.model.save(str(folder))
    found = load_tokenizer(str(folder))
    assert found("hi")["input_ids"] == [0, *found("hi", add_special_tokens=False)["input_ids"]]
    assert found("<|endoftext|>hi") == found("hi") and found("")["input_ids"] == [0]


def test_a_missing_padding_token_is_accepted(tmp_path):
    found = load_tokenizer(str(folder_of(tmp_path, "gpt2")))
    assert found.pad_token_id == found.eos_token_id == 0 and "pad_token" not in found.special_tokens_map
    found.save_pretrained(tmp_path / "saved")
    assert "pad_token" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_tokens_declared_only_in_the_configuration(tmp_path):
    """added_tokens_decoder, the older files, and extra special tokens as a list or by name."""
    folder = folder_of(tmp_path, "gpt2", eos_token="<|end|>", extra_special_tokens={"image_token": "<image>"})
    size = load_tokenizer(str(folder)).vocab_size
    change(folder / "tokenizer_config.json", added_tokens_decoder={str(size): {"content": "<|end|>", "special": False}})
    found = load_tokenizer(str(folder))
    assert found("a<|end|>")["input_ids"][-1] == size == found.eos_token_id and len(found) == size + 2
    assert found.decode([size], skip_special_tokens=True) == "", "named as the end, so it is special"
    assert found.special_tokens_map["image_token"] == "<image>"
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>", "lstrip": True}}))
    again = load_tokenizer(str(folder))
    assert again.eos_token_id == size and "<|end|>" in again.all_special_tokens


def test_an_added_token_with_another_id_is_reported(tmp_path, capsys):
    folder = folder_of(tmp_path, "gpt2", added_tokens_decoder={"9000": {"content": "<|x|>", "special": True}})
    load_tokenizer(str(folder))
    assert "the added token '<|x|>' has the id 9000, but" in capsys.readouterr().out


def test_the_end_token_of_the_model_is_the_default(tmp_path, capsys):
    folder = folder_of(tmp_path, "llama3")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no EOS token"):
        load_encoder(str(folder))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [load_tokenizer(str(folder))("<|im_end|>")["input_ids"][-1]]})
    )
    assert load_tokenizer(str(folder)).eos_token == "<|im_end|>"
    assert "has no eos_token; using '<|im_end|>'" in capsys.readouterr().out


def test_begin_tokens_that_the_file_does_not_add_are_reported(tmp_path, capsys):
    load_tokenizer(str(folder_of(tmp_path, "gpt2", bos_token="<|endoftext|>", add_bos_token=True)))
    assert "has add_bos_token True, but tokenizer.json does not add it" in capsys.readouterr().out


def test_a_newer_tokenizer_json_is_refused_with_the_required_version(tmp_path):
    folder = folder_of(tmp_path, "qwen2")
    change(folder / "tokenizer.json", pre_tokenizer={"type": "FromTheFuture", "pattern": QWEN2_WORDS})
    with pytest.raises(
        ModelError,
        match=r"tokenizer.json: its pre_tokenizer \(FromTheFuture\) is not supported by the installed version of the `tokenizers` library",
    ):
        load_tokenizer(str(folder))


def test_vocabularies_without_a_known_format_are_refused(tmp_path):
    tokenizer, _ = SHAPES["gpt2"][0]()
    folder = save(tmp_path / "bare", None, {}, "")
    tokenizer.model.save(str(folder))
    with pytest.raises(ModelError, match=r"do not define how text is split .* Set tokenizer_class"):
        load_tokenizer(str(folder))
    (folder / "merges.txt").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json, and no merges.txt for vocab.json"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", b"{", "tokenizer.json:1: not valid JSON"),
        ("tokenizer.json", b"{}", "not a tokenizer|its model"),
        ("tokenizer.model", b"\x0a\xff\xff", "not a sentencepiece model"),
        ("tokenizer.model", b"YQ== 0\nYg== 5\n", "its ranks have gaps"),
        ("tekken.json", b'{"config": {}}', "config: pattern is missing"),
        ("tekken.json", b'{"config": {"pattern": ""}, "vocab": [], "special_tokens": [{"rank": 3, "token_str": "a"}]}', "consecutive ranks"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=problem) as error:
        load_tokenizer(str(tmp_path))
    assert name in str(error.value)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_sentencepiece_models_without_an_equivalent_are_refused(tmp_path, kind):
    sentencepiece_model(tmp_path, kind, byte_fallback=False, hard_vocab_limit=False)
    with pytest.raises(ModelError, match=f"model {kind.upper()}; only BPE and UNIGRAM"):
        load_tokenizer(str(tmp_path))


def test_tiktoken_ranks(tmp_path):
    """Llama 3's tokenizer.model as Meta publishes it."""
    import base64

    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"He": 256, b"ll": 257, b"Hell": 258, b" w": 259}
    (tmp_path / "tokenizer.model").write_text(
        "".join(f"{base64.b64encode(k).decode()} {v}\n" for k, v in ranks.items())
    )
    change_ = {"260": {"content": "<|begin_of_text|>", "special": True}, "262": {"content": "<|end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": change_, "eos_token": "<|end|>"})
    )
    ours = load_tokenizer(str(tmp_path))
    theirs = tiktoken.Encoding(
        "x", pat_str=QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), mergeable_ranks=ranks, special_tokens={}
    )
    for text in PLAIN:
        assert ours(text)["input_ids"] == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text
    assert ours("<|begin_of_text|>Hell<|end|>")["input_ids"] == [260, 258, 262]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "3", "id", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
)
_KEYS = (
    "added_tokens_decoder",
    "eos_token",
    "extra_special_tokens",
    "additional_special_tokens",
    "tokenizer_class",
    "model_input_names",
)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("plain"), "gpt2")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]),
       content=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=3))  # fmt: skip
def test_configurations_of_any_form_are_read_or_refused_by_name(plain_folder, file, content):
    path = plain_folder / file
    path.write_text(json.dumps(content))
    try:
        found = load_tokenizer(str(plain_folder))
        assert found.encode("Hello") and found.decode(found.encode("Hello"))
    except ModelError as error:
        assert str(plain_folder) in str(error)
    finally:
        path.unlink()


def test_chat_templates_are_found_in_every_location(tmp_path):
    folder = folder_of(tmp_path, "qwen2")
    load_tokenizer(str(folder / "tokenizer.json")).save_pretrained(tmp_path / "a")
    first = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert first["chat_template"] == json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert "added_tokens_decoder" not in first and first["eos_token"] == "<|im_end|>"
    (folder / "chat_templates").mkdir()
    for name in ("chat_template.jinja", "chat_templates/tool_use.jinja"):
        (folder / name).write_text(f"{{{{ 'from {name}' }}}}")
    load_tokenizer(str(folder)).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ 'from chat_template.jinja' }}"
    assert (tmp_path / "b" / "chat_templates" / "tool_use.jinja").is_file()


def test_hub_names_follow_the_same_rule(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "qwen2")
    asked: list[str] = []

    def fetch(name, files):
        asked.extend(files)
        return folder / files[0] if name == "Qwen/mine" and (folder / files[0]).is_file() else None

    monkeypatch.setattr(downloads, "fetch", fetch)
    assert load_tokenizer("Qwen/mine").name_or_path == str(folder)
    assert "tokenizer.json" in asked and "tokenizer.model" not in asked
    with pytest.raises(ModelError, match="no hub has a tokenizer of this name"):
        load_tokenizer("Qwen/other")
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer("./nowhere")


def test_only_chatglm_and_glm_use_paddlenlp_tokenizers(tmp_path):
    model = sentencepiece_model(tmp_path / "x", "bpe", user_defined_symbols=[])
    (tmp_path / "x" / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMv2Tokenizer"}')
    found = load_tokenizer(str(tmp_path / "x"))
    assert type(found).__name__ == "ChatGLMv2Tokenizer"
    assert found("a")["input_ids"][:2] == [found.get_command("[gMASK]"), found.get_command("sop")]
    text = "Hi, who</s> are 你 [gMASK]?"
    (whole, cut) = encode_marked(found, [MarkedText(text), MarkedText(text, ((4, 15),))])
    assert whole.ids == found(text, add_special_tokens=False)["input_ids"]
    assert found.eos_token_id not in cut.ids
    for row in (whole, cut):
        assert len(row.ids) == len(row.offsets) and row.offsets == sorted(row.offsets)
        assert "".join(text[start:end] for start, end in row.offsets).split() == text.split()
    assert load_encoder(str(tmp_path / "x")).eos_id == found.eos_token_id
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert type(load_tokenizer(str(tmp_path))).__name__ == "FastTokenizer"


@pytest.mark.parametrize("name", ["GLMGPT2Tokenizer", "GLMChineseTokenizer"])
def test_glm_distinguishes_text_from_special_tokens(tmp_path, name):
    if name == "GLMGPT2Tokenizer":
        tokenizer, _ = SHAPES["gpt2"][0]()
        tokenizer.model.save(str(tmp_path))
    else:
        model = sentencepiece_model(tmp_path, "unigram", vocab_size=400, byte_fallback=False, user_defined_symbols=[])
        model.rename(tmp_path / "cog-pretrain.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    found = load_tokenizer(str(tmp_path))
    assert type(found).__name__ == name
    text, end = "a<|endoftext|> b<|endoftext|>", found.convert_tokens_to_ids("<|endoftext|>")
    rows = tokenize(found, [MarkedText(text), MarkedText(text, ((0, 16),))], [[16], [16]])
    assert [row.ids.count(end) for row in rows] == [2, 1] and rows[1].ids[-1] == end
    assert {span for row in rows for span in row.offsets} == {(0, 16), (16, len(text))}
    ids, spelled = load_encoder(str(tmp_path)).encode_and_flag([text, "a b"])
    assert end not in ids[0].tolist() and spelled == [True, False]


def test_the_long_fingerprint_covers_tokens_added_around_a_text(tmp_path):
    folder = folder_of(tmp_path, "llama3")
    first = load_tokenizer(str(folder))
    change(folder / "tokenizer.json", post_processor=None)
    second = load_tokenizer(str(folder))
    assert load_encoder(str(folder)).fingerprint and compute_tokenizer_fingerprint(
        first
    ) != compute_tokenizer_fingerprint(second)
