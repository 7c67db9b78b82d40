"""Statistics of a few runs: intervals, a one-sided t-test, Track 3's rule of validity."""

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95  # confidence of every interval


def student_cdf(t: float, df: int) -> float:
    """P(T < t) for Student's T with `df` degrees of freedom: the finite series 26.7.3 and 26.7.4 of
    Abramowitz and Stegun, exact for whole df >= 1."""
    theta = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    term, inside, scale = 1.0, 0.0, sine
    if df % 2:
        term, inside, scale = cosine, 2 / math.pi * theta, 2 / math.pi * sine
    for k in range(2 + df % 2, df + 1, 2):
        inside += scale * term
        term *= cosine**2 * (k - 1) / k
    return 0.5 + math.copysign(inside / 2, t)


def student_quantile(p: float, df: int) -> float:
    """The t with P(T < t) = p, for 0.5 <= p < 1."""
    low, high = 0.0, 1.0
    while student_cdf(high, df) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
    return high


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None for fewer than two values, or infinite ones."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if known else None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval for the mean; None for fewer than two values, or infinite ones."""
    n, sd = len(values), spread(values)
    if sd is None:
        return None
    half = student_quantile((1 + LEVEL) / 2, n - 1) * sd / math.sqrt(n)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def verdict(losses: Sequence[float], target: float) -> dict[str, float | bool | None]:
    """Test whether the mean of these losses is below a target.

    p_value: of Student's one-sided test; None without a spread. margin: Track 3's (target - mean)
    sqrt(n), which must be at least 0.004 (modded-nanogpt's optimization benchmark).
    """
    n, mean, sd = len(losses), statistics.fmean(losses), spread(losses)
    margin = (target - mean) * math.sqrt(n)
    p_value = student_cdf(-margin / sd, n - 1) if sd else None
    return {"n": n, "mean": mean, "sd": sd, "target": target, "margin": margin,
            "valid": margin >= 0.004, "p_value": p_value}  # fmt: skip
