"""`oarlock doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from oarlock.cli.environment_checks import CHECKS, check_launch
from oarlock.cli.flags import Command, flag
from oarlock.environment import matmul_library
from oarlock.environment.paddle_import import import_paddle


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of `oarlock doctor`."""

    launch: bool = flag(True)
    """Skip the launch of two processes (10 to 20 seconds)."""
    patches: bool = flag(False)
    """Print what Oarlock changes in Paddle and PaddleNLP, and why, instead of checking."""


def _run(options: DoctorOptions) -> int:
    if options.patches:
        import_paddle()
        import paddle

        from oarlock.compat.patch import Machine
        from oarlock.compat.report import patch_report
        from oarlock.ops import library

        machine = Machine(
            device="gpu" if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() else "cpu",
            has_fused_ops=library.usable() and library.has_products(),
            has_slow_mkl=matmul_library.choose_library() == matmul_library.ONEDNN,
        )
        print(patch_report(machine))
        return 0
    num_problems = 0
    for check in (*CHECKS, *([check_launch] if options.launch else [])):
        for diagnosis in check():
            mark = "ok  " if not diagnosis.fix else "note" if diagnosis.is_warning else "FIX "
            num_problems += mark == "FIX "
            print(f"{mark}  {diagnosis.text}" + (f"\n      -> {diagnosis.fix}" if diagnosis.fix else ""), flush=True)
    print(f"{num_problems} problem(s) to fix" if num_problems else "no problems found")
    return 1 if num_problems else 0


COMMAND = Command("doctor", "Check this environment and say what to fix.", DoctorOptions, _run)
