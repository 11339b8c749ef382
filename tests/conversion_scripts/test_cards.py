"""A card says what the facts say, all of it and nothing else, in metadata that the Hub takes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from conversion_scripts import cards
from conversion_scripts.card_facts import (
    Approximation,
    Cost,
    Facts,
    Parity,
    Perplexity,
    Stage,
    Training,
    read_facts,
    write_facts,
)
from conversion_scripts.cards import (
    ARCHITECTURES,
    CardOptions,
    check_card,
    command_line,
    hub_snapshot,
    source_facts,
    write_card,
)
from conversion_scripts.checkpoint_files import ConversionError


SETTINGS = {
    "kermit": {
        "window_size": 1536,
        "num_sink_tokens": 7,
        "update_rule": "delta",
        "feature_dim": None,
        "forget_gate": True,
        "layer_types": ["kernel_attention", "kernel_attention", "full_attention"],
    },
    "nystromformer_hf": {"num_landmarks": 48, "conv_kernel_size": 65, "inverse_init": "original"},
    "nystromformer_hf_decoder": {"segment_size": 19, "near_segments": 13, "inverse_regularization": None},
}
CONVERSION = Stage(
    "Conversion",
    source="someone/original",
    revision="0123abc",
    command="python -m conversion_scripts.convert_llama someone/original ours --to kermit",
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    remarks=["12 tensors that the source lacks start as in a new model, seed 3."],
    parity=Parity(difference=5.83e-6, tokens=1234, dtype="float32", tolerance=1e-3),
)
TRAINING = Stage(
    "Distillation",
    command="python -m conversion_scripts.distill ours --steps 321",
    training=Training(
        method="end to end, KL to the teacher",
        data="messages before 1980 | spoken and written",
        steps=321,
        tokens=5_259_264,
        trainable_parameters=2_211_840,
        parameters=134_515_008,
        seconds=3318.0,
        machine="two cores",
        settings={"learning_rate": 3e-4},
    ),
)
PERPLEXITY = Perplexity(
    tokens=4096,
    documents=3,
    data="presidential messages from 2000 on",
    buckets=[[0, 512], [512, 2048], [2048, 4096]],
    perplexity={"this model": [24.113, 21.978, 19.504], "full softmax": [24.113, 19.966, 18.349]},
    summary={"from_position": 2048, "perplexity": {"this model": 19.50423, "full softmax": 18.349}},
)
COST = Cost(
    machine="two cores of a processor",
    costs={
        "this model": [
            {"length": 256, "seconds_per_token": 0.02163, "cache_bytes": 861_184},
            {"length": 32768, "seconds_per_token": 0.02171, "cache_bytes": 861_184},
        ],
        "full softmax": [
            {"length": 256, "seconds_per_token": 0.0128, "cache_bytes": 2_097_152},
            {"length": 32768, "seconds_per_token": 4.17123, "cache_bytes": 268_435_456},
        ],
    },
)
APPROXIMATION = Approximation(
    data="annual messages, sentence by sentence",
    landmarks=[16, 48],
    lengths=[128, 2048],
    cosine=[[0.98761, 0.91234], [0.99987, 0.95432]],
    agreement=[0.875, 0.938],
)


def all_facts(architecture: str) -> Facts:
    encoder = architecture == "nystromformer_hf"
    return Facts(
        architecture,
        base_model="someone/original",
        license="apache-2.0",
        license_origin="the source's model card",
        language=["en", "no"],
        datasets=["someone/messages"],
        settings=SETTINGS[architecture],
        stages=[CONVERSION, TRAINING],
        perplexity=None if encoder else PERPLEXITY,
        cost=COST,
        approximation=APPROXIMATION if encoder else None,
    )


def card_of(folder: Path, facts: Facts, name: str | None = "someone/ours") -> ModelCard:
    folder.mkdir(exist_ok=True)
    write_card(folder, facts, name)
    return ModelCard.load(folder / "README.md")


def headings(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.+)$", card.text, re.MULTILINE)


ALWAYS = ["How to load", "License", "Limits", "Citations"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestEveryArchitecture:
    def test_without_facts_there_is_no_section_for_them(self, architecture, tmp_path):
        card = card_of(tmp_path / "folder", Facts(architecture))
        assert headings(card) == ALWAYS
        assert "The licence of these weights is not known" in card.text
        assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
        assert "|" not in card.text
        assert "![" not in card.text

    def test_with_all_facts_there_is_one_for_each(self, architecture, tmp_path):
        card = card_of(tmp_path / "folder", all_facts(architecture))
        measured = ["Nearness to the original"] if architecture == "nystromformer_hf" else ["Perplexity by position"]
        expected = ["Provenance", "Parity of the conversion", "Training", *measured, "Cost by length"]
        assert headings(card) == ALWAYS[:2] + expected + ALWAYS[2:]
        assert "made from [someone/original](https://huggingface.co/someone/original)" in card.text
        assert "`apache-2.0`, according to the source's model card." in card.text
        assert CONVERSION.command in card.text
        assert TRAINING.command in card.text

    def test_metadata(self, architecture, tmp_path):
        card = card_of(tmp_path / "folder", all_facts(architecture))
        metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])
        encoder = architecture == "nystromformer_hf"
        assert metadata["library_name"] == "transformers"
        assert metadata["pipeline_tag"] == ("fill-mask" if encoder else "text-generation")
        assert metadata["license"] == "apache-2.0"
        assert metadata["language"] == ["en", "no"]  # not False
        assert metadata["base_model"] == "someone/original"
        assert metadata["base_model_relation"] == "finetune"
        assert metadata["datasets"] == ["someone/messages"]
        assert "linear-attention" in metadata["tags"]
        assert metadata["model-index"][0]["name"] == "ours"
        text = {"dataset_type": "text"}
        if encoder:
            text |= {"task_type": "fill-mask", "dataset_name": APPROXIMATION.data, "metric_type": "cosine_similarity"}
            name = "Cosine to the original's output at {} tokens"
            expected = [
                EvalResult(**text, metric_value=0.9999, metric_name=name.format("128")),
                EvalResult(**text, metric_value=0.9543, metric_name=name.format("2,048")),
            ]
        else:
            text |= {"task_type": "text-generation", "dataset_name": PERPLEXITY.data, "metric_type": "perplexity"}
            expected = [EvalResult(**text, metric_value=19.5042, metric_name="Perplexity of positions 2,048 to 4,096")]
        assert card.data.eval_results == expected
        assert metadata["metrics"] == [expected[0].metric_type]

    def test_nothing_reads_like_a_gap(self, architecture, tmp_path):
        for name, facts in (("bare", Facts(architecture)), ("full", all_facts(architecture))):
            text = str(card_of(tmp_path / name, facts))
            assert not re.search(r"\bNone\b|\bnan\b|\bn/a\b|undefined|TODO|\{\{|\{%|\n\n\n| \n|\[\]", text)

    def test_every_number_is_a_fact(self, architecture, tmp_path):
        facts = all_facts(architecture)
        bare, full = (card_of(tmp_path / "a", Facts(architecture)), card_of(tmp_path / "b", facts))
        known = numbers_of(dataclasses.asdict(facts))
        said = set(NUMBER.findall(full.text)) - set(NUMBER.findall(bare.text))
        assert len(said) > 20
        assert [number for number in said if not is_known(number, known)] == []
        assert not is_known("20.03", known)
        assert not is_known("4.2e-06", known)

    def test_every_figure_of_the_facts_is_said(self, architecture, tmp_path):
        text = card_of(tmp_path / "folder", all_facts(architecture)).text
        figures = [
            "5.8e-06",
            "1.0e-03",
            "1,234",
            "321",
            "5,259,264",
            "2,211,840",
            "134,515,008",
            "55 minutes",
            "0.0003",
        ]
        figures += ["21.6", "4,171", "0.86", "268.44"]
        if architecture == "nystromformer_hf":
            figures += ["0.9876", "0.9123", "0.9999", "0.9543", "0.875", "0.938"]
        else:
            figures += ["24.11", "21.98", "19.97", "**19.50**", "**18.35**", "512–2,048"]
        assert [figure for figure in figures if figure not in text] == []

    def test_tables_are_rectangular(self, architecture, tmp_path):
        text = card_of(tmp_path / "folder", all_facts(architecture)).text
        found = re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE)
        assert len(found) == 5
        for table in found:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1

    def test_plots_lie_in_the_folder(self, architecture, tmp_path):
        pytest.importorskip("matplotlib", reason="draws the plots")
        card = card_of(tmp_path, all_facts(architecture))
        shown = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
        assert shown == (["cost.png"] if architecture == "nystromformer_hf" else ["perplexity.png", "cost.png"])
        assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in shown)

    def test_no_plots_without_matplotlib(self, architecture, tmp_path, monkeypatch):
        monkeypatch.setattr(cards, "find_spec", lambda name: None if name == "matplotlib" else name)
        card = card_of(tmp_path, all_facts(architecture))
        assert "![" not in card.text
        assert not list(tmp_path.glob("*.png"))
        assert "| 32,768 |" in card.text

    def test_facts_come_back_as_they_were(self, architecture, tmp_path):
        facts = all_facts(architecture)
        card_of(tmp_path, facts)
        assert read_facts(tmp_path) == facts

    def test_no_result_is_taken_from_a_paper(self, architecture, tmp_path):
        card = card_of(tmp_path, Facts(architecture))
        assert re.search(r"No\s+result\s+in\s+this\s+card\s+is\s+taken\s+from", card.text)
        assert len(re.findall(r"https://arxiv\.org/abs/\d{4}\.\d{5}\)", card.text)) >= 2


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?(?![\w.]*\w)")


UNITS = {"seconds_per_token": 1e3, "cache_bytes": 1e-6, "seconds": 1 / 60}


def numbers_of(value, unit: float = 1.0) -> set[float]:
    """All numbers in the facts, also those within texts, in the card's units (ms, MB, minutes); lists are counted."""
    if isinstance(value, dict):
        return set().union(*(numbers_of(key) | numbers_of(part, UNITS.get(key, 1.0)) for key, part in value.items()))
    if isinstance(value, list):
        return set().union(*map(numbers_of, value), range(1, len(value) + 1))
    if isinstance(value, str):
        return {float(number.replace(",", "")) for number in NUMBER.findall(value)}
    return {value * unit} if isinstance(value, int | float) else set()


