"""Every example graph in the real frontend, and on the real server with the self-test models swapped in."""

import io
import re
import time

import av
import numpy as np
import pytest
from PIL import Image

from frame_memory.journal import read_manifest
from scripts import demo, workflow
from scripts.client import PromptError

from .tiny import (
    FILES,
    GRAPHS,
    PICTURE_GRAPHS,
    REPO,
    SELFTEST_GRAPHS,
    START_PICTURE,
    during,
    frames_of,
    one,
    progress_texts,
    saver,
    shrink,
    ui_graph,
)

SECONDS = 3.6
SECTIONS = 3
SAMPLER, CACHE = "FrameMemoryAntiDriftSampler", "FrameMemoryStepCache"
# The fewest, and the fewest of which one can be skipped.
STEPS, STEPS_TO_SKIP = 2, 5
by_name = pytest.mark.parametrize("path", GRAPHS, ids=lambda p: p.stem)


def test_all_graphs_are_there():
    ffgo = [f"ffgo_{name}" for name in ("continue", "continue_wan", "selftest", "train", "wan22", "wan22_fast")]
    names = ["drift_and_recall", "extend_and_bridge", *ffgo]
    names += ["frame_preservation", "frame_preservation_selftest", "framepack_f1_timeline", "framepack_i2v"]
    names += ["memory_selftest", "memorypack_minute", "resume_and_reroll", "selftest", "train_direct_forcing"]
    names += ["wan_memory"]
    assert [p.stem for p in GRAPHS] == names


@by_name
def test_the_frontend_reads_the_file_and_would_save_the_same(editor, definitions, picture, path):
    """That it converts it to the same API format as scripts/workflow.py is tested in tests/host/test_workflow.py."""
    editor.load(ui_graph(path))
    prompt, saved = editor.prompt()

    def kept(graph):
        links = sorted(graph["links"])
        nodes = {n["id"]: (n["type"], n.get("widgets_values"), n["mode"], n["properties"]) for n in graph["nodes"]}
        return links, nodes, [(g["title"], g["bounding"]) for g in graph["groups"]]

    assert kept(saved) == kept(ui_graph(path))
    assert set(prompt) == {str(n["id"]) for n in saved["nodes"] if n["type"] not in workflow.NOT_RUN and not n["mode"]}


def has_cache(prompt: dict) -> bool:
    return any(node["class_type"] == CACHE for node in prompt.values())


@pytest.fixture(scope="module", params=PICTURE_GRAPHS, ids=lambda p: p.stem)
def made(request, server, api, direct_forcing_file):
    """(API graph, run, path of the mp4) of one example graph."""
    prompt = api(request.param, on=(CACHE,))
    prompt = shrink(prompt, seconds=SECONDS, steps=STEPS_TO_SKIP if has_cache(prompt) else STEPS)
    if has_cache(prompt):
        prompt = workflow.set_inputs(prompt, CACHE, {"drift": 1.0})
    # A seed of this module's own: sections that another run has finished would be reused, and nothing sampled.
    prompt = workflow.set_inputs(prompt, "RandomNoise", {"noise_seed": 20261121 + GRAPHS.index(request.param)})
    run = server.client.queue(prompt, timeout=900, workflow=ui_graph(request.param))
    (file,) = run.outputs[saver(prompt)]["images"]
    return prompt, run, server.base / "output" / file["subfolder"] / file["filename"]


def test_the_video_is_whole_and_not_black(made, written):
    prompt, _, path = made
    cores = prompt[saver(prompt)]["class_type"] == "SaveVideo"
    written.check_video(path, frames_of(SECONDS), 30, (64, 64), within=1e-3 if cores else 1e-5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 30)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = [f.to_ndarray(format="rgb24").astype(np.float32) for f in container.decode(stream)]
        assert "FrameMemoryAntiDriftSampler" in container.metadata["prompt"]
        assert "nodes" in container.metadata["workflow"]
    assert len(frames) == frames_of(SECONDS) == 36 * SECTIONS + 1
    assert min(f.mean() for f in frames) > 10 and min(f.std() for f in frames) > 4
    first = np.asarray(Image.open(START_PICTURE).convert("RGB"), dtype=np.float32)
    assert np.abs(frames[0] - first).mean() < 20, "the video begins with the start picture"


