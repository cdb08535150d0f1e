"""Skipped steps: against interpolation by the book, section by section, and core's EasyCache in the section loop."""

from __future__ import annotations

import csv
import gc
import re
import weakref

import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

from benchmarks import quality, record, resume
from benchmarks import step_cache as benchmark
from frame_memory.plan import PRESETS, parse_schedule
from frame_memory.sampling import step_cache
from frame_memory.sampling.attention_backend import AttentionBackend
from frame_memory.sampling.attention_check import TOKENS
from frame_memory.sampling.experts import WanExpertGuider
from frame_memory.sampling.identity import model_fields
from frame_memory.sampling.long_video import check_model
from frame_memory.sampling.step_cache import CacheReport, StepCache, choose_step_cache, two_caches, with_step_cache
from frame_memory.sampling.unipc import framepack_unipc

from .conftest import conditioning, guider_for, of_kind, run, start_latent
from .test_project import made_with, project
from .test_wan_run import A14B, RATE, T2V, TI2V
from .wan_runs import attached, made, prompt, reference

DRIFT = 0.1


def falling(steps: int = 12) -> torch.Tensor:
    """Noise levels so near one another that a network of random weights goes on nearly straight, ever less so."""
    return torch.cat([1 - 0.01 * torch.linspace(0, 1, steps) ** 2, torch.zeros(1)])


STEPS, SIGMAS = 12, falling()


def recorded(model):
    """A clone of a MODEL and the list of its evaluations: (sigma, x, x0, whether the network was asked)."""
    clone, log, asked = model.clone(), [], []

    def outside(executor, x, timestep, *rest):
        before = len(asked)
        out = executor(x, timestep, *rest)
        log.append((float(timestep[0]), x.double().clone(), out.double().clone(), len(asked) > before))
        return out

    def inside(executor, *args, **kwargs):
        asked.append(1)
        return executor(*args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", outside)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", inside)
    return clone, log


def through(points, sigma):
    """Lagrange's polynomial through (sigma, d) of any count."""
    total = torch.zeros_like(points[0][1])
    for s, d in points:
        weight = 1.0
        for other, _ in points:
            weight *= (sigma - other) / (s - other) if other != s else 1.0
        total += weight * d
    return total


def rms(x):
    return x.square().mean(dim=(1, 2, 3, 4)).sqrt()


def by_the_book(log, last, drift):
    """Which evaluations a cache may skip: those where a parabola through three points bends off the line by little."""
    points, skipped = [], []
    for sigma, x, x0, _ in log:
        if points and sigma == points[-1][0]:
            points.pop()
        if points and sigma > points[-1][0]:
            points = []
        skip = False
        if len(points) >= 3 and sigma > last:
            line = through(points[-2:], sigma)
            skip = bool((rms(through(points[-3:], sigma) - line) <= drift * rms(points[-1][1])).all())
        skipped.append(skip)
        if skip:
            assert torch.allclose(x0, x - sigma * line, atol=1e-3, rtol=1e-3)
        else:
            points.append((sigma, (x - x0) / sigma))
    return skipped


@pytest.mark.parametrize(
    ("sampler", "dtype"),
    [("framepack", torch.float32), ("framepack", torch.bfloat16), ("heun", torch.float32),
     ("euler_ancestral", torch.float32), ("dpmpp_2m_cfg_pp", torch.float32)],
)  # fmt: skip
def test_a_step_is_skipped_where_a_parabola_stays_near_the_line(model, sampler, dtype):
    """Two prompts under CFG, a batch of two, an odd size, two sections."""
    model.set_model_compute_dtype(dtype)
    network, log = recorded(of_kind(model, "F1"))
    chosen = framepack_unipc() if sampler == "framepack" else comfy.samplers.sampler_object(sampler)
    guider = guider_for(with_step_cache(network, DRIFT), conditioning(1), conditioning(5), cfg=3.0)
    start = start_latent(2, height=7, width=9)
    _, report = run(model, guider=guider, start=start, seconds=2.4, sampler=chosen, sigmas=SIGMAS)
    count = len(log) // 2
    for section in range(2):
        part = log[section * count : (section + 1) * count]
        asked = [called for *_, called in part]
        plus = sampler.endswith("_cfg_pp")  # reads the prompts apart, so every evaluation is made
        assert [not called for called in asked] == by_the_book(part, 1.0 if plus else float(SIGMAS[-2]), DRIFT)
        assert all(asked[:3]) and asked[-1]
    made = sum(called for *_, called in log)
    assert made < len(log) or plus or sampler == "euler_ancestral", "nothing was skipped"
    less = f"{len(log) / made:.2f} times fewer" if made < len(log) else "none was skipped: too few steps,"
    assert f"Section Step Cache, drift 0.1: {made} of {len(log)} evaluations were made, {less}" in report
    assert ("a sampler whose name ends in _cfg_pp" in report) == plus


