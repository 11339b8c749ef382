"""The Nyströmformer encoder on the Hub: pushed with its code, loaded where `nystromformer_hf` is not installed."""

from typing import ClassVar

from tests.hub_roundtrip import HubRoundTrip
from tests.hub_session import PAD, VOCABULARY


class TestNystromformerEncoderOnTheHub(HubRoundTrip):
    package = "nystromformer_hf"
    model_type = "nystromformer_hf"
    config_class = "NystromformerHFConfig"
    config: ClassVar = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_landmarks": 4,  # fewer than tokens: the Nyström path takes part
        "conv_kernel_size": 3,
        "pad_token_id": PAD,
    }
    heads: ClassVar = {
        "AutoModel": "NystromformerHFModel",
        "AutoModelForMaskedLM": "NystromformerHFForMaskedLM",
        "AutoModelForSequenceClassification": "NystromformerHFForSequenceClassification",
        "AutoModelForTokenClassification": "NystromformerHFForTokenClassification",
        "AutoModelForQuestionAnswering": "NystromformerHFForQuestionAnswering",
        "AutoModelForMultipleChoice": "NystromformerHFForMultipleChoice",
    }
    code: ClassVar = [
        "modeling_nystromformer_hf.py",
        "configuration_nystromformer_hf.py",
        "backends.py",
        "checkpoints.py",
        "cpu_kernels.py",
        "encoder_cpu.py",
        "functions.py",
        "kernel_choice.py",
        "landmark_triton.py",
        "nystrom_attention.py",
        "triton_tiles.py",
        "validation.py",
    ]
    pushed_heads: ClassVar = ["AutoModelForMaskedLM"]
