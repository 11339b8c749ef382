"""Nyströmformer decoder configuration."""

from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .cache_nystromformer_hf_decoder import LAYER_TYPE
from .validation import at_least, multiple, raises_value_error


# The Trainer resumes through the base class of all configs, which knows layer types from this list only.
if LAYER_TYPE not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES:
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES += (LAYER_TYPE,)


@raises_value_error
@strict
class NystromformerHFDecoderConfig(PreTrainedConfig):
    r"""
    Configuration of a causal Nyströmformer: a Llama-shaped decoder that attends exactly to its first tokens and the recent
    segments of the text, and to one landmark for each older segment.

    Arguments shared with `LlamaConfig` mean what they mean there. Queries and keys are rotated by their position in the
    text and then averaged to landmarks, so texts longer than `max_position_embeddings` need `rope_parameters` for that
    length, as in Llama. The others:

    Args:
        segment_size (`int`, defaults to 64):
            Tokens of one landmark, c. With 1 the model is softmax attention.
        near_segments (`int`, defaults to 2):
            Segments before a token's own that it attends exactly. A near field as long as the text is softmax attention.
        num_sink_tokens (`int`, defaults to 4):
            First tokens of a text that stay attended exactly; segments are counted from the token behind them.
        inverse_regularization (`float`, *optional*):
            Start of γ > 1, learned per head: landmark values are (L + γI)⁻¹(BV + γPV), and the cache keeps every key, which is
            read once a segment. `None` is the limit of large γ, PV, each segment's own attention-pooled value.
        conv_kernel_size (`int`, *optional*):
            Taps of a causal depthwise convolution of the values, one kernel for each head, that is added to attention. It
            starts at zero. `None` is off.
        use_qk_norm (`bool`, defaults to `False`):
            RMS norm on each head of queries and keys, as in Qwen3.
        attention_output_bias (`bool`, *optional*):
            Bias of the output projection; defaults to `attention_bias`. Qwen2 has biases on queries, keys and values only.

    ```python
    >>> from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM

    >>> config = NystromformerHFDecoderConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=688)
    >>> model = NystromformerHFDecoderForCausalLM(config)
    ```"""

    model_type = "nystromformer_hf_decoder"
    _auto_class = "AutoConfig"  # a saved config brings this file along and names it in its `auto_map`
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    use_qk_norm: bool = False
    segment_size: int = 64
    near_segments: int = 2
    num_sink_tokens: int = 4
    inverse_regularization: float | int | None = None
    conv_kernel_size: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        # Before a division by it: a zero would not reach the validation below.
        at_least(self, "num_attention_heads", 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            multiple(self, "hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPE]
        self._resize_layer_types()
        super().__post_init__(**kwargs)
        # `@strict` runs these too, but puts another error around what they raise.
        self.validate_architecture()
        self.validate_layer_type()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "num_hidden_layers":
            # `from_pretrained` sets it afterwards, and so does self-speculation, for a while.
            self._resize_layer_types()

    def _resize_layer_types(self):
        """One for each layer, as the cache is built from them; a list of others is left for the validation."""
        if self.layer_types and set(self.layer_types) == {LAYER_TYPE}:
            self.layer_types = [LAYER_TYPE] * self.num_hidden_layers

    def validate_architecture(self):
        """Part of `@strict`-powered validation: names the field, its value and what is allowed."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_key_value_heads",
            "segment_size",
            "near_segments",
        ):
            at_least(self, name, 1)
        at_least(self, "num_sink_tokens", 0)
        multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} cannot carry rotary positions; allowed are even numbers from 2")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} is no probability; allowed are 0 <= p < 1")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; allowed are {', '.join(sorted(ACT2FN))}")
        if self.conv_kernel_size is not None and self.conv_kernel_size < 2:
            raise ValueError(
                f"conv_kernel_size={self.conv_kernel_size} mixes no tokens; allowed are None (off) and integers from 2"
            )
        if self.inverse_regularization is not None and not 1 < self.inverse_regularization < float("inf"):
            raise ValueError(
                f"inverse_regularization={self.inverse_regularization} does not bound the values of landmarks; allowed are "
                "finite numbers above 1 and None"
            )

    def validate_layer_type(self):
        """Replaces the library's fixed list of layer types by ours."""
        if self.layer_types != [LAYER_TYPE] * self.num_hidden_layers:
            raise ValueError(
                f"layer_types={self.layer_types} does not fit; allowed is {LAYER_TYPE!r} for each of "
                f"num_hidden_layers={self.num_hidden_layers} layers, or None"
            )


__all__ = ["NystromformerHFDecoderConfig"]