def cached_run(model, drift=DRIFT, measure=False, **more):
    return run(with_step_cache(of_kind(model, "F1"), drift, measure), kind=None, **{"sigmas": SIGMAS, **more})


def test_nothing_allowed_changes_nothing_and_measuring_changes_nothing(model):
    exact, plain_report = run(of_kind(model, "F1"), kind=None, sigmas=SIGMAS)
    none, report = cached_run(model, 0.0)
    assert torch.equal(none["samples"], exact["samples"]) and "Step Cache" not in report
    taken_away = with_step_cache(with_step_cache(of_kind(model, "F1"), DRIFT, measure=True), 0.0)
    assert not taken_away.wrappers.get(WrappersMP.OUTER_SAMPLE)
    without, with_it = (model_fields(found)["model options"] for found in (of_kind(model, "F1"), taken_away))
    assert without == with_it, "the same video, so sections of either are found by the other"
    latent, _ = cached_run(model)
    measured, report = cached_run(model, measure=True)
    assert torch.equal(latent["samples"], measured["samples"])
    assert not torch.equal(latent["samples"], exact["samples"])
    near = distance(latent, exact)
    assert f"Section 1 with and without Section Step Cache: PSNR {near:.1f} dB of its latents." in report
    assert "Step Cache" not in plain_report and "Warning: Section Step Cache" not in report


def distance(latent, exact) -> float:
    """PSNR of the first section, dB; the peak is the range of the exact one's numbers."""
    a, b = (found["samples"][:, :, 1:10].double() for found in (latent, exact))
    return float(10 * torch.log10((b.max() - b.min()) ** 2 / (a - b).square().mean()))


@pytest.mark.parametrize(("node", "drift"), [(EasyCacheNode, DRIFT), (LazyCacheNode, DRIFT), (LazyCacheNode, 1e-9)])
def test_two_caches_are_told_and_measured_against_none(model, node, drift):
    """Also where the second one has left nothing to skip for the first."""
    exact, _ = run(of_kind(model, "F1"), kind=None, sigmas=SIGMAS)
    network = node.execute(of_kind(model, "F1"), 0.3, 0.0, 1.0, False).result[0]
    other, alone = run(network, kind=None, sigmas=SIGMAS)
    assert not torch.equal(other["samples"], exact["samples"]) and "Warning" not in alone
    both = with_step_cache(network, drift, measure=True)
    latent, report = run(both, kind=None, sigmas=SIGMAS)
    name = node.define_schema().display_name
    said = f"Section 1 with and without Section Step Cache and {name}: PSNR {distance(latent, exact):.1f} dB"
    assert said in report
    assert f"evaluations were made (what {name} skips is not counted), " in report
    assert report.count(f"Warning: {name} is on the MODEL beside Section Step Cache.") == 1
    assert f"take the node '{name}' out" in report
    unmeasured, _ = run(with_step_cache(network, drift), kind=None, sigmas=SIGMAS)
    assert torch.equal(latent["samples"], unmeasured["samples"])


def test_of_two_experts_the_one_with_two_caches_is_named():
    plain, lazy = (attached(A14B, seed=seed) for seed in (0, 1))
    lazy = LazyCacheNode.execute(lazy, 0.3, 0.0, 1.0, False).result[0]
    (said,) = two_caches(WanExpertGuider(plain, with_step_cache(lazy, DRIFT), 2.0, 3.0, 0.997))
    assert said.startswith("LazyCache is on the low noise MODEL beside Section Step Cache.")
    assert not two_caches(WanExpertGuider(with_step_cache(plain, DRIFT), lazy, 2.0, 3.0, 0.997))