def is_known(number: str, known: set[float]) -> bool:
    """Whether a number, as it is printed, is a rounding of one of `known`."""
    mantissa, _, exponent = number.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return any(abs(float(number.replace(",", "")) - value) <= 0.501 * unit for value in known)


class TestStages:
    def test_a_later_stage_extends_the_earlier_one(self, tmp_path):
        facts = Facts("kermit", base_model="someone/original", settings=SETTINGS["kermit"]).with_stage(CONVERSION)
        first = card_of(tmp_path / "first", facts)
        assert "base_model_relation" not in first.data
        assert "Nothing was trained after the conversion" in first.text
        second = card_of(
            tmp_path / "second", read_facts(tmp_path / "first").with_stage(TRAINING, perplexity=PERPLEXITY)
        )
        assert second.data["base_model_relation"] == "finetune"
        assert "Nothing was trained" not in second.text
        assert second.text.index("1. **Conversion** of `someone/original`") < second.text.index("2. **Distillation**")
        assert "| logits | 1,234 | float32 | 5.8e-06 | 1.0e-03 |" in second.text
        assert [stage.title for stage in read_facts(tmp_path / "second").stages] == ["Conversion", "Distillation"]

    def test_figures_of_the_earlier_weights_go(self):
        facts = Facts("kermit", settings={"window_size": 8}, perplexity=PERPLEXITY, cost=COST)
        trained = facts.with_stage(TRAINING)
        assert (trained.perplexity, trained.cost) == (None, COST)
        assert facts.with_stage(TRAINING, settings={"window_size": 16}).cost is None
        assert facts.with_stage(TRAINING, settings={"window_size": 16}, cost=COST).cost == COST
        assert facts.stages == []

    def test_two_conversions_share_a_table(self, tmp_path):
        back = dataclasses.replace(CONVERSION, parity=Parity(1.7e-7, 64, "float32", 1e-5, quantity="hidden states"))
        text = card_of(tmp_path, Facts("nystromformer_hf", stages=[CONVERSION, back])).text
        assert "1.0e-03 |\n| hidden states | 64 | float32 | 1.7e-07 | 1.0e-05 |\n" in text

    def test_a_model_without_a_card_has_an_architecture(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "kermit"}))
        assert read_facts(tmp_path) == Facts("kermit")