def test_one_progress_bar_over_all_steps_of_all_sections(made):
    prompt, run, _ = made
    sampler, steps = one(prompt, SAMPLER)[0], SECTIONS * (STEPS_TO_SKIP if has_cache(prompt) else STEPS)
    bar = [(d["value"], d["max"]) for d in run.of("progress") if d["node"] == sampler]
    values = [v for v, _ in bar]
    assert {m for _, m in bar} == {steps}
    assert values == sorted(set(values)) and values[-1] == steps
    states = [d["nodes"][sampler] for d in run.of("progress_state") if sampler in d["nodes"]]
    assert {s["max"] for s in states if s["state"] == "running" and s["max"] > 1} == {steps}


def test_the_growing_video_plays_on_the_sampler(made, server, written):
    """Longer after each section, and at last the whole one, which lies in the project."""
    prompt, run, _ = made
    sampler = one(prompt, SAMPLER)[0]
    shown = [d["output"]["images"] for d in run.of("executed") if d["node"] == sampler]
    assert [f["filename"] for (f,) in shown[:-1]] == ["preview.mp4"] * SECTIONS
    ((last,),) = shown[-1:]
    written.check_video(server.base / "output" / last["subfolder"] / last["filename"], frames_of(SECONDS), 30, (64, 64))


def test_a_step_cache_says_what_it_did(made):
    prompt, run, _ = made
    said = [text for _, node, text in progress_texts(during(run.messages, run.prompt_id))
            if node == one(prompt, SAMPLER)[0]]  # fmt: skip
    asked = SECTIONS * STEPS_TO_SKIP
    count = rf"Section Step Cache: (\d+) of {asked} evaluations were made, [\d.]+ times fewer\."
    found = re.search(rf"{count}\nSection 1 made with and without it: PSNR [\d.]+ dB of its latents", said[-1])
    assert (found is not None) == has_cache(prompt), said[-1]
    assert found is None or int(found[1]) < asked


def check_strips(run, sampler: str, sections: int) -> None:
    """Without a vae on the sampler: pictures of the sections so far beside each other, one more after each."""
    pictures = [p["image"] for p in run.of("preview") if p.get("node_id") == sampler]
    assert pictures, "no preview for the sampler"
    with Image.open(io.BytesIO(pictures[-1])) as shown:
        assert shown.width / shown.height == pytest.approx(sections, rel=0.1)


def test_fault_24_exact_frames_and_seconds_are_shown_before_the_first_step(made):
    prompt, run, _ = made
    sampler = one(prompt, SAMPLER)[0]
    messages = during(run.messages, run.prompt_id)
    shown = next((place, text) for place, node, text in progress_texts(messages) if node == sampler)
    first_step = next(i for i, (n, d) in enumerate(messages) if n == "progress" and d["node"] == sampler)
    frames = 36 * SECTIONS + 1
    assert shown[0] < first_step
    assert f"{frames} frames = {frames / 30:.2f} s at 30 fps" in shown[1]
    named = [text for _, node, text in progress_texts(messages) if node == sampler]
    length = f"{frames} frames = {frames / 30:.2f} s"
    progress = [text.split("\n") for text in named if text.startswith("section ")]
    assert [*dict.fromkeys(t[0] for t in progress)] == [f"section {k + 1} of {SECTIONS} · {length}" for k in range(3)]
    assert all(len(text) == 3 and max(map(len, text)) < 80 for text in progress), "fits on the node"
    assert progress[0][1].startswith("0.0 s finished") and progress[-1][1].startswith("2.4 s finished · about ")
    numbers = r"disk [\d.]+ [MG]B used, [\d.]+ GB free · RAM [\d.]+ [MG]B used, [\d.]+ GB free"
    assert all(re.fullmatch(numbers, text[2]) for text in progress)


