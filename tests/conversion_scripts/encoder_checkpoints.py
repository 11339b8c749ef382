"""Tiny random encoders of every kind that the conversion scripts take, and an independent reading of the authors' files."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tests.conversion_scripts.llama_checkpoints import VOCABULARY, make_tokenizer


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 3,
}
FAMILIES = {
    "bert": {"max_position_embeddings": 64, "pad_token_id": 0},
    "roberta": {"max_position_embeddings": 66, "pad_token_id": 1, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 66, "pad_token_id": 1},
    "camembert": {"max_position_embeddings": 70, "pad_token_id": 5},
    # At 64 tokens, 16 of them landmarks.
    "nystromformer": {
        "max_position_embeddings": 128,
        "num_landmarks": 16,
        "segment_means_seq_len": 64,
        "conv_kernel_size": 9,
    },
    "nystromformer_hf": {"max_position_embeddings": 128, "num_landmarks": 16, "conv_kernel_size": 9},
}
HEADS = {
    "none": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
}


def make_config(family: str, head: str = "none", **config) -> PreTrainedConfig:
    labels = {"num_labels": 2} if head == "question-answering" else {}
    return AutoConfig.for_model(family, **{**TINY, **FAMILIES[family], **labels, **config})


def randomize(model: nn.Module) -> None:
    """Wide weights, and biases and norms that are not their start: each of them shows in the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if norm else 0.0))


def make_model(family: str, head: str = "none", **config) -> PreTrainedModel:
    model = getattr(transformers, HEADS[head]).from_config(make_config(family, head, **config)).eval()
    randomize(model)
    return model


