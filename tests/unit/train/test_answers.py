"""Metrics of answers, and files of fixed prompts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import LLM
from oarlock.data.examples.eval_prompts import load_eval_prompts
from oarlock.data.templates.chat_template import choose_template
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import DataError
from oarlock.train.evaluation.answer_metrics import _RougeTokenizer, compute_answer_metrics

# scores


def test_correct_answers_score_1_at_any_length():
    for texts in (["Paris"], ["山", "a b"], ["It is a fine day.", "今天天气很好。"]):
        found = compute_answer_metrics(texts, [f" {text}\n" for text in texts])
        assert found["exact_match"] == 1 and found["rouge_1"] == found["rouge_l"] == 1
        assert found["bleu"] == pytest.approx(100)
    assert compute_answer_metrics(["x", "b"], ["a", "b"])["exact_match"] == 0.5
    assert set(compute_answer_metrics(["x"], ["a"]).values()) == {0.0}


def test_metrics_computed_by_hand():
    """Three of four words match, all three in order; two of three pairs."""
    found = compute_answer_metrics(["the cat sat on"], ["the cat sat down"])
    assert found["rouge_1"] == found["rouge_l"] == 0.75 and found["rouge_2"] == pytest.approx(2 / 3)
    assert compute_answer_metrics(["a b c"], ["c b a"])["rouge_l"] == pytest.approx(1 / 3)
    chinese = compute_answer_metrics(["今天下雨"], ["今天下雪"])
    assert chinese["rouge_1"] == chinese["rouge_l"] == 0.75 and chinese["rouge_2"] == pytest.approx(2 / 3)
    # BLEU: 3/4 words, 2/3 pairs, 1/2 triples, and no quadruple, which sacreBLEU smooths to half a match
    assert chinese["bleu"] == found["bleu"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_the_language_of_the_references_decides_the_words(capsys, monkeypatch):
    monkeypatch.setattr("oarlock.train.evaluation.answer_metrics.log_once", print)
    compute_answer_metrics(["山"], ["mountain"])
    assert "tok:13a" in capsys.readouterr().out
    compute_answer_metrics(["mountain"], ["山"])
    assert "tok:zh" in capsys.readouterr().out


@given(text=st.text("abzABZ019 .,;!?-'\n", max_size=60))
def test_english_rouge_words_equal_rouge_score(text):
    from rouge_score.tokenize import tokenize

    assert _RougeTokenizer().tokenize(text) == tokenize(text, None)


def test_metric_libraries_are_imported_on_use():
    code = "import sys, oarlock.train.evaluation.prompt_evaluation; assert not {'sacrebleu', 'rouge_score', 'nltk'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=LLM, check=True, timeout=120)


# prompts


@pytest.fixture(scope="module")
def load(tiny_tokenizer, tmp_path_factory):
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    template = choose_template("auto", tokenizer, "src_tgt")
    folder = tmp_path_factory.mktemp("prompts")

    def read(content: str | bytes, name: str = "p.jsonl", src_length: int = 99):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_eval_prompts(folder / name, tokenizer, template, src_length)

    return read


def test_lines_of_text(load):
    found = load("Who are you?\r\n\n  你好\n", "p.txt")
    assert [prompt.text for prompt in found] == ["<|user|>Who are you?<|assistant|>", "<|user|>  你好<|assistant|>"]
    assert [prompt.where for prompt in found] == ["p.txt:1", "p.txt:3"] and found[0].answer == ""


@pytest.mark.parametrize(
    ("line", "text", "answer"),
    [
        ('{"text": "a"}', "<|user|>a<|assistant|>", ""),
        ('{"src": "a"}', "<|user|>a<|assistant|>", ""),
        ('{"src": "a", "tgt": "b"}', "<|user|>a<|assistant|>", "b"),
        ('{"src": ["a", "c"], "tgt": ["b"]}', "<|user|>a<|assistant|>b<|endoftext|><|user|>c<|assistant|>", ""),
        ('{"instruction": "a", "input": "b"}', "<|user|>a\nb<|assistant|>", ""),
        ('{"instruction": "a", "output": "c"}', "<|user|>a<|assistant|>", "c"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "<|user|>a<|assistant|>", ""),
        (
            '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]}',
            "<|user|>a<|assistant|>b<|endoftext|><|user|>c<|assistant|>",
            "",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "<|user|>a<|assistant|>",
            "b",
        ),
    ],
)
def test_records(load, line, text, answer):
    (found,) = load(line)
    assert (found.text, found.answer) == (text, answer) and found.input_ids


def test_formats_may_be_mixed_and_long_prompts_are_cut_at_the_start(load):
    found = load('\ufeff{"src": "a"}\n{"instruction": "b"}\n"c"\n', src_length=3)
    assert [prompt.where for prompt in found] == ["p.jsonl:1", "p.jsonl:2", "p.jsonl:3"]
    (long,) = load('{"src": "one two three four"}', src_length=3)
    assert len(long.input_ids) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"src": "a"}\n{"src": 3}\n', r"p.jsonl:2: field 'src' holds int"),
        ('{"src": "a"}\n\n{"a": "b"\n', r"p.jsonl:3: not valid JSON"),
        ('{"asked": "a"}', r"p.jsonl:1: unknown form of record \('asked'\)"),
        ('{"messages": []}', r"p.jsonl:1: field 'messages'"),
        ('{"src": ["a", "b"]}', r"p.jsonl:1: 2 rounds in 'src' but 1 in 'tgt'"),
        (b'{"src": "a"}\n\xff\n', r"p.jsonl:2: not UTF-8"),
        ("[1, 2]", r"p.jsonl:1: unknown form of record"),
        ("\n", "no prompts in this file"),
    ],
)
def test_wrong_files_are_named_with_their_line(load, content, expected):
    with pytest.raises(DataError, match=expected):
        load(content)


def test_a_missing_file_is_an_error(tiny_tokenizer):
    with pytest.raises(DataError, match=r"--eval_prompts nowhere.txt: No such file"):
        load_eval_prompts("nowhere.txt", None, None, 9)
