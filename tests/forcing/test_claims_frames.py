"""The claim of frame preservation: its rows, the frames that are asked for, and a run of all of it at toy size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch

from benchmarks import claims
from benchmarks.claims_frames import ALONE, FRAMEPACK, WINDOW, Budget, FramePreservationClaim, FramesWorkshop
from benchmarks.claims_queries import CLIPS, HELD, compared, histories, perceptual_distance, pictures, queried
from benchmarks.claims_training import OutOfTime, slug
from benchmarks.claims_videos import Sampling
from benchmarks.codec import LinearCodec
from benchmarks.long_clips import LongClips
from benchmarks.long_world import random_long_scene
from benchmarks.train_autoencoder import shipped
from frame_memory.plan import plan_sections

ROWS = FramePreservationClaim.variants
COMMAND = ["frame-preservation", "--toy", "--seconds", "5"]


@pytest.fixture(scope="module")
def codec():
    """Of random pictures: what it makes of them plays no part here."""
    generator = torch.Generator().manual_seed(0)
    return LinearCodec.fit(torch.rand(900, 768, generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, codec):
    """A folder of work whose codec need not be fitted."""
    made = tmp_path_factory.mktemp("work")
    parts = {"mean": codec.mean, "encoder": codec.encoder, "decoder": codec.decoder}
    safetensors.torch.save_file({n: p.contiguous() for n, p in parts.items()}, made / "codec.safetensors")
    return made


def test_every_row_of_a_table_is_measured_alike_and_goes_on_from_its_like():
    claim = claims.CLAIMS["frame-preservation"]
    assert set(ROWS) == {name for names in claim.tables.values() for name in names}
    assert len({slug(name) for name in ROWS}) == len(ROWS)
    for names in claim.tables.values():
        assert len({tuple(claim.cases(ROWS[name], [20.0])) for name in names}) == 1
    for row in ROWS.values():
        if row.after:
            before = ROWS[row.after]
            assert (before.rates, before.branches) == (row.rates, row.branches) and row.schedule and not before.schedule
            assert before.cross == row.cross
    assert sum(row.frozen for row in ROWS.values()) == 1


def test_the_clean_frames_of_each_schedule():
    for schedule, clean in ((ALONE, []), (WINDOW, [25, 26, 27]), (FRAMEPACK, list(range(9, 28)))):
        section = plan_sections(schedule, sections=4).sections[3]
        shown = [frame for group in section.groups for frame in group.frames if frame >= 0]
        assert sorted(shown) == clean and len(section.positions) == 9


def test_pictures_are_the_last_of_each_latent_frame(codec):
    latents = torch.randn(2, 16, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = torch.stack([codec.decode(latent) for latent in latents])
    assert torch.equal(pictures(latents[:, :, [1, 4]], codec), whole[:, [4, 16]].flatten(0, 1))


def test_the_distance_is_that_of_unit_features_at_each_resolution():
    a, b = torch.rand(2, 3, 64, 64, 3, generator=torch.Generator().manual_seed(2))
    distance, encoder, seen = perceptual_distance(), shipped().encoder, []
    sizes = {64: 1, 32: 3, 16: 3, 8: 2}  # layers of the encoder that give maps of such a size, before it shrinks
    hooks = [layer.register_forward_hook(lambda _, args, out: seen.append(out)) for layer in encoder.downsamples]
    parts = []
    for image in (a, b):
        seen.clear()
        encoder((image.permute(0, 3, 1, 2) * 2 - 1)[:, :, None])
        parts.append({size: [f for f in seen if f.shape[-1] == size][-1][:, :, 0] for size in sizes})
    for hook in hooks:
        hook.remove()
    for n in range(3):
        total = 0.0
        for size in sizes:
            f, g = (part[size][n] for part in parts)
            f, g = f / f.norm(dim=0), g / g.norm(dim=0)
            total += float((f - g).pow(2).sum(0).mean()) / len(sizes)
        assert float(distance(a, b)[n]) == pytest.approx(total, rel=1e-4)
    near = a + 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    assert not distance(a, a).any() and (distance(a, near) < distance(a, b)).all()
    (row, *_) = compared(near, a, distance)
    assert row["psnr"] == pytest.approx(-20 * np.log10(0.02), abs=0.5) and 0.5 < row["ssim"] < 1


def test_a_masked_and_a_whole_history_are_asked_for_the_same_frames(folder, codec):
    scenes = [random_long_scene(np.random.default_rng(3), shown=False, named=False)]
    video, row = histories(scenes, codec), ROWS["both, 2x2x2"]
    assert video.clips == CLIPS and video.latents.shape[2] >= HELD
    trained = FramesWorkshop(folder, None, Budget(rank=1))._fresh(row, 0)
    shown: list[torch.Tensor] = []
    hook = trained.pack.register_forward_pre_hook(lambda _, args: shown.append(args[0].clone()))
    with trained.ready():
        made = queried(trained.forced, video, codec, ["masked", "whole"], Sampling(1), 0, lambda: None)
    hook.remove()
    assert set(made) == {"masked", "whole"} and made["masked"] != made["whole"]
    # Of each draw the masked history is made once a case, and the whole one behind the second.
    assert len(shown) == 3 * 4 and all(torch.equal(x, video.latents) for x in shown[2::3])
    for first in shown[::3]:
        same = [t for t in range(73) if torch.equal(first[:, :, t], video.latents[:, :, t])]
        assert 1 <= len(same) <= 8 and max(same) < HELD


def test_weights_depend_on_the_base_and_on_the_settings_of_their_stage():
    budget = Budget()
    base, first, second = (budget.until(leg) for leg in range(3))
    assert set(base) == {"world", "base"} and len(base["base"]) == 12
    assert set(second) == {*base, *dataclasses.asdict(budget)}
    assert set(second) - set(first) == {"next_steps", "sections", "returns"}


class Stopped(FramesWorkshop):
    """Its time is over after so many looks at the clock."""

    looks = 2

    def alive(self):
        self.looks -= 1
        if self.looks < 0:
            raise OutOfTime


@pytest.mark.parametrize("name", ["both, 2x2x1", "+ FramePack's context"])
def test_training_that_ran_out_of_time_goes_on_to_the_same_weights(tmp_path, codec, name):
    rng = np.random.default_rng(0)
    latents, pictures = rng.standard_normal((2, 16, 61, 8, 8)), rng.random((2, 64, 64, 3))
    clips = LongClips(latents, pictures, ["a visitor comes in from the left"] * 2)
    budget = Budget(steps=3, next_steps=3, batch=1, clips=2, rank=2, asked=1, sections=2)
    row = dataclasses.replace(ROWS[name], after="")
    made = {}
    for folder, stopped in ((tmp_path / "whole", False), (tmp_path / "stopped", True)):
        folder.mkdir()
        if stopped:
            with pytest.raises(OutOfTime):
                Stopped(folder, clips, budget).trained(row, 0)
            assert list(folder.rglob("step-00000002.safetensors")) and not list(folder.glob("*.safetensors"))
        said: list[str] = []
        trained = FramesWorkshop(folder, clips, budget, say=said.append).trained(row, 0)
        made[stopped] = {name: p.detach().clone() for name, p in trained.parameters.items()}
        assert any("goes on from step 2 of 3" in line for line in said) == stopped
    assert all(torch.equal(value, made[True][name]) for name, value in made[False].items())


def test_a_toy_run_trains_and_measures_each_kind_of_row_once_and_goes_on(folder, capsys):
    names = ["both, 4x4x2", "F1 without a memory", "frozen encoder", "+ sliding window", "both, 4x4x2 + 2x2x8"]
    names += ["+ cross-attention"]
    work = ["--work", str(folder)]
    claims.main([*COMMAND, *work, "--only", *names])
    out = capsys.readouterr().out
    assert all(f"| {name} | 1 of 1 | " in out for name in names) and "| without stage 1 | 0 of 1 | missing |" in out
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-s0.*")}
    # The base has figures and no weights, and what cross-attention goes on from has weights and no figures.
    assert len(files) == 2 * len(names)
    first, frozen, learned = (
        safetensors.torch.load_file(folder / f"{slug(name)}-s0.safetensors")
        for name in ("both, 4x4x2", "frozen encoder", "+ sliding window")
    )
    packs = [name for name in first if name.startswith("pack.")]
    loras = [name for name in first if name.startswith("lora.") and name.endswith(".up")]
    assert len(packs) + 2 * len(loras) == len(first) == len(frozen) == len(learned)
    assert all(torch.equal(first[name], frozen[name]) for name in packs)
    assert {name for name in packs if torch.equal(first[name], learned[name])} == {
        "pack.encoders.0.embed.weight", "pack.encoders.0.embed.bias",
    }  # fmt: skip
    assert all(first[name].any() and not torch.equal(first[name], frozen[name]) for name in loras)
    crossed = safetensors.torch.load_file(folder / f"{slug('+ cross-attention')}-s0.safetensors")
    assert len({name for name in crossed if "cross_attention" in name and "out.weight" in name}) == 5
    assert all(crossed[name].any() for name in crossed if name.endswith("out.weight"))
    claims.main([*COMMAND, *work, "--only", *names])
    assert capsys.readouterr().out == out[out.index("\n**1.") :]
    assert files == {path.name: path.stat().st_mtime_ns for path in folder.glob("*-s0.*")}
    with pytest.raises(SystemExit, match="other settings .*sample_steps, scenes"):
        claims.main([COMMAND[0], *work, "--print"])
