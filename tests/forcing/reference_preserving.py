"""Frame preservation's two losses as the pfp reference writes them (sections 3 and 4): plain loops over frames.

Written from the reference, not from the pack: masks, copies, tokens (tests/model/preserved.py), positions and the F1
context are worked out here, one sample at a time. Only the transformer itself is the pack's.
"""

import sys
from pathlib import Path

import torch

from frame_memory.model.packing import ContextLayout

sys.path.append(str(Path(__file__).resolve().parents[1]))  # folders of tests are packages of their own
from model import preserved, wan_reference

NAMES = {4: "proj_4x", 2: "proj_2x", 1: "proj"}


def blocks_of(ends, deep):
    """[begin, stop) of each segment's whole blocks: what is left over goes to the next."""
    spans, begin = [], 0
    for end in ends:
        stop = end - end % deep
        if stop > begin:
            spans.append((begin, stop))
            begin = stop
    return spans


def remembered(pack, history_CTHW, ends, copies=None):
    """Tokens `[N, D]` and their places, encoder by encoder. copies: the low-resolution copy an encoder, or None."""
    deepest, tokens, places = max(e.rate.time for e in pack.each), [], []
    for number, encoder in enumerate(pack.each):
        sd, rate = encoder.state_dict(), encoder.rate
        deep, tall, wide = rate.time, rate.height, rate.width
        for begin, stop in blocks_of(ends, deepest):
            chunk = history_CTHW[:, begin:stop]
            copy = preserved.small_copy(rate, chunk)
            if copies is not None:
                copy = copies[number][:, begin // deep : stop // deep]
            low = preserved.patches(sd["embed.weight"], sd["embed.bias"], copy, (1, 2, 2))
            tokens.append(low + preserved.linear(sd, "project", preserved.features(sd, encoder.spec, chunk)))
            for t in range(begin, stop, deep):
                for y in range(history_CTHW.shape[2] // 2 // tall):
                    for x in range(history_CTHW.shape[3] // 2 // wide):
                        places.append((t + deep // 2, y * tall + tall // 2, x * wide + wide // 2))
    return torch.cat(tokens), places


def call(model, x, sigma, cond, i, context, layout, tokens, places):
    """The network's velocity for one sample."""
    return model(
        x, sigma * 1000, context=cond.text[i : i + 1], y=cond.pooled[i : i + 1], clip_fea=cond.vision[i : i + 1],
        guidance=torch.tensor([10.0]), context_latents=context, context_layout=layout, transformer_options={},
        frame_memory_tokens=tokens.float()[None], frame_memory_positions=torch.tensor(places),
    )  # fmt: skip


def wan_call(family, sd, own):
    """The same for Wan, by plain sums in float64. sd: the network's weights by name, own: those of its patchifiers."""
    channels, out, _ = wan_reference.FAMILIES[family]

    def call(model, x, sigma, cond, i, context, layout, tokens, places):
        groups = [
            (rate, times, own[f"{NAMES[rate]}.weight"], own[f"{NAMES[rate]}.bias"], latent[0])
            for latent, (rate, times) in zip(context, layout.groups, strict=True)
        ]
        x = torch.cat([x[0], torch.zeros(channels - out, *x.shape[2:])])
        seen = None if cond.vision is None else cond.vision[i]
        timesteps = [float(sigma) * 1000] * x.shape[1]
        memory = (tokens, places) if places else None
        return wan_reference.forward(sd, x, timesteps, cond.text[i], seen, groups, memory, layout.positions, out)[None]

    return call


def squared(velocity, noise, x):
    return float((velocity - (noise - x)).pow(2).mean())


def frame_query(model, pack, video, draw, window=9, call=call):
    """Mean loss over the batch, and the masked history `[B, C, T, H, W]` that the encoder was shown."""
    begin, frames, losses, shown = window * draw.first, 1 + window * draw.count, [], []
    for i in range(video.latents.shape[0]):
        history = video.latents[i, :, begin : begin + frames].double()
        masked, copies = history.clone(), []
        for t in range(frames):
            if t not in draw.asked:
                level = float(draw.levels[0, t])
                masked[:, t] = (1 - level) * history[:, t] + level * draw.mask_noise[i, :, t]
        for encoder, noise in zip(pack.each, draw.low_noises, strict=True):
            copy, deep = preserved.small_copy(encoder.rate, history), encoder.rate.time
            for t in range(copy.shape[1]):
                hidden = [float(draw.levels[0, s]) for s in range(deep * t, deep * t + deep) if s not in draw.asked]
                if hidden:
                    copy[:, t] = (1 - max(hidden)) * copy[:, t] + max(hidden) * noise[i, :, t]
            copies.append(copy)
        ends = [1 + window * n for n in range(draw.count + 1)]
        tokens, places = remembered(pack, masked, ends, copies)
        x, noise, sigma = history[:, list(draw.asked)].float()[None], draw.noise[i : i + 1], draw.sigma[i : i + 1]
        layout = ContextLayout(positions=draw.asked, groups=())
        noisy = (1 - sigma) * x + sigma * noise
        velocity = call(model, noisy, sigma, video.cond, i, [], layout, tokens, places)
        losses.append(squared(velocity, noise, x))
        shown.append(masked)
    return sum(losses) / len(losses), torch.stack(shown)


def next_section(model, pack, video, draw, clean=None):
    """Mean loss over the batch of F1's window behind its own context and the memory before it.

    clean: in place of that context, the start frame and so many of the newest, on the video's own time axis.
    """
    start, losses = 1 + 9 * draw.clip, []
    for i in range(video.latents.shape[0]):
        latents = video.latents[i : i + 1]
        tokens, places = remembered(pack, latents[0, :, :start], [1 + 9 * n for n in range(draw.clip + 1)])
        if clean is None:
            places = [(20 - (start - t), y, x) for t, y, x in places]
        zero = torch.zeros_like(latents[:, :, :1])
        newest = torch.cat([zero] * 19 + [latents[:, :, :start]], dim=2)[:, :, -19:]
        context = [newest[:, :, :16], newest[:, :, 16:18], latents[:, :, :1], newest[:, :, 18:]]
        layout = ContextLayout(
            positions=tuple(range(20, 29)), groups=((4, tuple(range(1, 17))), (2, (17, 18)), (1, (0,)), (1, (19,)))
        )
        if clean is not None:
            last = range(start - clean, start)
            context = [latents[:, :, :1], *([latents[:, :, start - clean : start]] if clean else [])]
            layout = ContextLayout(
                positions=tuple(range(start, start + 9)), groups=((1, (0,)), *(((1, tuple(last)),) if clean else ()))
            )
        x, noise, sigma = latents[:, :, start : start + 9], draw.noise[i : i + 1], draw.sigma[i : i + 1]
        noisy = (1 - sigma) * x + sigma * noise
        velocity = call(model, noisy, sigma, video.cond, i, context, layout, tokens, places)
        losses.append(squared(velocity, noise, x))
    return sum(losses) / len(losses)


def next_wan_section(pack, video, draw, window, call, clean=3):
    """The same on Wan behind the newest frames alone, which stand before the window at the front of the time axis."""
    start, losses = 1 + window * draw.clip, []
    for i in range(video.latents.shape[0]):
        latents = video.latents[i : i + 1]
        tokens, places = remembered(pack, latents[0, :, :start], [1 + window * n for n in range(draw.clip + 1)])
        places = [(clean - (start - t), y, x) for t, y, x in places]
        layout = ContextLayout(positions=tuple(range(clean, clean + window)), groups=((1, tuple(range(clean))),))
        x, noise, sigma = latents[:, :, start : start + window], draw.noise[i : i + 1], draw.sigma[i : i + 1]
        noisy = (1 - sigma) * x + sigma * noise
        newest = latents[:, :, start - clean : start]
        velocity = call(None, noisy, sigma, video.cond, i, [newest], layout, tokens, places)
        losses.append(squared(velocity, noise, x))
    return sum(losses) / len(losses)
