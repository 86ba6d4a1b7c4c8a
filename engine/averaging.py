"""The exponential moving average of a model's weights."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The average of ``model``, statistics of batch norm included, as torchvision's classification references keep it.

    It is the weights after the first step, of which each step keeps ``decay`` and takes 1 - ``decay`` from the new
    ones. Without a ``decay`` there is none.
    """
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """``average.update_parameters(model)``, with which the host would wait for a GPU in each step.

    PyTorch's copies ``n_averaged``, which is in the host's memory, to the device, where no exponential average looks
    at it.
    """
    if average.n_averaged == 0:
        average.update_parameters(model)  # takes the weights over, and copies no counter
        return
    averages, weights = ([*module.parameters(), *module.buffers()] for module in (average.module, model))
    for dtype in {weight.dtype for weight in weights}:
        of_dtype = ([tensor for tensor in tensors if tensor.dtype == dtype] for tensors in (averages, weights))
        if dtype.is_floating_point:
            average.multi_avg_fn(*of_dtype, average.n_averaged)
        else:  # counters, whose average would be cut to an integer
            for average_tensor, tensor in zip(*of_dtype, strict=True):
                average_tensor.copy_(tensor)
    average.n_averaged += 1
