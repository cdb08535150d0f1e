"""Steps of a section that the network is not asked for: what it would say is drawn on from what it said before.

A sampler walks along d = (x - x0) / sigma, of a flow its velocity. Over sigma that is nearly a straight line, so the
last two evaluations give the next ones. How far the line misses is known as well: of three evaluations the second
divided difference is half the curvature, and with it Newton's formula gives the error of going on straight. A step is
skipped only where that error is below what the artist allows. The first evaluations, which give line and curvature,
and the last one, which is the picture, are always made.

What stands here sees the output after guidance, so prompts of one step are skipped together and none is taken for
another. All that is held belongs to one call of a GUIDER's `sample`: one section and, of two experts, one of them.

Source: reference/performance.md section 1; core's nodes_easycache.py for the seams, which keeps the last difference of
output and input in the place of a line.

Shape legend: B batch, C latent channels, T latent frames, H W latent pixels.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..video.decode import decode_window
from ..video.fidelity import psnr
from .experts import low_noise_of, models_of
from .guards import SectionError, broken_share
from .identity import MEASURE, STEP_CACHE

# In transformer_options: who counts, and core's node.
COUNTER, EASYCACHE = "frame_memory_count_cache", "easycache"
# In model_options: core's functions that see an evaluation's parts.
AFTER_CFG = "sampler_post_cfg_function"
NODE = "Section Step Cache"
DRIFT = 0.2
# Evaluations that a line and its curvature need.
POINTS = 3
# What issue F asks of a cache; below it the artist is told.
NEAR = 26.0


def with_step_cache(model_patcher, drift: float = DRIFT, measure: bool = False):
    """A clone of a MODEL that skips steps; the MODEL stays as it is.

    drift: largest estimated error of a skipped step's output, RMS as a share of the output's; 0 takes a cache away.
    measure: the Anti-Drift Sampler also makes its first section without, and says how far the two are apart.
    """
    clone = model_patcher.clone()
    options = clone.model_options["transformer_options"]
    for name in (STEP_CACHE, MEASURE):
        options.pop(name, None)
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, STEP_CACHE)
    if not drift:
        return clone
    options[STEP_CACHE] = drift
    if measure:
        options[MEASURE] = True
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, STEP_CACHE, _one_run)
    return clone


def choose_step_cache(model_patcher, drift: float, measure: bool = False) -> tuple[Any, str]:
    """What `with_step_cache` gives, and in words what it does; also where another cache stood there before."""
    had = model_patcher.model_options["transformer_options"].get(STEP_CACHE)
    said = f"Steps may be skipped, at drift {drift:g}." if drift else "No step is skipped: 'drift' is 0."
    if had is not None:
        note = (
            f"another '{NODE}' before this one had given the MODEL drift {had:g}. Of two the last one counts"
            f"{'' if drift else ', and its drift of 0 switches the first off'}: take one of them out"
        )
        logging.warning("%s: %s.", NODE, note)
        said += f"\nNote: {note}."
    return with_step_cache(model_patcher, drift, measure), said


def _one_run(executor, *args, **kwargs):
    """Core's `OUTER_SAMPLE` wrapper: a cache for one call of `sample`."""
    guider = executor.class_obj
    before = guider.model_options
    options = before["transformer_options"]
    cache = StepCache(options[STEP_CACHE])
    guider.model_options = comfy.model_patcher.create_model_options_clone(before)
    add_wrapper_with_key(WrappersMP.PREDICT_NOISE, STEP_CACHE, cache, guider.model_options, is_model_options=True)
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = before
        logging.info("%s: %d of %d evaluations were made.", NODE, cache.made, cache.asked)
        if COUNTER in options:
            options[COUNTER](cache.made, cache.asked, cache.judged)


