"""Chat templates: their text, and the same token ids in training, from the saved folder, and from Hugging Face."""

from __future__ import annotations

import pytest
import transformers

from helpers import encode_conversation
from oarlock.data.examples.labels import encode_prompt
from oarlock.data.records.conversations import Conversation
from oarlock.data.templates.chat_template import BUILT_IN, ChatTemplate, choose_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import DataError
from oarlock.weights.save import save_tokenizer

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
OWN = "{% for m in messages %}({{ m['role'] }}) {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}(assistant) {% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def template(name: str, eos: str = "</s>") -> ChatTemplate:
    return ChatTemplate(name, BUILT_IN[name], {"bos_token": "<s>", "eos_token": eos})


@pytest.mark.parametrize(
    ("name", "eos", "expected"),
    [
        ("plain", "</s>", "S\nQ1A1</s>Q2A2</s>"),
        ("llama2", "</s>", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"),
        (
            "chatml",
            "<|im_end|>",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
            "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
        ),
        (
            "openassistant",
            "<|endoftext|>",
            "<|system|> S <|endoftext|> <|prompter|> Q1 <|endoftext|> <|assistant|> A1 <|endoftext|> "
            "<|prompter|> Q2 <|endoftext|> <|assistant|> A2 <|endoftext|>",
        ),
    ],
)
def test_templates_render_the_published_formats(name, eos, expected):
    assert template(name, eos).render(MESSAGES) == expected


@pytest.mark.parametrize(("name", "marker"), [("chatml", "<|im_end|>"), ("openassistant", "<|endoftext|>")])
def test_generation_stops_at_a_different_end_token(name, marker):
    ours = template(name)
    whole = ours.render(MESSAGES)
    assert whole.count(marker) == 5 and whole.count(f"{marker}</s>") == 2, "after each answer, and nowhere else"
    assert ours.extract_answer(f" A2 {marker}") == " A2 " and template(name, marker).extract_answer(" A2 ") == " A2 "


def test_llama2_refuses_unsupported_messages():
    question, answer = MESSAGES[1:3]
    for messages, expected in (
        ([question, question], "two questions follow each other"),
        ([answer], "an answer must follow a question"),
        ([question, answer, MESSAGES[0]], "a system text may only come first"),
        ([question, {"role": "tool", "content": "3"}], "there are no words for the role tool"),
    ):
        with pytest.raises(DataError, match=expected):
            template("llama2").render(messages)


@pytest.mark.parametrize("name", ["tokenizer", *BUILT_IN, "own"])
def test_training_serving_and_hugging_face_use_the_same_ids(name, tokenizer, tmp_path):
    choice = name
    if name == "own":
        (tmp_path / "own.jinja").write_text(OWN)
        choice = str(tmp_path / "own.jinja")
    training = choose_template(choice, tokenizer, "messages")
    folder = tmp_path / "model"
    save_tokenizer(tokenizer, folder, training)

    saved = load_tokenizer(str(folder))
    serving = choose_template("auto", saved, "src_tgt")
    hugging_face = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for first in (0, 1):  # with and without a system text
        talk = Conversation(MESSAGES[first:], "here:1")
        encoded = encode_conversation(talk, tokenizer, training, 999, 999)
        assert encode_conversation(talk, saved, serving, 999, 999) == encoded
        assert encoded.ids == hugging_face.apply_chat_template(talk.messages, return_dict=False), "the whole"
        first_round = Conversation(talk.messages[: 3 - first], "here:1")
        prompt = encode_prompt(first_round, saved, serving, 999).input_ids
        assert prompt == encode_prompt(first_round, tokenizer, training, 999).input_ids
        assert prompt == hugging_face.apply_chat_template(
            first_round.messages[:-1], add_generation_prompt=True, return_dict=False
        )
        example = encode_conversation(first_round, tokenizer, training, 999, 999)
        assert prompt == example.ids[: example.context], "the answer begins where the prompt ends"
        assert example.runs[0] == len(prompt) and example.runs[1] == example.answer
