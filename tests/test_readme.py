"""Every ``appa-lite`` command line in the README, the docs and the launch scripts composes to a configuration."""

import contextlib
import re
import shlex
from pathlib import Path

import pytest

from appa_lite import cli
from appa_lite.config import compose

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "launch").glob("*.sh"))]
PROGRAM = re.compile(r"(?:\S*/)?appa-lite$")


def shell(page: Path) -> str:
    """The commands of a page: of a Markdown file, what its fenced blocks of shell hold."""
    text = page.read_text()
    if page.suffix == ".sh":
        return text
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)
    return "\n".join(body for language, body in blocks if language in ("bash", "sh", "console"))


def substituted(text: str) -> str:
    """Variables of the shell replaced: of a loop by the first of its values, others by a word."""
    values = dict(re.findall(r"^\s*for (\w+) in (\S+)", text, re.M)) | {"DAYS": "2010-01-08"}
    return re.sub(r"\$\{?(\w+)(?::[^}]*)?\}?", lambda m: values.get(m[1], "word").strip("'\""), text)


def lines(page: Path) -> list[list[str]]:
    """The words after the program's name of every command, also when it is launched or named as a module."""
    found = []
    for line in substituted(shell(page)).replace("\\\n", " ").splitlines():
        if "appa-lite " not in line and "-m appa_lite " not in line:
            continue
        line = line.strip().removeprefix("$ ")
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # a sentence, such as a comment with an apostrophe
        starts = [i for i, word in enumerate(words) if PROGRAM.match(word) or (word == "appa_lite" and words[i - 1] == "-m")]
        if starts and (starts[0] == 0 or words[0] in ("time", "nohup", "accelerate", "python", "uv", "srun", "exec", "OMP_NUM_THREADS=1")):
            rest = words[starts[0] + 1 :]
            stop = next((i for i, word in enumerate(rest) if word in ("|", "&&", ";", ">", "&", "||") or word.startswith(">")), len(rest))
            found.append([word.rstrip(";") for word in rest[:stop] if word not in ("word", "$@")])  # lists of the script's own
    return found


CASES = [(page, words) for page in PAGES if page.is_file() for words in lines(page)]


@pytest.mark.parametrize(("page", "words"), CASES, ids=[f"{p.name}: {' '.join(w)[:60]}" for p, w in CASES])
def test_the_command_composes(page, words, tmp_path):
    """Experiments of one's own are the YAML blocks of the same page whose first line names them in a comment."""
    if not words or words[0].startswith("-") or words[0] in ("COMMAND", "..."):
        return
    assert words[0] in cli.COMMANDS, f"{page.name}: {words[0]} is no command"
    if "--help" in words:
        return
    for name, body in re.findall(r"^```ya?ml\n# *(\S+\.ya?ml)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
        (tmp_path / Path(name).name).write_text(body)
    with contextlib.chdir(tmp_path):
        compose(words[0], [word for word in words[1:] if word not in ("--show-config", "...")], partial=True)


def test_the_readme_holds_commands():
    if not (ROOT / "README.md").is_file():
        pytest.skip("there is no README yet")
    text = (ROOT / "README.md").read_text()
    assert "bash launch/quickstart.sh" in text and "bash launch/test.sh" in text
    for target in re.findall(r"\]\(((?!https?:|#|mailto:)[^)#]+)", text):
        assert target.startswith("docs/") or (ROOT / target).exists(), f"README.md points to {target}"


def test_the_reader_of_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Type appa-lite nothing.\n```bash\n$ appa-lite train trainable=x \\\n    'a=[1, 2]'  # says appa-lite\n"
        "accelerate launch --config_file f.yaml -m appa_lite train b=$OUT | tee log\n```\n```yaml\na: appa-lite no\n```\n"
    )
    assert lines(page) == [["train", "trainable=x", "a=[1, 2]"], ["train", "b=word"]]