class StepCache:
    """Core's `PREDICT_NOISE` wrapper of one run. asked: evaluations a sampler wanted; made: those the network did;
    judged: those whose error could be estimated."""

    def __init__(self, drift: float):
        self.drift = drift
        self.asked = self.made = self.judged = 0
        self._points: deque[tuple[float, Tensor]] = deque(maxlen=POINTS)  # sigma, d; sigma falls
        self._shown: list | None = None

    def __call__(self, executor, x_BCTHW: Tensor, timestep, model_options={}, seed=None):  # noqa: B006 (core's)
        sigma = float(timestep.flatten()[0])
        self.asked += 1
        self._begin_anew_where_it_must(sigma, executor.class_obj)
        needed = _is_last(sigma, model_options) or _is_listened_to(executor.class_obj, model_options)
        d_BCTHW = None if needed else self._drawn_on(sigma)
        if d_BCTHW is not None:
            return x_BCTHW - sigma * d_BCTHW
        made_BCTHW = executor(x_BCTHW, timestep, model_options, seed)
        self.made += 1
        if sigma > 0:
            self._points.append((sigma, (x_BCTHW - made_BCTHW) / sigma))
        return made_BCTHW

    def _begin_anew_where_it_must(self, sigma: float, guider) -> None:
        """Other prompts, and a noise level above the last one, are another path; the same level is its newer point."""
        shown = _shown_at(sigma, guider)
        if shown is None or shown != self._shown or (self._points and sigma > self._points[-1][0]):
            self._points.clear()
        if self._points and sigma == self._points[-1][0]:
            self._points.pop()
        self._shown = shown

    def _drawn_on(self, sigma: float) -> Tensor | None:
        """d at `sigma` on the line through the last two evaluations; None where it may miss by more than is allowed."""
        if len(self._points) < POINTS:
            return None
        self.judged += 1
        (s3, d3), (s2, d2), (s1, d1) = self._points
        slope, older = (d1 - d2) / (s1 - s2), (d2 - d3) / (s2 - s3)
        bend = (slope - older) / (s1 - s3)
        miss_B = _rms(bend) * abs((sigma - s1) * (sigma - s2))
        # Of a batch each video counts for itself. What is not a number is not below anything.
        return d1 + slope * (sigma - s1) if bool((miss_B <= self.drift * _rms(d1)).all()) and self.drift else None


def _rms(x_BCTHW: Tensor) -> Tensor:
    return x_BCTHW.float().square().flatten(1).mean(1).sqrt()


def _is_last(sigma: float, model_options: dict) -> bool:
    """Whether a noise level is that of the last step, or nobody says which one that is."""
    sigmas = model_options.get("transformer_options", {}).get("sample_sigmas")
    return sigmas is None or len(sigmas) < 2 or sigma <= float(sigmas[-2])


def _is_listened_to(guider, model_options: dict) -> bool:
    """Whether a sampler takes more of an evaluation than its output: CFG++ reads the prompts one by one."""
    return model_options.get(AFTER_CFG, []) != guider.model_options.get(AFTER_CFG, [])


def _shown_at(sigma: float, guider) -> list | None:
    """What says which prompts count at a noise level; None where what they do may change from step to step."""
    entries = [entry for conds in getattr(guider, "conds", {}).values() for entry in conds or ()]
    if any(entry.get(name) is not None for entry in entries for name in ("hooks", "control")):
        return None
    return [e.get("timestep_start", sigma) >= sigma >= e.get("timestep_end", sigma) for e in entries]


def two_caches(guider) -> list[str]:
    """Warnings of MODELs that core's EasyCache or LazyCache is on as well."""
    return [
        f"{name} is on the {which}MODEL beside {NODE}. Both skip steps, and what they lose adds up: take the node "
        f"'{name}' out."
        for which, name in _cores_caches(guider).items()
        if STEP_CACHE in models_of(guider)[which].model_options["transformer_options"]
    ]


def _cores_caches(guider) -> dict[str, str]:
    """The names of core's cache nodes by the MODELs of a GUIDER that they are on; both leave one mark."""
    every = {which: patcher.model_options["transformer_options"] for which, patcher in models_of(guider).items()}
    return {which: options[EASYCACHE].name for which, options in every.items() if EASYCACHE in options}


