"""What goes wrong, said once and said well.

Every error that a user can cause is a `KarakoramError`: what happened, to which thing, with which value, and what to
do. The command line prints it as one line and exits with 2; a traceback is a bug.
"""


class KarakoramError(Exception):
    """Base of all errors that a user can cause: `what` names the thing and the value, `fix` says what to do."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what} {fix}".strip() if fix else what)
        self.what = what
        self.fix = fix


class ConfigError(KarakoramError):
    """A `config.json` that this package cannot run faithfully."""


class CheckpointError(KarakoramError):
    """A checkpoint that is missing, damaged, incomplete or of another kind."""


class ExpertUnavailable(CheckpointError):
    """An expert that could not be read. `rows` are the batch's tokens that need it; without them the pass can run."""

    def __init__(self, what: str, fix: str, rows: tuple[int, ...]) -> None:
        super().__init__(what, fix)
        self.rows = rows


class FormatError(KarakoramError):
    """Bits that do not have the promised layout, or a conversion that would lose some."""


class TokenizerError(KarakoramError):
    """A tokenizer that is missing, damaged, or does not fit; or ids outside its vocabulary."""


class ChatError(KarakoramError):
    """Messages, tools or a dialect that cannot be rendered or parsed."""


class InputError(KarakoramError):
    """A wrong argument: token ids out of range, empty prompt, impossible option."""


class ContextOverflow(InputError):
    """Prompt and wanted tokens do not fit the context: `wanted` of `context` tokens."""

    def __init__(self, what: str, fix: str, wanted: int, context: int) -> None:
        super().__init__(what, fix)
        self.wanted, self.context = wanted, context


class SchemaError(InputError):
    """A JSON Schema that cannot be enforced: `keyword` is the one at fault, `where` the path to it ("" the root)."""

    def __init__(self, what: str, fix: str, keyword: str, where: str = "") -> None:
        super().__init__(what, fix)
        self.keyword, self.where = keyword, where


class TrainingError(KarakoramError):
    """Training that cannot start or go on."""
