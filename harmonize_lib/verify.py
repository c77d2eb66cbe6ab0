"""Is every figure what its provenance says, and every notebook's output what its code gives?"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd

from harmonize_lib import parameters, paths, provenance
from harmonize_lib.claims import CLAIMS, ledger_text, readme_text
from harmonize_lib.errors import HarmonizeError
from harmonize_lib.models import manifest, shipped_hash
from harmonize_lib.storage import sha256_file, sha256_json

ENDINGS = ("csv", "png", "svg")
LEDGER_FIGURE = "13_reality_checks/claims_ledger.csv"
FIELDS = ("figure", "parameters", "weights", "sha256", "commit", "versions", "device", "seconds")


class Notebook(NamedTuple):
    """What a committed notebook says it was run with.

    Attributes
    ----------
    name : str
        Its name.
    cells : list[Any]
        Its code cells in order, without empty ones.
    parameters : dict[str, Any]
        ``parameters.recorded`` of its parameters cell, or of what papermill injected below it.
    codes : list[str]
        ``provenance.code_hash`` of everything up to each cell.
    """

    name: str
    cells: list[Any]
    parameters: dict[str, Any]
    codes: list[str]


def verify(figures: Path | None = None, notebooks: Path | None = None) -> tuple[list[str], str]:
    """Compare every figure with its provenance, its notebook and the shipped weights, and every notebook with itself.

    Parameters
    ----------
    figures : Path | None
        One folder per notebook, and folders of such folders that hold other runs; None takes ``paths.FIGURES``.
    notebooks : Path | None
        The notebooks that made them; None takes ``paths.NOTEBOOKS``.

    Returns
    -------
    tuple[list[str], str]
        One line per problem, and a summary.

    Notes
    -----
    A figure is stale when the code cells that had run when it was saved are not the first cells its notebook holds
    now, or when it was made with other parameters or weights. An output is stale when the stamp it carries, of the
    same three, is not what the notebook would leave now. Text that is printed carries no stamp; nbval compares the
    facts among it. Other runs are compared with their provenance alone.
    """
    figures, notebooks = figures or paths.FIGURES, notebooks or paths.NOTEBOOKS
    weights, problems = _shipped()
    others = [path for path in _folders(figures) if path.name not in parameters.NOTEBOOKS and _folders(path)]
    found = {path.stem for path in notebooks.glob("*.ipynb")} | {path.name for path in _folders(figures)}
    names = sorted(found - {path.name for path in others})
    count = {"figures": 0, "timed": 0, "unshipped": 0, "others": 0}
    for name in names:
        try:
            notebook = read_notebook(notebooks / f"{name}.ipynb")
        except HarmonizeError as error:
            problems.append(f"{name}: {error}")
            continue
        told, broken = _provenance(figures / name)
        problems += [f"{name}/{line}" for line in broken]
        problems += [f"{name}/{line}" for line in _claims(figures / name)]
        problems += [f"{name}: {line}" for line in _outputs(notebook, weights)]
        if not told:
            problems.append(f"{name}: no figures: harmonize run {name[:2]}")
        unknown_code = [figure for figure, record in told.items() if not record.get("code")]
        if unknown_code:
            line = f"{len(unknown_code)} figures do not record the code that made them"
            problems.append(f"{name}: {line}: harmonize run {name[:2]}")
        shared: dict[str, list[str]] = {}
        for figure, record in told.items():
            for line in _against(record, notebook, weights):
                shared.setdefault(line, []).append(figure)
            count["timed"] += bool(record.get("timed"))
            count["unshipped"] += bool(set(record["weights"]) - set(weights))
        for line, those in shared.items():
            problems.append(f"{name}/{those[0]}: {line}" if len(those) == 1 else f"{name}: {len(those)} figures {line}")
        count["figures"] += len(told)
    for folder in [path for other in sorted(others) for path in sorted(_folders(other))]:
        told, broken = _provenance(folder)
        problems += [f"{folder.parent.name}/{folder.name}/{line}" for line in (*broken, *_claims(folder))]
        count["others"] += len(told)
    problems += _ledger(figures)
    verdict = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    facts = [
        f"{count['figures']} figures of {len(names)} notebooks, {len(weights)} weights: "
        + (verdict if problems else "every file is what its provenance says"),
        f"{count['timed']} figures hold measured seconds and never repeat" if count["timed"] else "",
        f"{count['unshipped']} figures used models that do not ship" if count["unshipped"] else "",
        f"{count['others']} figures of other runs hold what their provenance says" if count["others"] else "",
    ]
    return problems, "; ".join(fact for fact in facts if fact)


def read_notebook(path: Path) -> Notebook:
    """Read what a notebook says of its own run.

    Parameters
    ----------
    path : Path
        The ``.ipynb``.

    Returns
    -------
    Notebook
        Cells, parameters, hashes.

    Raises
    ------
    HarmonizeError
        No such notebook, no notebook, not exactly one cell tagged ``parameters``, or parameters that do not pass.
    """
    if not path.is_file():
        raise HarmonizeError(f"there is no notebook {path.name} for these figures: restore it or remove them")
    try:
        book = nbformat.read(path, as_version=4)
    except Exception as error:
        raise HarmonizeError(f"{path.name} is not a readable notebook: restore it from the repository") from error
    if path.stem not in parameters.NOTEBOOKS:
        raise HarmonizeError(f"{path.name} is no notebook of the study: its parameters are not declared")
    cells = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
    tagged = {
        tag: [cell for cell in cells if tag in cell.metadata.get("tags", [])]
        for tag in ("parameters", "injected-parameters")
    }
    if len(tagged["parameters"]) != 1:
        raise HarmonizeError(f"{path.name} has {len(tagged['parameters'])} cells tagged 'parameters': it needs one")
    values: dict[str, Any] = {}
    for cell in tagged["parameters"] + tagged["injected-parameters"]:
        values |= assignments(cell.source, path.name)
    settings = parameters.check(path.stem, values)
    codes = [provenance.code_hash(cell.source for cell in cells[: i + 1]) for i in range(len(cells))]
    return Notebook(path.stem, cells, parameters.recorded(settings), codes)


def assignments(source: str, name: str) -> dict[str, Any]:
    """Values a parameters cell assigns, read without running it.

    Parameters
    ----------
    source : str
        Lines ``name = literal`` or ``name: type = literal``.
    name : str
        The notebook, for the message.

    Returns
    -------
    dict[str, Any]
        Name to value.

    Raises
    ------
    HarmonizeError
        Anything but such lines.
    """
    values = {}
    try:
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                raise ValueError("no assignment")
            target: Any = node.targets[0] if isinstance(node, ast.Assign) else node.target
            values[target.id] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError, AttributeError) as error:
        raise HarmonizeError(f"{name}: the parameters cell may only assign literals: name = value") from error
    return values


def _folders(figures: Path) -> list[Path]:
    return [path for path in figures.iterdir() if path.is_dir()] if figures.is_dir() else []


def _provenance(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Records of the figures of a folder, and what is wrong with their files."""
    told: dict[str, dict[str, Any]] = {}
    problems = []
    stems = {path.stem for path in folder.glob("*") if path.suffix[1:] in (*ENDINGS, "json") and path.stem != "claims"}
    for name in sorted(stems):
        try:
            record = json.loads((folder / f"{name}.json").read_text())
            lacking = [field for field in FIELDS if field not in record]
            lacking += [f"sha256 of {ending}" for ending in ENDINGS if ending not in record.get("sha256", ())]
        except (OSError, ValueError, TypeError, AttributeError):
            problems.append(f"{name}.json: missing or damaged: the figure was not finished")
            continue
        if lacking:
            problems.append(f"{name}.json: lacks {', '.join(lacking)}")
            continue
        if record["figure"] != f"{folder.name}/{name}":
            problems.append(f"{name}.json: belongs to {record['figure']}")
        for ending in ENDINGS:
            path = folder / f"{name}.{ending}"
            if not path.is_file():
                problems.append(f"{path.name}: missing")
            elif sha256_file(path) != record["sha256"][ending]:
                problems.append(f"{path.name}: changed after the run that made it (sha256 differs)")
        told[name] = record
    return told, problems


