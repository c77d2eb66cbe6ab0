"""A notebook over a grid of parameters: one tidy table of all its results, and a figure of its claims."""

from __future__ import annotations

import itertools
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from matplotlib.figure import Figure

from harmonize_lib import paths
from harmonize_lib.claims import CLAIMS
from harmonize_lib.errors import HarmonizeError, unknown
from harmonize_lib.parameters import NOTEBOOKS, check
from harmonize_lib.storage import sha256_json

KEYS = ("notebook", "base", "grid")
ESTIMATE = ["mean", "low", "high", "n"]
MOST_PANELS = 6


class Sweep(NamedTuple):
    """What a sweep file asks for.

    Attributes
    ----------
    notebook : str
        A key of ``parameters.NOTEBOOKS``.
    grid : dict[str, list[Any]]
        Parameter to the values it takes.
    sets : list[dict[str, Any]]
        Every combination, with what is the same in all.
    """

    notebook: str
    grid: dict[str, list[Any]]
    sets: list[dict[str, Any]]

    def varied(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a parameter set that the grid varies.

        Parameters
        ----------
        values : Mapping[str, Any]
            One of ``sets``.

        Returns
        -------
        dict[str, Any]
            Parameter to value; lists as text, so that a table can hold them.
        """
        return {name: value if _plain(value := values[name]) else json.dumps(value) for name in self.grid}


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file and check every parameter set of it.

    Parameters
    ----------
    path : Path
        YAML with ``notebook`` (a name or number), ``grid`` (parameter: list of values) and, if wanted, ``base``
        (parameter: value, the same in all sets).

    Returns
    -------
    Sweep
        The sweep.

    Raises
    ------
    HarmonizeError
        No such file, no YAML, an unknown key, notebook or parameter, one given twice, or a value that will not do.
    """
    try:
        text = path.read_text(encoding="utf-8")
        told, twice = yaml.safe_load(text), _given_twice(text)
    except (OSError, UnicodeDecodeError) as error:
        raise HarmonizeError(f"sweep file {path.name} cannot be read: give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise HarmonizeError(f"{path.name} is no YAML: {str(error).splitlines()[0][:100]}") from error
    if not isinstance(told, dict):
        raise HarmonizeError(f"{path.name}: a sweep file holds notebook: and grid:, see harmonize sweep --help")
    if twice:
        raise HarmonizeError(f"{path.name}: {twice[:40]} is given twice, leave one out")
    for key in told:
        if key not in KEYS:
            raise unknown(f"key in {path.name}", key, KEYS)
    notebook = find_notebook(str(told.get("notebook", "")))
    base, grid = told.get("base") or {}, told.get("grid")
    if not isinstance(grid, dict) or not grid or not isinstance(base, dict):
        raise HarmonizeError(f"{path.name}: grid: must hold parameters with lists of values, and base: single values")
    as_json(base | grid)
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise HarmonizeError(f"{path.name}: grid: {str(name)[:40]} must be a list of values, e.g. [1, 2]")
        if name in base:
            raise HarmonizeError(f"{path.name}: {str(name)[:40]} stands in base: and in grid:, leave one out")
        if len({json.dumps(value) for value in values}) < len(values):
            raise HarmonizeError(f"{path.name}: grid: {str(name)[:40]} lists a value twice")
    if "output" in {*base, *grid}:
        raise HarmonizeError(f"{path.name}: output cannot be swept: choose the folder with --out")
    for name in {*base, *grid}:
        if name not in NOTEBOOKS[notebook].model_fields:
            raise unknown(f"parameter of {notebook}", name, NOTEBOOKS[notebook].model_fields)
    sets = [base | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for values in sets:
        check(notebook, values)
    return Sweep(notebook, grid, sets)


def _given_twice(text: str) -> str | None:
    """A key that a mapping of a YAML document holds twice, of which YAML would keep the last."""
    waiting, seen = [yaml.compose(text, yaml.SafeLoader)], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias may lead back
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            return str(max(keys, key=keys.count)[1])
        waiting += [value for _, value in node.value]
    return None


def find_notebook(name: str) -> str:
    """A notebook of the study by its number, name or path.

    Parameters
    ----------
    name : str
        E.g. ``"04"``, ``"04_cross_architecture_transfer"``, ``"notebooks/04_cross_architecture_transfer.ipynb"``.

    Returns
    -------
    str
        A key of ``NOTEBOOKS``.

    Raises
    ------
    HarmonizeError
        There is none, no such file, or a file that is not the repository's own.
    """
    path = Path(name)
    for notebook in NOTEBOOKS:
        if name == notebook or name.zfill(2) == notebook[:2]:
            return notebook
        if path.is_file() and path.resolve() == (paths.NOTEBOOKS / f"{notebook}.ipynb").resolve():
            return notebook
    if path.is_file():
        line = "is no notebook of this repository: give a name or number, or run your copy with papermill"
        raise HarmonizeError(f"{name[-80:]} {line}")
    if path.suffix == ".ipynb":
        raise HarmonizeError(f"no such notebook: {name[-100:]}: give its path, name or number")
    raise unknown("notebook", name, NOTEBOOKS)


def as_json(values: Mapping[str, Any]) -> None:
    """Check that values are what JSON can say, which is what papermill can inject.

    Parameters
    ----------
    values : Mapping[str, Any]
        Parameters.

    Raises
    ------
    HarmonizeError
        Names the parameter that is, say, a date or not a number.
    """
    for name, value in values.items():
        try:
            if json.loads(json.dumps(value, allow_nan=False)) != value:
                raise ValueError
        except (TypeError, ValueError):
            line = (
                f"parameter {str(name)[:40]!r}: {str(value)[:40]!r} is no JSON value: write a number, a text in quotes"
            )
            raise HarmonizeError(f"{line}, or a list") from None


def slug(values: Mapping[str, Any]) -> str:
    """A name for the folder of a parameter set.

    Parameters
    ----------
    values : Mapping[str, Any]
        What tells the set from others.

    Returns
    -------
    str
        Letters, digits and ``=.,_-`` only, not starting with a dot, unique by a hash of the values.
    """
    words = ",".join(f"{name}={value}" for name, value in values.items())
    return f"{re.sub(r'[^A-Za-z0-9=,_-]+', '.', words)[:60].strip('.')}-{sha256_json(dict(values))[:8]}"


def folder_of(out: Path, values: Mapping[str, Any]) -> Path:
    """Folder of a parameter set, inside the folder of the sweep.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    values : Mapping[str, Any]
        What tells the set from others.

    Returns
    -------
    Path
        A direct child of ``out``.

    Raises
    ------
    HarmonizeError
        Something there leads elsewhere.
    """
    folder = (out / slug(values)).resolve()
    if folder.parent != out.resolve():
        raise HarmonizeError(f"{folder.name} leads outside {out}: remove that link")
    return folder


def results(notebook: str, folders: Sequence[tuple[Mapping[str, Any], Path]]) -> pd.DataFrame:
    """Every estimate that the runs of a sweep measured, in one tidy table.

    Parameters
    ----------
    notebook : str
        The notebook.
    folders : Sequence[tuple[Mapping[str, Any], Path]]
        The varied parameters of each finished set with its folder.

    Returns
    -------
    pd.DataFrame
        One row per set and estimate: the parameters; ``result`` (``claims``, or the name of the figure's table);
        ``what`` (the claim, or the row's keys ``column=value``); ``mean``, ``low``, ``high``, ``n``; ``verdict`` (of
        claims, else empty).
    """
    parts = []
    for varied, folder in folders:
        for path in sorted((folder / notebook).glob("*.csv"), key=lambda path: (path.stem != "claims", path.stem)):
            table = pd.read_csv(path).rename(columns={"estimate": "mean"} if path.stem == "claims" else {})
            if not {*ESTIMATE} <= set(table):
                continue
            what = table["id"] if path.stem == "claims" else _keys_in_words(table)
            part = pd.DataFrame({"result": path.stem, "what": what, **{name: table[name] for name in ESTIMATE}})
            part["verdict"] = table.get("verdict", "")
            parts.append(pd.DataFrame([varied] * len(part)).join(part.reset_index(drop=True)))
    columns = ["result", "what", *ESTIMATE, "verdict"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def _keys_in_words(table: pd.DataFrame) -> pd.Series:
    """What each row of a summary is about: its texts, and what else it takes to tell the rows apart."""
    keys = list(table.select_dtypes(exclude="number"))
    for name in table.columns[: table.columns.get_loc("mean")]:
        if keys and not table.duplicated(keys).any():
            break
        if name not in keys:
            keys.append(name)
    rows = table[keys].fillna("").astype(str).to_dict("records")
    return pd.Series([", ".join(f"{key}={value}" for key, value in row.items() if value) for row in rows], dtype=str)


def draw(table: pd.DataFrame, grid: Mapping[str, Sequence[Any]], title: str) -> Figure:
    """Estimates with intervals over the parameter with the most values, one panel per claim.

    Parameters
    ----------
    table : pd.DataFrame
        From :func:`results`. Where a notebook judges no claims, the first rows of its first table are drawn.
    grid : Mapping[str, Sequence[Any]]
        The varied parameters with their values.
    title : str
        Above the panels.

    Returns
    -------
    Figure
        At most six panels; none for what no set could measure.
    """
    drawn = table[table["result"] == table["result"].iloc[0]]
    measured = drawn["what"][drawn["mean"].notna()]
    panels = list(dict.fromkeys(measured if len(measured) else drawn["what"]))
    along = max(grid, key=lambda name: len(grid[name]))
    others = [name for name in grid if name != along]
    values = list(dict.fromkeys(drawn[along]))
    lines = drawn[others].astype(str).apply(lambda row: ", ".join(f"{k} = {v}" for k, v in row.items()), axis=1)
    lines = lines if others else pd.Series("", index=drawn.index)
    names = list(dict.fromkeys(lines))
    colors = sns.color_palette("colorblind" if len(names) <= 10 else "husl", len(names))
    shown = panels[:MOST_PANELS]
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.6 * rows + 0.5), squeeze=False)
    for ax, panel in zip(axes.flat, shown, strict=False):
        for shift, (name, color) in enumerate(zip(names, colors, strict=True)):
            part = drawn[(drawn["what"] == panel) & (lines == name)]
            place = np.array([values.index(value) for value in part[along]]) + 0.5 * ((shift + 0.5) / len(names) - 0.5)
            error = np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy())
            ax.errorbar(
                place, part["mean"], yerr=error, fmt="o-", ms=3.5, lw=0.8, elinewidth=1.2, color=color, label=name
            )
        ax.axhline(0, color="0.3", lw=0.8)
        heading = CLAIMS[panel].measured if panel in CLAIMS else panel
        ax.set_title("\n".join(textwrap.wrap(heading, 40)), fontsize=7.5)
        ax.set(xlabel=along, xticks=range(len(values)), xlim=(-0.5, len(values) - 0.5))
        ax.set_xticklabels(["\n".join(textwrap.wrap(str(value), 24)) for value in values])
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("estimate (95 % interval)")
    rest = f"; {len(panels) - len(shown)} more in the table" if len(panels) > len(shown) else ""
    figure.suptitle(f"{title}{rest}", fontsize=9, fontweight="bold", x=0.01, ha="left")
    if others:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=6.5)
    return figure
