"""GLM (the one of blank filling, not GLM-4)."""

from oarlock.families.family import Family
from oarlock.families.shared import MEGATRON_LINEARS

FAMILY = Family(
    name="glm",
    architecture="GLMForConditionalGeneration",
    tensor_parallel=True,
    pipeline=False,
    sequence_parallel=False,
    lora_targets=MEGATRON_LINEARS,
    why_not={
        "kv_axes": "its layers cache hidden states, not keys and values",
        "hf_weights": "its converter in PaddleNLP 3.0.0b4 imports a function that no longer exists",
        "hf_config": "transformers' GLM is GLM-4; PaddleNLP's is the older GLM, with two-dimensional positions and "
        "blank infilling",
    },
    gated_mlp=False,
    paddlenlp_tokenizer="GLMGPT2Tokenizer",
    hf_weights=False,
    paddle_values={"relative_encoding": (False,), "spell_length": ()},
    forward="pairs_of_positions",
    takes_position_ids=False,
)