def _against(record: Mapping[str, Any], notebook: Notebook, weights: Mapping[str, str]) -> Iterator[str]:
    """What tells a figure from one that the notebook would make now."""
    given, wanted = record["parameters"], notebook.parameters
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            yield f"made with {name} = {_short(given.get(name))}, the notebook says {_short(wanted.get(name))}"
    for name, digest in record["weights"].items():
        if name in weights and weights[name] != digest:
            yield f"made with other weights of {name} than those that ship now"
    if record.get("code") and record["code"] not in notebook.codes:
        yield "made by other code than the notebook holds now"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 50 else f"{text[:47]}..."


def _outputs(notebook: Notebook, weights: Mapping[str, str]) -> Iterator[str]:
    """The first thing that shows a notebook's outputs not to be its own."""
    counts = [cell.execution_count for cell in notebook.cells]
    again = f"make notebooks runs {notebook.name[:2]} anew"
    if not any(cell.outputs for cell in notebook.cells):
        yield f"committed without outputs: {again}"
        return
    if counts != list(range(1, len(counts) + 1)):
        place = next(i for i, n in enumerate(counts) if n != i + 1)
        yield f"code cell {place + 1} was not run, or not in order: {again}"
        return
    stamps = []
    for place, cell in enumerate(notebook.cells):
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"code cell {place + 1} ended in an error: {again}"
            return
        found = [output.metadata.get(provenance.KEY) for output in cell.outputs if output.output_type == "display_data"]
        stamps += [(place, stamp) for stamp in found]
    if any(stamp is None for _, stamp in stamps):
        yield f"its outputs do not say which code made them: {again}"
        return
    for place, stamp in stamps:
        if stamp["code"] != notebook.codes[place]:
            yield f"stale outputs: code cell {place + 1} or one above it changed after the run: {again}"
            return
        if stamp["parameters"] != sha256_json(notebook.parameters):
            yield f"stale outputs: code cell {place + 1} was run with other parameters: {again}"
            return
        other = [name for name, digest in stamp["weights"].items() if weights.get(name, digest)[:12] != digest]
        if other:
            yield f"stale outputs: code cell {place + 1} was run with other weights of {other[0]}: {again}"
            return


