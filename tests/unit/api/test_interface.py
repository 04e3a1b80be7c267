"""The public API `from oarlock import ...`: its names, its refusals, and that it imports Paddle only when needed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import pytest

import oarlock
from helpers import LLM
from oarlock import ConfigError, EnvironmentProblem, finetune, list_recipes, load_config, pretrain


def test_a_configuration_is_read_and_checked():
    loaded = load_config("finetune", "lora_7b", r=16, learning_rate=1e-4, do_train=True, dataset_name_or_path=None)
    config = loaded.config
    assert (config.method.lora, config.method.r, config.schedule.learning_rate) == (True, 16, 1e-4)
    assert loaded.origins["r"] == "argument r" and loaded.origins["lora"].endswith("parts/lora.yaml:5")
    mixed = load_config("finetune", do_train=True, dataset_name_or_path={"a": 1, "b c": 2}).config
    assert mixed.data.dataset_name_or_path == "1 a 2 'b c'"


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_config("finetune", "lora_7b", learning_rat=1, r="many", tgt_length=0)
    for problem in ("learning_rat; did you mean learning_rate?", "argument r: r must be a whole number", "at least 1"):
        assert problem in str(error.value)
    with pytest.raises(ConfigError, match=r"lora_7c: No such file or recipe; did you mean lora_7b\?"):
        finetune("lora_7c")


def test_a_loaded_configuration_takes_no_more_options():
    with pytest.raises(TypeError, match="give r to load_config"):
        finetune(load_config("finetune", "lora_7b"), r=3)


def test_training_outside_the_main_thread_is_refused(tmp_path):
    raised = []

    def run():
        try:
            pretrain(output_dir=str(tmp_path / "out"), do_train=True)
        except EnvironmentProblem as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in raised[0] and not (tmp_path / "out").exists()


def test_every_recipe_loads_by_its_name():
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    assert {"lora_7b", "full_70b", "pretrain_7b"} <= set(recipes)
    assert (recipes["lora_13b"].method, recipes["lora_13b"].num_gpus) == ("LoRA", 12)
    assert all(load_config(recipe.command, name).config for name, recipe in recipes.items())


def test_everything_public_is_documented():
    for name in oarlock.__all__:
        thing = getattr(oarlock, name)
        assert inspect.getdoc(thing) and name in dir(oarlock)
        if inspect.isfunction(thing) and thing.__module__.startswith("oarlock.api"):
            assert "Example:" in thing.__doc__ and "Raises:" in thing.__doc__, name
            described = inspect.signature(thing).parameters
            assert all(f"    {parameter}:" in thing.__doc__ for parameter in described), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        oarlock.nothing  # noqa: B018


def test_importing_oarlock_does_not_import_paddle():
    code = (
        "import sys, oarlock; assert not {'numpy', 'yaml', 'oarlock.config'} & set(sys.modules)\n"
        "from oarlock import *\nload_config('finetune', 'lora_7b')\n"
        "assert not {'paddle', 'paddlenlp'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=LLM, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
