"""The canvas in the node, in the real frontend: dragged by real mouse events, saved, reloaded, and queued again."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from frame_memory.plan import canvas

from .graphs import colour, composer, pictures_of, preview

NODE = "app.graph._nodes.find(n => n.type === 'FrameMemoryFirstFrameComposer')"
# Where a part of a box lies on the page: fx, fy of 0..1 from its top left corner.
PLACE = f"""([name, fx, fy]) => {{
  const editor = {NODE}.frameMemoryEditor, b = editor.boxes().get(name), v = editor.view()
  const bounds = editor.canvas.getBoundingClientRect(), zoom = bounds.width / editor.canvas.clientWidth
  return [bounds.left + zoom * (v.left + v.scale * (b.x + fx * b.width)),
    bounds.top + zoom * (v.top + v.scale * (b.y + fy * b.height)), zoom * v.scale] }}"""
SHOW = f"""() => {{ const n = {NODE}, c = app.canvas, s = 0.9 * c.canvas.clientHeight / (n.size[1] + 60)
  c.ds.scale = s; c.ds.offset[0] = c.canvas.clientWidth / 2 / s - n.pos[0] - n.size[0] / 2
  c.ds.offset[1] = c.canvas.clientHeight / 2 / s - n.pos[1] - n.size[1] / 2; c.setDirty(true, true) }}"""
MODULE = """async (cases) => {
  const list = await (await fetch('/extensions')).json()
  const layout = await import('/' + list.find(f => f.endsWith('/first_frame_layout.js')).replace(/^\\//, ''))
  return cases.map(c => RETURN) }"""

GRAPH = {
    "red": colour(0xFF0000, 100, 50),
    "green": colour(0x00FF00, 60, 60),
    "blue": colour(0x0000FF, 90, 120),
    "place": colour(0x808080, 64, 36),
    "canvas": composer(**{"references.reference_1": ["red", 0], "references.reference_2": ["green", 0],
                          "references.reference_3": ["blue", 0], "background": ["place", 0]}),
    "seen": preview("canvas"),
}  # fmt: skip


def wait_for(editor, script: str, argument=None, seconds: float = 120):
    """What a script gives as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := editor.evaluate(script, argument)) and time.monotonic() < end:
        time.sleep(0.2)
    assert found, script
    return found


def value(editor, name: str):
    return editor.evaluate(f"(name) => {NODE}.widgets.find(w => w.name === name).value", name)


def open_graph(editor, load) -> None:
    load()
    wait_for(editor, f"() => {NODE}?.frameMemoryEditor?.boxes().size")
    editor.with_page(lambda page: page.keyboard.press("Escape"))  # the frontend greets new users with its templates
    editor.evaluate(SHOW)
    wait_for(editor, f"() => {NODE}.frameMemoryEditor.canvas.clientWidth > 100")
    time.sleep(0.7)


def drag(editor, name: str, fx: float, fy: float, dx: float, dy: float) -> None:
    """Pull a place of a picture by dx, dy in pixels of the canvas."""
    x, y, scale = editor.evaluate(PLACE, [name, fx, fy])

    def pull(page) -> None:
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + dx * scale / 2, y + dy * scale / 2)
        page.mouse.move(x + dx * scale, y + dy * scale)
        page.mouse.up()

    editor.with_page(pull)
    time.sleep(0.4)


def keys(editor, *names: str) -> None:
    editor.with_page(lambda page: [page.keyboard.press(name) for name in names])
    time.sleep(0.4)


def picture(editor, server) -> np.ndarray:
    """The canvas as the node makes it from what the frontend would queue now."""
    prompt = editor.prompt()[0]
    node = next(k for k, v in prompt.items() if v["class_type"] == "PreviewImage")
    return pictures_of(server, server.client.queue(prompt), node)[0]


def place_of(picture: np.ndarray, rgb) -> canvas.Box:
    rows, columns = np.nonzero((picture == rgb).all(-1))
    left, top = int(columns.min()), int(rows.min())
    return canvas.Box(left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1)


@pytest.fixture(scope="module")
def composed(editor):
    open_graph(editor, lambda: editor.load_api(GRAPH))
    return editor


def test_what_is_dragged_is_written_made_saved_and_made_again(composed, server):
    editor = composed
    editor.queue()
    wait_for(editor, f"() => [...{NODE}.frameMemoryEditor.pictures.values()].filter(p => p.ran).length === 4")
    before = picture(editor, server)
    green = place_of(before, (0, 255, 0))
    assert green == canvas.Box(50, 66, 60, 60) and value(editor, "boxes") == ""
    drag(editor, "2", 0.5, 0.5, 80, 30)
    boxes = canvas.parse_boxes(value(editor, "boxes"))
    assert value(editor, "layout") == canvas.FREE and list(boxes) == ["background", "1", "2", "3"]
    moved = boxes["2"]
    assert abs(moved.x - 130) <= 1 and abs(moved.y - 96) <= 1 and (moved.width, moved.height) == (60, 60)
    drag(editor, "2", 1, 1, 30, 30)
    grown = canvas.parse_boxes(value(editor, "boxes"))["2"]
    assert abs(grown.width - 90) <= 1 and grown.width == grown.height and (grown.x, grown.y) == (moved.x, moved.y)
    made = picture(editor, server)
    assert place_of(made, (0, 255, 0)) == grown and place_of(made, (0, 0, 255)) == place_of(before, (0, 0, 255))

    saved, shown = editor.prompt()[1], value(editor, "boxes")
    editor.open(server.address)
    open_graph(editor, lambda: editor.load(saved))
    assert value(editor, "boxes") == shown
    drawn = dict(editor.evaluate(f"() => [...{NODE}.frameMemoryEditor.boxes()]"))
    assert {k: canvas.Box(**v) for k, v in drawn.items()} == canvas.parse_boxes(shown)
    assert picture(editor, server).tobytes() == made.tobytes()


