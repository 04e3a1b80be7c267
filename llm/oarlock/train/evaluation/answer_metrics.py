"""Metrics of generated answers: exact match, BLEU (sacreBLEU) and ROUGE (Google's rouge-score).

Both libraries are imported when the first answers are scored; neither needs the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from oarlock.environment.console import log_once

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IS_CHINESE = re.compile(f"[{_HAN}]")
_ROUGE_TOKEN = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")


def compute_answer_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compare answers with references, ignoring white space at the ends.

    Args:
        references: the expected answers.

    Returns:
        exact_match (fraction), bleu (corpus BLEU, 0 to 100), rouge_1, rouge_2 and rouge_l (mean F1, 0 to 1).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    answers, references = [text.strip() for text in answers], [text.strip() for text in references]
    right = sum(answer == reference for answer, reference in zip(answers, references, strict=True))
    # zh separates Chinese characters, and treats the rest as 13a does. Orders without any n-gram in the corpus are left
    # out (effective order): otherwise correct answers of one or two words would score 0.
    tokenizer = "zh" if any(_IS_CHINESE.search(text) for text in references) else "13a"
    bleu = BLEU(tokenize=tokenizer, effective_order=True, force=True)
    bleu_score = float(bleu.corpus_score(answers, [references]).score)
    log_once(f"BLEU signature: {bleu.get_signature()}")
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(kinds.values()), tokenizer=_RougeTokenizer())
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    rouge = {name: sum(s[kind].fmeasure for s in scores) / max(1, len(scores)) for name, kind in kinds.items()}
    return {"exact_match": right / max(1, len(answers)), "bleu": bleu_score, **rouge}


class _RougeTokenizer:
    """Lower-case words as in rouge-score, and every Chinese character as a word.

    rouge-score's own tokenizer drops everything except a-z and 0-9, so Chinese answers would score 0.
    """

    def tokenize(self, text: str) -> list[str]:
        return _ROUGE_TOKEN.findall(text.lower())
