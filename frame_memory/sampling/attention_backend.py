"""The attention of one MODEL: the backend taken to be fastest of those that compute the right numbers on its device.

It takes the place of the host's through ComfyUI's own hook, in the options of a copy of the MODEL and nowhere else.
What ComfyUI was started with, and another pack's override, go before an automatic choice.

Shape suffixes: B batch, H heads, L queries, M keys, D numbers a head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch, get_attention_function
from torch import Tensor

from ..kernels.attention import CANDIDATES, Candidate, fast_attention
from ..kernels.op import Call
from .attention_check import TOKENS, Place, known_problem, one_call, override_of
from .guards import attention_name, with_attention, without_attention

NODE = "Attention Backend"
# The host's wrappers catch what a library raises, log it, and call PyTorch at every step. A kernel may also be
# PyTorch's own: its FlashAttention is of the same source.
SAME = "it gives PyTorch's very numbers: it is the same there, or ComfyUI falls back to PyTorch (see the log)"
AUTOMATIC, HOST = "automatic", "ComfyUI's own"
CHOICES = (AUTOMATIC, HOST, *(c.label for c in CANDIDATES))


@dataclass(frozen=True)
class AttentionBackend:
    """A backend in the place of the host's attention (`optimized_attention_override`).

    It takes the calls that it was tested for: heads, number format and kind of device of `place`, no mask, no gradient.
    All others stay the host's.
    """

    label: str
    host: str
    head: int
    dtype: torch.dtype
    device: str

    def __call__(self, func, q: Tensor, k: Tensor, v: Tensor, heads: int, mask=None, *more, **kwargs) -> Tensor:
        head = q.shape[-1] // (1 if kwargs.get("skip_reshape") else heads)
        same = head == self.head and q.dtype == self.dtype and q.device.type == self.device
        plain = mask is None and not more and "scale" not in kwargs and not kwargs.get("enable_gqa")
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        exact = gradient or not kwargs.get("low_precision_attention", True)
        if not same or not plain or exact:
            return func(q, k, v, heads, mask, *more, **kwargs)
        if self.host:
            return get_attention_function(self.host)(q, k, v, heads, **kwargs)
        return _fast(q, k, v, heads, **kwargs)


def _fast(q: Tensor, k: Tensor, v: Tensor, heads: int, skip_reshape=False, skip_output_reshape=False, **_) -> Tensor:
    """Our own op, called as the host's backends are."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    made_BLD = fast_attention(q, k, v)
    return made_BLD.unflatten(-1, (heads, -1)).transpose(1, 2) if skip_output_reshape else made_BLD


def choose_attention(patcher, wish: str, candidates: Sequence[Candidate] = CANDIDATES) -> tuple[Any, str]:
    """A MODEL with the backend that is wished for, and what was chosen and why nothing else, in words.

    wish: one of CHOICES. The MODEL itself comes back where ComfyUI's choice stays. Raises ValueError for a backend that
    is wished for by name and is not there, is wrong here, or meets an override of another pack.
    """
    override = override_of(patcher.model_options)
    if not isinstance(override, AttentionBackend):
        return _chosen(patcher, wish, candidates, override)
    chosen, report = _chosen(_without_override(patcher), wish, candidates)
    said = (
        f"another '{NODE}' before this one had given the MODEL {override.label}. Of two the last one counts: take one "
        "of them out"
    )
    logging.warning("%s: %s.", NODE, said)
    return chosen, f"{report}\nNote: {said}."


def _chosen(patcher, wish: str, candidates: Sequence[Candidate], override=None) -> tuple[Any, str]:
    """The same for a MODEL that has no backend of this node. override: of another pack."""
    if override is not None and wish not in (AUTOMATIC, HOST):
        raise ValueError(
            f"This MODEL's attention is '{attention_name(override)}' of another node already; it can have one. Set "
            f"'backend' in '{NODE}' to {AUTOMATIC}, or take one of the two nodes out."
        )
    if override is not None:
        return patcher, f"Attention: '{attention_name(override)}', of another node."
    flag = _started_with()
    if wish == HOST or (wish == AUTOMATIC and flag):
        why = f": ComfyUI was started with {flag}" if flag else ""
        return patcher, f"Attention: ComfyUI's own ({attention_name()}){why}."
    place = Place.of(patcher)
    found, against = first_right(place, wish, candidates)
    lines = [f"Not {label}: {problem}." for label, problem in against.items()]
    if found is None:
        if wish == AUTOMATIC:
            raise ValueError(f"No attention works on {place}. {' '.join(lines)} Set 'backend' in '{NODE}' to {HOST}.")
        raise ValueError(
            f"'{wish}' cannot be used on {place}: {against[wish]}. Set 'backend' in '{NODE}' to {AUTOMATIC}."
        )
    if found.host and get_attention_function(found.host) is get_attention_function("optimized"):
        return patcher, "\n".join([f"Attention: {found.label}, as ComfyUI chose itself.", *lines])
    if wish != AUTOMATIC and _is_pytorchs(found, place):
        lines.append(f"Note: {SAME}.")
    chosen = patcher.clone()
    chosen.model_options = with_attention(patcher.model_options, found)
    report = "\n".join([f"Attention: {found.label}, on {place}.", *lines])
    logging.info("%s: %s", NODE, report)
    return chosen, report


def first_right(
    place: Place, wish: str = AUTOMATIC, candidates: Sequence[Candidate] = CANDIDATES
) -> tuple[AttentionBackend | None, dict[str, str]]:
    """The first candidate that may be taken and is right, and what was against those before it, by label."""
    against = {}
    for candidate in candidates:
        if wish in (AUTOMATIC, candidate.label):
            kind = torch.device(place.device).type
            backend = AttentionBackend(candidate.label, candidate.host, place.head, place.dtype, kind)
            problem = _against(candidate, backend, place, wish == AUTOMATIC)
            if not problem:
                return backend, against
            against[candidate.label] = problem
    return None, against


def _against(candidate: Candidate, backend: AttentionBackend, place: Place, automatic: bool) -> str | None:
    """What speaks against a candidate, in words."""
    call = Call(torch.device(place.device), place.dtype, place.head, TOKENS)
    missing = candidate.needs.missing(call) or (automatic and candidate.pays.missing(call))
    if missing:
        return missing
    if candidate.host and get_attention_function(candidate.host, None) is None:
        return f"ComfyUI has no '{candidate.host}' attention here"
    problem = known_problem(candidate.label, backend, place)
    if automatic and problem is None and _is_pytorchs(backend, place):
        return SAME
    return problem


def _is_pytorchs(backend: AttentionBackend, place: Place) -> bool:
    """Whether it gives PyTorch's very numbers, of a backend that is another one."""
    if backend.host == "pytorch":
        return False
    parts, call = one_call(backend, place)
    return torch.equal(call(), attention_pytorch(*parts, heads=2, skip_reshape=True))


def _without_override(patcher):
    clone = patcher.clone()
    clone.model_options = without_attention(patcher.model_options)
    return clone


def _started_with() -> str:
    """The option that ComfyUI was told its attention by; "" where it chose itself."""
    told = {
        "--use-sage-attention": args.use_sage_attention,
        "--use-flash-attention": args.use_flash_attention,
        "--use-pytorch-cross-attention": args.use_pytorch_cross_attention,
        "--use-split-cross-attention": args.use_split_cross_attention,
        "--use-quad-cross-attention": args.use_quad_cross_attention,
    }
    return next((flag for flag, given in told.items() if given), "")
