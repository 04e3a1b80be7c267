"""The answers of the engine equal those of models/generate, whatever else is in the batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import AutoConfig
from test_generation import ROWS, TOKENIZER, make_sensitive_model

from families import FAMILIES, family_config
from helpers import make_adapter
from oarlock.data.templates.chat_template import ChatTemplate
from oarlock.data.tokenizers.load import load_tokenizer
from oarlock.errors import EnvironmentProblem, ModelError, RequestRefused
from oarlock.families.registry import FAMILIES as REGISTRY
from oarlock.model_config.load import make_config
from oarlock.models.build import ModelSource, build_model
from oarlock.models.generate import ask_model, generate_ids
from oarlock.peft.lora import LoRA
from oarlock.peft.prefix_tuning import Prefix
from oarlock.sampling.params import SamplingParams
from oarlock.serve.config import EngineConfig
from oarlock.serve.engine import loading
from oarlock.serve.engine.decoder import Feed
from oarlock.serve.engine.engine import Engine
from oarlock.serve.engine.fused_decoder import FusedDecoder, explain_not_fused, load_fused_decoder
from oarlock.serve.engine.generic_decoder import GenericDecoder
from oarlock.serve.engine.loading import ServedModel
from oarlock.serve.request import Prompt
from support.scripted_engine import Answer
from support.tiny_configs import TINY_CONFIGS

OPEN, ANSWER = 1, 2
PROMPTS = [[*row, OPEN, ANSWER, row[0]] for row in ROWS]


def served(decoder, tokenizer, ends=(0,), adapters=()):
    return ServedModel("tiny", decoder, tokenizer, ChatTemplate("x", "{{ messages[0]['content'] }}", {}), 256,
                  frozenset(ends), tuple(adapters))  # fmt: skip


def ask(engine, prompts, sampling, adapters=None):
    """Send all requests at once and return the answers."""
    answers = [Answer() for _ in prompts]
    asked = [
        engine.submit(Prompt(token_ids=list(prompt), adapter=adapters[i] if adapters else None),
                      sampling[i] if isinstance(sampling, list) else sampling, answers[i].chunks.append)
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    assert all(request.wait(60) for request in asked)
    return answers


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


WAYS = [(family, "generic") for family in FAMILIES] + [(f, "fused") for f in ("llama", "qwen2", "mistral", "gemma")]


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_answers_equal_generate(family, way, tokenizer):
    model = make_sensitive_model(family)
    wanted = [generate_ids(model, TOKENIZER, [row], 12)[0] for row in PROMPTS]
    decoder = GenericDecoder(model, {}) if way == "generic" else FusedDecoder(model, {}, 256)
    engine = Engine(served(decoder, tokenizer), EngineConfig(max_batch=3))
    try:
        # four requests of different lengths for three slots: the last one joins when another is done
        sampling = [SamplingParams(max_tokens=count) for count in (12, 3, 12, 7)]
        answers = ask(engine, PROMPTS, sampling)
        for answer, tokens, how in zip(answers, wanted, sampling, strict=True):
            assert answer.token_ids == tokens[: how.max_tokens], answer.error
            assert answer.finish_reason == ("length" if len(answer.token_ids) == how.max_tokens else "stop")
            assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    finally:
        engine.close()


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_adapters_are_served_in_every_family(family, way, tokenizer):
    """Rows of one adapter, batched with rows of another and of the base, are answered as by a merged model."""
    random = np.random.default_rng(3)
    targets = REGISTRY[family].lora_targets
    adapters, wanted = {}, {None: make_sensitive_model(family)}
    for name in ("red", "blue"):
        wanted[name], adapters[name] = make_sensitive_model(family), {}
        for path, layer in wanted[name].named_sublayers():
            weight = getattr(layer, "weight", None)
            if path.split(".")[-1] in targets and weight is not None and weight.ndim == 2:
                rows, columns = weight.shape
                a, b = (random.normal(0, 0.5, shape).astype("float32") for shape in ((rows, 3), (3, columns)))
                adapters[name][path] = a, b
                weight.set_value(weight + paddle.to_tensor(a @ b))
    model = make_sensitive_model(family)
    decoder = GenericDecoder(model, adapters) if way == "generic" else FusedDecoder(model, adapters, 256)
    engine = Engine(served(decoder, tokenizer, adapters=adapters), EngineConfig())
    names = [None, "red", "blue", "red"]
    try:
        answers = ask(engine, PROMPTS, SamplingParams(max_tokens=6), names)
        expected = [
            generate_ids(wanted[name], TOKENIZER, [row], 6)[0] for name, row in zip(names, PROMPTS, strict=True)
        ]
        assert [answer.token_ids for answer in answers] == expected, [answer.error for answer in answers]
        assert all(adapters.values()) and max(map(len, expected)) == 6
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_fused_decoder_is_bit_identical_in_any_batch(family):
    """Alone or in a batch, with the prompt at once, in parts, or token by token."""
    decoder = FusedDecoder(make_sensitive_model(family), {}, 256)
    random = np.random.default_rng(0)
    rows = [random.integers(0, 512, length).tolist() for length in (37, 5, 100, 18, 1, 64, 33, 16, 17)]

    def scores(parts_of_rows):
        sequences = [decoder.start(128, None) for _ in parts_of_rows]
        final = {}
        for step in range(max(len(parts) for parts in parts_of_rows)):
            given = zip(sequences, parts_of_rows, strict=True)
            feeds = [Feed(sequence, parts[step]) for sequence, parts in given if step < len(parts)]
            final |= {id(feed.sequence): row for feed, row in zip(feeds, decoder.feed(feeds), strict=True)}
        return np.stack([final[id(s)] for s in sequences])

    alone = np.concatenate([scores([[row]]) for row in rows])
    assert np.array_equal(scores([[row] for row in rows]), alone)
    halves = [[row[:i], row[i:]] for row, i in zip(rows[:4], (3, 4, 61, 1), strict=True)]
    assert np.array_equal(scores(halves), alone[:4])
    assert np.array_equal(scores([[[token] for token in row] for row in rows]), alone)


def test_an_inaccurate_fused_decoder_is_refused(monkeypatch):
    monkeypatch.setattr("oarlock.serve.engine.fused_decoder._read_norm", lambda norm: norm.weight.numpy() * 1.01)
    with pytest.raises(EnvironmentProblem, match="fused decoder is wrong on this machine"):
        load_fused_decoder(make_sensitive_model("llama"), {}, 64)


def test_which_models_use_the_fused_decoder(monkeypatch):
    def reason(name, adapters=(), **changes):
        config = make_config(TINY_CONFIGS[name] | changes, name)
        made = REGISTRY[config.model_type].decoder
        return explain_not_fused(SimpleNamespace(config=config, architecture=made(config)), adapters)

    assert "length" in reason("phi3") and "experts" in reason("mixtral")
    assert reason("llama") == reason("gemma3_text") == ""
    assert "does not support bloom" in explain_not_fused(SimpleNamespace(config=family_config("bloom")))
    assert "length" in reason("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert reason("qwen2", rope_scaling={"rope_type": "yarn", "factor": 2.0}) == ""
    assert "activation is relu" in reason("llama", hidden_act="relu")
    assert "an adapter changes lm_head" in reason("llama", ["llama.layers.0.self_attn.q_proj", "lm_head"])
    monkeypatch.setattr("oarlock.ops.library.built_for", lambda: None)
    assert "not built" in reason("llama")


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    return {name: make_adapter(tiny_model, folder / name, seed=i, std=0.3) for i, name in enumerate(("red", "blue"))}


@pytest.fixture(scope="module", params=["fused", "generic"])
def engine(request, tiny_model, adapters):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "generic":
            patch.setattr(loading, "explain_not_fused", lambda *_: "the test says so")
        engine = Engine.load(tiny_model, adapters, EngineConfig(max_batch=4))
    yield engine
    engine.close()


def test_adapters_and_base_in_one_batch(engine, tiny_model, adapters):
    names = [None, "red", "blue", "red", None, "blue"]
    rows = [[*PROMPTS[i % 4], i + 20] for i in range(6)]
    answers = ask(engine, rows, SamplingParams(max_tokens=10, ignore_eos=True), names)
    base = ModelSource(tiny_model, AutoConfig.from_pretrained(str(tiny_model)), from_weights=True)
    method = LoRA(r=4, alpha=6.0)
    alone = {name: build_model(base, method=method, adapter=folder) for name, folder in adapters.items()}
    alone[None] = build_model(base)
    for model in alone.values():
        model.eval()
    no_end = SimpleNamespace(eos_token_id=None, pad_token_id=0, bos_token_id=0)
    for row, name, answer in zip(rows, names, answers, strict=True):
        assert answer.token_ids == generate_ids(alone[name], no_end, [row], 10)[0], (name, answer.error)
    plain = ask(engine, rows, SamplingParams(max_tokens=10, ignore_eos=True))
    assert all((a.token_ids == b.token_ids) == (name is None) for a, b, name in zip(answers, plain, names, strict=True))


def test_a_seed_gives_the_same_answer_in_any_batch(engine):
    how = [
        SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, top_k=50, seed=seed, ignore_eos=True)
        for seed in (1, 2, 3, -4)
    ]
    together = ask(engine, PROMPTS, how)
    for prompt, one, answer in zip(PROMPTS, how, together, strict=True):
        assert ask(engine, [prompt], one)[0].token_ids == answer.token_ids
    other = ask(engine, PROMPTS, [SamplingParams(**{**vars(one), "seed": 99}) for one in how])
    assert all(a.token_ids != b.token_ids for a, b in zip(together, other, strict=True))
    unseeded = [
        ask(engine, PROMPTS[:1], SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True))[0] for _ in range(2)
    ]
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_messages_are_rendered_as_by_oarlock_ask(engine, tiny_model):
    question = "Repeat the words. / river"
    ((_, wanted),) = ask_model(str(tiny_model), [question], 12)
    text = "".join(
        chunk.text
        for chunk in engine.stream(
            Prompt(messages=[{"role": "user", "content": question}]), SamplingParams(max_tokens=12)
        )
    )
    assert text.strip() == wanted and wanted


def test_refusals(engine):
    def refusal(prompt, **how):
        with pytest.raises(RequestRefused) as caught:
            next(engine.stream(prompt, SamplingParams(**how)))
        return str(caught.value)

    assert "give one of" in refusal(Prompt()) and "give one of" in refusal(Prompt(text="a", token_ids=[1]))
    assert "is empty" in refusal(Prompt(text="")) and "is empty" in refusal(Prompt(token_ids=[]))
    assert "vocabulary of 512" in refusal(Prompt(token_ids=[5, 512])) and "-1" in refusal(Prompt(token_ids=[-1]))
    assert "256 tokens" in refusal(Prompt(token_ids=[1] * 256)).replace("may have 256", "256 tokens")
    assert "leaves 200" in refusal(Prompt(token_ids=[1] * 56), max_tokens=201)
    assert "'green'" in refusal(Prompt(text="a", adapter="green")) and "red, blue" in refusal(
        Prompt(text="a", adapter="x")
    )
    assert "messages[0].content" in refusal(Prompt(messages=[{"role": "user"}]))
    assert "min_tokens" in refusal(Prompt(text="a"), max_tokens=3, min_tokens=4)
    assert "stop_token_ids" in refusal(Prompt(text="a"), stop_token_ids=(512,))
    assert "not valid text" in refusal(Prompt(text="half \ud83d"))


def test_unservable_adapters_are_refused(tiny_model, tmp_path):
    prefix = make_adapter(tiny_model, tmp_path / "prefix", Prefix(4))
    with pytest.raises(ModelError, match="only LoRA adapters"):
        Engine.load(tiny_model, {"p": prefix})
    with pytest.raises(ModelError, match="not an adapter folder"):
        Engine.load(tiny_model, {"p": tmp_path})
