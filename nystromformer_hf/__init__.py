"""Nyströmformer (Xiong et al. 2021) for Hugging Face Transformers: importing the package registers its classes."""

import transformers

from .configuration_nystromformer_hf import NystromformerHFConfig
from .modeling_nystromformer_hf import (
    AUTO_CLASSES,
    NystromformerHFForMaskedLM,
    NystromformerHFForMultipleChoice,
    NystromformerHFForQuestionAnswering,
    NystromformerHFForSequenceClassification,
    NystromformerHFForTokenClassification,
    NystromformerHFModel,
    NystromformerHFPreTrainedModel,
)


transformers.AutoConfig.register(NystromformerHFConfig.model_type, NystromformerHFConfig)
for auto_class, head in AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(NystromformerHFConfig, head)

__all__ = [
    "NystromformerHFConfig",
    "NystromformerHFForMaskedLM",
    "NystromformerHFForMultipleChoice",
    "NystromformerHFForQuestionAnswering",
    "NystromformerHFForSequenceClassification",
    "NystromformerHFForTokenClassification",
    "NystromformerHFModel",
    "NystromformerHFPreTrainedModel",
]
