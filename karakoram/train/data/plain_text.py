"""Plain text files cut into training documents of a few hundred characters, at line ends."""

from functools import cache
from pathlib import Path

from karakoram.errors import TrainingError
from karakoram.train.data.documents import Document

CHUNK_CHARS = 900  # about 350 tokens of the small tokenizer: well inside a sample
MAX_FILE_BYTES = 50_000_000
MAX_FILES = 200


def cut(text: str, chars: int = CHUNK_CHARS) -> list[str]:
    """Pieces of at most `chars` characters; they end with a line where one ends in their second half."""
    pieces = []
    start = 0
    while start < len(text):
        end = min(len(text), start + chars)
        if end < len(text):
            line_end = text.rfind("\n", start + chars // 2, end)
            end = line_end + 1 if line_end > 0 else end
        piece = text[start:end].strip()
        if piece:
            pieces.append(piece)
        start = end
    return pieces


@cache
def read_texts(data_dir: Path) -> list[Document]:
    """All `*.txt` below `data_dir/text`, or `data_dir` where there is no such folder. TrainingError if none."""
    folder = data_dir / "text" if (data_dir / "text").is_dir() else data_dir
    documents = []
    for file in sorted(folder.glob("**/*.txt"))[:MAX_FILES]:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise TrainingError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes.", "Split it, or leave it out.")
        documents += [Document([], text=piece) for piece in cut(file.read_text(encoding="utf-8", errors="replace"))]
    if not documents:
        raise TrainingError(f"No text files (*.txt) below {folder}.", "Check the path given as --data.")
    return documents
