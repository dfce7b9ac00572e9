"""Untrusted text made harmless for one tokenizer: whatever it would read as markup is broken up.

Markup is what the tokenizer knows as an added token, special or not, and what a template writes as plain text: block
ends, and role words at the start of a line. It is looked for as a tokenizer, or a person, may read the text: without
invisible characters, in any case and width, with look-alikes; and at last in the tokens themselves.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

BREAKS = (" ", "_", "-", ".")  # the first that keeps a marker's two parts apart for the tokenizer
MAX_ROUNDS = 8  # breaking one thing up can make another
LINE = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
BLANK = "\u2581\u2800\u3164\uffa0\u115f\u1160"  # shown as a space, or read as one
INVISIBLE = ("Cc", "Cf", "Mn", "Me")  # control and format characters, and marks on letters
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
LOOK_ALIKES = str.maketrans(  # brackets, strokes and colons; Cyrillic and Greek letters like Latin ones
    "\u2039\u203a\u3008\u3009\u27e8\u27e9\u3008\u3009\u276e\u276f\u227a\u227b\u2215\u2044\u29f8\u2223"
    "\u01c0\u00a6\ua4fd\u0589\u05c3\uff1a\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422"
    "\u0423\u0425\u0405\u0406\u0408\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0455\u0456\u0458\u0391"
    "\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "<><><><><><>///|||::::ABEKMHOPCTYXSIJaeopcyxsijABEZHIKMNOPTYXo",
)


class Plain(NamedTuple):
    """A harmless text, with the characters `(start, end)` of each of its tokens."""

    text: str
    offsets: list[tuple[int, int]]


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Added tokens of a tokenizer, special or not, that are markup: not plain words, nor runs of spaces."""
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    return {index: text for index, text in added.items() if any(not c.isalnum() and not _is_space(c) for c in text)}


class Disarmer:
    """Breaks markup up in untrusted texts for one (fast) tokenizer."""

    def __init__(self, tokenizer: Any, markers: Sequence[str] = (), roles: Sequence[str] = ()) -> None:
        """`markers`: what a template writes as plain text; `roles`: its words for who speaks, before a colon."""
        self.tokenizer = tokenizer
        self.markers = list(markers)
        # of an unknown character, a tokenizer makes a token that has no meaning in any template
        self._control = set(control_tokens(tokenizer)) - {getattr(tokenizer, "unk_token_id", None)}
        spaced, narrow = (list(ids) for ids in tokenizer(["a\n  < b", "a<b"], add_special_tokens=False)["input_ids"])
        self._sees_spaces = spaced != narrow
        self._pattern = self._compile(roles)
        self._break = next((b for b in BREAKS if self._separates(b)), BREAKS[-1])

    def __call__(self, texts: Sequence[str]) -> list[Plain]:
        """The texts without markup. Text that has none, and that is nothing's look-alike, stays as it is."""
        plain = [self._without_markers(text) for text in texts]
        tokens: list[Plain] = [Plain("", [])] * len(plain)
        open_texts = list(range(len(plain)))
        for number in range(MAX_ROUNDS + 1):
            if not open_texts:
                break
            encoded = self._encode([plain[i] for i in open_texts])
            decoded = self.tokenizer.backend_tokenizer.decode_batch(encoded["input_ids"], skip_special_tokens=False)
            parts = zip(open_texts, encoded["input_ids"], encoded["offset_mapping"], decoded, strict=True)
            open_texts = []
            for i, ids, offsets, read in parts:
                mended = self._mended(plain[i], ids, offsets, read)
                if mended == plain[i]:
                    tokens[i] = Plain(plain[i], offsets)
                else:  # in the end, words are all that is left
                    plain[i] = mended if number < MAX_ROUNDS - 1 else re.sub(r"[\W_]+", " ", mended)
                    open_texts.append(i)
        return tokens

    def _mended(self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], read: str) -> str:
        """The text after a look at its tokens: without control tokens, or as they read, without markers."""
        if not self._control.isdisjoint(ids):
            spans = [span for index, span in zip(ids, offsets, strict=True) if index in self._control]
            return self._broken(text, [(start, end, text[start:end]) for start, end in spans])
        if read.strip() != text.strip() and (harmless := self._without_markers(read)) != read:
            return harmless
        return text

    def _without_markers(self, text: str) -> str:
        if self._pattern is None:
            return text
        for _ in range(MAX_ROUNDS):
            spans = list(self._found(text))
            if not spans:
                return text
            text = self._broken(text, spans)
        return re.sub(r"[\W_]+", " ", text)

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Where a marker or a role at the start of a line is, and how it is written out plainly."""
        if self._pattern is None:
            return
        if text.isascii() and not CONTROL.search(text):
            folded, origin = text.lower(), None
        else:
            folded, origin = _fold(text)
        for match in self._pattern.finditer(folded):
            group = match.lastgroup or ""
            start, last = match.start(group), match.end(group) - 1
            if origin is not None:
                start, last = origin[start], origin[last]
            yield start, last + 1, text[start : last + 1] if group == "role" else self.markers[int(group[1:])]

    def _broken(self, text: str, spans: Sequence[tuple[int, int, str]]) -> str:
        """The text with what stands at `spans` written in two parts."""
        for start, end, plain in reversed(spans):
            text = f"{text[:start]}{plain[:1]}{self._break}{plain[1:]}{text[end:]}"
        return text

    def _encode(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )

    def _compile(self, roles: Sequence[str]) -> re.Pattern[str] | None:
        def spelled(marker: str) -> str:
            parts = [r"\s+" if part.isspace() else re.escape(part) for part in re.findall(r"\s+|\S", _fold(marker)[0])]
            return "".join(parts) if self._sees_spaces else r"\s*".join(part for part in parts if part != r"\s+")

        parts = [f"(?P<m{number}>{spelled(marker)})" for number, marker in enumerate(self.markers)]
        if roles:
            line = rf"[{LINE}]\s*" if self._sees_spaces else ""
            parts.append(rf"{line}\b(?P<role>{'|'.join(spelled(role) for role in roles)})(?=[^\S\n]*:)")
        return re.compile("|".join(parts)) if parts else None

    def _separates(self, mark: str) -> bool:
        """Whether a marker with `mark` in it is none any more, read back from its tokens."""
        broken = [f"{text[:1]}{mark}{text[1:]}" for text in (*self.markers, *control_tokens(self.tokenizer).values())]
        encoded = self._encode(broken)["input_ids"] if broken else []
        read = self.tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False)
        return not any(any(self._found(text)) for text in read) and all(self._control.isdisjoint(i) for i in encoded)


def _fold(text: str) -> tuple[str, list[int]]:
    """The text as it may be read: plain letters of one case, no invisible characters; and where each came from."""
    folded, origin = list[str](), list[int]()
    for index, character in enumerate(text):
        if character in LINE:
            read = "\n"
        elif _is_space(character):
            read = " "
        else:
            plain = unicodedata.normalize("NFKD", character).translate(LOOK_ALIKES)
            plain = unicodedata.normalize("NFKD", plain.casefold())
            shown = (c for c in plain if unicodedata.category(c) not in INVISIBLE)
            read = "".join(" " if _is_space(c) else c for c in shown)
        folded.append(read)
        origin += [index] * len(read)
    return "".join(folded), origin


def _is_space(character: str) -> bool:
    return character.isspace() or character in BLANK
