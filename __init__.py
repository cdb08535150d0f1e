"""Frame Memory: a memory for video models, as ComfyUI nodes."""

from __future__ import annotations

import os

WEB_DIRECTORY = "./web"
SELFTEST_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "selftest_models")


def _register_folders() -> None:
    import folder_paths

    folder_paths.add_model_folder_path("frame_memory", os.path.join(folder_paths.models_dir, "frame_memory"))
    for kind in ("diffusion_models", "vae", "loras", "frame_memory"):
        folder_paths.add_model_folder_path(kind, os.path.join(SELFTEST_FOLDER, kind))


async def comfy_entrypoint():
    """ComfyUI's door to the pack: registers the FramePack model class, the model folders and the nodes.

    A family of nodes whose part of ComfyUI has changed is left out and named in the log; the others still register.
    """
    import importlib

    from comfy_api.latest import ComfyExtension

    from .frame_memory.model import host_contract

    sound = host_contract.sound_families()
    families = [importlib.import_module(f".nodes.{name}", __package__) for name in sound]

    class FrameMemory(ComfyExtension):
        async def on_load(self) -> None:
            _register_folders()
            if "models" in sound:
                from .frame_memory.model import framepack

                framepack.register()

        async def get_node_list(self) -> list:
            return [node for family in families for node in family.NODES]

    return FrameMemory()