def test_keys_move_order_and_put_back_and_undo_follows(composed):
    editor = composed
    start = canvas.parse_boxes(value(editor, "boxes"))
    count = editor.evaluate("() => app.graph._nodes.length")
    editor.evaluate(f"() => {NODE}.frameMemoryEditor.canvas.focus()")
    keys(editor, "1", "ArrowRight", "Shift+ArrowDown")
    red = canvas.parse_boxes(value(editor, "boxes"))["1"]
    assert (red.x, red.y) == (start["1"].x + 1, start["1"].y + 16)
    keys(editor, "]")
    assert list(canvas.parse_boxes(value(editor, "boxes")))[1:] == ["2", "1", "3"]
    keys(editor, "Control+z")
    wait_for(editor, f"() => {NODE}.widgets.find(w => w.name === 'boxes').value.split('\\n')[1].startsWith('1:')")
    editor.evaluate(f"() => {NODE}.frameMemoryEditor.canvas.focus()")
    keys(editor, "1", "Delete")
    assert "1" not in canvas.parse_boxes(value(editor, "boxes"))
    assert editor.evaluate("() => app.graph._nodes.length") == count, "Delete belongs to the canvas, not to the node"


def test_a_copy_has_an_editor_of_its_own_and_a_removed_one_leaves_nothing(composed):
    editor = composed
    editor.evaluate(f"() => {{ app.canvas.copyToClipboard([{NODE}]); app.canvas.pasteFromClipboard() }}")
    mine = "app.graph._nodes.filter(n => n.type === 'FrameMemoryFirstFrameComposer')"
    texts = editor.evaluate(f"() => {mine}.map(n => n.widgets.find(w => w.name === 'boxes').value)")
    assert len(texts) == 2 and texts[0] == texts[1] == value(editor, "boxes")
    editor.evaluate(f"() => {{ const n = {mine}.at(-1); window.gone = n.frameMemoryEditor; app.graph.remove(n) }}")
    wait_for(editor, "() => document.querySelectorAll('.frame-memory-composer').length === 1")
    assert editor.evaluate("() => { const e = window.gone; delete window.gone; return e.element.isConnected }") is False


def test_the_editor_lays_out_as_the_node_does(composed):
    chance = random.Random(3)
    cases, wanted = [], []
    for _ in range(300):
        count = chance.randint(0, 6)
        sizes = {str(i + 1): [chance.randint(1, 900), chance.randint(1, 900)] for i in range(count)}
        scene = [chance.randint(1, 900), chance.randint(1, 900)] if chance.random() < 0.7 or not count else None
        names = ["background"] * (scene is not None) + list(sizes)
        typed = chance.sample(names, chance.randint(0, len(names)))
        text = "\n".join(
            f"{n}: {chance.randint(-9, 60)},{chance.randint(-9, 60)}, 90 x {chance.randint(9, 99)}" for n in typed
        )
        case = {"width": 16 * chance.randint(4, 80), "height": 16 * chance.randint(4, 80), "boxes": text,
                "layout": chance.choice(canvas.LAYOUTS), "keepAspect": chance.random() < 0.5,
                "enlarge": chance.random() < 0.5}  # fmt: skip
        made = canvas.lay_out(
            case["width"], case["height"], list(sizes.values()), scene, layout=case["layout"], boxes=text,
            keep_background_aspect=case["keepAspect"], enlarge=case["enlarge"],
        )  # fmt: skip
        wanted.append([[r.name, r.box.x, r.box.y, r.box.width, r.box.height] for r in made.regions])
        cases.append({**case, "names": names, "sizes": [*sizes.items(), *([("background", scene)] if scene else [])]})
    script = MODULE.replace(
        "RETURN",
        """{ const sizes = new Map(c.sizes)
        return [...layout.layOut({...c, sizes})].map(([n, box]) => {
          const typed = c.layout === layout.FREE && layout.parseBoxes(c.boxes).has(n)
          const b = typed ? layout.covered(n, box, sizes.get(n), c.keepAspect) : box
          return [n, b.x, b.y, b.width, b.height] }) }""",
    )
    assert composed.evaluate(script, cases) == wanted


def test_the_editor_reads_boxes_as_the_node_does_and_keeps_notes(composed):
    text = "# mine\nReference 02 : -4,5 , 6 × 7\n\nbackground:1,2,3,4 # wide\n3: 1,2"
    script = MODULE.replace(
        "RETURN", "[[...layout.parseBoxes(c)], layout.writeBoxes(layout.parseBoxes(c)), layout.otherLines(c)]"
    )
    ((boxes, written, others),) = composed.evaluate(script, [text])
    wanted = canvas.parse_boxes(text.rsplit("\n", 1)[0])
    assert {name: canvas.Box(**box) for name, box in boxes} == wanted == canvas.parse_boxes(written)
    assert others == ["# mine", "3: 1,2"]
