"""What the cost model's choices cost, held against times that were measured.

The regret of a choice is its time over that of the best candidate. Predictions are today's:
a table that was measured once judges every later version of the model.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..backends import BackendError
from ..tuning import Choice, Choices


@dataclass(frozen=True)
class Row:
    """A problem of which several candidates were measured.

    Attributes:
        machine, problem: as in a table of choices.
        measured: number of candidates.
        best: the fastest of them.
        seconds: its time.
        static: what is taken without measuring, of the candidates that were measured.
        static_regret: its time over the best's.
        tuned: the fastest of those that are likely by prediction, which tuning would measure.
        tuned_regret: its time over the best's.
    """

    machine: str
    problem: str
    measured: int
    best: str
    seconds: float
    static: str
    static_regret: float
    tuned: str
    tuned_regret: float


@dataclass(frozen=True)
class Summary:
    """Over some rows: the geometric mean of the regrets, and the worst one."""

    problems: int
    static_mean: float
    static_worst: float
    tuned_mean: float
    tuned_worst: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Summary:
        """Of at least one row."""
        static = [row.static_regret for row in rows]
        tuned = [row.tuned_regret for row in rows]
        return cls(len(rows), _mean(static), max(static), _mean(tuned), max(tuned))


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def predicted(choice: Choice) -> dict[str, float]:
    """Seconds that are predicted for what was measured; empty where the layer is not known.

    Raises:
        BackendError: Triton, with which configurations are listed, is not installed.
        ValueError: the layer is described in another way.
    """
    if not choice.layer:
        return {}
    layer, device = _recall(choice)
    from ..backends import _predict

    found = _predict.predict(choice.seconds, layer, device)
    return {name: prediction.seconds for name, prediction in found.items()}


def _recall(choice: Choice) -> Any:
    if importlib.util.find_spec("triton") is None:
        raise BackendError(
            "predictions are made for Triton's configurations, and Triton is not installed: "
            "pip install triton"
        )
    from ..backends import _predict

    return _predict.recall(choice.layer)


def rows(choices: Choices) -> Iterator[Row]:
    """Of every problem with the times of several candidates that are still shipped.

    Raises:
        BackendError, ValueError: as :func:`predicted`.
    """
    for machine, problems in sorted(choices.items()):
        for problem, choice in sorted(problems.items()):
            if choice.layer and len(choice.seconds) > 1:
                row = _row(machine, problem, choice)
                if row is not None:
                    yield row


def _row(machine: str, problem: str, choice: Choice) -> Row | None:
    from ..backends import _predict

    layer, device = _recall(choice)
    found = _predict.predict(choice.seconds, layer, device)
    own = [name for name in _predict.order(layer, device) if name in found]
    if len(found) < 2 or not own:
        return None
    seconds = {name: choice.seconds[name] for name in found}
    best = min(seconds, key=lambda name: seconds[name])
    tuned = min(_predict.likely(found, layer, device), key=lambda name: seconds[name])
    ratio = {name: value / seconds[best] for name, value in seconds.items()}
    return Row(
        machine, problem, len(seconds), best, seconds[best],
        own[0], ratio[own[0]], tuned, ratio[tuned],
    )  # fmt: skip


def as_dict(found: Sequence[Row]) -> dict[str, Any]:
    """Rows and summary as JSON can hold them. Units: seconds, and ratios."""
    summary = asdict(Summary.of(found)) if found else None
    return {"rows": [asdict(row) for row in found], "summary": summary}
