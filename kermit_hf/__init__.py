"""KERMIT for Hugging Face Transformers. Importing the package registers it with the Auto classes."""

import transformers

from .backends import kernel_backend
from .cache_kermit import KermitCacheLayer, KermitStaticCacheLayer
from .configuration_kermit import KermitConfig
from .feature_maps import FEATURE_MAPS, FeatureMap, register_feature_map
from .modeling_kermit import (
    AUTO_CLASSES,
    KermitForCausalLM,
    KermitForQuestionAnswering,
    KermitForSequenceClassification,
    KermitForTokenClassification,
    KermitModel,
    KermitPreTrainedModel,
)


transformers.AutoConfig.register(KermitConfig.model_type, KermitConfig)
for _auto_class, _head in AUTO_CLASSES.items():
    getattr(transformers, _auto_class).register(KermitConfig, _head)

__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "KermitCacheLayer",
    "KermitConfig",
    "KermitForCausalLM",
    "KermitForQuestionAnswering",
    "KermitForSequenceClassification",
    "KermitForTokenClassification",
    "KermitModel",
    "KermitPreTrainedModel",
    "KermitStaticCacheLayer",
    "kernel_backend",
    "register_feature_map",
]
