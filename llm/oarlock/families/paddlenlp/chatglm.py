"""ChatGLM (the first one)."""

from oarlock.families.family import Family
from oarlock.families.shared import MEGATRON_LINEARS, TOKEN_FIRST

FAMILY = Family(
    name="chatglm",
    architecture="ChatGLMForCausalLM",
    tensor_parallel=True,
    pipeline=False,
    sequence_parallel=False,
    lora_targets=MEGATRON_LINEARS,
    kv_axes=TOKEN_FIRST,
    why_not={
        "hf_weights": "PaddleNLP has no table of its Hugging Face weight names; convert the weights to Paddle's format "
        "first",
        "hf_config": "transformers has no ChatGLM (its published models come with their own code)",
    },
    gated_mlp=False,
    head_size_multiple=4,  # half of a head for each of its two kinds of positions
    paddlenlp_tokenizer="ChatGLMTokenizer",
    hf_weights=False,
    paddle_values={
        "quantization_bit": (0,),
        "pre_seq_len": (),
        "prefix_projection": (False,),
        "num_image_tokens": (0,),
    },
    forward="pairs_of_positions",
    takes_position_ids=False,
    graph_change="chatglm_rotary",
)
