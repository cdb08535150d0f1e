"""The programs some tests need: found, named, or missing in loud words; a failure in CI."""

import sys

import pytest

from scripts import ffprobe, packages
from scripts import test as test_command


@pytest.fixture
def nothing_may_be_installed(monkeypatch):
    monkeypatch.setattr(packages, "may_install", lambda: False)


def test_a_named_ffprobe_is_taken_and_a_wrong_name_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("FRAME_MEMORY_FFPROBE", sys.executable)
    assert ffprobe.find() == sys.executable == ffprobe.find_or_install(pytest.fail)
    monkeypatch.setenv("FRAME_MEMORY_FFPROBE", str(tmp_path / "gone"))
    assert ffprobe.find() is None and ffprobe.find_or_install(pytest.fail) is None


def test_missing_programs_are_told_loudly_and_stop_ci(monkeypatch, capsys, nothing_may_be_installed):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FRAME_MEMORY_FFPROBE", raising=False)
    monkeypatch.setenv("FRAME_MEMORY_CHROMIUM", sys.executable)
    environment = {}
    assert not test_command.find_programs(environment)
    assert environment == {"FRAME_MEMORY_CHROMIUM": sys.executable}
    assert "NO FFPROBE FOUND" in (told := capsys.readouterr().err) and "FRAME_MEMORY_FFPROBE" in told
