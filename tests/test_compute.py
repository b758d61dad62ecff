"""What a client's device is quick with."""

from types import MappingProxyType

from federation.task.compute import has_bfloat16

import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "device", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, CPU, True),
        ({"avx512_bf16": False, "avx512_f": True}, CPU, False),
        ({"architecture": "arm64"}, CPU, False),
        ({"avx512_bf16": True}, torch.device("cuda"), False),
    ],
)
def test_bfloat16_is_for_processors_that_say_they_multiply_it(monkeypatch, capabilities, device, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(capabilities), raising=False)
    assert has_bfloat16(device) is expected


def test_where_pytorch_cannot_tell_numbers_stay_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bfloat16(CPU) is False