class TestText:
    def test_what_the_settings_change(self, tmp_path):
        def text(architecture: str, **settings) -> str:
            return card_of(tmp_path, Facts(architecture, settings=SETTINGS[architecture] | settings)).text

        hybrid = text("kermit")
        assert "a window of 1,536 tokens and the first 7 of the text" in hybrid
        assert "| `layer_types` | kernel_attention*2, full_attention |" in hybrid
        assert "| `feature_dim` | not set |" in hybrid
        assert "`full_attention` layers keep every token" in hybrid
        plain = text("kermit", layer_types=["kernel_attention"] * 3, update_rule="additive")
        assert "`full_attention` layers" not in plain
        assert "The additive rule sums up" in plain
        assert "pure kernel attention" in text("kermit", window_size=0, num_sink_tokens=0)
        assert "one landmark for each segment" in text("nystromformer_hf_decoder")
        assert "keeps every key" in text("nystromformer_hf_decoder", inverse_regularization=1.5)

    @pytest.mark.parametrize(
        ("head", "task", "auto_class"),
        [
            ("KermitForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
            ("KermitModel", "feature-extraction", "AutoModel"),
        ],
    )
    def test_the_head_decides_how_to_load(self, head, task, auto_class, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "kermit", "architectures": [head]}))
        card = card_of(tmp_path, Facts("kermit"), name=None)
        assert card.data.pipeline_tag == task
        assert f'{auto_class}.from_pretrained("{tmp_path.name}", trust_remote_code=True)' in card.text
        assert "generate" not in card.text.split("```")[1]

    def test_licenses_of_other_kinds(self, tmp_path):
        facts = Facts("kermit", license="other", license_name="qwen-research", license_link="LICENSE")
        card = card_of(tmp_path, facts)
        assert (card.data.license, card.data.license_name) == ("other", "qwen-research")
        assert "`other` (qwen-research)." in card.text
        assert "`mit`, `apache-2.0`" in card_of(tmp_path, Facts("kermit", license=["mit", "apache-2.0"])).text

    def test_encoders_have_no_cache(self, tmp_path):
        cost = Cost("two cores", {"this model": [{"length": 512, "seconds_per_token": 1e-4}]})
        text = card_of(tmp_path, Facts("nystromformer_hf", cost=cost)).text
        assert "| tokens | this model: ms per token |\n| --- | --- |\n| 512 | 0.1 |" in text

    def test_baselines_measured_at_fewer_lengths(self, tmp_path):
        costs = {**COST.costs, "full softmax": COST.costs["full softmax"][:1]}
        text = card_of(tmp_path, Facts("kermit", cost=Cost("two cores", costs))).text
        assert "| 32,768 | 21.7 | 0.86 |  |  |" in text


