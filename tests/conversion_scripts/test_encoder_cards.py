"""Conversions of encoders write a card with what they compared, and none for transformers' own class."""

import pytest
from huggingface_hub import ModelCard

from conversion_scripts import convert_bert_to_nystromformer, convert_nystromformer
from conversion_scripts.card_facts import read_facts
from conversion_scripts.cards import CardOptions, check_card
from tests.conversion_scripts.encoder_checkpoints import save_checkpoint


@pytest.mark.parametrize(
    ("head", "pipeline_tag"),
    [("masked-lm", "fill-mask"), ("sequence-classification", "text-classification"), ("none", "feature-extraction")],
)
def test_card_of_a_bert(head, pipeline_tag, tmp_path):
    save_checkpoint(tmp_path / "bert", "bert", head)
    (tmp_path / "bert" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# The original")
    options = CardOptions(base_model="someone/bert", model_id="me/ours", command="python -m this --way")
    difference = convert_bert_to_nystromformer.convert(
        str(tmp_path / "bert"), tmp_path / "ours", {"num_landmarks": 16}, max_position_embeddings=1024, card=options
    )
    data, facts = check_card(tmp_path / "ours").data, read_facts(tmp_path / "ours")
    assert (data.license, data.language, data.base_model) == ("mit", ["en"], "someone/bert")
    assert data.pipeline_tag == pipeline_tag
    (stage,) = facts.stages
    assert (stage.parity.difference, stage.parity.tokens) == (difference, 16)
    assert stage.parity.quantity == ("hidden states" if head == "none" else "logits")
    assert "repeated to 1,024" in stage.remarks[0]
    assert facts.settings["num_landmarks"] == 16
    text = (tmp_path / "ours" / "README.md").read_text()
    assert 'from_pretrained("me/ours", trust_remote_code=True)' in text
    assert "python -m this --way" in text
    assert "# The original" not in text


def test_card_of_a_nystromformer_and_none_on_the_way_back(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs", "nystromformer", "masked-lm", num_landmarks=8, segment_means_seq_len=64)
    said = []
    difference = convert_nystromformer.convert(str(tmp_path / "theirs"), tmp_path / "ours", say=said.append)
    facts = read_facts(tmp_path / "ours")
    assert facts.stages[0].parity.difference == difference
    assert facts.settings["num_landmarks"] == 8
    assert check_card(tmp_path / "ours").data.license is None
    assert any("name it with --license" in line for line in said)

    convert_nystromformer.convert(str(tmp_path / "ours"), tmp_path / "back", "nystromformer")
    assert not (tmp_path / "back" / "measurements.json").exists()


def test_options_reach_the_card(tmp_path, capsys):
    save_checkpoint(tmp_path / "bert", "bert", "none")
    arguments = [str(tmp_path / "bert"), str(tmp_path / "ours"), "--num-landmarks", "16", "--license", "apache-2.0"]
    convert_bert_to_nystromformer.main(arguments)
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert card.data.license == "apache-2.0"
    command = (
        "python -m conversion_scripts.convert_bert_to_nystromformer bert ours --num-landmarks 16 --license apache-2.0"
    )
    assert command in card.text
