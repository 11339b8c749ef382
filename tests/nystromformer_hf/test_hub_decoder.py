"""The Nyströmformer decoder on the Hub: pushed with its code, loaded where `nystromformer_hf` is not installed."""

from typing import ClassVar

from tests.hub_roundtrip import GenerativeHubRoundTrip
from tests.hub_session import PAD, VOCABULARY


class TestNystromformerDecoderOnTheHub(GenerativeHubRoundTrip):
    package = "nystromformer_hf"
    model_type = "nystromformer_hf_decoder"
    config_class = "NystromformerHFDecoderConfig"
    config: ClassVar = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "segment_size": 2,  # the near field is shorter than the inputs: landmarks take part
        "near_segments": 1,
        "num_sink_tokens": 1,
        "inverse_regularization": 1.5,
        "conv_kernel_size": 3,
        "pad_token_id": PAD,
    }
    heads: ClassVar = {
        "AutoModel": "NystromformerHFDecoderModel",
        "AutoModelForCausalLM": "NystromformerHFDecoderForCausalLM",
        "AutoModelForSequenceClassification": "NystromformerHFDecoderForSequenceClassification",
    }
    code: ClassVar = [
        "modeling_nystromformer_hf_decoder.py",
        "configuration_nystromformer_hf_decoder.py",
        "backends.py",
        "cache_nystromformer_hf_decoder.py",
        "causal_nystrom_attention.py",
        "checkpoints.py",
        "cpu_kernels.py",
        "encoder_cpu.py",
        "functions.py",
        "kernel_choice.py",
        "landmark_triton.py",
        "tiled_attention.py",
        "triton_tiles.py",
        "validation.py",
    ]
    pushed_heads: ClassVar = ["AutoModelForCausalLM", "AutoModelForSequenceClassification"]
