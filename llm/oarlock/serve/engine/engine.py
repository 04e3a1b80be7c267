"""Answers many requests with one model: iteration-level batching (Orca, OSDI 2022).

One thread owns the model. Before each step it admits waiting requests to free slots, and removes those that are done or
cancelled. So a request waits for a step, not for the answers of others.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oarlock.environment.console import get_logger
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import RequestRefused
from oarlock.sampling.params import SamplingParams
from oarlock.serve.config import EngineConfig
from oarlock.serve.engine.decoder import Feed
from oarlock.serve.engine.running_request import RunningRequest
from oarlock.serve.request import GenerationRequest, Prompt, PromptTooLong, QueueFull, TokenChunk

if TYPE_CHECKING:
    from oarlock.serve.engine.loading import ServedModel

logger = get_logger(__name__)

_NO_ADAPTERS: Mapping[str, Path] = {}
_DEFAULTS = EngineConfig()


class Engine:
    """A loaded model and the thread that runs it. All methods may be called from any thread."""

    def __init__(self, model: ServedModel, config: EngineConfig = _DEFAULTS) -> None:
        """Start the engine of a loaded model; load() reads one from a folder."""
        self._model, self._config = model, config
        self._context = min(model.context, config.max_length or model.context)
        self._waiting: deque[RunningRequest] = deque()
        self._running: list[RunningRequest] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="oarlock-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, folder: str | Path, adapters: Mapping[str, Path] = _NO_ADAPTERS, config: EngineConfig = _DEFAULTS
    ) -> Engine:
        """Load a model folder (Paddle's or Hugging Face's layout) with its tokenizer, and LoRA adapters by name.

        Raises:
            ModelError: when something is missing, or does not belong together.
        """
        import_paddle()
        from oarlock.serve.engine.loading import open_served_model

        return cls(open_served_model(folder, adapters, config.parse_special_tokens), config)

    def stream(self, prompt: Prompt, sampling: SamplingParams) -> Iterator[TokenChunk]:
        """The answer, chunk by chunk, for a caller with a thread of its own. Leaving the loop cancels the request.

        Raises:
            RequestRefused: when the request is wrong, or does not fit the model.
            QueueFull: when too many requests wait, or the engine is closing.
        """
        GenerationRequest(prompt, sampling).check()
        chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
        request = self.submit(prompt, sampling, chunks.put)
        try:
            while True:
                chunk = chunks.get()
                yield chunk
                if chunk.finish_reason:
                    return
        finally:
            request.cancel()

    def submit(
        self, prompt: Prompt, sampling: SamplingParams, on_chunk: Callable[[TokenChunk], None]
    ) -> RunningRequest:
        """Queue a request whose types and ranges have been checked (GenerationRequest.check).

        Args:
            on_chunk: is called with each chunk from the engine's thread, so it must be quick. The last chunk has a
                finish_reason. If it raises, the request is cancelled.

        Raises:
            RequestRefused: when the request does not fit the model.
            QueueFull: when too many requests wait, or the engine is closing.
        """
        if prompt.adapter is not None and prompt.adapter not in self._model.adapters:
            known = ", ".join(self._model.adapters) or "none"
            raise RequestRefused(f"there is no adapter {prompt.adapter!r} here (there are: {known})")
        sampling = sampling.with_defaults(self._model.defaults)
        prompt_ids = self._model.encode(prompt)
        max_tokens = self._answer_length(len(prompt_ids), sampling)
        timeout = self._config.timeout
        request = RunningRequest(self._model, prompt, prompt_ids, sampling, max_tokens, timeout, on_chunk)
        with self._changed:
            if self._closing:
                raise QueueFull("the server is closing")
            if len(self._waiting) >= self._config.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def info(self) -> dict[str, Any]:
        """The model, its limits, and how many requests run and wait."""
        with self._changed:
            return {
                "model": self._model.name,
                "adapters": list(self._model.adapters),
                "context": self._context,
                "limits": asdict(self._config),
                "busy": len(self._running),
                "waiting": len(self._waiting),
            }

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and return when the last one has been answered.

        Args:
            drain: answer the requests that are here; otherwise they are cancelled.
        """
        with self._changed:
            self._closing = True
            if not drain:
                for request in (*self._waiting, *self._running):
                    request.cancel()
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _answer_length(self, num_prompt: int, sampling: SamplingParams) -> int:
        """The most tokens that the answer may have; refuses what the model or the limits do not allow."""
        model, limit = self._model, self._config.max_tokens
        left = self._context - num_prompt
        if left < 1:
            raise PromptTooLong(
                f"the prompt has {num_prompt:,} tokens; prompt and answer together may have {self._context:,}"
            )
        most = sampling.max_tokens or min(left, limit, sampling.default_tokens or left)
        if most > limit:
            raise RequestRefused(f"max_tokens {most:,} is too many: an answer may have {limit:,}")
        if most > left:
            raise PromptTooLong(
                f"max_tokens {most:,} is too many: a prompt of {num_prompt:,} tokens leaves {left:,} of "
                f"{self._context:,}"
            )
        if sampling.min_tokens > most:
            raise RequestRefused(f"min_tokens {sampling.min_tokens:,} is more than the {most:,} of max_tokens")
        vocabulary = model.decoder.vocabulary
        unknown = [token for token in sampling.stop_token_ids if not 0 <= token < vocabulary]
        if unknown:
            raise RequestRefused(f"stop_token_ids: {unknown[0]} is not in the vocabulary")
        if sampling.min_tokens and len({*sampling.stop_token_ids, *model.ends}) >= vocabulary:
            raise RequestRefused("min_tokens: every token of the vocabulary ends an answer, by stop_token_ids")
        return most

    # the engine's thread

    def _work(self) -> None:
        while self._admit():
            try:
                self._step()
            except Exception as error:  # not the model's, which _step handles: nobody may wait for ever
                for request in self._running:
                    request.fail(f"the engine failed: {type(error).__name__}: {error}")
                self._remove_finished()

    def _admit(self) -> bool:
        """Wait for work, and fill free slots in the order of arrival. Returns False when the engine is to end."""
        with self._changed:
            while not (self._waiting or self._running):
                if self._closing:
                    return False
                self._changed.wait()
            while self._waiting and len(self._running) < self._config.max_batch:
                self._running.append(self._waiting.popleft())
            expired = [request for request in self._waiting if request.is_over()]
            for request in expired:
                self._waiting.remove(request)
        for request in expired:
            request.close()
        return True

    def _step(self) -> None:
        for request in self._running:
            if not request.is_over() and request.sequence is None:
                self._try(request, self._start, request)
        self._remove_finished()
        batch = self._schedule()
        if not batch:
            return
        try:
            logits = self._feed(batch)
        except Exception:
            # To find the request that failed, each continues alone, from its tokens so far.
            for request in self._running:
                self._drop(request)
            for request in list(self._running):
                self._try(request, self._step_alone, request)
        else:
            complete = [request for request, _ in batch if request.num_read == len(request.tokens)]
            for request, row in zip(complete, logits, strict=True):
                self._try(request, request.append_token, row)
        self._remove_finished()

    def _start(self, request: RunningRequest) -> None:
        capacity = len(request.prompt_ids) + request.max_tokens
        request.sequence = self._model.decoder.start(capacity, request.adapter)
        request.num_read = 0

    def _schedule(self) -> list[tuple[RunningRequest, int]]:
        """Decide how many tokens of each request are read in this step.

        Requests that answer read their newest token; prompts of the others share what the decoder's chunk leaves, in
        the order in which they came.
        """
        left, batch = self._model.decoder.chunk, []
        for request in self._running:
            unread = len(request.tokens) - request.num_read
            if unread > 1 and left is not None:
                unread = min(unread, left)
                left -= unread
            if unread:
                batch.append((request, unread))
        return batch

    def _feed(self, batch: list[tuple[RunningRequest, int]]) -> np.ndarray:
        feeds = []
        for request, count in batch:
            end = request.num_read + count
            tokens = request.tokens[request.num_read : end]
            feeds.append(Feed(request.sequence, tokens, wants_logits=end == len(request.tokens)))
        logits = self._model.decoder.feed(feeds)
        for request, count in batch:
            request.num_read += count
        return logits

    def _step_alone(self, request: RunningRequest) -> None:
        self._start(request)
        while request.num_read < len(request.tokens):
            unread = len(request.tokens) - request.num_read
            logits = self._feed([(request, min(unread, self._model.decoder.chunk or unread))])
        request.append_token(logits[0])

    def _try(self, request: RunningRequest, do: Callable[..., None], *arguments: Any) -> None:
        """Do something for a request. An exception ends this request with an error, and no other."""
        try:
            do(*arguments)
        except Exception as error:
            request.fail(f"{type(error).__name__}: {error}")

    def _drop(self, request: RunningRequest) -> None:
        sequence, request.sequence = request.sequence, None
        if sequence is None:
            return
        try:
            self._model.decoder.drop(sequence)
        except Exception as error:  # memory, perhaps; the decoder's next step does without it
            logger.info(f"a finished request could not be dropped: {type(error).__name__}: {error}")

    def _remove_finished(self) -> None:
        finished = [request for request in self._running if request.is_over()]
        if not finished:
            return
        for request in finished:
            self._drop(request)
        with self._changed:
            self._running = [request for request in self._running if request not in finished]
        for request in finished:
            request.close()
