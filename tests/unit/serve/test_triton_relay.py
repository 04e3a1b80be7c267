"""The relaying models release Triton's objects in the order that Triton needs."""

from __future__ import annotations

import importlib
import sys
import types
import weakref

import pytest


class Responses:
    """An iterator of responses, which Triton's map also holds until its thread has handled the end."""

    def __init__(self, triton):
        self.triton, self.left = triton, ["a response"]

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.triton.queue.append(weakref.ref(self))
        return self.left.pop()


class Triton:
    """The queue of Triton's thread: whatever it releases must still have another reference."""

    def __init__(self):
        self.queue = []
        self.freed_by_the_thread = 0
        self.cancelled = set()

    def question(self, name):
        """is_cancelled() of a request; once known, the answer does not use the queue."""
        known = False

        def is_cancelled():
            nonlocal known
            if not known:
                self.work_off()
                known = name in self.cancelled
            return known

        return is_cancelled

    def work_off(self):
        self.freed_by_the_thread += sum(responses() is None for responses in self.queue)
        self.queue.clear()


@pytest.fixture
def relay(monkeypatch):
    triton = Triton()
    utils = types.ModuleType("triton_python_backend_utils")
    utils.InferenceRequest = lambda **_: types.SimpleNamespace(exec=lambda decoupled: Responses(triton))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.delitem(sys.modules, "oarlock.serve.triton.relay", raising=False)
    module = importlib.import_module("oarlock.serve.triton.relay")
    model = module._Relay()
    monkeypatch.setattr(model, "_watch", lambda: None)
    model.initialize({"model_config": '{"parameters": {"engine": {"string_value": "oarlock"}}}'})
    yield model, triton
    monkeypatch.delitem(sys.modules, "oarlock.serve.triton.relay", raising=False)


def ask(model, is_cancelled):
    with model._ask([], is_cancelled) as responses:
        return list(responses)


def test_python_is_the_last_to_drop_responses(relay):
    """python_backend r24.10 otherwise frees tensors without the GIL, which crashes the model on Python 3.12."""
    model, triton = relay
    for number in range(3):
        assert ask(model, triton.question(number)) == ["a response"]
    assert triton.freed_by_the_thread == 0 and not triton.queue and not model._kept


def test_responses_of_a_cancelled_request_are_kept_until_the_next(relay):
    model, triton = relay
    triton.cancelled.add("gone")
    gone = triton.question("gone")
    assert gone()  # Triton knows it from here on, and answers without its thread
    ask(model, gone)
    assert len(triton.queue) == len(model._kept) == 1
    ask(model, triton.question("next"))
    assert triton.freed_by_the_thread == 0 and not triton.queue and not model._kept
