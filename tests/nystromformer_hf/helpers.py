"""Tiny models and inputs of the encoder's tests."""

from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import NystromformerConfig

from nystromformer_hf import NystromformerHFConfig, NystromformerHFForMaskedLM


# Large initial weights make attention peaked and every part of the model visible in its output.
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "num_landmarks": 16,
    "conv_kernel_size": 9,
    "initializer_range": 0.2,
}


def tiny_config(**changes) -> NystromformerHFConfig:
    return NystromformerHFConfig(**{**TINY, **changes})


def in_tree_config(**changes) -> NystromformerConfig:
    return NystromformerConfig(**{**TINY, "segment_means_seq_len": 64, **changes})


def random_tokens(*shape: int) -> torch.Tensor:
    """Tokens that are none of the special ones."""
    return torch.randint(5, TINY["vocab_size"], shape)


def padding_masks(seq_len: int) -> dict[str, torch.Tensor]:
    """One mask (seq_len,) for every kind of padding, long and short rows among them."""
    positions = torch.arange(seq_len)
    return {
        "none": torch.ones(seq_len),
        "right": positions < seq_len * 3 // 4,
        "left": positions >= seq_len // 3,
        "both": (positions > seq_len // 4) & (positions < seq_len * 7 // 8),
        "holes": torch.rand(seq_len) < 0.6,
        "right, fewer tokens than landmarks": positions < 7,
        "left, fewer tokens than landmarks": positions >= seq_len - 11,
        "one token in the middle": positions == seq_len // 2,
    }


def distributed_gradients(rank: int, folder: Path, world_size: int) -> None:
    """One process of a data-parallel step on `folder`/inputs.pt; the first process saves its gradients."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    config, weights, inputs = torch.load(folder / "inputs.pt", weights_only=False)
    model = NystromformerHFForMaskedLM(config)
    model.load_state_dict(weights)
    share = {name: tensor.chunk(world_size)[rank] for name, tensor in inputs.items()}
    parallel = DistributedDataParallel(model)  # must outlive the backward pass, whose gradients it averages
    parallel(**share).loss.backward()
    if rank == 0:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, folder / "gradients.pt")
    # The first to leave would take the rendezvous with it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
