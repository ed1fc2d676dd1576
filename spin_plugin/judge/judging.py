"""Judge the responses of a run: in the background while vLLM generates, then what is missing."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from rich.progress import track

from spin_plugin.args import JudgeArgs
from spin_plugin.console import console, say, warn
from spin_plugin.generation.shards import Shards
from spin_plugin.judge.pool import BATCH, Pool
from spin_plugin.judge.texts import Texts
from spin_plugin.judge.verdicts import Scores, Verdicts
from spin_plugin.run.directory import RunDir

# More responses than this, and more than this share of an iteration's, are not passed over but an error.
MOST_PASSED_OVER, MOST_PASSED_OVER_SHARE = 9, 0.01


class Judging:
    """Stores a verdict on every response. Shards are judged one after the other, by a thread of its own."""

    def __init__(self, args: JudgeArgs, run: RunDir, texts: Texts) -> None:
        """Load the function in a process; `close` ends all of them.

        Raises:
            SpinError: the function cannot be loaded.
        """
        self._args, self._run, self._texts, self._pool = args, run, texts, Pool(args)
        identity = json.dumps([args.function, args.kwargs, self._pool.source], sort_keys=True)
        self.judge = hashlib.sha256(identity.encode()).hexdigest()
        """Digest of what the scores depend on: function, arguments and source."""
        self._thread = ThreadPoolExecutor(1, "judging")
        self._shards: dict[tuple[int, int], Future[Scores]] = {}
        """The shards that are judged or will be, by iteration and number."""
        self._judged: Counter[int] = Counter()
        """Number of responses that this start has judged, by iteration."""
        self._passed_over: Counter[int] = Counter()
        """Number of responses without a score, by iteration."""

    def try_on_real_responses(self) -> None:
        """Warn if a real response does not count as right when it is compared with itself.

        Raises:
            SpinError: the function failed.
        """
        answers = self._texts.real_answers(BATCH)
        scores = self._pool.scores(answers, "real responses compared with themselves", MOST_PASSED_OVER)
        wrong = [score for score in scores if score is None or score < self._args.drop_at]
        if wrong:
            first = "no score" if wrong[0] is None else f"{wrong[0]:g}"
            warn(
                f"spin.judge: {len(wrong)} of {len(scores)} real responses, compared with themselves, do not reach "
                f"drop_at: {self._args.drop_at:g} (the first one: {first}); check the function, its kwargs and the data"
            )

    def submit(self, iteration: int, shard: int) -> None:
        """Judge a complete shard in the background.

        Raises:
            SpinError: an earlier shard could not be judged.
        """
        for judged in self._shards.values():
            if judged.done():
                judged.result()
        self._shards[iteration, shard] = self._thread.submit(self._scores, iteration, shard)

    def submit_all(self, iterations: Iterable[int]) -> None:
        """Judge the complete iterations in the background, except for what is judged or submitted already."""
        for iteration in iterations:
            for shard in range(Shards(self._run.iteration(iteration).synthetic).count()):
                if (iteration, shard) not in self._shards:
                    self.submit(iteration, shard)

    def finish(self, iterations: Iterable[int]) -> None:
        """Wait until all responses of these iterations are judged.

        Raises:
            SpinError: the function failed, too many responses were passed over, or a shard is damaged.
        """
        iterations = list(iterations)
        self.submit_all(iterations)
        waiting = list(self._shards.items())
        scores: dict[int, Scores] = {iteration: [] for iteration in iterations}
        hidden = not console.is_terminal
        for (iteration, _), shard in track(
            waiting, "judging responses", console=console, transient=True, disable=hidden
        ):
            scores[iteration] += shard.result()
        for iteration, found in scores.items():
            if self._judged[iteration]:
                self._report(iteration, found)

    def verdicts(self, iteration: int) -> Verdicts:
        """Return an iteration's verdicts."""
        return Verdicts(Shards(self._run.iteration(iteration).synthetic), self.judge, self._args.timeout)

    def close(self) -> None:
        """End the processes and the background thread."""
        self._pool.close()
        self._thread.shutdown(cancel_futures=True)

    def _scores(self, iteration: int, number: int) -> Scores:
        """Return the stored scores of a shard, or judge and store them."""
        verdicts = self.verdicts(iteration)
        responses = verdicts.shards.read(number)
        scores = verdicts.read(number)
        label, total = f"iteration {iteration}", (verdicts.shards.manifest() or {})["requests"]
        most = max(MOST_PASSED_OVER, int(MOST_PASSED_OVER_SHARE * total)) - self._passed_over[iteration]
        if scores is None:
            scores = self._pool.scores(self._texts.questions(responses), label, most)
            verdicts.write(number, scores)
            self._judged[iteration] += len(scores)
        self._passed_over[iteration] += scores.count(None)
        if scores.count(None) > most:  # as stored by an earlier start
            raise self._pool.too_many_passed_over(label)
        return scores

    def _report(self, iteration: int, scores: Scores) -> None:
        known = [score for score in scores if score is not None]
        right = sum(score >= self._args.drop_at for score in known)
        say(
            f"iteration {iteration}: {self._judged[iteration]:,} responses judged by {self._args.function}; of all "
            f"{len(scores):,}, {right / max(1, len(known)):.1%} are right (spin.judge.drop_at: "
            f"{self._args.drop_at:g}), mean score {sum(known) / max(1, len(known)):.4f}, "
            f"{len(scores) - len(known):,} passed over"
        )
