"""What a long text costs as it grows, and that the figures reach the card."""

import json

import pytest
import torch
from transformers import set_seed

from conversion_scripts import long_generation, perplexity
from conversion_scripts.card_facts import THIS_MODEL, read_facts
from conversion_scripts.convert_llama import convert

from .llama_checkpoints import save_checkpoint


pytest.importorskip("psutil")

SETTINGS = {"window_size": 8, "num_sink_tokens": 2}


@pytest.fixture
def kermit(tmp_path):
    save_checkpoint(tmp_path / "llama")
    convert(str(tmp_path / "llama"), tmp_path / "kermit", "kermit", SETTINGS)
    return tmp_path / "kermit"


def test_stream_is_what_generate_gives(kermit, capsys):
    model = perplexity.load_model(str(kermit))[0]
    tokenizer = perplexity.load_tokenizer(str(kermit))
    set_seed(0)
    reports = long_generation.stream(model, tokenizer, "the state", 12, 4)
    printed = capsys.readouterr().out
    assert [report["tokens"] for report in reports] == [4, 8, 12]
    assert all(report["tokens_per_second"] > 0 and report["process_bytes"] > 1e6 for report in reports)

    set_seed(0)
    inputs = tokenizer("the state", return_tensors="pt")
    output = model.generate(**inputs, min_new_tokens=12, max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.95)
    letters = "".join(part for part in printed.split("\n") if not part.startswith("[")).replace(" ", "")
    assert tokenizer.decode(output[0]).replace("\n", "").replace(" ", "") == letters


def test_cost_of_a_kermit_stays_and_that_of_softmax_grows(kermit):
    model = perplexity.load_model(str(kermit))[0]
    llama = perplexity.load_model(str(kermit.parent / "llama"))[0]
    costs = long_generation.measure_cost({"ours": model, "theirs": llama}, [64, 256]).costs
    assert [entry["length"] for entry in costs["ours"]] == [64, 256]
    # 2 tensors, 2 layers, 2 heads of 16, 4 bytes; 16 tokens of each measurement stay in the cache.
    assert [entry["cache_bytes"] for entry in costs["theirs"]] == [
        (length + 16) * 2 * 2 * 2 * 16 * 4 for length in (64, 256)
    ]
    assert costs["ours"][0]["cache_bytes"] == costs["ours"][1]["cache_bytes"]
    assert all(entry["seconds_per_token"] > 0 for entries in costs.values() for entry in entries)


def test_command_line_puts_the_cost_into_the_card(kermit, tmp_path, capsys):
    before = read_facts(kermit)
    arguments = [str(kermit), "--original", str(kermit.parent / "llama"), "--new-tokens", "4", "--interval", "2"]
    arguments += ["--lengths", "64", "16", "--output", str(tmp_path / "cost.json")]
    long_generation.main(arguments)
    facts, results = read_facts(kermit), json.loads((tmp_path / "cost.json").read_text())
    assert facts.stages == before.stages
    assert list(facts.cost.costs) == [THIS_MODEL, "original"]
    assert facts.cost.costs == results["cost"]["costs"]
    assert [entry["length"] for entry in facts.cost.costs[THIS_MODEL]] == [16, 64]
    assert len(results["stream"]) == 2
    assert "## Cost by length" in (kermit / "README.md").read_text()
    assert "original: 64 tokens" in capsys.readouterr().out


def test_without_lengths_the_card_stays(kermit):
    before = (kermit / "README.md").read_text()
    long_generation.main([str(kermit), "--new-tokens", "2", "--lengths"])
    assert (kermit / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--interval", "0"], "--interval is positive"),
        (["--new-tokens", "-1"], "--new-tokens may be 0"),
        (["--lengths", "0"], "--lengths are positive and more than 16 apart"),
        (["--lengths", "16", "32"], "more than 16 apart"),
    ],
)
def test_bad_numbers(extra, match, kermit, capsys):
    with pytest.raises(SystemExit):
        long_generation.main([str(kermit), *extra])
    assert match in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"^long_generation: .* does not exist"):
        long_generation.main([str(tmp_path / "absent")])


def test_memory_of_the_process_is_in_the_reports(kermit, capsys):
    model = perplexity.load_model(str(kermit))[0]
    held = torch.ones(40 * 2**20)
    reports = long_generation.stream(model, perplexity.load_tokenizer(str(kermit)), "x", 2, 1)
    assert all(report["process_bytes"] > held.nbytes for report in reports)
