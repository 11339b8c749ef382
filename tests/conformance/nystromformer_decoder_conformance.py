"""The Nyströmformer decoder in the settings that take different paths through its attention.

The near field is shorter than the tests' sequences, so that landmarks take part.
"""

import unittest

from nystromformer_hf import (
    NystromformerHFDecoderConfig,
    NystromformerHFDecoderForCausalLM,
    NystromformerHFDecoderForSequenceClassification,
    NystromformerHFDecoderModel,
)

from .testers import DecoderConformance


NEAR_FIELD = {"num_key_value_heads": 2, "segment_size": 2, "near_segments": 1, "num_sink_tokens": 1}


class _NystromformerDecoder(DecoderConformance):
    config_class = NystromformerHFDecoderConfig
    all_model_classes = (
        NystromformerHFDecoderModel,
        NystromformerHFDecoderForCausalLM,
        NystromformerHFDecoderForSequenceClassification,
    )


class NystromformerDecoderPooled(_NystromformerDecoder, unittest.TestCase):
    config_arguments = NEAR_FIELD


class NystromformerDecoderRegularized(_NystromformerDecoder, unittest.TestCase):
    config_arguments = {**NEAR_FIELD, "inverse_regularization": 1.5, "conv_kernel_size": 3}
