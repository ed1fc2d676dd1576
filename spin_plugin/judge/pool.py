"""Judge processes that work in parallel. A response that a process cannot cope with is passed over."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

from spin_plugin.args import JudgeArgs
from spin_plugin.console import SpinError, warn
from spin_plugin.judge.process import JudgeProcess, Overran, Question, Raised

BATCH = 16  # responses per call of the function
SHOWN = 60  # characters of a prompt or response in a message


class Pool:
    """Calls the judge on batches, in processes that start when they are needed."""

    def __init__(self, args: JudgeArgs) -> None:
        """Start the first process.

        Raises:
            SpinError: the function cannot be loaded.
        """
        self.args = args
        self._lock, self._closed = threading.Lock(), False
        self._processes: set[JudgeProcess] = set()
        self._idle: list[JudgeProcess] = []
        self._threads = ThreadPoolExecutor(args.processes, "judge")
        self._left = 0
        """How many more responses may be passed over."""
        self.source: str | None = None
        """Digest of the file that defines the function."""
        self._idle.append(self._start())

    def close(self) -> None:
        """Kill all processes, also those that are judging."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)  # waits for the threads, which see that their process is gone
        for process in self._idle:
            process.end()

    def scores(self, questions: Sequence[Question], label: str, most_passed_over: int) -> list[float | None]:
        """Return a score in 0…1 for each question; None for those that are passed over. One call at a time.

        Args:
            questions: what to judge.
            label: where the responses are from, for messages.
            most_passed_over: how many questions may be passed over.

        Raises:
            SpinError: the function raised an error, did not return a score for each response, or more responses were
                passed over.
        """
        self._left = most_passed_over
        batches = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
        return list(chain.from_iterable(self._threads.map(partial(self._batch, label=label), batches)))

    def _batch(self, batch: Sequence[Question], label: str) -> list[float | None]:
        """Judge a batch; if that fails, judge its responses one by one to find the one that is to blame."""
        if len(batch) > 1:
            try:
                return [*self._ask(batch)]
            except Overran:
                return [self._alone(question, label) for question in batch]
            except Raised as error:
                for question in batch:
                    self._alone(question, label)
                raise self._failed(batch[0], f"{error} (in a batch of {len(batch)}, not alone)", label) from None
        return [self._alone(question, label) for question in batch]

    def _alone(self, question: Question, label: str) -> float | None:
        try:
            (score,) = self._ask([question])
        except Overran as error:
            warn(f"judge: {label}: the response {_named(question)} is passed over: {error}")
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    raise self.too_many_passed_over(label) from None
            return None
        except Raised as error:
            raise self._failed(question, str(error), label) from None
        return score

    def too_many_passed_over(self, label: str) -> SpinError:
        """Return the error that ends judging if the function cannot cope with too many responses."""
        return SpinError(
            f"spin.judge: {self.args.function} passed over too many responses of {label} (see the warnings); raise "
            "spin.judge.timeout or correct the function, then rerun the same command"
        )

    def _failed(self, question: Question, reason: str, label: str) -> SpinError:
        return SpinError(
            f"spin.judge: {self.args.function} failed on {label}, the response {_named(question)}: {reason}; correct "
            "it and rerun the same command, all responses are kept"
        )

    def _ask(self, batch: Sequence[Question]) -> list[float]:
        """Pass a batch to an idle process, or to a new one."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or self._start()
        try:
            scores = process.scores(batch, self.args.timeout)
        except (Raised, Overran):
            with self._lock:
                self._processes.remove(process)
                if self._closed:
                    raise Closed from None
            raise
        with self._lock:
            self._idle.append(process)
        return scores

    def _start(self) -> JudgeProcess:
        with self._lock:
            if self._closed:
                raise Closed
            process = JudgeProcess()
            self._processes.add(process)
        try:
            source = process.load(self.args.function, self.args.kwargs)
        except (Raised, Overran) as error:
            raise SpinError(
                f"spin.judge.function: {self.args.function} cannot be loaded: {error}; a module of your own must be in "
                "the working directory or on PYTHONPATH"
            ) from None
        self.source = source if self.source is None else self.source
        if source != self.source:
            process.end()
            raise SpinError(f"spin.judge.function: {self.args.function} has changed meanwhile; rerun the same command")
        return process


class Closed(Exception):  # noqa: N818 - seen by the pool's own threads only
    """The pool was closed while a thread was judging."""


def _named(question: Question) -> str:
    """Name a response by its own start and that of its prompt."""
    messages = question.prompt["messages"]
    prompt = messages[-1]["content"] if messages else question.prompt["text"]
    return f"{_shortened(question.synthetic)} to {_shortened(prompt)}"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
