"""What the Anti-Drift Sampler decides and says before it runs: warnings, families, sizes, lengths, RAM."""

from __future__ import annotations

import logging
import re

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frame_memory.plan import (
    PRESETS,
    START,
    PlanError,
    natural_order,
    parse_schedule,
    parse_timeline,
    plan_sections,
)
from frame_memory.sampling.long_video import describe_needs, latent_of, memory_needs, weights_to_come
from frame_memory.sampling.project_run import ProjectRequest
from frame_memory.sampling.prompts import EncodedTimeline

from .conftest import conditioning, guider_for, of_kind, run, start_latent


def encoded(text):
    timeline = parse_timeline(text, 0)
    return EncodedTimeline(timeline, tuple(conditioning(1) for _ in timeline.entries))


def of_family(latent: dict, base: str) -> dict:
    return {**latent, "frame_memory": {"base": base}}


def test_warnings_are_shown_and_logged_before_the_first_step(model, caplog):
    said = []
    timeline = encoded("0-0.3: a\n0.3-0.6: b\n0.6-: c")
    with caplog.at_level(logging.WARNING):
        run(model, kind=None, seconds=1.2, timeline=timeline, say=said.append)
    first_progress = next(i for i, text in enumerate(said) if text.startswith("section 1"))
    before = "\n".join(said[:first_progress])
    assert "37 frames" in before
    for words in ("nobody knows whether it is F0 or F1", "never shown"):
        assert re.search(f"Warning: .*{words}", before)
        assert any(words in record.getMessage() for record in caplog.records)


def test_every_line_of_progress_keeps_the_exact_length(model):
    said = []
    run(model, seconds=2.4, say=said.append)
    progress = [text.split("\n")[0] for text in said if text.startswith("section ")]
    assert [*dict.fromkeys(progress)] == [f"section {k} of 2 · 73 frames = 2.43 s" for k in (1, 2)]


SOCKETS = ("start", "end", "history", "initial")


@pytest.mark.parametrize("socket", SOCKETS)
@pytest.mark.parametrize("base", ["", "HunyuanVideo", "selftest"])
def test_fault_22_every_latent_of_another_family_is_refused_by_socket(model, socket, base):
    """base "": a stock or GGUF loader, which says no more than the latent format."""
    frames = {"start": 1, "end": 1, "history": 9, "initial": 28}[socket]
    given_latents = {"start": start_latent(), socket: of_family(start_latent(frames=frames), "Wan21")}
    guider = guider_for(of_kind(model, "F0", base=base))
    with pytest.raises(PlanError, match=rf"'{socket}' .*Wan 2.1 VAE.*Load VAE"):
        run(model, preset="F0 inverted", guider=guider, **given_latents)
    given_latents[socket] = of_family(given_latents[socket], "selftest Wan")
    with pytest.raises(PlanError, match=rf"'{socket}' .* with the small VAE of the self-test Wan model"):
        run(model, preset="F0 inverted", guider=guider, **given_latents)


