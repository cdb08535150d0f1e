"""Nodes of the family "sampling": start picture, sigmas, sampler, the section loop."""

from __future__ import annotations

from functools import partial

import node_helpers
import torch
from comfy_api.latest import InputImpl, io, ui

from ..frame_memory.journal.project import IF_CHANGED
from ..frame_memory.plan import ORDERS, flow_shift, sigma_schedule
from ..frame_memory.sampling.attention_backend import AUTOMATIC, CHOICES, choose_attention
from ..frame_memory.sampling.handed_out import HandedOut
from ..frame_memory.sampling.long_video import ORDER_AUTO, Live, latent_of, sample_long_video
from ..frame_memory.sampling.project_run import ProjectRequest
from ..frame_memory.sampling.step_cache import DRIFT, NODE, choose_step_cache
from ..frame_memory.sampling.unipc import framepack_unipc
from ..frame_memory.video.images import BACKGROUNDS
from ..frame_memory.video.start_image import prepare
from .shown import container_metadata, picture_of, projects_folder, saved, show, show_video
from .sockets import FrameContextSocket, FrameMemorySocket, SectionChangesSocket, TimelineSocket

CATEGORY = "model/sampling/framepack"


def _picture_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("positive", tooltip="Prompt from CLIP Text Encode; FluxGuidance 10 fits."),
        io.Vae.Input(
            "vae",
            tooltip="The model's VAE: HunyuanVideo's for FramePack, Wan 2.1's for Wan, 2.2's for 5B.",
        ),
        io.Image.Input("image", tooltip="Start picture, any size. A batch makes one video for each picture."),
        io.Int.Input(
            "size",
            default=640,
            min=64,
            max=2048,
            step=16,
            tooltip=(
                "Side in pixels of a square with the video's area; width and height follow the picture's shape "
                "on FramePack's list of sizes (multiples of 16, with Wan 2.2 5B of 32); 640 gives Wan's 832x480 "
                "too. Trained at 640; smaller is faster."
            ),
        ),
    ]


def _optional_picture_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="Negative prompt, for CFG above 1 (CFGGuider). Not needed at CFG 1.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="sigclip_vision_patch14_384 for FramePack, clip_vision_h for Wan 2.1 image to video: both "
            "expect it. None for other Wan models.",
        ),
        io.Image.Input(
            "end_image",
            optional=True,
            tooltip="Last picture of the video; only F0 can aim at one. Fitted to the start picture's size.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip=(
                "Transparency of 'image', 1 where it is transparent: the MASK of Load Image, which takes the "
                "alpha out of the picture. Those parts show 'background'."
            ),
        ),
        io.Mask.Input(
            "end_mask",
            optional=True,
            tooltip="Transparency of 'end_image', in the same way.",
        ),
        io.Combo.Input(
            "background",
            options=list(BACKGROUNDS),
            default="white",
            advanced=True,
            tooltip="Colour laid under the transparent parts of pictures: their alpha, or 'mask' and 'end_mask'.",
        ),
        io.Boolean.Input(
            "still_clip",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "On for Helios, off for all others. 'start' is then the picture held still for 33 pictures (9 latent "
                "frames): what Helios's first section looks back on. It takes a few seconds more."
            ),
        ),
    ]


