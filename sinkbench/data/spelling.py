"""The text that tokens spell, in bytes: what makes numbers of models with different tokenizers comparable."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Stretch = tuple[int, int]  # of consecutive tokens: the index of the first, and that behind the last
SPACE, NEWLINE = "▁", "<0x0A>"  # as SentencePiece writes them


@dataclass(frozen=True)
class TextSize:
    """How much text tokens spell.

    Attributes:
        tokens: how many.
        bytes: of UTF-8.
        words: what white space parts.
    """

    tokens: int
    bytes: int
    words: int


def predicted_text(
    tokenizer: Any, streams: Sequence[Sequence[int]], literal: bool, stretches: Sequence[Stretch] | None = None
) -> TextSize:
    """The size of the text that ids of streams spell: all of each stream but the first, or those of ``stretches``.

    Words that the end of a stretch parts count on both sides.

    Every token spells its own bytes, also part of a character, so that those of all tokens add up to the bytes of the
    text. A tokenizer of an unknown kind is asked to decode all of it.

    Args:
        tokenizer: of transformers.
        streams: ids of each, from its beginning.
        literal: whether a special token behind the first stands for itself, as in a text in which its name is written;
            in data that is tokenised already it parts documents, and spells nothing.
        stretches: of each stream, in order, those whose ids count.
    """
    counted = [[(1, len(ids))] if stretches is None else stretches for ids in streams]
    spelling = _Spelling.of(tokenizer, literal)
    texts = [text for ids, of_one in zip(streams, counted, strict=True) for text in spelling.texts(ids, of_one)]
    return TextSize(
        sum(max(end - begin, 0) for of_one in counted for begin, end in of_one),
        sum(map(len, texts)),
        sum(len(text.decode(errors="replace").split()) for text in texts),
    )


def spelled(tokenizer: Any, ids: Sequence[int], literal: bool) -> bytes:
    """The bytes that all of ``ids`` of one stream but the first spell, as for :func:`predicted_text`."""
    return b"".join(_Spelling.of(tokenizer, literal).texts(ids, [(1, len(ids))]))


@dataclass(frozen=True)
class _Spelling:
    """How a tokenizer spells.

    Attributes:
        literal: as for :func:`predicted_text`.
        decoders: :func:`_decoders`.
        of_piece: :func:`_reading`.
        added: tokens beside the vocabulary, by id.
        ends: the ids that the tokenizer puts behind a text, or before it.
    """

    tokenizer: Any
    literal: bool
    decoders: Sequence[tuple[str, dict[str, Any]]]
    of_piece: Callable[[str], bytes] | None
    added: dict[int, Any]
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, literal: bool) -> "_Spelling":
        """That of ``tokenizer``."""
        decoders = _decoders(tokenizer)
        of_piece = _reading(decoders, tokenizer)
        added = {} if of_piece is None else tokenizer.added_tokens_decoder
        ends = tokenizer("", verbose=False)["input_ids"] if of_piece and literal else ()
        return cls(tokenizer, literal, decoders, of_piece, added, frozenset(ends))

    def texts(self, ids: Sequence[int], stretches: Sequence[Stretch]) -> list[bytes]:
        """The bytes that ``ids`` of one stream spell in each of ``stretches``."""
        if self.of_piece is None:
            return [
                _decoded(self.tokenizer, ids[max(begin - 1, 0) : end], self.literal, begin > 0)
                for begin, end in stretches
            ]
        distinct = sorted(set(ids))
        pieces = dict(zip(distinct, self.tokenizer.convert_ids_to_tokens(distinct), strict=True))
        inner = {number: self._bytes(number, piece, not self.literal) for number, piece in pieces.items()}
        parts = [inner[number] for number in ids]
        parts[:1] = [self._bytes(ids[0], pieces[ids[0]], True)] if len(ids) else []
        if len(ids) > 1 and ids[-1] in self.ends:  # what the tokenizer puts behind a text
            parts[-1] = self._bytes(ids[-1], pieces[ids[-1]], True)
        if any(kind == "Metaspace" or (kind == "Strip" and one.get("start")) for kind, one in self.decoders):
            first = next((place for place, part in enumerate(parts) if part), None)
            if first is not None:  # the space that is put before a text
                parts[first] = parts[first].removeprefix(b" ")
        return [b"".join(parts[begin:end]) for begin, end in stretches]

    def _bytes(self, number: int, piece: str | None, silent: bool) -> bytes:
        token = self.added.get(number)
        if token is None:
            assert self.of_piece is not None
            return self.of_piece(piece or "")
        return b"" if token.special and silent else token.content.encode()


def _decoders(tokenizer: Any) -> list[tuple[str, dict[str, Any]]]:
    """The steps by which a fast tokenizer makes text of its pieces, by their kinds; none where it does not say.

    One that has no decoder cuts its pieces in a way that tells as much.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    part = getattr(backend, "decoder", None) or getattr(backend, "pre_tokenizer", None)
    if part is None:
        return []
    return [(step.get("type", ""), step) for step in _steps(json.loads(part.__getstate__()))]


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if part.get("type") != "Sequence":
        yield part
    for step in part.get("decoders") or part.get("pretokenizers") or ():
        yield from _steps(step)


def _reading(decoders: Sequence[tuple[str, dict[str, Any]]], tokenizer: Any) -> Callable[[str], bytes] | None:
    """From a piece of the vocabulary to the bytes that it spells; ``None`` where that is not known."""
    kinds = {kind for kind, _ in decoders}
    # a file in GGUF brings the steps of both kinds: then its pieces say which it is
    if "ByteLevel" in kinds and not ("ByteFallback" in kinds and NEWLINE in tokenizer.get_vocab()):
        of_character = _byte_characters()
        return lambda piece: b"".join(of_character.get(character, character.encode()) for character in piece)
    spaces = "Metaspace" in kinds or any(
        kind == "Replace" and step.get("pattern") == {"String": SPACE} for kind, step in decoders
    )
    if not spaces or kinds - {"Metaspace", "Replace", "ByteFallback", "ByteLevel", "Fuse", "Strip"}:
        return None
    return lambda piece: _byte(piece) or piece.replace(SPACE, " ").encode()


def _byte(piece: str) -> bytes:
    """The byte that ``<0xAB>`` names; nothing for other pieces."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return b""
    return b""


def _byte_characters() -> dict[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for (as GPT-2 writes them)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): bytes([byte]) for byte in printed} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


def _decoded(tokenizer: Any, ids: Sequence[int], literal: bool, but_first: bool) -> bytes:
    """By the tokenizer's own decoding, without what the first token spells where that does not count."""
    first, whole = (
        tokenizer.decode(list(part), skip_special_tokens=not literal, clean_up_tokenization_spaces=False)
        for part in (ids[:1], ids)
    )
    return whole.removeprefix(first if but_first else "").encode(errors="replace")
