"""The engine: one thread that takes requests in, prefills, decodes, and lets tokens out, step by step.

Requests join and leave between steps. Decoding rows lie at the front of the cache, the one sequence being prefilled
right behind them; when a row leaves, the last one moves into its place. Nothing is evicted in flight: a sequence is
admitted only when its prompt and all its new tokens fit its row.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import Future

import torch

from services.inference.engine.admission import Admission, Place, check_length
from services.inference.engine.interface import Cancelled, GenerationRequest, Sink, Started, Stats
from services.inference.engine.lora import LoraWeights
from services.inference.engine.runner import ModelRunner, Piece
from services.inference.engine.sampling import choose
from services.inference.engine.sequence import Sequence
from services.inference.engine.threads import StepThreads
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest, TunesmithError, Unavailable
from shared.logs import get_logger

_log = get_logger("engine")


class BatchEngine:
    """Continuous batching over a `ModelRunner`.

    Args:
        prefill_chunk: prompt tokens computed between two decode steps; bounds how long a prompt stalls the others.
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, admission: Admission, *, prefill_chunk: int) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._admission = admission
        self._chunk = prefill_chunk
        added = tokenizer.fast.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._condition = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = False
        self._cancelling = False
        # From here on the engine thread's own.
        self._rows: list[Sequence] = []
        self._prefilling: Sequence | None = None
        self._joining: list[Sequence] = []
        self._slots: dict[str, tuple[int, int]] = {}
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

    def submit(self, request: GenerationRequest, sink: Sink, place: Place | None = None) -> Sequence:
        """See `Engine.submit`. `place` is one in this engine's `Admission`, if the caller has taken it already."""
        check_length(len(request.prompt), request.max_new_tokens, self.context)
        if not all(0 <= token < self._runner.vocabulary for token in request.prompt):
            raise InvalidRequest("a token id is outside the vocabulary", param="inputs")
        if place is None:
            place = self._admission.enter(len(request.prompt))
        else:
            place.resize(len(request.prompt))
        sequence = Sequence(request, sink, place, self._tokenizer, self._runner.device)
        with self._condition:
            if self._closing:
                place.leave()
                raise Unavailable("the server is shutting down")
            self._waiting.append(sequence)
            self._condition.notify()
        return sequence

    def cancel(self, handle: Sequence) -> None:
        handle.cancelled = True
        with self._condition:
            self._cancelling = True
            self._condition.notify()

    def load(self, uid: str, weights: LoraWeights) -> "Future[None]":
        return self._between_steps(lambda: self._load(uid, weights))

    def unload(self, uid: str) -> "Future[None]":
        return self._between_steps(lambda: self._unload(uid))

    def stats(self) -> Stats:
        rows = [*self._rows, *self._joining, *([self._prefilling] if self._prefilling else [])]
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
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._step()
                except Exception as error:
                    self._start_afresh(error)
        self._fail_everything()

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; False when the engine is closed."""
        with self._condition:
            while not (self._closing or self._waiting or self._commands or self._rows or self._prefilling):
                self._condition.wait()
            return not self._closing

    def _step(self) -> None:
        self._run_commands()
        self._drop_cancelled()
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

    def _drop_cancelled(self) -> None:
        with self._condition:
            if not self._cancelling:
                return
            self._cancelling = False
            gone = [sequence for sequence in self._waiting if sequence.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        if self._prefilling and self._prefilling.cancelled:
            gone.append(self._prefilling)
            self._drop_prefilling()
        for sequence in [row for row in self._rows if row.cancelled]:
            gone.append(sequence)
            self._remove(sequence)
        for sequence in gone:
            sequence.end(Cancelled())

    def _admit(self, most_tokens: int | None = None) -> Sequence | None:
        """The oldest waiting sequence, if a row is free for it and its prompt has no more than `most_tokens`."""
        with self._condition:
            if not self._waiting or len(self._rows) + len(self._joining) >= self._runner.rows:
                return None
            if most_tokens is not None and len(self._waiting[0].prompt) > most_tokens:
                return None
            sequence = self._waiting.popleft()
        sequence.place.leave()
        sequence.queue_seconds = time.monotonic() - sequence.submitted_at
        adapter = sequence.request.adapter
        if adapter is not None and adapter not in self._slots:
            sequence.fail(TunesmithError("the adapter was unloaded before the request ran", code="adapter_gone"))
            return self._admit(most_tokens)
        sequence.slot, sequence.rank = (0, 0) if adapter is None else self._slots[adapter]
        return sequence

    def _prefill(self) -> None:
        """Compute up to `prefill_chunk` prompt tokens, oldest sequence first."""
        budget = self._chunk
        while budget > 0:
            if self._prefilling is None:
                budget -= self._prefill_whole_prompts(budget)
            sequence = self._prefilling = self._prefilling or self._admit()
            if sequence is None or budget <= 0:
                return
            piece = sequence.prompt[sequence.prefilled : sequence.prefilled + budget]
            budget -= len(piece)
            self._prefill_alone(sequence, piece)

    def _prefill_whole_prompts(self, budget: int) -> int:
        """Prompts that fit `budget` as a whole, in one pass; returns how many tokens they had."""
        spent = 0
        while (sequence := self._admit(budget - spent)) is not None:
            self._joining.append(sequence)
            spent += len(sequence.prompt)
            if sequence.request.prompt_logprobs:
                break
        first, joined = len(self._rows), list(self._joining)
        if len(joined) < 2 or any(each.request.prompt_logprobs for each in joined):
            self._prefill_one_by_one(joined)
            return spent
        pieces = [Piece(first + i, each.prompt, 0, each.slot, each.rank) for i, each in enumerate(joined)]
        try:
            with self._threads.step("prefill", spent):
                logits = self._runner.prefill_together(pieces)
        except Exception as error:
            _log.warning("prompts together failed; trying them one by one", exc_info=error)
            for piece in pieces:
                self._runner.cache.clear(piece.row, len(piece.ids))
            self._prefill_one_by_one(joined)
            return spent
        for sequence in joined:
            sequence.prefilled = len(sequence.prompt)
            self._begin(sequence)
        self._joining.clear()
        self._advance(joined, logits)
        return spent

    def _prefill_one_by_one(self, joined: Many[Sequence]) -> None:
        for sequence in joined:
            self._joining.remove(sequence)
            self._prefilling = sequence
            self._prefill_alone(sequence, sequence.prompt)

    def _prefill_alone(self, sequence: Sequence, piece: list[int]) -> None:
        try:
            self._prefill_piece(sequence, piece)
        except Exception as error:
            self._drop_prefilling()
            self._fail(sequence, error)

    def _prefill_piece(self, sequence: Sequence, piece: list[int]) -> None:
        wanted = sequence.request.prompt_logprobs
        with self._threads.step("prefill", len(piece)):
            logits = self._runner.prefill(
                len(self._rows), piece, sequence.prefilled, sequence.slot, sequence.rank, all_logits=wanted
            )
        start = sequence.prefilled
        sequence.prefilled += len(piece)
        if wanted:
            # Logits at position i speak of token i + 1; the last of the prompt speak of the first new token.
            following = torch.tensor(sequence.prompt[start + 1 : sequence.prefilled + 1], device=logits.device).long()
            log_probabilities = logits[: len(following)].log_softmax(-1).gather(1, following[:, None])
            sequence.prompt_logprobs += log_probabilities[:, 0].tolist()
        if sequence.prefilled < len(sequence.prompt):
            return
        self._prefilling = None
        self._begin(sequence)
        self._advance([sequence], logits[-1:])

    def _begin(self, sequence: Sequence) -> None:
        """Its prompt is in the cache: from now on it decodes with the others."""
        self._rows.append(sequence)
        sequence.emit(Started(sequence.queue_seconds, tuple(sequence.prompt_logprobs)))

    def _decode(self) -> None:
        """One token for every decoding row."""
        rows = list(self._rows)
        if not rows:
            return
        try:
            logits = self._logits(0, rows)
        except Exception as error:
            _log.warning("a decode step failed; trying its rows one by one", exc_info=error)
            self._decode_one_by_one()
        else:
            self._advance(rows, logits)

    def _decode_one_by_one(self) -> None:
        """Find the row that breaks the batch: the others go on."""
        # From the back: a row that leaves is replaced by the last, which has had its turn.
        for sequence in reversed(list(self._rows)):
            try:
                logits = self._logits(self._rows.index(sequence), [sequence])
            except Exception as error:
                self._fail(sequence, error)
            else:
                self._advance([sequence], logits)

    def _logits(self, first: int, rows: Many[Sequence]) -> torch.Tensor:
        with self._threads.step("decode", len(rows)):
            return self._runner.decode(
                first,
                [row.output[-1] for row in rows],
                [row.cached for row in rows],
                [row.slot for row in rows],
                [row.rank for row in rows],
            )

    def _advance(self, rows: Many[Sequence], logits: torch.Tensor) -> None:
        """Choose a token for each row and let it out; rows that end leave the batch."""
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
        # Only now: a row is moved with what it has in the cache, which is up to date once it took its token.
        for sequence in rows:
            if sequence.ended:
                self._remove(sequence)

    # ------------------------------------------------------------------ rows

    def _remove(self, sequence: Sequence) -> None:
        """Take a decoding row out and keep the rest in front."""
        row, last = self._rows.index(sequence), len(self._rows) - 1
        # `cached` does not count the token a failing step has written already.
        self._runner.cache.clear(row, min(sequence.cached + 1, self._runner.context))
        if row != last:
            self._runner.cache.move(last, row, self._rows[last].cached)
            self._rows[row] = self._rows[last]
        self._rows.pop()
        if self._prefilling is not None:
            self._runner.cache.move(last + 1, last, self._prefilling.prefilled)

    def _drop_prefilling(self) -> None:
        sequence, self._prefilling = self._prefilling, None
        if sequence is not None:
            length = min(sequence.prefilled + self._chunk, self._runner.context)
            self._runner.cache.clear(len(self._rows), length)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a request with an error; the engine and everyone else go on."""
        if sequence in self._rows:
            self._remove(sequence)
        sequence.fail(_presentable(error))

    def _start_afresh(self, error: Exception) -> None:
        """What no request is to blame for: those in the batch fail, those waiting and the engine go on."""
        _log.error("an engine step failed", exc_info=error)
        left = [*self._rows, *([self._prefilling] if self._prefilling else []), *self._joining]
        self._rows, self._prefilling, self._joining = [], None, []
        for row, sequence in enumerate(left):
            sequence.fail(TunesmithError("the engine failed; try again", code="generation_failed"))
            self._runner.cache.clear(row, self._runner.context)

    def _fail_everything(self) -> None:
        with self._condition:
            left = [*self._waiting, *self._rows, *([self._prefilling] if self._prefilling else [])]
            self._waiting.clear()
            commands = list(self._commands)
            self._commands.clear()
        for sequence in left:
            sequence.fail(Unavailable("the server is shutting down"))
        for _, done in commands:
            done.set_exception(Unavailable("the server is shutting down"))

    # ------------------------------------------------------------------ adapters

    def _between_steps(self, command: Callable[[], None]) -> "Future[None]":
        done: Future[None] = Future()
        # From here on it cannot be cancelled: a waiter that gives up must not make `set_result` raise.
        done.set_running_or_notify_cancel()
        with self._condition:
            if self._closing:
                done.set_exception(Unavailable("the server is shutting down"))
                return done
            self._commands.append((command, done))
            self._condition.notify()
        return done

    def _load(self, uid: str, weights: LoraWeights) -> None:
        if uid in self._slots:
            raise ValueError(f"adapter {uid} is loaded already")
        free = set(range(1, self._runner.lora.slots + 1)) - {slot for slot, _ in self._slots.values()}
        if not free:
            raise ValueError("no adapter slot is free")
        slot = min(free)
        self._runner.lora.write(slot, weights)
        self._slots[uid] = (slot, weights.rank)

    def _unload(self, uid: str) -> None:
        self._slots.pop(uid, None)


def _presentable(error: Exception) -> TunesmithError:
    """The error as a client may see it: what was not raised on purpose is logged and not told."""
    if isinstance(error, TunesmithError):
        return error
    _log.error("a request failed in the engine", exc_info=error)
    return TunesmithError("the engine failed on this request", code="generation_failed")
