"""Direct, teacher and student forcing as reference/memorypack.md section 3.3 writes them: one plain loop.

Written from the reference, not from the pack's loop: frame numbers, rotary positions and tokens are worked out here.
Only the two networks themselves are the pack's.
"""

import torch

from frame_memory.model.packing import ContextLayout


def predict(model, x, sigma, video, history, image_at, tokens):
    """The network behind a history of latent frames `[B, C, n, H, W]`: 16, 2 and 1 newest, and the image."""
    cond, zero = video.cond, torch.zeros_like(video.latents[:, :, :1])
    newest = torch.cat([zero] * 19 + [history], dim=2)[:, :, -19:]
    image = video.latents[:, :, :1]
    context = [newest[:, :, :16], newest[:, :, 16:18], image, newest[:, :, 18:]]
    layout = ContextLayout(
        positions=tuple(range(20, 29)),
        groups=((4, tuple(range(1, 17))), (2, (17, 18)), (1, (image_at,)), (1, (19,))),
    )
    more = {} if tokens is None else {"memory_tokens": tokens}
    return model(
        x, sigma * 1000, context=cond.text, y=cond.pooled, clip_fea=cond.vision, guidance=torch.full_like(sigma, 10.0),
        context_latents=context, context_layout=layout, transformer_options={}, **more,
    )  # fmt: skip


def losses(kind, model, pack, video, sigmas, noises, rollout_noises=(), steps=5, shift=7.0):
    """Loss and estimate of each clip. kind: "teacher", "student" or "direct"."""
    found, history, psi = [], video.latents[:, :, :1], None
    if pack is not None:
        psi = pack.anchor(video.cond.text, video.cond.vision)
    for i in range(len(noises)):
        x, noise, sigma = video.latents[:, :, 1 + 9 * i : 10 + 9 * i], noises[i], sigmas[i].reshape(-1, 1, 1, 1, 1)
        image_at = 0 if pack is None else 20 - max(20, 1 + 9 * i)
        tokens = None if psi is None or i == 0 else torch.tanh(pack.gate) * psi

        def v(noisy, level, history=history, image_at=image_at, tokens=tokens):
            return predict(model, noisy, level, video, history, image_at, tokens)

        noisy = (1 - sigma) * x + sigma * noise
        velocity = v(noisy, sigmas[i])
        estimate = noisy - sigma * velocity
        found.append(((velocity - (noise - x)).pow(2).mean(), estimate))
        remembered = {"teacher": x, "direct": estimate}.get(kind)
        if kind == "student":
            remembered = rollout_noises[i]
            times = [1 - k / steps for k in range(steps + 1)]
            levels = [shift * t / (1 + (shift - 1) * t) for t in times]
            for now, then in zip(levels, levels[1:], strict=False):
                remembered = remembered + (then - now) * v(remembered, torch.full_like(sigmas[i], now))
        history = torch.cat([history, remembered], dim=2)
        if psi is not None:
            psi = pack.squeeze_in(psi, pack.clip_tokens(remembered), first=i == 0)
    return found
