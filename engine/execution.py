"""How a device computes what the model says: memory layout, precision, compilation."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of weights and feature maps that ``device`` is fast with; one for training and evaluation.

    Tensor cores want channels last. So do CPUs with AVX-512; on others the backward pass of a VGG takes a third longer
    in it (``benchmarks/NOTES.md``).
    """
    is_plain_cpu = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return torch.contiguous_format if is_plain_cpu else torch.channels_last


def make_autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The context for the model's forward pass in a precision of ``AMP_DTYPES``, or None for float32."""
    return torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp is not None)


def compile_whole(module: nn.Module, mode: str) -> None:
    """Compiles ``module`` in place, as one graph.

    Args:
        module: what to compile.
        mode: of ``torch.compile``, or ``auto``: CUDA graphs, with which few images take a third of the time
            (``benchmarks/NOTES.md``), but not where DDP puts the exchange of gradients between graphs.
    """
    if mode == "auto":
        mode = "default" if dist.is_initialized() else "reduce-overhead"
    keep_pool_backward()
    module.compile(mode=mode, fullgraph=True)


def keep_pool_backward() -> None:
    """Lets Inductor write one kernel for the backward pass of a max pool.

    From PyTorch 2.12 on it takes the pass apart into a fill and atomic additions to float32 in another layout (pytorch
    issue 195123; ``benchmarks/generated_code.py`` shows both). The table is not public; where it has changed, steps are
    right, and as slow as Inductor makes them.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.decomposition import select_decomp_table

        select_decomp_table().pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
