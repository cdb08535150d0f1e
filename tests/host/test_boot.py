"""The real server starts with the pack in custom_nodes: a clean log, everything registered, everything explained."""

import ast
import re

import pytest

from .source import REPO, runtime_files, tree

NODE_ID = re.compile(r"FrameMemory[A-Za-z]+")


def node_ids():
    """The ids in the source of the nodes, read without importing anything."""
    found = []
    for path in runtime_files():
        if path.parent == REPO / "nodes":
            for node in ast.walk(tree(path)):
                if isinstance(node, ast.keyword) and node.arg == "node_id" and isinstance(node.value, ast.Constant):
                    found.append(node.value.value)
    return sorted(found)


@pytest.fixture(scope="module")
def boot_log(server):
    """What the server printed until it listened."""
    return server.log().split("To see the GUI go to")[0]


@pytest.fixture(scope="module")
def definitions(server):
    return {k: v for k, v in server.client.object_info().items() if k.startswith("FrameMemory")}


def test_the_boot_log_is_clean(boot_log):
    lines = boot_log.splitlines()
    bad = [line for line in lines if re.search(r"frame-memory.*(IMPORT FAILED|rror)|Traceback|Exception", line)]
    bad += [line for line in lines if "ERROR" in line or ("WARNING" in line and re.search("rame.?.?emory", line))]
    assert not bad, "\n".join(lines[-60:])
    assert re.search(r"seconds: .*frame-memory", boot_log)


def test_every_node_is_registered_and_none_besides(definitions):
    assert sorted(definitions) == node_ids() != []
    assert all(NODE_ID.fullmatch(name) for name in definitions)


@pytest.mark.parametrize("name", node_ids())
def test_every_input_and_output_is_explained(definitions, name):
    definition = definitions[name]
    missing = []
    for kind in ("required", "optional"):
        for key, spec in definition["input"].get(kind, {}).items():
            if not (len(spec) > 1 and str(spec[1].get("tooltip", "")).strip()):
                missing.append(key)
    tooltips = definition.get("output_tooltips") or [None] * len(definition["output"])
    missing += [f"output {n}" for n, tip in zip(definition["output_name"], tooltips) if not tip]
    assert not missing
    assert definition["description"].strip() and definition["display_name"].strip() and definition["category"].strip()
    assert not definition["display_name"].startswith("FrameMemory")


@pytest.mark.parametrize("name", node_ids())
def test_every_node_has_a_help_page(server, name):
    page = REPO / "web" / "docs" / f"{name}.md"
    assert page.is_file()
    served = server.client.get(f"/extensions/frame-memory/docs/{name}.md")
    assert served == page.read_bytes()


def test_numbers_have_bounds_and_defaults_inside_them(definitions):
    for name, definition in definitions.items():
        for group in ("required", "optional"):
            for key, spec in definition["input"].get(group, {}).items():
                if spec[0] in ("INT", "FLOAT") and not spec[1].get("forceInput"):
                    low, high, default = (spec[1].get(k) for k in ("min", "max", "default"))
                    assert low is not None and high is not None and low <= default <= high, f"{name}.{key}"


def test_the_template_folder_is_served(server):
    packs = server.client.get_json("/api/workflow_templates")
    names = {p.stem for p in (REPO / "workflows").glob("*.json")}
    assert set(packs.get("frame-memory", [])) == names != set()


def test_fault_43_without_a_gpu_every_node_registers_and_validates(server, definitions):
    """The server of the tests runs with --cpu: a graph of ours is refused for its own reason, not for a missing GPU."""
    stats = server.client.get_json("/system_stats")
    assert {d["type"] for d in stats["devices"]} == {"cpu"}
    from scripts.client import PromptError

    graph = {"1": {"class_type": "FrameMemorySaveLongVideo", "inputs": {}}}
    with pytest.raises(PromptError) as refused:
        server.client.submit(graph)
    assert "Required input is missing" in str(refused.value) and "CUDA" not in str(refused.value)


def test_fault_47_spaces_quotes_and_other_scripts_in_the_path_do_no_harm(server):
    """The whole server lives in such a folder; a file made there comes back byte for byte."""
    assert re.search("[^\x00-\x7f]", str(server.base)) and " " in str(server.base) and "'" in str(server.base)
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "Größe 画/a b"}},
    }
    entry = server.client.queue(graph).outputs["2"]["images"][0]
    saved = server.base / "output" / entry["subfolder"] / entry["filename"]
    assert server.client.view(**entry) == saved.read_bytes()
