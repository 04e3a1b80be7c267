"""Ways to break the tokenizer, template or generation settings of an exported directory, as in broken_exports."""

from __future__ import annotations

from support.small_exports import (
    TEMPLATE,
    change,
    read,
    write,
)


def lose_vocabulary(folder, choose):
    (folder / "tokenizer.json").unlink()
    return "tokenizer"


def cut_tokenizer(folder, choose):
    path = folder / choose(["tokenizer.json", "tokenizer_config.json"])
    path.write_text(path.read_text()[: choose([0, 5, 40])])
    return "tokenizer"


def lose_tokenizer_config(folder, choose):
    (folder / "tokenizer_config.json").unlink()
    return "tokenizer"


def large_vocabulary(folder, choose):
    content = read(folder, "tokenizer.json")
    if choose([True, False]):
        content["model"]["vocab"]["é"] = choose([96, 97, 50_000])
    else:
        content["added_tokens"].append({"id": choose([96, 1_000]), "content": "<x>"})
    write(folder, "tokenizer.json", content)
    return "tokenizer"


def paddle_tokenizer(folder, choose):
    change(folder, "tokenizer_config.json", tokenizer_class="PretrainedTokenizerFast")
    return "tokenizer"


def lose_template(folder, choose):
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template="gone")
    return "template"


def other_template(folder, choose):
    if choose([True, False]):
        change(folder, "tokenizer_config.json", chat_template="Q: " + TEMPLATE)
    else:
        (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    return "template"


def broken_template(folder, choose):
    text = choose(["{% for m in messages %}", "{{ messages", "nothing of it", "{{ raise_exception('no') }}"])
    (folder / "chat_template.jinja").write_text(text)
    change(folder, "tokenizer_config.json", chat_template=text)
    return "template"


def broken_generation(folder, choose):
    (folder / "generation_config.json").write_text(
        choose(["", "{", "[]", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")])
    )
    return "generation"


def wrong_generation(folder, choose):
    wrong = [
        {"temperature": "0.7"}, {"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}, {"eos_token_id": 96},
        {"eos_token_id": "</s>"}, {"eos_token_id": [0, -3]}, {"pad_token_id": [0]}, {"do_sample": "yes"},
        {"max_new_tokens": -1}, {"repetition_penalty": True}, {"num_beams": 0}, {"min_p": [0.1]}, {"top_p": 1e400},
    ]  # fmt: skip
    change(folder, "generation_config.json", **choose(wrong))
    return "generation"
