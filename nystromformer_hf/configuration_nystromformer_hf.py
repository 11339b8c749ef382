"""Nyströmformer encoder configuration."""

import os
from typing import Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, NystromformerConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .nystrom_attention import INVERSE_INITS
from .validation import at_least, raises_value_error


IN_TREE_MODEL_TYPE = "nystromformer"
# Its fields that have another name and other values here.
IN_TREE_FIELDS = {"segment_means_seq_len": "num_landmarks", "inv_coeff_init_option": "inverse_init"}


@raises_value_error
@strict
class NystromformerHFConfig(PreTrainedConfig):
    r"""
    Configuration of a Nyströmformer encoder (Xiong et al. 2021, arXiv 2102.03902): a BERT-shaped encoder whose
    attention goes through landmarks, in time linear in the length of the text.

    Fields shared with transformers' own `NystromformerConfig` mean what they mean there; `from_nystromformer` takes
    over such a configuration. Its `segment_means_seq_len` is not needed, since any length works. The others:

    Args:
        max_position_embeddings (`int`, defaults to 510):
            Positions with an embedding of their own; longer texts repeat them.
        num_landmarks (`int`, defaults to 64):
            Landmarks of each head. Texts of at most so many tokens are attended exactly.
        conv_kernel_size (`int`, *optional*, defaults to 65):
            Taps, odd or even, of the depthwise convolution of the values that is added to attention. `None` is off.
        attention_probs_dropout_prob (`float`, defaults to 0.1):
            Probability with which a head does not see a token, for all queries at once.
        inverse_iterations (`int`, defaults to 6):
            Steps of the iterative pseudo-inverse. Few of them also regularise: on trained weights more than about eight
            make the approximation worse, and many more amplify rounding.
        inverse_init (`str`, defaults to `"original"`):
            Scale the iteration starts from: `"original"`, one per text, with which the published models were trained,
            or `"exact"`, one per head, which converges faster.
        inverse_regularization (`float`, *optional*):
            Replaces the iteration by Tikhonov's pseudo-inverse with this regularisation; 0.01 is a good value where the
            weights were trained with ordinary attention.
        landmark_refinement_steps (`int`, defaults to 0):
            Steps of k-means that move landmarks from segment means towards clusters of tokens: closer to ordinary
            attention with the same landmarks, for more time.
        classifier_activation (`str`, *optional*):
            Activation between the two layers of the heads for sequence classification and multiple choice. `None` is that
            of the published models, `hidden_act` and ReLU; those of BERT and RoBERTa have `"tanh"`.

    ```python
    >>> from nystromformer_hf import NystromformerHFConfig, NystromformerHFForMaskedLM

    >>> config = NystromformerHFConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4)
    >>> model = NystromformerHFForMaskedLM(config)
    ```"""

    model_type = "nystromformer_hf"
    _auto_class = "AutoConfig"  # a saved config brings this file along and names it in its `auto_map`

    vocab_size: int = 30000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 510
    type_vocab_size: int = 2
    num_landmarks: int = 64
    conv_kernel_size: int | None = 65
    inverse_iterations: int = 6
    inverse_init: str = "original"
    inverse_regularization: float | int | None = None
    landmark_refinement_steps: int = 0
    classifier_activation: str | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> Self | tuple[Self, dict]:
        """As transformers reads a configuration, and one of its own Nyströmformer as `from_nystromformer` does."""
        if config_dict.get("model_type") == IN_TREE_MODEL_TYPE:
            return cls.from_nystromformer(NystromformerConfig.from_dict(config_dict), **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_nystromformer(
        cls, source: PreTrainedConfig | str | os.PathLike, return_unused_kwargs: bool = False, **kwargs
    ) -> Self | tuple[Self, dict]:
        """Take over a configuration of transformers' own Nyströmformer.

        Its `num_landmarks == segment_means_seq_len` means softmax attention at every length it has positions for, which
        here is as many landmarks as there are positions. More landmarks than `segment_means_seq_len` work nowhere: there
        the two are swapped, as in a configuration that the authors released.

        Args:
            source: that configuration, or the checkpoint folder or Hub id that holds it.
            return_unused_kwargs: as for `from_pretrained`.
            kwargs: fields to change, and the arguments of `from_pretrained` that say where to look (`revision`, …).

        Raises:
            ValueError: where `source` is the configuration of another model.
        """
        own_names = {*cls.__annotations__, "attn_implementation", "num_labels"}
        own_fields = {name: kwargs.pop(name) for name in list(kwargs) if name in own_names}
        if not isinstance(source, PreTrainedConfig):
            source, kwargs = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **kwargs)
        if source.model_type != IN_TREE_MODEL_TYPE:
            raise ValueError(
                f"model_type={source.model_type!r} cannot be taken over; allowed is {IN_TREE_MODEL_TYPE!r}"
            )

        fields = source.to_dict()
        for name in ("model_type", "transformers_version", "architectures", "add_cross_attention"):
            fields.pop(name, None)
        fields["inverse_init"] = "exact" if fields.pop("inv_coeff_init_option") else "original"
        num_landmarks, seq_len = fields["num_landmarks"], fields.pop("segment_means_seq_len")
        if num_landmarks == seq_len:
            fields["num_landmarks"] = max(num_landmarks, fields["max_position_embeddings"])
        else:
            fields["num_landmarks"] = min(num_landmarks, seq_len)
        if "num_labels" in own_fields:
            del fields["id2label"], fields["label2id"]
        return cls.from_dict(fields | own_fields, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: names the field, its value and what is allowed."""
        for theirs, ours in IN_TREE_FIELDS.items():
            if hasattr(self, theirs):
                raise ValueError(
                    f"{theirs}={getattr(self, theirs)!r} is a field of transformers' NystromformerConfig; allowed are {ours}, "
                    "or to take over the whole configuration by from_nystromformer"
                )
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "num_landmarks",
            "inverse_iterations",
        ):
            at_least(self, name, 1)
        if self.conv_kernel_size is not None:
            at_least(self, "conv_kernel_size", 1)
        at_least(self, "landmark_refinement_steps", 0)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible; allowed are multiples of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is no probability; allowed are 0 ≤ {name} < 1")
        known = ", ".join(sorted(ACT2FN))
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; allowed are {known}")
        if self.classifier_activation is not None and self.classifier_activation not in ACT2FN:
            raise ValueError(
                f"classifier_activation={self.classifier_activation!r} is unknown; allowed are None and {known}"
            )
        if self.inverse_init not in INVERSE_INITS:
            raise ValueError(f"inverse_init={self.inverse_init!r} is unknown; allowed are {', '.join(INVERSE_INITS)}")
        if self.inverse_regularization is not None and not self.inverse_regularization > 0:
            raise ValueError(
                f"inverse_regularization={self.inverse_regularization} does not regularise; allowed are numbers above "
                "0 and None (the paper's iteration)"
            )
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name, False):
                raise ValueError(f"{name}=True would see the future; allowed is False, this model is an encoder")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is no token; allowed are None and 0 ... vocab_size - 1 = "
                f"{self.vocab_size - 1}"
            )


__all__ = ["NystromformerHFConfig"]
