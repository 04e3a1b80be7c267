"""How near answers are to the right ones: exact match, BLEU (sacreBLEU) and ROUGE (Google's rouge-score).

Both libraries are loaded when the first answers are scored; neither needs the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from oarlock.environment.console import log_once

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IS_CHINESE = re.compile(f"[{_HAN}]")
_ROUGE_TOKEN = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """exact_match (share), bleu (0 to 100, of the whole set), rouge_1, rouge_2 and rouge_l (mean F1, 0 to 1).

    Space at the ends does not count.

    Args:
        references: the right answer of each.
    """
    answers, references = [text.strip() for text in answers], [text.strip() for text in references]
    right = sum(answer == reference for answer, reference in zip(answers, references, strict=True))
    return {
        "exact_match": right / max(1, len(answers)),
        "bleu": _bleu(answers, references),
        **_rouge(answers, references),
    }


def _bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 with sacreBLEU's own tokenizer for the language: zh where a reference has Chinese, else 13a.

    (zh separates Chinese characters and does to the rest what 13a does.) Orders of which the whole set has no n-gram
    are left out (effective order): answers of a word or two would be 0 however right they are.
    """
    from sacrebleu.metrics import BLEU

    tokenizer = "zh" if any(_IS_CHINESE.search(text) for text in references) else "13a"
    bleu = BLEU(tokenize=tokenizer, effective_order=True, force=True)
    score = bleu.corpus_score(list(answers), [list(references)]).score
    log_once(f"BLEU signature: {bleu.get_signature()}")
    return float(score)


class _RougeTokenizer:
    """rouge-score's words (lower case, letters and digits), and every Chinese character by itself.

    (Its own tokenizer drops all that is not a-z or 0-9, so that Chinese answers would score 0.)
    """

    def tokenize(self, text: str) -> list[str]:
        return _ROUGE_TOKEN.findall(text.lower())


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(kinds.values()), tokenizer=_RougeTokenizer())
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(s[kind].fmeasure for s in scores) / max(1, len(scores)) for name, kind in kinds.items()}