class CacheReport:
    """Of one run of the section loop: the evaluations that were made, and how far a section is from the truth.

    vae: without one only latents are compared.
    """

    def __init__(self, guider, vae=None):
        every = {name: patcher.model_options["transformer_options"] for name, patcher in models_of(guider).items()}
        cached = {name: options[STEP_CACHE] for name, options in every.items() if STEP_CACHE in options}
        self.on = bool(cached)
        self.drift = " and ".join(dict.fromkeys(f"{drift:g}" for drift in cached.values()))
        self.whose = f" of the {next(iter(cached)) or 'high noise '}expert" if 0 < len(cached) < len(every) else ""
        self.to_measure = self.on and any(options.get(MEASURE) for options in every.values())
        self.others = " and ".join(dict.fromkeys(_cores_caches(guider).values()))
        self.left_out = " and ".join(filter(None, (NODE, self.others)))
        self.vae, self.measured = vae, ""
        self.made = self.asked = self.judged = 0

    def counting(self, guider):
        """A copy of a GUIDER whose runs are counted here; of two experts both."""
        return _with_options(guider, {COUNTER: self._count}) if self.on else guider

    def _count(self, made: int, asked: int, judged: int) -> None:
        self.made, self.asked, self.judged = self.made + made, self.asked + asked, self.judged + judged

    def measure(self, number: int, made_BCTHW: Tensor, guider, sample: Callable[[Any], Tensor]) -> list[str]:
        """Compare a section with what `sample` makes of the GUIDER that made it, without skipping; warnings. Of a run
        only the first section is measured in which anything may have been skipped: up to there the two are the same.
        A comparison that fails does not cost the video, and is a warning too."""
        if not self.to_measure or (0 < self.made == self.asked and not self.others):
            return []
        self.to_measure = False
        try:
            return self._compare(number, made_BCTHW, sample(_all_steps(guider)))
        except Exception as error:
            logging.warning("%s: section %d cannot be measured", NODE, number, exc_info=True)
            return [f"{NODE} could not measure section {number}: {error} The video is not affected."]

    def _compare(self, number: int, made_BCTHW: Tensor, exact_BCTHW: Tensor) -> list[str]:
        if broken_share(exact_BCTHW):
            raise SectionError("made without it, it holds NaN or infinite values.")
        self.measured = f"Section {number} with and without {self.left_out}: "
        if made_BCTHW.equal(exact_BCTHW):
            self.measured += "the same"
            return []
        peak = float(exact_BCTHW.max() - exact_BCTHW.min()) or 1.0
        near = psnr(made_BCTHW / peak, exact_BCTHW / peak)
        self.measured += f"PSNR {near:.1f} dB of its latents"
        if self.vae is not None:
            made_THWC, exact_THWC = (decode_window(self.vae.decode, latent[:1]) for latent in (made_BCTHW, exact_BCTHW))
            near = psnr(made_THWC, exact_THWC)
            self.measured += f", {near:.1f} dB of its pictures"
        if near >= NEAR:
            return []
        return [
            f"{self.left_out} change{'' if self.others else 's'} the picture: {near:.1f} dB in section "
            f"{number}, expected {NEAR:g} or more. Halve 'drift' there and queue again."
        ]

    def lines(self) -> list[str]:
        """For the sampler's report, what was measured first; empty without a cache, and where every section was there
        already and none was to be measured."""
        if not self.asked:
            missed = f"{NODE}: not measured, all sections were there. Take another seed for that."
            return [missed] if self.to_measure else []
        but = f" (what {self.others} skips is not counted)" if self.others else ""
        count = f"{self.made} of {self.asked} evaluations{self.whose} were made{but}, {self._less}"
        return [*([f"{self.measured}."] if self.measured else []), f"{NODE}, drift {self.drift}: {count}."]

    @property
    def _less(self) -> str:
        if self.made < self.asked:
            return f"{self.asked / self.made:.2f} times fewer"
        if self.judged:
            return (
                "none was skipped: too few steps, a sampler that adds noise (euler_ancestral, dpmpp_sde, lcm), or too "
                "low a drift"
            )
        return (
            "none was skipped: too few steps, or a sampler whose name ends in _cfg_pp, a ControlNet, or a LoRA that "
            "changes over time"
        )


def _all_steps(guider):
    """A copy of a GUIDER that counts for nothing and skips nothing: no estimate is small enough for any cache."""
    changed = _with_options(guider, {STEP_CACHE: 0.0, COUNTER: _not_counted})
    for each in filter(None, (changed, low_noise_of(changed))):
        options = each.model_options["transformer_options"]
        if EASYCACHE in options:
            options[EASYCACHE] = copy.copy(options[EASYCACHE])
            options[EASYCACHE].reuse_threshold = 0.0
    return changed


def _not_counted(*_) -> None:
    """What is made to be compared with counts for nothing."""


def with_own_input(guider):
    """A copy of a GUIDER that core's EasyCache may be on; the GUIDER itself without it.

    EasyCache adds what it keeps to its input in place. In fp32 that is the very tensor from which core subtracts the
    output afterwards, so each skipped step would come out wrong.
    """
    if not _cores_caches(guider):
        return guider
    return _with_options(guider, {}, (WrappersMP.DIFFUSION_MODEL, EASYCACHE + "_input", _copied))


def _copied(executor, x: Tensor, *args, **kwargs):
    return executor(x.clone(), *args, **kwargs)


def _with_options(guider, more: dict, wrapper: tuple[str, str, Callable] | None = None):
    """A copy of a GUIDER with more in its transformer_options, and of the low noise expert's GUIDER inside it."""
    changed = copy.copy(guider)
    changed.model_options = comfy.model_patcher.create_model_options_clone(guider.model_options)
    changed.model_options["transformer_options"].update(more)
    if wrapper is not None:
        add_wrapper_with_key(*wrapper, changed.model_options, is_model_options=True)
    low = low_noise_of(guider)
    if low is not None:
        changed.low = _with_options(low, more, wrapper)
    return changed
