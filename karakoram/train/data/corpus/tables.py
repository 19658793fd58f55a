"""Documents from Parquet files and from Hugging Face `datasets`.

Parquet is read row group by row group and only the columns that are needed. A data set of the hub, or a folder that
`datasets` understands, is streamed: nothing is written to its cache, and only the builders of plain tables are let in,
none that decodes files by pickle. Both packages are optional and imported when they are used.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from karakoram.errors import TrainingError
from karakoram.train.data.corpus.lines import Paths, SourceFile, changed, check_unchanged, list_files
from karakoram.train.data.corpus.records import BEGINNING, Fields, Position, Record
from karakoram.train.data.documents import Document

if TYPE_CHECKING:
    import pyarrow.parquet

ROWS_AT_ONCE = 256
TABLE_BUILDERS = frozenset({"parquet", "json", "arrow", "csv", "text"})


@dataclass(frozen=True)
class Parquet:
    """A document per row of Parquet files; `*.parquet` below folders. Needs pyarrow."""

    paths: Paths
    fields: Fields = field(default_factory=Fields)

    @cached_property
    def files(self) -> list[SourceFile]:
        """The files, in order."""
        return list_files(self.paths, (".parquet",))

    @cached_property
    def before_rows(self) -> list[int]:
        """Rows of the files before each, and of all."""
        sums = [0]
        for file in self.files:
            with _open_parquet(file) as table:
                sums.append(sums[-1] + table.metadata.num_rows)
        return sums

    @property
    def total(self) -> int:
        """Rows of all files."""
        return self.before_rows[-1]

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "fields": vars(self.fields), "files": [list(f[1:]) for f in self.files]}

    def records(self, start: Position = BEGINNING) -> Iterator[Record]:
        """All rows from `start`, row group by row group."""
        for index in range(start[0], len(self.files)):
            check_unchanged(self.files[index])
            with _open_parquet(self.files[index]) as table:
                columns = self._columns(self.files[index], table)
                first, skip = start[1:] if start[0] == index else (0, 0)
                for group in range(first, table.num_row_groups):
                    yield from self._group(index, table, columns, group, skip if group == first else 0)
            check_unchanged(self.files[index])

    def _group(
        self, index: int, table: "pyarrow.parquet.ParquetFile", columns: list[str], group: int, skip: int
    ) -> Iterator[Record]:
        """The rows of a row group from `skip` on; where they cannot be read, one error for all that are left."""
        import pyarrow as pa

        name = self.files[index].name
        rows = table.metadata.row_group(group).num_rows
        before = sum(table.metadata.row_group(g).num_rows for g in range(group))
        row = 0
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    row += 1
                    if row > skip:
                        done = self.before_rows[index] + before + row
                        yield Record(values, name, before + row, (index, group, row), done)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = f"the row group {group} cannot be read from here on ({error})"
            done = self.before_rows[index] + before + rows
            yield Record({}, name, before + row + 1, (index, group + 1, 0), done, reason, max(rows - row, 1))

    def _columns(self, file: SourceFile, table: "pyarrow.parquet.ParquetFile") -> list[str]:
        have = table.schema_arrow.names
        columns = [name for name in self.fields.columns if name in have]
        if self.fields.text not in columns and self.fields.messages not in columns:
            raise TrainingError(
                f"{file.path} has neither a column {self.fields.messages!r} nor {self.fields.text!r}, but only "
                f"{', '.join(have[:20])}.",
                "Name the columns by Fields(text=…, messages=…).",
            )
        return columns

    def document(self, raw: Mapping[str, Any]) -> Document | None:
        return self.fields.document(_present(raw, self.fields))


def _present(row: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """A row whose messages and tools have only what they hold: tables give each all the fields that any has."""
    nested = (fields.messages, fields.tools)
    return {name: _without_nulls(value) if name in nested else value for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _open_parquet(file: SourceFile) -> "pyarrow.parquet.ParquetFile":
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise TrainingError("Reading Parquet needs pyarrow.", "pip install 'karakoram[train]'") from error
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except FileNotFoundError as error:
        raise changed(file, "vanished") from error
    except (pa.ArrowException, OSError) as error:
        raise TrainingError(f"{file.path} is no whole Parquet file ({error}).", "Copy it again.") from error


@dataclass(frozen=True)
class HuggingFace:
    """A document per row of one split of a data set: a name on the hub, or a local folder. Needs `datasets`.

    revision  a commit of the hub: without it the newest is read, and a changed data set is other data
    """

    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    fields: Fields = field(default_factory=Fields)

    @cached_property
    def builder_hash(self) -> str:
        """What `datasets` makes of the files of this data set: it changes when they do."""
        return self._builder().hash or ""

    @property
    def total(self) -> int:
        """Rows of the split, 0 where they are not known."""
        splits = self._builder().info.splits
        return splits[self.split].num_examples or 0 if splits and self.split in splits else 0

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "datasets", "fields": vars(self.fields), "name": self.name, "split": self.split,
            "config": self.config, "revision": self.revision, "hash": self.builder_hash,
        }  # fmt: skip

    def records(self, start: Position = BEGINNING) -> Iterator[Record]:
        """All rows of the split from `start`, streamed."""
        row = start[1]
        try:
            data = self._builder().as_streaming_dataset(split=self.split)
            for values in data.skip(row) if row else data:
                row += 1
                kept = {name: values[name] for name in self.fields.columns if name in values}
                yield Record(kept, f"{self.name}[{self.split}]", row, (0, row, row), row)
        except TrainingError:
            raise
        except Exception as error:
            raise _unreadable(self.name, f"at row {row + 1}", error) from error

    def document(self, raw: Mapping[str, Any]) -> Document | None:
        return self.fields.document(_present(raw, self.fields))

    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise TrainingError(
                f"Reading the data set {self.name} needs `datasets`.", "pip install 'karakoram[datasets]'"
            ) from error
        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self.revision)
        except Exception as error:
            raise _unreadable(self.name, "", error) from error
        kind = type(builder).__module__.rsplit(".", 1)[-1]
        if kind not in TABLE_BUILDERS:
            raise TrainingError(
                f"The data set {self.name} is of the kind {kind!r}; only tables are read "
                f"({', '.join(sorted(TABLE_BUILDERS))}).",
                "Convert it to Parquet or JSON lines.",
            )
        return builder


def _unreadable(name: str, where: str, error: Exception) -> TrainingError:
    return TrainingError(
        f"The data set {name} cannot be read{' ' + where if where else ''}: {type(error).__name__}: {error}.",
        "Check its name, or the network; without one, give the path of a local folder, or set HF_HUB_OFFLINE=1 to use "
        "what was downloaded before.",
    )
