"""The canvas in the node, in the real frontend: dragged by real mouse events, saved, reloaded, and queued again."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from PIL import Image

from frame_memory.plan import canvas
from frame_memory.video import canvas as drawing

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

BOXES = "background: 160, 51, 160 x 90\n1: 30, 6, 100 x 50\n2: 50, 66, 60 x 60\n3: 56, 128, 48 x 64"
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


@pytest.fixture
def arranged(composed):
    """The editor with known boxes, whatever a test before did."""
    wait_for(composed, f"() => !!{NODE}", seconds=5)
    arrange(composed, canvas.FREE, BOXES)
    return composed


def arrange(editor, layout: str, boxes: str) -> None:
    editor.evaluate(
        f"""([layout, boxes]) => {{ const n = {NODE}, e = n.frameMemoryEditor
        e.selected = null; e.set('layout', layout); e.set('boxes', boxes); e.draw() }}""",
        [layout, boxes],
    )


def test_what_is_dragged_is_written_made_saved_and_made_again(composed, server):
    editor = composed
    editor.queue()
    wait_for(editor, f"() => [...{NODE}.frameMemoryEditor.pictures.values()].filter(p => p.ran).length === 4")
    # The labelled preview would show the canvas once more.
    assert editor.evaluate(f"() => {NODE}.widgets.every(w => w.name !== '$$canvas-image-preview')")
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


def test_keys_move_order_and_put_back_and_undo_follows(arranged):
    editor = arranged
    start = canvas.parse_boxes(BOXES)
    editor.evaluate(f"() => {{ const e = {NODE}.frameMemoryEditor; e.remember(); e.canvas.focus() }}")
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


def test_the_graph_never_hears_the_keys_of_the_editor(arranged):
    """The frontend deletes the selected node at Delete and Backspace, also with nothing selected in the editor."""
    editor = arranged
    script = (
        f"() => {{ const n = {NODE}; app.canvas.select(n); n.frameMemoryEditor.canvas.focus(); return [...n.pos] }}"
    )
    place = editor.evaluate(script)
    keys(editor, "Escape", "Delete", "Backspace", "ArrowLeft")
    assert editor.evaluate(f"() => {NODE} && [...{NODE}.pos]") == place and value(editor, "boxes") == BOXES
    editor.evaluate(
        f"""() => {{ const n = {NODE}, t = LiteGraph.createNode('PrimitiveString'); app.graph.add(t)
        t.connect(0, n, n.inputs.findIndex(i => i.widget?.name === 'boxes')) }}"""
    )
    assert editor.evaluate(f"() => {NODE}.frameMemoryEditor.locked")
    editor.evaluate(script)
    keys(editor, "1", "Delete", "Backspace", "ArrowLeft", "+")
    assert editor.evaluate(f"() => {NODE} && [...{NODE}.pos]") == place and value(editor, "boxes") == BOXES
    editor.evaluate("() => app.graph.remove(app.graph._nodes.find(n => n.type === 'PrimitiveString'))")
    assert not editor.evaluate(f"() => {NODE}.frameMemoryEditor.locked")


def test_what_was_typed_stays_when_a_picture_is_dragged_and_reset_knows_the_layout(arranged):
    editor = arranged
    arrange(editor, canvas.FREE, BOXES.replace("2: ", "# seen first\n2: ").replace("100 x 50", "100 x 50 # the car"))
    drag(editor, "1", 0.5, 0.5, 8, 8)
    lines = value(editor, "boxes").splitlines()
    assert lines[1].endswith(" # the car") and lines[2:4] == ["# seen first", "2: 50, 66, 60 x 60"]
    assert canvas.parse_boxes(lines[1])["1"].x in range(37, 40)

    arrange(editor, canvas.TWO_COLUMNS, "3: 1, 2, 30 x 40 # the hat\n3: oops")
    usual = editor.evaluate(f"() => {NODE}.frameMemoryEditor.boxes().get('2')")
    assert usual["x"] >= 80
    drag(editor, "2", 0.5, 0.5, 0, 30)
    lines = value(editor, "boxes").splitlines()
    assert lines[:2] == ["# 3: 1, 2, 30 x 40 # the hat", "# 3: oops"] and len(canvas.parse_boxes("\n".join(lines))) == 4
    keys(editor, "2", "Delete")
    assert canvas.parse_boxes(value(editor, "boxes"))["2"] == canvas.Box(**usual)
    keys(editor, "Escape")
    editor.evaluate(f"() => [...{NODE}.frameMemoryEditor.element.querySelectorAll('button')].at(-1).click()")
    assert value(editor, "layout") == canvas.TWO_COLUMNS and value(editor, "boxes").splitlines() == lines[:2]


def test_the_panel_at_the_side_leaves_the_canvas_its_width(arranged):
    editor = arranged
    width = f"() => {NODE}.frameMemoryEditor.canvas.clientWidth"
    panel = "open => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', open)"
    before = editor.evaluate(width)
    title = editor.evaluate(
        f"""() => {{ const n = {NODE}, c = app.canvas, r = c.canvas.getBoundingClientRect()
        return [0, 1].map(i => [r.x, r.y][i] + (n.pos[i] + [120, -15][i] + c.ds.offset[i]) * c.ds.scale) }}"""
    )
    editor.with_page(lambda page: page.mouse.click(*title))
    editor.evaluate(panel, True)
    wait_for(editor, "() => /^height$/m.test(document.body.innerText)", seconds=10)  # the panel lists the widgets
    time.sleep(0.5)
    seen = editor.evaluate(width)
    editor.evaluate("() => app.canvas.deselectAll()")
    editor.evaluate(panel, False)
    time.sleep(0.5)
    assert seen == before == editor.evaluate(width)


def test_boxes_follow_the_size_of_the_canvas_and_wrong_ones_are_told(arranged):
    editor = arranged
    edit = f"""([name, values]) => {{ const w = {NODE}.widgets.find(w => w.name === name)
      for (const v of values) {{ w.value = v; w.callback(v) }} }}"""
    arrange(editor, canvas.FREE, BOXES + "\n# mine")
    editor.evaluate(edit, ["width", [16 * n for n in range(21, 41)]])
    assert canvas.parse_boxes(value(editor, "boxes"))["1"] == canvas.Box(60, 6, 200, 50)
    editor.evaluate(edit, ["height", [208, 384]])
    assert canvas.parse_boxes(value(editor, "boxes"))["3"] == canvas.Box(112, 256, 96, 128)
    editor.evaluate(edit, ["height", [192]])
    editor.evaluate(edit, ["width", [320]])
    assert value(editor, "boxes") == BOXES + "\n# mine"
    said = f"() => {NODE}.frameMemoryEditor.said.textContent"
    for line, words in [
        ("2: oops", "cannot be read"),
        ("1: 1, 2, 3 x 4", "has a box"),
        ("2: 400, 2, 3 x 4", "off the canvas"),
    ]:
        arrange(editor, canvas.FREE, "1: 1, 2, 3 x 4\n" + line)
        assert editor.evaluate(said).startswith("Line 2 of boxes") and words in editor.evaluate(said)
    arrange(editor, canvas.STACK, "1: oops")
    assert "oops" not in editor.evaluate(said) and "Line" not in editor.evaluate(said)


def test_a_copy_has_an_editor_of_its_own_and_a_removed_one_leaves_nothing(arranged):
    editor = arranged
    editor.evaluate(f"() => {{ app.canvas.copyToClipboard([{NODE}]); app.canvas.pasteFromClipboard() }}")
    mine = "app.graph._nodes.filter(n => n.type === 'FrameMemoryFirstFrameComposer')"
    texts = editor.evaluate(f"() => {mine}.map(n => n.widgets.find(w => w.name === 'boxes').value)")
    assert texts == [BOXES, BOXES]
    # What still ran would look, or draw when its element is on the page again with another size.
    heard = editor.evaluate(
        f"""async () => {{ const n = {mine}.at(-1), e = n.frameMemoryEditor, heard = []
        const wait = (ms) => new Promise(done => setTimeout(done, ms))
        const hear = () => {{ for (const name of ['look', 'draw']) e[name] = () => heard.push(name) }}
        await wait(400); hear(); await wait(600); const alive = heard.splice(0).includes('look')
        app.graph.remove(n); await wait(600)
        const gone = !e.element.isConnected; heard.length = 0
        document.body.append(e.element); e.element.style.width = '77px'; await wait(600)
        e.element.remove(); await wait(200); return [alive, gone, heard] }}"""
    )
    assert heard == [True, True, []]
    assert editor.evaluate("() => document.querySelectorAll('.frame-memory-composer').length") == 1


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


def test_the_editor_reads_boxes_and_colours_as_the_node_does_and_keeps_notes(composed):
    good = "# mine\nReference 02 : -4,5 , 6 × 7\n\nbackground:1,2,3,4 # wide"
    bad = "3: 1,2\n0: 1,2,3,4\n4: 1,2,0,4\n5: 1,2,8193,4\n6: -9000,2,3,4\n2: 1,2,3,4"
    script = MODULE.replace(
        "RETURN", "[[...layout.parseBoxes(c[0])], layout.rewrite(c.join('\\n'), layout.parseBoxes(c[0]))]"
    )
    ((boxes, written),) = composed.evaluate(script, [[good, bad]])
    wanted = canvas.parse_boxes(good)
    assert {name: canvas.Box(**box) for name, box in boxes} == wanted == canvas.parse_boxes(written)
    assert written.splitlines() == [
        "# mine", "2: -4, 5, 6 x 7", "background: 1, 2, 3 x 4 # wide", *(f"# {line}" for line in bad.splitlines()),
    ]  # fmt: skip
    colours = ["#102030", " 102030 ", "a0F", "#abc"]
    read = composed.evaluate(MODULE.replace("RETURN", "layout.readColour(c)"), [*colours, "red", "12345", ""])
    assert [drawing.parse_colour(c) for c in read[:4]] == [drawing.parse_colour(c) for c in colours]
    assert read[4:] == ["#ffffff"] * 3


def test_every_drag_makes_a_box_the_node_takes(composed):
    chance = random.Random(5)
    cases = [[[1280, 720], [0, 200, 300, 300], [["moved", -1000, 0], ["scaled", [1, 1], -250, -250, False]]]]
    for _ in range(400):
        size = [16 * chance.choice((4, 12, 45, 80, 300, 512)) for _ in "wh"]
        box = [chance.randint(-200, size[0]), chance.randint(-200, size[1]), *(chance.randint(1, 900) for _ in "wh")]
        pulls = []
        for _ in range(chance.randint(1, 4)):
            by = [chance.choice((1, 5, 30)) * chance.randint(-600, 600) for _ in "xy"]
            corner = [chance.randint(0, 1), chance.randint(0, 1)]
            pulls.append(chance.choice([["moved", *by], ["scaled", corner, *by, chance.random() < 0.5]]))
        cases.append([size, box, pulls])
    script = MODULE.replace(
        "RETURN",
        """{ let [x, y, width, height] = c[1], box = {x, y, width, height}
        for (const [how, ...parts] of c[2]) box = layout[how](box, ...parts, c[0])
        return layout.rewrite('', new Map([['1', box]])) }""",
    )
    for (size, box, pulls), text in zip(cases, composed.evaluate(script, cases), strict=True):
        made = canvas.lay_out(*size, [(90, 60)], layout=canvas.FREE, boxes=text)
        cell = made.regions[0].cell
        assert min(cell.width, cell.height) >= (8 if pulls[-1][0] == "scaled" else 1), (size, box, pulls, text)


def test_a_transparent_file_is_shown_as_load_image_gives_it(composed, server):
    """Load Image gives a picture without its transparency, so black comes out where the file seems empty."""
    Image.new("RGBA", (60, 60), (0, 0, 0, 0)).save(server.base / "input" / "empty.png")
    node = "() => app.graph._nodes.find(n => n.type === 'FrameMemoryFirstFrameComposer')"
    middle = f"""() => {{ const e = ({node})().frameMemoryEditor, v = e.view(), b = e.boxes().get('1'), c = e.canvas
      const zoom = c.width / c.clientWidth, at = (o, s, p) => Math.round(zoom * (o + v.scale * (p + s / 2)))
      return [...c.getContext('2d').getImageData(at(v.left, b.width, b.x), at(v.top, b.height, b.y), 1, 1).data] }}"""
    graph = {
        "file": {"class_type": "LoadImage", "inputs": {"image": "empty.png"}},
        "canvas": composer(**{"references.reference_1": ["file", 0]}), "seen": preview("canvas"),
    }  # fmt: skip
    open_graph(composed, lambda: composed.load_api(graph))
    wait_for(composed, f"() => ({node})().frameMemoryEditor.pictures.size === 1", seconds=10)
    wait_for(composed, f"() => ({middle})()[0] === 0", seconds=10)
    graph["turned"] = {"class_type": "InvertMask", "inputs": {"mask": ["file", 1]}}
    graph["canvas"]["inputs"]["masks.mask_1"] = ["turned", 0]
    open_graph(composed, lambda: composed.load_api(graph))
    wait_for(composed, f"() => ({node})().frameMemoryEditor.pictures.size === 1", seconds=10)
    wait_for(composed, f"() => ({middle})()[0] === 255", seconds=10)


def test_inside_a_subgraph_the_editor_finds_its_own_last_run(composed):
    editor = composed
    open_graph(editor, lambda: editor.load_api(GRAPH))
    editor.evaluate(f"() => {{ app.graph.convertToSubgraph(new Set([{NODE}])) }}")
    inner = "[...app.graph.subgraphs.values()].at(-1)._nodes.find(n => n.type === 'FrameMemoryFirstFrameComposer')"
    ran = f"() => [...{inner}.frameMemoryEditor.pictures.values()].filter(p => p.ran).length === 4"
    editor.queue()
    wait_for(editor, ran)
    # A node of the root graph with this number is another one.
    editor.evaluate(f"() => {{ const n = {inner}; delete app.nodeOutputs[String(n.id)] }}")
    editor.evaluate(f"() => {{ const n = {inner}; n.frameMemoryEditor.pictures.clear(); n.configure(n.serialize()) }}")
    wait_for(editor, ran, seconds=10)
