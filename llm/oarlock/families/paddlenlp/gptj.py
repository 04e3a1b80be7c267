"""GPT-J."""

from oarlock.families.family import Family, HFConfig, HFName
from oarlock.families.shared import HF_SERVERS

FAMILY = Family(
    name="gptj",
    architecture="GPTJForCausalLM",
    tensor_parallel=False,
    pipeline=False,
    sequence_parallel=False,
    lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    why_not={
        "kv_axes": "PaddleNLP's GPT-J counts padding tokens as positions, so the distance to a prefix would differ "
        "between rows of a batch",
    },
    gated_mlp=False,
    layer_masks=True,
    hf_config=HFConfig(
        fields={
            "vocab_size": 50400,
            "n_positions": 2048,
            "n_embd": 4096,
            "n_layer": 28,
            "n_head": 16,
            "rotary_dim": 64,
            "n_inner": None,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.02,
        },
        aliases={
            "max_position_embeddings": "n_positions",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
            "embed_dim": "n_embd",
        },
        supported={
            "layer_norm_epsilon": (1e-5,),  # PaddleNLP's GPT-J sets that of every norm when it is built
            "tie_word_embeddings": (False,),
            "rotary": (True,),
            "scale_attn_weights": (True,),
        },
        required={"layer_norm_epsilon": 1e-5},
        activation="activation_function",
        rotary=False,
    ),
    hf_names=tuple(
        HFName(name, name, transposed)
        for name, transposed in (
            ("transformer.wte.weight", False),
            ("transformer.h.N.ln_1.weight", False),
            ("transformer.h.N.ln_1.bias", False),
            ("transformer.h.N.attn.q_proj.weight", True),
            ("transformer.h.N.attn.k_proj.weight", True),
            ("transformer.h.N.attn.v_proj.weight", True),
            ("transformer.h.N.attn.out_proj.weight", True),
            ("transformer.h.N.mlp.fc_in.weight", True),
            ("transformer.h.N.mlp.fc_in.bias", False),
            ("transformer.h.N.mlp.fc_out.weight", True),
            ("transformer.h.N.mlp.fc_out.bias", False),
            ("transformer.ln_f.weight", False),
            ("transformer.ln_f.bias", False),
            ("lm_head.weight", True),
            ("lm_head.bias", False),
        )
    ),
    hf_prefix="transformer.",
    forward="explicit_mask",
    counts_padding=True,
    takes_position_ids=False,
    servers=HF_SERVERS,
)
