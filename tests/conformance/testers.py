"""What upstream's mixins ask of a model: a tiny config, inputs for it, and the classes to test.

A new model needs one file `NAME_conformance.py` with a subclass of `DecoderConformance` or `EncoderConformance`, and a
line in `suites.py`.
"""

from typing import Any, ClassVar

import torch

from .upstream import GenerationTesterMixin, ModelTesterMixin, TrainingTesterMixin, announce


class TextModelTester:
    """Builds configs and inputs; its attributes carry the names that upstream's tests read."""

    batch_size = 13
    seq_length = 7
    num_choices = 3
    num_labels = 3
    is_training = True

    def __init__(self, config_class: type, model_classes: tuple[type, ...], config_arguments: dict[str, Any]):
        self.config_class = config_class
        self.config_arguments = {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            **config_arguments,
        }
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id"):
            setattr(self, name, self.config_arguments[name])
        # `TrainingTesterMixin` trains on one label per token with the class of this name: masked LM, for an encoder.
        self.causal_lm_class = self._find(model_classes, "ForCausalLM") or self._find(model_classes, "ForMaskedLM")
        self.sequence_classification_class = self._find(model_classes, "ForSequenceClassification")

    @staticmethod
    def _find(model_classes: tuple[type, ...], ending: str) -> type | None:
        return next((model_class for model_class in model_classes if model_class.__name__.endswith(ending)), None)

    def get_config(self):
        return self.config_class(**self.config_arguments)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """Random tokens, `(batch, seq)`, right-padded: row i has i + 1 real tokens until the rows are full."""
        shape = (self.batch_size, self.seq_length)
        # The padding token stays out: among the real tokens it would be ambiguous.
        input_ids = torch.randint(1, self.vocab_size, shape)
        attention_mask = torch.ones(shape, dtype=torch.long).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class _Conformance(ModelTesterMixin, TrainingTesterMixin):
    config_class: ClassVar[type]
    config_arguments: ClassVar[dict[str, Any]] = {}
    # Tests that cannot apply to this class, each with the reason: they are skipped, and the report lists them.
    explained_skips: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        # Checked first: the mixins wrap every test into a new attribute of the class.
        for name in vars(cls):
            upstream = hasattr(ModelTesterMixin, name) or hasattr(TrainingTesterMixin, name)
            if upstream and name.startswith("test_") and callable(vars(cls)[name]):
                raise TypeError(f"{cls.__name__} redefines upstream's {name}; the tests are to run as they are")
        super().__init_subclass__(**kwargs)

    # Declared as a property by `TrainingTesterMixin`; `setUp` gives every test a fresh one.
    model_tester = None

    def setUp(self) -> None:
        if self._testMethodName in self.explained_skips:
            self.skipTest(self.explained_skips[self._testMethodName])
        self.model_tester = TextModelTester(self.config_class, self.all_model_classes, self.config_arguments)
        self.unknown_classes = [c.__name__ for c in self.all_model_classes if not announce(c)]

    def test_every_class_is_known_to_an_auto_class(self) -> None:
        self.assertEqual(self.unknown_classes, [])


class DecoderConformance(_Conformance, GenerationTesterMixin):
    """For models that generate."""


class EncoderConformance(_Conformance):
    """For models that do not."""
