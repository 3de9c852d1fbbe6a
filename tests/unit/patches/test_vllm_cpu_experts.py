"""Weights of experts that are loaded again are the ones that compute: on vLLM's own CPU kernel."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless_patches import vllm_cpu_experts

EXPERTS, PER_TOKEN, HIDDEN, WIDTH, TOKENS = 4, 2, 64, 32, 5


def cpu_moe() -> ModuleType:
    """Return a module with the kernel's functions under the names that vLLM's layer calls."""
    ops = pytest.importorskip("vllm._custom_ops")
    pytest.importorskip("vllm._C")
    module = ModuleType("cpu_moe")
    module.cpu_prepack_moe_weight = ops.cpu_prepack_moe_weight
    module.cpu_fused_moe = ops.cpu_fused_moe
    return module


def expected(x, w13, w2, weights, ids):
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            out[token] += weight * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_experts_that_are_loaded_again_compute():
    module = cpu_moe()
    vllm_cpu_experts._patch(module)
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN)
    weights, ids = torch.softmax(torch.randn(TOKENS, EXPERTS), -1).topk(PER_TOKEN)
    ids = ids.to(torch.int32)
    shapes = ((EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    held = [module.cpu_prepack_moe_weight(torch.randn(shape), "vec") for shape in shapes]

    for _ in range(2):  # as when verl sends a step's weights
        sent = [torch.randn(shape) for shape in shapes]
        for parameter, tensor in zip(held, sent, strict=True):
            parameter.copy_(tensor)
        got = module.cpu_fused_moe(x, *held, None, None, weights, ids, "silu", "vec")
        torch.testing.assert_close(got, expected(x, *sent, weights, ids), rtol=1e-4, atol=1e-4)


def test_a_changed_vllm_is_named():
    module = ModuleType("cpu_moe")
    module.cpu_prepack_moe_weight = lambda weight: weight
    with pytest.raises(UnsupportedError, match=r"vLLM changed .*cpu_moe\.cpu_prepack_moe_weight"):
        vllm_cpu_experts._patch(module)
