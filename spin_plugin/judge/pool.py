"""Judge processes that work in parallel. A response that a process cannot cope with is skipped."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

from spin_plugin.args import JudgeArgs
from spin_plugin.console import SpinError, warn
from spin_plugin.judge.process import START_TIMEOUT, BadKwargs, Died, JudgeProcess, Question, Raised

BATCH = 16  # responses per call of the function
SHOWN = 60  # characters of a prompt or response in a message


class Pool:
    """Calls the judge on batches, in processes that start when they are needed."""

    def __init__(self, args: JudgeArgs) -> None:
        self.args = args
        self.sources: dict[str, str] = {}
        """The modules that define the function, with digests of their files; empty until it is loaded."""
        self._lock, self._closed = threading.Lock(), False
        self._processes: set[JudgeProcess] = set()
        self._idle: list[JudgeProcess] = []
        self._threads = ThreadPoolExecutor(args.processes, "judge")
        self._left = 0
        """How many more responses may be skipped."""
        self._digests: dict[str, str] = {}
        """Digest of every module's file that was looked up."""
        self._slowest_first_call: float | None = None
        """Seconds; a function may load a model in the first call of each process."""

    def digests(self, modules: Iterable[str]) -> dict[str, str]:
        """Return digests of modules' files without importing the modules; they are looked up once.

        Raises:
            SpinError: a package that a module is in does not end its import.
        """
        if unknown := [module for module in modules if module not in self._digests]:
            process = self._new_process()
            try:
                found = process.digests(unknown)
            except (Raised, Died) as error:
                raise self._not_loaded(str(error)) from None
            process.end()
            self._remember(found)
        return {module: self._digests[module] for module in modules}

    def load(self) -> None:
        """Load the function in a first process.

        Raises:
            SpinError: it cannot be loaded.
        """
        if not self.sources:
            self._idle.append(self._start())

    def try_one(self, question: Question) -> float:
        """Judge one response, which must not be skipped.

        Raises:
            SpinError: the function raised an error, took too long or died.
        """
        label = "real responses compared with themselves"
        try:
            return self._ask([question])[0]
        except Died as error:
            raise self._failed(question, f"{error} (spin.judge.timeout)", label) from None
        except Raised as error:
            raise self._failed(question, str(error), label) from None

    def close(self) -> None:
        """Kill all processes, also those that are judging."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)  # waits for the threads, which see that their process is gone
        for process in self._processes:
            process.end()

    def scores(self, questions: Sequence[Question], label: str, max_skipped: int) -> list[float | None]:
        """Return a score in 0…1 for each question; None for those that are skipped. One call at a time.

        Args:
            questions: what to judge.
            label: where the responses are from, for messages.
            max_skipped: how many questions may be skipped.

        Raises:
            SpinError: the function raised an error, did not return a score for each response, or more responses were
                skipped.
        """
        self._left = max_skipped
        batches = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
        return list(chain.from_iterable(self._threads.map(partial(self._batch, label=label), batches)))

    def _batch(self, batch: Sequence[Question], label: str) -> list[float | None]:
        """Judge a batch; if that fails, judge its responses one by one to find the one that fails."""
        if len(batch) > 1:
            try:
                return [*self._ask(batch)]
            except Died:
                return [self._alone(question, label) for question in batch]
            except Raised as error:
                for question in batch:
                    self._alone(question, label)
                raise self._failed(batch[0], f"{error} (in a batch of {len(batch)}, not alone)", label) from None
        return [self._alone(question, label) for question in batch]

    def _alone(self, question: Question, label: str) -> float | None:
        try:
            (score,) = self._ask([question])
        except Died as error:
            warn(f"judge: {label}: the response {_named(question)} is skipped: {error}")
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    raise self.too_many_skipped(label) from None
            return None
        except Raised as error:
            raise self._failed(question, str(error), label) from None
        return score

    def too_many_skipped(self, label: str) -> SpinError:
        """Return the error that ends judging if the function cannot cope with too many responses."""
        return SpinError(
            f"spin.judge: {self.args.function} could not judge too many responses of {label} (see the warnings); raise "
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
        first_call, started = not process.called, time.monotonic()
        try:
            scores = process.scores(batch, self.args.timeout * len(batch) + (self._for_loading if first_call else 0))
        except (Raised, Died):
            with self._lock:
                self._processes.remove(process)
                if self._closed:
                    raise Closed from None
            raise
        with self._lock:
            self._idle.append(process)
            if first_call:
                self._slowest_first_call = max(self._slowest_first_call or 0.0, time.monotonic() - started)
        return scores

    @property
    def _for_loading(self) -> float:
        """Additional seconds for a process's first call: many until one was answered, then twice what it took."""
        return START_TIMEOUT if self._slowest_first_call is None else min(START_TIMEOUT, 2 * self._slowest_first_call)

    def _new_process(self) -> JudgeProcess:
        with self._lock:
            if self._closed:
                raise Closed
            process = JudgeProcess()
            self._processes.add(process)
        return process

    def _start(self) -> JudgeProcess:
        """Start a process that has loaded the function."""
        process = self._new_process()
        try:
            sources = process.load(self.args.function, self.args.kwargs)
        except BadKwargs as error:
            raise SpinError(f"spin.judge.kwargs: {self.args.function}: {error}") from None
        except (Raised, Died) as error:
            raise self._not_loaded(str(error)) from None
        self._remember(sources)
        self.sources = sources
        return process

    def _remember(self, digests: Mapping[str, str]) -> None:
        """Require that no file has changed since an earlier lookup."""
        with self._lock:
            if any(self._digests.setdefault(module, digest) != digest for module, digest in digests.items()):
                raise SpinError(
                    f"spin.judge.function: {self.args.function} changed during the run; rerun the same command"
                )

    def _not_loaded(self, reason: str) -> SpinError:
        return SpinError(
            f"spin.judge.function: {self.args.function} cannot be loaded: {reason}; a module of your own must be in "
            "the working directory or on PYTHONPATH"
        )


class Closed(Exception):  # noqa: N818 - seen by the pool's own threads only
    """The pool was closed while a thread was judging."""


def _named(question: Question) -> str:
    """Name a response by its own start and that of its prompt."""
    messages = question.prompt["messages"]
    prompt = messages[-1]["content"] if messages else question.prompt["text"]
    return f"{_shortened(question.synthetic)} to {_shortened(prompt)}"


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")
