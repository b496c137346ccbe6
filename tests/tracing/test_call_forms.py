"""One form for each call of torch."""

import torch
from forwards import made, targets

from dagrow.tracing import record


def test_operators_have_one_spelling():
    program = record(made(lambda self, x: (1 - x) * 2 + x.add(x) / x), torch.randn(2, 4))
    found = [target.__name__ for target in targets(program, "call_function")]  # 1 - x is Tensor.rsub or operator.sub
    assert found == ["sub", "mul", "add", "truediv", "add"]
