"""Files: list a folder, read a file, or list first and then read the only file that is there."""

from random import Random
from typing import Any

from karakoram.tools import ToolError
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, english, syllables

_FOLDER = Phrases(
    "files.folder",
    "The folder\nFolder to list\nPath of the folder\nDirectory\n[Which|What] folder\nFolder [to look into|to show|path]",
    "Path of a folder\nThe directory",
)
_FILE = Phrases(
    "files.file",
    "The file\nFile to read\nPath of the file\nFile name\n[Which|What] file\nFile [to open|to show|path]",
    "Path of a file\nName of the file",
)
_LIST_ABOUT = Phrases(
    "files.list.about",
    "List the files in a folder.\nReturns the names of files in a folder.\nShow what a folder contains.\nLists a directory.\n[Show|Shows|Find|Finds|Tell] [what is in a folder|all files in a directory|the files of a folder].",
    "Lists all files of a folder.\nNames of the files in a directory.",
)
_READ_ABOUT = Phrases(
    "files.read.about",
    "Read a file.\nReturns the text of a file.\nShow the content of a file.\nReads a text file.\n[Show|Shows|Open|Opens|Print] [the text in a file|what a file says|a file].",
    "Returns the content of a file.\nRead the text of a file.",
)
_ASK_LIST = Phrases(
    "files.list.ask",
    """Which files are in {f}?
    What files are in the folder {f}?
    List the files in {f}.
    What is in the folder {f}?
    Show me the files in {f}.
    Which files does {f} contain?
    ls {f}""",
    """Please list the folder {f}.
    Tell me which files are in the folder {f}.""",
)
_ASK_READ = Phrases(
    "files.read.ask",
    """What is in the file {f}?
    Read {f}.
    Show me the content of {f}.
    What does the file {f} say?
    Open {f} and tell me what it says.
    What does {f} contain?
    cat {f}""",
    """Please read the file {f} to me.
    Tell me what the file {f} says.""",
)
_ASK_ONLY = Phrases(
    "files.only.ask",
    """Read the file in the folder {f}.
    There is one file in {f}. What does it say?
    What does the file in {f} say?
    Find the file in {f} and read it.""",
    """Please read the only file of the folder {f}.
    The folder {f} has one file. Tell me what it says.""",
)
_FACTS = ("the {w} is {v}", "{w} = {v}", "{w}: {v}", "{w} {v}")


def _name(rng: Random, split: Split) -> str:
    return syllables(rng, split) if rng.random() < 0.5 else english(rng, split, "noun")


def folder_name(rng: Random, split: Split) -> str:
    """A folder, one level deep or two."""
    return _name(rng, split) if rng.random() < 0.6 else f"{_name(rng, split)}/{_name(rng, split)}"


def file_name(rng: Random, split: Split) -> str:
    """A file name with its ending."""
    return f"{_name(rng, split)}.{rng.choice(('txt', 'md', 'csv', 'log', 'json', 'py'))}"


def listing_capability(folder: str, text: str) -> Capability:
    """Lists one folder."""
    return _reader("files_list", _LIST_ABOUT, _FOLDER, {folder: text})


def reading_capability(content: dict[str, str]) -> Capability:
    """Reads the files of `content` (path -> text)."""
    return _reader("files_read", _READ_ABOUT, _FILE, content)


def _reader(key: str, about: Phrases, argument: Phrases, content: dict[str, str]) -> Capability:
    def compute(values: dict[str, Any]) -> str:
        path = str(values["path"]).rstrip("/")
        if path not in content:
            raise ToolError(f"{path[:60]} does not exist")
        return content[path]

    return Capability(key, about, (Role("path", "string", argument),), compute, plain=False)


def files(rng: Random, split: Split) -> Task:
    """List a folder, read a file, or (one in four) list a folder and read the file that is in it."""
    folder = folder_name(rng, split)
    names = [file_name(rng, split) for _ in range(2 + int(rng.random() * 3))]
    fact = _FACTS[int(rng.random() * 4)].format(
        w=_name(rng, split), v=str(10 + int(rng.random() * 9990)) if rng.random() < 0.6 else _name(rng, split)
    )
    roll = rng.random()
    only = names[0]
    listing = listing_capability(folder, only if roll >= 0.75 else ", ".join(names))
    path = f"{folder}/{only}" if roll >= 0.75 or rng.random() < 0.4 else only
    reading = reading_capability({path: fact})
    if roll < 0.4:
        use = Use(listing, {"path": folder}, f"List the folder {folder}.")
        text = ", ".join(names)
        return Task(
            "files", _ASK_LIST.pick(rng, split, f=folder), [[use]], f"The files are {text}.", (text,), rivals=(reading,)
        )
    use = Use(reading, {"path": path}, f"Read the file {path}.")
    if roll < 0.75:
        return Task(
            "files", _ASK_READ.pick(rng, split, f=path), [[use]], f"It says: {fact}", (fact,), rivals=(listing,)
        )
    first = Use(listing, {"path": folder}, f"First list the folder {folder}.")
    return Task("files", _ASK_ONLY.pick(rng, split, f=folder), [[first], [use]], f"It says: {fact}", (fact,))
