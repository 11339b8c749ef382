"""KERMIT on the Hub: pushed with its code, loaded where `kermit_hf` is not installed."""

from typing import ClassVar

from tests.hub_roundtrip import GenerativeHubRoundTrip
from tests.hub_session import PAD, VOCABULARY


class TestKermitOnTheHub(GenerativeHubRoundTrip):
    package = "kermit_hf"
    model_type = "kermit"
    config_class = "KermitConfig"
    config: ClassVar = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "window_size": 4,  # shorter than the inputs: the far field takes part
        "num_sink_tokens": 1,
        "layer_types": ["kernel_attention", "full_attention"],
        "update_rule": "additive",
        "feature_map": "favor",  # its random features travel with the weights
        "pad_token_id": PAD,
    }
    heads: ClassVar = {
        "AutoModel": "KermitModel",
        "AutoModelForCausalLM": "KermitForCausalLM",
        "AutoModelForSequenceClassification": "KermitForSequenceClassification",
        "AutoModelForTokenClassification": "KermitForTokenClassification",
        "AutoModelForQuestionAnswering": "KermitForQuestionAnswering",
    }
    code: ClassVar = [
        "modeling_kermit.py",
        "configuration_kermit.py",
        "additive_cpu.py",
        "attention_layers.py",
        "backends.py",
        "cache_kermit.py",
        "checkpoints.py",
        "cpu_kernels.py",
        "delta_cpu.py",
        "depthwise_conv.py",
        "far_field.py",
        "favor_cpu.py",
        "feature_maps.py",
        "fla_kernels.py",
        "functions.py",
        "kermit_attention.py",
        "kernel_attention.py",
        "kernel_choice.py",
        "padding.py",
        "slots.py",
        "step_cpu.py",
        "taylor_triton.py",
        "triton_tiles.py",
        "validation.py",
        "window_attention.py",
        "window_cpu.py",
        "window_triton.py",
    ]
    pushed_heads: ClassVar = ["AutoModelForCausalLM", "AutoModelForSequenceClassification"]
