"""The judgement of skips has to notice what the harness exists to notice."""

from tests.conformance.suites import Outcomes, judge


CONTROL = Outcomes(
    passed={"test_training", "test_loading"},
    skipped={"test_gpu": "test requires accelerator", "test_moe": "LlamaModel has no experts"},
    partly_skipped={"test_loading": {"No conversion for <class 'transformers.LlamaModel'>"}},
)


def test_the_same_skip_for_the_same_reason_is_accepted():
    ours = Outcomes(
        passed={"test_training", "test_loading"},
        skipped={"test_gpu": "test requires accelerator", "test_moe": "KermitForCausalLM has no experts"},
        partly_skipped={"test_loading": {"No conversion for <class 'kermit_hf.modeling_kermit.KermitModel'>"}},
    )
    assert judge(ours, CONTROL, {}).problems == 0


def test_a_skip_that_the_control_does_not_have_needs_an_explanation():
    ours = Outcomes(passed={"test_loading"}, skipped={**CONTROL.skipped, "test_training": "not configured"})
    assert judge(ours, CONTROL, {}).unexplained == {"test_training": "not configured"}
    verdict = judge(ours, CONTROL, {"test_training": "frozen by design"})
    assert verdict.problems == 0
    assert verdict.explained == {"test_training": "frozen by design"}


def test_another_reason_for_the_same_skip_needs_an_explanation():
    ours = Outcomes(passed={"test_training", "test_loading"}, skipped={**CONTROL.skipped, "test_gpu": "no attentions"})
    assert judge(ours, CONTROL, {}).unexplained == {"test_gpu": "no attentions"}


def test_a_skip_for_some_classes_only_is_noticed():
    ours = Outcomes(
        passed={"test_training", "test_loading"}, skipped=CONTROL.skipped, partly_skipped={"test_training": {"no head"}}
    )
    assert judge(ours, CONTROL, {}).unexplained == {"test_training": "no head"}


def test_stale_explanations_and_missing_tests_are_problems():
    ours = Outcomes(passed={"test_training"}, skipped=CONTROL.skipped)
    verdict = judge(ours, CONTROL, {"test_training": "no longer true", "test_gpu": "the control skips it too"})
    assert verdict.stale == ["test_gpu", "test_training"]
    assert verdict.missing == ["test_loading"]
