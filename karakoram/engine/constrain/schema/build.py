"""The grammar of the JSON values that satisfy a schema.

One node per conjunction and remaining depth: recursion, through $ref or through values of any kind, ends at
`MAX_NESTING` levels, so no node contains itself and every text can be read back by a recursive reader. What cannot be
completed within the levels left (or at all) is None here and is left out by whoever would contain it.

    object    {member, member}    named properties in the schema's order, then free ones; required ones cannot be left
                                  out; keys in their shortest spelling
    array     [item, item]
    spacing   after { [ and , and before ] and }: nothing, one space, or a line break with at most 20 spaces; after a
              colon nothing or one space. That covers json.dumps in its usual forms, and keeps blanks from going on
              for ever.

Where a schema allows more than is written here, less is written: it is enough that whatever is written satisfies it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from karakoram.engine.constrain.automaton import Automaton, automaton, combined, repeated, words_automaton
from karakoram.engine.constrain.grammar import EMPTY, Alt, Auto, Node, Run, Seq, Words, optional, repeat
from karakoram.engine.constrain.regex import (
    ANY_CHAR,
    QUOTE,
    RAW_CHAR,
    UNIVERSE,
    Chars,
    NothingMatches,
    PatternError,
    Regex,
    Times,
    join,
    literal,
    quoted,
    read_full,
    read_search,
    rust,
    spelled,
    times,
    without,
)
from karakoram.engine.constrain.schema.document import Document
from karakoram.engine.constrain.schema.formats import FORMATS
from karakoram.engine.constrain.schema.kinds import Conjunction, Kind, Kinds, conjunction
from karakoram.engine.constrain.schema.numbers import number_grammar
from karakoram.engine.constrain.vocabulary import FILLERS, OPTIONAL, Vocabulary
from karakoram.errors import SchemaError

# Deep enough for what people nest; json.loads and jsonschema take about three times as much.
MAX_NESTING = 24
# Values without any schema repeat the whole of JSON at each level.
MAX_FREE_NESTING = 12
# Nodes of one grammar; llguidance compiles as many in about 0.1 s.
MAX_NODES = 20_000
# Least lengths and counts beyond this are refused: no context holds them, and the shortest text is kept in memory.
MAX_LEAST = 16_384
# Where a pattern and a length hold together, a longer string is not written.
MAX_COUNTED = 1000

_GAP = read_full(r"(?: |\n {0,20})?")
_SPACE = read_full(" ?")


class _TooLarge(Exception):
    pass


def build(vocabulary: Vocabulary, text: str, strict: bool, objects_only: bool) -> Node:
    """The grammar of a schema given as JSON; `objects_only`: of the objects among its values.

    SchemaError for a schema that is broken or too large, that nothing satisfies, or that says, in strict mode, what
    cannot be enforced."""
    for depth in (MAX_NESTING, MAX_NESTING // 2, MAX_NESTING // 4):
        document = Document(text, strict)
        schemas = [document.root, {"type": "object"}] if objects_only else [document.root]
        try:
            node = _Builder(vocabulary, document).place(conjunction(schemas), depth)
        except _TooLarge:
            continue
        if node is None:
            keyword, where, why = document.impossible or ("", "", "leaves nothing")
            what = f"Nothing satisfies the schema: {keyword or 'it'} at {where or 'the root'} {why}."
            raise SchemaError(what, "Correct it.", keyword, where)
        return node
    raise SchemaError(f"The schema needs a grammar of more than {MAX_NODES:,} nodes.", "Make it smaller.", "", "")


class _Builder:
    """Builds the nodes of one document."""

    def __init__(self, vocabulary: Vocabulary, document: Document) -> None:
        self._vocabulary = vocabulary
        self._document = document
        self._kinds = Kinds(document)
        self._kinds_of: dict[tuple[int, ...], list[Kind]] = {}
        self._places: dict[tuple[tuple[int, ...], int], Node | None] = {}
        self._made = 0
        self._gap, self._space = self._optional_space(_GAP), self._optional_space(_SPACE)
        self._comma = self._punctuation(",", True)
        self._brackets = [self._punctuation(char, char in "{[") for char in "{}[]"]

    def _optional_space(self, regex: Regex) -> Auto:
        node = Auto(self._vocabulary, automaton(regex), f"/{rust(regex)}/")
        node.text = OPTIONAL
        return node

    def _punctuation(self, char: str, opens: bool) -> Node:
        word = Words(self._vocabulary, [char.encode()])
        node = Seq(word, self._gap) if opens else Seq(self._gap, word)
        node.terminal = f"/{rust(join(literal(char), _GAP) if opens else join(_GAP, literal(char)))}/"
        return node

    # -------------------------------------------------------------------------------------------- places

    def place(self, schemas: Conjunction, depth: int) -> Node | None:
        """The node of all values in which `schemas` hold, with `depth` levels of nesting left; None: there is none."""
        if not schemas:
            depth = min(depth, MAX_FREE_NESTING)
        identity = tuple(map(id, schemas))
        key = (identity, depth)
        if key not in self._places:
            if identity not in self._kinds_of:
                self._kinds_of[identity] = self._kinds.of(schemas)
            self._places[key] = self._any_of(self._kinds_of[identity], depth)
        return self._places[key]

    def _any_of(self, kinds: list[Kind], depth: int) -> Node | None:
        words: list[bytes] = []
        options: list[Node] = []
        for kind in kinds:
            if kind.type == "value" and not isinstance(kind.value, (dict, list)):
                words.append(self._spell(kind.value, kind.source))
            elif kind.type == "null":
                words.append(b"null")
            elif kind.type == "boolean":
                words += [b"true", b"false"]
            elif (node := self._kind(kind, depth)) is not None:
                options.append(node)
        if words:
            options.append(Words(self._vocabulary, words))
        self._count(len(options) + 1)
        return None if not options else options[0] if len(options) == 1 else Alt(*options)

    def _count(self, nodes: int) -> None:
        self._made += nodes
        if self._made > MAX_NODES:
            raise _TooLarge

    def _kind(self, kind: Kind, depth: int) -> Node | None:
        if kind.type == "value":
            return self._value(kind.value, kind.source)
        if kind.type == "number":
            return self._number(kind)
        if kind.type == "string":
            return self._string(kind)
        if not depth:
            return None
        return self._array(kind, depth - 1) if kind.type == "array" else self._object(kind, depth - 1)

    # -------------------------------------------------------------------------------------------- single values

    def _spell(self, value: Any, source: Any) -> bytes:
        try:
            return json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            where = self._document.where(source)
            what = f"{value!r:.80} at {where or 'the root'} holds half a surrogate pair."
            raise SchemaError(what, "Write whole characters.", "enum", where) from error

    def _value(self, value: Any, source: Any) -> Node:
        """Exactly this value, in any spacing."""
        if isinstance(value, dict):
            members = [self._member(name, self._value(part, source), source) for name, part in value.items()]
            return self._enclosed("{", self._in_order(members))
        if isinstance(value, list):
            return self._enclosed("[", self._in_order([self._value(part, source) for part in value]))
        return Words(self._vocabulary, [self._spell(value, source)])

    def _in_order(self, parts: list[Node]) -> Node:
        if not parts:
            return EMPTY
        return Seq(parts[0], *(node for part in parts[1:] for node in (self._comma, part)))

    def _enclosed(self, bracket: str, inside: Node) -> Node:
        number = "{}[]".index(bracket)
        self._count(1)
        return Seq(self._brackets[number], inside, self._brackets[number + 1])

    def _member(self, name: str, value: Node, source: Any) -> Node:
        word = self._spell(name, source) + b":"
        key = Seq(Words(self._vocabulary, [word]), self._space)
        key.terminal = f"/{rust(join(literal(word.decode('utf-8')), _SPACE))}/"
        self._count(2)
        return Seq(key, value)

    def _number(self, kind: Kind) -> Node | None:
        try:
            numbers, terminal = number_grammar(kind.interval, kind.integer, kind.multiples)
        except NothingMatches:
            self._document.note(kind.source, "minimum", "leaves no number")
            return None
        except PatternError as error:
            self._document.refuse(kind.source, "multipleOf", f"cannot be enforced: {error}")
            numbers, terminal = number_grammar(kind.interval, kind.integer, ())
        return Auto(self._vocabulary, numbers, terminal)

    def _string(self, kind: Kind) -> Node | None:
        low, high = kind.low, kind.high
        if low > MAX_LEAST:
            raise SchemaError(f"minLength {low:,} is more than {MAX_LEAST:,}.", "Lower it.", "minLength", "")
        regexes = self._regexes(kind)
        only = regexes[0] if len(regexes) == 1 else None
        if isinstance(only, Times) and isinstance(only.item, Chars):
            # A pattern like ^[a-z]{2,9}$ is a length of its own.
            highs = [value for value in (high, only.high) if value is not None]
            return self._run(kind, only.item, max(low, only.low), min(highs) if highs else None)
        if not regexes:
            return self._run(kind, None, low, high)
        parts = [automaton(spelled(regex)) for regex in regexes] if self._small(kind, regexes) else []
        if not parts:
            return self._run(kind, None, low, high)
        terminals = [f"/{rust(quoted(regex))}/" for regex in regexes]
        if low or high is not None:
            high = None if high is None else max(low, min(high, MAX_COUNTED))
            char = spelled(Chars(UNIVERSE))
            parts.append(repeated(automaton(char), low, high))
            terminals.append(f"/{rust(join(QUOTE, times(char, low, high), QUOTE))}/")
        try:
            body = Auto(self._vocabulary, combined(parts), "", quoted=True)
        except NothingMatches:
            self._document.note(kind.source, "pattern", "matches nothing of the allowed length")
            return None
        return self._in_quotes(body, " & ".join(terminals))

    def _regexes(self, kind: Kind) -> list[Regex]:
        regexes = [read_full(FORMATS[name]) for name in dict.fromkeys(kind.formats)]
        for pattern in dict.fromkeys(kind.patterns):
            try:
                regexes.append(read_search(pattern))
            except PatternError as error:
                self._document.refuse(kind.source, "pattern", f"{pattern[:80]!r} cannot be enforced: {error}")
        return regexes

    def _small(self, kind: Kind, regexes: list[Regex]) -> bool:
        """Whether the patterns can be held as automata; SchemaError if not and the document is strict."""
        try:
            parts = [automaton(spelled(regex)) for regex in regexes]
            if kind.low or kind.high is not None:
                high = None if kind.high is None else max(kind.low, min(kind.high, MAX_COUNTED))
                combined([*parts, repeated(automaton(spelled(Chars(UNIVERSE))), kind.low, high)])
        except NothingMatches:
            return True
        except PatternError as error:
            self._document.refuse(kind.source, "pattern", f"cannot be enforced: {error}")
            return False
        return True

    def _run(self, kind: Kind, chars: Chars | None, low: int, high: int | None) -> Node | None:
        impossible = chars is not None and not chars.ranges and low > 0
        if impossible or (high is not None and low > high):
            self._document.note(kind.source, "pattern", "matches nothing of the allowed length")
            return None
        if high == 0:
            return Words(self._vocabulary, [b'""'])
        regex = ANY_CHAR if chars is None else spelled(chars)
        fills = chars is None or not without(tuple((byte, byte) for byte in sorted(FILLERS)), chars.ranges)
        run = Run(self._vocabulary, automaton(regex) if chars is not None else _any_char(), low, high, fills)
        return self._in_quotes(run, f"/{rust(join(QUOTE, times(regex, low, high), QUOTE))}/")

    def _in_quotes(self, body: Node, terminal: str) -> Node:
        quote = Words(self._vocabulary, [b'"'])
        node = Seq(quote, body, quote)
        node.terminal = terminal
        return node

    # -------------------------------------------------------------------------------------------- arrays

    def _array(self, kind: Kind, depth: int) -> Node | None:
        if kind.low > MAX_LEAST:
            raise SchemaError(f"minItems {kind.low:,} is more than {MAX_LEAST:,}.", "Lower it.", "minItems", "")
        first: list[Node] = []
        own = max((len(schemas) for schemas, _ in kind.arrays), default=0)
        item: Node | None = None
        for position in [*range(own), None]:
            schemas = kind.item(position)
            node = self.place(schemas, depth) if schemas is not None else None
            if node is None:
                break
            if position is None:
                item = node
            else:
                first.append(node)
        high = kind.high if item is not None else min(len(first), len(first) if kind.high is None else kind.high)
        if high is not None and kind.low > high:
            self._document.note(kind.source, "minItems", f"asks for {kind.low} items where {high} can be")
            return None
        self._count(2 * len(first) + 4)
        return self._enclosed("[", self._items(first, item, kind.low, high))

    def _items(self, first: list[Node], item: Node | None, low: int, high: int | None) -> Node:
        """At least `low` items, the first ones each with their own node."""
        own = len(first) if high is None else min(len(first), high)
        after: Node = EMPTY
        most = None if high is None else high - own
        if item is not None and most != 0:
            more = Seq(self._comma, item)
            if own:
                after = repeat(more, max(0, low - own), most)
            else:
                after = Seq(item, repeat(more, max(0, low - 1), None if most is None else most - 1))
                after = after if low else optional(after)
        for position in range(own - 1, -1, -1):
            after = Seq(first[position], after) if position == 0 else Seq(self._comma, first[position], after)
            after = after if position < low else optional(after)
        return after

    # -------------------------------------------------------------------------------------------- objects

    def _object(self, kind: Kind, depth: int) -> Node | None:
        members: list[tuple[Node, bool]] = []
        for name in kind.listed:
            schemas = kind.named(name)
            allowed = schemas is not None and all(self._document.valid(schema, name) for schema in kind.names)
            value = self.place(schemas, depth) if allowed and schemas is not None else None
            if value is not None:
                members.append((self._member(name, value, kind.source), name in kind.required))
            elif name in kind.required:
                self._document.note(kind.source, "required", f"asks for {name!r}, which cannot be")
                return None
        free = self._free_members(kind, depth)
        inside = self._members(members, free, kind.low, kind.high)
        if inside is None:
            self._document.note(kind.source, "minProperties", "cannot be met, or only by names that might repeat")
            return None
        return self._enclosed("{", inside)

    def _free_members(self, kind: Kind, depth: int) -> Node | None:
        """A member that the schema does not name: by a pattern, or additional."""
        patterns = tuple(dict.fromkeys(pattern for members in kind.members for pattern in members.patterns))
        options: list[Node] = []
        for pattern in patterns:
            schemas: list[Any] = []
            for members in kind.members:
                additional = True if members.additional is None else members.additional
                schemas.append(members.patterns.get(pattern, additional))
            others = tuple(other for other in patterns if other != pattern)
            options += self._free_member(kind, schemas, (pattern,), others, depth)
        if kind.open:
            schemas = [members.additional for members in kind.members if members.additional is not None]
            options += self._free_member(kind, schemas, (), patterns, depth)
        return None if not options else options[0] if len(options) == 1 else Alt(*options)

    def _free_member(
        self, kind: Kind, schemas: list[Any], wanted: tuple[str, ...], unwanted: tuple[str, ...], depth: int
    ) -> list[Node]:
        value = None if False in schemas else self.place(conjunction(schemas), depth)
        key = None if value is None else self._free_key(kind, wanted, unwanted)
        if value is None or key is None:
            return []
        self._count(4)
        colon = Seq(Words(self._vocabulary, [b":"]), self._space)
        colon.terminal = f"/{rust(join(literal(':'), _SPACE))}/"
        return [Seq(key, colon, value)]

    def _free_key(self, kind: Kind, wanted: tuple[str, ...], unwanted: tuple[str, ...]) -> Node | None:
        """A key in plain spelling that none of the named properties has: no escape could hide a second one of them."""
        keys = [times(RAW_CHAR, 0, None), *map(read_search, wanted)]
        for names in self._kinds.of((*kind.names, {"type": "string"})) if kind.names else ():
            if names.type == "value" or names.low or names.high is not None or len(keys) > len(wanted) + 1:
                self._document.refuse(kind.source, "propertyNames", "is enforced for names that are given and patterns")
                return None
            keys += self._regexes(names)
        quoted_keys = [quoted(key) for key in keys]
        taken = [self._spell(name, kind.source) for name in kind.listed]
        forbidden = [quoted(read_search(pattern)) for pattern in unwanted]
        terminal = " & ".join(f"/{rust(join(QUOTE, key, QUOTE) if key is keys[0] else quoted(key))}/" for key in keys)
        barred = [f"/{rust(regex)}/" for regex in (*(literal(word.decode()) for word in taken), *forbidden)]
        if barred:
            terminal += f" & ~({' | '.join(barred)})"
        unwanted_keys: list[Automaton] = [automaton(regex) for regex in forbidden]
        if taken:
            unwanted_keys.append(words_automaton(taken))
        try:
            plain = [automaton(join(QUOTE, keys[0], QUOTE)), *map(automaton, quoted_keys[1:])]
            return Auto(self._vocabulary, combined(plain, unwanted_keys), terminal, quoted=True)
        except NothingMatches:
            return None
        except PatternError as error:
            self._document.refuse(kind.source, "additionalProperties", f"cannot be enforced here: {error}")
            return None

    def _members(self, members: list[tuple[Node, bool]], free: Node | None, low: int, high: int | None) -> Node | None:
        """`low` to `high` members in their order, then free ones. Free names may repeat, so only one of them counts."""
        needed = sum(required for _, required in members)
        if low <= needed:
            low = 0
        counts = low > 0 or (high is not None and (free is not None or high < len(members)))
        known: dict[tuple[int, int], Node | None] = {}
        more = Seq(self._comma, free) if free is not None else None

        def tail(done: int) -> Node | None:
            lack, most = max(0, low - done), None if high is None else high - done
            if most is not None and (most < 0 or most < lack):
                return None
            if free is None or more is None or most == 0:
                return None if lack else EMPTY
            if lack > 1:
                return None
            if done:
                return repeat(more, lack, most)
            node = Seq(free, repeat(more, 0, None if most is None else most - 1))
            return node if lack else optional(node)

        states = range(len(members) + 1) if counts else range(2)
        for position in range(len(members), -1, -1):
            for done in states:
                if done > (position if counts else min(position, 1)):
                    continue
                if position == len(members):
                    known[position, done] = tail(done)
                    continue
                member, required = members[position]
                after = known[position + 1, done + 1 if counts else 1]
                own = None if after is None else Seq(member, after) if not done else Seq(self._comma, member, after)
                skipped = None if required else known[position + 1, done]
                options = [node for node in (own, skipped) if node is not None]
                self._count(2)
                known[position, done] = None if not options else options[0] if len(options) == 1 else Alt(*options)
        return known[0, 0]


@lru_cache(1)
def _any_char() -> Automaton:
    return automaton(ANY_CHAR)
