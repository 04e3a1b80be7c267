"""The part of the table of patches that changes models while they are built, and single objects."""

from __future__ import annotations

from oarlock.compat.patch import Patch
from oarlock.families.registry import FAMILIES

_NLP = "paddlenlp.transformers."
_FLEET = "paddle.distributed.fleet."


def _building(target: str, replacement: str, why: str, until: str, *also: str) -> Patch:
    replacement = f"oarlock.{replacement}"
    return Patch(target, replacement, why, until, "while_building", replacement.partition(":")[0], also=also)


def _object(target: str, replacement: str, why: str, until: str) -> Patch:
    replacement = f"oarlock.{replacement}"
    return Patch(target, replacement, why, until, "object", replacement.partition(":")[0])


_INITIAL_WEIGHTS = (
    _building(
        "paddle.nn:Layer.apply",
        "models.construct:without_values",
        "constructors of PaddleNLP, and of pipelines, initialise parameters that have no memory yet",
        "PaddleNLP's constructors respect no_init_weights",
    ),
    _building(
        f"{_FLEET}meta_parallel:PipelineLayer._synchronize_shared_weights",
        "models.construct:without_values",
        "pipelines broadcast shared parameters that have no values yet",
        "Fleet synchronises shared weights on request",
    ),
    _building(
        "paddle:normal",
        "models.init_weights:_replaced_normal",
        "Paddle draws normal values on one thread; initial weights are drawn from NumPy's generators on several",
        "always: speed",
        "paddle.tensor",
    ),
)

_GRAPH = "Paddle translates this code"
_STATIC_GRAPHS = (
    _building(
        "paddle.pir:Value.name",
        "export.static_graph:_lenient_names",
        "OPT records the names of outputs, and Paddle raises because values of a graph have none",
        _GRAPH,
    ),
    _object(
        f"{_NLP}bloom.modeling:BloomModel._prepare_attn_mask",
        "export.static_graph:_make_bloom_mask",
        "makes no causal mask for a single token, and a graph does not know the number of tokens",
        _GRAPH,
    ),
    _object(
        f"{_NLP}opt.modeling:OPTModel._prepare_decoder_attention_mask",
        "export.static_graph:_make_opt_mask",
        "makes no causal mask for a single token, and a graph does not know the number of tokens",
        _GRAPH,
    ),
    _object(
        f"{_NLP}chatglm.modeling:RotaryEmbeddings.max_seq_len_cached",
        "export.static_graph:_save_graph",
        "keeps a tensor of the last run, which would become part of the graph",
        _GRAPH,
    ),
)

_FIXED = "PaddleNLP's model is corrected"
_MODELS = (
    *(
        _object(
            f"{_NLP}{family.name}.modeling:{family.architecture}.forward",
            "models.forward:adapt_inputs",
            "needs masks and positions in a format of its own, while data and generation make those of our decoder",
            "PaddleNLP's models agree on their inputs",
        )
        for family in FAMILIES.values()
        if family.forward
    ),
    *(
        _object(
            f"{_NLP}{family.name}.modeling:{family.architecture}.{name}",
            "models.forward:adapt_inputs",
            "expects complete masks and pairs of positions from the caller of generate()",
            "PaddleNLP's models agree on their inputs",
        )
        for family in FAMILIES.values()
        if family.forward == "pairs_of_positions"
        for name in ("prepare_inputs_for_generation", "update_model_kwargs_for_generation")
    ),
    *(
        _object(
            f"{_NLP}opt.modeling:OPTForCausalLM.{name}",
            "models.forward:adapt_inputs",
            "its __getattr__ answers None for any name, which Fleet's wrappers take for an attribute",
            _FIXED,
        )
        for name in ("no_sync", "extra_parameters")
    ),
    _object(
        f"{_NLP}opt.modeling:OPTLMHead.decoder_weight",
        "models.construct:construct",
        "ignores tie_word_embeddings",
        _FIXED,
    ),
)

_PEFT = (
    *(
        _object(
            f"{layer}.forward",
            "peft.qlora:quantize_base",
            "4-bit weights need operators that only GPUs have",
            "Paddle's 4-bit linear layers run on all devices",
        )
        for layer in (
            "paddlenlp.peft.lora.lora_layers:LoRALinear",
            "paddlenlp.peft.lora.lora_layers:ColumnParallelLoRALinear",
            "paddlenlp.peft.lora.lora_layers:RowParallelLoRALinear",
        )
    ),
    _object(
        "paddlenlp.transformers:PretrainedModel.forward",
        "peft.prefix_tuning:Prefix",
        "PaddleNLP's prefix tuning fails with grouped heads, and with other families",
        "PaddleNLP's prefix tuning supports all families",
    ),
    _object(
        "paddlenlp.transformers:PretrainedModel.forward",
        "peft.p_tuning:PTuning",
        "PaddleNLP's p-tuning is for prompts with masks, not for causal models",
        "PaddleNLP's p-tuning supports causal models",
    ),
    _object(
        "paddle.nn:Embedding.forward",
        "peft.p_tuning:PTuning",
        "has no rows for virtual tokens",
        "PaddleNLP's p-tuning supports causal models",
    ),
    _object(
        "paddlenlp.transformers.model_utils:PipelinePretrainedModel._single_to_pp_mapping",
        "peft.lora:LoRA",
        "maps parameter names from before LoRA's parameters were added",
        "PaddleNLP's LoRAModel resets it",
    ),
)

_OPTIMIZER = f"{_FLEET}meta_optimizers.dygraph_optimizer:DygraphShardingOptimizer"
_TRAINING = (
    *(
        _object(
            f"{_OPTIMIZER}.{name}",
            "parallel.sharded_gradients:ShardedGradients",
            "keeps all gradients on all ranks until the step (stage 1); PaddleNLP refuses stage 2 under a pipeline",
            "PaddleNLP supports sharding stage 2 with a pipeline",
        )
        for name in ("reduce_gradients", "clear_grad", "_sharding_sync_parameters")
    ),
    _object(
        "paddle.optimizer:AdamW._grad_clip",
        "train.optim.optimizer:configure_optimizer",
        "Paddle's clip does not report the norm, and differs from plan to plan",
        "Paddle's clip returns the norm under every plan",
    ),
    _object(
        "paddle.optimizer:AdamW._apply_decay_param_fun",
        "train.optim.optimizer:configure_optimizer",
        "PaddleNLP's Trainer decays by parameter names, which change under sharding and pipelines",
        "PaddleNLP's Trainer chooses parameters by layer",
    ),
    _object(
        f"{_FLEET}meta_parallel:PipelineParallel._p2p_helper",
        "train.step.pipeline_step:sum_pipeline_losses",
        "caches the shapes of training, and evaluation with other shapes crashes or hangs",
        "PaddleNLP's pipeline evaluation resets the cache",
    ),
    _object(
        "paddle.io:DataLoader.__class__",
        "train.data_loading:CheckedLoader",
        "hangs if a worker process fails",
        "Paddle's DataLoader raises if a worker process fails",
    ),
)

MODEL_PATCHES: tuple[Patch, ...] = (*_INITIAL_WEIGHTS, *_STATIC_GRAPHS, *_MODELS, *_PEFT, *_TRAINING)
