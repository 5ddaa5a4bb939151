"""Encoders: text in, unit vectors out.

Two encoders ship with the package, both made by `classifiers/make_encoders.py` from all-MiniLM-L6-v2:
`StaticEncoder` (a table of one vector per word piece; microseconds) and `MiniLMEncoder` (the transformer itself
as an int8 ONNX graph; milliseconds). `classifiers.sentence_transformer` adds a third for a user's own folder.

All of them keep the contract of `Encoder`; `tests/contracts/test_encoders.py` holds them to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

if TYPE_CHECKING:
    import onnxruntime

Vectors = NDArray[np.float32]

DATA_DIRECTORY = Path(__file__).resolve().parent / "data"
MANIFEST_FORMAT = 1

# A text longer than this is cut before it is tokenised, so that the work of one text is bounded.
MAX_CHARACTERS = 8192
# The transformer reads this many word pieces, [CLS] and [SEP] included (its training length).
MAX_PIECES = 128

# Plain text, and the words into which BERT's pre-tokeniser splits it once it is in lower case.
_PLAIN = re.compile(r"[\t\n\r -~]*")
_PLAIN_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")
# So many words are remembered with their pieces, none longer than this.
REMEMBERED_WORDS, REMEMBERED_CHARACTERS = 16_384, 40


class ArtefactError(RuntimeError):
    """A shipped or learned file is missing, damaged, of an unknown format or made for another encoder."""


class EncoderUnavailableError(RuntimeError):
    """The encoder needs a package that is not installed; the message says which and how to get it."""


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into vectors of one fixed space.

    `id` is stable for the same artefact bytes and changes with them: it belongs into every key under which a
    vector (or anything learned on one) is stored.
    """

    @property
    def id(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return float32 of shape (len(texts), dimensions), every row of length 1.

        A text without any known piece gives a fixed unit vector, never NaN or zeros. A row does not depend on
        the other texts of the call. May be called from several threads at once.
        """
        ...


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One encoder of a manifest: its id, width and the SHA-256 of every file it reads."""

    id: str
    dimensions: int
    files: dict[str, str]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read in pieces. Raises ArtefactError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ArtefactError(
            f"artefact file {path.name} cannot be read ({error.strerror}): reinstall farthing, or run "
            "`python -m classifiers.make_encoders` in a checkout"
        ) from error


def encoder_id(name: str, files: dict[str, str]) -> str:
    """Return `name-` and 12 hex digits of a hash over the hashes of the encoder's files, in order of name."""
    joined = "\n".join(f"{file} {files[file]}" for file in sorted(files))
    return f"{name}-{hashlib.sha256(joined.encode()).hexdigest()[:12]}"


def read_manifest(directory: Path, name: str) -> ManifestEntry:
    """Read one encoder's entry of `manifest.json` and verify every file against it.

    Raises ArtefactError when the manifest or a file is missing, damaged or of an unknown format.
    """
    path = directory / "manifest.json"
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} is missing or not JSON: reinstall farthing") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ArtefactError(f"{path}: unknown manifest format; this version reads format {MANIFEST_FORMAT}")
    try:
        raw = manifest["encoders"][name]
        files = {str(file): str(details["sha256"]) for file, details in raw["files"].items()}
        entry = ManifestEntry(id=str(raw["id"]), dimensions=int(raw["dimensions"]), files=files)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtefactError(f"{path}: no complete entry for encoder {name!r}") from error
    for file, expected in files.items():
        if Path(file).name != file:
            raise ArtefactError(f"{path}: {file!r} is not a plain file name")
        actual = file_sha256(directory / file)
        if actual != expected:
            raise ArtefactError(
                f"artefact file {file} does not match the manifest (sha256 {actual[:12]}..., expected "
                f"{expected[:12]}...): it is damaged or was replaced; reinstall farthing"
            )
    if entry.id != encoder_id(name, files):
        raise ArtefactError(f"{path}: the id of encoder {name!r} does not belong to its files")
    return entry


