"""ChatGLM2."""

from oarlock.families.family import Family, PublishedName
from oarlock.families.shared import MEGATRON_LINEARS, TOKEN_FIRST

FAMILY = Family(
    name="chatglm_v2",
    architecture="ChatGLMv2ForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=True,
    lora_targets=MEGATRON_LINEARS,
    kv_axes=TOKEN_FIRST,
    why_not={"hf_config": "transformers has no ChatGLM2 (its published models come with their own code)"},
    published_as=PublishedName("chatglm", field="multi_query_group_num", class_prefix="ChatGLM"),
    head_size_multiple=2,
    never_tied=True,
    paddlenlp_tokenizer="ChatGLMv2Tokenizer",
    paddle_values={
        "quantization_bit": (0,),
        "pre_seq_len": (),
        "prefix_projection": (False,),
        "interleaved_qkv": (False,),
        "original_rope": (True,),
        "rope_ratio": (1, 1.0),
        "multi_query_attention": (True,),
        "classifier_dropout": (),
    },
    forward="cache_flag",
    packing=True,
)
