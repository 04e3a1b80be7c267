"""Which processes of models are watched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from oarlock.serve.supervision import model_supervisor
from oarlock.serve.supervision.model_supervisor import ModelSupervisor


@pytest.fixture
def supervisor(monkeypatch, tmp_path):
    """A supervisor of two models; `running` are the processes that it finds, and `killed` counts ends of Triton."""
    config = SimpleNamespace(
        triton=SimpleNamespace(run=str(tmp_path), model="engine", start_seconds=1, memory_prefix="x", models=())
    )
    triton = SimpleNamespace(is_up=True, kill=lambda: killed.append(1))
    control = SimpleNamespace(load=lambda *_: load(), unload=lambda *_: None)
    served = SimpleNamespace(write=lambda _: None, folder=tmp_path, source=tmp_path)
    made = ModelSupervisor(config, served, control, triton, lambda: None)
    running = {1: "engine", 2: "json"}
    killed: list[int] = []

    def load():
        running[3] = "engine"

    monkeypatch.setattr(made, "_find_processes", lambda: dict(running))
    monkeypatch.setattr(model_supervisor, "is_alive", lambda pid: pid in running)
    monkeypatch.setattr(model_supervisor, "close_memory", lambda _: None)
    made.watch_all()
    return SimpleNamespace(models=made, running=running, killed=killed)


def test_the_old_process_of_a_reloaded_model_may_end_after_another_model_is_unloaded(supervisor):
    supervisor.models.load("engine")
    supervisor.models.unload("json")  # the old process of the engine still answers
    del supervisor.running[1], supervisor.running[2]
    supervisor.models.check()
    assert not supervisor.killed
    del supervisor.running[3]
    supervisor.models.check()
    assert supervisor.killed == [1]
