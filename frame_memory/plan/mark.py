"""The mark a LATENT carries under the key "frame_memory": what made it and how it must be decoded.

The Anti-Drift Sampler writes it as a plain dict, so that it survives nodes that copy a LATENT, and so that nobody
needs this class to write one:

    {"latent_format": "HunyuanVideo", "base": "HunyuanVideo" | "selftest" | ...,
     "order": "inverted" | "forward" | "both ends first", "window": 9, "fps": 30.0,
     "given": 1, "project": "my video", "clips": True}

"clips" is there only where each section is to be decoded alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

KEY = "frame_memory"
# The families of the shipped models, FramePack and Wan: HunyuanVideo's and Wan's latent formats, other numbers in each.
SELFTEST, SELFTEST_WAN = "selftest", "selftest Wan"
# By latent format, the family that shares it.
SELFTESTS = {"HunyuanVideo": SELFTEST, "Wan21": SELFTEST_WAN}
# What FramePack checkpoints were trained at (reference framepack.md section 6).
DEFAULT_FPS = 30.0
# By family, where models were trained at another rate: Wan 2.1 and 2.2 A14B, Wan 2.2 5B, and the shipped Wan.
FPS = {"Wan21": 16.0, "Wan22": 24.0, SELFTEST_WAN: 16.0}
# By family, the VAE that makes its latents.
EXPECTED_FILES = {
    "HunyuanVideo": "the HunyuanVideo VAE (hunyuan_video_vae_bf16.safetensors)",
    "Wan21": "the Wan 2.1 VAE (wan_2.1_vae.safetensors)",
    "Wan22": "the Wan 2.2 VAE (wan2.2_vae.safetensors)",
    SELFTEST: "the small VAE of the self-test FramePack models (frame_memory_selftest_vae.safetensors)",
    SELFTEST_WAN: "the small VAE of the self-test Wan model (frame_memory_selftest_wan_vae.safetensors)",
}
NTSC = tuple(Fraction(rate * 1000, 1001) for rate in (24, 30, 48, 60, 120))


class MarkError(ValueError):
    """A LATENT whose mark cannot be read, or that is to be saved in a way that contradicts it."""


@dataclass(frozen=True)
class LatentMark:
    """What the sampler said about a LATENT. Empty strings, None and 0 given frames mean: not said.

    given: latent frames in front of the first section. project: name of the project that holds the sections. source:
    name of the video file that it was encoded from. clips: each section, `window` latent frames, is to be decoded
    alone, and the frame in front of them is not shown.
    """

    latent_format: str = ""
    base: str = ""
    order: str = "forward"
    window: int = 9
    fps: Fraction | None = None
    given: int = 0
    project: str = ""
    source: str = ""
    clips: bool = False

    @property
    def clip(self) -> int:
        """Latent frames of each clip of a video of clips, 0 of a running video."""
        return self.window if self.clips else 0


def expected_files(families: Iterable[str]) -> str:
    """The VAEs that make latents of one of some families, for a message."""
    return " or ".join(EXPECTED_FILES.get(family, f'the VAE of "{family}"') for family in families)


def fps_of(family: str) -> float:
    """Frames per second that models of a family of latents make. family: core's class of the format, or of ours."""
    return FPS.get(family, DEFAULT_FPS)


def as_fps(value: float | int | Fraction) -> Fraction:
    """Frames per second as an exact fraction: 23.976, 29.97 and 59.94 mean the 1000/1001 rates, 12.5 means 25/2.

    Raises MarkError for rates outside 1 to 240.
    """
    rate = Fraction(value) if isinstance(value, (int, Fraction)) else Fraction(float(value)).limit_denominator(1000)
    if not isinstance(value, Fraction):
        rate = next((ntsc for ntsc in NTSC if abs(ntsc - rate) < Fraction(1, 400)), rate)
    if not 1 <= rate <= 240:
        raise MarkError(f"fps is {float(value):g}, expected 1 to 240; FramePack makes {DEFAULT_FPS:g}, Wan 16.")
    return rate


def read_mark(samples: Mapping) -> LatentMark | None:
    """The mark of a LATENT dict, or None for a LATENT that was not made by Frame Memory.

    Keys that are not known are ignored, keys that are missing take their defaults. Raises MarkError for a mark that
    is not a dict or whose window is not a positive whole number.
    """
    raw = samples.get(KEY)
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise MarkError(
            f'The LATENT carries "{KEY}" as {type(raw).__name__}, expected the dict that Anti-Drift Sampler writes.'
        )
    window = raw.get("window", 9)
    if not isinstance(window, int) or window < 1:
        raise MarkError(f"The LATENT says its window is {window!r}, expected a whole number from 1; usually 9.")
    fps = raw.get("fps")
    latent_format, base = (str(raw.get(key) or "") for key in ("latent_format", "base"))
    return LatentMark(
        latent_format=latent_format,
        # Before the two had names of their own, Wan's was called SELFTEST as well.
        base=SELFTESTS.get(latent_format, base) if base == SELFTEST else base,
        order=str(raw.get("order") or "forward"),
        window=window,
        fps=None if fps is None else as_fps(fps),
        given=given if isinstance(given := raw.get("given", 0), int) and given > 0 else 0,
        project=str(raw.get("project") or ""),
        source=str(raw.get("source") or ""),
        clips=raw.get("clips") is True,
    )


def resolve_fps(mark: LatentMark | None, asked: float | int | Fraction) -> Fraction:
    """The frame rate to save at. `asked` 0 means: as it was made, or its family's rate where the LATENT does not say.

    Raises MarkError when a LATENT made at one rate is to be saved at another: that would only change how fast it
    plays (fault 25).
    """
    made = mark.fps if mark is not None else None
    if asked == 0:
        return made if made is not None else as_fps(fps_of(mark.latent_format or mark.base if mark else ""))
    wanted = as_fps(asked)
    if made is not None and wanted != made:
        factor = float(wanted / made)
        raise MarkError(
            f"This video was made at {float(made):g} fps, and 'Save Long Video' is set to {float(wanted):g} fps. "
            f"That would not add or drop frames, only play it {factor:.2f} times as fast. Set fps in 'Save Long Video' "
            f"to {float(made):g} (or 0), and for another rate interpolate the saved video with the node "
            "'Run Frame Interpolation Model'."
        )
    return wanted
