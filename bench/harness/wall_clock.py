"""Turn clips/s of training into wall clock beside the paper's, shares of the ceiling, and hours for SSv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.harness.tables import spread_of

CEILING = "ceiling"  # the step alone
PAPER_RATIO = 15 / 13  # wall clock of TGM / MGM: 15 h and 13 h for 200 epochs of SSv2 (Fan et al. 2024)
SSV2_VIDEOS, EPOCHS = 168_913, 200  # videos of the training split; epochs of the paper's comparison

Key = tuple[str, float]  # a strategy, or CEILING, and its mask ratio


def summarise(
    rates: Mapping[Key, Sequence[float]], equal: Sequence[Key], native: Sequence[Key], with_hours: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return headline and plain numbers of strategies that were measured in the same rounds.

    rates  clips/s by round        equal  the keys at one ratio        native  the keys at the strategies' own ratios
    """
    headline: dict[str, str] = {}
    results: dict[str, Any] = {"paper": PAPER_RATIO, "wall_clock_to_mgm": {}, "of_ceiling": {}}
    for title, keys in (("one ratio", equal), ("own ratios", native)):
        strategies = [key for key in keys if key[0] != CEILING]
        mgm = next(rates[key] for key in strategies if key[0] == "mgm")
        for name, ratio in strategies:
            if name.startswith("tgm"):
                # For the same number of clips, wall clock is the inverse of clips/s.
                spread = spread_of(ratios(mgm, rates[name, ratio]))
                results["wall_clock_to_mgm"][f"{name}, {title}"] = spread
                headline[f"wall clock {name} / mgm, {title}"] = (
                    f"{spread['median']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"
                    + f"; the paper's: {PAPER_RATIO:.3f}" * (keys is equal)
                )
        shares = {f"{n}, γ {r}": spread_of(ratios(rates[n, r], rates[CEILING, r])) for n, r in strategies}
        results["of_ceiling"] |= shares
        headline[f"share of the ceiling, {title}"] = "; ".join(
            f"{name}: {share['median']:.0%}" for name, share in shares.items()
        )
    if with_hours:
        hours = {f"{name}, γ {ratio}": ssv2_hours(median(values)) for (name, ratio), values in rates.items()}
        results["projected_hours"] = hours
        headline["SSv2, 200 epochs, hours"] = "; ".join(f"{name}: {value:,.1f}" for name, value in hours.items())
    return headline, results


def ssv2_hours(clips_per_s: float) -> float:
    """Return the hours of 200 epochs on SSv2's training videos."""
    return SSV2_VIDEOS * EPOCHS / clips_per_s / 3600


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(values, others, strict=True)]