@pytest.mark.parametrize(("first", "then"), [(0.1, 0.3), (0.1, 0.1), (0.1, 0.0), (0.0, 0.3)])
def test_of_two_in_a_row_the_last_one_says_that_it_counts(model, first, then):
    before, plain = choose_step_cache(of_kind(model, "F1"), first)
    assert "another" not in plain
    after, said = choose_step_cache(before, then)
    assert ("another 'Section Step Cache' before this one had given the MODEL drift 0.1." in said) == bool(first)
    assert ("its drift of 0 switches the first off" in said) == (not then)
    _, report = run(after, kind=None, seconds=1.2, sigmas=SIGMAS)
    assert (f"Section Step Cache, drift {then:g}: " in report) == bool(then)


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 4), ("lcm", 8)])
def test_what_skips_nothing_says_so_and_is_not_made_twice(model, tmp_path, sampler, steps):
    network, log = recorded(of_kind(model, "F1"))
    network = with_step_cache(network, DRIFT, measure=True)
    chosen = comfy.samplers.sampler_object(sampler)
    _, report = run(network, kind=None, sampler=chosen, sigmas=falling(steps))
    assert len(log) == 2 * steps
    lines = [line for line in report.splitlines() if "Step Cache" in line]
    assert len(lines) == 1 and f"{2 * steps} of {2 * steps} evaluations were made, none was skipped: " in lines[0]
    assert "too few steps" in lines[0] and ("a sampler that adds noise" in lines[0]) == (sampler == "lcm")


def test_the_first_section_with_anything_skipped_is_measured(model):
    report = CacheReport(guider := guider_for(with_step_cache(of_kind(model, "F1"), DRIFT, measure=True)))
    made, asked = torch.rand(1, 16, 9, 6, 10), []
    for number, evaluations in enumerate((5, 4, 3), start=1):
        report._count(evaluations, 5, 2)
        assert not report.measure(number, made, guider, lambda _: asked.append(1) or made)
    assert len(asked) == 1 and report.lines()[0] == "Section 2 with and without Section Step Cache: the same."


def test_an_artist_is_told_where_the_picture_changes(model, monkeypatch):
    monkeypatch.setattr(step_cache, "NEAR", 99.0)  # weights by chance are never as far off as 26 dB
    _, report = cached_run(model, measure=True)
    near = report.split("PSNR ")[1].split(" dB")[0]
    assert f"Warning: Section Step Cache changes the picture: {near} dB in section 1, expected 99 or more." in report


def test_a_section_that_was_made_again_is_measured_as_it_was_made(model):
    """An attention that breaks, but not in the test before a run: with plain attention both are made."""

    def breaks(func, q, *args, **kwargs):
        out = func(q, *args, **kwargs)
        return out if TOKENS in q.shape else out * float("nan")

    network = with_step_cache(of_kind(model, "F1"), DRIFT, measure=True)
    network.model_options["transformer_options"]["optimized_attention_override"] = breaks
    _, report = run(network, kind=None, seconds=1.2, sigmas=SIGMAS)
    assert "it was made again with plain PyTorch attention" in report
    assert "PSNR nan" not in report and "changes the picture" not in report
    assert re.search(r"Section 1 with and without Section Step Cache: PSNR \d+\.\d dB", report)


def test_what_is_broken_without_a_cache_gives_no_advice(model):
    guider = guider_for(with_step_cache(of_kind(model, "F1"), DRIFT, measure=True))
    made = torch.zeros(1, 16, 9, 6, 10)
    (said,) = CacheReport(guider).measure(1, made, guider, lambda _: made * float("nan"))
    assert "made without it, it holds NaN or infinite values" in said and "Halve" not in said


