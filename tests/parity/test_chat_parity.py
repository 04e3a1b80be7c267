"""Conversations compared with transformers' apply_chat_template: the same ids, prompts and trained tokens.

The templates of tests/chat_templates/ are modelled on published ones (Qwen, Llama, Mistral, Gemma, Phi, ChatML,
DeepSeek) with {% generation %} added; transformers uses it to find the text of the assistant. Oarlock must find the same
with and without these marks. transformers runs in its own Python, once for all tests (chat_peer.py).
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from oarlock.data.examples.encode import Counts, EncodingSettings, encode_source
from oarlock.data.examples.labels import IGNORE_INDEX, encode_chat, encode_prompt
from oarlock.data.records.conversations import Conversation, parse_record
from oarlock.data.records.record_stream import RowRecords
from oarlock.data.templates.chat_template import ChatTemplate, choose_template
from oarlock.data.templates.trained_spans import render_chat_text
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.data.tokenizers.offsets import tokenize
from oarlock.errors import DataError

HERE = Path(__file__).parent
TEMPLATES = HERE.parent / "chat_templates"
# name -> begin token, end token, other special tokens, whether the vocabulary marks words as SentencePiece does
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "qwen2.5": ("", "<|im_end|>", ("<|endoftext|>", "<|im_start|>"), False),
    "qwen3": ("", "<|im_end|>", ("<|endoftext|>", "<|im_start|>"), False),
    "llama3.1": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), False),
    "mistral": ("<s>", "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                                "[TOOL_RESULTS]", "[/TOOL_RESULTS]"), True),
    "gemma2": ("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), True),
    "phi3": ("", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), True),
    "chatml": ("", "<|im_end|>", ("<|im_start|>",), False),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), False),
}  # fmt: skip
THINKING = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'How warm it is, in °C, "now"',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
USER, ANSWER = {"role": "user", "content": "How warm is it in Oulu?"}, {"role": "assistant", "content": "Let me see."}
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Oulu", "days": 2}},
}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": '{"warm": -3.5, "sky": "grå"}'}
ROUNDS = [
    USER,
    ANSWER,
    {"role": "user", "content": "  And 明天?\n"},
    {"role": "assistant", "content": " Colder,\n-7 °C. \n"},
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "a round": {"messages": [USER, ANSWER]},
    "two rounds": {"messages": ROUNDS},
    "a system text": {"messages": [{"role": "system", "content": "Be brief."}, *ROUNDS]},
    "tools": {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, {"role": "assistant", "content": "-3.5"}],
              "tools": TOOLS},
    "a call beside words": {"messages": [USER, {**ANSWER, "tool_calls": [CALL]}, RESULT, ANSWER, *ROUNDS], "tools": TOOLS},
    "a call at the end": {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS},
    "thoughts": {"messages": [USER, {**ANSWER, "reasoning_content": "North, so\ncold."}]},
    "thoughts of two rounds": {"messages": [USER, {**ANSWER, "reasoning_content": "one"}, USER,
                                            {"role": "assistant", "content": "Cold.", "reasoning_content": "two"}]},
    "thoughts in the words": {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}, USER, ANSWER]},
    "an answer that begins with a new line": {"messages": [USER, {"role": "assistant", "content": "\n\nOK"}]},
    "nothing said by the user": {"messages": [{"role": "user", "content": ""}, ANSWER]},
}  # fmt: skip


def make_tokenizer(folder: Path, name: str, template: str) -> None:
    begin, end, others, words = FAMILIES[name]
    special = [token for token in ("<unk>", begin, end, *others) if token]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=words))
    corpus = [json.dumps(CONVERSATIONS, ensure_ascii=False)] * 3
    if words:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    alphabet = [] if words else pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINKING])
    folder.mkdir(parents=True)
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    tokens = {"eos_token": end, "pad_token": end, "unk_token": "<unk>", **({"bos_token": begin} if begin else {})}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")


def remove_marks(template: str) -> str:
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", template)


@pytest.fixture(scope="module")
def peer(tmp_path_factory, parity_python) -> dict[str, dict[str, Any]]:
    """What transformers returns for each family and conversation."""
    folder = tmp_path_factory.mktemp("chat")
    for name in FAMILIES:
        make_tokenizer(folder / name, name, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    jobs = [{"folder": str(folder / name), "conversations": list(CONVERSATIONS.values())} for name in FAMILIES]
    rules = [{"template": SAY_ALL + source, "messages": ROUNDS} for source in RULES]
    jobs += [{"folder": str(folder / "chatml"), "conversations": rules}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [parity_python, str(HERE / "chat_peer.py"), str(folder / "jobs.json"), str(folder / "out.json")], check=True
    )
    found = json.loads((folder / "out.json").read_text())
    answers = {name: dict(zip(CONVERSATIONS, rows, strict=True)) for name, rows in zip(FAMILIES, found, strict=False)}
    return {"folder": folder, "rules": found[-1], **answers}


# Building blocks of templates; SAY_ALL comes first, so that nothing is dropped.
SAY_ALL = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\n"
RULES = [
    "{{ tools is none }} {{ documents is none }} {{ tools }} {{ add_generation_prompt }} {{ nothing is defined }}{{ nothing }}",
    "{{ {'b': 'é<\\'&', 'a': [1, 2.5, none, true]} | tojson }}",
    "{{ {'b': 'é', 'a': {'c': []}} | tojson(ensure_ascii=true, indent=2, sort_keys=true) }}",
    "{{ {'b': 1, 'a': 'x'} | tojson(separators=(',', ':')) }}",
    "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}{{ i }}{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }} {% else %}none{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k ~ v ~ none }}{% endfor %}",
    "  {% if true %}\n    kept\n  {%- endif %}\n\n{{ '  x ' | trim }}\n",
    "{% macro item(x, sep=', ') -%}<{{ x }}{{ sep }}>{%- endmacro %}{{ item('a') }}{{ item('b', sep='') }}",
    "{% set ns = namespace(count=0, names=[]) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}{% set ns.names = ns.names + [m.role] %}{% endfor %}{{ ns.count }}{{ ns.names }}",
    "{{ messages[::-1] | map(attribute='role') | join('|') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ '%05.1f|%s' % (2.25, 'a') }} {{ '{:>4}|{}'.format(1, messages[0].role) }} {{ 'a,b,,c'.split(',') }} {{ 'x'.upper().startswith('X') }}",
    "{{ dict(a=1, **{'b': 2}) }} {{ [1, [2, 3]] }} {{ (1, 'a') }} {{ {'a': none} }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ -7 % 3 }} {{ 'ab' * 3 }}",
    "{% set x %}a{{ 1 + 1 }}b{% endset %}{{ x | length }}{{ x }} {{ [3, 1, 2] | sort | first }} {{ 'a b' | title | replace('A', 'c') | indent(2, true) }}",
    "{{ messages[0].content[:3] }} {{ messages[-1]['content'] | string | length }} {{ messages[0].missing is defined }} {{ messages[0].get('x', 'y') }}",
    "{{ strftime_now('%Y') | length }} {{ bos_token is defined }} {{ eos_token }} {{ pad_token }}",
    "{% call(x) each(messages) %}[{{ x.role }}]{% endcall %}".replace("{% call", "{% macro each(ms) %}{% for m in ms %}{{ caller(m) }}{% endfor %}{% endmacro %}{% call"),
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% raw %}{{ x }}{% endraw %}{# nothing #}{{- ' y' -}}   z",
]  # fmt: skip


def test_templates_follow_the_rules_of_transformers(peer):
    tokenizer = load_tokenizer(str(peer["folder"] / "chatml"))
    base = choose_template("auto", tokenizer, "messages")
    for source, theirs in zip(RULES, peer["rules"], strict=True):
        ours = ChatTemplate("rule", SAY_ALL + source, base.special_tokens, base.spellings).render(ROUNDS)
        assert ours == theirs["text"], source


def read_mask(chat: Any, tokens: Any) -> list[int]:
    encoded = encode_chat(chat, tokens, 10_000, 10_000)
    assert list(encoded.ids) == tokens.ids
    return [i % 2 for i, length in enumerate(encoded.runs) for _ in range(length)]


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_prompts_and_trained_tokens_equal_transformers(name, peer):
    tokenizer = load_tokenizer(str(peer["folder"] / name))
    marked = choose_template("auto", tokenizer, "messages")
    plain = ChatTemplate(marked.name, remove_marks(marked.source), marked.special_tokens, marked.spellings)
    assert "generation" in marked.source and "generation -" not in plain.source
    compared = 0
    for kind, given in CONVERSATIONS.items():
        theirs = peer[name][kind]
        talk = parse_record({**given}, "messages", kind)
        assert isinstance(talk, Conversation)
        try:
            chats = [render_chat_text(talk, template) for template in (marked, plain)]
        except DataError as error:
            expect_refusal(name, kind, theirs, str(error))
            continue
        tokens = tokenize(tokenizer, [chat.text for chat in chats])
        assert chats[0].text.text == chats[1].text.text == theirs["text"], kind
        assert tokens[0].ids == theirs["ids"], kind
        masks = [read_mask(chat, row) for chat, row in zip(chats, tokens, strict=True)]
        assert masks[0] == theirs["mask"], f"{kind}: as marked"
        assert masks[1] == theirs["mask"], f"{kind}: without marks"
        prompt = encode_prompt(talk, tokenizer, plain, 10_000).input_ids
        assert prompt == theirs["prompt"], kind
        if name != "deepseek_r1":  # its generation prompt ends with <think>, which full conversations lack
            answer = encode_chat(chats[1], tokens[1], 10_000, 10_000)
            assert prompt == list(answer.ids[: answer.context]), kind
        compared += 1
    assert compared >= 4


# What our docs say a template drops or refuses.
REFUSED = {
    "tools": ("does not render 'tools'", "refuses these messages"),
    "a call beside words": ("does not render 'tools'", "refuses these messages", "next to its tool calls"),
    "a call at the end": ("does not render 'tools'", "refuses these messages"),
    # Mistral's template writes it only into the last question, and only if that ends the conversation.
    "a system text": ("refuses these messages: System role not supported", "leaves out messages[0] (role system)"),
    "thoughts": ("does not render messages[1].reasoning_content",),
    "thoughts of two rounds": ("does not render messages[1].reasoning_content",),
}


def expect_refusal(name: str, kind: str, theirs: dict[str, Any], problem: str) -> None:
    assert any(words in problem for words in REFUSED[kind]), f"{name}, {kind}: {problem}"
    if "refuses these messages" in problem:
        assert "TemplateError" in theirs["error"]


def test_a_special_token_spelled_in_user_text_changes_nothing_else(peer):
    for name in FAMILIES:
        tokenizer = load_tokenizer(str(peer["folder"] / name))
        spelled = FAMILIES[name][1] + "".join(FAMILIES[name][2])
        record = {
            "messages": [
                {"role": "user", "content": f"a {spelled} b"},
                {"role": "assistant", "content": f"c {spelled} d"},
            ]
        }
        counts = Counts()
        template = choose_template("auto", tokenizer, "messages")
        rows = encode_source(RowRecords("r", [record]), EncodingSettings(tokenizer, template, 999, 999), counts)
        (row,) = (row for part, _ in rows for row in part)
        special = {
            id_ for id_, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items() if token.special
        }
        ids, theirs = list(row.encoded.ids), peer[name]["a round"]["ids"]
        ours = [token for token in ids if token in special]
        assert ours == [token for token in theirs if token in special], f"{name}: the template's own and no other"
        assert tokenizer.decode(ids).count(spelled) == 2 and counts.spelled == 1
        loose = choose_template("auto", tokenizer, "messages", parse_special_tokens=True)
        rows = encode_source(RowRecords("r", [record]), EncodingSettings(tokenizer, loose, 999, 999), Counts())
        (row,) = (row for part, _ in rows for row in part)
        assert sum(token in special for token in row.encoded.ids) > len(ours), "one option brings it back"


def test_an_earlier_answer_can_be_untrained(peer):
    for name in FAMILIES:
        tokenizer = load_tokenizer(str(peer["folder"] / name))
        marked = choose_template("auto", tokenizer, "messages")
        plain = ChatTemplate(marked.name, remove_marks(marked.source), marked.special_tokens, marked.spellings)
        record = {"messages": [USER, {**ANSWER, "train": "no"}, USER, {"role": "assistant", "content": "Colder."}]}
        for template in (marked, plain):
            rows = encode_source(RowRecords("r", [record]), EncodingSettings(tokenizer, template, 999, 999), Counts())
            (row,) = (row for part, _ in rows for row in part)
            trained = [label for label in row.encoded.to_example().labels if label != IGNORE_INDEX]
            assert tokenizer.decode(trained, skip_special_tokens=True).split("</think>")[-1].strip() == "Colder."
