"""`harmonize verify` finds every way in which a figure or an output is not what it says it is."""

from __future__ import annotations

import json
import shutil

import nbformat
import pandas as pd
import pytest
from determinism import compare
from small import FEW, NAME, START, cell_of, execute_in_place, notebook, process

from harmonize_lib import cli, paths
from harmonize_lib.claims import merge_claims
from harmonize_lib.storage import sha256_bytes
from harmonize_lib.verify import verify

FIGURE = f"{NAME}/means"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A notebook run as `make notebooks` runs it, with its figures."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "notebooks").mkdir()
    path = folder / "notebooks" / f"{NAME}.ipynb"
    nbformat.write(notebook(), path)
    execute_in_place(path, HARMONIZE_FIGURES=str(folder / "figures"))
    merge_claims(folder / "figures")
    return folder


@pytest.fixture
def place(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def problems(place):
    return verify(place / "figures", place / "notebooks")[0]


def edit(place, change):
    path = place / "notebooks" / f"{NAME}.ipynb"
    book = nbformat.read(path, as_version=4)
    change({cell.id: cell for cell in book.cells})
    nbformat.write(book, path)


def test_a_whole_run_has_no_problems(place):
    found, summary = verify(place / "figures", place / "notebooks")
    assert found == []
    assert summary.startswith("1 figures of 1 notebooks") and "every file is what its provenance says" in summary


@pytest.mark.parametrize("ending", ["csv", "png", "svg"])
def test_an_edited_file(place, ending):
    path = place / "figures" / f"{FIGURE}.{ending}"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    assert problems(place) == [f"{FIGURE}.{ending}: changed after the run that made it (sha256 differs)"]


@pytest.mark.parametrize("ending", ["csv", "png", "svg"])
def test_a_missing_file(place, ending):
    (place / "figures" / f"{FIGURE}.{ending}").unlink()
    assert problems(place) == [f"{FIGURE}.{ending}: missing"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", '{"sha256": 3}'])
def test_a_missing_or_damaged_sidecar(place, text):
    path = place / "figures" / f"{FIGURE}.json"
    path.unlink() if text is None else path.write_text(text)
    found = problems(place)
    assert f"{FIGURE}.json: missing or damaged: the figure was not finished" in found


def test_an_incomplete_sidecar(place):
    path = place / "figures" / f"{FIGURE}.json"
    record = json.loads(path.read_text())
    del record["weights"], record["sha256"]["png"]
    path.write_text(json.dumps(record))
    assert f"{FIGURE}.json: lacks weights, sha256 of png" in problems(place)


def test_a_figure_taken_from_elsewhere(place):
    for ending in ("csv", "png", "svg", "json"):
        shutil.copy(place / "figures" / f"{FIGURE}.{ending}", place / "figures" / NAME / f"other.{ending}")
    assert problems(place) == [f"{NAME}/other.json: belongs to {FIGURE}"]


def test_swapped_weights(place, tmp_path, monkeypatch):
    entries = json.loads((paths.WEIGHTS / "manifest.json").read_text())
    kept = {name: entries[name] for name in ("resnet-obj", "vgg-obj")}
    for entry in kept.values():
        shutil.copy(paths.WEIGHTS / entry["file"], tmp_path)
    other = (paths.WEIGHTS / entries["resnet-obj-s1"]["file"]).read_bytes()
    (tmp_path / "resnet-obj.safetensors").write_bytes(other)
    (tmp_path / "manifest.json").write_text(json.dumps(kept))
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path)
    told = f"{FIGURE}: made with other weights of resnet-obj than those that ship now"
    stale = f"{NAME}: stale outputs: code cell 3 was run with other weights of resnet-obj"
    found = problems(place)
    assert found[0].startswith("weights of resnet-obj: resnet-obj.safetensors is missing or not the file")
    assert told in found and any(line.startswith(stale) for line in found) and len(found) == 3

    kept["resnet-obj"]["sha256"] = sha256_bytes(other)  # a manifest that was swapped with them does not help
    (tmp_path / "manifest.json").write_text(json.dumps(kept))
    found = problems(place)
    assert told in found and any(line.startswith(stale) for line in found) and len(found) == 2


def test_a_sidecar_that_says_other_parameters(place):
    path = place / "figures" / f"{FIGURE}.json"
    record = json.loads(path.read_text())
    record["parameters"]["n_images"] = 5
    path.write_text(json.dumps(record))
    assert problems(place) == [f"{FIGURE}: made with n_images = 5, the notebook says 4"]


def test_figures_of_a_run_with_other_parameters(place, tmp_path):
    path = place / "notebooks" / f"{NAME}.ipynb"
    done = process(
        *("papermill", str(path), str(tmp_path / "out.ipynb"), "-p", "n_images", "6", "--log-level", "ERROR"),
        cwd=tmp_path,
        HARMONIZE_FIGURES=str(place / "figures"),
    )
    assert done.returncode == 0, done.stderr
    assert problems(place) == [f"{FIGURE}: made with n_images = 6, the notebook says 4"]
    shutil.copy(tmp_path / "out.ipynb", path)  # the papermill output itself says with what it was run
    assert problems(place) == []


def test_parameters_that_do_not_pass(place):
    edit(place, lambda cells: cells["parameters"].update(source=cell_of(FEW | {"n_images": 1})))
    (line,) = problems(place)
    assert line.startswith(f"{NAME}: parameter 'n_images'") and len(line) <= 250


@pytest.mark.parametrize("source", ["n_images = 2 * 2", "import os", "n_images += 1", "n_images ="])
def test_a_parameters_cell_that_computes(place, source):
    edit(place, lambda cells: cells["parameters"].update(source=source))
    assert problems(place) == [f"{NAME}: {NAME}.ipynb: the parameters cell may only assign literals: name = value"]


@pytest.mark.parametrize("cell", ["start", "figure"])
def test_code_changed_after_the_run(place, cell):
    edit(place, lambda cells: cells[cell].update(source=cells[cell].source + "\nplt.close('all')"))
    number = {"start": 3, "figure": 3}[cell]
    assert problems(place) == [
        f"{NAME}: stale outputs: code cell {number} or one above it changed after the run: make notebooks runs 03 anew",
        f"{FIGURE}: made by other code than the notebook holds now",
    ]


def test_a_verdict_changed_after_the_run_leaves_the_figures_good(place):
    edit(place, lambda cells: cells["verdict"].update(source=cells["verdict"].source.replace("-0.1,", "0.1,")))
    (line,) = problems(place)
    assert line.startswith(f"{NAME}: stale outputs: code cell 4 ")


def test_figures_made_anew_by_changed_code_do_not_hide_stale_outputs(place, tmp_path):
    path = place / "notebooks" / f"{NAME}.ipynb"
    edit(place, lambda cells: cells["figure"].update(source=cells["figure"].source.replace("(2, 2)", "(3, 2)")))
    done = process(
        *("papermill", str(path), str(tmp_path / "out.ipynb"), "--log-level", "ERROR"),
        cwd=tmp_path,
        HARMONIZE_FIGURES=str(place / "figures"),
    )
    assert done.returncode == 0, done.stderr
    (line,) = problems(place)
    assert line.startswith(f"{NAME}: stale outputs: code cell 3 ")
    shutil.copy(tmp_path / "out.ipynb", path)
    assert problems(place) == []


def test_a_notebook_run_in_part_or_not_at_all(place):
    edit(place, lambda cells: cells["verdict"].update(execution_count=None, outputs=[]))
    (line,) = problems(place)
    assert line.startswith(f"{NAME}: code cell 4 was not run, or not in order")
    edit(place, lambda cells: [cell.update(outputs=[]) for cell in cells.values() if cell.cell_type == "code"])
    (line,) = problems(place)
    assert line.startswith(f"{NAME}: committed without outputs")


def test_outputs_and_figures_from_before_stamps_are_one_line_each(place):
    edit(place, lambda cells: [output.metadata.clear() for output in cells["figure"].outputs])
    path = place / "figures" / f"{FIGURE}.json"
    record = json.loads(path.read_text())
    del record["code"], record["timed"]
    path.write_text(json.dumps(record))
    assert problems(place) == [
        f"{NAME}: its outputs do not say which code made them: make notebooks runs 03 anew",
        f"{NAME}: 1 figures do not record the code that made them: harmonize run 03",
    ]


def test_an_edited_claim(place):
    for path in (place / "figures" / NAME / "claims.csv", place / "figures" / "claims.csv"):
        path.write_text(path.read_text().replace(",-0.2000,", ",-0.9000,"))
    assert problems(place) == [f"{NAME}/claims.csv: changed after the run that made it (sha256 differs)"]


def test_an_edited_ledger(place):
    path = place / "figures" / "claims.csv"
    path.write_text(path.read_text().replace("reproduced,03", "partly,03"))
    assert problems(place) == ["claims.csv: is not what the notebooks' claims add up to: harmonize run"]


def test_the_ledger_in_notebook_13_is_that_of_the_figures(place):
    kept = place / "figures" / "13_reality_checks" / "claims_ledger.csv"
    kept.parent.mkdir()
    shutil.copy(place / "figures" / "claims.csv", kept)
    line = "13_reality_checks/claims_ledger.csv: is not the ledger claims.csv: harmonize run 13"
    assert line not in problems(place)
    kept.write_text(kept.read_text().replace("reproduced,03", "partly,03"))
    assert line in problems(place)


def test_a_criterion_changed_after_the_run(place):
    path = place / "figures" / NAME / "claims.csv"
    table = pd.read_csv(path, dtype=str).assign(criterion="reproduced: always")
    path.write_text(table.to_csv(index=False))
    (path.parent / "claims.sha256").write_text(f"{sha256_bytes(path.read_bytes())}  claims.csv\n")
    merge_claims(place / "figures")
    assert problems(place) == [
        f"{NAME}/claims.csv: claim selectivity was judged by other words than it has now: harmonize run 03"
    ]


def test_a_run_on_other_data_is_compared_with_its_provenance_alone(place):
    shutil.copytree(place / "figures" / NAME, place / "figures" / "photographs" / NAME)
    (place / "figures" / "photographs" / "claims.csv").write_text("id\n")
    found, summary = verify(place / "figures", place / "notebooks")
    assert found == [] and summary.endswith("1 figures of other runs hold what their provenance says")
    (place / "figures" / "photographs" / f"{FIGURE}.csv").write_text("edited\n")
    assert problems(place) == [f"photographs/{NAME}/means.csv: changed after the run that made it (sha256 differs)"]


def test_figures_without_a_notebook_and_a_notebook_without_figures(place):
    (place / "figures" / "99_gone").mkdir()
    shutil.rmtree(place / "figures" / NAME)
    (place / "figures" / "claims.csv").unlink()
    assert problems(place) == [
        f"{NAME}: no figures: harmonize run 03",
        "99_gone: there is no notebook 99_gone.ipynb for these figures: restore it or remove them",
    ]


def test_the_command_says_one_line_per_problem_and_exits_1(place, monkeypatch, capsys):
    (place / "figures" / f"{FIGURE}.svg").unlink()
    monkeypatch.setattr(paths, "FIGURES", place / "figures")
    monkeypatch.setattr(paths, "NOTEBOOKS", place / "notebooks")
    monkeypatch.setattr("sys.argv", ["harmonize", "verify"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert err.splitlines() == [f"{FIGURE}.svg: missing"]
    assert out.splitlines()[-1].endswith("1 problem")


def test_start_of_the_miniature_is_that_of_the_study():
    book = nbformat.read(paths.NOTEBOOKS / f"{NAME}.ipynb", as_version=4)
    assert any(START.splitlines()[-1] in cell.source for cell in book.cells)


def test_the_comparison_of_runs_finds_a_byte_and_leaves_timed_figures_out(place, tmp_path):
    first, second = place / "figures", shutil.copytree(place / "figures", tmp_path / "second")
    assert compare(first, second) == ([], [], 6)
    path = second / f"{FIGURE}.csv"
    path.write_text(path.read_text() + "\n")
    (second / f"{FIGURE}.svg").unlink()
    assert compare(first, second) == ([f"{FIGURE}.csv", f"{FIGURE}.svg"], [], 4)
    sidecar = second / f"{FIGURE}.json"
    sidecar.write_text(sidecar.read_text().replace('"timed": false', '"timed": true'))
    assert compare(first, second) == ([], [FIGURE], 3)


def test_what_is_wrong_with_several_figures_is_one_line(place):
    folder = place / "figures" / NAME
    record = json.loads((folder / "means.json").read_text())
    record["parameters"]["seed"] = 7
    (folder / "means.json").write_text(json.dumps(record))
    for ending in ("csv", "png", "svg"):
        shutil.copy(folder / f"means.{ending}", folder / f"other.{ending}")
    (folder / "other.json").write_text(json.dumps(record | {"figure": f"{NAME}/other"}))
    assert problems(place) == [f"{NAME}: 2 figures made with seed = 7, the notebook says 0"]
