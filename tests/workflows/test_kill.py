"""Nothing finished is lost: the real server is killed again and again, and the video ends bit for bit the same.

Two projects are killed side by side, one of them with the VAE connected (the video is written while it is made) and
without ComfyUI's node cache. A third server, which knows nothing of them, makes the same video without interruption.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest

from frame_memory.journal import read_manifest
from frame_memory.journal.files import verify
from frame_memory.model import tensor_file
from frame_memory.video.segments import Segment, segment_problem
from scripts import workflow
from scripts.client import PromptError
from scripts.server import CPU_FLAGS, Server

from .tiny import PICTURE_NAME, REPO, START_PICTURE, one

KILLS, SECTIONS, STEPS = 10, 12, 2  # kills of each of the two projects
SELFTEST = REPO / "workflows" / "selftest.json"
FINISHED = re.compile(r": section (\d+) is finished")
NO_CACHE = (*CPU_FLAGS, "--cache-none")
PART = re.compile(r"\.part\d*(\.mp4)?$")
FOLDERS = ("", "sections", "takes", "segments")
LONGEST = 300  # seconds to wait for anything
SETTLING = 0.3  # seconds in which what a killed server has still sent is read


def graph(definitions: dict, project: str, live: bool, sections: int = SECTIONS) -> dict:
    """The self-test graph at some sections, whose latents are saved instead of a video."""
    prompt = workflow.to_api(workflow.read(SELFTEST), definitions)
    sampler, node = one(prompt, "FrameMemoryAntiDriftSampler")
    node["inputs"].update(seconds=sections * 1.2, project=project)
    if live:
        node["inputs"]["vae"] = [one(prompt, "VAELoader")[0], 0]
    one(prompt, "FrameMemorySigmas")[1]["inputs"].update(steps=STEPS)
    saver, _ = one(prompt, "FrameMemorySaveLongVideo")
    inputs = {"samples": [sampler, 0], "filename_prefix": project}
    prompt[saver] = {"class_type": "SaveLatent", "inputs": inputs, "_meta": {"title": "Save Latent"}}
    return prompt


class Life:
    """One start of the server of a base directory: a graph is queued, and the server killed or the graph done."""

    def __init__(self, running_host, base: Path, project: str, live: bool) -> None:
        self.project, self.live = project, live
        self.folder = base / "output" / "frame_memory" / project
        self.server = Server(running_host, base, flags=NO_CACHE if live else CPU_FLAGS)
        (base / "input").mkdir(parents=True, exist_ok=True)
        shutil.copy(START_PICTURE, base / "input" / PICTURE_NAME)
        self.before = len(self.server.log())
        self.server.start(LONGEST)
        self.server.client.listen()

    def submit(self) -> str:
        client = self.server.client
        return client.submit(graph(client.object_info(), self.project, self.live))

    def steps(self) -> list[float]:
        """Steps of the whole video that this life has told of, each counted from 1, in order."""
        told = [data for name, data in list(self.server.client.messages) if name == "progress"]
        return [data["value"] for data in told if data["max"] == SECTIONS * STEPS]

    def over(self) -> bool:
        """Whether the graph was run to its end."""
        return any(name == "execution_success" for name, _ in list(self.server.client.messages))

    def begun(self) -> set[int]:
        """Sections that this life has sampled a step of."""
        return {int(value - 1) // STEPS for value in self.steps()}

    def said(self) -> list[int]:
        """Sections this life has finished, as its log tells, from 0."""
        return [int(n) - 1 for n in FINISHED.findall(self.server.log()[self.before :])]

    def latent(self) -> np.ndarray:
        """The samples of the last LATENT that the graph gave."""
        files = sorted((self.folder.parent.parent).glob(f"{self.project}_*.latent"))
        renamed = shutil.copy(files[-1], files[-1].with_suffix(".safetensors"))
        return tensor_file.read(str(renamed))["latent_tensor"].numpy()


@dataclass
class Whole:
    """A finished video: its latents, its sections' hashes, the pictures of its mp4."""

    latent: np.ndarray
    sections: dict[int, str]
    pictures: np.ndarray | None
    said: list[int] = field(default_factory=list)
    seconds: float = 0.0


