"""Text from tokens as they come: whole characters only, and in the end what all tokens together decode to."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character, or not a whole one yet


class TextStream:
    """Decodes token ids that come a few at a time. decode(ids) -> text, of a byte-level tokenizer.

    The bytes of a character may lie in several tokens. Decoded as far as they have come, they end in one UNKNOWN: that
    is held back until the next token, or `end`, shows what it is. After a whole character a decoder starts afresh, so
    only the tokens since then are decoded again.
    """

    def __init__(self, decode):
        self._decode, self._ids, self._shown = decode, [], 0

    def add(self, ids):
        """The text that these ids complete, maybe none."""
        self._ids += ids
        text = self._decode(self._ids)
        whole = text.removesuffix(UNKNOWN)
        new, self._shown = whole[self._shown :], len(whole)
        if whole == text:
            self._ids, self._shown = [], 0
        return new

    def end(self):
        """The rest: what is left of a character that never became whole."""
        text = self._decode(self._ids)[self._shown :]
        self._ids, self._shown = [], 0
        return text
