"""VideoWriter with the real encoder: what a player reads back, and what is left when something breaks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from frame_memory.video.fragments import cut_to_finished, finished_bytes
from frame_memory.video.writer import VideoWriteError, VideoWriter, check_disk, estimate_bytes

from . import small_disk
from .probe import check_video

WIDTH, HEIGHT = 96, 64


def moving_frames(count: int, *, seed: int = 0) -> torch.Tensor:
    """Float frames [T,H,W,3] with content in every frame."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(1, HEIGHT, WIDTH, 3, generator=generator)
    return (base + torch.linspace(0, 0.3, count).view(-1, 1, 1, 1)).clamp(0, 1)


def probe(path):
    """Count, rate and tags of a file as libav's decoder sees them."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        context = stream.codec_context
        return {
            "frames": len(times),
            "listed": stream.frames,
            "rate": stream.average_rate,
            "seconds": float(stream.duration * stream.time_base),
            "start": times[0] if times else None,
            "pix_fmt": context.pix_fmt,
            "colour": (context.color_primaries, context.color_trc, context.colorspace, context.color_range),
            "size": (stream.width, stream.height),
            "codec": context.name,
            "metadata": dict(container.metadata),
        }


@pytest.mark.parametrize("fps", [30, Fraction(24000, 1001), 29.97, 12.5, 16])
def test_a_player_reads_what_was_written(tmp_path, fps):
    frames = moving_frames(73)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, fps, expected_frames=73) as out:
        for start in range(0, 73, 10):
            out.write(frames[start : start + 10])
    rate = {29.97: Fraction(30000, 1001), 12.5: Fraction(25, 2)}.get(fps, Fraction(fps))
    seen = probe(tmp_path / "a.mp4")
    assert seen["frames"] == seen["listed"] == 73
    assert seen["rate"] == rate
    assert seen["seconds"] == pytest.approx(float(73 / rate), abs=1e-6)
    assert seen["start"] == 0
    assert (seen["codec"], seen["pix_fmt"], seen["size"]) == ("h264", "yuv420p", (WIDTH, HEIGHT))
    assert seen["colour"] == (1, 1, 1, 1), "bt709 primaries, curve, matrix; limited range"
    assert out.result.frames == 73 and out.result.fps == rate and out.result.path == tmp_path / "a.mp4"
    assert out.result.black_frames == () and out.kept_path is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.parametrize("fps", [30, Fraction(24000, 1001)])
def test_ffprobe_agrees(tmp_path, fps):
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, fps, metadata={"workflow": {"a": 1}}) as out:
        out.write(moving_frames(37))
    seen = check_video(tmp_path / "a.mp4", 37, fps, (WIDTH, HEIGHT))
    assert seen.audio is None and json.loads(seen.tags["workflow"]) == {"a": 1}


def test_ffprobe_reads_what_a_stopped_writer_kept(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(moving_frames(50))
        raise KeyboardInterrupt
    check_video(writer.kept_path, 50, 30, (WIDTH, HEIGHT))


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128), (200, 97, 40), (60, 150, 90)]


def bt709_limited(colour):
    """Y, Cb, Cr codes of an 8-bit RGB colour by the formulas of ITU-R BT.709 (limited range), not rounded."""
    red, green, blue = (value / 255 for value in colour)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748


@pytest.mark.parametrize("colour", [*COLOURS, (12, 180, 220), (1, 2, 3)])
def test_the_stored_codes_are_bt709_limited_range(tmp_path, colour):
    flat = torch.tensor(colour, dtype=torch.uint8).expand(5, HEIGHT, WIDTH, 3)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30, crf=0, allow_black=True) as out:
        out.write(flat)
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = next(container.decode(video=0)).to_ndarray()
    quarter = HEIGHT // 4
    codes = planes[:HEIGHT].mean(), planes[HEIGHT : HEIGHT + quarter].mean(), planes[HEIGHT + quarter :].mean()
    assert codes == pytest.approx(bt709_limited(colour), abs=0.51)


reads_colour_tags = pytest.mark.skipif(
    int(av.__version__.split(".")[0]) < 18, reason="older PyAV ignores colour tags when it reads"
)


@reads_colour_tags
@pytest.mark.parametrize("colour", COLOURS)
def test_flat_colours_survive(tmp_path, colour):
    flat = torch.tensor(colour, dtype=torch.float32).div(255).expand(5, HEIGHT, WIDTH, 3)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out:
        out.write(flat)
    with av.open(str(tmp_path / "a.mp4")) as container:
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(back.astype(float) - np.array(colour)).mean() <= 2


@reads_colour_tags
def test_core_reads_the_same_colours(tmp_path):
    """What ComfyUI's own video input makes of the file, through its float conversion."""
    from comfy_api.latest import InputImpl

    flat = torch.tensor([0.8, 0.4, 0.15]).expand(9, HEIGHT, WIDTH, 3)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out:
        out.write(flat)
    video = InputImpl.VideoFromFile(str(tmp_path / "a.mp4"))
    parts = video.get_components()
    assert parts.images.shape == (9, HEIGHT, WIDTH, 3) and parts.frame_rate == 30
    assert (parts.images - flat).abs().mean() <= 2 / 255


