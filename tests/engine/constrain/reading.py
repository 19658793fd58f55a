"""Whether a grammar takes a text, asked of both its readers at once: llguidance's matcher and our front."""

from karakoram.engine.constrain.front import Front
from karakoram.engine.constrain.guided import GuidedGrammar


def prefix_read(grammar: GuidedGrammar, text: bytes) -> tuple[int, bool]:
    """(bytes that fit, whether all of them are a whole text); the two readers must not differ."""
    front, mine = Front.of(grammar.root), 0
    for byte in text:
        reached = front.after(bytes([byte]))
        if reached is None:
            break
        front, mine = reached, mine + 1
    matcher = grammar.matcher.deep_copy()
    theirs = matcher.try_consume_tokens([grammar.vocabulary.ids[bytes([byte])] for byte in text])
    assert theirs == mine, f"llguidance reads {theirs} bytes, the front {mine}, of {text!r}"
    whole = mine == len(text) and front.complete
    assert whole == (theirs == len(text) and (matcher.is_accepting() or matcher.is_stopped())), text
    return mine, whole


def reads(grammar: GuidedGrammar, text: str) -> bool:
    """Whether the whole text is in the grammar's language."""
    return prefix_read(grammar, text.encode("utf-8"))[1]
