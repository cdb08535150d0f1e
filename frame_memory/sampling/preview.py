"""Progress and the picture on the node while a long video grows.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels; latents are in model space here.
"""

from __future__ import annotations

import contextlib
import shutil
import time

import comfy.model_management
import comfy.utils
import latent_preview
import psutil
import torch

from ..journal.project import Project
from ..plan import LongVideoPlan
from .section_loop import Moment
from .time_left import TimeLeft

# Seconds between two texts on the node within one section; each is a message to the browser.
SAY_EVERY = 2.0


class GrowingPreview:
    """One progress bar over all steps of all sections, words about the run, and a film strip of what there is.

    The strip shows the newest finished sections in order of making and, last, the section at work.
    project: once it is open.
    """

    def __init__(self, model_patcher, plan: LongVideoPlan, steps: int, say=None, *, picture: bool = True):
        self.latent_format = model_patcher.model.latent_format
        # A picture would hide the playable video where there is one (comfyui-host.md section 1).
        self.previewer = None
        if picture:
            self.previewer = latent_preview.get_previewer(model_patcher.load_device, self.latent_format)
        self.plan, self.sections, self.steps, self.say = plan, len(plan.sections), steps, say
        self.bar = comfy.utils.ProgressBar(self.sections * steps)
        self.project: Project | None = None
        self.left = TimeLeft(self.sections * steps)
        self.named, self.said_at, self.resources = -1, 0.0, ""

    def __call__(self, moment: Moment) -> None:
        value = moment.section * self.steps + min(moment.step, self.steps)
        now = time.monotonic()
        self.left.see(value, now)
        new = moment.section != self.named
        if self.say is not None and (new or now - self.said_at > SAY_EVERY):
            if new:
                self.resources = resources(self.project)
            self.named, self.said_at = moment.section, now
            self.say(self._words(moment))
        self.bar.update_absolute(value, self.sections * self.steps, self._picture(moment))

    def _words(self, moment: Moment) -> str:
        plan = self.plan
        made = plan.section_seconds * moment.section
        # Each text takes the plan's place on the node, so each must say the exact length (faults.md 24).
        lines = [
            f"section {moment.section + 1} of {moment.sections} · {plan.pixel_frames} frames = {plan.seconds:.2f} s",
            " · ".join(filter(None, [f"{made:.1f} s finished", self.left.words()])),
            self.resources,
        ]
        return "\n".join(lines)

    def _picture(self, moment: Moment):
        if self.previewer is None:
            return None
        estimate = moment.estimate[:1].float().cpu()
        middle = estimate.shape[2] // 2
        finished = [self.latent_format.process_in(f) for f in moment.finished]
        strip = torch.cat([*finished, estimate[:, :, middle : middle + 1]], dim=-1)
        return self.previewer.decode_latent_to_preview_image("JPEG", strip.to(moment.estimate.device))


def resources(project: Project | None) -> str:
    """Disk that the project takes and that is free, RAM that ComfyUI takes and that is free."""
    used = psutil.Process().memory_info().rss
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    parts = [f"RAM {size_words(used)} used, {size_words(free)} free"]
    if project is not None:
        # A network folder may be away for a while, and no step of a run depends on these numbers.
        with contextlib.suppress(OSError):
            taken, free = project.taken(), shutil.disk_usage(project.folder).free
            parts.insert(0, f"disk {size_words(taken)} used, {size_words(free)} free")
    return " · ".join(parts)


def size_words(count: float) -> str:
    """Bytes in GB, small ones in MB."""
    return f"{count / 2**20:.1f} MB" if count < 2**30 / 10 else f"{count / 2**30:.1f} GB"