def test_fault_27_a_transparent_end_picture_of_another_shape_through_f0(server, api, tmp_path):
    """Load Image splits alpha off as a MASK; wired to end_mask it is laid over the background."""
    pixels = np.random.default_rng(5).integers(0, 256, (120, 80, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "end.png")
    prompt = shrink(api(REPO / "workflows" / "framepack_i2v.json"), seconds=2.4, steps=1)
    prompt = workflow.set_inputs(prompt, "FrameMemoryLoadFramePack", {"model_name": FILES["F0"]})
    prompt = workflow.set_inputs(prompt, "FrameMemoryContextPacker", {"preset": "F0 inverted"})
    picture = {"image": server.client.upload_image(tmp_path / "end.png", "frame_memory_end.png")}
    prompt["end"] = {"class_type": "LoadImage", "inputs": picture}
    image_id, image = one(prompt, "FrameMemoryFramePackImage")
    image["inputs"].update(end_image=["end", 0], end_mask=["end", 1])
    sampler, node = one(prompt, SAMPLER)
    node["inputs"]["end"] = [image_id, 3]
    del node["inputs"]["vae"]
    run = server.client.queue(prompt, timeout=900)
    check_strips(run, sampler, sections=2)
    shown = [text for _, node, text in progress_texts(during(run.messages, run.prompt_id)) if node == image_id]
    start, end = shown[-1].split("End: ")
    assert start.startswith("Start: Image") and end.startswith("Image of 80x120 scaled to")
    assert "Centre crop to 64x64" in end and "Transparency laid over white" in end and "Transparency" not in start
    (file,) = run.outputs[one(prompt, "FrameMemorySaveLongVideo")[0]]["images"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == frames_of(2.4)


@by_name
def test_the_saved_graph_names_only_what_ships_or_is_linked(path):
    """A graph for real checkpoints links every file it names; the self-test's files are in the repository's folders.

    Nobody has published a Direct Forcing checkpoint: a note of the graph says so, and how to make one.
    """
    graph = ui_graph(path)
    for node in graph["nodes"]:
        if node["type"] == "FrameMemoryLoadDirectForcing":
            notes = "".join(n["widgets_values"][0] for n in graph["nodes"] if n["type"] == "MarkdownNote")
            assert "no such file to download" in notes and "the graph *train_direct_forcing*" in notes
            continue
        files = [v for v in node.get("widgets_values") or [] if isinstance(v, str) and v.endswith(".safetensors")]
        linked = {m["name"] for m in node["properties"].get("models", [])}
        for file in files:
            if file.startswith("frame_memory_selftest_"):
                assert path.stem in SELFTEST_GRAPHS
                assert list((REPO / "selftest_models").glob(f"*/{file}"))
            else:
                assert file in linked, f"{node['type']} names {file} without a link"


def test_resume_and_reroll_reuses_what_fits_and_brings_the_first_take_back(server, api, written):
    """The steps of the graph's note: run, run again with a section picked, and again without it; then go on."""
    graph = ui_graph(REPO / "workflows" / "resume_and_reroll.json")
    (pick,) = [n for n in graph["nodes"] if n["type"] == "FrameMemoryPickSection"]
    assert pick["mode"] == workflow.BYPASSED, "off until the artist switches it on"
    plain = shrink(api(REPO / "workflows" / "resume_and_reroll.json"), seconds=3.6, steps=1)
    plain = workflow.set_inputs(plain, "RandomNoise", {"noise_seed": 20261101})  # no other run has these sections
    sampler, sheet = one(plain, SAMPLER)[0], one(plain, "PreviewImage")[0]
    assert "changes" not in plain[sampler]["inputs"]
    picked = workflow.set_inputs(plain, SAMPLER, {"project": "resume_and_reroll"})
    picked["pick"] = {
        "class_type": "FrameMemoryPickSection", "inputs": {"section": 2, "seed": 5, "new_noise": True},
        "_meta": {"title": "Pick Section"},
    }  # fmt: skip
    picked[sampler]["inputs"]["changes"] = ["pick", 0]
    folder = server.base / "output" / "frame_memory" / "resume_and_reroll"

    def run(prompt) -> tuple[str, list[str]]:
        """What the sampler said last, and the hashes of the project's sections."""
        done = server.client.queue(prompt, timeout=900)
        written.check_video(
            folder / f"{folder.name}.mp4", frames_of(prompt[sampler]["inputs"]["seconds"]), 30, (64, 64)
        )
        assert len(done.outputs[sheet]["images"]) == 1 if sheet in prompt else True
        said = [text for _, node, text in progress_texts(during(done.messages, done.prompt_id)) if node == sampler]
        return said[-1], [r.file.sha256 for _, r in sorted(read_manifest(folder).sections.items())]

    said, first = run(plain)
    assert len(first) == 3 and "All 3 sections were made now" in said and "contact_sheet.png" in said
    said, second = run(picked)
    assert "1 of 3 sections were finished before and reused: 0.0-1.2 s" in said
    assert second[0] == first[0] and not set(second[1:]) & set(first)
    said, third = run(plain)
    assert "3 of 3 sections were finished before and reused" in said and third == first
    names = {p.name for p in folder.iterdir()}
    assert {"manifest.json", "sections", "takes", "segments", "contact_sheet.png", f"{folder.name}.mp4"} <= names
    alone = {i: node for i, node in plain.items() if i not in (sheet, saver(plain))}
    longer_alone = workflow.set_inputs(alone, SAMPLER, {"seconds": 4.8})
    said, longer = run(longer_alone)  # the sampler needs no other node behind it
    assert "3 of 4 sections were finished before and reused" in said and longer[:3] == first
    (folder / f"{folder.name}.mp4").unlink()
    said, again = run(longer_alone)
    assert "4 of 4 sections were finished before and reused" in said and again == longer
    done = server.client.queue(longer_alone, timeout=900)
    assert sampler in done.of("execution_cached")[0]["nodes"], "nothing is made where nothing has changed"


def test_save_long_video_needs_only_the_projects_name_and_a_vae(server, api, written):
    """Also after it was cancelled: what is finished; and once more when the project has gone on."""
    project = "cancelled"
    plain = shrink(api(REPO / "workflows" / "resume_and_reroll.json"), seconds=4.8, steps=6)
    plain = workflow.set_inputs(plain, SAMPLER, {"project": project})
    plain = workflow.set_inputs(plain, "RandomNoise", {"noise_seed": 20261102})
    sampler, client = one(plain, SAMPLER)[0], server.client
    folder = server.base / "output" / "frame_memory" / project
    vae = {"class_type": "VAELoader", "inputs": {"vae_name": "frame_memory_selftest_vae.safetensors"}}
    widgets = {"vae": ["vae", 0], "fps": 0.0, "filename_prefix": "video/project", "crf": 18.0, "decode": "windowed"}
    save = {"class_type": "FrameMemorySaveLongVideo", "inputs": {**widgets, "project": project}}

    def saved() -> tuple[int, str]:
        """Frames of the file and what the node said."""
        run = client.queue({"vae": vae, "save": save}, timeout=600)
        (file,) = run.outputs["save"]["images"]
        said = [text for _, node, text in progress_texts(during(run.messages, run.prompt_id)) if node == "save"]
        return written.probe(server.base / "output" / file["subfolder"] / file["filename"]).frames, said[-1]

    def said_by_sampler(prompt_id: str) -> list[str]:
        messages = during(client.messages, prompt_id)
        return [text for _, node, text in progress_texts(messages) if node == sampler]

    prompt_id, end = client.submit(plain), time.monotonic() + 600
    while time.monotonic() < end:
        if [d for n, d in client.about(prompt_id) if n == "progress" and d["node"] == sampler and d["value"] > 12]:
            break
        time.sleep(0.005)
    client.interrupt()
    with pytest.raises(PromptError, match="Cancelled"):
        client.wait(prompt_id, timeout=600)
    unfinished = folder / f"{project}-unfinished.mp4"
    last = said_by_sampler(prompt_id)[-1]
    assert last.startswith("Stopped. Queue again to go on.") and str(unfinished) in last and "2 of 4 sections" in last
    written.check_video(unfinished, 73, 30, (64, 64))
    frames, said = saved()
    assert frames == 73 and "is not finished: 2 of 4 sections are there. Saved: 0.0 to 2.4 s of 4.8 s" in said
    run = client.queue(plain, timeout=600)
    assert "2 of 4 sections were finished before" in said_by_sampler(run.prompt_id)[-1] and not unfinished.exists()
    frames, said = saved()
    assert frames == 145 and "all 4 sections" in said
    save["inputs"]["project"] = "cancelt"
    with pytest.raises(PromptError, match="FrameMemorySaveLongVideo.*no project of that name.*Nearest: 'cancelled'"):
        client.queue({"vae": vae, "save": save}, timeout=600)


def test_the_demo_proves_something_each_time(server, definitions, capsys):
    """With the graph's own seed a second run would find all its sections finished."""
    graph = ui_graph(REPO / "workflows" / "selftest.json")

    def seed(*line: str) -> int:
        prompt = demo.prepared(server, graph, demo.arguments(list(line)), definitions)
        return one(prompt, "RandomNoise")[1]["inputs"]["noise_seed"]

    before = int(time.time())
    chosen = seed()
    assert before <= chosen <= time.time() and f"Seed: {chosen}" in capsys.readouterr().err
    assert seed("--seed", "5") == 5
