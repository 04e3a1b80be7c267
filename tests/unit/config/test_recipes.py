"""The recipes: options that exist and fit together, plans that fit the models, and the published numbers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers import ROOT
from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.load import flatten
from oarlock.config.run_config import RunConfig
from oarlock.families.model_sizes import ModelSizes
from oarlock.model_config.builtin_configs import read_config_by_name
from oarlock.parallel.make_plan import make_plan
from oarlock.parallel.plan import ParallelPlan
from oarlock.parallel.plan_rules import check_plan
from support.published_commands import PUBLISHED

CONFIGS = ROOT / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
JOBS = ("pretrain", "full", "lora", "qlora", "prefix", "p_tuning")
SIZES = ("7b", "13b", "70b")

# Output folders and models, which a recipe does not decide.
PLACES = {
    "model_name_or_path", "tokenizer_name_or_path", "model_type", "output_dir", "overwrite_output_dir", "device",
}  # fmt: skip


def load(recipe: Path, *words: str) -> RunConfig:
    kind = PretrainConfig if recipe.name.startswith("pretrain") else FinetuneConfig
    return load_config(kind, [str(recipe), *words]).config


def num_gpus(recipe: Path) -> int:
    """The number of GPUs in the first line: "# LoRA of a 7B model, 1 GPU: ..."."""
    found = re.match(r"# .*? of a \d+B model.*?, (\d+) GPUs?[:.]", recipe.read_text(encoding="utf-8"))
    assert found, recipe
    return int(found[1])


def planned(recipe: Path, gpus: int) -> ParallelPlan:
    config = load(recipe)
    plan, notes = make_plan(config, gpus)
    assert not notes
    content = read_config_by_name(config.model.model_name_or_path)
    assert not check_plan(plan, ModelSizes.from_config(SimpleNamespace(**content)), config.sequence_length)
    return plan


def values(config: RunConfig) -> dict[str, object]:
    return {name: value for name, value in flatten(config).items() if name not in PLACES}


def test_every_job_has_recipes_for_every_size():
    assert {f"{job}_{size}" for job in JOBS for size in SIZES} <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_model_and_gpus(recipe):
    """Nothing is refused or ignored, all stages are equally full, and no sequence is too long."""
    config = load(recipe)
    plan = planned(recipe, num_gpus(recipe))
    positions = read_config_by_name(config.model.model_name_or_path)["max_position_embeddings"]
    assert config.sequence_length <= positions
    # The published 4D script has 4 micro-batches for 2 stages.
    assert plan.bubble < 0.1 or recipe.stem == "pretrain_4d_7b"
    assert config.checkpoint.output_dir == f"output/{recipe.stem}" and not config.checkpoint.overwrite_output_dir
    size = recipe.stem.rpartition("_")[2]
    assert f"-{size}" in config.model.model_name_or_path
    method = getattr(config, "method", None)
    chosen = [name for name in ("qlora", "lora", "prefix_tuning", "p_tuning") if getattr(method, name, False)][:1]
    job = recipe.stem.removesuffix(f"_{size}")
    assert chosen == {"lora": ["lora"], "qlora": ["qlora"], "prefix": ["prefix_tuning"]}.get(
        job, ["p_tuning"] if job == "p_tuning" else []
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_numbers(name):
    recipe = CONFIGS / "recipes" / f"{name}.yaml"
    kind = PretrainConfig if name == "pretrain_7b" else FinetuneConfig
    found, published = values(load(recipe)), values(load_config(kind, shlex.split(PUBLISHED[name])).config)
    # The published commands give a dev file, which takes precedence over a split in the recipes.
    assert found.pop("validation_split", 0.02) == 0.02 and published.pop("validation_split", None) is None
    assert found == published


def test_the_published_70b_run():
    """500 steps on 16 GPUs are the published 16,384,000 tokens."""
    config, plan = load(CONFIGS / "recipes/full_70b.yaml"), planned(CONFIGS / "recipes/full_70b.yaml", 16)
    assert (plan.tensor, plan.pipeline, plan.global_batch) == (8, 2, 16)
    assert config.schedule.max_steps * plan.global_batch * config.sequence_length == 16_384_000
    precision, kernels, schedule = config.precision, config.kernels, config.schedule
    assert precision.bf16 and not precision.fp16 and kernels.recompute and kernels.use_flash_attention
    assert (schedule.learning_rate, schedule.lr_scheduler_type, schedule.warmup_ratio) == (5e-5, "cosine", 0.03)
    assert schedule.warmup_steps == 0, "it would go over warmup_ratio"
    assert config.optimizer.weight_decay == 0.01 and config.data.packing


def test_recipes_of_one_method_share_their_numbers():
    """Sizes of a method differ only in what their files set: a change of a part reaches all of them."""
    for job, own in {
        "qlora": {"bf16", "fp16", "learning_rate"},
        "prefix": {"bf16", "fp16", "tensor_parallel_degree"},
        "p_tuning": {"bf16", "fp16", "tensor_parallel_degree"},
    }.items():
        small, middle, large = (values(load(CONFIGS / f"recipes/{job}_{size}.yaml")) for size in SIZES)
        assert small == middle
        assert {name for name in small if small[name] != large[name]} == own


def test_every_part_is_used():
    used, waiting = set(), list(RECIPES)
    while waiting:
        path = waiting.pop()
        used.add(path)
        included = yaml.safe_load(path.read_text(encoding="utf-8")).get("include", [])
        for name in [included] if isinstance(included, str) else included:
            waiting.append((path.parent / name).resolve())
    assert used == {
        path for folder in ("recipes", "parts", "parallel", "models") for path in (CONFIGS / folder).glob("*.yaml")
    }


def test_the_documentation_names_every_recipe_and_script():
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1] for row in re.findall(r"^\|[^|]*\| `(\w+)` \| (\d+) \|", page, re.M)}
    assert rows == {recipe.stem: str(num_gpus(recipe)) for recipe in RECIPES}
    for script in sorted((ROOT / "scripts").glob("finetune_*.sh")):
        assert f"`{script.name}`" in page, script


def test_the_recipe_in_the_documentation_is_valid(tmp_path):
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "my_lora.yaml").write_text(text)
    (tmp_path / "configs").symlink_to(CONFIGS)
    config = load(tmp_path / "my_lora.yaml")
    assert config.method.lora and config.method.r == 16 and config.parallel.sharding == "stage2"
    assert config.schedule.learning_rate == 3e-4 and "13b" in config.model.model_name_or_path