@pytest.mark.parametrize("stop", [False, True])
def test_what_fails_in_measuring_costs_no_video_but_cancel_is_heard(model, stop):
    expected, _ = cached_run(model)
    trouble = InterruptProcessingException() if stop else RuntimeError("too little memory.")
    network, calls = with_step_cache(of_kind(model, "F1"), DRIFT, measure=True), []

    def watch(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise trouble
        return executor(*args, **kwargs)

    network.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "test", watch)
    if stop:
        with pytest.raises(InterruptProcessingException):
            run(network, kind=None, sigmas=SIGMAS)
        return
    latent, report = run(network, kind=None, sigmas=SIGMAS)
    assert torch.equal(latent["samples"], expected["samples"])
    assert "Step Cache could not measure section 1: too little memory. The video is not affected." in report


def test_a_resumed_video_is_the_uninterrupted_one_and_other_settings_are_another_video(model, tmp_path):
    network = with_step_cache(of_kind(model, "F1"), DRIFT)
    more = {"kind": None, "seconds": 3.6, "sigmas": SIGMAS}
    expected, _ = run(network, **more)
    made_with(network, tmp_path, fail_at=2, error=RuntimeError("the machine broke"), **more)
    done, count = made_with(network, tmp_path, **more)
    assert count == 2 and torch.equal(done.latent["samples"], expected["samples"])
    measuring = with_step_cache(network, DRIFT, measure=True)
    again, count = made_with(measuring, tmp_path, **more)
    assert count == 0, "measuring is no other video"
    assert "Section Step Cache: not measured, all sections were there. Take another seed for that." in again.report
    elsewhere, count = made_with(measuring, tmp_path, project=project(tmp_path, "elsewhere"), **more)
    assert count == 0 and "not measured" in elsewhere.report, "another project finds them too"
    assert "measured" not in made_with(network, tmp_path, **more)[0].report
    fresh, _ = made_with(measuring, tmp_path, seed=8, **more)
    after = fresh.report.split("\nFinished: ")[1].splitlines()[1]
    assert after.startswith("Section 1 with and without Section Step Cache: PSNR ")
    other, count = made_with(with_step_cache(network, 0.0), tmp_path, **more)
    assert "step cache: was '0.1', now not given" in other.report and "model options:" not in other.report
    assert "All 3 sections were made now: none could be reused after the change." in other.report and count == 3
    assert not torch.equal(other.latent["samples"], expected["samples"])


def test_a_project_says_in_words_what_makes_it_fast(model):
    network = with_step_cache(of_kind(model, "F1"), DRIFT)
    override = AttentionBackend("xformers", "xformers", 128, torch.float32, "cpu")
    network.model_options["transformer_options"]["optimized_attention_override"] = override
    assert model_fields(network)["model options"].startswith("step cache 0.1, attention xformers (")


