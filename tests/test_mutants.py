"""The list of faults that `make mutants` tries fits the sources and the tests of today. Under a second."""

import json

import pytest

from mutants import faults
from mutants.run import RESULT

FAULTS = faults.read()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_can_be_tried(fault):
    assert fault.complaint() == ""


def test_every_fault_has_a_name_of_its_own():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)


def test_the_saved_result_is_of_this_list_and_nothing_survived():
    saved = json.loads(RESULT.read_text(encoding="utf-8"))["faults"]
    assert list(saved) == [fault.name for fault in FAULTS], "try the new ones: make mutants ARGS='--save --only NAME'"
    equivalent = {fault.name for fault in FAULTS if fault.equivalent}
    assert {name for name, found in saved.items() if found == "survived"} <= equivalent


def test_a_fault_that_cannot_be_tried_says_why():
    sound = {"name": "a", "file": "mlxeff/errors.py", "old": "class MlxeffError", "new": "class X", "breaks": ""}
    assert faults.Fault(**sound, tests=("test_mutants.py",)).complaint() == ""
    assert "wanted tests for a Python or Metal file" in faults.Fault(**sound).complaint()
    for change, reason in (
        ({"file": "mlxeff/no.py"}, "there is no file"),
        ({"old": "import"}, "found it"),
        ({"old": "x" * 99}, "found it 0 times"),
        ({"new": sound["old"]}, "the new text is the old one"),
        ({"tests": ("test_no.py",)}, "there is no test test_no.py"),
        ({"tests": ("test_mutants.py::test_no",)}, "there is no test test_mutants.py::test_no"),
    ):
        assert reason in faults.Fault(**{"tests": ("test_mutants.py",)} | sound | change).complaint()
