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
from typing import Any

from karakoram.engine.constrain.automaton import automaton
from karakoram.engine.constrain.grammar import EMPTY, Alt, Auto, Node, Seq, TextTooLong, Words, optional, repeat
from karakoram.engine.constrain.regex import NothingMatches, PatternError, Regex, join, literal, read_full, rust
from karakoram.engine.constrain.schema.document import Document
from karakoram.engine.constrain.schema.kinds import Conjunction, Kind, Kinds, conjunction
from karakoram.engine.constrain.schema.numbers import number_grammar
from karakoram.engine.constrain.schema.strings import MAX_LEAST, Strings
from karakoram.engine.constrain.vocabulary import OPTIONAL, Vocabulary
from karakoram.errors import SchemaError

# Deep enough for what people nest; json.loads and jsonschema take about three times as much.
MAX_NESTING = 24
# Values without any schema repeat the whole of JSON at each level.
MAX_FREE_NESTING = 12
# Longer texts are not compared for the shortest whole.
MAX_COMPARED = 128
# Nodes of one grammar; llguidance compiles as many in about 0.1 s.
MAX_NODES = 20_000

_STRING = {"type": "string"}
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
        builder = _Builder(vocabulary, document)
        try:
            node = builder.place(conjunction(schemas), depth)
        except _TooLarge:
            continue
        except TextTooLong as error:
            raise SchemaError(f"{error}.", "Ask for fewer items or characters.", "minItems", "") from error
        if node is None:
            keyword, where, why = document.reason(builder.possible)
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
        self._strings = Strings(vocabulary, document)
        self._kinds_of: dict[tuple[int, ...], list[Kind]] = {}
        self._places: dict[tuple[tuple[int, ...], int], Node | None] = {}
        self._made = 0
        self.possible: set[int] = set()
        """Ids of schemas that are satisfied at some depth: recursion always runs out of levels somewhere."""
        self._gap, self._space = self._optional_space(_GAP), self._optional_space(_SPACE)
        self._comma = self._punctuation(",", True)
        self._colon = Seq(Words(vocabulary, [b":"]), self._space)
        self._colon.terminal = f"/{rust(join(literal(':'), _SPACE))}/"
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
            node = self._places[key] = self._any_of(self._kinds_of[identity], depth)
            if node is not None:
                self.possible.update(id(kind.source) for kind in self._kinds_of[identity])
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
        if len(options) < 2:
            return options[0] if options else None
        node = Alt(*options)
        # Which text is cheapest depends on its neighbours: `":"",` is one token or two, `":null,` is three.
        texts = [option.text for option in options if len(option.text) <= MAX_COMPARED]
        if texts:
            node.text = min(texts, key=lambda text: (self._vocabulary.cost(b'":' + text + b","), len(text)))
        return node

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
            return self._strings.node(kind)
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
        for multiples in (kind.multiples, ()):
            try:
                numbers, terminal = number_grammar(kind.interval, kind.integer, multiples)
            except NothingMatches:
                break
            except PatternError as error:
                self._document.refuse(kind.source, "multipleOf", f"cannot be enforced: {error}")
                continue
            self._document.spend(len(numbers.rows))
            return Auto(self._vocabulary, numbers, terminal)
        self._document.note(kind.source, "minimum", "leaves no number")
        return None

    # -------------------------------------------------------------------------------------------- arrays

    def _array(self, kind: Kind, depth: int) -> Node | None:
        if kind.low > MAX_LEAST:
            where = self._document.where(kind.source)
            raise SchemaError(f"minItems {kind.low:,} is more than {MAX_LEAST:,}.", "Lower it.", "minItems", where)
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
        names = self._kinds.of((*kind.names, _STRING)) if kind.names else []
        given = [name.value for name in names if name.type == "value"]
        listed = kind.listed if not given else tuple(dict.fromkeys([*kind.listed, *given]))
        for name in listed:
            schemas = kind.named(name)
            allowed = schemas is not None and all(self._document.valid(schema, name) for schema in kind.names)
            value = self.place(schemas, depth) if allowed and schemas is not None else None
            if value is not None:
                members.append((self._member(name, value, kind.source), name in kind.required))
            elif name in kind.required:
                self._document.note(kind.source, "required", f"asks for {name!r}, which cannot be")
                return None
        rules = [name for name in names if name.type != "value"]
        free = inside = None
        for is_open in (kind.open, True):
            if not kind.names or rules:
                free = self._free_members(kind, rules, listed, is_open, depth)
            inside = self._members(members, free, kind.low, kind.high)
            if inside is not None:
                break
        if inside is None and free is not None and kind.low > 1:
            why = "cannot be enforced: free names might repeat, so only one of them would count"
            self._document.refuse(kind.source, "minProperties", why)
            inside = self._members(members, free, 0, kind.high)
        if inside is None:
            self._document.note(kind.source, "minProperties", "cannot be met")
            return None
        return self._enclosed("{", inside)

    def _free_members(
        self, kind: Kind, rules: list[Kind], listed: tuple[str, ...], is_open: bool, depth: int
    ) -> Node | None:
        """A member that the schema does not name: by a pattern, or (if open) additional; its name is of the kinds
        `rules`."""
        patterns = tuple(dict.fromkeys(pattern for members in kind.members for pattern in members.patterns))
        sorts: list[tuple[list[Any], list[str]]] = []
        for pattern in patterns:
            schemas: list[Any] = []
            for members in kind.members:
                additional = True if members.additional is None else members.additional
                schemas.append(members.patterns.get(pattern, additional))
            sorts.append((schemas, [pattern]))
        if is_open:
            sorts.append(([part.additional for part in kind.members if part.additional is not None], []))
        taken = [self._spell(name, kind.source) for name in listed]
        options: list[Node] = []
        for schemas, wanted in sorts:
            value = None if False in schemas else self.place(conjunction(schemas), depth)
            unwanted = [pattern for pattern in patterns if pattern not in wanted]
            try:
                key = None if value is None else self._strings.key(rules, wanted, unwanted, taken)
            except PatternError as error:
                self._document.refuse(kind.source, "propertyNames" if rules else "additionalProperties", f"{error}")
                key = None
            if key is not None and value is not None:
                self._count(4)
                options.append(Seq(key, self._colon, value))
        return None if not options else options[0] if len(options) == 1 else Alt(*options)

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
