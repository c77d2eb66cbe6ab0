"""A notebook of the study in miniature: the same cells in the same order, with two models and four images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from harmonize_lib import paths
from harmonize_lib.parameters import parameters_cell

NAME = "03_feature_images"
FEW = {"n_images": 4, "models": ["resnet-obj", "vgg-obj"], "methods": ["saliency"]}

START = f"""import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display

from harmonize_lib import claims, statistics, study

run = study.start("{NAME}", globals())"""
FIGURE = """maps = study.all_maps(run.models, run.dataset, run.settings.methods)
table = pd.DataFrame({"model": [name for name, _ in maps], "mean": [float(m.mean()) for m in maps.values()]})
figure, ax = plt.subplots(figsize=(2, 2))
ax.bar(table["model"], table["mean"])
study.save(run, figure, table, "means")
plt.show()"""
VERDICT = """ledger = claims.write_claims(run.folder, {"selectivity": statistics.Interval(-0.2, -0.3, -0.1, 4)})
display(Markdown(claims.in_words(ledger)))"""
FACT = """print("met" if len(table) == 2 else "NOT met", "two models")"""


def cell_of(values: dict[str, object]) -> str:
    """The parameters cell with other defaults."""
    lines = parameters_cell(NAME).splitlines()
    names = [line.partition(":")[0] for line in lines]
    for name, value in values.items():
        place = names.index(name)
        lines[place] = f"{name}: {type(value).__name__} = {value!r}"
    return "\n".join(lines)


def notebook(*extra: str, parameters: str | None = None) -> nbformat.NotebookNode:
    """Title, parameters, start, figure, verdict, tagged fact, and what else a test wants below the start."""
    cells = [
        new_markdown_cell("# In miniature", id="title"),
        new_code_cell(
            cell_of(FEW) if parameters is None else parameters, id="parameters", metadata={"tags": ["parameters"]}
        ),
        new_code_cell(START, id="start"),
        *[new_code_cell(source, id=f"extra-{i}") for i, source in enumerate(extra)],
        new_code_cell(FIGURE, id="figure"),
        new_code_cell(VERDICT, id="verdict"),
        new_code_cell(FACT, id="fact", metadata={"tags": ["nbval-check-output"]}),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=kernel)


def process(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module, or harmonize, in its own process, with figures and cache where the test wants them."""
    program = ["-c", "from harmonize_lib.cli import main; main()"] if command[0] == "harmonize" else ["-m", command[0]]
    settings = {"PYTHONPATH": str(paths.ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *program, *command[1:]],
        cwd=cwd,
        env={**os.environ, **settings, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def execute_in_place(path: Path, **variables: str) -> None:
    """As ``make notebooks`` does it."""
    options = ["--to", "notebook", "--execute", "--inplace", "--ExecutePreprocessor.record_timing=False"]
    done = process("jupyter", "nbconvert", "--log-level", "WARN", *options, str(path), cwd=path.parent, **variables)
    assert done.returncode == 0, done.stderr
