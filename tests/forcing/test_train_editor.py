"""Training from the editor as a new user would: Run, Cancel and Run again by mouse, and what the screen says of it."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO / "tests"))  # folders of tests are packages of their own
from workflows.tiny import ENCODERS, FILES, training_videos, ui_graph

from frame_memory.model import memory_file, tensor_file

TRAIN, NAME = "FrameMemoryTrainDirectForcing", "trained in the editor"
RUN, CANCEL = '[data-testid="queue-button"]', 'button[aria-label="Cancel current run"]'
# What a user picks from the lists of the nodes; the encoders are one node in the place of two.
CHOOSE = """values => { for (const [type, stage, chosen] of values) for (const n of app.graph._nodes)
  if (n.type === type && (!stage || n.widgets[0].value.startsWith(stage)))
    for (const [name, value] of Object.entries(chosen)) {
      const w = n.widgets.find(w => w.name === name); w.value = value; w.callback?.(value) } }"""
SWAP = """([type, outputs]) => { const made = LiteGraph.createNode(type); app.graph.add(made)
  for (const n of [...app.graph._nodes]) if (n.type in outputs) { made.pos = [...n.pos]
    for (const id of [...n.outputs[0].links]) { const l = app.graph.links.get(id)
      made.connect(outputs[n.type], app.graph.getNodeById(l.target_id), l.target_slot) }
    app.graph.remove(n) } }"""
SHOW = """stage => { const c = app.canvas, n = app.graph._nodes.find(n => n.widgets?.[0]?.value?.startsWith?.(stage))
  c.ds.scale = Math.min(1, 0.9 * c.canvas.clientHeight / (n.size[1] + 60))
  c.ds.offset[0] = c.canvas.clientWidth / 2 / c.ds.scale - n.pos[0] - n.size[0] / 2
  c.ds.offset[1] = c.canvas.clientHeight / 2 / c.ds.scale - n.pos[1] - n.size[1] / 2; c.setDirty(true, true) }"""
TEXT = r"""stage => app.graph._nodes.find(n => n.widgets?.[0]?.value?.startsWith?.(stage))
  .widgets.find(w => w.name === '$$node-text-preview')?.value ?? ''"""


@pytest.fixture
def opened(editor, server):
    """The graph in the editor on the self-test models, stage 2 in the middle of the screen."""
    training_videos(server.base / "input" / "training_videos")
    editor.open(server.address)
    editor.load(ui_graph(REPO / "workflows" / "train_direct_forcing.json"))
    editor.with_page(lambda page: page.keyboard.press("Escape"))  # the frontend lists models that are not there
    editor.evaluate(SWAP, [ENCODERS, {"DualCLIPLoader": 0, "CLIPVisionLoader": 1}])
    editor.evaluate(CHOOSE, [
        ["FrameMemoryLoadFramePack", "", {"model_name": FILES["F1"]}],
        ["VAELoader", "", {"vae_name": "frame_memory_selftest_vae.safetensors"}],
        ["FrameMemoryVideoClips", "", {"size": 64}],
        [TRAIN, "1", {"name": f"{NAME} 1", "steps": 2, "clips": 2}],
        [TRAIN, "2", {"name": NAME, "steps": 5000, "clips": 2}],
    ])  # fmt: skip
    editor.evaluate(SHOW, "2")
    yield editor
    server.client.interrupt()
    editor.open(server.address)


def press(editor, button: str) -> None:
    editor.with_page(lambda page: page.locator(button).first.click(timeout=60_000))


def read(editor, pattern: str, seconds: float = 400) -> re.Match:
    """Waits until the text on the node of stage 2 says something."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, editor.evaluate(TEXT, "2"))):
        assert time.monotonic() < end, f"{pattern} is not on the node: {editor.evaluate(TEXT, '2')}\n{editor.text()}"
        time.sleep(0.2)
    return found


def test_a_training_is_run_cancelled_and_gone_on_with_by_mouse(opened, server, tmp_path):
    editor, before = opened, len(opened.console)
    press(editor, RUN)
    read(editor, r"step (?!1 )\d+ of 5000 · \d clips? of .*")
    read(editor, r"loss \d\.\d+ \(mean of \d+\)")
    read(editor, "Cancel keeps a checkpoint")
    editor.screenshot(tmp_path / "1 running.png", fit=False)

    press(editor, CANCEL)
    stopped = read(editor, r"Stopped after step (\d+) of 5000. Run it again with the same name")
    editor.screenshot(tmp_path / "2 cancelled.png", fit=False)
    done, folder = int(stopped[1]), server.base / "output" / "frame_memory_training" / NAME
    kept = tensor_file.read(str(folder / f"step-{done:08d}.safetensors"))["losses"].tolist()
    assert len(kept) == done and (folder / "loss.png").is_file()
    assert not (server.base / "models" / "frame_memory" / f"{NAME}.safetensors").exists()

    editor.evaluate(CHOOSE, [[TRAIN, "2", {"steps": done + 2}]])
    press(editor, RUN)
    read(editor, rf"{done + 2} of {done + 2} steps on 2 videos, Direct Forcing; {done} of them before a stop")
    read(editor, rf"Going on from step {done} of {done + 2}")
    read(editor, "Result: models/frame_memory/")
    editor.screenshot(tmp_path / "3 done.png", fit=False)
    after = tensor_file.read(str(folder / f"step-{done + 2:08d}.safetensors"))["losses"].tolist()
    assert after[:-2] == kept
    made = memory_file.read(str(server.base / "models" / "frame_memory" / f"{NAME}.safetensors"))
    assert made.kind == memory_file.DIRECT_FORCING and made.recipe["steps"] == done + 2 and made.pack
    assert [line for line in editor.console[before:] if line.startswith("pageerror")] == []
