"""The subgraph blueprints in subgraphs/: listed by the server, inserted by the frontend, run as far as weights allow.

BiRefNet and SAM 3 exist in core at one size only, hundreds of megabytes; a mask of known shape takes their place.
"""

import json

import numpy as np
import pytest
from PIL import Image

from scripts.workflow import WIDGET_TYPES

from .test_ffgo_graphs import frames_in, path_of
from .test_graphs_lint import FOLDERS
from .tiny import PICTURE_NAME, REPO, shrink_wan

FILES = sorted((REPO / "subgraphs").glob("*.json"))
NAMES = ["Cut Out Reference (BiRefNet)", "Cut Out Reference (SAM 3)", "FFGo Video (Wan 2.2)"]
LOADED_FROM = {**FOLDERS, "CheckpointLoaderSimple": "checkpoints", "LoadBackgroundRemovalModel": "background_removal"}
INPUT, OUTPUT = -10, -20
# The editor's own store of blueprints, and what it does with one that is chosen from the node list.
INSERT = """async name => {
  const root = [...document.querySelectorAll("*")].find(e => e.__vue_app__)
  const store = root.__vue_app__.config.globalProperties.$pinia._s.get("subgraph")
  const found = store.subgraphBlueprints.find(b => b.display_name === name)
  if (!found) return null
  const blueprint = store.getBlueprint(found.name)
  app.graph.clear()
  const items = { nodes: blueprint.nodes, subgraphs: blueprint.definitions.subgraphs }
  app.canvas._deserializeItems(items, { position: [100, 100] })
  return JSON.stringify((await app.graphToPrompt()).output)
}"""
by_name = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def parts(path) -> tuple[dict, dict]:
    """(the one node on the canvas, its subgraph)."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    (node,), (subgraph,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == path.stem
    return node, subgraph


def test_the_server_lists_them_with_their_data(server):
    listed = server.client.get_json("/global_subgraphs")
    ours = {k: v for k, v in listed.items() if v["source"] == "custom_node"}
    assert sorted(v["name"] for v in ours.values()) == NAMES == [p.stem for p in FILES]
    assert {v["info"]["node_pack"] for v in ours.values()} == {"custom_nodes.frame-memory"}
    for key, entry in ours.items():
        data = server.client.get_json(f"/global_subgraphs/{key}")["data"]
        assert data == (REPO / "subgraphs" / f"{entry['name']}.json").read_text(encoding="utf-8")


@by_name
def test_every_node_and_socket_exists_and_is_connected(path, definitions):
    node, subgraph = parts(path)
    inside = {n["id"]: n for n in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    for link in links.values():
        start = subgraph["inputs"] if link["origin_id"] == INPUT else inside[link["origin_id"]]["outputs"]
        end = subgraph["outputs"] if link["target_id"] == OUTPUT else inside[link["target_id"]]["inputs"]
        source, target = start[link["origin_slot"]], end[link["target_slot"]]
        assert source["type"] == link["type"] and link["type"] in target["type"].split(",")
        assert link["id"] in (source.get("links") or source.get("linkIds"))
        assert link["id"] in (target.get("linkIds") or [target.get("link")])
    for inner in inside.values():
        definition = definitions[inner["type"]]
        assert not definition.get("deprecated")
        groups = definition["input"]
        names = {*groups.get("required", {}), *groups.get("optional", {})}
        assert {i["name"] for i in inner["inputs"]} <= names
        linked = {i["name"] for i in inner["inputs"] if i.get("link") in links}
        assert {
            k for k, s in groups["required"].items() if isinstance(s[0], str) and s[0] not in WIDGET_TYPES
        } <= linked
    assert [i["name"] for i in node["inputs"]] == [i["name"] for i in subgraph["inputs"]]
    assert [o["name"] for o in node["outputs"]] == [o["name"] for o in subgraph["outputs"]]
    for inner, widget in node["properties"]["proxyWidgets"]:
        assert widget in {i["name"] for i in inside[int(inner)]["inputs"]}


@by_name
def test_loaders_carry_links(path):
    loaders = [n for n in parts(path)[1]["nodes"] if n["type"] in LOADED_FROM]
    assert loaders
    for node in loaders:
        files = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        models = node["properties"]["models"]
        assert [m["name"] for m in models] == files
        for model in models:
            assert model["directory"] == LOADED_FROM[node["type"]]
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith("/" + model["name"])


@by_name
def test_what_a_link_replaces_holds_no_text(path):
    """A text that a link hides is neither seen nor used, and is shared with the file all the same."""
    for node in parts(path)[1]["nodes"]:
        widgets = [i for i in node["inputs"] if i.get("widget")]
        for entry, value in zip(widgets, node.get("widgets_values") or [], strict=False):
            named = str(value).endswith(".safetensors")
            assert entry["link"] is None or not isinstance(value, str) or len(value) < 40 or named, (node["id"], value)


def inserted(editor, name: str) -> dict:
    """API format of a canvas with the blueprint alone, put there as the editor does when it is chosen from the list."""
    text = editor.evaluate(INSERT, name)
    assert text, f"'{name}' is not in the editor's list"
    return json.loads(text)


def feed(prompt: dict, path, **values) -> dict:
    """Connects inputs of the blueprint."""
    subgraph, number = parts(path)[1], next(iter(prompt)).split(":")[0]
    for name, value in values.items():
        (entry,) = [i for i in subgraph["inputs"] if i["name"] == name]
        for link in [link for link in subgraph["links"] if link["id"] in entry["linkIds"]]:
            (inner,) = [n for n in subgraph["nodes"] if n["id"] == link["target_id"]]
            prompt[f"{number}:{inner['id']}"]["inputs"][inner["inputs"][link["target_slot"]]["name"]] = value
    return prompt


def of_class(prompt: dict, class_type: str) -> str:
    (node_id,) = [i for i, n in prompt.items() if n["class_type"] == class_type]
    return node_id


@by_name
def test_the_frontend_offers_and_converts_it(editor, definitions, path):
    prompt, subgraph = inserted(editor, path.stem), parts(path)[1]
    assert sorted(n["class_type"] for n in prompt.values()) == sorted(n["type"] for n in subgraph["nodes"])
    for node in prompt.values():
        groups = definitions[node["class_type"]]["input"]
        assert set(node["inputs"]) <= {*groups.get("required", {}), *groups.get("optional", {})}


@pytest.mark.parametrize("path", FILES[:2], ids=lambda p: p.stem)
def test_what_is_cut_out_is_what_the_composer_shows(editor, server, tmp_path, path):
    """A red thing on blue, masked by its redness: the canvas holds the red thing and nothing blue."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[12:36, 16:48] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "thing.png")
    picture = {"image": server.client.upload_image(tmp_path / "thing.png", "frame_memory_thing.png")}
    prompt = feed(inserted(editor, path.stem), path, image=["picture", 0])
    finder = of_class(prompt, "SAM3_Detect" if "SAM" in path.stem else "RemoveBackground")
    prompt[finder] = {"class_type": "ImageToMask", "inputs": {"image": ["picture", 0], "channel": "red"}}
    prompt = {i: n for i, n in prompt.items() if n["class_type"] in ("ImageToMask", "InvertMask", "JoinImageWithAlpha")}
    reference, mask = [of_class(prompt, "JoinImageWithAlpha"), 0], [of_class(prompt, "ImageToMask"), 0]
    prompt |= {
        "picture": {"class_type": "LoadImage", "inputs": picture},
        "canvas": {
            "class_type": "FrameMemoryFirstFrameComposer",
            "inputs": {
                "references.reference_1": reference, "masks.mask_1": mask, "width": 128, "height": 64,
                "layout": "official stack", "boxes": "",
            },
        },
        "shown": {"class_type": "PreviewImage", "inputs": {"images": ["canvas", 0]}},
    }  # fmt: skip
    (file,) = server.client.queue(prompt, timeout=300).outputs["shown"]["images"]
    (tmp_path / "canvas.png").write_bytes(server.client.view(file["filename"], file["subfolder"], file["type"]))
    canvas = np.asarray(Image.open(tmp_path / "canvas.png").convert("RGB")).astype(int)
    red = (canvas[..., 0] > 200) & (canvas[..., 1:] < 60).all(-1)
    blue = (canvas[..., 2] > 150) & (canvas[..., 0] < 100)
    assert red.sum() == 24 * 32 and not blue.any()


def test_the_whole_of_ffgo_in_one_node_makes_the_clip(editor, server, picture, wan_stand_ins):
    path = FILES[2]
    prompt = feed(inserted(editor, path.stem), path, canvas=["canvas", 0], caption="a red circle over hills")
    prompt = shrink_wan(prompt)
    prompt |= {
        "picture": {"class_type": "LoadImage", "inputs": {"image": PICTURE_NAME}},
        "canvas": {
            "class_type": "FrameMemoryFirstFrameComposer",
            "inputs": {
                "references.reference_1": ["picture", 0], "width": 64, "height": 64, "layout": "official stack",
                "boxes": "",
            },
        },
        "save": {
            "class_type": "SaveVideo",
            "inputs": {
                "video": [of_class(prompt, "CreateVideo"), 0], "filename_prefix": "video/blueprint", "format": "auto",
                "codec": "auto",
            },
        },
    }  # fmt: skip
    frames, rate = frames_in(path_of(server, server.client.queue(prompt, timeout=900), "save"))
    assert frames.shape == (9, 64, 64, 3) and rate == 16
