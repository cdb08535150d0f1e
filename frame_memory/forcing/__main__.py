"""Train a memory, a head by Direct Forcing, or Wan's look back, without the graph: on one GPU or several.

First run the graph workflows/train_direct_forcing.json, frame_preservation.json, or the part of wan_memory.json that
trains, once with the stage "write for the command line": it stores the videos and their captions in
output/frame_memory_training/<name>/videos. Then:

    python scripts/run.py -m frame_memory.forcing --model FramePack_F1.safetensors \\
        --videos <that folder> --stage memory --name my_memory

The stages query and follow are those of frame preservation; follow begins with query's result:

    python scripts/run.py -m frame_memory.forcing --model FramePack_F1.safetensors --videos <that folder> \\
        --stage follow --memory training/my_frames.safetensors --name my_frames_2 --rate 1e-4

The stage context is for Wan: patchifiers for finished frames, and a LoRA. Wan's follow needs both files of it:

    python scripts/run.py -m frame_memory.forcing --model wan2.1_t2v_1.3B.safetensors --videos <that folder> \\
        --stage context --schedule "Wan, 81 frames" --name my_wan
    python scripts/run.py -m frame_memory.forcing --model wan2.1_t2v_1.3B.safetensors --videos <that folder> \\
        --stage follow --memory training/my_frames.safetensors --name my_frames_2 \\
        --patchifiers training/my_wan.safetensors --lora training/loras/my_wan.safetensors

On several GPUs each one takes a video of its own in every step, and their gradients are averaged:

    python scripts/run.py -m torch.distributed.run --nproc_per_node 4 -m frame_memory.forcing ARGUMENTS
    python scripts/run.py -m accelerate.commands.launch --num_processes 4 -m frame_memory.forcing ARGUMENTS

(the second needs the package accelerate, the first nothing more). Ctrl+C keeps a checkpoint; the same command goes on
from it. Several processes stop together, at the end of an update; a launcher ends those that take longer than its
patience (30 s), and then the checkpoint is the last of --save-every. What follows `--` goes to ComfyUI, for example
`-- --lowvram`.

Both launchers were tried, with two processes on CPUs and a tiny model, not on several GPUs: accelerate 1.15 without
GPUs needs `--multi_gpu` (with its own `--cpu` it starts one process), and the `--cpu` of this command.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from ..plan import BESIDE_MEMORY, PRESETS, WAN_PRESET
from ..plan.preservation import RATES

SHORT_STAGES = {"memory": "1: memory", "lora": "1: memory and LoRA", "head": "2: head (Direct Forcing)"}
FRAME_STAGES = {"query": "1: frame query", "follow": "2: next section"}
CONTEXT_STAGES = {"context": "Wan: frame context"}
SHORT_FORCINGS = {"teacher": "teacher forcing", "student": "student forcing", "direct": "Direct Forcing"}
SAY_EVERY = 5.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python scripts/run.py -m frame_memory.forcing",
        usage="%(prog)s --model FILE --videos FOLDER [options]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add(
        "--model",
        type=Path,
        metavar="FILE",
        required=True,
        help="FramePack-F1 checkpoint (safetensors; of shards any one), or for query, follow and context a Wan file",
    )
    add(
        "--videos",
        type=Path,
        metavar="FOLDER",
        required=True,
        help="folder with video-*.safetensors, written by the graph",
    )
    stages = [*SHORT_STAGES, *FRAME_STAGES, *CONTEXT_STAGES]
    add("--stage", choices=stages, default="head", help="what learns; train memory or query first (default: head)")
    add(
        "--memory",
        type=Path,
        metavar="FILE",
        help="memory file to begin with; without one the stages memory, lora and query begin a new one",
    )
    add("--encoders", nargs="+", choices=RATES, help="of a new one in query (default: 4x4x2)")
    add("--freeze-encoder", action="store_true", help="stage follow: only the LoRA learns")
    add("--cross-attention", action="store_true", help="query, follow: every block learns to read the features, too")
    add("--drop-text", type=float, help="query and follow: share of updates without the caption (default: 0.1)")
    add("--encoder-first", type=float, help="query, follow: share of the run in which the LoRA waits (default: 0.33)")
    own = "context, follow: preset or text of 'Frame Context Packer' (default: the model's; '%s', follow '%s')"
    add("--schedule", metavar="TEXT", help=own % (WAN_PRESET, BESIDE_MEMORY))
    own = "Wan: trained patchifiers, which context goes on from and follow looks through; query takes their window"
    add("--patchifiers", type=Path, metavar="FILE", help=own)
    add("--lora", type=Path, metavar="FILE", help="LoRA that lies on the model while it is trained on")
    add("--name", default="direct_forcing", help="of the run and its result; the same name goes on with a stopped run")
    add("--output", type=Path, default=Path("training"), help="folder for checkpoints and results (default: training)")
    add("--steps", type=int, default=500, help="updates of the whole run (default: 500)")
    add("--clips", type=int, help="most clips of a video in one update (default: 16; context takes one section)")
    add("--rate", type=float, help="AdamW's learning rate (default: 1e-5; query, follow and context: 1e-4)")
    add("--warmup", type=int, help="steps until the full rate (default: a tenth of the steps, 500 at most)")
    add("--average", type=float, default=0.999, help="share kept by the averaged weights, 0 for none (default: 0.999)")
    add("--per-worker", type=int, default=1, help="videos each GPU takes in one update (default: 1)")
    add("--forcing", choices=SHORT_FORCINGS, help="default: teacher behind real history, direct for the head")
    add("--shift", type=float, default=0.0, help="noise levels of the loss (default: 5, 1 with Direct Forcing)")
    own = "noise levels of Direct Forcing's history, where they are drawn apart: one more pass a clip (default: off)"
    add("--history-shift", type=float, default=0.0, help=own)
    add("--rank", type=int, help="of the LoRA (default: 16)")
    add("--no-checkpointing", action="store_true", help="all stages but head: faster, with far more GPU memory")
    add("--save-every", type=int, default=50, help="steps between checkpoints; 3 are kept (default: 50)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("default", "fp8"), default="default", help="of the blocks; fp8 halves a bf16 file")
    add("--cpu", action="store_true", help="train on the CPU, for trials")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run it; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    own, hosts = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    args = parser().parse_args(own)
    # ComfyUI reads its own command line when it is imported, and only if it is told to.
    sys.argv = [sys.argv[0], *(["--cpu", "--use-pytorch-cross-attention"] if args.cpu else []), *hosts]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    from ..model.memory import MemoryMismatch
    from ..model.memory_file import MemoryFileError
    from ..model.tensor_file import FileError
    from .clips import ForcingError

    try:
        return _train(args)
    except (ForcingError, FileError, MemoryFileError, MemoryMismatch, ValueError,
            comfy.model_management.OOM_EXCEPTION) as error:  # fmt: skip
        sys.stderr.write(f"\n{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _train(args: argparse.Namespace) -> int:
    import comfy.model_management

    from .flow import WanConditioning
    from .prepared import read_videos
    from .results import write_result
    from .training_run import Faces
    from .workers import join

    workers = join("cpu" if args.cpu else comfy.model_management.get_torch_device().type)
    try:
        say = _say if workers.first else (lambda text: None)
        videos, family = read_videos(args.videos, say)
        kind, request = _request(args, workers.count)
        model, patches = _model(args, family, isinstance(videos[0].cond, WanConditioning))
        stop = _Stop(workers, _Lines(say) if workers.first else lambda moment: None)
        run = kind(
            model, _memory(args.memory, model), videos, request, args.output / args.name,
            Faces(say, stop.after_update, stop.between_clips), workers, patches,
        )  # fmt: skip
        with stop:
            outcome = run.run()
        if workers.first:
            if outcome.stopped:
                say(outcome.stopped)
            result = write_result(run, outcome, args.name, args.output, args.output / "loras", say)
            say(f"{result.checkpoint}: copy it into models/frame_memory of ComfyUI.")
            if result.lora is not None:
                say(f"{result.lora}: copy it into models/loras.")
        workers.wait()
        return 1 if outcome.stopped else 0
    finally:
        workers.leave()


def _request(args: argparse.Namespace, workers: int):
    """The kind of run, and what is asked of it. Raises ForcingError for an option that plays no part in the stage."""
    from .context_run import ContextRequest, ContextRun
    from .preserving_run import PreservingRequest, PreservingRun
    from .training_run import Request, TrainingRun, warmup_of
    from .video_trainer import VideoSettings

    _check_idle(args)
    short = args.stage in SHORT_STAGES
    settings = VideoSettings(
        rate=args.rate or (1e-5 if short else 1e-4), average=args.average, seed=args.seed,
        warmup=warmup_of(args.steps) if args.warmup is None else args.warmup, videos=args.per_worker * workers,
    )  # fmt: skip
    asked = {
        "stage": (SHORT_STAGES | FRAME_STAGES | CONTEXT_STAGES)[args.stage], "steps": args.steps, "shift": args.shift,
        "checkpointing": not args.no_checkpointing, "save_every": args.save_every, "settings": settings,
    }  # fmt: skip
    given = {
        "clips": args.clips, "rank": args.rank, "drop_text": args.drop_text, "alone": args.encoder_first,
        "rates": args.encoders and tuple(args.encoders),
        "schedule": PRESETS.get(args.schedule, args.schedule) or None,
    }  # fmt: skip
    asked |= {name: value for name, value in given.items() if value is not None}
    if args.stage in CONTEXT_STAGES:
        return ContextRun, ContextRequest(**asked)
    if args.stage in FRAME_STAGES:
        asked |= {"frozen": args.freeze_encoder, "cross_attention": args.cross_attention}
        return PreservingRun, PreservingRequest(**asked)
    forcing = SHORT_FORCINGS.get(args.forcing)
    return TrainingRun, Request(**asked, forcing=forcing, history_shift=args.history_shift)


def _check_idle(args: argparse.Namespace) -> None:
    """Raise ForcingError for an option that plays no part in the stage."""
    from .clips import ForcingError

    short, frames = args.stage in SHORT_STAGES, args.stage in FRAME_STAGES
    idle = {
        "--forcing": not short and args.forcing,
        "--history-shift": not short and args.history_shift,
        "--freeze-encoder": args.freeze_encoder and args.stage != "follow",
        "--cross-attention": args.cross_attention and not frames,
        "--encoder-first": args.encoder_first is not None and (not frames or args.freeze_encoder),
        "--drop-text": args.drop_text is not None and not frames,
        "--encoders": args.encoders and (args.stage != "query" or args.memory),
        "--clips": args.clips is not None and args.stage in CONTEXT_STAGES,
        "--rank": args.rank is not None and args.stage in ("memory", "head"),
        "--no-checkpointing": args.no_checkpointing and args.stage == "head",
        "--schedule": args.schedule and args.stage not in ("follow", *CONTEXT_STAGES),
        "--patchifiers": args.patchifiers and short,
        "--memory": args.memory and args.stage in CONTEXT_STAGES,
    }
    if any(idle.values()):
        named = ", ".join(name for name, given in idle.items() if given)
        raise ForcingError(f"{named}: plays no part in the stage {args.stage}. Leave it out.")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class _Stop:
    """Ctrl+C, heard between two clips, or by several processes together after an update, however often it is sent.

    In the middle of an update it would leave half of one in the checkpoint; a launcher sends it once more to processes
    that have heard it, while the checkpoint is written; and where one process stops alone the others wait for it.
    """

    def __init__(self, workers, watch):
        self.workers, self.watch, self.asked, self.before = workers, watch, False, None

    def __enter__(self) -> _Stop:
        self.before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _hear(self, *_) -> None:
        self.asked = True

    def between_clips(self) -> None:
        if self.asked and self.workers.count == 1:
            raise KeyboardInterrupt

    def after_update(self, moment) -> None:
        self.watch(moment)
        if self.workers.summed([float(self.asked)])[0]:
            raise KeyboardInterrupt


class _Lines:
    """A line about the run every few seconds."""

    def __init__(self, say):
        self.say, self.began, self.first, self.said_at = say, time.monotonic(), None, 0.0

    def __call__(self, moment) -> None:
        now = time.monotonic()
        if self.first is None:
            self.began, self.first = now, moment.step
        if now - self.said_at < SAY_EVERY and moment.step < moment.steps:
            return
        self.said_at = now
        recent = [loss for loss in moment.losses[-20:] if loss == loss]
        loss = f"{sum(recent) / len(recent):.4f}" if recent else "none"
        made = moment.step - self.first
        left = f"  {(moment.steps - moment.step) * (now - self.began) / made / 60:.1f} min left" if made else ""
        self.say(f"step {moment.step}/{moment.steps}  {moment.clips} clips  loss {loss}  rate {moment.rate:.1e}{left}")


def _model(args: argparse.Namespace, family: str, for_wan: bool):
    """(the MODEL with what is put on it, a word for its LoRA). family: of the videos' latents."""
    import comfy.sd
    import torch

    from ..model import tensor_file, wan_file
    from ..model.provenance import fingerprint_of

    options = {"dtype": torch.float8_e4m3fn} if args.dtype == "fp8" else {}
    model, patches = _wan(args, options) if for_wan else _framepack(args, options, family), ""
    if args.lora is not None:
        lora = tensor_file.read(str(args.lora))
        model, patches = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], fingerprint_of(lora)
    if args.patchifiers is not None:
        model = wan_file.with_file(model, wan_file.read(str(args.patchifiers)))[0]
    return model, patches


def _wan(args: argparse.Namespace, options: dict):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(args.model), model_options=options)


def _framepack(args: argparse.Namespace, options: dict, family: str):
    from ..model import checkpoint
    from ..model.framepack import MODEL_OPTION
    from .clips import ForcingError

    info = checkpoint.inspect(str(args.model), args.model.name)
    if info.kind == "F0":
        raise ForcingError(f"{args.model} is FramePack F0, which makes a video from its end; expected FramePack F1.")
    model = checkpoint.load_framepack(str(args.model), options)
    model.model_options = {**model.model_options, MODEL_OPTION: {"kind": "F1", "base": family}}
    return model


def _memory(path: Path | None, model):
    if path is None:
        return None
    from ..model import memory_file
    from ..model.preserved_memory import memory_of

    return memory_of(memory_file.read(str(path), "--memory"), "--memory", model)


if __name__ == "__main__":
    sys.exit(main())
