"""Fixtures of the tests that run the example graphs."""

import pytest

from scripts import workflow

from .tiny import PICTURE_NAME, SELFTEST_VIDEOS, START_PICTURE, save_direct_forcing, wan_files


@pytest.fixture(scope="session")
def definitions(server):
    """The server's node definitions."""
    return server.client.object_info()


@pytest.fixture(scope="session")
def picture(server):
    """The self-test's start picture, and its two videos, in the server's input folder."""
    for path in SELFTEST_VIDEOS:
        server.client.upload_image(path, path.name)
    return server.client.upload_image(START_PICTURE, PICTURE_NAME)


@pytest.fixture(scope="session")
def api(definitions, picture):
    """Makes the API format of a graph file. on: classes of nodes that are bypassed in it and shall run."""

    def convert(path, on=()):
        graph = workflow.read(path)
        for node in graph["nodes"]:
            node["mode"] = 0 if node["type"] in on else node.get("mode", 0)
        return workflow.to_api(graph, definitions)

    return convert


@pytest.fixture(scope="session")
def direct_forcing_file(server):
    """A Direct Forcing checkpoint for the self-test F1, in the server's folder."""
    save_direct_forcing(server.base / "models" / "frame_memory")


@pytest.fixture(scope="session")
def wan_stand_ins(server):
    """Two models, their VAE and a LoRA for each, in the server's folders."""
    folder = server.base / "models"
    for name in ("diffusion_models", "loras", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    weights = {}
    for seed, name in enumerate((wan_files.HIGH, wan_files.LOW)):
        weights = wan_files.save_model(folder / "diffusion_models" / name, seed)
    for seed, name in enumerate((wan_files.LORA_HIGH, wan_files.LORA_LOW)):
        wan_files.save_lora(folder / "loras" / name, weights, seed=seed)
    wan_files.save_vae(folder / "vae" / wan_files.VAE)
