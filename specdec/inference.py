"""A trained model made ready for decoding: fixed weights, the fastest data type, and matrices laid out for the machine.

What a model computes is not changed beyond the data type: packed and plain products agree to the last bit (tested).
"""

import copy

import torch
from torch import Tensor, nn

from .model import Transformer
from .train import has_bf16


class PackedLinear(nn.Module):
    """A bfloat16 Linear whose weight oneDNN has reordered once. Laid out plainly, every product reorders it again:
    decoding one token then takes about twice as long."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def ready(model: Transformer, dtype: str | torch.dtype = "auto") -> Transformer:
    """A copy of ``model`` for decoding. ``dtype`` "auto" is bfloat16 where the machine multiplies it natively."""
    if dtype == "auto":
        dtype = torch.bfloat16 if has_bf16(model.device) else torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    if dtype == torch.bfloat16 and model.device.type == "cpu" and has_bf16():
        pack(model)
    return model


def pack(module: nn.Module) -> None:
    """Replace every Linear under ``module`` by its packed form."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, PackedLinear(child))
        else:
            pack(child)
