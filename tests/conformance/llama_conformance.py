"""The control: what upstream's own Llama skips, ours may skip."""

import unittest

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from .testers import DecoderConformance


class LlamaConformance(DecoderConformance, unittest.TestCase):
    config_class = LlamaConfig
    config_arguments = {"num_key_value_heads": 2}
    all_model_classes = (
        LlamaModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForQuestionAnswering,
        LlamaForTokenClassification,
    )