def save_checkpoint(
    folder: Path, family: str, head: str = "none", *, dtype=torch.float32, shard="1GB", **config
) -> PreTrainedModel:
    """A model with a tokenizer in `folder`; returns the model."""
    model = make_model(family, head, **config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return model


def load(folder: Path, head: str = "none", **kwargs):
    return getattr(transformers, HEADS[head]).from_pretrained(folder, **kwargs)


@torch.no_grad()
def outputs(model: PreTrainedModel, input_ids: torch.LongTensor, **inputs) -> torch.Tensor:
    """Whatever a model's head returns, as one tensor."""
    if "MultipleChoice" in type(model).__name__:
        input_ids, inputs = input_ids[None], {name: tensor[None] for name, tensor in inputs.items()}
    result = model(input_ids=input_ids, **inputs)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return torch.cat([result[name].flatten() for name in names if name in result])


class OriginalNystromformer(nn.Module):
    """The authors' model, written from the formulas of the paper around the names and shapes in the authors' files.

    `input_ids` (1, seq_len) -> states (1, seq_len, dim), or what `head` makes of them: "mlm", "sen_classifer" or "qahead".
    """

    def __init__(
        self, num_landmarks: int, seq_len: int, kernel_size: int | None, head: str = "mlm", attn_type="nystrom"
    ):
        super().__init__()
        dim, hidden, self.num_head = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_attention_heads"]
        self.num_landmarks, self.seq_len, self.kernel_size, self.head = num_landmarks, seq_len, kernel_size, head
        self.attn_type = attn_type
        self.model = nn.Module()
        self.model.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(VOCABULARY, dim),
                "position_embeddings": nn.Embedding(128 + 2, dim),
                "token_type_embeddings": nn.Embedding(1, dim),
                "norm": nn.LayerNorm(dim),
            }
        )
        for index in range(TINY["num_hidden_layers"]):
            attn = {}
            if kernel_size is not None:
                padding = (kernel_size // 2, 0)
                attn["conv"] = nn.Conv2d(
                    self.num_head, self.num_head, (kernel_size, 1), padding=padding, bias=False, groups=self.num_head
                )
            mha = {name: nn.Linear(dim, dim) for name in ("W_q", "W_k", "W_v", "ff")} | {"attn": nn.ModuleDict(attn)}
            layer = {"mha": nn.ModuleDict(mha), "norm1": nn.LayerNorm(dim), "norm2": nn.LayerNorm(dim)}
            layer |= {"ff1": nn.Linear(dim, hidden), "ff2": nn.Linear(hidden, dim)}
            setattr(self.model, f"transformer_{index}", nn.ModuleDict(layer))
        self.mlm = nn.ModuleDict(
            {"dense": nn.Linear(dim, dim), "norm": nn.LayerNorm(dim), "mlm_class": nn.Linear(dim, VOCABULARY)}
        )
        self.mlm["mlm_class"].weight = self.model.embeddings["word_embeddings"].weight
        if head == "sen_classifer":
            self.sen_classifer = nn.ModuleDict({"dense": nn.Linear(dim, dim), "classifer": nn.Linear(dim, 3)})
        elif head == "qahead":
            self.qahead = nn.Linear(dim, 2)
        randomize(self)

    @torch.no_grad()
    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        embeddings = self.model.embeddings
        states = embeddings["word_embeddings"](input_ids) + embeddings["token_type_embeddings"].weight[0]
        states = embeddings["norm"](states + embeddings["position_embeddings"].weight[2:][: input_ids.shape[1]])
        for index in range(TINY["num_hidden_layers"]):
            layer = getattr(self.model, f"transformer_{index}")
            states = layer["norm1"](states + self.attend(layer["mha"], states))
            states = layer["norm2"](states + layer["ff2"](F.gelu(layer["ff1"](states), approximate="tanh")))
        if self.head == "sen_classifer":
            return self.sen_classifer["classifer"](torch.tanh(self.sen_classifer["dense"](states[:, 0])))
        if self.head == "qahead":
            return torch.cat(self.qahead(states).unbind(-1))
        hidden = self.mlm["norm"](F.gelu(self.mlm["dense"](states), approximate="tanh"))
        return self.mlm["mlm_class"](hidden)

    def attend(self, mha: nn.ModuleDict, states: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            mha[name](states).unflatten(-1, (self.num_head, -1)).transpose(1, 2) for name in ("W_q", "W_k", "W_v")
        )
        scale = math.sqrt(query.shape[-1])
        if self.attn_type == "softmax" or self.num_landmarks == self.seq_len:
            context = (query @ key.mT / scale).softmax(-1) @ value
        else:
            shape = (self.num_landmarks, self.seq_len // self.num_landmarks)
            query_landmarks, key_landmarks = query.unflatten(2, shape).mean(3), key.unflatten(2, shape).mean(3)
            left = (query @ key_landmarks.mT / scale).softmax(-1)
            middle = (query_landmarks @ key_landmarks.mT / scale).softmax(-1)
            right = (query_landmarks @ key.mT / scale).softmax(-1)
            context = left @ self.inverse(middle) @ right @ value
        if self.kernel_size is not None:
            context = context + mha["attn"]["conv"](value)
        return mha["ff"](context.transpose(1, 2).flatten(2))

    @staticmethod
    def inverse(matrix: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(matrix.shape[-1])
        result = matrix.mT / matrix.sum(-2).max()
        for _ in range(6):
            product = matrix @ result
            result = result @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
        return result

    def save(self, path: Path, **more) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model_state_dict": self.state_dict(), **more}, path)

    def config(self, **changes) -> dict:
        """As in the authors' `config.json`."""
        model = {
            "mixed_precision": True,
            "vocab_size": VOCABULARY,
            "num_sen_type": 1,
            "max_seq_len": 128,
            "embedding_dim": TINY["hidden_size"],
            "transformer_dim": TINY["hidden_size"],
            "transformer_hidden_dim": TINY["intermediate_size"],
            "num_layers": TINY["num_hidden_layers"],
            "dropout_prob": 0.1,
            "num_head": self.num_head,
            "head_dim": TINY["hidden_size"] // self.num_head,
            "attn_type": self.attn_type,
        }
        if self.attn_type == "nystrom":
            model |= {"num_landmarks": self.num_landmarks, "seq_len": self.seq_len}
        if self.kernel_size is not None:
            model["conv_kernel_size"] = self.kernel_size
        return {"model_checkpoints": "/model/model", "model": {**model, **changes}}
