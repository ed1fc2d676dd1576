"""How the scores of lm-evaluation-harness in run.json are shown."""

from collections.abc import Mapping


def shown_scores(scores: Mapping[str, float]) -> dict[str, str]:
    """Return each score by `task/metric`, with its standard error if that is known: `0.5012 ± 0.01`."""
    shown = {}
    for name, value in scores.items():
        if "_stderr" not in name:
            task, metric, *rest = name.split("/")
            error = scores.get("/".join([task, f"{metric}_stderr", *rest]))
            shown[name] = f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    return shown