def load_tokenizer(path: Path, *, max_pieces: int | None) -> Tokenizer:
    """Load a tokenizer without padding, cut at `max_pieces` (None: not at all).

    The file published with MiniLM pads every text to 128 pieces and truncates there; both are overridden.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    if max_pieces is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(max_length=max_pieces)
    return tokenizer


class StaticEncoder:
    """Mean of one stored vector per word piece, then scaled to length 1.

    The table is int8 with one float32 scale per row; the scale also carries the piece's inverse-frequency
    weight (a / (a + p), Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings").
    """

    def __init__(self, *, id: str, tokenizer: Tokenizer, table: NDArray[np.int8], scales: Vectors) -> None:
        self._id = id
        self._tokenizer = tokenizer
        self._table = table
        self._scales = scales
        self._added_tokens = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._word_pieces = tokenizer.model
        self._remembered = lru_cache(maxsize=REMEMBERED_WORDS)(self._pieces_of_word)
        fallback = np.zeros(table.shape[1], dtype=np.float32)
        # The last component has the least variance: a text without known pieces is near to no other.
        fallback[-1] = 1.0
        self._fallback = fallback

    @classmethod
    def load(cls, directory: Path | None = None) -> StaticEncoder:
        """Load the shipped table (or that of `directory`). Raises ArtefactError on any mismatch."""
        directory = directory or DATA_DIRECTORY
        entry = read_manifest(directory, "static")
        with np.load(directory / "static.npz", allow_pickle=False) as arrays:
            table, scales = arrays["table"], arrays["scales"]
        if table.dtype != np.int8 or table.shape != (scales.shape[0], entry.dimensions):
            raise ArtefactError("static.npz: the table's shape or type is not what the manifest says")
        tokenizer = load_tokenizer(directory / "tokenizer.json", max_pieces=None)
        return cls(id=entry.id, tokenizer=tokenizer, table=table, scales=scales)

    @property
    def id(self) -> str:
        return self._id

    @property
    def dimensions(self) -> int:
        return int(self._table.shape[1])

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See `Encoder.encode`. Reads the first 8,192 characters of each text."""
        if len(texts) == 1:
            return self._vector(texts[0])[None]
        result = np.empty((len(texts), self.dimensions), dtype=np.float32)
        for row, text in enumerate(texts):
            result[row] = self._vector(text)
        return result

    def _vector(self, text: str) -> Vectors:
        pieces = self._pieces(bounded(text))
        if not pieces:
            return self._fallback.copy()
        # Not a product of BLAS, whose threads cost milliseconds on a busy machine.
        vector: Vectors = np.einsum(
            "i,ij->j", self._scales.take(pieces), self._table.take(pieces, axis=0).astype(np.float32)
        )
        length = math.sqrt(vector.dot(vector))
        if length <= 1e-12:
            return self._fallback.copy()
        vector /= length
        return vector

    def _pieces(self, text: str) -> list[int]:
        """Return the ids of a text's word pieces, as the tokenizer does.

        The tokenizer takes longer than all that follows. Plain text is split here, and its words, which recur from
        prompt to prompt, are looked up. The tokenizer sees each word once and all other text: that with letters
        beyond ASCII, control characters (it drops them) or a written [MASK].
        """
        if not (text.isascii() and (text.isprintable() or _PLAIN.fullmatch(text))) or (
            "[" in text and any(token in text for token in self._added_tokens)
        ):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        pieces: list[int] = []
        for word in _PLAIN_WORD.findall(text.lower()):
            pieces += (self._remembered if len(word) <= REMEMBERED_CHARACTERS else self._pieces_of_word)(word)
        return pieces

    def _pieces_of_word(self, word: str) -> list[int]:
        return [piece.id for piece in self._word_pieces.tokenize(word)]


class MiniLMEncoder:
    """all-MiniLM-L6-v2 as an int8 ONNX graph: ids in, pooled and normalised vector out.

    One text per run: int8 scales activations per run, so padding or neighbours would change a text's vector,
    and on one core batching gains nothing. onnxruntime is imported when the encoder is loaded.
    """

    def __init__(
        self, *, id: str, dimensions: int, tokenizer: Tokenizer, session: onnxruntime.InferenceSession
    ):
        self._id = id
        self._dimensions = dimensions
        self._tokenizer = tokenizer
        self._session = session

    @classmethod
    def load(cls, directory: Path | None = None) -> MiniLMEncoder:
        """Load the shipped graph (or that of `directory`).

        Raises ArtefactError on any mismatch, EncoderUnavailableError when onnxruntime cannot be imported.
        """
        directory = directory or DATA_DIRECTORY
        entry = read_manifest(directory, "minilm")
        # Left to itself the library keeps usage records on disk and reports them.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime
        except ImportError as error:
            raise EncoderUnavailableError(
                "the minilm encoder needs onnxruntime: pip install 'onnxruntime>=1.22'"
            ) from error
        options = onnxruntime.SessionOptions()
        # One thread: the gateway shares its cores with the event loop, and a short prompt gains nothing from more.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        # The arena keeps the largest run's memory for ever; without it the process stays small.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(directory / "minilm.onnx"), sess_options=options, providers=["CPUExecutionProvider"]
        )
        tokenizer = load_tokenizer(directory / "tokenizer.json", max_pieces=MAX_PIECES)
        return cls(id=entry.id, dimensions=entry.dimensions, tokenizer=tokenizer, session=session)

    @property
    def id(self) -> str:
        return self._id

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See `Encoder.encode`. Reads the first 128 word pieces of each text."""
        result = np.empty((len(texts), self._dimensions), dtype=np.float32)
        for row, text in enumerate(texts):
            ids = np.asarray([self._tokenizer.encode(bounded(text)).ids], dtype=np.int64)
            result[row] = self._session.run(None, {"input_ids": ids})[0][0]
        return result


def bounded(text: str) -> str:
    """Cut the text at 8,192 characters and replace lone surrogates (JSON can carry them, tokenizers refuse them)."""
    text = text[:MAX_CHARACTERS]
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode(errors="replace").decode()
    return text
