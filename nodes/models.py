"""Nodes of the family "models": checkpoints and LoRAs."""

from __future__ import annotations

import logging
import os

import folder_paths
from comfy_api.latest import io, ui

from ..frame_memory.model import checkpoint, lora, tensor_file
from ..frame_memory.model.framepack import CONTRADICTED, MODEL_OPTION
from ..frame_memory.model.sources import LOAD_LORA
from ..frame_memory.sampling.prompts import lost_spaces
from .model_inputs import DIFFUSION_MODELS, DTYPES, model_file, number_format
from .shown import show

AUTO = "from the file"
HUNYUAN = "HunyuanVideo"
KINDS = {"F0 (inverted)": "F0", "F1 (forward)": "F1"}


def _checkpoint_inputs() -> list[io.Input]:
    return [
        model_file("three shards"),
        io.Combo.Input(
            "kind",
            options=[AUTO, *KINDS],
            default=AUTO,
            tooltip=(
                "Which FramePack this is. F0 makes the video from its end to its start, F1 from start to end. "
                "The weights do not say; 'from the file' reads the file's metadata or its name in the model "
                "folder, and refuses to guess. The wrong kind makes a plausible but wrong video."
            ),
        ),
        number_format("24 GB to 12 GB"),
        io.Boolean.Input(
            "save_converted",
            default=False,
            advanced=True,
            tooltip=(
                "Also save the file in ComfyUI's layout beside the others (models/diffusion_models, same size "
                "on disk). Loads faster, and stock and GGUF tools can read it. Nothing is overwritten."
            ),
        ),
    ]


class FrameMemoryLoadFramePack(io.ComfyNode):
    """Read any published FramePack file as a core MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryLoadFramePack",
            display_name="Load FramePack Model",
            category="model/loaders",
            description=(
                "Loads a FramePack checkpoint (three shards, single file, bf16 or fp8, diffusers or ComfyUI layout) as "
                "a normal MODEL: LoRA, ModelSampling, torch.compile, caching and offloading nodes work on it."
            ),
            search_aliases=["framepack", "framepack f1", "load diffusion model", "hunyuan long video"],
            inputs=_checkpoint_inputs(),
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The FramePack network as ComfyUI's MODEL. Sample it with Anti-Drift Sampler.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip=(
                        "Kind and who says so, layout, number formats, tensors and bytes of the checkpoint, and what "
                        "was saved."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, kind, weight_dtype="default", save_converted=False) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(DIFFUSION_MODELS, model_name)
        info = checkpoint.inspect(path, model_name)
        known = KINDS.get(kind) or info.kind
        if known is None:
            raise ValueError(
                f"'{model_name}' says neither in its name nor in its metadata whether it is F0 or F1. "
                f"Set 'kind' in 'Load FramePack Model' to one of: {', '.join(KINDS)}."
            )
        model = checkpoint.load_framepack(path, dict(DTYPES[weight_dtype]))
        _, metadata = tensor_file.read_header(info.shards[0])
        base = metadata.get("frame_memory.base", HUNYUAN)
        said = {"kind": known, "base": base}
        contradicted = f"the file's {info.kind_from} says {info.kind}" if info.kind not in (None, known) else ""
        if contradicted:
            said[CONTRADICTED] = contradicted
        model.model_options = {**model.model_options, MODEL_OPTION: said}
        lines = [*_kind_warning(model_name, known, info, contradicted)]
        lines += [f"{model_name}: FramePack {known}, {_kind_source(kind, info)}", *info.report()]
        lines += checkpoint.in_memory(model, info, weight_dtype)
        if save_converted:
            lines.append(_save_converted(path, info, known))
        # Here, since CLIP Text Encode cannot say it: by the time of sampling a prompt is numbers.
        for warning in lost_spaces() if base == HUNYUAN else ():
            logging.warning("%s", warning)
            lines.append(f"Warning: {warning}")
        report = "\n".join(lines)
        show(cls, report)
        return io.NodeOutput(model, report, ui=ui.PreviewText(report))


def _kind_source(kind: str, info) -> str:
    """Who says which kind it is."""
    return "as the widget says" if kind in KINDS else f"as the file's {info.kind_from} says"


def _kind_warning(model_name: str, known: str, info, contradicted: str) -> list[str]:
    if not contradicted:
        return []
    text = (
        f"Warning: 'kind' is {known}, and {contradicted}. The wrong kind makes a plausible but wrong video. Set 'kind' "
        f"to '{AUTO}', unless you know better."
    )
    logging.warning("%s: %s", model_name, text.removeprefix("Warning: "))
    return [text]


def _save_converted(path: str, info, kind: str) -> str:
    stem = os.path.basename(checkpoint.SHARD.sub(r"\g<stem>", os.path.basename(path)))
    stem = os.path.splitext(stem)[0]
    if stem == "diffusion_pytorch_model":
        stem = os.path.basename(os.path.dirname(path))
    target = os.path.join(_place_for_models(), f"{stem}_comfy.safetensors")
    if info.layout == "native":
        return "not saved again: the file is in ComfyUI's layout already"
    if os.path.exists(target):
        return f"not saved again: {os.path.basename(target)} is there already"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    stored, metadata = checkpoint.open_state_dict(path)
    checkpoint.save_native(stored, target, metadata, kind, source=path)
    return f"saved in ComfyUI's layout as {os.path.basename(target)}"


def _place_for_models() -> str:
    """The first folder called diffusion_models; ComfyUI itself lists its older one, models/unet, before it."""
    folders = folder_paths.get_folder_paths(DIFFUSION_MODELS)
    return next((f for f in folders if os.path.basename(os.path.normpath(f)) == DIFFUSION_MODELS), folders[0])


class FrameMemoryLoraLoader(io.ComfyNode):
    """Apply a LoRA in names that core knows or not, and say what of it was used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryLoraLoader",
            display_name=LOAD_LORA,
            category="model/loaders",
            description=(
                "Applies a LoRA and says how much of the file was used. For FramePack it reads all four common key "
                "styles, of which the stock LoRA loader knows one; for Wan (FFGo) and others the same as the stock one."
            ),
            search_aliases=["framepack lora", "hunyuan lora", "wan lora", "ffgo lora", "musubi", "kohya"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to patch. It is not changed; a copy is returned."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip=(
                        "File in models/loras (safetensors only). A file of which nothing fits is refused, unless "
                        "allow_no_match is on."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How strongly the LoRA acts: 0 is off, 1 as trained. Negative values turn it round.",
                ),
                io.Boolean.Input(
                    "allow_no_match",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What to do with a file of which nothing fits (0 % matched). Off stops with an error. On warns "
                        "and hands the model on unchanged, for graphs that try many files."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the LoRA on; several can be chained."),
                io.String.Output(
                    display_name="report",
                    tooltip="Key style, share of the file's modules that were applied, and names of the rest.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, lora_name, strength, allow_no_match=False) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        patched, match = lora.apply_lora(model, tensor_file.read(path, LOAD_LORA), strength, allow_no_match)
        swapped = lora.expert_warning(lora_name, model) if strength else ""
        if swapped:
            logging.warning("%s", swapped)
        off = "Strength 0: the LoRA is off." if strength == 0 else ""
        report = "\n".join(filter(None, [lora_name, match.report(), off, swapped]))
        show(cls, report)
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))


NODES = [FrameMemoryLoadFramePack, FrameMemoryLoraLoader]
