"""Several templates of one tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oarlock.data.templates.chat_template import choose_template
from oarlock.data.templates.template_files import load_own_templates, read_folder_templates, save_templates
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import ConfigError
from support.template_texts import ALL, ROUND, TOOLS

# several templates


def test_named_templates_follow_transformers(tiny_tokenizer, tmp_path):
    default, tools, rag = (ALL + "{% if add_generation_prompt %}[assistant]{% endif %}" + f"{{# {x} #}}" for x in "dtr")
    tools += "{{ tools | tojson }}"
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text())
    named = [
        {"name": "rag", "template": rag},
        {"name": "tool_use", "template": tools},
        {"name": "default", "template": default},
    ]

    def folder(name: str, chat_template, files: dict[str, str]) -> Path:
        place = tmp_path / name
        (place / "additional_chat_templates").mkdir(parents=True)
        for file in ("tokenizer.json", "special_tokens_map.json"):
            (place / file).write_bytes((tiny_tokenizer / file).read_bytes())
        (place / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chat_template}))
        for file, text in files.items():
            (place / file).write_text(text)
        return place

    for place in (
        folder("list", named, {}),
        folder("names", {entry["name"]: entry["template"] for entry in named}, {}),
        folder("files", "not this", {"chat_template.jinja": default, "additional_chat_templates/tool_use.jinja": tools,
                                     "additional_chat_templates/rag.jinja": rag}),
    ):  # fmt: skip
        tokenizer = load_tokenizer(str(place))
        assert load_own_templates(tokenizer) == {"default": default, "tool_use": tools, "rag": rag}
        chosen = choose_template("auto", tokenizer, "messages")
        assert (
            chosen.source == default
            and TOOLS[0]["function"]["name"] in chosen.render_chat(ROUND, tools=TOOLS).text.text
        )
        assert choose_template("auto", tokenizer, "messages", name="rag").source == rag
        with pytest.raises(ConfigError, match="chat templates are default, rag, tool_use; none is named 'rga'"):
            choose_template("auto", tokenizer, "messages", name="rga")
        # The saved tokenizer has all templates, with the chosen one as the default.
        for name, kept in ((None, {"default": default, "tool_use": tools, "rag": rag}),
                           ("rag", {"default": rag, "tool_use": tools, "rag": rag, "base_default": default})):  # fmt: skip
            out = tmp_path / f"{place.name}-{name}"
            out.mkdir()
            (out / "tokenizer_config.json").write_text("{}")
            choose_template("auto", tokenizer, "messages", name=name).save(out)
            assert read_folder_templates(out) == kept
            assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == kept["default"]
    only = load_tokenizer(str(folder("only", named[:2], {})))
    with pytest.raises(ConfigError, match="none of them is the default: choose with --chat_template_name"):
        choose_template("auto", only, "messages")
    with pytest.raises(ConfigError, match="needs --chat_template tokenizer, but that is plain"):
        choose_template("plain", only, "messages", name="rag")
    for wrong in ([{"name": "../x", "template": "y"}], [1], 7, [{"name": "a"}]):
        with pytest.raises(ConfigError, match="chat_template must be a string, or a list of objects"):
            load_own_templates(load_tokenizer(str(folder(f"wrong{len(str(wrong))}", wrong, {}))))


def test_templates_without_a_default_are_saved_by_name(tmp_path):
    save_templates(tmp_path, {"tool_use": "x"})
    assert read_folder_templates(tmp_path) == {"tool_use": "x"} and not (tmp_path / "chat_template.jinja").exists()


def test_conversion_carries_all_templates(tiny_tokenizer, tmp_path):
    from oarlock.export.tokenizer_files import write_tokenizer

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for file in ("tokenizer.json", "special_tokens_map.json"):
        (source / file).write_bytes((tiny_tokenizer / file).read_bytes())
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": ALL}, {"name": "tool_use", "template": ALL + "{{ tools | tojson }}"}]
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    write_tokenizer(source, "hf", "llama", out)
    assert read_folder_templates(out) == {entry["name"]: entry["template"] for entry in named}
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == ALL