class FrameMemoryFramePackImage(io.ComfyNode):
    """The start picture, and the end picture where the model can aim at one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryFramePackImage",
            display_name="FramePack Image",
            category="model/conditioning/framepack",
            description=(
                "Fits the start picture to FramePack's nearest size, encodes it, and adds what CLIP vision sees of it "
                "to the prompts."
            ),
            search_aliases=["framepack start frame", "i2v", "bucket resize", "end frame"],
            inputs=[*_picture_inputs(), *_optional_picture_inputs()],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the vision features."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the same features."),
                io.Latent.Output(display_name="start", tooltip="Start latent, 1 latent frame, for Anti-Drift Sampler."),
                io.Latent.Output(display_name="end", tooltip="End latent, or nothing where no end_image is connected."),
                io.Image.Output(display_name="image", tooltip="The start picture as the model sees it, in pixels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, positive, vae, image, size, negative=None, clip_vision=None, end_image=None, mask=None, end_mask=None,
        background="white", still_clip=False,
    ) -> io.NodeOutput:  # fmt: skip
        made = prepare(vae, clip_vision, image, end_image, size, background, mask, end_mask, still_clip)
        values = {} if made.vision is None else {"clip_vision_output": made.vision}
        positive = node_helpers.conditioning_set_values(positive, values)
        negative = None if negative is None else node_helpers.conditioning_set_values(negative, values)
        show(cls, made.report)
        shown = ui.PreviewText(made.report)
        return io.NodeOutput(positive, negative, made.start, made.end, made.picture_BHWC, ui=shown)


class FrameMemorySigmas(io.ComfyNode):
    """FramePack's own noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemorySigmas",
            display_name="FramePack Sigmas",
            category="model/sampling/schedulers",
            description="The noise levels FramePack was published with; the shift follows the size of the window.",
            search_aliases=["framepack scheduler", "flow shift", "steps"],
            inputs=[
                io.Latent.Input("latent", tooltip="Start latent; only its width and height are read."),
                io.Int.Input(
                    "steps",
                    default=25,
                    min=1,
                    max=1000,
                    tooltip="Model calls for each section of 1.2 s. 25 as published; fewer is faster and rougher.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Highest noise level, 0 to 1. 1 for new video. Below 1 with 'initial' in Anti-Drift Sampler: "
                        "video to video, less change the lower. All levels are scaled, none is dropped."
                    ),
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Flow shift. 0 computes it from the tokens of the window (7 at all of FramePack's sizes).",
                ),
                FrameContextSocket.Input(
                    "frame_context",
                    optional=True,
                    tooltip="Only for schedules with another window than 9 latent frames: the shift then follows it.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 noise levels from 'strength' down to 0.")
            ],
        )

    @classmethod
    def execute(cls, latent, steps, strength=1.0, shift=0.0, frame_context=None) -> io.NodeOutput:
        height, width = latent_of("latent", latent, "FramePack Sigmas").shape[-2:]
        window = 9 if frame_context is None else frame_context.schedule.window
        tokens = window * ((height + 1) // 2) * ((width + 1) // 2)
        values = sigma_schedule(steps, shift or flow_shift(tokens))
        return io.NodeOutput(torch.tensor(values, dtype=torch.float32) * strength)


class FrameMemoryUniPC(io.ComfyNode):
    """FramePack's own sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryUniPC",
            display_name="FramePack UniPC",
            category="model/sampling/samplers",
            description=(
                "The sampler FramePack was published with. Unlike ComfyUI's uni_pc it keeps its order to the end and "
                "returns the last prediction. Any other stock sampler works too."
            ),
            search_aliases=["unipc", "framepack sampler"],
            inputs=[],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="SAMPLER; one model call a step.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(framepack_unipc())


class FrameMemoryStepCache(io.ComfyNode):
    """Steps that the network is not asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryStepCache",
            display_name=NODE,
            category=CATEGORY,
            description=(
                "Makes sections faster: a step whose result can be told from the steps before it is not computed. What "
                "that may cost is set here, and can be measured."
            ),
            search_aliases=["teacache", "magcache", "easycache", "step caching", "skip steps", "faster sampling"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "FramePack, Wan or any other MODEL. It is not changed; a copy is returned. Of Wan 2.2's two "
                        "experts each needs this node."
                    ),
                ),
                io.Float.Input(
                    "drift",
                    default=DRIFT,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Estimated error allowed in a skipped step, as a share of the model's output, 0 to 1. At 0.2 "
                        "the self-test models skip three of five of 25 steps. Higher skips more and is less exact; "
                        "'measure' tells how much. 0 skips none and changes nothing."
                    ),
                ),
                io.Boolean.Input(
                    "measure",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "On: the first section that Anti-Drift Sampler makes is made once more without this node, and "
                        "its report says how far they are apart, in dB (26 and more is near). Changes no picture. "
                        "Sections that are reused are not measured: take another seed."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The MODEL that skips steps, for the guider.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, drift, measure=False) -> io.NodeOutput:
        chosen, report = choose_step_cache(model, drift, measure)
        show(cls, report)
        return io.NodeOutput(chosen, ui=ui.PreviewText(report))


