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


class KermitAdditive(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "update_rule": "additive", "feature_map": "elu", "forget_gate": False}


class KermitFavor(_Kermit, unittest.TestCase):
    """Random features: buffers that have to be drawn, saved and restored."""

    config_arguments = {**NEAR_FIELD, "update_rule": "additive", "feature_map": "favor", "feature_dim": 16}


class KermitPureKernel(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "window_size": 0, "num_sink_tokens": 0, "update_rule": "delta"}


class KermitHybrid(_Kermit, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "layer_types": ["kernel_attention", "full_attention"]}
