"""Progress and the picture on the node while a long video grows.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels; latents are in model space here.
"""

from __future__ import annotations

import comfy.utils
import latent_preview
import torch

from ..plan import LongVideoPlan
from .section_loop import Moment


class GrowingPreview:
    """One progress bar over all steps of all sections, with a film strip of what there is of the video.

    The strip shows the newest finished sections in order of making and, last, the section at work.
    """

    def __init__(self, model_patcher, plan: LongVideoPlan, steps: int, say=None, *, picture: bool = True):
        self.latent_format = model_patcher.model.latent_format
        # A picture would hide the playable video where there is one (comfyui-host.md section 1).
        self.previewer = None
        if picture:
            self.previewer = latent_preview.get_previewer(model_patcher.load_device, self.latent_format)
        self.sections, self.steps, self.say = len(plan.sections), steps, say
        self.bar = comfy.utils.ProgressBar(self.sections * steps)
        # Each line takes the plan's place on the node, so each must say the exact length (faults.md 24).
        self.length = f"{plan.pixel_frames} frames = {plan.seconds:.2f} s"
        self.named = -1

    def __call__(self, moment: Moment) -> None:
        if self.say is not None and moment.section != self.named:
            self.named = moment.section
            self.say(f"section {moment.section + 1} of {moment.sections} · {self.length}")
        value = moment.section * self.steps + min(moment.step, self.steps)
        self.bar.update_absolute(value, self.sections * self.steps, self._picture(moment))

    def _picture(self, moment: Moment):
        if self.previewer is None:
            return None
        estimate = moment.estimate[:1].float().cpu()
        middle = estimate.shape[2] // 2
        finished = [self.latent_format.process_in(f) for f in moment.finished]
        strip = torch.cat([*finished, estimate[:, :, middle : middle + 1]], dim=-1)
        return self.previewer.decode_latent_to_preview_image("JPEG", strip.to(moment.estimate.device))
