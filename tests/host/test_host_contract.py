"""Fault 42: core's internals move. What is missing is named, and the nodes that do not need it still register."""

import json
import subprocess
import sys

import pytest

from frame_memory.model import host_contract as contract

from . import source

LOAD = """
import asyncio, importlib.util, json, logging, sys
from comfy.cli_args import args
args.cpu = True
import comfy.samplers, comfy.conds, folder_paths, comfy_extras.nodes_custom_sampler
{sabotage}
class Keep(logging.Handler):
    said = []
    def emit(self, record):
        if record.levelno >= logging.ERROR:
            self.said.append(record.getMessage())
logging.getLogger().addHandler(Keep())
spec = importlib.util.spec_from_file_location("pack", {init!r}, submodule_search_locations=[{repo!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
async def load():
    extension = await pack.comfy_entrypoint()
    await extension.on_load()
    return [n.GET_SCHEMA().node_id for n in await extension.get_node_list()]
print(json.dumps({{"nodes": asyncio.run(load()), "said": Keep.said}}))
"""


def load_pack(sabotage: str) -> dict:
    """Load the pack as ComfyUI does, in a fresh process whose ComfyUI was changed first."""
    code = LOAD.format(sabotage=sabotage, init=str(source.REPO / "__init__.py"), repo=str(source.REPO))
    line = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_this_comfyui_keeps_the_contract():
    assert contract.check() == {}
    assert contract.sound_families() == list(contract.FAMILIES)


@pytest.mark.parametrize("family", contract.FAMILIES)
def test_the_contract_lists_every_symbol_the_family_refers_to(family):
    declared = {need.symbol for need in contract.FAMILIES[family].needs}
    files = source.closure_of(source.REPO / "nodes" / f"{family}.py")
    used = set().union(*(source.host_symbols(path) for path in files))
    uncovered = {u for u in used if not is_covered(u, declared)}
    assert not uncovered, f"add to host_needs: {sorted(uncovered)}"


def is_covered(used: str, declared: set[str]) -> bool:
    """A declared name, something inside one, or the way to one (a module, a class with a declared method)."""
    return any(used == d or used.startswith(d + ".") or d.startswith(used + ".") for d in declared)


def test_the_families_are_the_node_files_and_their_nodes():
    for name, family in contract.FAMILIES.items():
        text = (source.REPO / "nodes" / f"{name}.py").read_text(encoding="utf-8")
        registered = {line.split('"')[1] for line in text.splitlines() if line.strip().startswith("node_id=")}
        assert registered == set(family.nodes)


def test_fault_42_a_missing_symbol_is_named_and_other_nodes_still_register():
    got = load_pack("del comfy.samplers.KSAMPLER")
    lost = set(contract.FAMILIES["sampling"].nodes)
    every = {n for family in contract.FAMILIES.values() for n in family.nodes}
    assert set(got["nodes"]) == every - lost
    (line,) = got["said"]
    assert "comfy.samplers.KSAMPLER is missing" in line and all(n in line for n in lost) and "Update" in line


def test_fault_42_a_changed_signature_is_named():
    got = load_pack("folder_paths.get_save_image_path = lambda prefix, directory: None")
    assert "FrameMemorySaveLongVideo" not in got["nodes"] and "FrameMemoryAntiDriftSampler" in got["nodes"]
    assert len(got["said"]) == 2, "the families that save a file"
    for line in got["said"]:
        assert "get_save_image_path no longer takes filename_prefix, output_dir, image_width, image_height" in line


def test_fault_42_an_exact_signature_may_not_grow():
    need = contract.Need("frame_memory.model.host_contract.problem", ("need",), exact=True)
    assert contract.problem(need) is None
    assert "takes (need) now" in contract.problem(contract.Need(need.symbol, ("need", "more"), exact=True))


def test_a_whole_module_that_is_gone_is_named():
    assert "comfy has no no_such_module" in contract.problem(contract.Need("comfy.no_such_module.thing")) or (
        "No module named 'comfy.no_such_module'" in contract.problem(contract.Need("comfy.no_such_module.thing"))
    )
