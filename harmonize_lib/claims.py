"""The claims ledger: criteria stated before the run, verdicts computed by them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harmonize_lib.errors import unknown
from harmonize_lib.statistics import Interval
from harmonize_lib.storage import write_atomic

REPRODUCED, PARTLY, NOT, UNTESTABLE = "reproduced", "partly", "not reproduced", "not testable here"
COLUMNS = ("id", "source", "reported", "measured", "criterion", "estimate", "low", "high", "n", "verdict", "notebook")


class Claim(NamedTuple):
    """A claim with the rule that judges it; ``judge`` sees the interval alone."""

    source: str
    reported: str
    measured: str
    criterion: str
    judge: Callable[[Interval], str]


def _above(full: float, part: float) -> Callable[[Interval], str]:
    return lambda i: REPRODUCED if i.low > full else PARTLY if i.low > part else NOT


def _positive(i: Interval) -> str:
    return REPRODUCED if i.low > 0 else PARTLY if i.mean > 0 else NOT


def _negative(i: Interval) -> str:
    return REPRODUCED if i.high < 0 else PARTLY if i.mean < 0 else NOT


SIGN = "reproduced: the 95 % interval lies {side} 0; partly: only the mean does; else not reproduced"
KADIR = "Kadir et al. 2023"
PROJECT = "this project's question"
AUDIT = "Explainability sanity audit (BaurothM)"

CLAIMS: dict[str, Claim] = {
    "transfer": Claim(
        KADIR,
        "Feature attributions can serve as feature detectors across architectures (abstract; no number given)",
        "relative transfer ρ between different architectures, mean over pairs and methods",
        "reproduced: lower bound > 0.5; partly: lower bound > 0; else not reproduced",
        _above(0.5, 0.0),
    ),
    "inconsistency": Claim(
        KADIR,
        "Maps of CNNs and vision transformers trained on the same data are inconsistent (author's summary)",
        "Spearman between architectures minus Spearman between two seeds of one architecture",
        SIGN.format(side="below"),
        _negative,
    ),
    "selectivity": Claim(
        KADIR,
        "Coarse-resolution methods have low spatial selectivity (as citing work reports it)",
        "spatial selectivity of Grad-CAM minus the mean of the gradient methods",
        SIGN.format(side="below"),
        _negative,
    ),
    "family": Claim(
        PROJECT,
        "Features travel better inside a family (CNN, transformer) than across",
        "family advantage: mean ρ within minus across",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_detects": Claim(
        KADIR,
        "Features can be harmonized across architectures trained on the same data (abstract; no number given)",
        "recognition by a held-out architecture: consensus of the others minus a random single other model",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_beats_best": Claim(
        PROJECT,
        "The consensus of others beats the best single other model on a held-out architecture",
        "recognition by a held-out architecture: consensus of the others minus the best single other model",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_beats_own": Claim(
        PROJECT,
        "The consensus of others finds features a held-out architecture recognizes better than its own map's",
        "recognition by a held-out architecture: consensus of the others minus its own map",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_localizes": Claim(
        KADIR,
        "Harmonized attributions improve interpretability (abstract; no number given)",
        "relevance rank against the object mask: consensus of the others minus the held-out model's own map",
        SIGN.format(side="above"),
        _positive,
    ),
    "pool_size": Claim(
        PROJECT,
        "A larger pool makes a better consensus",
        "recognition by a held-out architecture: full pool minus pools of two",
        SIGN.format(side="above"),
        _positive,
    ),
    "detectors": Claim(
        KADIR,
        "Attributions work as feature detectors (abstract; no number given)",
        "relevance rank against the object mask: best method minus the best of center, edges and random",
        SIGN.format(side="above"),
        _positive,
    ),
    "sanity_weights": Claim(
        PROJECT,
        "Maps depend on the weights: randomizing all of them changes every method's maps more than training from "
        "another seed does",
        "Spearman with the maps of a second seed minus with those of the randomized model, for the method where it is "
        "least",
        SIGN.format(side="above"),
        _positive,
    ),
    "sanity_labels": Claim(
        PROJECT,
        "Maps depend on the labels: a model that memorized random labels has other maps than one trained from another "
        "seed, by every method",
        "Spearman with the maps of a second seed minus with those of the model of random labels, for the method where "
        "it is least",
        SIGN.format(side="above"),
        _positive,
    ),
    "sanity_floor": Claim(
        AUDIT,
        "Integrated gradients never reach the floor under cascading randomization (Spearman at its end 0.345, 0.389, "
        "0.375 for ResNet50, ViT-B/16, MobileViT-S on ImageNet)",
        "Spearman of integrated gradients before and after all weights are randomized, mean over architectures",
        "reproduced: lower bound > 0.1; partly: lower bound > 0; else not reproduced",
        _above(0.1, 0.0),
    ),
    "harmonized_sanity": Claim(
        PROJECT,
        "Harmonized maps pass the checks of weights and labels by every method",
        "Spearman with the consensus of second seeds minus with the consensus of destroyed models, for the method and "
        "check where it is least",
        SIGN.format(side="above"),
        _positive,
    ),
    "harmonized_sharpens": Claim(
        PROJECT,
        "Harmonizing sharpens the check of weights rather than dulling it",
        "the difference of sanity_weights for harmonized maps minus the mean of their members, mean over methods",
        SIGN.format(side="above"),
        _positive,
    ),
}


def write_claims(folder: Path, measured: Mapping[str, Interval]) -> pd.DataFrame:
    """Judge what a notebook measured and write its part of the ledger.

    Parameters
    ----------
    folder : Path
        The notebook's folder of figures.
    measured : Mapping[str, Interval]
        Claim id to what was measured.

    Returns
    -------
    pd.DataFrame
        One row per claim, columns ``COLUMNS``.

    Raises
    ------
    HarmonizeError
        A claim that is not in ``CLAIMS``.
    """
    rows = []
    for name, interval in measured.items():
        if name not in CLAIMS:
            raise unknown("claim", name, CLAIMS)
        claim = CLAIMS[name]
        verdict = claim.judge(interval) if interval.n > 0 and not math.isnan(interval.mean) else UNTESTABLE
        numbers = [f"{value:.4f}" for value in interval[:3]]
        rows.append([name, *claim[:4], *numbers, int(interval.n), verdict, folder.name])
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_atomic(folder / "claims.csv", table.to_csv(index=False, lineterminator="\n"))
    return table


def gather_claims(figures: Path) -> pd.DataFrame:
    """Read every notebook's claims.

    Parameters
    ----------
    figures : Path
        The figures folder.

    Returns
    -------
    pd.DataFrame
        The ledger as text, in the order of the notebooks.
    """
    parts = [pd.read_csv(path, dtype=str) for path in sorted(figures.glob("*/claims.csv"))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))


def merge_claims(figures: Path) -> pd.DataFrame:
    """Gather every notebook's claims into ``claims.csv`` of the figures folder.

    Parameters
    ----------
    figures : Path
        The figures folder.

    Returns
    -------
    pd.DataFrame
        The ledger, in the order of the notebooks.
    """
    table = gather_claims(figures)
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    write_atomic(figures / "claims.csv", buffer.getvalue())
    return table


def in_words(ledger: pd.DataFrame) -> str:
    """Say a notebook's part of the ledger as a list.

    Parameters
    ----------
    ledger : pd.DataFrame
        From :func:`write_claims`.

    Returns
    -------
    str
        Markdown, one line per claim.
    """
    return "\n".join(
        f"- **{row.verdict}**: {row.reported}. Measured: {row.measured}, {row.estimate} [{row.low}, {row.high}], "
        f"n = {row.n}. Criterion: {row.criterion}."
        for row in ledger.itertuples()
    )


def update_readme(readme: Path, ledger: pd.DataFrame) -> None:
    """Draw the ledger between the marks ``<!-- claims -->`` of the README.

    Parameters
    ----------
    readme : Path
        The file.
    ledger : pd.DataFrame
        From :func:`merge_claims`.
    """
    rows = [
        f"| {row.source}: {row.reported} | {row.measured} | {row.estimate} [{row.low}, {row.high}], n = {row.n} | "
        f"**{row.verdict}** | {row.notebook[:2]} |"
        for row in ledger.itertuples()
    ]
    table = [
        "| claim | measured here | estimate [95 % interval] | verdict | notebook |",
        "|---|---|---|---|---|",
        *rows,
    ]
    before, mark, rest = readme.read_text().partition("<!-- claims -->\n")
    _, end, after = rest.partition("<!-- /claims -->")
    write_atomic(readme, "".join([before, mark, "\n".join(table), "\n", end, after]))
