"""A model that computes next to nothing, for what train.py does alike with every network.

    torchrun --nproc-per-node=2 -m tests.tiny [flags of train.py]

It is chosen by --model tiny where ``ssd.family.MODELS`` has ``MODEL`` under this name, as in such a process.
"""

from functools import partial

from torch import Tensor, nn

import ssd
import train
from engine import failures, flags
from ssd.family import build


class TinyBackbone(nn.Module):
    """Two maps of 64 pixels, with batch norm, whose statistics are state that no optimizer knows."""

    out_channels = (8, 8)
    trainable_layers = 2

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, 8, 3, stride, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for channels, stride in ((3, 8), (8, 2))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.blocks[0](images)
        return [first, self.blocks[1](first)]


MODEL = partial(build, ssd.backbones.Backbone(lambda weights, size, **_: TinyBackbone(), weights=None), 64)
TINY = ["--model", "tiny", "--weights-backbone", "none", "--device", "cpu", "--batch-size", "3"]

if __name__ == "__main__":
    ssd.family.MODELS["tiny"] = MODEL
    with failures.one_line_errors(flags.names_of(train.get_args_parser())):
        train.main(train.parse_args())