def _claims(folder: Path) -> Iterator[str]:
    """Whether a notebook's part of the ledger is as it was written, by criteria that still stand."""
    path = folder / "claims.csv"
    if not path.is_file():
        return
    try:
        digest = (folder / "claims.sha256").read_text().split()[0]
    except (OSError, IndexError):
        yield f"claims.csv: has no checksum: harmonize run {folder.name[:2]}"
        return
    if sha256_file(path) != digest:
        yield "claims.csv: changed after the run that made it (sha256 differs)"
        return
    for row in pd.read_csv(path, dtype=str).itertuples():
        claim = CLAIMS.get(row.id)
        if claim is None or (row.source, row.reported, row.measured, row.criterion) != claim.said:
            line = f"claims.csv: claim {row.id} was judged by other words than it has now"
            yield f"{line}: harmonize run {folder.name[:2]}"


def _ledger(figures: Path) -> Iterator[str]:
    path = figures / "claims.csv"
    if not path.is_file():
        return
    if path.read_text() != ledger_text(figures):
        yield "claims.csv: is not what the notebooks' claims add up to: harmonize run"
    kept = figures / LEDGER_FIGURE
    if kept.is_file() and kept.read_bytes() != path.read_bytes():
        yield f"{LEDGER_FIGURE}: is not the ledger claims.csv: harmonize run {LEDGER_FIGURE[:2]}"
    readme = paths.ROOT / "README.md"
    if figures == paths.ROOT / "figures" and readme.is_file():
        text = readme.read_text()
        if text != readme_text(text, pd.read_csv(path, dtype=str)):
            yield "README.md: its claims are not those of figures/claims.csv: harmonize run"


def _shipped() -> tuple[dict[str, str], list[str]]:
    """Weights hash of every model of the zoo, and which files are not those of the manifest."""
    entries = manifest()
    problems = []
    for name, entry in entries.items():
        path = paths.WEIGHTS / entry["file"]
        if not path.is_file() or sha256_file(path) != entry["sha256"]:
            problems.append(f"weights of {name}: {path.name} is missing or not the file of the manifest")
    return {name: shipped_hash(name) for name in entries}, problems
