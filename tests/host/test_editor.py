"""The browser helper itself, on a graph of stock nodes."""

import json
import time

from .source import REPO

GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 255}},
    "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
}


def inputs_by_class(prompt):
    return {node["class_type"]: node["inputs"] for node in prompt.values()}


def test_a_stock_graph_goes_through_the_frontend_and_runs(editor, server, tmp_path):
    editor.load_api(GRAPH)
    prompt, workflow = editor.prompt()
    assert inputs_by_class(prompt) == inputs_by_class(GRAPH)
    editor.load(workflow)
    assert editor.prompt()[0] == prompt
    run = server.client.queue(prompt)
    assert len(next(iter(run.outputs.values()))["images"]) == 2
    assert editor.screenshot(tmp_path / "graph.png").stat().st_size > 10_000


def test_the_address_that_the_demo_prints_opens_its_graph(editor, server):
    graph = json.loads((REPO / "workflows" / "selftest.json").read_text(encoding="utf-8"))
    wanted = sorted(node["type"] for node in graph["nodes"])
    editor.open(f"{server.address}/?template=selftest&source=frame-memory")
    shown = "() => app.graph._nodes.map(n => n.type).sort()"
    end = time.monotonic() + 60
    while editor.evaluate(shown) != wanted and time.monotonic() < end:
        time.sleep(0.5)
    assert editor.evaluate(shown) == wanted
    editor.open(server.address)
