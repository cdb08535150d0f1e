"""A network of six numbers for tests of the trainer; as a program, one of two processes that train it together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from frame_memory.forcing.video_trainer import VideoSettings, VideoTrainer
from frame_memory.forcing.workers import ALONE, join

FAST = VideoSettings(rate=0.01, warmup=3, average=0.9)
TWO = VideoSettings(rate=0.01, warmup=3, average=0.9, videos=2)


class Line:
    """Fits a line, in as many parts as a video has clips. broken: the steps whose loss is not a number."""

    def __init__(self, settings=FAST, clips: int = 3, broken: range = range(0), workers=ALONE):
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 2, generator=g))
        self.bias = torch.nn.Parameter(torch.randn(4, generator=g))
        self.trainer = VideoTrainer({"blocks.weight": self.weight, "bias": self.bias}, settings, workers)
        self.clips, self.broken, self.asked = clips, broken, 0

    def losses(self, generator):
        step = self.trainer.done
        for _ in range(self.clips):
            self.asked += 1
            x = torch.randn(8, 2, generator=generator)
            loss = (x @ self.weight.T + self.bias - 3).square().mean()
            yield loss * float("nan") if step in self.broken else loss, 1 / self.clips

    def run(self, until: int):
        while self.trainer.done < until:
            self.trainer.step(self.losses)
        return self

    def numbers(self) -> torch.Tensor:
        own = [p.detach().flatten() for p in (self.weight, self.bias)]
        return torch.cat([*own, *(a.flatten() for a in self.trainer.average.values())])


def main() -> None:
    workers = join("cpu")
    line = Line(TWO, workers=workers).run(4)
    agreed = [workers.agree(4), workers.agree(4 + workers.rank)]
    if workers.first:
        print(json.dumps([line.trainer.losses, line.numbers().tolist(), agreed]))
    workers.leave()


if __name__ == "__main__":
    main()
