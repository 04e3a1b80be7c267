"""Ask a saved model a question, in the words it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from paddlenlp.transformers import AutoConfig

from oarlock.data.labels import encode_text
from oarlock.data.templates import choose_template
from oarlock.data.tokenizers import load_tokenizer
from oarlock.environment import set_paddlenlp_log_level
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import generate_ids
from oarlock.models.hub import local_folder


def ask_model(name_or_path: str, questions: Sequence[str], max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """(question, greedy answer) of each."""
    set_paddlenlp_log_level("error")
    folder: Path = local_folder(name_or_path, with_weights=True)
    tokenizer = load_tokenizer(str(folder))
    template = choose_template("auto", tokenizer, "src_tgt")
    model = build_model(ModelSource(folder, AutoConfig.from_pretrained(str(folder)), from_weights=True))
    model.eval()
    for question in questions:
        prompt = template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        (ids,) = generate_ids(model, tokenizer, [encode_text(tokenizer, prompt)], max_new_tokens)
        yield question, tokenizer.decode(ids, skip_special_tokens=True).strip()
