"""Which of Wan 2.2's two experts a file is for, by its name."""

from __future__ import annotations

import re

# What of a file's name says which of Wan 2.2's two experts it is for; the first that is found counts: "high_noise" and
# "lownoise", then a word that is written to stand out or ends the name: "-LOW_", "i2vLOW", "14bHigh", "style_low".
_EXPERTS = (
    re.compile(r"(?i:(high|low)[ _-]?noise)"),
    re.compile(r"(?:^|[^A-Z])(HIGH|LOW)(?![A-Za-z])|(?:14[bB])(High|Low)(?![a-z])"),
    re.compile(r"(?i:(?:^|[^a-z])(high|low)$)"),
)


def loaded_expert(model_patcher) -> str | None:
    """'high' or 'low' as the file says that a MODEL was loaded from; None where its name says neither."""
    loaded_from = getattr(model_patcher, "cached_patcher_init", None)
    path = loaded_from[1][0] if loaded_from and loaded_from[1] else None
    return expert_of(path.replace("\\", "/").rsplit("/", 1)[-1]) if isinstance(path, str) else None


def expert_of(name: str) -> str | None:
    """The expert that a file's name says, or else its folder's: FFGo's own files are all called checkpoint-600."""
    for part in reversed(name.replace("\\", "/").removesuffix(".safetensors").split("/")):
        for pattern in _EXPERTS:
            said = {word.lower() for found in pattern.finditer(part) for word in found.groups() if word}
            if said:
                return said.pop() if len(said) == 1 else None
    return None


def check_pair(high, low) -> None:
    """Raise ValueError for two MODELs that cannot be the experts of one video, or whose names say they are swapped."""
    formats = [type(patcher.model.latent_format).__name__ for patcher in (high, low)]
    if formats[0] != formats[1]:
        raise ValueError(
            f"'high' of 'Wan Expert Guider' works on {formats[0]} latents and 'low' on {formats[1]}. Expected the two "
            "experts of one Wan 2.2 A14B. Change the file in one of the two 'Load Diffusion Model' nodes."
        )
    if (loaded_expert(high), loaded_expert(low)) == ("low", "high"):
        raise ValueError(
            "'high' of 'Wan Expert Guider' was loaded from a file that calls itself low noise, and 'low' from one that "
            "calls itself high noise. Swap the two."
        )
