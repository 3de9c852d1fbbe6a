"""What runs inside every vLLM worker of an elastic replica: verl's extension, which also says what weights it holds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from verl_rlhfless.live.checksum import EngineChecksum, TensorSum, as_unsigned, bit_sum, dtype_name, stream_digest
from verl_rlhfless.live.variables import LEASE_VARIABLE
from verl_rlhfless.live.weight_slices import Joiner, Slice

_TIED_HEAD = "lm_head."  # what vLLM skips when a model ties its head to the embedding


class ReceivedWeights:
    """Sums over the tensors of one weight update. They stay on the tensors' device, so that a GPU never waits here."""

    def __init__(self, dtype: torch.dtype, is_tied: bool) -> None:
        """Record for an engine of element type ``dtype``, whose head is or isn't its embedding."""
        self._dtype = dtype
        self._is_tied = is_tied
        self._arrived: list[tuple[str, torch.dtype, tuple[int, ...], torch.Tensor]] = []
        self._converted: list[torch.Tensor] = []
        self.names: set[str] = set()
        self.num_elements = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Record a tensor before vLLM loads it."""
        arrived = bit_sum(tensor)
        self.names.add(name)
        self._arrived.append((name, tensor.dtype, tuple(tensor.shape), arrived))
        if self._is_tied and name.startswith(_TIED_HEAD):
            return
        self.num_elements += tensor.numel()
        is_cast = tensor.is_floating_point() and tensor.dtype != self._dtype
        self._converted.append(bit_sum(tensor, self._dtype) if is_cast else arrived)

    def digest(self) -> str:
        """Return the stream digest of what arrived."""
        return stream_digest(
            TensorSum(name, dtype_name(dtype), shape, as_unsigned(total)) for name, dtype, shape, total in self._arrived
        )

    def expected_sum(self) -> int:
        """Return the bit sum of what vLLM is to hold: all tensors in the engine's element type, a tied head once."""
        return as_unsigned(sum(int(total) for total in self._converted))


class ElasticWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension with checksums. vLLM refuses attributes that its worker has too, hence the long names."""

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> None:
        """Load weights as verl does, and record what arrives."""
        model = self.model_runner.vllm_config.model_config
        is_tied = bool(getattr(model.hf_text_config, "tie_word_embeddings", False))
        self.rlhfless_received = ReceivedWeights(model.dtype, is_tied)
        self.rlhfless_joiner = Joiner()
        super().update_weights_from_ipc(*args, **kwargs)

    def _update_weights(self, weights: list[tuple[str | Slice, torch.Tensor]], *args: Any, **kwargs: Any) -> None:
        complete = self.rlhfless_joiner.join(weights)
        for name, tensor in complete:
            self.rlhfless_received.add(name, tensor)
        if complete:
            super()._update_weights(complete, *args, **kwargs)

    def change_lease(self, lease: str) -> None:
        """Record what this engine does from now on under the lease of this name."""
        os.environ[LEASE_VARIABLE] = lease
        if hasattr(self, "_rlhfless_probe"):
            self._rlhfless_probe.change_lease()

    def device_memory(self) -> tuple[int, int]:
        """Return the memory [bytes] in use on this worker's device, by whatever process, and all that it has.

        Zeros where the device is the host.
        """
        if current_platform.is_cpu():
            return 0, 0
        free_bytes, total_bytes = torch.accelerator.get_memory_info()
        return total_bytes - free_bytes, total_bytes

    def weights_checksum(self) -> dict[str, Any]:
        """Return the fields of :class:`EngineChecksum` for the weights that were loaded last."""
        received = self.rlhfless_received
        live = [parameter.detach() for parameter in _loadable(self.model_runner.model, received.names)]
        checksum = EngineChecksum(
            rank=self.rank,
            received=received.digest(),
            expected_sum=f"{received.expected_sum():016x}",
            loaded_sum=f"{as_unsigned(sum(int(bit_sum(parameter)) for parameter in live)):016x}",
            incomparable=_why_incomparable(self.model_runner.vllm_config)
            or _why_other_content(self.model_runner.model, live, received.num_elements),
        )
        return dataclasses.asdict(checksum)  # vLLM's messages carry plain values only


def _loadable(model: torch.nn.Module, received: set[str]) -> Iterator[torch.Tensor]:
    """Yield every parameter once, and the buffers that arrived with the weights."""
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if name in received)


def _why_incomparable(config: Any) -> str:
    """Return why this worker's parameters are not the published tensors, or nothing."""
    if config.parallel_config.world_size > 1:
        return f"a shard of {config.parallel_config.world_size}"
    if config.quant_config is not None:
        return "quantised"
    if config.lora_config is not None:
        return "with adapters"
    if config.speculative_config is not None:
        return "with a draft model"
    return ""


def _why_other_content(model: torch.nn.Module, live: list[torch.Tensor], num_received: int) -> str:
    """Return why the model holds other elements than it received (one that leaves a tower out does), or nothing."""
    padding = {  # by weight: a tied head may be a layer of its own
        layer.weight.data_ptr(): (layer.num_embeddings_padded - layer.org_vocab_size) * layer.embedding_dim
        for layer in model.modules()
        if isinstance(layer, VocabParallelEmbedding)
    }
    num_live = sum(parameter.numel() for parameter in live) - sum(padding.values())
    if num_live != num_received:
        return f"{num_received} elements for {num_live} parameters"
    mixed = {parameter.dtype for parameter in live if parameter.is_floating_point()}
    return "" if len(mixed) <= 1 else "mixed element types"
