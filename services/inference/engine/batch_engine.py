"""The engine: one thread that takes requests, prefills, decodes and sends tokens, step by step.

A step is: schedule, run, postprocess. Requests join and leave between steps. The scheduler says what runs, the runner
computes it, and this file carries results and errors to the requests.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from services.inference.engine.admission import Admission, Permit, check_length
from services.inference.engine.fused_lora import FusedAdapter
from services.inference.engine.interface import Cancelled, Finished, GenerationRequest, Sink, Stats
from services.inference.engine.lora import LoraWeights
from services.inference.engine.runner import ModelRunner
from services.inference.engine.sampling import choose, likeliest
from services.inference.engine.scheduler import PromptPass, Scheduler
from services.inference.engine.sequence import SequenceState
from services.inference.engine.threads import StepThreads
from shared.bases.base_model import device_answers
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest, Overloaded, TunesmithError, Unavailable
from shared.logs import get_logger

_log = get_logger("engine")


class BatchEngine:
    """Continuous batching over a `ModelRunner`.

    Args:
        prefill_chunk: prompt tokens computed between two decode steps; bounds how long a prompt delays the others.
        on_device_lost: called on the engine's thread, after every request has failed, once the device computes nothing
            any more in this process.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        admission: Admission,
        *,
        prefill_chunk: int,
        on_device_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._admission = admission
        self._chunk = prefill_chunk
        self._on_device_lost = on_device_lost
        added = tokenizer.fast.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        # What other threads hand over, under the condition.
        self._condition = threading.Condition()
        self._submitted: deque[SequenceState] = deque()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = False
        self._cancelling = False
        # From here on only the engine's thread writes.
        self._slots: dict[str, int] = {}
        self._scheduler = Scheduler(runner.cache, rows=runner.rows, context=runner.context, slots=self._slots)
        self._threads = StepThreads(torch.get_num_threads() if runner.device.type == "cpu" else 1)
        self._steps = self._tokens = 0
        self._last_token_at = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        return self._runner.context

    @property
    def lora_modules(self) -> Mapping[str, tuple[int, int]]:
        """Path of every layer an adapter may target → (in, out) features."""
        return self._runner.lora.modules

    def submit(self, request: GenerationRequest, sink: Sink, permit: Permit | None = None) -> SequenceState:
        """See `Engine.submit`. `permit` is of this engine's `Admission`, if the caller has acquired it already."""
        check_length(len(request.prompt), request.max_new_tokens, self.context)
        if not all(0 <= token < self._runner.vocabulary for token in request.prompt):
            raise InvalidRequest("a token id is outside the vocabulary", param="inputs")
        if not all(0 <= token < self._runner.vocabulary for token, _ in request.sampling.logit_bias):
            raise InvalidRequest("a token id is outside the vocabulary", param="logit_bias")
        if permit is None:
            permit = self._admission.acquire(len(request.prompt))
        else:
            permit.resize(len(request.prompt))
        sequence = SequenceState(request, sink, permit, self._tokenizer, self._runner.device)
        with self._condition:
            if self._closing:
                permit.release()
                raise Unavailable("the server is shutting down")
            self._submitted.append(sequence)
            self._condition.notify()
        return sequence

    def cancel(self, handle: SequenceState) -> None:
        handle.cancelled = True
        with self._condition:
            self._cancelling = True
            self._condition.notify()

    def prepare(self, weights: LoraWeights) -> FusedAdapter:
        """Lay an adapter out as `load` takes it: work that the thread that reads it does, not the engine's."""
        return self._runner.lora.prepare(weights)

    def load(self, uid: str, weights: FusedAdapter) -> "Future[None]":
        return self._between_steps(lambda: self._load(uid, weights))

    def unload(self, uid: str) -> "Future[None]":
        return self._between_steps(lambda: self._unload(uid))

    def stats(self) -> Stats:
        rows = self._scheduler.in_flight()
        return Stats(
            running=len(rows),
            waiting=self._admission.requests,
            waiting_tokens=self._admission.tokens,
            batch_tokens=sum(row.reserved for row in rows),
            adapters=len(self._slots),
            steps=self._steps,
            tokens=self._tokens,
            last_token_at=self._last_token_at,
        )

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        lost = False
        with torch.inference_mode():
            while not lost and self._wait_for_work():
                try:
                    self._step()
                except Exception as error:
                    lost = not self._restart(error)
        self._fail_everything()
        if lost:
            self._on_device_lost()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False when the engine is closed."""
        with self._condition:
            while not (self._closing or self._submitted or self._commands or self._scheduler.has_work):
                self._condition.wait()
            return not self._closing

    def _step(self) -> None:
        self._run_commands()
        self._take_submitted()
        self._prefill()
        self._decode()
        self._steps += 1

    def _run_commands(self) -> None:
        while self._commands:
            command, done = self._commands.popleft()
            try:
                command()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _take_submitted(self) -> None:
        """Queue what was submitted since the last step, and end what was cancelled."""
        with self._condition:
            while self._submitted:
                self._scheduler.add(self._submitted.popleft())
            cancelling, self._cancelling = self._cancelling, False
        for sequence in self._scheduler.cancelled() if cancelling else ():
            self._scheduler.remove(sequence)
            sequence.end(Cancelled())

    def _prefill(self) -> None:
        """Compute up to `prefill_chunk` prompt tokens."""
        budget = self._chunk
        while (prompts := self._scheduler.next_prompts(budget)) is not None:
            budget -= prompts.tokens
            self._run_prompts(prompts)

    def _run_prompts(self, prompts: PromptPass) -> None:
        try:
            logits = self._prompt_logits(prompts)
        except Exception as error:
            self._scheduler.failed(prompts)
            if len(prompts.sequences) == 1:
                self._fail(prompts.sequences[0], error)
                return
            _log.warning("prefill of several prompts failed; they run one by one", exc_info=error)
            for sequence in prompts.sequences:
                self._run_prompts(self._scheduler.alone(sequence))
            return
        begun = self._scheduler.prefilled(prompts)
        for sequence in begun:
            sequence.emit(sequence.start())
        if begun:
            self._advance(begun, logits[-len(begun) :])

    def _prompt_logits(self, prompts: PromptPass) -> torch.Tensor:
        """Logits of each piece's last token [pieces, vocabulary]."""
        with self._threads.step("prefill", prompts.tokens):
            if len(prompts.pieces) > 1:
                return self._runner.prefill_together(prompts.pieces)
            sequence, piece = prompts.sequences[0], prompts.pieces[0]
            with_logprobs = sequence.request.prompt_logprobs
            logits = self._runner.prefill(piece.row, piece.ids, piece.start, piece.slot, all_logits=with_logprobs)
        if with_logprobs:
            # Logits at position i predict token i + 1; the last of the prompt predict the first new token.
            end = piece.start + len(piece.ids)
            targets = torch.tensor(sequence.prompt[piece.start + 1 : end + 1], device=logits.device).long()
            log_probs = logits[: len(targets)].log_softmax(-1)
            sequence.prompt_logprobs += log_probs.gather(1, targets[:, None])[:, 0].tolist()
            if sequence.request.prompt_top_logprobs:
                sequence.prompt_alternatives += likeliest(log_probs, sequence.request.prompt_top_logprobs)
        return logits[-1:]

    def _decode(self) -> None:
        """One token for every decoding row."""
        rows = list(self._scheduler.running)
        if not rows:
            return
        try:
            logits = self._decode_logits(0, rows)
        except Exception as error:
            _log.warning("a decode step failed; its rows run one by one", exc_info=error)
            self._decode_one_by_one()
        else:
            self._advance(rows, logits)

    def _decode_one_by_one(self) -> None:
        """Find the row that breaks the batch: the others go on."""
        # From the back: a row that leaves is replaced by the last, which has been computed already.
        for sequence in reversed(list(self._scheduler.running)):
            try:
                logits = self._decode_logits(self._scheduler.running.index(sequence), [sequence])
            except Exception as error:
                self._fail(sequence, error)
            else:
                self._advance([sequence], logits)

    def _decode_logits(self, first: int, rows: Sequence[SequenceState]) -> torch.Tensor:
        with self._threads.step("decode", len(rows)):
            return self._runner.decode(
                first,
                [row.output[-1] for row in rows],
                [row.cached for row in rows],
                [row.slot for row in rows],
            )

    def _advance(self, rows: Sequence[SequenceState], logits: torch.Tensor) -> None:
        """Choose a token for each row and send it; rows that end leave the batch."""
        if any(row.only_reads for row in rows):
            logits = logits[[place for place, row in enumerate(rows) if not row.only_reads]]
            for sequence in [row for row in rows if row.only_reads]:
                sequence.end(Finished("length"))
                self._scheduler.remove(sequence)
            rows = [row for row in rows if not row.only_reads]
            if not rows:
                return
        choices = choose(logits, [row.chooser for row in rows])
        self._last_token_at = time.monotonic()
        for sequence, choice in zip(rows, choices, strict=True):
            try:
                if isinstance(choice, Exception):
                    raise choice
                sequence.accept(choice, self._special)
                self._tokens += 1
            except Exception as error:
                sequence.fail(_presentable(error))
        # Only now: the last row is moved with what it has in the cache, which is complete once it took its token.
        for sequence in rows:
            if sequence.ended:
                self._scheduler.remove(sequence)

    # ------------------------------------------------------------------ failures

    def _fail(self, sequence: SequenceState, error: Exception) -> None:
        """End a request with an error; the engine and everyone else go on."""
        self._scheduler.remove(sequence)
        sequence.fail(_presentable(error))

    def _restart(self, error: Exception) -> bool:
        """After an error that no request caused: those in the batch fail, those waiting and the engine go on.

        Returns:
            False if the device computes nothing any more: then nothing can go on.
        """
        _log.error("an engine step failed", exc_info=error)
        if not device_answers(self._runner.device):
            _log.critical("the device computes nothing any more")
            with self._condition:
                self._closing = True
            return False
        for sequence in self._scheduler.in_flight():
            sequence.fail(TunesmithError("the engine failed; try again", code="generation_failed"))
        self._scheduler.clear()
        return True

    def _fail_everything(self) -> None:
        with self._condition:
            left = [*self._submitted, *self._scheduler.drain()]
            self._submitted.clear()
            commands = list(self._commands)
            self._commands.clear()
        for sequence in left:
            sequence.fail(Unavailable("the server is shutting down"))
        for _, done in commands:
            done.set_exception(Unavailable("the server is shutting down"))

    # ------------------------------------------------------------------ adapters

    def _between_steps(self, command: Callable[[], None]) -> "Future[None]":
        done: Future[None] = Future()
        # From here on it cannot be cancelled: a waiter that goes away must not make `set_result` raise.
        done.set_running_or_notify_cancel()
        with self._condition:
            if self._closing:
                done.set_exception(Unavailable("the server is shutting down"))
                return done
            self._commands.append((command, done))
            self._condition.notify()
        return done

    def _load(self, uid: str, weights: FusedAdapter) -> None:
        if uid in self._slots:
            raise ValueError(f"adapter {uid} is loaded already")
        free = set(range(1, self._runner.lora.slots + 1)) - set(self._slots.values())
        if not free:
            raise ValueError("no adapter slot is free")
        slot = min(free)
        try:
            self._runner.lora.write(slot, weights)
        except torch.OutOfMemoryError as error:
            raise Overloaded(
                f"the device has no memory for an adapter of rank {weights.rank} beside what is loaded", retry_after=5
            ) from error
        self._slots[uid] = slot

    def _unload(self, uid: str) -> None:
        slot = self._slots.pop(uid, None)
        if slot is not None:
            self._runner.lora.free(slot)


def _presentable(error: Exception) -> TunesmithError:
    """The error as a client may see it: an unexpected one is logged and not shown."""
    if isinstance(error, TunesmithError):
        return error
    _log.error("a request failed in the engine", exc_info=error)
    return TunesmithError("the engine failed on this request", code="generation_failed")
