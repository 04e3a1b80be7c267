"""Why PaddleNLP's prefix tuning is not used; see oarlock.peft.prefix_tuning."""

from __future__ import annotations

from typing import Any

import paddle
import pytest
from paddlenlp.peft import PrefixConfig, PrefixModelForCausalLM
from paddlenlp.peft.prefix import llama_postprocess_past_key_value
from paddlenlp.transformers import LlamaForCausalLM
from paddlenlp.trl.llm_utils import get_prefix_tuning_params

from families import family_config

IDS = [[9, 30, 41, 100]]


def make_paddlenlp_prefix(**changes: Any) -> PrefixModelForCausalLM:
    """Prefix tuning of PaddleNLP's Llama, as its fine-tuning script makes it."""
    model = LlamaForCausalLM(family_config("llama", use_flash_attention=False, **changes))
    known = get_prefix_tuning_params(model)
    config = PrefixConfig(
        num_prefix_tokens=3,
        num_attention_heads=known["num_attention_heads"],
        num_hidden_layers=known["num_hidden_layers"],
        hidden_size=known["hidden_size"],
        multi_query_group_num=known["multi_query_group_num"],
        dtype="float32",
    )
    return PrefixModelForCausalLM(model, config, postprocess_past_key_value=llama_postprocess_past_key_value)


def test_paddlenlp_sizes_the_prefix_for_ungrouped_heads():
    ids = paddle.to_tensor(IDS)
    grouped = make_paddlenlp_prefix()  # 4 heads, 2 for keys and values
    assert grouped._get_past_key_values(1)[0][0].shape == [1, 3, 4, 8]
    with pytest.raises(ValueError, match="shape"):
        grouped(ids)
    full = make_paddlenlp_prefix(num_key_value_heads=4)
    assert full(ids)[0].shape == [1, 4, 512]
