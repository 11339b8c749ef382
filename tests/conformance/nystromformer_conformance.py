"""The Nyströmformer encoder, with fewer landmarks than the tests' sequences have tokens."""

import unittest

from nystromformer_hf import (
    NystromformerHFConfig,
    NystromformerHFForMaskedLM,
    NystromformerHFForMultipleChoice,
    NystromformerHFForQuestionAnswering,
    NystromformerHFForSequenceClassification,
    NystromformerHFForTokenClassification,
    NystromformerHFModel,
)

from .testers import EncoderConformance


NO_ROTARY = "positions are a learned table, as in the published model"
NO_PLAN = "no tensor-parallel plan, as in BERT and transformers' own Nyströmformer"


class Nystromformer(EncoderConformance, unittest.TestCase):
    config_class = NystromformerHFConfig
    config_arguments = {"num_landmarks": 3, "conv_kernel_size": 3}
    all_model_classes = (
        NystromformerHFModel,
        NystromformerHFForMaskedLM,
        NystromformerHFForSequenceClassification,
        NystromformerHFForQuestionAnswering,
        NystromformerHFForTokenClassification,
        NystromformerHFForMultipleChoice,
    )
    explained_skips = {
        "test_causal_lm_loss_honors_shift_labels": "an encoder has no causal language modelling head",
        "test_model_rope_scaling_frequencies": NO_ROTARY,
        "test_model_rope_scaling_from_config_0_linear": NO_ROTARY,
        "test_model_rope_scaling_from_config_1_dynamic": NO_ROTARY,
        "test_model_rope_scaling_from_config_2_yarn": NO_ROTARY,
        "test_model_rope_with_partial_rotation": NO_ROTARY,
        "test_tied_head_has_a_tp_plan_entry": NO_PLAN,
        "test_tp_plan_matches_params": NO_PLAN,
    }