def test_nothing_is_held_after_a_run(model):
    network, alive = with_step_cache(of_kind(model, "F1"), DRIFT), []

    def watch(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        alive.append(weakref.ref(out))
        return out

    network.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", watch)
    guider = guider_for(network)
    before = dict(guider.model_options["transformer_options"])
    run(model, guider=guider, sigmas=SIGMAS)
    gc.collect()
    assert alive and not any(ref() is not None for ref in alive)
    assert not any(type(thing) is StepCache for thing in gc.get_objects())
    assert guider.model_options["transformer_options"] == before


def test_a_prompt_that_takes_turns_begins_anew(model):
    network, log = recorded(of_kind(model, "F1"))
    first, then = conditioning(1)[0], conditioning(5)[0]
    turns = [[first[0], {**first[1], "end_percent": 0.02}], [then[0], {**then[1], "start_percent": 0.02}]]
    run(model, guider=guider_for(with_step_cache(network, 0.5), turns), seconds=1.2, sigmas=falling(2 * STEPS))
    turn = network.get_model_object("model_sampling").percent_to_sigma(0.02)
    after = [called for sigma, *_, called in log if sigma <= turn]
    assert len(after) < len(log) and all(after[:3]) and not all(after)


def test_each_of_two_experts_has_its_own():
    experts = [with_step_cache(attached(A14B, seed=seed), 0.2) for seed in (0, 1)]
    logs, networks = [], []
    for expert in experts:
        network, log = recorded(expert)
        networks.append(network)
        logs.append(log)
    guider = WanExpertGuider(*networks, 2.0, 3.0, 0.997)
    guider.set_conds(prompt(3), prompt(4))
    sigmas, noise = falling(2 * STEPS), reference.drawn(1, 16, 2, 4, 6)
    common = {"sampler": comfy.samplers.sampler_object("euler"), "disable_pbar": True, "seed": 0}
    with torch.inference_mode():
        both = guider.sample(noise, torch.zeros_like(noise), sigmas=sigmas, **common)
        asked = [[called for *_, called in log] for log in logs]
        cut = int((sigmas[:-1] >= 0.997).sum())
        high, low = (
            guider_for(network, prompt(3), prompt(4), cfg=cfg)
            for network, cfg in zip(networks, (2.0, 3.0), strict=True)
        )
        half = high.sample(noise, torch.zeros_like(noise), sigmas=sigmas[: cut + 1], **common)
        alone = low.sample(torch.zeros_like(noise), half, sigmas=sigmas[cut:], **common)
    assert torch.equal(both, alone)
    assert [len(found) for found in asked] == [cut, 2 * STEPS - cut]
    assert all(all(found[:3]) and found[-1] and not all(found) for found in asked)


@pytest.mark.parametrize("low", [False, True])
def test_of_one_expert_with_a_cache_the_report_says_which(low):
    experts = [attached(A14B, seed=seed) for seed in (0, 1)]
    experts[low] = with_step_cache(experts[low], 0.2)
    guider = WanExpertGuider(*experts, 2.0, 3.0, 0.997)
    guider.set_conds(prompt(3), prompt(4))
    noise, report = reference.drawn(1, 16, 1, 4, 6), CacheReport(guider)
    euler = comfy.samplers.sampler_object("euler")
    sigmas = falling(4)
    with torch.inference_mode():
        report.counting(guider).sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
    count = int(((sigmas[:-1] < 0.997) if low else (sigmas[:-1] >= 0.997)).sum())
    whose = "low" if low else "high"
    (line,) = report.lines()
    said = f", drift 0.2: {count} of {count} evaluations of the {whose} noise expert were made, none was skipped"
    assert said in line and 0 < count < 4


def check_cores_formula(log):
    """A step that EasyCache skips gives its input and what the last made one added to its own; in its own section."""
    kept, skipped = None, 0
    for index, (sigma, x, x0, called) in enumerate(log):
        v = (x - x0) / sigma
        if called or index == STEPS:
            assert called, "the first step of a section is always made"
            kept = v - x
        else:
            skipped += 1
            assert torch.allclose(v, x + kept, atol=1e-3, rtol=1e-3)
    assert skipped


def test_cores_easycache_keeps_to_its_section(model, tmp_path):
    """Its own formula, the last output less its input, in fp32 too; sections made anew one by one are the same."""
    network, log = recorded(of_kind(model, "F1"))
    # The recorder of calls has to stand inside of it.
    calls = network.wrappers[WrappersMP.DIFFUSION_MODEL].pop("test")
    network = EasyCacheNode.execute(network, 0.3, 0.0, 1.0, False).result[0]
    network.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", calls[0])
    more = {"kind": None, "seconds": 2.4, "sigmas": SIGMAS}
    expected, _ = run(network, **more)
    check_cores_formula(log)
    made_with(network, tmp_path, fail_at=2, error=RuntimeError("the machine broke"), **more)
    done, count = made_with(network, tmp_path, **more)
    assert count == 1 and torch.equal(done.latent["samples"], expected["samples"])
    other = run(network, kind=None, seconds=1.2, sigmas=SIGMAS, start=start_latent(2, height=7, width=9))[0]
    assert torch.isfinite(other["samples"]).all()
    changed = EasyCacheNode.execute(of_kind(model, "F1"), 0.2, 0.0, 1.0, False).result[0]
    assert made_with(changed, tmp_path, project=project(tmp_path), **more)[1] == 2


@pytest.mark.parametrize("family", [T2V, A14B, TI2V])
def test_cores_easycache_keeps_to_its_section_on_wan(family, tmp_path):
    """History, two prompts under CFG and, of an image-to-video model, channels that are not the noise's."""
    network, log = recorded(attached(family))
    calls = network.wrappers[WrappersMP.DIFFUSION_MODEL].pop("test")
    network = EasyCacheNode.execute(network, 0.1, 0.0, 1.0, False).result[0]
    network.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", calls[0])
    written = []

    def untouched(executor, x, *args, **kwargs):
        before = x.clone()
        out = executor(x, *args, **kwargs)
        written.append(not torch.equal(before, x))
        return out

    network.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", untouched)
    section = 8 / RATE[family]
    exact, _ = made(attached(family), family, seconds=2 * section, sigmas=SIGMAS)
    cached, _ = made(network, family, seconds=2 * section, sigmas=SIGMAS)
    assert len(log) == 2 * STEPS and written and not any(written)
    check_cores_formula(log)
    off = (cached["samples"] - exact["samples"]).norm() / exact["samples"].norm()
    assert 0 < off < 1e-3  # at least 2.7e-3 where T2V's or TI2V's input is written into
    folder = {"project": project(tmp_path), "sigmas": SIGMAS}
    made(network, family, seconds=section, **folder)
    alone = made(network, family, seconds=2 * section, **folder)
    assert "1 of 2 sections were finished before" in alone.report
    assert torch.equal(alone.latent["samples"], cached["samples"])


@pytest.mark.parametrize("family", [T2V, A14B])
def test_wan_sections_skip_by_the_same_book(family):
    network, log = recorded(attached(family))
    _, report = made(with_step_cache(network, DRIFT), family, sigmas=SIGMAS)
    for section in range(2):
        part = log[section * STEPS : (section + 1) * STEPS]
        asked = [called for *_, called in part]
        assert [not called for called in asked] == by_the_book(part, float(SIGMAS[-2]), DRIFT)
        assert all(asked[:3]) and asked[-1] and not all(asked)
    assert f"{sum(called for *_, called in log)} of {2 * STEPS} evaluations were made" in report


# ---- the benchmark -------------------------------------------------------------------------------------------------


def test_the_benchmarks_seconds_are_named_by_their_clock():
    made = [benchmark.Made(torch.zeros(1), torch.zeros(1), 1, wall, busy) for wall, busy in ((1, 20), (3, 40), (2, 30))]
    assert benchmark.seconds_of(made, "cuda") == ("seconds a section", 2)
    assert benchmark.seconds_of(made, "cpu") == ("processor seconds a section", 30)


@pytest.mark.parametrize(
    ("fewer", "lowest", "code"),
    [(2.2, 26.0, 0), (2.19, 40.0, 1), (9.0, 25.9, 1), (9.0, float("nan"), 1), (1.0, float("inf"), 1)],
)
def test_the_benchmark_fails_where_its_goal_is_missed(fewer, lowest, code, monkeypatch, capsys):
    """The default's goal at 25 steps, and at no other count or setting."""

    def told(kind, steps, seeds, seconds):
        poor = {benchmark.FEWER_EVALUATIONS: 1.0, benchmark.LOWEST: 1.0}
        yield "drift 0.05", poor
        default = {benchmark.FEWER_EVALUATIONS: fewer, benchmark.LOWEST: lowest}
        yield f"drift {step_cache.DRIFT:g}", default if steps == benchmark.GOAL_STEPS else poor

    monkeypatch.setattr(benchmark, "measure", told)
    assert benchmark.main(["--kinds", "F1"]) == code
    verdicts = [line for line in capsys.readouterr().out.splitlines() if line.endswith((" passed |", " FAILED |"))]
    assert len(verdicts) == 2 and all("25 steps" in line for line in verdicts)
    assert ("FAILED" in "".join(verdicts)) == bool(code)


def test_the_benchmark_alone_gives_the_figures_that_are_on_record():
    with record.RESULTS.open(encoding="utf-8", newline="") as file:
        commands = {row["command"] for row in csv.DictReader(file)}
    args = benchmark.parse([])
    assert f"benchmarks.step_cache --seeds {args.seeds} --seconds {args.seconds:g}" in commands


def test_benchmarks_say_which_kind_they_load(tmp_path):
    for kind, schedule in (("F1", "F1 forward"), ("F0", "F0 inverted")):
        assert not check_model(guider_for(quality.load(kind)[0]), parse_schedule(PRESETS[schedule]))
    assert not check_model(guider_for(resume.tiny_model(tmp_path)), parse_schedule(PRESETS["F1 forward"]))
