"""Size and cost of every model of the family, as the table of docs/models.md.

    python -m benchmarks.family

Parameters are those of 91 classes, GMACs (10^9 multiply-accumulates) those of the convolutions for one image. Nothing
is computed but shapes.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

import ssd


def family_table() -> list[str]:
    """Lines of Markdown."""
    lines = ["| model | input | default boxes | million parameters | GMACs |", "|---|---|---|---|---|"]
    for name, build in ssd.family.MODELS.items():
        with torch.device("meta"):
            model = build(weights_backbone=None).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, model.size, model.size))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = counter.get_total_flops()  # two for each multiply-accumulate
        lines.append(
            f"| `{name}` | {model.size} | {len(model.default_boxes):,} | {parameters / 1e6:.2f} | {flops / 2e9:.2f} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(family_table()))
