"""The claims harness: what stage 2 needs, videos of many scenes at once, and the tables from rows on disk."""

import dataclasses
import json
import math

import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.utils
import numpy as np
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

from benchmarks import claims, claims_rows, stage_two
from benchmarks.claims_videos import GIVEN, LONG_MEASURES, Packed, Preserved, Sampling, generate
from benchmarks.long_clips import FRAMES_A_LATENT, latents_of
from benchmarks.long_world import away, random_long_scene, visit, wholly_there
from benchmarks.quality import FILES, MODELS
from benchmarks.train_selftest import TOPOLOGY
from frame_memory.forcing.clips import TrainingVideo
from frame_memory.forcing.draws import DIRECT, Recipe, draw_video
from frame_memory.forcing.flow import Conditioning
from frame_memory.forcing.forcings import LOSSES, Forced
from frame_memory.forcing.stages import ALL, HEAD_PART, Trained
from frame_memory.model import framepack, memory, tensor_file
from frame_memory.model.preserved_memory import attach_preserved, new_memory, with_tokens
from frame_memory.model.selftest import text_features, vision_features
from frame_memory.model.semantic_pack import PackSpec, SemanticPack, initialise, open_gate
from frame_memory.model.transformer import FramePackTransformer
from frame_memory.plan import PRESETS, parse_schedule, plan_sections, sigma_schedule
from frame_memory.sampling.long_video import sample_long_video
from frame_memory.sampling.unipc import framepack_unipc

