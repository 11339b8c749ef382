"""KERMIT in the settings that take different paths through its attention.

The window is shorter than the tests' sequences, so that the far field takes part.
"""

import unittest

from kermit_hf import (
    KermitConfig,
    KermitForCausalLM,
    KermitForQuestionAnswering,
    KermitForSequenceClassification,
    KermitForTokenClassification,
    KermitModel,
)

from .testers import DecoderConformance


NEAR_FIELD = {"num_key_value_heads": 2, "window_size": 3, "num_sink_tokens": 1}

# Dynamic scaling is for distances beyond `max_position_embeddings`; in a kernel layer none exceeds the window.
NO_LONG_DISTANCES = {
    "test_model_rope_scaling_from_config_1_dynamic": "no rotary distance exceeds the window, so none is ever rescaled"
}
NO_POSITIONS = {
    f"test_model_rope_scaling_from_config_{name}": "positions act in the near field only, and there is none"
    for name in ("0_linear", "1_dynamic", "2_yarn")
}


class _Kermit(DecoderConformance):
    config_class = KermitConfig
    all_model_classes = (
        KermitModel,
        KermitForCausalLM,
        KermitForSequenceClassification,
        KermitForQuestionAnswering,
        KermitForTokenClassification,
    )


class KermitDelta(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "update_rule": "delta", "forget_gate": True, "conv_kernel_size": 4}
    explained_skips = NO_LONG_DISTANCES


class KermitAdditive(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "update_rule": "additive", "feature_map": "elu", "forget_gate": False}
    explained_skips = NO_LONG_DISTANCES


class KermitFavor(_Kermit, unittest.TestCase):
    """Random features, which have to be drawn, saved and restored."""

    config_arguments = {**NEAR_FIELD, "update_rule": "additive", "feature_map": "favor", "feature_dim": 16}
    explained_skips = NO_LONG_DISTANCES


class KermitPureKernel(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "window_size": 0, "num_sink_tokens": 0, "update_rule": "delta"}
    explained_skips = NO_POSITIONS


class KermitHybrid(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "layer_types": ["kernel_attention", "full_attention"]}
