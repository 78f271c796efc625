"""The tokenizers of RWKV: World (versions 4 World, 5, 6, 7) and 20B (version 4 Pile).

Both make tokens of bytes, so that what decodes is one table, `{id: bytes}`. They differ in how text becomes ids.
"""

import ast
import codecs
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

WORLD_FILE = "rwkv_vocab_v20230424.txt"
WORLD_SIZE = 2**16

# id, the literal of a str or bytes, and the number of bytes.
LINE = re.compile(
    r"""([0-9]{1,5}) (b?(?:'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")) ([0-9]{1,5})""",
)

# Bytes in which cuts are looked for at once; how many pieces between cuts are remembered, and up to which length.
BLOCK_BYTES, CACHED_PIECES, CACHED_PIECE_BYTES = 2**16, 2**16, 32


class RWKVTokenizer:
    """Text to token ids and back, as RWKV's models have learned it.

    World: each token is the longest one in the vocabulary that the rest of the bytes begins with. Any bytes can be
    encoded, and decoding gives them back. 20B: byte-level BPE, run by the package `tokenizers`.

    Id 0 is the end of a text, and padding; it decodes to nothing. World never encodes to it; 20B does where a text says
    `<|endoftext|>`.

    Args:
        vocabulary: path of a file of World's format, such as `rwkv_vocab_v20230424.txt`, or, if it ends in `.json`, of
            the `20B_tokenizer.json` of the RWKV-4 Pile models. None: the World vocabulary in the package `rwkv`.

    Attributes:
        vocab_size: number of ids, for the model: 65536 for World, 50277 for 20B.
        end_of_text: the id 0.

    Raises:
        FileNotFoundError: no such file, or `vocabulary` is None and the package `rwkv` is not installed.
        ValueError: the file is not what its name says; names the line.
        ImportError: a `.json` file needs the package `tokenizers`.

    Source: github.com/BlinkDL/ChatRWKV, `tokenizer/rwkv_tokenizer.py`.

    Example:

        tokenizer = RWKVTokenizer()
        ids = tokenizer.encode("The quick brown fox")
        assert tokenizer.decode(ids) == "The quick brown fox"
    """

    end_of_text = 0

    def __init__(self, vocabulary=None):
        path = _installed_vocabulary() if vocabulary is None else Path(vocabulary)
        self._vocabulary = _Pile(path) if path.suffix == ".json" else _World(path)
        self.vocab_size = self._vocabulary.size

    def encode(self, text):
        """The token ids of a text.

        Args:
            text: str or bytes (for 20B: of valid UTF-8), or a list of them.

        Returns:
            List of ints; for a list of texts a list of such lists.

        Raises:
            ValueError: something else than text, or a vocabulary of one's own lacks a byte of it.
        """
        if isinstance(text, list | tuple | np.ndarray):
            return [self.encode(one) for one in text]
        if not isinstance(text, str | bytes):
            raise ValueError(f"Expected a str, bytes, or a list of them. Received: {text!r}")
        return self._vocabulary.encode(text)

    def decode(self, ids):
        """The text of token ids.

        Args:
            ids: an int, a list or an array of ints, or a batch: a list of lists, an array `(b, t)`.

        Returns:
            A str, in which U+FFFD stands for bytes that are not UTF-8; for a batch a list of them.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """
        if len(np.shape(ids[:1] if isinstance(ids, list | tuple) else ids)) > 1:
            return [self.decode(row) for row in ids]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The bytes of token ids, an int or a list or array of ints; errors as in `decode`."""
        array = np.asarray(ids)
        if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"Expected token ids (t,), integers. Received: {ids!r:.200}")
        try:
            return b"".join([self._vocabulary.tokens[token] for token in array.ravel().tolist()])
        except KeyError as error:
            raise ValueError(f"Expected ids of {self._vocabulary.path}. Received: {error.args[0]}") from None

    def decoder(self):
        """A new `StreamDecoder`, for the ids of one text that come one after another."""
        return StreamDecoder(self)


class StreamDecoder:
    """The text of token ids that come one after another.

    A character may take several tokens: its bytes are held back until the last of them is there. All that was given
    out, `flush()` included, is what `tokenizer.decode` makes of all the ids.

    Args:
        tokenizer: a `RWKVTokenizer`.

    Example:

        tokenizer = RWKVTokenizer()
        decoder = tokenizer.decoder()
        for token in tokenizer.encode("one by one"):
            print(decoder.decode(token), end="")
        print(decoder.flush())
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, ids):
        """The text that the next ids complete; ids and errors as in `RWKVTokenizer.decode_bytes`."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def flush(self):
        """What was held back, as U+FFFD; then the decoder is as new."""
        return self._utf8.decode(b"", final=True)


class _World:
    """The longest token first, at each place.

    Text is cut where no token can lie across: between two bytes that are neighbours in no token (in World about every
    fifth byte of English). The ids of a piece between two cuts do not depend on what is around it, so they can be
    remembered: most pieces are words that come again.
    """

    size = WORLD_SIZE

    def __init__(self, path):
        self.path = path
        self.tokens, self._ids = _read_world(path)
        self._lengths = _lengths(self._ids)
        self._neighbours = _neighbours(self._ids)
        self.tokens[RWKVTokenizer.end_of_text] = b""
        self._cache: dict = {}

    def encode(self, text):
        ids: list = []
        cache = self._cache
        for piece in self._pieces(text.encode() if isinstance(text, str) else text):
            known = cache.get(piece)
            if known is None:
                known = self._longest_tokens(piece)
                if len(piece) <= CACHED_PIECE_BYTES:
                    if len(cache) >= CACHED_PIECES:
                        cache.clear()
                    cache[piece] = known
            ids += known
        return ids

    def _pieces(self, data):
        codes = np.frombuffer(data, "uint8")
        left, right = codes[:-1], codes[1:]
        start = 0
        for i in range(0, len(right), BLOCK_BYTES):
            block = slice(i, i + BLOCK_BYTES)
            cuts = np.flatnonzero(~self._neighbours[left[block], right[block]]) + (i + 1)
            for end in cuts.tolist():
                yield data[start:end]
                start = end
        yield data[start:]

    def _longest_tokens(self, piece):
        found, i = [], 0
        while i < len(piece):
            for length in self._lengths.get(piece[i : i + 2], (1,)):
                token = self._ids.get(piece[i : i + length])
                if token is not None:
                    break
            else:
                raise ValueError(f"{self.path} has no token that begins {piece[i : i + 20]!r}")
            found.append(token)
            i += length
        return tuple(found)


class _Pile:
    """Byte-level BPE in the format of the package `tokenizers`."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError(f"{path} needs the package tokenizers: pip install tokenizers") from None
        self.path = path
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{path} is not a file of the package tokenizers: {error}") from None
        added = self._tokenizer.get_added_tokens_decoder()
        if 0 not in added or not added[0].special:
            raise ValueError(f"{path}: expected id 0 to be the special token of the end of a text")
        self.size = self._tokenizer.get_vocab_size()
        try:
            self.tokens = {i: _bytes_of(token) for token, i in self._tokenizer.get_vocab(False).items()}
        except KeyError as error:
            raise ValueError(f"{path}: expected byte-level tokens, received one with {error}") from None
        self.tokens |= {i: b"" if one.special else one.content.encode() for i, one in added.items()}

    def encode(self, text):
        text = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def _installed_vocabulary():
    """The package is not imported: its modules need others, and one of them PyTorch."""
    package = find_spec("rwkv")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder, WORLD_FILE)
        if path.is_file():
            return path
    raise FileNotFoundError(f"Found no {WORLD_FILE}: `pip install rwkv`, or give a path: RWKVTokenizer(path).")


