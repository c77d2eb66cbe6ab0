"""The command as a user types it: real processes, real notebooks, and mistakes answered in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harmonize_lib import paths

SMALL = ["-p", "models=[resnet-obj, vgg-obj]", "-p", "methods=[saliency, integrated_gradients]", "-p", "n_images=10"]


def harmonize(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from harmonize_lib.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_run_writes_figures_elsewhere_and_from_any_folder(tmp_path):
    result = harmonize("run", "03", *SMALL, "--out", str(tmp_path / "figures"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    made = {path.stem for path in (tmp_path / "figures" / "03_feature_images").glob("*.json")}
    assert {"fractions", "patch_and_fill", "architectures", "selectivity"} <= made
    for name in made:
        told = json.loads((tmp_path / "figures" / "03_feature_images" / f"{name}.json").read_text())
        assert told["parameters"]["n_images"] == 10 and set(told["weights"]) == {"resnet-obj", "vgg-obj"}
    assert f"{len(made)} figures written" in result.stdout and "1 of 1 notebooks finished" in result.stdout


def test_a_failing_notebook_is_named_and_the_exit_code_says_so(tmp_path):
    models = "models=[resnet-obj, resnet-scene]"
    result = harmonize("run", "04", "-p", models, "-p", "n_images=10", "--out", str(tmp_path))
    assert result.returncode == 1
    assert "failed: 04_cross_architecture_transfer: " in result.stderr
    assert "'resnet-scene' knows other classes" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "07x"], "unknown notebook"),
        (["run", "04", "-p", "n_image=5"], "did you mean 'n_images'"),
        (["run", "04", "-p", "n_images=many"], "'n_images'"),
        (["run", "04", "-p", "n_images"], "write -p NAME=VALUE"),
        (["run", "04", "-p", "n_images=[1"], "no YAML"),
        (["run", "05", "-p", "rules=3"], "'rules'"),
        (["train", "resnet-object"], "no zoo name"),
        (["data", "shape-on-scenes"], "did you mean 'shapes-on-scenes'"),
        (["data", "imagefolder:no/such/folder"], "no such folder"),
        (["data", "--n", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, says):
    result = harmonize(*arguments)
    assert result.returncode == 2
    assert says in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and len(result.stderr.strip()) <= 211


def test_data_says_what_it_holds():
    result = harmonize("data", "--n", "100")
    assert result.returncode == 0 and "10 classes" in result.stdout and "images per class: 10 to 10" in result.stdout


def test_nothing_in_the_repository_was_touched_by_a_run_elsewhere(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in paths.ROOT.joinpath("figures").rglob("*") if path.is_file()}
    harmonize("run", "03", *SMALL, "--out", str(tmp_path))
    after = {path: path.stat().st_mtime_ns for path in paths.ROOT.joinpath("figures").rglob("*") if path.is_file()}
    assert before == after
