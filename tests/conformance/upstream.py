"""Imports upstream's test mixins; what their files import but the source distribution lacks is supplied as empty stubs.

The files themselves stay as they were published.
"""

import sys
from importlib import import_module
from types import ModuleType

from transformers.models.auto import auto_factory, modeling_auto

from .fetch import PACKAGE, fetch_tests


# module -> the one name that is imported from it. Both are further mixins, for exporting a model and for `generate()`.
STUBS = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}


def _import_mixins() -> tuple[type, type, type]:
    folder = str(fetch_tests())
    if folder not in sys.path:
        sys.path.append(folder)
    for path, name in STUBS.items():
        try:
            import_module(f"{PACKAGE}.{path}")
        except ModuleNotFoundError:
            package = f"{PACKAGE}.{path.split('.')[0]}"
            sys.modules.setdefault(package, ModuleType(package))
            stub = ModuleType(f"{PACKAGE}.{path}")
            setattr(stub, name, type(name, (), {"__doc__": "Stub: not in the source distribution."}))
            sys.modules[stub.__name__] = stub

    modeling = import_module(f"{PACKAGE}.test_modeling_common")
    training = import_module(f"{PACKAGE}.test_training_mixin")
    return modeling.ModelTesterMixin, training.TrainingTesterMixin, modeling.GenerationTesterMixin


ModelTesterMixin, TrainingTesterMixin, GenerationTesterMixin = _import_mixins()


def announce(model_class: type) -> bool:
    """Enter a class into transformers' tables of names, if an Auto class knows it; return whether one does.

    The tests decide by these tables (`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, …) which labels a class takes and which class
    is the base model. `AutoModel.register` does not write to them, so without this step many tests would pass over our
    classes and prove nothing.
    """
    known = False
    for mapping in vars(modeling_auto).values():
        if isinstance(mapping, auto_factory._LazyAutoMapping):
            for config_class, registered in mapping._extra_content.items():
                if registered is model_class:
                    mapping._model_mapping[config_class.model_type] = model_class.__name__
                    known = True
            known = known or model_class.__name__ in mapping._model_mapping.values()
    return known
