"""Nothing finished is lost: the real server is killed again and again, and the video ends bit for bit the same."""

import random
import re
import shutil
import time

import pytest

from frame_memory.journal import read_manifest
from frame_memory.journal.files import verify
from scripts import workflow

from .tiny import PICTURE_NAME, REPO, START_PICTURE, one

KILLS, SECTIONS, STEPS = 3, 12, 4
SELFTEST = REPO / "workflows" / "selftest.json"
FINISHED = re.compile(r"(\S+): section (\d+) is finished")


class Life:
    """One start of the server: the graph is queued, and killed or done."""

    def __init__(self, running_host, base, project: str):
        from scripts.server import Server

        self.server, self.project = Server(running_host, base), project
        self.folder = base / "output" / "frame_memory" / project
        self.before = len(self.server.log())
        self.server.start()

    def submit(self) -> str:
        client = self.server.client
        client.upload_image(START_PICTURE, PICTURE_NAME)
        prompt = workflow.to_api(workflow.read(SELFTEST), client.object_info())
        for class_type, values in (
            ("FrameMemoryAntiDriftSampler", {"seconds": SECTIONS * 1.2, "project": self.project}),
            ("FrameMemorySigmas", {"steps": STEPS}),
        ):
            one(prompt, class_type)[1]["inputs"].update(values)
        return client.submit(prompt)

    def finished(self) -> dict[int, str]:
        """Sections on disk, by index, with their hashes; every one must be whole."""
        if not (self.folder / "manifest.json").exists():
            return {}
        manifest = read_manifest(self.folder)
        for record in manifest.sections.values():
            assert verify(self.folder, record.file) is None
        return {index: record.file.sha256 for index, record in manifest.sections.items()}

    def said(self) -> list[int]:
        """Sections this life has finished, as its log tells, from 0."""
        return [int(n) - 1 for _, n in FINISHED.findall(self.server.log()[self.before :])]


def run_to_the_end(running_host, base, project: str) -> tuple[dict[int, str], list[int]]:
    life = Life(running_host, base, project)
    try:
        life.server.client.listen()
        life.server.client.wait(life.submit(), timeout=600)
    finally:
        life.server.stop()
    return life.finished(), life.said()


@pytest.mark.parametrize("seed", [20261121])
def test_fault_03_twenty_kills_of_the_real_server_lose_nothing(running_host, tmp_path, seed):
    rng, kills, number = random.Random(seed), 0, 0
    while kills < KILLS:  # a project that is done before the last kill makes room for another one
        number += 1
        base, project = tmp_path / f"base {number}", f"killed-{number}"
        kills, made = kill_until_done(running_host, base, project, rng, kills)
        shutil.rmtree(base / "output" / "frame_memory")  # else an uninterrupted run would find these sections
        whole, all_made = run_to_the_end(running_host, base, project)
        assert sorted(all_made) == list(range(SECTIONS))
        assert made == whole, "the resumed video differs from the uninterrupted one"


def kill_until_done(running_host, base, project: str, rng: random.Random, kills: int) -> tuple[int, dict[int, str]]:
    """Kill at random moments until all sections are there, or KILLS is reached; then run to the end."""
    known: dict[int, str] = {}
    base.mkdir()
    while kills < KILLS and len(known) < SECTIONS:
        life = Life(running_host, base, project)
        try:
            life.submit()
            time.sleep(rng.uniform(0.2, 3.0))
        finally:
            life.server.kill()
        kills += 1
        found = life.finished()
        assert known.items() <= found.items(), "a finished section was lost or made again"
        fresh = sorted(set(found) - set(known))
        assert fresh == list(range(len(known), len(found)))
        assert set(life.said()) <= set(fresh), "work was repeated"
        known = found
    made, said = run_to_the_end(running_host, base, project)
    assert known.items() <= made.items() and sorted(said) == list(range(len(known), SECTIONS))
    return kills, made
