"""The table of patches to Paddle and PaddleNLP: each patch is needed, and with it the results are correct.

patched_layers.py tries those that Fleet needs on CPUs, in processes of its own. For the others SHOWN_BY names a test, or
NOT_SHOWN says why there is none.
"""

from __future__ import annotations

import ast
import fnmatch
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from patched_layers import CHECKS, NEEDED_BY, RANKS, WORKS, label

from oarlock.compat.patch import Machine, find_object
from oarlock.compat.patches import PATCHES
from oarlock.compat.report import patch_report

TESTS = Path(__file__).resolve().parents[1]
LLM = TESTS.parent / "llm"
# How Paddle 3.3.1 fails on a CPU without a patch. The operators look for a C++ process group before they say that they
# have no CPU kernel, and do not find one: a crash.
CRASH = "SIGSEGV|Do not support c_[a-z_]+ for cpu kernel now"
FAILURES = {
    "hybrid_parallel_util.broadcast_input_data": "Only support xpu, gpu and custom_device now, but this is cpu",
    "ParallelEnv._device_id": "has no attribute '_device_id'",
    "_C_ops.c_identity": "Do not support c_identity for cpu kernel now",
    "_legacy_C_ops.c_identity": "Do not support c_identity for cpu kernel now",
    "cuda.synchronize": "Paddle is not compiled with CUDA",
    "device.synchronize": "TypeError: device should be gpu, xpu",
    "mp_ops._c_concat": CRASH,
    "mp_ops._c_split": CRASH,
    "mp_ops._c_softmax_with_cross_entropy": CRASH,
    "core.is_compiled_with_cuda": "Only support CUDA / XPU / CustomDevice",
    "paddle.get_device": "IndexError",
    "ParamStorage.add_rank_params": "Tensor not initialized yet",
}

# Replacements of the table, without "oarlock.", and the test that fails without them. For those that only make things
# faster, it shows that the results are the same.
SHOWN_BY = {
    "compat.lazy_imports:*": "unit/ops/test_lazy_imports.py::test_unused_parts_are_not_imported",
    "environment.matmul_library:*": "unit/ops/test_products.py::test_which_library_multiplies",
    "cpu_ranks.process_group:current_run": "rehearsal/test_launching.py::ports",
    "ops.corrections:*": "parity/test_frozen_operators.py::test_each_correction_is_needed",
    "ops.*:*": "parity/test_fused_step.py::test_losses_do_not_change",
    "models.init_weights:_replaced_normal": "unit/models/test_initial.py::test_distributions_equal_paddlenlp",
    "export.static_graph:*": "parity/test_export.py::test_every_family_is_exported_as_a_static_graph",
    "models.forward:*": "parity/test_families.py::test_logits_do_not_depend_on_other_rows_or_on_padding_ids",
    "models.construct:*": "parity/test_tied_head.py::test_paddlenlps_own_opt_keeps_its_output_layer",
    "peft.qlora:*": "unit/ops/test_quantized.py::test_the_product_and_its_gradient",
    "peft.prefix_tuning:*": "parity/test_prefix.py::test_paddlenlp_sizes_the_prefix_for_ungrouped_heads",
    "peft.p_tuning:*": "parity/test_family_methods.py::test_p_tuning",
    "parallel.sharded_gradients:*": "rehearsal/test_plans.py::test_stage_2_under_a_pipeline_keeps_half_of_the_gradients",
    "train.step.pipeline_step:*": "rehearsal/test_plans.py::test_a_plan_equals_one_process",
    "train.optim.optimizer:*": "parity/test_weight_decay.py::test_decayed_parameters_equal_transformers",
    "peft.lora:*": "rehearsal/test_methods.py::test_only_trained_parameters_have_gradients_and_optimizer_state",
}
NOT_SHOWN = {
    "cpu_ranks.process_group:new_group": "Gloo's groups fail in two of three runs, which no test can wait for",
    "cpu_ranks.fork_launch:*": "every test that forks ranks would have several ranks 0",
    "ops.malloc:*": "changes the speed only: benchmarks/rms_norm.py",
    "train.data_loading:*": "Paddle's loader hangs without it",
}
# Files that set attributes of other objects, but do not patch Paddle or PaddleNLP.
OTHER_OBJECTS = {
    "models/build.py": "fields of a model's configuration",
    "export/convert_tensors.py": "fields of a model's configuration",
    "models/new_model.py": "fields of a model's configuration",
    "compat/patch.py": "applies the table",
    "compat/model_forward.py": "sets a forward for those that are in the table",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    path = os.pathsep.join(map(str, (LLM, TESTS, TESTS / "rehearsal")))
    run = subprocess.run(
        [sys.executable, TESTS / "rehearsal" / "patched_layers.py", folder],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_results_with_patches_are_correct(folder, check):
    problems = [json.loads((folder / f"checks-{rank}.json").read_text())[check] for rank in range(RANKS)]
    assert not any(problems), "\n".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems))


