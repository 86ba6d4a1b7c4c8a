"""What --compile generates for a GPU, on a machine without one: kernels of the step of SSD300-VGG16, by kind.

    python -m benchmarks.generated_code [--batch-size N] [--save DIR]

The step is traced on the CPU, and Inductor then writes code for the properties of an H100. Nothing is compiled or run;
the counts show what it would do. Twice: as Inductor does by itself, and as execution.py tells it to. The last line is
one JSON object.
"""

import argparse
import contextlib
import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.lowering  # decompositions look for it
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, config, decomposition, scheduler
from torch._inductor.utils import get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _triton

import presets
import ssd
import train
from benchmarks.train_step import NUM_CLASSES, make_batch
from benchmarks.turns import in_new_process
from engine import execution

H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    L2_cache_size=50 * 2**20,
)
COUNTED = {
    "Triton kernels": r"async_compile\.triton\(",
    "convolutions": r"= (?:extern_kernels\.convolution|torch\.ops\.aten\.convolution_backward\.default)\(",
    "atomic additions": r"tl\.atomic_add\(",
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Answers what Inductor asks about the GPU before it writes code for it."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_name": lambda device=None: H100.name,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }
    interface = {name: cuda[name] for name in ("is_available", "device_count", "current_device")}
    interface |= {
        "get_device_properties": cuda["get_device_properties"],
        "get_compute_capability": lambda device=None: 10 * H100.major + H100.minor,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=False: True,
    }
    worker = {name: cuda[name] for name in ("current_device", "get_device_properties")}
    triton, found = {"triton_hash_with_backend": lambda: "none"}, {"has_triton": lambda: True}
    layout = {"_conv_determine_backend_memory_format": lambda *_: torch.channels_last}  # as cuDNN keeps it
    with contextlib.ExitStack() as stack:
        for where, answers in ((torch.cuda, cuda), (_triton, triton), (scheduler, found), (torch._C, layout)):
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(where, name, answer))
        for where, answers in ((CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, answer in answers.items():
                stack.enter_context(mock.patch.object(where, name, staticmethod(answer)))
        yield


def graphs_of(module: nn.Module, run: Callable[[], None]) -> list[fx.GraphModule]:
    """The graphs of the forward and the backward pass of ``module``, which ``run`` calls."""
    graphs = []

    def keep(graph: fx.GraphModule, _) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, decompositions=decomposition.select_decomp_table())
    module.compile(backend=backend, fullgraph=True)
    run()
    return graphs


def code_for_gpu(graph: fx.GraphModule) -> str:
    """What Inductor writes for a graph that was traced on the CPU."""
    gpu = torch.device("cuda", 0)
    for node in graph.graph.nodes:
        node.kwargs = {name: gpu if isinstance(value, torch.device) else value for name, value in node.kwargs.items()}
    traced = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [
            torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=gpu)
            if isinstance(one, FakeTensor)
            else one
            for one in traced
        ]
    context = torch._guards.tracing(torch._guards.TracingContext(mode))
    with pretended_gpu(), context, config.patch(fx_graph_cache=False, compile_threads=1):
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
        return "\n".join(get_code(compile_fx.compile_fx_inner, graph, inputs))


def code_of_step(batch_size: int, as_told: bool) -> str:
    """Of train.py's step in bf16, from the batch to the gradients."""
    if as_told:
        execution.keep_pool_backward()
    model = ssd.get_model("ssd300_vgg16", weights_backbone=None, num_classes=NUM_CLASSES).train()
    model.to(memory_format=torch.channels_last)
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=model.size)
    batch_losses = train.BatchLosses(model, preset, torch.autocast("cpu", torch.bfloat16))
    batch = make_batch(preset, batch_size)
    graphs = graphs_of(batch_losses, lambda: batch_losses(batch)["loss"].backward())
    return "\n".join(map(code_for_gpu, graphs))


def count(code: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, code)) for name, pattern in COUNTED.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the code there")
    args = parser.parse_args()
    report = {"torch": torch.__version__}
    for name, as_told in (("by itself", False), ("as told", True)):
        code = in_new_process(code_of_step, args.batch_size, as_told)
        report[name] = count(code)
        print(f"{name:10} " + "  ".join(f"{kind}: {number}" for kind, number in report[name].items()), flush=True)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            (args.save / f"{name.replace(' ', '_')}.py").write_text(code)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