def check_files(folder: Path) -> dict[int, str]:
    """Every file that has its final name is whole; returns the hashes of the finished sections by index."""
    if not folder.exists():
        return {}
    sections: dict[int, str] = {}
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        for record in (*manifest.sections.values(), *manifest.takes):
            assert verify(folder, record.file) is None
        for record in manifest.segments.values():
            assert segment_problem(folder / "segments", Segment(**record)) is None
        sections = {index: record.file.sha256 for index, record in manifest.sections.items()}
    named = [path for path in folder.rglob("*") if path.is_file() and not PART.search(path.name)]
    for path in named:
        if path.suffix == ".safetensors":
            entries, _ = tensor_file.read_header(str(path))
            assert path.stat().st_size == max(entry.stop for entry in entries.values())
        if path.suffix == ".mp4":
            assert len(pictures(path)) > 0
    assert {path.suffix for path in named} <= {".json", ".safetensors", ".mp4", ".png"}
    return sections


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])


def unfinished(folder: Path) -> list[Path]:
    """Temporary files in a project."""
    found = []
    for inner in FOLDERS:
        try:
            found += [Path(entry.path) for entry in os.scandir(folder / inner) if PART.search(entry.name)]
        except FileNotFoundError:
            continue
    return found


def wait_for(happened, life: Life, seconds: float = LONGEST, pause: float = 0.002) -> None:
    """Wait until something has happened, or the time is over; the server must live."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        assert life.server.running(), life.server.log_tail()
        time.sleep(pause)


def kill_in_a_write(life: Life, number: int) -> bool:
    """Kill in the middle of the file written as the `number`-th from now on; False where the run ended before."""
    process, seen = life.server.pid, set()

    def writing() -> bool:
        now = unfinished(life.folder)
        seen.update(now)
        if not now or len(seen) < number:
            return False
        if os.name != "nt":  # held still, to be sure that it was not renamed meanwhile
            os.killpg(process, signal.SIGSTOP)
            if not unfinished(life.folder):
                os.killpg(process, signal.SIGCONT)
                return False
        return True

    wait_for(lambda: writing() or life.over(), life, pause=0.0003)
    return not life.over()


def kill_at_random(life: Life, rng: random.Random, pace: float) -> str | None:
    """Wait for one of three kinds of moments, and kill; returns the kind, None where the run was over by then.

    pace: seconds a section takes, about.
    """
    kind = rng.choices(("before the first step", "between steps", "while it writes"), (1, 4, 4))[0]
    life.submit()
    if kind == "before the first step":
        wait_for(life.steps, life, rng.uniform(0.0, 2.0))
    elif kind == "between steps":
        wait_for(lambda: life.steps() or life.over(), life)
        time.sleep(rng.uniform(0.0, 1.5 * pace))
    else:
        kill_in_a_write(life, rng.randint(1, 8 if life.live else 5))
    assert life.server.running(), life.server.log_tail()
    life.server.kill()
    time.sleep(SETTLING)
    return None if life.over() else kind


@dataclass
class Tally:
    """What the kills of a project came to. again: sections begun by a killed life and not finished by it.

    kinds: kills of a run that was going on; late: those of a server whose run was over, which prove nothing.
    """

    kinds: Counter = field(default_factory=Counter)
    again: list[int] = field(default_factory=list)
    torn: int = 0
    projects: int = 0
    late: int = 0
    waiting: float = 0.0


def kill_until_done(running_host, base: Path, project: str, live: bool, rng, tally: Tally) -> Whole:
    """Kill at random moments until all sections are there, or KILLS is reached; then run to the end."""
    known: dict[int, str] = {}
    pace = 1.0
    while tally.kinds.total() < KILLS and len(known) < SECTIONS:
        start = time.monotonic()
        life = Life(running_host, base, project, live)
        tally.waiting += time.monotonic() - start
        try:
            kind = kill_at_random(life, rng, pace)
        finally:
            life.server.kill()
        found = check_files(life.folder)
        assert known.items() <= found.items(), "a finished section was lost or made again"
        fresh, lost = set(found) - set(known), life.begun() - set(found)
        assert not life.begun() & set(known) and set(life.said()) <= fresh, "finished work was repeated"
        assert fresh == set(range(len(known), len(found))) and lost <= {len(found)}, "work was lost"
        if kind is None:
            tally.late += 1
        else:
            tally.kinds[kind] += 1
        tally.torn += bool(unfinished(life.folder))
        tally.again.append(len(lost))
        known = found
    life = Life(running_host, base, project, live)
    whole = to_the_end(life)
    life.server.stop()
    assert known.items() <= whole.sections.items() and whole.said == list(range(len(known), SECTIONS))
    assert life.begun() == set(whole.said) and not unfinished(life.folder)
    return whole


def to_the_end(life: Life) -> Whole:
    """Run the graph to its end."""
    start, before = time.monotonic(), len(life.said())
    try:
        life.server.client.wait(life.submit(), timeout=LONGEST)
    except BaseException:
        life.server.kill()
        raise
    spent = time.monotonic() - start
    sections, mp4 = check_files(life.folder), life.folder / f"{life.project}.mp4"
    others = {path.name for path in life.folder.glob("*.mp4")} - {mp4.name}
    assert not others, "a finished video leaves no unfinished one behind"
    return Whole(life.latent(), sections, pictures(mp4) if life.live else None, life.said()[before:], spent)


def killed_again_and_again(running_host, root: Path, live: bool, seed: int) -> tuple[list[Whole], Tally]:
    """KILLS kills; a project that is done before the last one makes room for another one."""
    rng, tally, made = random.Random(seed), Tally(), []
    while tally.kinds.total() < KILLS:
        base = root / f"{'live' if live else 'plain'} {tally.projects}"
        made.append(kill_until_done(running_host, base, "p", live, rng, tally))
        tally.projects += 1
    return made, tally


def twice_uninterrupted(running_host, root: Path) -> tuple[Whole, Whole]:
    """The video in a base directory of its own, without a node cache; then queued again."""
    life = Life(running_host, root / "uninterrupted", "p", live=True)
    try:
        return to_the_end(life), to_the_end(life)
    finally:
        life.server.stop()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A pool for servers that run side by side, and a folder for their base directories."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")  # several servers share the cores
        yield pool, tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def uninterrupted(servers, running_host) -> Future:
    pool, root = servers
    return pool.submit(twice_uninterrupted, running_host, root)


def test_fault_03_twenty_kills_of_the_real_server_lose_nothing(uninterrupted, servers, running_host, capsys):
    pool, root = servers
    start = time.monotonic()
    runs = [pool.submit(killed_again_and_again, running_host, root, live, 20261121 + live) for live in (False, True)]
    results = [run.result() for run in runs]
    whole, _ = uninterrupted.result()
    assert whole.said == list(range(SECTIONS))
    for made, _ in results:
        for video in made:
            assert np.array_equal(video.latent, whole.latent), "the resumed latents differ from the uninterrupted ones"
            assert video.sections == whole.sections
            if video.pictures is not None:
                assert np.array_equal(video.pictures, whole.pictures)
    tallies = [tally for _, tally in results]
    kills, again = sum(t.kinds.total() for t in tallies), [n for t in tallies for n in t.again]
    assert kills >= 20 and max(again) <= 1
    if os.name != "nt":
        assert sum(t.kinds["while it writes"] for t in tallies) <= sum(t.torn for t in tallies)
    with capsys.disabled():
        kinds = ", ".join(f"{n} {kind}" for kind, n in sum((t.kinds for t in tallies), Counter()).items())
        print(
            f"\n{kills} kills ({kinds}; {sum(t.torn for t in tallies)} left a file half written) of "
            f"{sum(t.projects for t in tallies)} projects of {SECTIONS} sections; {sum(again)} sections begun again, "
            f"at most {max(again)} a kill; {sum(t.late for t in tallies)} kills after the end are not counted; "
            f"{time.monotonic() - start:.0f} s, of which "
            f"{sum(t.waiting for t in tallies) / len(tallies):.0f} s for starts of the server."
        )


def test_fault_08_a_server_without_a_node_cache_finds_every_section_again(uninterrupted):
    first, second = uninterrupted.result()
    assert first.said == list(range(SECTIONS)) and second.said == []
    assert np.array_equal(first.latent, second.latent) and first.sections == second.sections
    assert np.array_equal(first.pictures, second.pictures) and second.seconds < first.seconds


def test_fault_11_the_server_refuses_a_project_in_use_and_goes_on_when_it_is_free(server, definitions, picture):
    from frame_memory.journal import ProjectLock

    folder = server.base / "output" / "frame_memory" / "in use"
    prompt = graph(definitions, "in use", live=False, sections=1)
    server.client.queue(prompt)
    longer = graph(definitions, "in use", live=False, sections=2)

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    with ProjectLock(folder):
        before, told = contents(), len(server.client.messages)
        with pytest.raises(PromptError, match=rf"process {os.getpid()} on .*another name for 'project'"):
            server.client.queue(longer)
        assert contents() == before
        assert not [1 for name, data in server.client.messages[told:] if name == "progress"], "a model was called"
    server.client.queue(longer)
    assert sorted(read_manifest(folder).run) == [0, 1]
