"""Profiles hold parameters of their notebooks, in a form papermill reads."""

from __future__ import annotations

import pytest
import yaml
from papermill.iorw import read_yaml_file

from harmonize_lib import paths
from harmonize_lib.parameters import NOTEBOOKS, check

FILES = sorted((paths.NOTEBOOKS / "profiles").glob("*/*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_profile_passes_the_checks_of_its_notebook_and_changes_something(path):
    values = yaml.safe_load(path.read_text())
    assert values == read_yaml_file(str(path))
    assert check(path.stem, values) != NOTEBOOKS[path.stem]()


def test_there_are_the_profiles_that_help_promises():
    assert {path.parent.name for path in FILES} == {"paper", "imagenet"}
