"""Nyströmformer (Xiong et al. 2021) for Hugging Face Transformers: importing the package registers its classes."""

import transformers

from .backends import kernel_backend
from .cache_nystromformer_hf_decoder import (
    NystromformerHFDecoderCacheLayer,
    NystromformerHFDecoderStaticCacheLayer,
)
from .configuration_nystromformer_hf import NystromformerHFConfig
from .configuration_nystromformer_hf_decoder import NystromformerHFDecoderConfig
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
from .modeling_nystromformer_hf_decoder import AUTO_CLASSES as DECODER_AUTO_CLASSES
from .modeling_nystromformer_hf_decoder import (
    NystromformerHFDecoderForCausalLM,
    NystromformerHFDecoderForSequenceClassification,
    NystromformerHFDecoderModel,
    NystromformerHFDecoderPreTrainedModel,
)


transformers.AutoConfig.register(NystromformerHFConfig.model_type, NystromformerHFConfig)
for auto_class, head in AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(NystromformerHFConfig, head)

transformers.AutoConfig.register(NystromformerHFDecoderConfig.model_type, NystromformerHFDecoderConfig)
for auto_class, head in DECODER_AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(NystromformerHFDecoderConfig, head)

__all__ = [
    "NystromformerHFConfig",
    "NystromformerHFDecoderCacheLayer",
    "NystromformerHFDecoderConfig",
    "NystromformerHFDecoderForCausalLM",
    "NystromformerHFDecoderForSequenceClassification",
    "NystromformerHFDecoderModel",
    "NystromformerHFDecoderPreTrainedModel",
    "NystromformerHFDecoderStaticCacheLayer",
    "NystromformerHFForMaskedLM",
    "NystromformerHFForMultipleChoice",
    "NystromformerHFForQuestionAnswering",
    "NystromformerHFForSequenceClassification",
    "NystromformerHFForTokenClassification",
    "NystromformerHFModel",
    "NystromformerHFPreTrainedModel",
    "kernel_backend",
]
