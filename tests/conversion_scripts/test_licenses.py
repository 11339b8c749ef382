"""A licence is what the checkpoint or its user says, and nothing is guessed."""

from pathlib import Path

import pytest

from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.licenses import MIT, find_license, recognised


APACHE = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
MIT_FILE = """MIT License

Copyright (c) 2024 Someone and others

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (APACHE, "apache-2.0"),
        (APACHE.split("END OF TERMS AND CONDITIONS")[0] + "END OF TERMS AND CONDITIONS\n", "apache-2.0"),
        (MIT_FILE, "mit"),
        (MIT_FILE.partition("\n\n")[2], "mit"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\nMeta Llama 3 Version Release Date: ...", "llama3"),
        ("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n...", "llama3.2"),
        (APACHE + "\nYou may not sell the Software.", None),
        ("Commons Clause\n" + APACHE, None),
        ("Licensed under the Apache License, Version 2.0, January 2004, with conditions.", None),
        (MIT_FILE.replace("to use, copy", "to use for research, copy"), None),
        (MIT_FILE + "\nNot for commercial use.", None),
        (MIT_FILE.replace("others", "others. Not for commercial use."), None),
        ("Ours.", None),
        ("", None),
    ],
)
def test_recognised(text, expected):
    assert recognised(text) == expected


def test_every_word_of_the_licence_counts():
    words = MIT.split()
    for index in (0, 40, 80, 120, len(words) - 1):
        assert recognised(" ".join([*words[:index], "not", *words[index + 1 :]])) is None


class TestWhoSays:
    def test_nobody(self, tmp_path):
        assert find_license(tmp_path) == ({}, None)
        (tmp_path / "README.md").write_text("# A card without metadata. License: MIT")
        (tmp_path / "LICENSE").write_text("Ours.")
        assert find_license(tmp_path) == ({}, None)

    def test_the_file_then_the_card_then_the_weights_then_the_user(self, tmp_path):
        (tmp_path / "LICENSE.txt").write_text(MIT_FILE)
        assert find_license(tmp_path) == ({"license": "mit"}, "the source's LICENSE.txt file")
        metadata = {"license": "other", "license_name": "research", "license_link": "LICENSE.txt"}
        lines = "\n".join(f"{name}: {value}" for name, value in metadata.items())
        (tmp_path / "README.md").write_text(f"---\n{lines}\ntags: [x]\n---\n")
        assert find_license(tmp_path) == (metadata, "the source's model card")
        assert find_license(tmp_path, stated="Apache-2.0")[0] == {"license": "apache-2.0"}
        assert find_license(tmp_path, "gemma", "Apache-2.0")[0] == {"license": "gemma"}

    def test_what_a_weight_file_says_may_be_unknown_to_the_hub(self, tmp_path):
        assert find_license(tmp_path, stated="MIT OR Apache-2.0") == ({}, None)

    @pytest.mark.parametrize("value", ["Apache 2.0", "[mit, 'Our own terms']", "{a: b}", "''"])
    def test_what_a_card_says_may_be_no_identifier(self, value, tmp_path):
        (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\n")
        assert find_license(tmp_path) == ({}, None)

    def test_a_card_that_cannot_be_read(self, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
        assert find_license(tmp_path) == ({}, None)

    def test_a_licence_that_the_hub_does_not_know(self, tmp_path):
        with pytest.raises(
            ConversionError, match=r"--license apache2 is no licence that the Hub knows; allowed are .*mit"
        ):
            find_license(tmp_path, "apache2")
