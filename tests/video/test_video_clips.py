"""Training clips from folders of videos: where they are cut, what is left out, and what lies on disk afterwards."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open

from frame_memory.plan.errors import PlanError
from frame_memory.plan.mark import EXPECTED_FILES
from frame_memory.video.clip_cache import ClipCache
from frame_memory.video.clip_folder import DatasetError
from frame_memory.video.history import read_video
from frame_memory.video.shots import find_stretches
from frame_memory.video.source import probe_video
from frame_memory.video.video_clips import ClipMaker, Request, parts_of

from .odd_videos import write_video

WIDTH, HEIGHT = 64, 48


def shot(seed: int, frames: int, speed: float = 1.0) -> np.ndarray:
    """A textured picture with a square that walks over it: uint8 [T,H,W,3]; nothing moves at speed 0."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 236, (6, 8, 3)).astype(np.uint8)
    picture = np.kron(coarse, np.ones((HEIGHT // 6, WIDTH // 8, 1), np.uint8))
    video = np.repeat(picture[None], frames, axis=0)
    for t in range(frames):
        room = WIDTH - 12
        x = room - abs(int(t * speed * 2) % (2 * room) - room)  # there and back: a square that leaps is a cut
        video[t, 16:28, x : x + 12] = (250, 240, 10)
    return video


def ticks(count: int, fps: float = 30) -> list[int]:
    return [round(1000 * i / fps) for i in range(count)]


def save(path, frames: np.ndarray, fps: float = 30, caption: str | None = "A yellow square walks."):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": "8", "preset": "ultrafast"}
    write_video(path, ticks(len(frames), fps), size=(WIDTH, HEIGHT), frames=list(frames), options=options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def maker(folder, cache, vae, base: int = 32, shortest: float = 1.2, longest: float = 60.0, **more) -> ClipMaker:
    return ClipMaker(folder, cache, vae, Request.of(base, shortest, longest), lambda: None, **more)


@pytest.mark.parametrize("lengths", [(40,), (40, 25), (13, 50, 37)])
def test_stretches_end_where_the_picture_changes(lengths):
    video = np.concatenate([shot(seed, length) for seed, length in enumerate(lengths)])
    found = find_stretches([video[i : i + 7] for i in range(0, len(video), 7)])
    borders = [0, *np.cumsum(lengths)]
    assert [(s.start, s.stop) for s in found] == list(zip(borders, borders[1:]))
    assert not any(s.is_still for s in found)


def test_motion_that_comes_in_steps_and_fast_pans_are_no_cuts():
    stepped = shot(1, 60, 4)[[i // 3 * 3 for i in range(60)]]  # 10 pictures a second, put onto 30
    wide = np.random.default_rng(5).integers(0, 256, (HEIGHT // 8, 80, 3)).astype(np.uint8)
    wide = np.kron(wide, np.ones((8, 8, 1), np.uint8))
    pan = np.stack([wide[:, 9 * t : 9 * t + WIDTH] for t in range(60)])
    for video in (stepped, pan):
        assert len(find_stretches([video])) == 1


def test_a_stretch_without_motion_is_still_and_a_small_figure_is_motion():
    (still,) = find_stretches([shot(3, 50, 0)])
    (moving,) = find_stretches([shot(3, 50, 0.5)])
    assert still.is_still and still.motion < 0.5 and not moving.is_still


@pytest.mark.parametrize("frames", [1, 36, 37, 72, 73, 100, 300])
def test_clips_are_whole_sections_and_never_overlap(frames):
    from frame_memory.video.shots import Stretch

    for longest in (1, 3, 50):
        parts = parts_of(Stretch(5, 5 + frames, 9.0), Request(64, 1, longest))
        # By hand: a clip takes 1 + 36 k frames, k at most `longest`, until fewer than 37 are left.
        expected, first = [], 5
        while 5 + frames - first >= 37:
            k = min((5 + frames - first - 1) // 36, longest)
            expected.append((first, 36 * k + 1))
            first += 36 * k + 1
        assert [(p.first, p.frames) for p in parts] == expected
        assert all((p.latent_frames - 1) % 9 == 0 and 4 * p.latent_frames - 3 == p.frames for p in parts)


def test_lengths_that_contradict_each_other_are_refused():
    with pytest.raises(PlanError, match="at least 4.8 s and at most 2.4 s.*Video Clips"):
        Request.of(64, 4.8, 2.4)


@pytest.mark.parametrize(
    ("family", "fps", "rate", "window", "longest"),
    [("HunyuanVideo", 0, 30, 9, 50), ("Wan21", 0, 16, 20, 12), ("Wan22", 0, 24, 20, 18), ("", 16, 16, 9, 27),
     ("selftest Wan", 16, 16, 9, 27)],
)  # fmt: skip
def test_rate_and_section_are_those_of_the_vaes_model(family, fps, rate, window, longest):
    made = Request.of(64, 1.2, 60.0, family, fps)
    assert (made.fps, made.window, made.shortest, made.longest) == (rate, window, 1, longest)


@pytest.mark.parametrize(
    ("family", "fps", "its"), [("HunyuanVideo", 16, 30), ("Wan21", 24, 16), ("selftest Wan", 30, 16)]
)
def test_a_rate_that_no_model_of_the_vae_makes_is_refused_before_anything_is_encoded(family, fps, its):
    vae = re.escape(EXPECTED_FILES[family])
    said = rf"'fps' of {fps}\. Expected: {its} frames a second, as models for {vae} make.*{its} \(or 0\).*Video Clips"
    with pytest.raises(PlanError, match=said):
        Request.of(64, 1.2, 60.0, family, fps)


def test_clips_at_wans_rate_show_what_was_seen_at_those_times(folder, tmp_path, tiny_vae):
    """60 pictures at 24 fps are 40 at 16 fps: one section of 36 and the picture before it."""
    clips = ClipMaker(folder, tmp_path, tiny_vae, Request.of(32, 1.2, 60.0, fps=16), lambda: None)
    (first, *_) = clips.clips()
    assert first.video.name == "b 2.mp4" and (first.part.first, first.part.frames) == (0, 37)
    assert first.part.seconds == 37 / 16 and first.latent["frame_memory"]["fps"] == 16.0
    thirty = next(maker(folder, tmp_path, tiny_vae).clips())
    assert thirty.part.frames == 73 and not torch.equal(first.latent["samples"], thirty.latent["samples"][:, :, :10])
    (seen,) = read_video(first.video.facts, range(36, 37), fps=16, size=first.video.size)
    (same,) = read_video(first.video.facts, range(54, 55), fps=24, size=first.video.size)
    assert np.array_equal(seen, same), "picture 36 at 16 fps is the file's 54th"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shots with a still one between them at 30 fps; one shot at 24 fps; and files nobody can use."""
    root = tmp_path_factory.mktemp("Vidéos ü 画像") / "my clips"
    save(root / "b 10.mp4", np.concatenate([shot(1, 80), shot(2, 60, 0), shot(3, 45)]), caption="Two shots. \n")
    save(root / "b 2.mp4", shot(4, 60), fps=24)
    save(root / "blink.mp4", shot(5, 20))
    save(root / "mute.mp4", shot(5, 40), caption=None)
    save(root / "wall.mp4", shot(6, 60, 0))
    torn = save(root / "torn.mp4", shot(7, 60)).read_bytes()
    (root / "torn.mp4").write_bytes(torn[: len(torn) // 3])
    (root / "._b 2.mp4").write_bytes(b"\0\5\x16\7")
    (root / "notes.md").write_text("not a video")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "frame_memory_clips"


@pytest.fixture(scope="module")
def made(folder, cache, tiny_vae):
    clips = maker(folder, cache, tiny_vae)
    return clips, list(clips.clips())


def test_a_folder_becomes_clips_in_order(made):
    clips, found = made
    # 24 fps: 60 pictures are 75 frames of 30 fps, two sections. The first shot holds two sections, the last one.
    places = [(c.video.name, c.part.first, c.part.frames) for c in found]
    assert places == [("b 2.mp4", 0, 73), ("b 10.mp4", 0, 73), ("b 10.mp4", 140, 37)]
    assert [tuple(c.latent["samples"].shape) for c in found] == [(1, 16, n, 4, 4) for n in (19, 19, 10)]
    assert [c.video.caption for c in found] == ["A yellow square walks.", "Two shots.", "Two shots."]
    assert clips.captions == ["A yellow square walks.", "Two shots."]
    report = clips.report()
    assert "3 clips from 2 of the 6 videos in the folder, 6.1 s in all, 32x32 at 30 fps" in report
    assert "In the others: 2 cuts; left out 1 stretch in which nothing moves, 0 too short." in report
    assert "b 10.mp4: 2 cuts, 2 clips, 1 still, 0 too short." in report


def test_what_cannot_be_used_is_named_with_its_reason(made):
    clips, _ = made
    assert set(clips.why) == {"blink.mp4", "mute.mp4", "torn.mp4", "wall.mp4"}
    assert "0.67 s, and 1.23 s are needed" in clips.why["blink.mp4"]
    assert "no caption 'mute.txt'" in clips.why["mute.mp4"]
    assert "nothing moves in it" in clips.why["wall.mp4"]
    assert clips.why["torn.mp4"].endswith("Replace it, or take it out of the folder")
    words = clips.report()
    assert "Video History" not in words and "Choose another" not in words and "Errno" not in words
    assert str(clips.videos[0].path.parent) not in words and "Warning: 4 videos skipped:" in words.splitlines()[1]
    assert all(f"Skipped {name}: " in clips.report() for name in clips.why)


def test_latents_and_first_pictures_are_those_of_the_files(made, tiny_vae):
    """Against core's own VAE.encode of all frames at once."""
    for clip in made[1]:
        frames = np.concatenate(list(read_video(clip.video.facts, size=clip.video.size)))
        frames = frames[clip.part.first : clip.part.first + clip.part.frames]
        whole = tiny_vae.encode(torch.from_numpy(frames).float() / 255)
        assert torch.allclose(clip.latent["samples"], whole, atol=1e-5)
        assert torch.equal(clip.first_picture()[0], torch.from_numpy(frames[0]).float() / 255)


def test_the_cache_is_named_by_content_and_read_again(made, folder, cache, tiny_vae, tmp_path):
    files = sorted(path.name for path in cache.iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) == 3 and not any("part" in f for f in files)
    with safe_open(str(next(cache.glob("*-000140-37.safetensors"))), "pt") as stored:
        assert stored.metadata()["video"] == "b 10.mp4" and stored.keys() == ["samples"]
        assert torch.equal(stored.get_tensor("samples"), made[1][2].latent["samples"])
    # The same bytes under another name, with another caption: nothing is encoded.
    other = tmp_path / "other"
    other.mkdir()
    (other / "renamed.mp4").write_bytes((folder / "b 10.mp4").read_bytes())
    (other / "renamed.txt").write_text("New words.", encoding="utf-8")
    again = maker(other, cache, tiny_vae)
    found = list(again.clips())
    assert (again.cache.written, again.cache.read) == (0, 2) and found[0].video.caption == "New words."
    assert all(torch.equal(a.latent["samples"], b.latent["samples"]) for a, b in zip(found, made[1][1:], strict=True))
    assert sorted(path.name for path in cache.iterdir()) == files
    larger = maker(other, tmp_path / "empty", tiny_vae, base=64)
    assert next(larger.clips()).part.frames == 73 and larger.cache.read == 0


@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "text"])
def test_fault_t2_a_corrupt_cached_latent_is_named_counted_and_made_anew(made, folder, cache, tiny_vae, harm, tmp_path):
    own = tmp_path / "cache"
    own.mkdir()
    for path in cache.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    broken = next(own.glob("*-000140-37.safetensors"))
    data = bytearray(broken.read_bytes())
    data[-1000] ^= 64
    broken.write_bytes({"cut": data[:-500], "bit": data, "empty": b"", "text": b"<html>no</html>"}[harm])
    index = next(path for path in own.glob("*.json") if "b 2" in path.read_text(encoding="utf-8"))
    index.write_text('{"stretches": [[0, 10, 5.0], [20, 30, 5.0]]}' if harm == "bit" else "{", encoding="utf-8")
    again = maker(folder, own, tiny_vae)
    found = list(again.clips())
    assert all(torch.equal(a.latent["samples"], b.latent["samples"]) for a, b in zip(found, made[1], strict=True))
    assert (again.cache.written, again.cache.read) == (1, 2) and set(again.cache.damaged) == {broken.name, index.name}
    report = again.report()
    assert "Damaged in there, and made anew: 2." in report and f"- {broken.name}: " in report
    third = maker(folder, own, tiny_vae)
    assert len(list(third.clips())) == 3 and not third.cache.damaged and third.cache.written == 0


def test_a_video_of_which_the_vae_makes_nan_is_named_and_never_kept(folder, tmp_path, tiny_vae, monkeypatch):
    """An fp16 VAE overflows on some pictures; each update on such a clip would be lost."""
    encode = tiny_vae.encode

    def overflows(pixels):
        made = encode(pixels)
        return made * float("nan") if float(pixels[0].mean()) == first_mean else made

    clips = maker(folder, tmp_path / "cache", tiny_vae)
    first = next(clips.clips())
    first_mean = float(first.first_picture()[0].mean())
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    path.unlink()
    monkeypatch.setattr(tiny_vae, "encode", overflows)
    again = maker(folder, tmp_path / "cache", tiny_vae)
    assert [c.video.name for c in again.clips()] == ["b 10.mp4", "b 10.mp4"]
    assert "NaN or infinite numbers of 0.0 to 2.4 s" in again.why["b 2.mp4"] and "--fp32-vae" in again.why["b 2.mp4"]
    assert "Skipped b 2.mp4: " in again.report() and not path.exists()
    # One that is there from before, with a checksum of its own, is made anew.
    ClipCache(tmp_path / "cache").keep(path, first.latent["samples"] * float("nan"), {})
    monkeypatch.setattr(tiny_vae, "encode", encode)
    healed = maker(folder, tmp_path / "cache", tiny_vae)
    assert len(list(healed.clips())) == 3 and list(healed.cache.damaged) == [path.name]


def test_fault_t4_empty_folders_and_folders_with_nothing_usable(folder, tmp_path, tiny_vae):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DatasetError, match=r"empty has no videos \(\.mp4.*'Video Clips' expects NAME.mp4"):
        maker(empty, tmp_path, tiny_vae)
    with pytest.raises(DatasetError, match="no folder 'none'.*'Video Clips'"):
        maker(tmp_path / "none", tmp_path, tiny_vae)
    for name in ("blink", "mute", "wall"):
        for path in folder.glob(f"{name}.*"):
            (empty / path.name).write_bytes(path.read_bytes())
    clips = maker(empty, tmp_path / "cache", tiny_vae)
    with pytest.raises(DatasetError, match=r"can use none of 3 videos:(.|\n)*- wall\.mp4: nothing moves in it"):
        list(clips.clips())


def test_fault_t4_one_clip_and_short_stretches(folder, tmp_path, cache, tiny_vae):
    one = tmp_path / "one"
    one.mkdir()
    for path in folder.glob("b 10.*"):
        (one / path.name).write_bytes(path.read_bytes())
    longer = maker(one, cache, tiny_vae, shortest=2.4)
    assert [(c.part.first, c.part.frames) for c in longer.clips()] == [(0, 73)]
    assert "1 clip from 1 video, 2.4 s in all" in longer.report() and "moves, 1 too short." in longer.report()
    halves = maker(one, tmp_path / "cache", tiny_vae, longest=1.2)
    assert [(c.part.first, c.part.frames) for c in halves.clips()] == [(0, 37), (37, 37), (140, 37)]


def test_cancel_stops_and_keeps_what_is_encoded(folder, tmp_path, tiny_vae):
    class Cancelled(Exception):
        pass

    def cancel():
        if list((tmp_path / "cache").glob("*.safetensors")):
            raise Cancelled

    clips = ClipMaker(folder, tmp_path / "cache", tiny_vae, Request(32), cancel)
    with pytest.raises(Cancelled):
        list(clips.clips())
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one video's cuts, one clip"


def test_a_cache_that_cannot_be_written_only_costs_time(folder, tmp_path, tiny_vae, made):
    (tmp_path / "in the way").write_text("a file")
    clips = maker(folder, tmp_path / "in the way", tiny_vae)
    found = list(clips.clips())
    assert all(torch.equal(a.latent["samples"], b.latent["samples"]) for a, b in zip(found, made[1], strict=True))
    assert "Warning: " in clips.report() and "cannot be written to" in clips.report()


def test_long_clips_take_the_memory_of_a_few_frames_and_are_one_encoding(tmp_path, selftest_vae, monkeypatch):
    """Windows of 19 latent frames with a run-up of 12, against one encoding of all 145 frames; the deviation is 3.9."""
    save(tmp_path / "v" / "long.mp4", shot(8, 145))
    seen = []
    encode = selftest_vae.encode
    monkeypatch.setattr(selftest_vae, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    (clip,) = maker(tmp_path / "v", tmp_path / "c", selftest_vae).clips()
    assert clip.part.latent_frames == 37 and max(seen) <= 73
    assert json.loads(next((tmp_path / "c").glob("*.json")).read_text())["stretches"][0][:2] == [0, 145]
    frames = np.concatenate(list(read_video(clip.video.facts, size=clip.video.size)))
    whole = encode(torch.from_numpy(frames).float() / 255)
    assert (clip.latent["samples"] - whole).abs().max() < 0.02 < whole.std() / 10


def test_facts_of_the_fixture(folder):
    assert probe_video(folder / "b 2.mp4").fps == pytest.approx(24, abs=0.1)
    assert Request().section == 36