def test_fault_22_a_stock_loader_takes_both_families_of_its_format_but_not_mixed(model):
    for base in ("HunyuanVideo", "selftest"):
        latent, _ = run(model, kind=None, seconds=1.2, start=of_family(start_latent(), base))
        assert latent["frame_memory"]["base"] == base
    mixed = {"start": of_family(start_latent(), "selftest")}
    mixed["history"] = of_family(start_latent(frames=9), "HunyuanVideo")
    with pytest.raises(PlanError, match="'history' .*HunyuanVideo.*selftest"):
        run(model, kind=None, **mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_meet_in_fp32_on_the_cpu(model, dtype):
    """--gpu-only and --fp16-intermediates leave latents elsewhere and otherwise than the loop works."""
    start = {"samples": start_latent()["samples"].to(dtype)}
    kept = start["samples"].clone()
    read = latent_of("start", start)
    assert read.dtype == torch.float32 and read.device.type == "cpu"
    assert torch.equal(start["samples"], kept) and start["samples"].dtype == dtype
    same = start_latent()
    assert latent_of("start", same).data_ptr() == same["samples"].data_ptr(), "copied only where needed"
    latent, _ = run(model, start=start, end=None, seconds=1.2)
    assert latent["samples"].dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_latents_on_a_gpu_come_to_the_cpu():
    assert latent_of("start", {"samples": start_latent()["samples"].cuda()}).device.type == "cpu"


def test_a_timeline_without_a_positive_prompt_to_replace_is_refused(model):
    class Other(comfy.samplers.CFGGuider):
        def set_conds(self, main):
            self.inner_set_conds({"main": main})

    guider = Other(of_kind(model, "F1"))
    guider.set_conds(conditioning())
    with pytest.raises(PlanError, match="'guider'.*'timeline'|'timeline'.*'guider'"):
        run(model, guider=guider, seconds=1.2, timeline=encoded("a"))


@given(
    preset=st.sampled_from(sorted(PRESETS)), sections=st.integers(1, 6), frames=st.integers(1, 40), end=st.booleans()
)
def test_with_a_history_no_group_reads_the_start_picture(preset, sections, frames, end):
    end = end and natural_order(parse_schedule(PRESETS[preset])) != "forward"
    plan = plan_sections(PRESETS[preset], sections=sections, history_frames=frames, has_end=end)
    assert START not in {frame for s in plan.sections for group in s.groups for frame in group.frames}


def test_with_a_history_the_start_gives_only_the_size_and_the_report_says_so(model):
    history = start_latent(frames=9, seed=3)
    one, report = run(model, history=history, start=start_latent(seed=2), seconds=1.2)
    two, _ = run(model, history=history, start=start_latent(seed=5), seconds=1.2)
    assert torch.equal(one["samples"], two["samples"])
    assert "'start' only gives the size" in report
    assert "only gives the size" not in run(model, seconds=1.2)[1]


def test_fault_46_weights_in_memory_are_shown_but_not_missing(model):
    plan = plan_sections(PRESETS["F1 forward"], sections=9)
    needs = memory_needs(plan, (1, 16, 1, 76, 80), weights=12 * 2**30)
    others = sum(needs.values()) - needs["weights"]
    line, shortage = describe_needs(needs, free=others + 1, to_come=0)
    assert "weights 12.00 GiB (in memory already)" in line and shortage is None
    line, shortage = describe_needs(needs, free=others + 2**30, to_come=12 * 2**30)
    assert "already" not in line and "11.00 GiB of RAM more" in shortage
    _, report = run(model, seconds=1.2)
    assert re.search(r"weights \d+\.\d\d GiB \(in memory already\)", report)


def test_an_existing_video_is_held_whole_beside_what_a_project_keeps():
    """It came in as it is: told, and not missing from what is free."""
    plan = plan_sections(PRESETS["F1 forward"], sections=2, history_frames=200)
    frame = 2 * 4 * 16 * 76 * 80
    needs = memory_needs(plan, (2, 16, 1, 76, 80), 0, 8, on_disk=True)
    assert needs["history"] == 200 * frame and needs["latents"] == 18 * frame
    assert needs["decode"] == memory_needs(plan, (2, 16, 1, 76, 80), 0)["decode"]
    line, shortage = describe_needs(needs, free=sum(needs.values()) - needs["history"], to_come=0)
    assert f"history {200 * frame / 2**30:.2f} GiB (there already)" in line and shortage is None
    without = memory_needs(plan_sections(PRESETS["F1 forward"], sections=2), (2, 16, 1, 76, 80), 0, 8, on_disk=True)
    assert "history" not in without and "history" not in describe_needs(without, 0, 0)[0]


def test_latents_that_a_project_keeps_are_not_counted_whole(model, tmp_path):
    frame = 4 * 16 * 76 * 80
    for sections, here, kept in ((2, 19, 19), (300, 2701, 36)):
        plan = plan_sections(PRESETS["F1 forward"], sections=sections)
        latents = [memory_needs(plan, (1, 16, 1, 76, 80), 0, 8, on_disk)["latents"] for on_disk in (False, True)]
        assert latents == [2 * here * frame, kept * frame]
    said = []

    class Stop(Exception):
        """Raised by the first text, before anything is sampled."""

    def say(text: str) -> None:
        said.append(re.search(r"latents (\d\.\d\d) GiB", text)[1])
        raise Stop

    for more in ({}, {"project": ProjectRequest(tmp_path, "kept")}):
        with pytest.raises(Stop):
            run(model, start=start_latent(height=200, width=200), seconds=12.0, say=say, **more)
    frame = 4 * 16 * 200 * 200 / 2**30
    assert said == [f"{2 * 91 * frame:.2f}", f"{36 * frame:.2f}"]


def test_fault_46_weights_that_core_pages_in_from_disk_are_still_to_come(model):
    class Paged(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

        def loaded_size(self):
            return 100

        def loaded_ram_size(self):
            return 1000

    assert weights_to_come(model) == 0
    paged = Paged(model.model, model.load_device, model.offload_device)
    assert weights_to_come(paged) == model.model_size() - 1100


def test_initial_latents_too_short_name_a_length_that_works(model):
    with pytest.raises(PlanError, match=r"'initial' .*at least 10 latent frames \(37 pictures\)") as error:
        run(model, initial=start_latent(frames=3), seconds=1.2)
    assert "set 'seconds'" not in str(error.value)
    with pytest.raises(PlanError, match=r"set 'seconds' in Anti-Drift Sampler to 2\.4\b"):
        run(model, initial=start_latent(frames=20), seconds=6.0)
    latent, _ = run(model, initial=start_latent(frames=20), seconds=2.4)
    assert latent["samples"].shape[2] == 19


def test_initial_latents_stand_for_the_history_too(model):
    history = start_latent(frames=12, seed=3)
    with pytest.raises(PlanError, match=r"at least 21 latent frames \(81 pictures\).*12 .*history"):
        run(model, initial=start_latent(frames=19), history=history, seconds=1.2)
    with pytest.raises(PlanError, match=r"set 'seconds' in Anti-Drift Sampler to 1\.2\b"):
        run(model, initial=start_latent(frames=29), history=history, seconds=2.4)
    latent, _ = run(model, initial=start_latent(frames=29), history=history, seconds=1.2)
    assert latent["samples"].shape[2] == 21


def test_fault_23_a_latent_off_the_grid_is_padded_and_said_with_the_nearest_pair(model):
    said = []
    latent, report = run(model, start=start_latent(height=7, width=9), seconds=1.2, say=said.append)
    assert latent["samples"].shape[-2:] == (7, 9)
    first_progress = next(i for i, text in enumerate(said) if text.startswith("section 1"))
    for text in (report, "\n".join(said[:first_progress])):
        assert "72x56" in text and re.search(r"Nearest valid: (80|64)x(64|48)", text) and "FramePack Image" in text
    assert "Nearest valid" not in run(model, seconds=1.2)[1]


def test_a_latent_that_is_no_video_names_the_node_it_was_given_to():
    picture = {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(PlanError, match="^'start' of Anti-Drift Sampler got"):
        latent_of("start", picture)
    with pytest.raises(PlanError, match="^'latent' of FramePack Sigmas got"):
        latent_of("latent", picture, "FramePack Sigmas")


def test_an_empty_latent_is_no_start_picture(model):
    """It would be sampled, and end as a grey nothing or in the wrong advice of the node that decodes it."""
    empty = {"samples": torch.zeros(1, 16, 1, 6, 10)}
    with pytest.raises(PlanError, match="'start' of 'Anti-Drift Sampler' is an empty latent.*'FramePack Image'"):
        run(model, start=empty)
    latent, _ = run(model, start=empty, history=start_latent(frames=19), seconds=2.4)  # it gives the size alone
    assert latent["samples"].shape[2] > 19