TINY = {**TOPOLOGY, "depth_single_blocks": 1}
F0, F1 = PRESETS["F0 inverted"], PRESETS["F1 forward"]
PAPER = claims.CLAIMS["memorypack"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = FramePackTransformer(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False).eval()


def conditioning():
    text, pooled = text_features("a visitor comes in from the left")
    return Conditioning(text, pooled, vision_features(torch.rand(1, 64, 64, 3)))


def test_the_heads_graph_is_as_small_as_calculated(network):
    """What autograd really keeps of a step of stage 2, tensor by tensor, at a small size."""
    height, width = 8, 12
    trained = Trained(network, None, (HEAD_PART,))
    video = TrainingVideo(torch.randn(1, 16, 10, height, width), conditioning(), "")
    draw = draw_video(video, 1, Recipe(DIRECT), torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}
    learned = {p.data_ptr() for p in trained.parameters.values()}

    def keep(tensor):
        if tensor.data_ptr() not in learned:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with trained.ready(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (clip,) = LOSSES[DIRECT](trained.forced, video, draw, Recipe(DIRECT))
    assert clip.loss.requires_grad
    tokens, hidden, out = 9 * 4 * 6, 128, 64
    least = tokens * hidden * 4  # the matrix must know its input
    most = stage_two.graph_bytes(tokens, hidden, out, itemsize=4)
    assert least < sum(kept.values()) < most, (sum(kept.values()), most)


def test_stage_two_at_full_size_is_within_a_tenth_of_inference():
    model = stage_two.network()
    head = [model.get_parameter(name).numel() for name in stage_two.HEAD]
    assert sum(head) == 18_880_512 + 196_672  # reference/memorypack.md section 3.2
    for size in (2.0, 1.0):
        needs = stage_two.needs(size)
        assert 12e9 * size < needs.weights < 14e9 * size
        assert needs.learning == 22 * sum(head)
        assert 1 < needs.ratio < needs.hardest_ratio < stage_two.BOUND


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stage_two_on_a_gpu_takes_what_inference_takes():
    assert (
        stage_two.run_on_gpu(depth=2, depth_single_blocks=4)["ratio"] < 1.6
    )  # the weights are a tenth of the true ones


@pytest.fixture(scope="module")
def patcher(network):
    """The same network as a MODEL."""
    framepack.register()
    config = framepack.FramePackConfig(dict(TINY))
    config.set_inference_dtype(torch.float32, None)
    base = framepack.FramePack(config)
    base.diffusion_model.load_state_dict(network.state_dict())
    patcher = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    patcher.model_options[framepack.MODEL_OPTION] = {"kind": "F1", "base": "selftest"}
    return patcher


def semantic(network, patcher, cond):
    """A SemanticPack with an open gate, beside the MODEL that it is attached to and what the sampler is given."""
    spec = PackSpec.of(network)
    pack = initialise(SemanticPack(spec, operations=torch.nn), network).requires_grad_(False)
    for p in pack.parameters():
        p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    pack.gate.fill_(0.4)
    kept = memory.encoder_from_tensors(pack.state_dict(), spec, label="test")
    kept = kept.with_features(cond.text, cond.vision)
    return Packed(network, pack, cond), memory.attach(patcher, kept), kept


def preserved(network, patcher, cond):
    """The same of frame preservation."""
    kept = new_memory(patcher, "2x2x2", channels=(4, 6, 8, 8), heads=2)
    with torch.no_grad():
        for p in kept.history.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    kept = with_tokens(kept, 1000)
    return Preserved(Forced(network, kept.history), cond), attach_preserved(patcher, kept), kept


@pytest.mark.parametrize("remembers", [None, semantic, preserved], ids=["plain", "MemoryPack", "frame preservation"])
def test_videos_of_many_scenes_are_those_of_the_packs_own_section_loop(network, patcher, remembers):
    """The same network, memory, plan, sampler and noise through ComfyUI's guider and the pack's section loop."""
    base, kept = patcher.model, None
    cond, start = conditioning(), torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    shown = Packed(network, None, cond)
    if remembers:
        shown, patcher, kept = remembers(network, patcher, cond)
    vision = type("Output", (), {"last_hidden_state": cond.vision})()
    guider = comfy.samplers.CFGGuider(patcher)
    positive = [[cond.text, {"pooled_output": cond.pooled, "clip_vision_output": vision}]]
    guider.set_conds(positive, positive)
    with torch.inference_mode():
        done = sample_long_video(
            noise=Noise_RandomNoise(7), guider=guider, sampler=framepack_unipc(),
            sigmas=torch.tensor(sigma_schedule(3, 4.0)), schedule=parse_schedule(F1),
            start={"samples": base.process_latent_out(start)}, seconds=2.4, memory=kept,
            say=lambda _: None,
        )  # fmt: skip
        loop = base.process_latent_in(done.latent["samples"])

    def ours(given):
        fresh = remembers(network, patcher, cond)[0] if remembers else shown
        return generate(fresh, given, F1, 2, Sampling(3, 4.0), seed=7)

    made = ours(start)
    assert made.shape == loop.shape and (made - loop).abs().max() < 1e-4 * loop.abs().max()
    assert torch.equal(ours(made[:, :, :10]), made)
    if remembers:
        plain = generate(Packed(network, None, cond), start, F1, 2, Sampling(3, 4.0), seed=7)
        assert torch.equal(plain[:, :, :10], made[:, :, :10]) and (plain - made).abs().max() > 2e-3


def test_a_given_first_visit_is_folded_into_the_memory_and_F0_sees_nothing_of_it(network):
    cond, true = conditioning(), torch.randn(1, 16, 10, 8, 8, generator=torch.Generator().manual_seed(6))
    other = torch.cat([true[:, :, :1], -true[:, :, 1:]], dim=2)
    pack = initialise(SemanticPack(PackSpec.of(network), operations=torch.nn), network).requires_grad_(False)
    open_gate(pack)

    def psi_seen(given):
        """What the memory's tokens are worth: a video whose window sees the same, behind another first section."""
        three = torch.cat([given, true[:, :, 1:], true[:, :, 1:], true[:, :, 1:4]], dim=2)
        return generate(Packed(network, pack, cond), three, F1, 4, Sampling(1, 4.0), seed=1)[:, :, 28:]

    assert (psi_seen(true) - psi_seen(other)).abs().max() > 1e-4
    plain = Packed(network, None, cond)
    inverted = [generate(plain, given, F0, 3, Sampling(1, 4.0), seed=1) for given in (true, other)]
    assert torch.equal(inverted[0][:, :, 10:], inverted[1][:, :, 10:])
    assert torch.equal(inverted[1][:, :, :10], other)


def test_the_first_visit_is_over_where_the_given_frames_end():
    for scene in (random_long_scene(np.random.default_rng(i), shown=False, named=False) for i in range(20)):
        frames, given = np.arange(240), 1 + FRAMES_A_LATENT * GIVEN
        assert wholly_there(scene, frames[:given]).sum() > 40 and not wholly_there(scene, frames[given:]).any()
        assert away(scene, frames[given + FRAMES_A_LATENT :]).all() and not visit(scene, frames).any()


def test_one_turn_of_a_scene_makes_a_video_of_any_length():
    turn = torch.arange(61.0).reshape(1, 61, 1, 1)
    assert latents_of(turn, 4).flatten().tolist() == [0, 1, 2, 3]
    assert latents_of(turn, 123).flatten().tolist()[59:63] == [59, 60, 1, 2]
    assert latents_of(turn, 123)[0, -1, 0, 0] == 2


def test_intervals_are_students():
    mean, half = claims.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 * 1.0 / math.sqrt(3), rel=1e-5)  # tables: t(0.975, 2)
    assert claims.interval([math.nan, 4.0])[0] == 4 and math.isnan(claims.interval([4.0])[1])
    assert math.isnan(claims.interval([])[0])


def test_rows_are_kept_marked_where_missing_and_refused_with_other_settings(tmp_path):
    args = claims.parse(["memorypack", "--work", str(tmp_path), "--seeds", "0", "1", "--seconds", "10"])
    f1, budget = claims_rows.VARIANTS["F1"], claims_rows.Budget()
    identity = claims.identity_of(PAPER, f1, budget, args)
    figures = dict.fromkeys(LONG_MEASURES, 0.5) | {"recall": math.nan}
    for seed, value in ((0, 0.25), (1, 0.75)):
        path = claims.row_path(tmp_path, f1, seed)
        claims.write_row(path, identity, {"10": {**figures, "presence": value}})
    assert json.loads(path.read_text(encoding="utf-8"))["figures"]["10"]["recall"] is None
    lines, recorded = claims.tables(PAPER, args, budget)
    (row,) = [line for line in lines if line.startswith("| F1 |")]
    assert row.startswith("| F1 | 2 of 2 | – | 50% ± 0% | 50% ± 0% | 50% ± 318% |")  # 12.706 * 0.354 / sqrt(2)
    assert any(line.startswith("| Squeeze B | 0 of 2 | missing |") for line in lines)
    assert ("F1, 10 s", "seeds", 2) in recorded and ("F1, 10 s", "presence", 0.5) in recorded
    assert not any(case.startswith("Squeeze") for case, _, _ in recorded)
    with pytest.raises(SystemExit, match="other settings .sample_steps."):
        claims.read_row(path, {**identity, "sample_steps": 3})
    neither = claims_rows.Budget(steps=2, head_steps=1)  # F1's row trains neither stage
    assert claims.identity_of(PAPER, f1, neither, args) == identity


def test_weights_of_another_budget_are_not_taken_for_these(tmp_path):
    """A trial with few steps in the same folder must not become the base of the real table."""
    few = claims_rows.Budget(steps=2, base_steps=2)
    identity = {"base": "F1", **few.until(0)}
    tensor_file.write(
        str(tmp_path / "base-F1.safetensors"), {"model.x": torch.zeros(1)}, {"identity": json.dumps(identity)}
    )
    for same in (few, dataclasses.replace(few, steps=3, head_steps=7)):
        assert set(claims_rows.MemoryPackWorkshop(tmp_path, None, same).base("F1")) == {"model.x"}
    with pytest.raises(SystemExit, match="other settings .base_steps..*another --work"):
        claims_rows.MemoryPackWorkshop(tmp_path, None, dataclasses.replace(few, base_steps=3)).base("F1")


def test_the_shipped_F1_is_the_base_of_the_default_settings_and_of_no_others(tmp_path):
    shop = claims_rows.MemoryPackWorkshop(tmp_path, None, claims_rows.Budget())
    base = {name.removeprefix("model."): value for name, value in shop.base("F1").items()}
    assert not list(tmp_path.iterdir())
    check_ships(base, "F1")
    other = claims_rows.Budget(base_steps=3)
    assert claims_rows.shipped_training("F1") != {"base": "F1", **other.until(0)}
    assert claims_rows.shipped_training("F0") is None


def test_a_base_begins_from_F0_as_it_ships_in_fp8():
    check_ships(claims_rows.fresh("F0").state_dict(), "F0")


def check_ships(weights: dict[str, torch.Tensor], kind: str) -> None:
    """The numbers of the file in core's scaled fp8, and no others."""
    shipped = comfy.utils.load_torch_file(str(MODELS / "diffusion_models" / FILES[kind]))
    scaled = [name for name in weights if f"{name.removesuffix('weight')}weight_scale" in shipped]
    assert len(scaled) > 20 and len(shipped) == len(weights) + 2 * len(scaled)
    for name, value in weights.items():
        want = shipped[name].float()
        if name in scaled:
            want = want * shipped[f"{name.removesuffix('weight')}weight_scale"].float()
        torch.testing.assert_close(value, want, rtol=1e-2, atol=1e-6)


def test_a_command_without_settings_trains_as_the_budget_says():
    assert claims.budget_of(claims.parse(["memorypack"])) == claims_rows.Budget()
    few = claims.budget_of(claims.parse(["memorypack", "--steps", "7", "--clips", "3"]))
    assert few == claims_rows.Budget(steps=7, clips=3)


def test_what_each_leg_depends_on():
    """Every setting counts from the leg on that first uses it."""
    budget = claims_rows.Budget()
    base, first, second = (set(budget.until(leg)) for leg in range(3))
    assert base < first < second == {"world", *dataclasses.asdict(budget)}
    assert {"base_steps", "batch", "returns"} < base
    assert first - base == {"steps", "counted", "unroll"}


def test_the_visitor_comes_back_in_the_sections_that_training_prefers():
    """By hand: it comes at frames 240, 480, 720 and so on, and section n of F1 shows frames 36 n + 1 to 36 n + 36."""
    for count, expected in ((40, [6, 13, 20, 26, 33]), (6, [])):
        sections = plan_sections(PRESETS["F1 forward"], sections=count).sections
        assert [section.index for section in claims_rows.returns_in(sections)] == expected


def test_the_second_half_of_a_base_is_on_the_self_test_models_own_videos_too(network):
    """By the set that is empty: to draw of it is an error."""
    rng = np.random.default_rng(0)
    picture, caption = rng.random((1, 64, 64, 3)), ["a visitor comes in from the left"]
    long = claims_rows.LongClips(rng.standard_normal((1, 16, 61, 8, 8)), picture, caption)
    short = claims_rows.ClipSet(rng.standard_normal((1, 16, 73, 8, 8)), picture, caption)
    no_long, no_short = (dataclasses.replace(clips, captions=[]) for clips in (long, short))
    budget = claims_rows.Budget(base_steps=10, batch=1, sections=3, short_from=0.5, short=1.0)
    trained = Trained(network, None, (ALL,))

    def loss(long, short, step):
        losses = claims_rows.base_losses(trained, long, short, "F1", budget, "cpu")
        (value, share), = losses(step)(torch.Generator().manual_seed(step))  # fmt: skip
        return float(value.detach()) * share

    with trained.ready():
        assert loss(long, no_short, 4) > 0 and loss(no_long, short, 5) > 0
        for clips, step in (((no_long, short), 4), ((long, no_short), 5)):
            with pytest.raises(RuntimeError, match="random_ expects 'from' to be less than 'to'"):
                loss(*clips, step)


def test_every_row_of_the_papers_tables_is_one_of_ours_and_goes_on_from_its_like():
    assert set(claims_rows.VARIANTS) == {name for table in claims_rows.TABLES.values() for name in table}
    for variant in claims_rows.VARIANTS.values():
        before = claims_rows.VARIANTS.get(variant.after)
        assert before is None or (before.memory == variant.memory and before.leg == variant.leg - 1)
        assert (before is not None) == (variant.leg == claims_rows.STAGE_2)
        assert (ALL in variant.parts) == (variant.name == "F1 tuned")


def test_a_call_that_runs_out_of_time_stops_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(claims, "codec_of", lambda folder: None)
    monkeypatch.setattr(claims.LongClips, "make", classmethod(lambda cls, *a, **k: cls(np.zeros(0), np.zeros(0), [])))
    claims.main(["memorypack", "--work", str(tmp_path), "--minutes", "0", "--only", "F1", "--toy"])
    out = capsys.readouterr().out
    assert "minutes are over" in out and "| F1 | 0 of 1 | missing" in out
    assert [p.name for p in tmp_path.rglob("*.json")] == []
