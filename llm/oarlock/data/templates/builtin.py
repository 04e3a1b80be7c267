"""The chat templates that come with Oarlock, by name."""

from __future__ import annotations


def _format_end(marker: str) -> str:
    """Return the end of an answer: the marker of the format, then the tokenizer's EOS token if it differs.

    Generation stops at EOS, so a trained answer has to end with it.
    """
    return marker + "{% if eos_token != '" + marker + "' %}{{ eos_token }}{% endif %}"


_ANSWER = "{{ message['content'] }}{{ eos_token }}"
BUILT_IN = {
    # Unchanged text, as PaddleNLP's finetune_generation uses src and tgt.
    "plain": "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    + _ANSWER
    + "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}",
    # Stanford Alpaca's two prompts (tatsu-lab/stanford_alpaca, train.py), with and without an input.
    "alpaca": """\
{% for message in messages %}{% if message['role'] == 'assistant' %}"""
    + _ANSWER
    + """{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% elif message['input'] %}\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{{ message['instruction'] }}

### Input:
{{ message['input'] }}

### Response:{% else %}\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{{ message['instruction'] or message['content'] }}

### Response:{% endif %}{% endfor %}""",
    # Llama 2 chat (meta-llama/llama, generation.py): the system text is part of the first question, and each round
    # starts with the BOS token.
    "llama2": "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.index0 > 0 and messages[loop.index0 - 1]['role'] == 'user' %}"
    "{{ raise_exception('two questions follow each other') }}{% endif %}"
    "{{ bos_token }}[INST] "
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + message['content'].strip() }}"
    "{% else %}{{ message['content'].strip() }}{% endif %} [/INST]"
    "{% elif message['role'] == 'assistant' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'user' %}"
    "{{ raise_exception('an answer must follow a question') }}{% endif %}"
    "{{ ' ' + message['content'].strip() + ' ' }}{{ eos_token }}"
    "{% elif message['role'] != 'system' %}{{ raise_exception('there are no words for the role ' + message['role']) }}"
    "{% elif loop.index0 > 0 %}{{ raise_exception('a system text may only come first') }}"
    "{% endif %}{% endfor %}",
    # ChatML (openai/openai-python, chatml.md).
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}" + _format_end("<|im_end|>") + "{% else %}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # <|system|> S <|endoftext|> <|prompter|> Q <|endoftext|> <|assistant|> A <|endoftext|>, as OpenAssistant does.
    "openassistant": "{% for message in messages %}{% if not loop.first %} {% endif %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }} "
    + _format_end("<|endoftext|>")
    + "{% else %}"
    "{{ '<|system|> ' if message['role'] == 'system' else '<|prompter|> ' }}{{ message['content'] }} <|endoftext|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}",
}