def _run_inputs() -> list[io.Input]:
    return [
        io.Noise.Input("noise", tooltip="RandomNoise: one generator draws the noise of every section in turn."),
        io.Guider.Input(
            "guider",
            tooltip="BasicGuider, or CFGGuider for a negative prompt, around FramePack, or around Wan behind Wan Frame "
            "Context; Wan Expert Guider for the two experts of Wan 2.2.",
        ),
        io.Sampler.Input("sampler", tooltip="FramePack UniPC, or any stock sampler. Used for each section."),
        io.Sigmas.Input("sigmas", tooltip="FramePack Sigmas, or any scheduler's. Used for each section."),
        FrameContextSocket.Input("frame_context", tooltip="How the history is packed: Frame Context Packer."),
        io.Latent.Input(
            "start",
            tooltip=(
                "Start latent from FramePack Image; its first frame begins the video. With 'history' only size and "
                "batch count. Helios takes it with 'still_clip', or an empty latent for text to video, and hides it."
            ),
        ),
        io.Float.Input(
            "seconds",
            default=4.8,
            min=0.1,
            max=3600.0,
            step=0.1,  # the editor shows and keeps as many decimals as the step has
            tooltip=(
                "Length in seconds, in whole sections: of 1.2 s (36 frames at 30 fps) with FramePack, of 5 s (80 "
                "frames at 16 fps) with Wan's presets, of 1.375 s (33 frames at 24 fps) with Helios. The video has one "
                "frame more, the start picture. The exact length is shown before the first step."
            ),
        ),
        io.String.Input(
            "project",
            default="",
            tooltip=(
                "Name of the folder in output/frame_memory that keeps every finished section; queue again to go on "
                "after a crash or Cancel. Empty: one project for each start picture and size, named by itself."
            ),
        ),
        io.Combo.Input(
            "order",
            options=[ORDER_AUTO, *ORDERS],
            default=ORDER_AUTO,
            advanced=True,
            tooltip=(
                "Which section is made first. The schedule says it; choose another only to experiment. inverted: from "
                "the end to the start. forward: from the start on. both ends first: the last section, then forward."
            ),
        ),
        io.Combo.Input(
            "if_changed",
            options=list(IF_CHANGED),
            default=IF_CHANGED[0],
            advanced=True,
            tooltip=(
                "When the project was made with other settings. reuse what fits: sections that the change does not "
                "touch are kept, replaced ones become takes. fork: a new project beside it. refuse: say what differs. "
                "Another checkpoint of the same kind makes all anew; another size, batch, or F0 for F1 is refused."
            ),
        ),
    ]


def _optional_inputs() -> list[io.Input]:
    return [
        io.Latent.Input(
            "end", optional=True, tooltip="End latent from FramePack Image (F0, or a schedule with an end anchor)."
        ),
        io.Latent.Input(
            "history",
            optional=True,
            tooltip=(
                "Latents of an existing video to go on from; they stay in front of the result, unchanged, and take the "
                "place of the start picture."
            ),
        ),
        io.Latent.Input(
            "initial",
            optional=True,
            tooltip="Latents of a whole video to start from (video to video); set strength in FramePack Sigmas.",
        ),
        TimelineSocket.Input(
            "timeline", optional=True, tooltip="Prompts over time; takes the place of the guider's positive text."
        ),
        SectionChangesSocket.Input(
            "changes", optional=True, tooltip="Sections to make anew with another seed or prompt: Pick Section."
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip=(
                "With it every section is decoded (windowed) and encoded as it finishes: the node shows what is there, "
                "Cancel leaves an mp4, the finished one lies in the project. On a GPU, model and VAE take turns in "
                "VRAM. Of a batch only the first video."
            ),
        ),
        FrameMemorySocket.Input(
            "memory",
            optional=True,
            tooltip=(
                "Memory of all that is finished, from MemoryPack Encoder (F1) or Frame Preservation Encoder (F1, Wan): "
                "each section sees its tokens beside its context. Only where the video is made from its start."
            ),
        ),
    ]


HANDED_OUT = HandedOut()


def _whose(node) -> str:
    """The running node's number in its graph."""
    return "" if node.hidden is None else str(node.hidden.unique_id)