@pytest.mark.parametrize("patch", FAILURES)
def test_each_patch_is_needed(outcomes, patch):
    for outcome in outcomes[patch]:
        assert outcome != WORKS, f"Paddle no longer needs this patch: remove it ({patch} in compat/patches.py)"
        assert re.search(FAILURES[patch], outcome), outcome


def test_all_patches_are_tested(outcomes):
    assert set(outcomes["owners"]) == set(FAILURES) == set(NEEDED_BY)


@pytest.mark.parametrize("patch", [name for name in FAILURES if re.search("[.]_c_|broadcast", name)])
def test_a_patch_reaches_every_module_that_imported_the_name(outcomes, patch):
    owners, holders = outcomes["owners"][patch]
    assert set(owners) == set(holders)


def test_cpu_patches_are_not_installed_on_a_gpu(outcomes):
    assert outcomes["imported"] == [], "importing oarlock.train.setup must not import what is for CPUs"
    assert outcomes["lends"] == {"cpu, 1": False, "cpu, 2": True, "gpu, 1": False, "gpu, 2": False}


# the whole table


def entries(table, patch):
    name = patch.replacement.removeprefix("oarlock.")
    return [entry for pattern, entry in table.items() if fnmatch.fnmatch(name, pattern)]


@pytest.mark.parametrize("patch", PATCHES, ids=label)
def test_every_patch_is_shown_to_be_needed_or_has_a_reason(patch):
    tried = patch.installed_by == "oarlock.cpu_ranks.fleet_patches"
    assert tried == (label(patch) in FAILURES)
    shown, not_shown = entries(SHOWN_BY, patch), entries(NOT_SHOWN, patch)
    assert tried or shown or not_shown
    if shown and not not_shown:
        path, _, name = shown[0].partition("::")
        assert re.search(rf"\b{name}\b", (TESTS / path).read_text()), shown[0]
    assert patch.why and patch.until


def test_every_row_is_about_a_patch():
    names = [patch.replacement.removeprefix("oarlock.") for patch in PATCHES]
    assert all(fnmatch.filter(names, pattern) for pattern in (*SHOWN_BY, *NOT_SHOWN))


@pytest.mark.parametrize("patch", PATCHES, ids=label)
def test_targets_and_replacements_exist(patch):
    assert find_object(patch.installed_by) and find_object(patch.replacement) is not None
    if patch.target.partition(":")[0].partition(".")[0] not in ("paddle", "paddlenlp") or ":" not in patch.target:
        return  # a whole package, or a library in C
    for owner in patch.owners():
        assert patch.scope == "object" or patch.name == "_device_id" or hasattr(owner, patch.name)


def sets_other_objects(path: Path) -> bool:
    """Whether a file replaces attributes of objects that it does not define."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            own = node.args and isinstance(node.args[0], ast.Name) and node.args[0].id == "self"
            if called in ("setattr", "object.__setattr__", "set_forward") and not own:
                return True
        if isinstance(node, ast.Assign):
            names = {
                ast.unparse(target).rpartition(".")[2] for target in node.targets if isinstance(target, ast.Attribute)
            }
            if names & {"forward", "__class__", "attn_func"}:
                return True
    return False


def test_only_patches_in_the_table_replace_anything():
    package = LLM / "oarlock"
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if sets_other_objects(path)}
    installers = {patch.installed_by.removeprefix("oarlock.").replace(".", "/") + ".py" for patch in PATCHES}
    assert {name for name in found if not name.startswith(("cli/", "serve/"))} <= installers | set(OTHER_OBJECTS)
    assert set(OTHER_OBJECTS) <= found


def test_the_product_uses_no_mocks():
    for path in (LLM / "oarlock").rglob("*.py"):
        modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not {"unittest", "unittest.mock"} & set(modules), path


@pytest.mark.parametrize(
    "machine", [Machine("cpu", True, True), Machine("cpu", False, False), Machine("gpu", True, True)]
)
def test_the_report_states_for_every_patch_whether_it_applies(machine):
    report = patch_report(machine)
    assert all(patch.target in report and patch.why in report and patch.until in report for patch in PATCHES)
    assert report.count("not here  ") == sum(not patch.applies(machine) for patch in PATCHES)
    assert ("not here  paddle.optimizer:AdamW._create_optimization_pass" in report) == (
        machine != Machine("cpu", True, True)
    )
    assert "applies   paddle.nn:Layer.apply" in report
