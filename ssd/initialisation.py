"""How layers that begin without weights are initialised: functions that change every convolution in a module."""

from torch import nn


def xavier_init(module: nn.Module) -> None:
    """Xavier weights and zero biases, as Caffe's SSD has for its new layers."""
    for layer in convolutions(module):
        nn.init.xavier_uniform_(layer.weight)
        zero_bias(layer)


def small_init(module: nn.Module) -> None:
    """A tenth of Xavier's weights and zero biases."""
    xavier_init(module)
    for layer in convolutions(module):
        layer.weight.data.mul_(0.1)


def normal_init(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.03 and zero biases, as torchvision's SSDlite has."""
    for layer in convolutions(module):
        nn.init.normal_(layer.weight, std=0.03)
        zero_bias(layer)


def kaiming_init(module: nn.Module) -> None:
    """He's normal weights and zero biases, as torchvision has for a VGG."""
    for layer in convolutions(module):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        zero_bias(layer)


def pytorch_init(module: nn.Module) -> None:
    """Leaves the weights that PyTorch's layers have by default."""


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def zero_bias(layer: nn.Conv2d) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# name -> of the layers between backbone and head, of the head
WEIGHT_INITS = {
    "xavier": (xavier_init, xavier_init),
    "small_head": (xavier_init, small_init),
    "normal": (normal_init, normal_init),
    "pytorch": (pytorch_init, pytorch_init),
}
