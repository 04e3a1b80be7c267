"""Chat templates for tests."""

from __future__ import annotations

from oarlock.data.templates.chat_template import ChatTemplate

SPELLINGS = ("<|im_start|>", "<|im_end|>", "</s>")
ALL = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ROUND = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def template(source: str, **more) -> ChatTemplate:
    return ChatTemplate("mine", source, {"eos_token": "</s>"}, SPELLINGS, **more)
