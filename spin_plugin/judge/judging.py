"""Judge the responses of a run: in the background while vLLM generates, then what is missing."""

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rich.progress import track

from spin_plugin.args import JudgeArgs
from spin_plugin.console import SpinError, console, say, warn
from spin_plugin.generation.shards import Shards
from spin_plugin.judge.pool import BATCH, Pool
from spin_plugin.judge.texts import Texts
from spin_plugin.judge.verdicts import Scores, Verdicts
from spin_plugin.run.directory import RunDir

# More skipped responses than this, and than this share of an iteration's, are an error.
MAX_SKIPPED, MAX_SKIPPED_SHARE = 9, 0.01


class Judging:
    """Stores a verdict on every response. Shards are judged one after the other, by a thread of its own.

    The function is loaded only if a verdict is missing.
    """

    def __init__(self, args: JudgeArgs, run: RunDir, texts: Texts) -> None:
        self._args, self._run, self._texts, self._pool = args, run, texts, Pool(args)
        identity = json.dumps([args.function, args.kwargs], sort_keys=True)
        self._judge = hashlib.sha256(identity.encode()).hexdigest()
        self._thread = ThreadPoolExecutor(1, "judging")
        self._shards: dict[tuple[int, int], Future[Scores]] = {}
        """The shards that are judged or will be, by iteration and number."""
        self._error: SpinError | None = None
        """The first failure, after which nothing more is judged."""
        self._judged: Counter[int] = Counter()
        """Number of responses that this start has judged, by iteration."""
        self._seconds: defaultdict[int, float] = defaultdict(float)
        """Time for judging them."""
        self._skipped: Counter[int] = Counter()
        """Number of responses without a score, by iteration."""

    def begin(self, iterations: Sequence[int]) -> None:
        """Judge what the earlier iterations miss in the background; if any verdict is missing, first try the function.

        Args:
            iterations: those whose responses are used; the last one's may still have to be generated.

        Raises:
            SpinError: the function cannot be loaded or failed on a real response.
        """
        if any(self.stored(iteration) is None for iteration in iterations):
            self._load_and_try()
        self._submit_all(iterations[:-1])

    def submit(self, iteration: int, shard: int) -> None:
        """Judge a complete shard in the background, unless the judge has failed; `finish` raises its error."""
        self._shards[iteration, shard] = self._thread.submit(self._scores, iteration, shard)

    def finish(self, iterations: Iterable[int]) -> dict[int, Scores]:
        """Wait until all responses of these iterations are judged, and return their scores.

        Raises:
            SpinError: the function failed, too many responses were skipped, or a shard is damaged.
        """
        scores: dict[int, Scores] = {iteration: [] for iteration in iterations}
        self._submit_all(scores)
        hidden = not console.is_terminal
        waiting = sorted(self._shards.items())  # generated in any order
        for (iteration, _), shard in track(
            waiting, "judging responses", console=console, transient=True, disable=hidden
        ):
            scores[iteration] += shard.result()
        for iteration, judged in self._judged.items():
            say(
                f"iteration {iteration}: {judged:,} responses judged by {self._args.function} in "
                f"{self._seconds[iteration]:.0f} s, {self._skipped[iteration]:,} skipped"
            )
        return scores

    def stored(self, iteration: int) -> Scores | None:
        """Return the scores of an iteration if all are stored and current, otherwise None."""
        shards = Shards(self._run.iteration(iteration).synthetic)
        scores: Scores = []
        for number in range(shards.count() if shards.manifest() else 0):
            found = self._stored(iteration, number)
            if found is None:
                return None
            scores += found
        return scores or None

    def verdicts(self, iteration: int) -> Verdicts:
        """Return an iteration's verdicts."""
        return Verdicts(Shards(self._run.iteration(iteration).synthetic), self._judge, self._args.timeout)

    def close(self) -> None:
        """End the processes and the background thread."""
        self._pool.close()
        self._thread.shutdown(cancel_futures=True)

    def _submit_all(self, iterations: Iterable[int]) -> None:
        """Judge complete iterations in the background, except for what is judged or submitted already."""
        for iteration in iterations:
            for shard in range(Shards(self._run.iteration(iteration).synthetic).count()):
                if (iteration, shard) not in self._shards:
                    self.submit(iteration, shard)

    def _load_and_try(self) -> None:
        """Load the function and judge real responses compared with themselves; warn if they do not count as right."""
        if self._pool.sources:
            return
        self._pool.load()
        first, *others = self._texts.real_answers(BATCH)
        label = "real responses compared with themselves"
        scores = [self._pool.try_one(first), *self._pool.scores(others, label, MAX_SKIPPED)]
        wrong = [score for score in scores if score is None or score < self._args.drop_at]
        if wrong:
            shown = "no score" if wrong[0] is None else f"{wrong[0]:g}"
            warn(
                f"spin.judge: {len(wrong)} of {len(scores)} real responses, compared with themselves, do not reach "
                f"drop_at: {self._args.drop_at:g} (the first one: {shown}); check the function, its kwargs and the data"
            )

    def _stored(self, iteration: int, number: int) -> Scores | None:
        found = self.verdicts(iteration).read(number)
        return found.scores if found and self._pool.digests(found.sources) == found.sources else None

    def _scores(self, iteration: int, number: int) -> Scores:
        """Return the stored scores of a shard, or judge and store them."""
        if self._error:
            raise self._error
        try:
            return self._stored_or_judged(iteration, number)
        except SpinError as error:
            self._error = error
            raise

    def _stored_or_judged(self, iteration: int, number: int) -> Scores:
        verdicts = self.verdicts(iteration)
        label, total = f"iteration {iteration}", (verdicts.shards.manifest() or {})["requests"]
        most = max(MAX_SKIPPED, int(MAX_SKIPPED_SHARE * total)) - self._skipped[iteration]
        scores = self._stored(iteration, number)
        if scores is None:
            questions = self._texts.questions(verdicts.shards.read(number))
            self._load_and_try()
            started = time.monotonic()
            scores = self._pool.scores(questions, label, most)
            self._seconds[iteration] += time.monotonic() - started
            verdicts.write(number, scores, self._pool.sources)
            self._judged[iteration] += len(scores)
        self._skipped[iteration] += scores.count(None)
        if scores.count(None) > most:  # as stored by an earlier start
            raise self._pool.too_many_skipped(label)
        return scores