def test_uint8_numpy_and_float_are_the_same_frames(tmp_path):
    frames = moving_frames(9)
    as_bytes = frames.mul(255).round().to(torch.uint8)
    decoded = []
    for name, chunk in (("f", frames), ("u", as_bytes), ("n", as_bytes.numpy())):
        before = chunk.copy() if isinstance(chunk, np.ndarray) else chunk.clone()
        with VideoWriter(tmp_path / f"{name}.mp4", WIDTH, HEIGHT, 30) as out:
            out.write(chunk)
        assert (chunk == before).all()
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            decoded.append(np.stack([frame.to_ndarray() for frame in container.decode(video=0)]))
    assert (decoded[0] == decoded[1]).all() and (decoded[1] == decoded[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_of_a_decoder_s_layout_are_stored_as_numpy_and_a_frame_alone_have_them(tmp_path, dtype):
    """Colours outermost in memory, values beyond 0..1 and so large that their sum is infinite; crf 0 loses nothing."""
    frames = (1.3 * moving_frames(6) - 0.1).permute(3, 0, 1, 2).contiguous().to(dtype).permute(1, 2, 3, 0)
    frames[2, :20, :20] = torch.finfo(dtype).max / 300
    expected = []
    for image in np.clip(np.round(frames.float().numpy() * np.float32(255)), 0, 255).astype(np.uint8):
        alone = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        ranges = {"src_color_range": ColorRange.JPEG, "dst_color_range": ColorRange.MPEG}
        codes = alone.reformat(
            format="yuv420p", interpolation=Interpolation.AREA, dst_colorspace=Colorspace.ITU709, **ranges
        )
        expected.append(codes.to_ndarray())
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30, crf=0) as out:
        out.write(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stored = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert np.array_equal(stored, expected)


def test_metadata_is_stored_as_core_stores_it(tmp_path):
    prompt = {"3": {"class_type": "KSampler", "inputs": {"text": "ein Kätzchen"}}}
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30, metadata={"prompt": prompt, "workflow": {"a": 1}}) as out:
        out.write(moving_frames(3))
    seen = probe(tmp_path / "a.mp4")["metadata"]
    assert json.loads(seen["prompt"]) == prompt and json.loads(seen["workflow"]) == {"a": 1}


@pytest.mark.parametrize("width", [80, 160, 272])
def test_the_same_frames_are_the_same_file_whatever_lies_in_memory(tmp_path, width):
    """x264's macroblock tree reads beyond a row that is no multiple of 128 pixels, on CPUs with AVX-512."""
    smooth = moving_frames(45).repeat(1, 1, 3, 1)[:, :, :width] * 0.8
    written, memory = set(), []
    for turn in range(6):
        with VideoWriter(tmp_path / f"{turn}.mp4", width, HEIGHT, 30) as out:
            for start in range(0, 45, 5):
                memory = [*memory[-4:], os.urandom(40_000 * (turn + 1) + start)]
                out.write(smooth[start : start + 5].roll(start, dims=2))
        written.add((tmp_path / f"{turn}.mp4").read_bytes())
    assert len(written) == 1, f"{len(written)} different files"


def test_crf_changes_the_size(tmp_path):
    sizes = {}
    for crf in (10, 40):
        with VideoWriter(tmp_path / f"{crf}.mp4", WIDTH, HEIGHT, 30, crf=crf) as out:
            out.write(moving_frames(20))
        sizes[crf] = (tmp_path / f"{crf}.mp4").stat().st_size
    assert sizes[10] > 2 * sizes[40]


@pytest.mark.parametrize(("size", "nearest"), [((97, 64), "98x64"), ((96, 63), "96x64"), ((0, 64), "2x64")])
def test_odd_sizes_show_the_nearest_even_ones(tmp_path, size, nearest):
    with pytest.raises(VideoWriteError, match=nearest):
        VideoWriter(tmp_path / "a.mp4", *size, 30)


def test_bad_settings_and_chunks_are_named(tmp_path):
    with pytest.raises(VideoWriteError, match="crf is 60"):
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30, crf=60)
    with pytest.raises(VideoWriteError, match="ends in .mp4"):
        VideoWriter(tmp_path / "a.webm", WIDTH, HEIGHT, 30)
    with (
        pytest.raises(VideoWriteError, match=r"expected \[frames, 64, 96, 3\]"),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out,
    ):
        out.write(torch.zeros(2, 32, 96, 3))
    with (
        pytest.raises(VideoWriteError, match="No frames came"),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_encoders_words_reach_the_artist(tmp_path):
    """A size the real encoder refuses; it says why, and nothing is left behind."""
    with (
        pytest.raises(VideoWriteError, match="Picture size 40000x40000 is invalid"),
        VideoWriter(tmp_path / "a.mp4", 40000, 40000, 30),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    assert av.logging.get_level() is None


def test_an_existing_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    target = tmp_path / "a.mp4"
    target.write_bytes(b"the earlier video")
    with (
        pytest.raises(RuntimeError, match="decoding broke"),
        VideoWriter(target, WIDTH, HEIGHT, 30) as out,
    ):
        out.write(moving_frames(40))
        raise RuntimeError("decoding broke")
    assert target.read_bytes() == b"the earlier video"
    assert out.kept_path == tmp_path / "a.part.mp4"
    with VideoWriter(target, WIDTH, HEIGHT, 30) as out:
        out.write(moving_frames(9))
        assert target.read_bytes() == b"the earlier video"
    assert probe(target)["frames"] == 9
    assert probe(tmp_path / "a.part.mp4")["frames"] == 40, "an unfinished video is never overwritten by the next run"


def test_fault_05_cancel_leaves_a_playable_file(tmp_path):
    """Cancel is a BaseException in ComfyUI; every frame that was written plays."""
    from comfy.model_management import InterruptProcessingException

    with (
        pytest.raises(InterruptProcessingException),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out,
    ):
        out.write(moving_frames(50))
        raise InterruptProcessingException
    assert out.result is None and out.kept_path == tmp_path / "a.part.mp4"
    seen = probe(out.kept_path)
    assert seen["frames"] == seen["listed"] == 50
    assert not (tmp_path / "a.mp4").exists()


def run_child(body: str, folder: Path, **kwargs) -> subprocess.CompletedProcess:
    """Run a script that writes noise into `folder`, in a process of its own that may be killed or limited."""
    head = """
        import sys
        from pathlib import Path
        import numpy as np
        from frame_memory.video.writer import VideoWriter, VideoWriteError
        folder = Path(sys.argv[1])
        noise = np.random.default_rng(0).integers(0, 255, (36, 64, 96, 3), dtype=np.uint8)
    """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    prefix, more = kwargs.pop("prefix", []), kwargs.pop("more", [])
    command = [*prefix, sys.executable, "-c", script, str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_fault_03_a_killed_process_leaves_a_playable_file(tmp_path):
    body = """
        import os, signal
        with VideoWriter(folder / "a.mp4", 96, 64, 30) as out:
            for _ in range(6):
                out.write(noise)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_child(body, tmp_path).returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.part.mp4"]
    assert cut_to_finished(tmp_path / "a.part.mp4")
    # 216 frames were given; x264 holds about 40 back, and the last fragment was not complete.
    assert probe(tmp_path / "a.part.mp4")["frames"] >= 144


FULL_DISK = """
    import frame_memory.video.writer as writer
    writer.DISK_MARGIN = -10**9  # so that the check before every write lets it through
    try:
        with VideoWriter(folder / "a.mp4", 96, 64, 30) as out:
            for _ in range(20):
                out.write(noise)
    except VideoWriteError as error:
        print(error)
        print("kept", out.kept_path)
        import av
        with av.open(str(out.kept_path)) as container:
            print("frames", sum(1 for _ in container.decode(video=0)))
"""


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_fault_12_a_failed_write_keeps_the_finished_part(tmp_path):
    """The kernel refuses to let the file grow; the error has the system's words and the kept file plays."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))\n"
    result = run_child(limit + textwrap.dedent(FULL_DISK), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "File too large" in result.stdout and "a.part.mp4" in result.stdout
    assert int(result.stdout.split("frames")[-1]) >= 144
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.part.mp4"]


def test_fault_06_a_full_disk_is_named(tmp_path):
    """A real file system of 800 KB, in a mount namespace of its own."""
    mount = small_disk.command_on(tmp_path, 800)
    result = run_child(FULL_DISK, tmp_path, prefix=mount)
    assert result.returncode == 0, result.stderr
    assert "No space left on device" in result.stdout and str(tmp_path) in result.stdout
    assert int(result.stdout.split("frames")[-1]) >= 144


def test_fault_06_the_disk_is_checked_before(tmp_path):
    frames = 10**10
    with (
        pytest.raises(VideoWriteError, match="may need .* Nothing was written") as error,
        VideoWriter(tmp_path / "a.mp4", 832, 480, 30, expected_frames=frames),
    ):
        pass
    assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []
    check_disk(tmp_path / "a.mp4", 96, 64, 1)


def test_fault_06_the_disk_is_checked_again_at_each_write(tmp_path, monkeypatch):
    """It fills up while the video is written: what is there is closed properly, and the numbers are told."""
    room = [10**12]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=room[0]))
    with (
        pytest.raises(VideoWriteError, match=r"is nearly full: a\.mp4 needs \d+\.\d MB \(\d+ bytes\) more") as error,
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30, expected_frames=72) as out,
    ):
        out.write(moving_frames(36))
        room[0] = 1000
        out.write(moving_frames(36))
    assert "1000 bytes" in str(error.value) and str(tmp_path) in str(error.value)
    check_video(out.kept_path, 36, 30, (WIDTH, HEIGHT))
    assert [p.name for p in tmp_path.iterdir()] == ["a.part.mp4"]


def test_the_estimate_is_above_what_grainy_video_takes(tmp_path):
    """Noise of a standard deviation of 10 levels, far more grain than a decoded video has."""
    generator = torch.Generator().manual_seed(1)
    frames = moving_frames(36) + torch.randn(36, HEIGHT, WIDTH, 3, generator=generator) * 10 / 255
    smooth = torch.nn.functional.avg_pool2d(frames.movedim(-1, 1), 3, 1, 1).movedim(1, -1)
    with VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out:
        out.write(smooth)
    assert (tmp_path / "a.mp4").stat().st_size < 2 * estimate_bytes(WIDTH, HEIGHT, 36)
    assert estimate_bytes(832, 480, 1801) < 200 * 2**20


def test_fault_07_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    with (
        pytest.raises(VideoWriteError, match="Cannot write into .*file.* Nothing was written"),
        VideoWriter(tmp_path / "file" / "a.mp4", WIDTH, HEIGHT, 30),
    ):
        pass


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_fault_13_nan_in_pixels_raises_with_the_frame(tmp_path, poison):
    frames = moving_frames(20)
    bad = frames.clone()
    bad[7, 3, 5, 1] = poison
    with (
        pytest.raises(VideoWriteError, match="Frame 27 holds NaN or Inf"),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out,
    ):
        out.write(frames)
        out.write(bad)
    # The frames before it in the same chunk, which are converted four at a time, are kept too.
    assert probe(out.kept_path)["frames"] == 24
    assert not (tmp_path / "a.mp4").exists()


def test_fault_13_a_black_video_is_not_saved_as_success(tmp_path):
    black = torch.zeros(12, HEIGHT, WIDTH, 3)
    with (
        pytest.raises(VideoWriteError, match="All 12 frames are black"),
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, 30) as out,
    ):
        out.write(black)
    assert not (tmp_path / "a.mp4").exists() and probe(out.kept_path)["frames"] == 12
    with VideoWriter(tmp_path / "b.mp4", WIDTH, HEIGHT, 30, allow_black=True) as out:
        out.write(black)
    assert len(out.result.black_frames) == 12
    with VideoWriter(tmp_path / "c.mp4", WIDTH, HEIGHT, 30) as out:
        out.write(black[:2])
        out.write(moving_frames(3))
    assert out.result.black_frames == (0, 1)


def test_torn_fragments_are_recognised(tmp_path):
    torn = tmp_path / "t.mp4"
    torn.write_bytes(b"\0\0\0\x08ftyp\0\0\0\x08moof\0\0\0\x0cmdatabcd\0\0\0\x08moof\0\0\0\xffmdatcut")
    assert finished_bytes(torn) == 28
    assert cut_to_finished(torn) and torn.stat().st_size == 28
    torn.write_bytes(b"\0\0\0\x08ftyp\0\0\0\x00mdat")
    assert finished_bytes(torn) == 0 and not cut_to_finished(torn)
