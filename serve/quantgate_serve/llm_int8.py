"""LLM.int8 on a CPU: bitsandbytes' numbers, bit for bit, without what it does around them.

Its product of integers takes a tenth of the time of one of its Linears here; the rest are some
thirty small operations and their way through Python. Here they are ten where nothing is an outlier.

Source: bitsandbytes, autograd/_functions.py (MatMul8bitLt) and backends/default/ops.py.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

# 1 / 127^2 and 1 / 127 as bitsandbytes writes them.
_SCALE = 6.200124e-05
_INVERSE = 7.874015718698502e-3


def can_replace(linear: Any) -> bool:
    """Whether Int8Linear can stand for this module, a Linear of any kind."""
    return (
        type(linear).__name__ == "Linear8bitLt"
        and type(linear).__module__.startswith("bitsandbytes.")
        and not linear.state.has_fp16_weights
        and linear.weight.device.type == "cpu"
    )


class Int8Linear(nn.Module):
    """y = x W^T + b over FP32 x [..., in]; each row of x and of W is rounded to int8 for itself.

    Columns of x that hold an outlier are multiplied in FP32. That is decided over all rows at once.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scales: Tensor, bias: Tensor | None, *, threshold: float
    ) -> None:
        """
        Args:
            codes: [out, in] int8.
            scales: [out], the largest absolute weight of each row.
            threshold: what an outlier is at least; 0 for there are none.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.threshold = threshold or math.inf
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.float())
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: Any) -> "Int8Linear":
        """With the weights of a Linear8bitLt that `can_replace` allows."""
        if linear.weight.CB is not None:
            linear.init_8bit_state()
        state = linear.state
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(state.CB, state.SCB, bias, threshold=float(state.threshold))

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        rows = x.reshape(-1, self.in_features)
        halves = rows.half()
        largest = torch.linalg.vector_norm(halves, math.inf, dim=1, keepdim=True)
        # A row with a NaN hides its outliers from the maximum.
        if bool((largest < self.threshold).all()):
            largest = largest.float()
            y = self._product((halves * (127.0 / largest)).round_().char(), largest)
        else:
            y = self._forward_with_outliers(rows, halves)
        return y.view(*x.shape[:-1], self.out_features)

    def _forward_with_outliers(self, rows: Tensor, halves: Tensor) -> Tensor:
        is_outlier = halves.abs() >= self.threshold
        columns = is_outlier.any(0).nonzero().view(-1)
        inner = halves.masked_fill(is_outlier, 0)
        largest = torch.linalg.vector_norm(inner, math.inf, dim=1, keepdim=True).float()
        codes = (inner * (127.0 / largest)).round_().char()
        if len(rows) > 1:
            codes[:, columns] = 0
        outer = self.codes[:, columns] * self.scales.view(-1, 1) * _INVERSE
        return self._product(codes, largest).addmm(rows[:, columns], outer.t())

    def _product(self, codes: Tensor, largest: Tensor) -> Tensor:
        """[T, out] of the rounded rows and the value that 127 stands for in each."""
        scale = largest * self.scales
        y = torch.mul(torch._int_mm(codes, self.codes.t()), scale, out=scale).mul_(_SCALE)
        return y if self.bias is None else y.add_(self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def replace_all(model: nn.Module) -> None:
    """Replace every Linear8bitLt of `model` where that is faster.

    Without AVX-512 torch multiplies int8 number by number: they stay, and multiply in FP32.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    for name, module in [*model.named_modules()]:
        if can_replace(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear.of(module))
