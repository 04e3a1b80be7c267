"""OPT."""

from oarlock.families.family import Family, HFConfig, HFName
from oarlock.families.shared import HEADS_BEFORE_TOKENS, HF_SERVERS

_NAMES = (
    HFName("model.decoder.embed_tokens.weight", "opt.embeddings.word_embeddings.weight"),
    HFName("model.decoder.embed_positions.weight", "opt.embeddings.position_embeddings.weight"),
    *(
        name
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
        for name in (
            HFName(
                f"model.decoder.layers.N.self_attn.{projection}.weight",
                f"opt.decoder.layers.N.self_attn.{projection}.weight",
                transposed=True,
            ),
            HFName(
                f"model.decoder.layers.N.self_attn.{projection}.bias",
                f"opt.decoder.layers.N.self_attn.{projection}.bias",
            ),
        )
    ),
    HFName("model.decoder.layers.N.self_attn_layer_norm.weight", "opt.decoder.layers.N.norm1.weight"),
    HFName("model.decoder.layers.N.self_attn_layer_norm.bias", "opt.decoder.layers.N.norm1.bias"),
    HFName("model.decoder.layers.N.fc1.weight", "opt.decoder.layers.N.linear1.weight", transposed=True),
    HFName("model.decoder.layers.N.fc1.bias", "opt.decoder.layers.N.linear1.bias"),
    HFName("model.decoder.layers.N.fc2.weight", "opt.decoder.layers.N.linear2.weight", transposed=True),
    HFName("model.decoder.layers.N.fc2.bias", "opt.decoder.layers.N.linear2.bias"),
    HFName("model.decoder.layers.N.final_layer_norm.weight", "opt.decoder.layers.N.norm2.weight"),
    HFName("model.decoder.layers.N.final_layer_norm.bias", "opt.decoder.layers.N.norm2.bias"),
    HFName("model.decoder.final_layer_norm.weight", "opt.decoder.final_layer_norm.weight"),
    HFName("model.decoder.final_layer_norm.bias", "opt.decoder.final_layer_norm.bias"),
)

FAMILY = Family(
    name="opt",
    architecture="OPTForCausalLM",
    tensor_parallel=False,
    pipeline=False,
    sequence_parallel=False,
    lora_targets=(
        *("project_in", "project_out"),
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj"),
        *("linear1", "linear2"),
    ),
    kv_axes=HEADS_BEFORE_TOKENS,
    positions_follow_prefix=True,
    why_not={
        "tensor_parallel": "PaddleNLP's OPTLMHead neither sums the gradient of its input over the ranks nor gathers "
        "the logits, so the trained model would be wrong",
    },
    gated_mlp=False,
    untied_heads=(
        ("lm_head.decoder_weight", "opt.embeddings.word_embeddings.weight"),  # in Paddle's layout
        ("lm_head.weight", "model.decoder.embed_tokens.weight"),
        ("lm_head.weight", "decoder.embed_tokens.weight"),
    ),
    tied_parameters=("lm_head.decoder_weight", "opt.embeddings.word_embeddings.weight"),
    hf_config=HFConfig(
        fields={
            "vocab_size": 50272,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "ffn_dim": 3072,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": True,
            "word_embed_proj_dim": None,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "num_attention_heads": 12,
            "init_std": 0.02,
            "tie_word_embeddings": True,
        },
        paddle_names={
            "ffn_dim": "intermediate_size",
            "do_layer_norm_before": "normalize_before",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "init_std": "initializer_range",
        },
        supported={
            "activation_function": ("relu",),
            "_remove_final_layer_norm": (False,),
            "enable_bias": (True,),
            "layer_norm_elementwise_affine": (True,),
        },
        required={"hidden_act": "relu"},
        ignored=frozenset({"type_vocab_size", "mp_degree"}),
        dropouts=frozenset({"layerdrop", "activation_dropout"}),
        equal={"word_embed_proj_dim": "hidden_size"},  # PaddleNLP's output layer has the hidden size
        rotary=False,
    ),
    hf_names=_NAMES,
    hf_untied_names=(*_NAMES, HFName("lm_head.weight", "lm_head.decoder_weight")),
    hf_prefix="model.",
    forward="no_position_ids",
    takes_position_ids=False,
    graph_change="opt_mask",
    servers=HF_SERVERS,
)
