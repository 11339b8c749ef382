"""`python -m tests.conformance`: transformers' common model tests on our classes, with Llama as the control."""

import argparse
import json
import os
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

from . import fetch
from .suites import CONTROL, SUITES, Outcomes, Suite, Verdict, judge


HERE = Path(__file__).resolve().parent


class Recorder:
    """A pytest plugin that sorts the outcomes by class."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], Outcomes] = defaultdict(Outcomes)
        self.collection_errors: list[str] = []

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.collection_errors.append(f"{report.nodeid}\n{report.longreprtext}")

    def pytest_runtest_logreport(self, report) -> None:
        file, class_name, test = report.nodeid.split("::")[:3]
        outcomes = self.outcomes[Path(file).stem.removesuffix("_conformance"), class_name]
        outcomes.seconds += 0.0 if _is_subtest(report) else report.duration
        if report.failed:
            outcomes.failed.setdefault(test, _last_line(report))
            outcomes.passed.discard(test)
        elif report.skipped and _is_subtest(report):
            outcomes.partly_skipped.setdefault(test, set()).add(_reason(report))
        elif report.skipped:
            outcomes.skipped[test] = _reason(report)
        elif report.when == "call" and not _is_subtest(report) and test not in outcomes.failed:
            outcomes.passed.add(test)


def _is_subtest(report) -> bool:
    return hasattr(report, "context")


def _reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def _last_line(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else report.longreprtext
    return next((line.strip() for line in message.splitlines() if line.strip()), "no message")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Run the common model tests of the installed transformers, unmodified, on the classes of this "
        f"repository. {CONTROL} runs along as the control: whatever else a class of ours skips has to be explained in "
        "its conformance file. "
        "Exit status: 0 when nothing failed and every skip is accounted for, else 1.",
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=sorted(SUITES),
        help="run this model alone (repeatable): %(choices)s",
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the tests that match, as in pytest")
    parser.add_argument("-x", action="store_true", help="stop at the first failure")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, help=f"folder for the fetched tests (default: {fetch.cache_folder()})")
    parser.add_argument("--output", type=Path, help="file for the results as JSON (default: results.json in the cache)")
    return parser.parse_args(arguments)


def chosen_suites(only: list[str] | None) -> list[Suite]:
    names = [CONTROL, *(name for name in only or SUITES if name != CONTROL)]
    suites = []
    for suite in map(SUITES.get, names):
        if not suite.present or not (HERE / suite.file).exists():
            print(f"{suite.name}: not here ({suite.package} or {suite.file} is absent)")
        else:
            suites.append(suite)
    return suites


def run(suites: list[Suite], arguments: argparse.Namespace) -> Recorder:
    import pytest

    recorder = Recorder()
    # Upstream's tests carry markers and warnings of their own, so the repository's strict settings do not apply.
    options = ["-o", "addopts=", "-o", "verbosity_subtests=0", "-W", "ignore", "-p", "no:cacheprovider"]
    options += ["--quiet", "--tb=short", "--show-capture=no", "-rN", "-n", str(arguments.workers)]
    options += ["-k", arguments.k] if arguments.k else []
    options += ["-x"] if arguments.x else []
    pytest.main([*options, *(str(HERE / suite.file) for suite in suites)], plugins=[recorder])
    return recorder


def control_outcomes(recorder: Recorder) -> Outcomes:
    return next((outcomes for (suite, _), outcomes in recorder.outcomes.items() if suite == CONTROL), Outcomes())


def report(recorder: Recorder, verdicts: dict[tuple[str, str], Verdict]) -> None:
    for error in recorder.collection_errors:
        print(f"\ncould not be collected: {error}")
    for key, verdict in verdicts.items():
        outcomes = recorder.outcomes[key]
        sections = {
            "failed": outcomes.failed,
            "skipped, not by the control, explained": verdict.explained,
            "skipped, not by the control, NOT EXPLAINED": verdict.unexplained,
            "explained, but not skipped or skipped by the control too": dict.fromkeys(
                verdict.stale, "remove the explanation"
            ),
            "run by the control only": dict.fromkeys(verdict.missing, "missing"),
        }
        for title, tests in sections.items():
            if tests:
                print(f"\n{key[1]}: {title}")
                for test, message in sorted(tests.items()):
                    print(f"  {test}: {message[:300]}")

    print(
        f"\n{'':28}{'passed':>8}{'failed':>8}{'skipped':>9}{'of them explained':>19}{'unaccounted':>13}{'seconds':>9}"
    )
    for key, outcomes in recorder.outcomes.items():
        verdict = verdicts.get(key, Verdict())
        counts = f"{len(outcomes.passed):>8}{len(outcomes.failed):>8}{len(outcomes.skipped):>9}"
        print(f"{key[1]:28}{counts}{len(verdict.explained):>19}{verdict.problems:>13}{outcomes.seconds:>9.0f}")


def as_json(recorder: Recorder, verdicts: dict[tuple[str, str], Verdict]) -> dict:
    import torch
    import transformers

    classes = {
        name: {
            "suite": suite,
            "passed": sorted(outcomes.passed),
            "failed": outcomes.failed,
            "skipped": outcomes.skipped,
            "partly_skipped": {test: sorted(reasons) for test, reasons in outcomes.partly_skipped.items()},
            "explained": verdicts[suite, name].explained,
            "unexplained": verdicts[suite, name].unexplained,
            "seconds": round(outcomes.seconds, 1),
        }
        for (suite, name), outcomes in recorder.outcomes.items()
    }
    return {"transformers": transformers.__version__, "torch": torch.__version__, "classes": classes}


def main(arguments: list[str] | None = None) -> int:
    arguments = parse_arguments(arguments)
    # Inherited by the worker processes. Upstream's tests need no network once they are fetched.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.cache:
        os.environ[fetch.CACHE_VARIABLE] = str(arguments.cache.resolve())
    try:
        print(f"tests of transformers: {fetch.fetch_tests()}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1

    suites = chosen_suites(arguments.only)
    recorder = run(suites, arguments)

    control = control_outcomes(recorder)
    verdicts = {}
    for suite, class_name in recorder.outcomes:
        test_class = getattr(import_module(f".{suite}_conformance", __package__), class_name)
        verdicts[suite, class_name] = judge(recorder.outcomes[suite, class_name], control, test_class.explained_skips)
    report(recorder, verdicts)

    output = arguments.output or fetch.cache_folder() / "results.json"
    output.write_text(json.dumps(as_json(recorder, verdicts), indent=2) + "\n")
    everything = recorder.outcomes.values()
    passed, failed, skipped = (
        sum(len(getattr(o, name)) for o in everything) for name in ("passed", "failed", "skipped")
    )
    print(f"\nresults: {output}\n{passed} passed, {failed} failed, {skipped} skipped")

    silent = {suite.name for suite in suites} - {suite for suite, _ in recorder.outcomes}
    if silent and not arguments.k:
        print(f"no test ran for: {', '.join(sorted(silent))}")
    problems = failed + len(recorder.collection_errors) + sum(verdict.problems for verdict in verdicts.values())
    return 1 if problems or (silent and not arguments.k) or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
