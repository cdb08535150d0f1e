"""Save Long Video: the library call behind it, and the node inside the real ComfyUI."""

import importlib.util
import json
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from frame_memory.plan.mark import MarkError
from frame_memory.video.carried import CarriedDecoder, can_carry
from frame_memory.video.decode import DecodeError
from frame_memory.video.ladder import DecodeMemoryError
from frame_memory.video.save import describe, plan_save, save_video
from frame_memory.video.vae import VAEError

from .reference import reference_video
from .test_video_carried import tight_decoder
from .test_video_ladder import tight
from .test_video_writer import run_child

ROOT = Path(__file__).resolve().parents[2]


def long_latent(sections=3, *, batch=1, order="inverted", **mark):
    """A LATENT as Anti-Drift Sampler hands it on; None for the mark makes it anybody's."""
    generator = torch.Generator().manual_seed(sections)
    samples = torch.randn(batch, 16, 9 * sections + 1, 4, 6, generator=generator)
    marks = {"latent_format": "HunyuanVideo", "base": "selftest", "order": order, "window": 9, "fps": 30.0} | mark
    return {"samples": samples, "frame_memory": marks}


def read_back(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("order", ["inverted", "forward"])
def test_the_file_shows_the_reference_video(tmp_path, tiny_vae, order):
    latent = long_latent(3, order=order)
    with torch.inference_mode():
        plan = plan_save(tiny_vae, latent, 30.0, "windowed")
        written = save_video(plan, tiny_vae, tmp_path / "a.mp4", crf=0)
        expected = reference_video(tiny_vae.decode, latent["samples"], order, 3)
    assert (written.frames, written.fps, written.width, written.height) == (109, 30, 48, 32)
    got = torch.from_numpy(read_back(tmp_path / "a.mp4")).float() / 255
    # 4:2:0 halves the colour resolution of what is nearly noise, so luma is what can be compared.
    luma = torch.tensor([0.2126, 0.7152, 0.0722])
    assert ((got @ luma) - (expected @ luma)).abs().mean() < 0.02
    report = describe(plan, written)
    assert "109 frames, 3.63 s at 30 fps, 48x32" in report and "self-test VAE" in report and "Warning" not in report


def test_whole_is_one_pass(tmp_path, tiny_vae):
    latent = long_latent(2)
    with torch.inference_mode():
        plan = plan_save(tiny_vae, latent, 0, "whole")
        assert len(plan.windows) == 1
        save_video(plan, tiny_vae, tmp_path / "a.mp4", crf=0)
        expected = tiny_vae.decode(latent["samples"])[0]
    luma = torch.tensor([0.2126, 0.7152, 0.0722])
    got = torch.from_numpy(read_back(tmp_path / "a.mp4")).float() / 255
    assert got.shape == expected.shape
    assert ((got @ luma) - (expected @ luma)).abs().mean() < 0.02


@pytest.mark.parametrize("order", ["inverted", "forward"])
def test_carried_is_whole_in_every_byte_of_the_file(tmp_path, tiny_vae, order):
    latent = long_latent(3, order=order)
    with torch.inference_mode():
        plan = plan_save(tiny_vae, latent)
        seen = []
        written = save_video(plan, tiny_vae, tmp_path / "a.mp4", on_window=lambda *at: seen.append(at))
        save_video(plan_save(tiny_vae, latent, 0, "whole"), tiny_vae, tmp_path / "b.mp4")
    assert plan.mode == "carried" and "frame after frame with carried state" in describe(plan, written)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    # 28 latent frames: one, then two at a time.
    assert seen == [(done + 1, plan.steps) for done in range(15)] and written.frames == 109


def test_a_vae_that_cannot_carry_is_decoded_in_windows(tiny_vae):
    """HunyuanVideo's class: its middle block looks at the whole clip."""
    import copy

    other = copy.copy(tiny_vae)
    other.first_stage_model = torch.nn.Identity()
    assert can_carry(tiny_vae) and not can_carry(other)
    unmarked = {"samples": torch.zeros(1, 16, 28, 4, 6)}
    plan = plan_save(other, unmarked)
    assert plan.mode == "windowed" and len(plan.windows) == 3 == plan.steps


@pytest.mark.parametrize("mode", ["windowed", "carried"])
def test_fault_02_the_save_announces_every_rung_in_its_report(tmp_path, tiny_vae, mode):
    latent = {"samples": long_latent(2)["samples"]}
    small = tight(tiny_vae, 3 * 6) if mode == "windowed" else tight_decoder(tiny_vae, 3 * 6)
    said = []
    with torch.inference_mode(), pytest.raises(DecodeMemoryError, match="nothing is sampled again"):
        save_video(plan_save(small, latent, 0, mode), small, tmp_path / "a.mp4", announce=said.append)
    assert [text.split("decoding again ")[1].split(" of")[0] for text in said] == ["in tiles", "in tiles"]
    assert list(tmp_path.iterdir()) == []
    small, said = (tight(tiny_vae, 32 * 6) if mode == "windowed" else tight_decoder(tiny_vae, 32 * 6)), []
    tall = {"samples": torch.randn(1, 16, 4, 34, 6)}
    with torch.inference_mode():
        plan = plan_save(small, tall, 0, mode)
        written = save_video(plan, small, tmp_path / "a.mp4", announce=said.append)
    assert len(said) == 1 and "in tiles of 256 pixels" in said[0] and said[0] in describe(plan, written, said)


@pytest.mark.parametrize("frames", [1, 4, 10, 21, 30])
def test_any_video_latent_is_one_forward_video(tiny_vae, frames):
    plan = plan_save(tiny_vae, {"samples": torch.zeros(1, 16, frames, 4, 6)}, 24, "windowed")
    assert plan.frames == 4 * frames - 3 and plan.fps == 24
    assert plan.windows[0].start == 0 and plan.windows[-1].stop == frames


def test_planning_names_the_mistake(tiny_vae):
    with pytest.raises(DecodeError, match="VAE Decode"):
        plan_save(tiny_vae, {"samples": torch.zeros(1, 16, 8, 8)})
    with pytest.raises(DecodeError, match="empty latent"):
        plan_save(tiny_vae, {"samples": torch.zeros(0, 16, 10, 8, 8)})
    with pytest.raises(DecodeError, match="expected one of: carried, windowed, whole"):
        plan_save(tiny_vae, long_latent(), 30, "sideways")


@pytest.mark.parametrize("mode", ["carried", "windowed", "whole"])
def test_fault_13_nan_in_the_latents_ends_the_save_and_keeps_what_comes_before_it(tmp_path, tiny_vae, mode):
    latent = long_latent(6, order="forward")
    sound, broken = tmp_path / "sound.mp4", tmp_path / "broken.mp4"
    with torch.inference_mode():
        save_video(plan_save(tiny_vae, latent, 0, mode), tiny_vae, sound)
        latent["samples"][0, 3, 40, 1, 2] = float("nan")
        plan = plan_save(tiny_vae, latent, 0, mode)
        with pytest.raises(DecodeError, match="'samples' of 'Save Long Video' holds NaN or Inf.*attention backend"):
            save_video(plan, tiny_vae, broken)
    # Carried: 39 latent frames were decoded. Windowed: 4 windows, whose last 33 frames wait for the next one.
    frames = {"carried": 4 * 39 - 3, "windowed": 37 + 3 * 36 - 33, "whole": 0}[mode]
    part = tmp_path / "broken.part.mp4"
    assert not broken.exists() and part.exists() == bool(frames)
    if frames:
        assert np.array_equal(read_back(part), read_back(sound)[:frames])


def resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that lie in this process's memory, as the system counts them."""
    found, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counting = words[-1] == str(path)
        elif counting and words[0] == "Rss:":
            found += 1024 * int(words[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what of a file is in memory")
def test_fault_45_a_latent_in_a_mapped_file_is_not_read_through_before_the_decode(tmp_path, tiny_vae):
    path = tmp_path / "latent"
    shape = (512, 1, 16, 16, 16)
    path.write_bytes(bytes(4 * int(np.prod(shape))))
    mapped = torch.from_file(str(path), shared=False, size=int(np.prod(shape)), dtype=torch.float32).view(shape)
    plan = plan_save(tiny_vae, {"samples": mapped.permute(1, 2, 0, 3, 4)}, 30)
    assert resident_bytes(path) < path.stat().st_size // 16
    assert plan.latents_BCTHW.frames(0, 0, 512).shape == (1, 16, 512, 16, 16)
    assert resident_bytes(path) == path.stat().st_size, "the counter sees a file that was read"


def test_fault_22_the_wrong_vae_is_refused_by_the_save(tiny_vae):
    with pytest.raises(VAEError, match="'Load VAE'.*hunyuan_video_vae"):
        plan_save(tiny_vae, long_latent(base="HunyuanVideo"))


def test_fault_25_fps_travels_with_the_latent(tiny_vae):
    assert plan_save(tiny_vae, long_latent(fps=Fraction(24000, 1001)), 0).fps == Fraction(24000, 1001)
    assert plan_save(tiny_vae, long_latent(fps=24), 24).fps == 24
    with pytest.raises(MarkError, match="Set fps in 'Save Long Video' to 24"):
        plan_save(tiny_vae, long_latent(fps=24), 30)


def test_fault_05_a_stopped_save_keeps_what_is_finished(tmp_path, tiny_vae):
    from comfy.model_management import InterruptProcessingException

    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 4:
            raise InterruptProcessingException

    plan = plan_save(tiny_vae, long_latent(6, order="forward"), 0, "windowed")
    with torch.inference_mode(), pytest.raises(InterruptProcessingException):
        save_video(plan, tiny_vae, tmp_path / "a.mp4", interrupt=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["a.part.mp4"]
    # Three windows were decoded: 37 + 36 + 36 frames, less the 33 that wait for their neighbour.
    assert len(read_back(tmp_path / "a.part.mp4")) == 76


def test_fault_05_a_stopped_carried_save_keeps_every_decoded_frame(tmp_path, tiny_vae):
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        save_video(plan_save(tiny_vae, long_latent(6)), tiny_vae, tmp_path / "a.mp4", interrupt=interrupt)
    assert len(read_back(tmp_path / "a.part.mp4")) == 1 + 8 + 8


def test_fault_06_a_disk_that_is_full_at_any_write_of_a_save_leaves_a_playable_part_or_nothing(tmp_path, tiny_vae):
    """Room for a tenth of the file, two tenths, and so on: what is kept is a beginning of the same video."""
    latent = long_latent(4, order="forward")
    with torch.inference_mode():
        plan = plan_save(tiny_vae, latent, 30)
        whole = save_video(plan, tiny_vae, tmp_path / "whole.mp4", crf=10)
        pixels = torch.cat(list(CarriedDecoder(tiny_vae).stream(latent["samples"])))
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    size = whole.path.stat().st_size
    body = """
        import json, resource, sys
        import numpy as np
        import frame_memory.video.writer as writer
        from frame_memory.video.fragments import finished_bytes
        frames, size = np.load(folder / "pixels.npy"), int(sys.argv[2])
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for tenth in range(10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * tenth // 10, hard))
            out = VideoWriter(folder / f"{tenth}.mp4", 48, 32, 30, crf=10)
            try:
                with out:
                    for start in range(0, len(frames), 8):
                        out.write(frames[start : start + 8])
                raise SystemExit(f"nothing failed at {tenth}")
            except VideoWriteError as error:
                assert str(folder) in str(error), error
    """
    result = run_child(textwrap.dedent(body), tmp_path, more=[str(size)])
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("?.mp4"))
    kept = sorted(tmp_path.glob("?.part.mp4"))
    counts = [len(read_back(path)) for path in kept]
    assert counts and counts == sorted(counts) and 0 < counts[-1] < whole.frames
    shown = read_back(whole.path)
    for path, count in zip(kept, counts):
        assert np.array_equal(read_back(path), shown[:count])


@pytest.mark.parametrize("mode", ["carried", "windowed"])
def test_inputs_are_left_alone(tmp_path, tiny_vae, mode):
    latent = long_latent(2)
    before = latent["samples"].clone()
    marks = dict(latent["frame_memory"])
    with torch.inference_mode():
        save_video(plan_save(tiny_vae, latent, 0, mode), tiny_vae, tmp_path / "a.mp4")
    assert torch.equal(latent["samples"], before) and latent["frame_memory"] == marks


@pytest.fixture(scope="module")
def node():
    """The node class, imported as the host imports it: as a module of the pack's package, with relative imports."""
    name = "frame_memory_pack_of_video_tests"
    spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(ROOT)]
    sys.modules[name] = package
    try:
        module = importlib.import_module(f"{name}.nodes.video")
        yield module.FrameMemorySaveLongVideo
    finally:
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]


@pytest.fixture
def output_folder(tmp_path):
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


def test_the_schema_is_complete(node):
    schema = node.GET_SCHEMA()
    schema.validate()
    assert schema.node_id == "FrameMemorySaveLongVideo" and schema.is_output_node and schema.description
    for port in [*schema.inputs, *schema.outputs]:
        assert port.tooltip and len(port.tooltip) > 30, port.id
    assert {port.id for port in schema.inputs if port.advanced} == {"crf", "decode"}
    page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert all(f"**{port.id}**" in page for port in schema.inputs)
    assert all(f"**{port.display_name}**" in page for port in schema.outputs)


def test_the_node_writes_previews_and_hands_on(node, output_folder, tiny_vae):
    latent = long_latent(2)
    with torch.inference_mode():
        first = node.execute(latent, tiny_vae, 30.0, "video/test")
        second = node.execute(latent, tiny_vae, 30.0, "video/test")
    assert first.ui.as_dict() == {
        "images": [{"filename": "test_00001_.mp4", "subfolder": "video", "type": "output"}],
        "animated": (True,),
    }
    assert second.ui.as_dict()["images"][0]["filename"] == "test_00002_.mp4"
    ((video,), (report,)) = first.result
    assert video.get_frame_rate() == 30 and video.get_frame_count() == 73 and video.get_dimensions() == (48, 32)
    assert "73 frames" in report and str(output_folder) in report
    video.save_to(str(output_folder / "again.mp4"))
    assert np.array_equal(read_back(output_folder / "again.mp4"), read_back(output_folder / "video/test_00001_.mp4"))


@pytest.mark.parametrize(
    ("prefix", "place"),
    [("", "video/FrameMemory"), ("  ", "video/FrameMemory"), (".", "video/FrameMemory"), ("a/b/", "a/b/FrameMemory"),
     ("a/ ", "a/FrameMemory"), ("a/b", "a/b"), (".a", ".a")],
)  # fmt: skip
def test_a_prefix_without_a_name_gets_one(node, output_folder, prefix, place):
    find = sys.modules[node.__module__].output_place
    folder, name, number, subfolder = find(prefix, "video/FrameMemory", 8, 8)
    assert f"{subfolder}/{name}".lstrip("/") == place and Path(folder) == output_folder / subfolder and number == 1


def test_a_batch_is_one_file_each(node, output_folder, tiny_vae):
    latent = long_latent(1, batch=2, order="forward")
    with torch.inference_mode():
        output = node.execute(latent, tiny_vae, 0, "b")
        alone = node.execute({**latent, "samples": latent["samples"][1:]}, tiny_vae, 0, "alone")
    assert [file["filename"] for file in output.ui.as_dict()["images"]] == ["b_00001_.mp4", "b_00002_.mp4"]
    assert len(output.result[0]) == len(output.result[1]) == 2 and len(alone.result[0]) == 1
    assert np.array_equal(read_back(output_folder / "b_00002_.mp4"), read_back(output_folder / "alone_00001_.mp4"))


def test_progress_counts_windows_and_cancel_stops(node, output_folder, tiny_vae):
    import comfy.model_management
    import comfy.utils

    seen = []
    before = comfy.utils.PROGRESS_BAR_HOOK

    def hook(value, total, preview, node_id=None):
        seen.append((value, total))
        if value == 1:
            comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
            node.execute(long_latent(4, order="forward"), tiny_vae, 30.0, "c", decode="windowed")
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
        comfy.model_management.interrupt_current_processing(False)
    assert seen == [(1, 4)]
    assert [p.name for p in output_folder.iterdir()] == ["c_00001_.part.mp4"]
    # The first window's 37 frames less the 33 that wait for the second window.
    assert len(read_back(output_folder / "c_00001_.part.mp4")) == 4


def test_fault_13_a_black_decode_is_an_error_in_the_node(node, output_folder, tiny_vae):
    """Pixels that went to zero, as core's clamp makes of some overflows."""
    import copy

    black = copy.copy(tiny_vae)
    black.process_output = lambda image: image.zero_()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="frames are black"):
        node.execute(long_latent(1), black, 30.0, "black")
    assert [p.name for p in output_folder.iterdir()] == ["black_00001_.part.mp4"]


def test_metadata_of_the_graph_is_in_the_file(node, output_folder, tiny_vae):
    from comfy_api.latest import io

    class Hidden:
        prompt = {"1": {"class_type": "FrameMemorySaveLongVideo"}}
        extra_pnginfo = {"workflow": {"nodes": []}}

    clone = type("Clone", (node,), {"hidden": Hidden()})
    assert issubclass(clone, io.ComfyNode)
    with torch.inference_mode():
        clone.execute(long_latent(1), tiny_vae, 30.0, "m")
    with av.open(str(output_folder / "m_00001_.mp4")) as container:
        assert json.loads(container.metadata["prompt"]) == Hidden.prompt
        assert json.loads(container.metadata["workflow"]) == Hidden.extra_pnginfo["workflow"]
