"""transformers' own common model tests, run unmodified on the classes of this repository.

`python -m tests.conformance` fetches the source distribution of the installed transformers (its wheel has no tests)
and runs `ModelTesterMixin` and `TrainingTesterMixin` on every `*_conformance.py` here. These files are not part of
`make test`.
"""
