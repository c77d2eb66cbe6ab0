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


def _below(full: float) -> Callable[[Interval], str]:
    return lambda i: REPRODUCED if i.high < full else PARTLY if i.mean < full else NOT


def _positive(i: Interval) -> str:
    return REPRODUCED if i.low > 0 else PARTLY if i.mean > 0 else NOT


def _negative(i: Interval) -> str:
    return REPRODUCED if i.high < 0 else PARTLY if i.mean < 0 else NOT


SIGN = "reproduced: the 95 % interval lies {side} 0; partly: only the mean does; else not reproduced"
KADIR = "Kadir et al. 2023"
BAM = "Yang & Kim 2019"
PROJECT = "this project's question"

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
    "bam_grad_cam_contrast": Claim(
        BAM,
        "Grad-CAM has the highest model contrast score (as citing work reports it; no number at hand)",
        "MCS on ReLU CNNs: Grad-CAM minus the best other method, chosen on the other half of the images",
        SIGN.format(side="above"),
        _positive,
    ),
    "bam_smoothgrad_gradient": Claim(
        BAM,
        "SmoothGrad improves the gradient (as citing work reports it; its SmoothGrad squares the gradients)",
        "MCS on ReLU CNNs: SmoothGrad² minus saliency",
        SIGN.format(side="above"),
        _positive,
    ),
    "bam_smoothgrad_ig": Claim(
        BAM,
        "SmoothGrad improves integrated gradients (as citing work reports it)",
        "MCS on ReLU CNNs: IG + SmoothGrad minus integrated gradients",
        SIGN.format(side="above"),
        _positive,
    ),
    "bam_dependence": Claim(
        BAM,
        "Grad-CAM and the gradient have the fewest false positives on input dependence (as citing work reports it)",
        "false positives 1 − IDR on ReLU CNNs: mean of Grad-CAM and saliency minus mean of the other methods",
        SIGN.format(side="below"),
        _negative,
    ),
    "bam_independence": Claim(
        BAM,
        "All methods but Grad-CAM and the gradient have over 80 % false positives on input independence "
        "(as citing work reports it)",
        "false positives 1 − IIR on ReLU CNNs: the best of the other methods, chosen on the other half of the images",
        "reproduced: lower bound > 0.8; partly: lower bound > 0.5; else not reproduced",
        _above(0.8, 0.5),
    ),
    "bam_rankings": Claim(
        BAM,
        "Rankings of methods vary by metric (as citing work reports it)",
        "Kendall's W of MCS, IDR and IIR on the order of methods, on ReLU CNNs (1 is one order)",
        "reproduced: the 95 % interval lies below 0.7, the threshold of strong agreement; partly: only the estimate; "
        "else not reproduced",
        _below(0.7),
    ),
    "bam_relative": Claim(
        BAM,
        "Relative model contrast follows accuracy drop (correlation 0.92 for Grad-CAM, as a review reports it)",
        "Pearson correlation of Grad-CAM's RMCS with accuracy drop over commonality, mean over architectures",
        "reproduced: lower bound > 0.8; partly: lower bound > 0; else not reproduced",
        _above(0.8, 0.0),
    ),
    "harmonized_dependence": Claim(
        PROJECT,
        "Harmonizing lowers false positives on input dependence",
        "1 − IDR: consensus of the others minus its members, each under the same rule alone",
        SIGN.format(side="below"),
        _negative,
    ),
    "harmonized_independence": Claim(
        PROJECT,
        "Harmonizing lowers false positives on input independence",
        "1 − IIR: consensus of the others minus its members, each under the same rule alone",
        SIGN.format(side="below"),
        _negative,
    ),
    "harmonized_inherits": Claim(
        PROJECT,
        "Harmonizing inherits a shared shortcut: where all members were trained for scenes, the consensus neglects the "
        "object as they do",
        "share of the members' neglect (their MCS) that is left in the consensus (its MCS)",
        "reproduced: lower bound > 0.5; partly: lower bound > 0; else not reproduced",
        _above(0.5, 0.0),
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
    parts = [pd.read_csv(path, dtype=str) for path in sorted(figures.glob("*/claims.csv"))]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
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