class FrameMemoryAntiDriftSampler(io.ComfyNode):
    """The section loop around stock GUIDER, SAMPLER, SIGMAS and NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryAntiDriftSampler",
            display_name="Anti-Drift Sampler",
            category=CATEGORY,
            description=(
                "Makes a long video section by section. Each section is sampled with a packed context of what "
                "is finished, in the order that the schedule was trained for."
            ),
            search_aliases=["framepack sampler", "long video", "section sampler", "anti drifting"],
            is_output_node=True,
            inputs=[*_run_inputs(), *_optional_inputs()],
            outputs=[
                io.Latent.Output(
                    display_name="samples",
                    tooltip="The whole video as a latent: 1 + 9 (Wan 20) latent frames a section. For Save Long Video.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The plan: frames, seconds and context of each section, what was reused, and warnings.",
                ),
                io.String.Output(display_name="project", tooltip="Name of the project that holds the sections."),
                io.Video.Output(
                    display_name="video",
                    tooltip="The finished mp4 (H.264, at the model's fps) in the project; nothing without a vae.",
                ),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip=(
                        "One picture of each section with its number (for Pick Section) and its time, for Preview "
                        "Image. It lies in the project as contact_sheet.png; nothing without a vae."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        """ComfyUI caches by the inputs; the files that the last run has handed out may be gone by now."""
        return HANDED_OUT.turn(_whose(cls))

    @classmethod
    def execute(
        cls, noise, guider, sampler, sigmas, frame_context, start, seconds, project="", order=ORDER_AUTO,
        if_changed=IF_CHANGED[0], end=None, history=None, initial=None, timeline=None, changes=(), vae=None,
        memory=None,
    ) -> io.NodeOutput:  # fmt: skip
        live = None if vae is None else Live(vae, container_metadata(cls.hidden), partial(show_video, cls))
        done = sample_long_video(
            noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, schedule=frame_context.schedule, start=start,
            seconds=seconds, order=order, end=end, history=history, initial=initial, timeline=timeline,
            changes=changes, project=ProjectRequest(projects_folder(), project, if_changed), live=live,
            memory=memory, say=partial(show, cls),
        )  # fmt: skip
        HANDED_OUT.note(_whose(cls), done.video)
        if done.video is None:
            return io.NodeOutput(done.latent, done.report, done.project, None, None)
        shown, video = ui.PreviewVideo([saved(done.video)]), InputImpl.VideoFromFile(str(done.video))
        return io.NodeOutput(done.latent, done.report, done.project, video, picture_of(done.sheet), ui=shown)


class FrameMemoryAttentionBackend(io.ComfyNode):
    """The attention of one MODEL, tested on its device."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FrameMemoryAttentionBackend",
            display_name="Attention Backend",
            category="model/patch",
            description=(
                "Gives a MODEL the attention that is taken to be fastest of those that are installed and compute the "
                "right numbers on its device. Attention is half of a long video's time. Every sampler uses it; other "
                "models keep ComfyUI's own."
            ),
            search_aliases=["sage attention", "flash attention", "faster", "speed", "xformers"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The MODEL, behind its loader and LoRAs. It is not changed; a copy is returned.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(CHOICES),
                    default=AUTOMATIC,
                    tooltip=(
                        "'automatic' takes what is taken to be fastest of those that are installed and agree with "
                        "PyTorch's within 10 % in a short test; what ComfyUI was started with (--use-sage-attention "
                        "and so on) stays. A named one goes before that, and is refused where it is missing or wrong. "
                        "Nothing is installed by it: with PyTorch's alone the node changes nothing, but on an H100, "
                        "H200 or B200, where it takes PyTorch's with cuDNN."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with this attention, for any sampler."),
                io.String.Output(
                    display_name="report", tooltip="Which backend was chosen, and why those before it were not."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, backend=AUTOMATIC) -> io.NodeOutput:
        chosen, report = choose_attention(model, backend)
        show(cls, report)
        return io.NodeOutput(chosen, report, ui=ui.PreviewText(report))


NODES = [
    FrameMemoryFramePackImage,
    FrameMemorySigmas,
    FrameMemoryUniPC,
    FrameMemoryAttentionBackend,
    FrameMemoryStepCache,
    FrameMemoryAntiDriftSampler,
]
