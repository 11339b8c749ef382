"""KERMIT model configuration."""

from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .cache_kermit import LAYER_TYPE
from .far_field import UPDATE_RULES
from .feature_maps import FEATURE_MAPS
from .validation import at_least, multiple, raises_value_error


LAYER_TYPES = (LAYER_TYPE, "full_attention", "sliding_attention")

# The Trainer reads a checkpoint's config as a plain `PreTrainedConfig` before it resumes.
if LAYER_TYPE not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES:
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES += (LAYER_TYPE,)


@raises_value_error
@strict
class KermitConfig(PreTrainedConfig):
    r"""
    Configuration of a KERMIT model: a Llama-shaped decoder whose attention is exact over a window of recent tokens and a
    few sink tokens (near field) and reads everything older from a kernel memory of constant size (far field).

    The defaults are the settings that remember best in our measurements (`python -m tests.benchmarks.learning`; two layers,
    a window of 32). Recall of pairs beyond the window, mean of three seeds: 0.96, with a forget gate 0.88; one seed, with a gate:
    without convolution 0.34, `"elu"` 0.89, `"dpfp"` 0.95, the additive rule 0.14 to 0.36. Of a language model trained briefly
    on texts of 512 tokens they are not the best: perplexity 182, with a forget gate 186, but 162 for the additive rule with
    `"hedgehog"` and a gate, and 160 for softmax over everything. Where recall does not matter, take that one.

    Arguments shared with `LlamaConfig` mean what they mean there. The others:

    Args:
        window_size (`int`, defaults to 128):
            Tokens, the query's own included, that are attended exactly. 0 is pure kernel attention; a window at least as
            long as the text is softmax attention.
        num_sink_tokens (`int`, *optional*):
            First tokens of a text that stay attended exactly, at most `window_size`. Defaults to 4, or to 0 where
            `window_size` is 0.
        update_rule (`str`, defaults to `"delta"`):
            How the memory takes up a token: `"additive"` (linear attention; shares its denominator with the near field)
            or `"delta"` (online regression: overwrites what the key recalled before).
        feature_map (`str`, *optional*):
            Name of the feature map: `"elu"`, `"relu"`, `"favor"`, `"taylor"`, `"hedgehog"`, `"dpfp"`, `"silu_l2"` or one
            added by `register_feature_map`. Defaults to `"silu_l2"` for the delta rule, `"hedgehog"` for the additive.
        feature_dim (`int`, *optional*):
            Size of the feature map; each map states what it counts and its default.
        forget_gate (`bool`, defaults to `False`):
            Whether the memory decays by a factor that each token sets, per key/value head.
        conv_kernel_size (`int`, defaults to 4):
            Taps of a depthwise convolution, causal where the model is, on queries, keys and values, which starts as the
            identity. 0 is off.
        is_causal (`bool`, defaults to `True`):
            `False` makes an encoder: the window looks both ways and the memory covers the whole text.
        layer_types (`list[str]`, *optional*):
            Per layer `"kernel_attention"` (all of them by default), `"full_attention"` or `"sliding_attention"`.
        sliding_window (`int`, *optional*):
            Window of `"sliding_attention"` layers, required where there are any.
        use_qk_norm (`bool`, defaults to `False`):
            RMS norm on each head of queries and keys, as in Qwen3.
        attention_output_bias (`bool`, *optional*):
            Bias of the output projection; defaults to `attention_bias`. Qwen2 has biases on queries, keys and values only.

    ```python
    >>> from kermit_hf import KermitConfig, KermitForCausalLM

    >>> config = KermitConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=688)
    >>> model = KermitForCausalLM(config)
    ```"""

    model_type = "kermit"
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
    max_position_embeddings: int = 131072
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
    window_size: int = 128
    num_sink_tokens: int | None = None
    update_rule: str = "delta"
    feature_map: str | None = None
    feature_dim: int | None = None
    forget_gate: bool = False
    conv_kernel_size: int = 4
    is_causal: bool = True
    layer_types: list[str] | None = None
    sliding_window: int | None = None

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
        if self.num_sink_tokens is None:
            self.num_sink_tokens = min(4, self.window_size)
        if self.feature_map is None:
            self.feature_map = "silu_l2" if self.update_rule == "delta" else "hedgehog"
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # `@strict` runs these too, but puts another error around what they raise.
        self.validate_architecture()
        self.validate_layer_type()

    def validate_architecture(self):
        """Part of `@strict`-powered validation: names the field, its value and what is allowed."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"):
            at_least(self, name, 1)
        multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} cannot carry rotary positions; allowed are even numbers from 2")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} is no probability; allowed are 0 <= p < 1")
        for name in ("window_size", "num_sink_tokens", "conv_kernel_size"):
            at_least(self, name, 0)
        if self.num_sink_tokens > self.window_size:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} exceeds window_size={self.window_size}; allowed are 0 ... window_size"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; allowed are {', '.join(sorted(ACT2FN))}")
        if self.conv_kernel_size == 1:
            raise ValueError("conv_kernel_size=1 mixes no tokens; allowed are 0 (off) and integers from 2")
        if self.update_rule not in UPDATE_RULES:
            raise ValueError(f"update_rule={self.update_rule!r} is unknown; allowed are {', '.join(UPDATE_RULES)}")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map={self.feature_map!r} is unknown; allowed are {', '.join(sorted(FEATURE_MAPS))}, "
                "and what register_feature_map adds"
            )
        feature_map = FEATURE_MAPS[self.feature_map]
        feature_map.validate(self.head_dim, self.feature_dim)
        if self.update_rule == "additive" and not feature_map.is_positive:
            positive = ", ".join(sorted(name for name, cls in FEATURE_MAPS.items() if cls.is_positive))
            raise ValueError(
                f"feature_map={self.feature_map!r} gives negative products, by whose sum update_rule='additive' cannot divide; "
                f"allowed are {positive}, or update_rule='delta'"
            )

    def fit_layer_types(self):
        """After a change of `num_hidden_layers`: the first layers keep their types; where all are of one type, so are more."""
        layers = self.num_hidden_layers
        is_uniform = len(set(self.layer_types)) == 1
        self.layer_types = self.layer_types[:1] * layers if is_uniform else self.layer_types[:layers]

    def validate_layer_type(self):
        """Replaces the library's fixed list of layer types by ours."""
        unknown = sorted({name for name in self.layer_types if name not in LAYER_TYPES})
        if unknown:
            raise ValueError(
                f"layer_types contains {', '.join(map(repr, unknown))}; allowed are {', '.join(LAYER_TYPES)}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers; allowed is num_hidden_layers={self.num_hidden_layers}"
            )
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                f"sliding_window={self.sliding_window} does not fit layer_types with 'sliding_attention'; allowed are "
                "integers from 1"
            )


__all__ = ["KermitConfig"]
