"""The browser helper itself, on a graph of stock nodes."""

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
