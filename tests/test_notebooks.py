"""Every committed notebook keeps the form of the study, and its tagged facts are compared by nbval."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from small import process

from harmonize_lib import paths
from harmonize_lib.parameters import NOTEBOOKS, parameters_cell

BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(paths.NOTEBOOKS.glob("*.ipynb"))}


def tagged(name, tag):
    return [cell for cell in BOOKS[name].cells if tag in cell.metadata.get("tags", [])]


def test_notebooks_parameters_and_figures_have_the_same_names():
    assert list(BOOKS) == sorted(NOTEBOOKS)
    folders = {path for path in (paths.ROOT / "figures").iterdir() if path.is_dir()}
    others = {path for path in folders if path.name not in (*BOOKS, "checks")}  # checks: figures of scripts in tests/
    assert {path.name for other in others for path in other.iterdir()} <= set(BOOKS)  # runs on other data


@pytest.mark.parametrize("name", BOOKS)
def test_a_valid_notebook_on_the_kernel_python3(name):
    nbformat.validate(BOOKS[name])
    assert BOOKS[name].metadata.kernelspec.name == "python3"
    identifiers = [cell.id for cell in BOOKS[name].cells]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("name", BOOKS)
def test_one_parameters_cell_the_first_of_code_and_the_generated_one(name):
    (cell,) = tagged(name, "parameters")
    code = [cell for cell in BOOKS[name].cells if cell.cell_type == "code"]
    assert cell is code[0] and cell.source == parameters_cell(name)
    assert tagged(name, "injected-parameters") == []
    assert f'study.start("{name}", globals())' in code[1].source


@pytest.mark.parametrize("name", BOOKS)
def test_it_begins_with_a_title_and_holds_a_tagged_fact(name):
    first = BOOKS[name].cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    facts = tagged(name, "nbval-check-output")
    assert facts and all(cell.cell_type == "code" for cell in facts)


@pytest.mark.parametrize("name", BOOKS)
def test_tagged_facts_are_words_that_repeat(name):
    """Printed text alone, without addresses or raw floats."""
    for cell in tagged(name, "nbval-check-output"):
        for output in cell.outputs:
            assert output.output_type == "stream" and output.name == "stdout"
            for word in output.text.split():
                digits = word.strip("[](),;:").partition(".")[2]
                assert len(digits) <= 6 and "0x" not in word


@pytest.mark.parametrize("name", BOOKS)
def test_cells_are_short(name):
    code = [cell for cell in BOOKS[name].cells if cell.cell_type == "code" and cell not in tagged(name, "parameters")]
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line and not line.startswith(("import ", "from "))]
        assert len(lines) <= 14, cell.source


@pytest.mark.parametrize("name", BOOKS)
def test_outputs_hold_no_warnings_errors_or_progress_bars(name):
    for cell in BOOKS[name].cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


def fact_notebook(committed):
    """A committed notebook with one fact, one figure-like cell that is not compared, and their outputs."""
    fact = new_code_cell('print("met: 2 models of 2")', id="fact", metadata={"tags": ["nbval-check-output"]})
    fact.outputs, fact.execution_count = [new_output("stream", name="stdout", text=committed)], 2
    loose = new_code_cell("print(object())", id="loose", execution_count=1)
    loose.outputs = [new_output("stream", name="stdout", text="<object object at 0x1>\n")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=[new_markdown_cell("# Facts", id="title"), loose, fact], metadata=kernel)


@pytest.mark.parametrize(("committed", "passes"), [("met: 2 models of 2\n", True), ("NOT met: 2 models of 2\n", False)])
def test_nbval_fails_when_a_committed_fact_is_changed(committed, passes, tmp_path):
    nbformat.write(fact_notebook(committed), tmp_path / "facts.ipynb")
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "600", "-p", "no:cacheprovider"]
    done = process("pytest", *options, "facts.ipynb", cwd=tmp_path)
    assert (done.returncode == 0) is passes, done.stdout
    assert ("2 passed" if passes else "1 failed, 1 passed") in done.stdout
