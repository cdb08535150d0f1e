"""CI is where nothing may be skipped, and one function says whether this is CI."""

import pytest

from scripts import host

from .source import REPO


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, False), ("", False), ("false", False), ("False", False), ("0", False), ("no", False), ("off", False),
     ("true", True), ("1", True), ("TRUE", True), ("yes", True), ("woodpecker", True)],
)  # fmt: skip
def test_ci_is_what_is_set_to_something_other_than_no(monkeypatch, value, expected):
    monkeypatch.delenv("CI", raising=False)
    if value is not None:
        monkeypatch.setenv("CI", value)
    assert host.in_ci() is expected


def test_nobody_else_reads_the_variable():
    asked = [p for folder in ("scripts", "tests") for p in (REPO / folder).rglob("*.py")]
    readers = [p.name for p in asked if '"CI"' in p.read_text(encoding="utf-8")]
    assert sorted(readers) == ["host.py", "test_ci.py"]


def test_the_ci_command_sets_it():
    lines = (REPO / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines.index("export CI=true") < next(i for i, line in enumerate(lines) if "scripts/test.py" in line)
