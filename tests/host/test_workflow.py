"""The converter from saved graphs to the API format: equal to the real frontend's, and its own rules."""

import json
from pathlib import Path

import pytest

from scripts import workflow

from .source import REPO

OURS = sorted((REPO / "workflows").glob("*.json"))
# Stock templates with many kinds of widgets: seeds, combos, uploads, dynamic combos, primitives, notes, bypassed nodes.
STOCK = (
    "default",
    "sdxl_simple_example",
    "audio_ace_step_1_m2m_editing",
    "video_hunyuan_video_1.5_720p_t2v",
    "video_wan_vace_14B_v2v",
    "hidream_i1_dev",
)


def stock(name):
    import comfyui_workflow_templates_json as package

    return Path(package.__file__).parent / "templates" / f"{name}.json"


@pytest.fixture(scope="module")
def definitions(server):
    return server.client.object_info()


def by_the_frontend(editor, graph):
    """A graph as the frontend converts it, without the player that it hangs on a Load Video whose file is in the input
    folder by then: it sends that one along as an input, which the server does not have."""
    editor.load(graph)
    prompt = editor.prompt()[0]
    for each in prompt.values():
        each["inputs"].pop("video-preview", None)
    return prompt


@pytest.mark.parametrize("path", OURS, ids=[p.stem for p in OURS])
def test_our_graphs_convert_as_the_frontend_converts_them(path, editor, definitions):
    graph = workflow.read(path)
    assert workflow.to_api(graph, definitions) == by_the_frontend(editor, graph)


@pytest.mark.parametrize("name", STOCK)
def test_stock_graphs_convert_as_the_frontend_converts_them(name, editor, definitions):
    graph = workflow.read(stock(name))
    assert workflow.to_api(graph, definitions) == by_the_frontend(editor, graph)


def node(id, type, inputs=(), widgets=(), outputs=(), **more):
    slots = [{"name": n, "type": t, "link": link} for n, t, link in inputs]
    made = [{"name": t, "type": t} for t in outputs]
    return {"id": id, "type": type, "inputs": slots, "outputs": made, "widgets_values": list(widgets), **more}


def defined(**inputs):
    return {"input": {"required": inputs}, "input_order": {"required": list(inputs)}, "display_name": "Shown"}


DEFINITIONS = {
    "Make": defined(seed=["INT", {"default": 0}], names=["COMBO", {"options": ["a", "b"], "multiselect": True}]),
    "Change": defined(image=["IMAGE", {}], strength=["FLOAT", {"default": 0.5}]),
    "Show": defined(image=["IMAGE", {}], linked=["STRING", {"forceInput": True}]),
}


def graph(change_mode=0):
    return {
        "nodes": [
            node(1, "Make", widgets=[7, "randomize", ["a", "b"]], outputs=["IMAGE"]),
            node(2, "Change", inputs=[("image", "IMAGE", 1)], widgets=[0.25], outputs=["IMAGE"], mode=change_mode),
            node(3, "Reroute", inputs=[("", "*", 2)], outputs=["IMAGE"]),
            node(4, "Show", inputs=[("image", "IMAGE", 3), ("linked", "STRING", 4)], title="Mine"),
            node(5, "PrimitiveNode", widgets=["words", "fixed"], outputs=["STRING"]),
            node(6, "MarkdownNote", widgets=["read me"]),
        ],
        "links": [
            [1, 1, 0, 2, 0, "IMAGE"],
            [2, 2, 0, 3, 0, "IMAGE"],
            [3, 3, 0, 4, 0, "IMAGE"],
            [4, 5, 0, 4, 1, "STRING"],
        ],
    }


def test_links_are_followed_through_reroutes_and_primitives_and_lists_are_wrapped():
    got = workflow.to_api(graph(), DEFINITIONS)
    assert set(got) == {"1", "2", "4"}
    assert got["1"]["inputs"] == {"seed": 7, "names": {"__value__": ["a", "b"]}}
    assert got["4"] == {
        "inputs": {"image": ["2", 0], "linked": "words"},
        "class_type": "Show",
        "_meta": {"title": "Mine"},
    }


def test_a_bypassed_node_passes_its_input_on_and_a_muted_one_cuts_the_link():
    assert workflow.to_api(graph(workflow.BYPASSED), DEFINITIONS)["4"]["inputs"]["image"] == ["1", 0]
    assert "image" not in workflow.to_api(graph(workflow.MUTED), DEFINITIONS)["4"]["inputs"]


def test_widgets_that_the_file_does_not_have_yet_take_their_default():
    old = graph()
    old["nodes"][1]["widgets_values"] = []
    assert workflow.to_api(old, DEFINITIONS)["2"]["inputs"]["strength"] == 0.5


def test_what_cannot_be_converted_is_refused_by_name(tmp_path):
    with pytest.raises(workflow.WorkflowError, match="Node 1 is a Make"):
        workflow.to_api(graph(), {})
    with pytest.raises(workflow.WorkflowError, match="subgraphs"):
        workflow.to_api({**graph(), "definitions": {"subgraphs": [{}]}}, DEFINITIONS)
    for text in ("{", json.dumps({"1": {"class_type": "Make"}})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(workflow.WorkflowError, match="x.json"):
            workflow.read(tmp_path / "x.json")


def test_values_are_set_on_a_copy_and_unknown_names_are_refused():
    prompt = workflow.to_api(graph(), DEFINITIONS)
    changed = workflow.set_inputs(prompt, "Change", {"strength": 1.0})
    assert (changed["2"]["inputs"]["strength"], prompt["2"]["inputs"]["strength"]) == (1.0, 0.25)
    assert workflow.set_inputs(prompt, "Make", {"seed": 1}, without="negative")["1"]["inputs"]["seed"] == 1
    for call in (("Nothing", {}), ("Change", {"strenght": 1}), ("Show", {}, "mine")):
        with pytest.raises(workflow.WorkflowError):
            workflow.set_inputs(prompt, *call)