class TestCommandLine:
    def test_paths_are_cut_to_their_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here" / "source").mkdir(parents=True)
        arguments = [
            str(tmp_path / "a b"),
            "here/source",
            "user/name",
            "~/out",
            "../up",
            f"--data={tmp_path}/texts.txt",
        ]
        expected = "python -m conversion_scripts.x 'a b' source user/name out up --data=texts.txt"
        assert command_line("conversion_scripts.x", arguments) == expected

    def test_other_arguments_stay(self):
        arguments = ["--far-bias", "-10", "--lr=.5", "--flag", "", "1e-3", "name*2", "5GB"]
        expected = "python -m m --far-bias -10 --lr=.5 --flag '' 1e-3 'name*2' 5GB"
        assert command_line("m", arguments) == expected


class TestSource:
    def test_what_a_card_states(self, tmp_path):
        metadata = "license: apache-2.0\nlanguage: [en, no, English]\nbase_model: another/one"
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Original")
        facts = source_facts("kermit", tmp_path)
        assert (facts.license, facts.license_origin) == ("apache-2.0", "the source's model card")
        assert facts.language == ["en"]  # YAML reads `no` as False
        assert facts.base_model is None

    def test_a_copy_of_a_hub_repository_knows_its_name(self, tmp_path):
        folder = tmp_path / "models--someone--original-1" / "snapshots" / "abc123" / "gguf"
        folder.mkdir(parents=True)
        (folder.parent / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
        assert hub_snapshot(folder) == (folder.parent, "someone/original-1", "abc123")
        facts = source_facts("kermit", folder)
        assert (facts.base_model, facts.license, facts.language) == ("someone/original-1", "mit", ["en"])
        assert source_facts("kermit", folder, CardOptions(base_model="a/b")).base_model == "a/b"
        assert hub_snapshot(tmp_path) is None

    def test_a_base_model_that_is_no_hub_id(self, tmp_path):
        with pytest.raises(ConversionError, match=r"--base-model \./folder/of/mine is no Hub id; allowed are such as"):
            source_facts("kermit", tmp_path, CardOptions(base_model="./folder/of/mine"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"license": "Apache 2"}, "license='Apache 2' is not valid in a model card; allowed are the Hub's"),
            ({"language": ["english"]}, "language='english' is not valid"),
            ({"datasets": ["presidential messages"]}, "datasets='presidential messages'.*Hub ids such as user/name"),
            ({"base_model": "a/b/c"}, "base_model='a/b/c'"),
        ],
    )
    def test_metadata_that_the_hub_would_refuse(self, changes, message, tmp_path):
        with pytest.raises(ConversionError, match=message):
            write_card(tmp_path, Facts("kermit", **changes))

    def test_a_picture_that_is_missing(self, tmp_path):
        card_of(tmp_path, Facts("kermit"))
        with open(tmp_path / "README.md", "a") as file:
            file.write("\n![loss](loss.png)\n")
        with pytest.raises(ConversionError, match=r"shows loss\.png, which is not in its folder"):
            check_card(tmp_path)

    def test_metadata_that_is_no_yaml(self, tmp_path):
        (tmp_path / "README.md").write_text("---\n- a list\n---\n")
        with pytest.raises(ConversionError, match="cannot be read"):
            check_card(tmp_path)

    def test_measurements_that_do_not_fit(self):
        with pytest.raises(ConversionError, match=r"perplexity of 'this model' has 1 values.*each of 2 buckets"):
            Perplexity(8, 1, "text", [[0, 4], [4, 8]], {"this model": [1.0]})
        with pytest.raises(ConversionError, match="perplexity of 'window only' is nan"):
            Perplexity(8, 1, "text", [[0, 8]], {"window only": [float("nan")]})
        with pytest.raises(ConversionError, match="summary of 'this model' is inf"):
            Perplexity(8, 1, "text", [], {}, {"from_position": 4, "perplexity": {"this model": float("inf")}})
        with pytest.raises(ConversionError, match=r"costs of 'this model' hold \['ms'\]; allowed are length"):
            Cost("two cores", {"this model": [{"ms": 1.0}]})
        with pytest.raises(ConversionError, match="cosine has 1 rows"):
            Approximation("text", [16, 32], [128], [[1.0]])
        with pytest.raises(ConversionError, match=r"agreement of .* has 1 values"):
            Approximation("text", [16, 32], [128], [[1.0], [1.0]], [1.0])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"architecture": "kermit", "speed": 3}', "has speed in Facts; allowed are approximation, architecture"),
            ('{"architecture": "kermit", "stages": [{"name": "x"}]}', "has name in Stage"),
            ("{}", "is not whole .*architecture"),
            ("{", "is no JSON"),
        ],
    )
    def test_facts_that_cannot_be_read(self, content, message, tmp_path):
        (tmp_path / "measurements.json").write_text(content)
        with pytest.raises(ConversionError, match=message):
            read_facts(tmp_path)

    def test_facts_are_json_for_everyone(self, tmp_path):
        facts = Facts("kermit", settings={"learning_rate": float("inf")})
        with pytest.raises(ValueError, match="JSON compliant"):
            write_facts(tmp_path, facts)

    def test_what_a_card_needs(self, tmp_path, monkeypatch):
        with pytest.raises(ConversionError, match="no model card for 'llama'; allowed are kermit, nystromformer_hf"):
            write_card(tmp_path, Facts("llama"))
        with monkeypatch.context() as patch:
            patch.setattr(cards, "find_spec", lambda name: None)
            with pytest.raises(ConversionError, match="need the package `jinja2`; install it"):
                write_card(tmp_path, Facts("kermit"))
        monkeypatch.setattr(cards, "TEMPLATES", tmp_path / "nowhere")
        with pytest.raises(ConversionError, match=r"nowhere/kermit\.md does not exist; copy the folder model_cards"):
            write_card(tmp_path, Facts("kermit"))
        assert list(tmp_path.iterdir()) == []
