"""Which models the harness runs, and the judgement of what they skip."""

import re
from dataclasses import dataclass, field
from importlib.util import find_spec


CONTROL = "llama"


@dataclass(frozen=True)
class Suite:
    """`NAME_conformance.py`, run when `package` can be found."""

    name: str
    package: str

    @property
    def file(self) -> str:
        return f"{self.name}_conformance.py"

    @property
    def present(self) -> bool:
        spec = find_spec(self.package)
        return spec is not None and spec.origin is not None  # a folder without `__init__.py` has no origin


SUITES = {
    suite.name: suite
    for suite in (
        Suite(CONTROL, package="transformers"),
        Suite("kermit", package="kermit_hf"),
        Suite("nystromformer", package="nystromformer_hf"),
        Suite("nystromformer_decoder", package="nystromformer_hf"),
    )
}


@dataclass
class Outcomes:
    """What happened to the tests of one class: the test's name -> message or reason."""

    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    # A test that passed as a whole may have skipped for some classes of the model.
    partly_skipped: dict[str, set[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def run(self) -> set[str]:
        return self.passed | set(self.failed) | set(self.skipped)

    def skip_reasons(self) -> dict[str, set[str]]:
        """Every reason for which a test was skipped, wholly or for some classes, without the names of classes."""
        reasons = {test: {_without_names(reason)} for test, reason in self.skipped.items()}
        for test, partial in self.partly_skipped.items():
            reasons.setdefault(test, set()).update(map(_without_names, partial))
        return reasons


def _without_names(reason: str) -> str:
    """`KermitModel does not support SDPA` and `LlamaModel does not support SDPA` are the same reason."""
    reason = re.sub(r"<class '[^']*'>", "CLASS", reason)
    return re.sub(r"\b\w+(Model|For\w+)\b", "CLASS", reason)


@dataclass
class Verdict:
    """How a class's skips compare with the control's."""

    explained: dict[str, str] = field(default_factory=dict)
    unexplained: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def problems(self) -> int:
        return len(self.unexplained) + len(self.stale) + len(self.missing)


def judge(ours: Outcomes, control: Outcomes, explanations: dict[str, str]) -> Verdict:
    """A skip is fine when the control skips the same test for the same reason, or when it is explained.

    An explanation that no skip needs is stale, and a test that only the control ran is missing: both count as problems.
    """
    verdict = Verdict(missing=sorted(control.run - ours.run))
    allowed = control.skip_reasons()
    for test, reasons in sorted(ours.skip_reasons().items()):
        new = reasons - allowed.get(test, set())
        if new:
            target = verdict.explained if test in explanations else verdict.unexplained
            target[test] = explanations.get(test, "; ".join(sorted(new)))
    verdict.stale = sorted(test for test in explanations if test in ours.run and test not in verdict.explained)
    return verdict