def _read_world(path):
    """`{id: bytes}` and `{bytes: id}` from lines `id literal length`."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    tokens: dict = {}
    ids: dict = {}
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        i, literal, length = match.groups() if (match := LINE.fullmatch(line)) else ("", "", "")
        token = _literal(literal)
        if not token:
            wrong = "expected `id literal length`, the literal of a str or of bytes and not empty"
        elif len(token) != int(length):
            wrong = f"the token has {len(token)} bytes"
        elif not 1 <= (i := int(i)) < WORLD_SIZE:
            wrong = f"expected an id in 1..{WORLD_SIZE - 1}"
        elif i in tokens:
            wrong = f"the id {i} is there already, for {tokens[i]!r}"
        elif token in ids:
            wrong = f"the token is there already, as id {ids[token]}"
        else:
            tokens[i], ids[token] = token, i
            continue
        raise ValueError(f"{path}, line {number}: {wrong}. Received: {line!r:.200}")
    return tokens, ids


def _literal(text):
    """What `ast.literal_eval` makes of the literal, as bytes; None if it is none. Few have an escape or a prefix."""
    if text[:1] == "'" and "\\" not in text:
        return text[1:-1].encode()
    try:
        value = ast.literal_eval(text)
        return value.encode() if isinstance(value, str) else value
    except (SyntaxError, ValueError):
        return None


def _lengths(tokens):
    """`{first two bytes: lengths of the tokens that begin so}`, from the longest to 1."""
    lengths: dict = {}
    for token in sorted(tokens, key=len):
        known = lengths.setdefault(token[:2], [1])
        if known[-1] != len(token):
            known.append(len(token))
    return {start: known[::-1] for start, known in lengths.items()}


def _neighbours(tokens):
    """`(256, 256)` bool: whether the two bytes stand side by side in a token."""
    codes = np.frombuffer(b"".join(tokens), "uint8")
    inside = np.ones(len(codes), bool)
    inside[np.cumsum([len(token) for token in tokens]) - 1] = False  # the last byte of each has no right neighbour
    at = np.flatnonzero(inside)
    neighbours = np.zeros((256, 256), bool)
    neighbours[codes[at], codes[at + 1]] = True
    return neighbours


def _bytes_of(token):
    """The bytes behind a token of byte-level BPE, in which a printable character stands for each byte."""
    return bytes([_BYTES[character] for character in token])


def _byte_of_character():
    """GPT-2's table: printable bytes of Latin-1 stand for themselves, the others for U+0100, U+0101, ... in turn."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_of_character()
