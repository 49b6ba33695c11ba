"""The text that dictionaries are trained on: clean licences, no evaluation text, and mostly emotion prompts.

A dictionary trained on running text alone explains little of what the model holds where it is about to name an
emotion. The mix therefore has two parts: *read-outs*, the last positions of many different emotion prompts built from
unlabelled text over every prompt template of the book, and *running text*. Passages that share a sentence with any
evaluation text are left out, by hash.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emosae_utils.data import EMOTIONS, cards, is_present, load_corpus
from emosae_utils.files import EmosaeError, cache_dir, sha256_file, sha256_text
from emosae_utils.models import LM
from emosae_utils.scoring import DEFAULT_TEMPLATE, TEMPLATES, options_text

PERSONS: tuple[str, ...] = (
    "the person", "the writer", "the speaker", "the narrator", "the woman", "the man", "my friend", "my sister",
    "Anna", "David", "Maria", "Tom", "she", "he", "the child", "the author",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text of a source. `held_out` documents are never trained on."""

    source: str
    name: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class Source:
    """Where documents come from: files below the public-data folder, and how to read them."""

    name: str
    licence: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[tuple[str, str]]]
    share: float


def _books(path: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield f"{row['book']}/{row['part']}", row["text"]


def _stories(path: Path) -> Iterator[tuple[str, str]]:
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        yield f"{path.stem}/{i}", json.loads(line)["text"]


def _reviews(path: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".txt")):
            # The files are tokenised, one sentence a line: "the film , which is n't".
            text = archive.read(name).decode("latin-1")
            text = re.sub(r"\s+([.,!?;:%)\]'])", r"\1", re.sub(r"([(\[$])\s+", r"\1", text))
            text = re.sub(r"\s+(n't\b)", r"\1", re.sub(r'"\s+([^"]*?)\s+"', r'"\1"', text))
            yield Path(name).stem, " ".join(s[:1].upper() + s[1:] for s in text.splitlines())


def _comments(path: Path) -> Iterator[tuple[str, str]]:
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        yield str(i), line.split("\t")[0]


SOURCES: tuple[Source, ...] = (
    Source("goemotions-train", "Apache-2.0", ("goemotions/ekman/train.tsv",), _comments, 0.35),
    Source("standard-ebooks", "public domain, CC0", ("standard-ebooks/standard_ebooks.jsonl.gz",), _books, 0.25),
    Source("sonnet-emotion-stories", "MIT", ("sonnet-emotion-stories/stories/*.jsonl",), _stories, 0.25),
    Source("movie-reviews", "CC BY 4.0", ("movie-reviews/movie_reviews.zip",), _reviews, 0.15),
)


def normalised(text: str) -> str:
    """Letters and digits of a text in lower case, single-spaced: what its hash is taken of."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def sentences(text: str) -> list[str]:
    """Split at sentence ends followed by a capital or an opening quote, and at line ends."""
    marked = re.sub(r"([.!?…][\"'”’)\]]*)\s+(?=[\"'“‘(\[]?[A-Z0-9])", "\\1\n", text)
    return [s.strip() for s in marked.split("\n") if s.strip()]


# A shared sentence shorter than this ("Thank you so much!") says nothing about where a passage comes from.
MIN_SHARED_WORDS = 5


def _hashes(texts: Iterable[str]) -> set[str]:
    found = set()
    for text in texts:
        for piece in (text, *sentences(text)):
            words = normalised(piece)
            if words.count(" ") + 1 >= MIN_SHARED_WORDS:
                found.add(sha256_text(words))
    return found


def _data_dir() -> Path:
    """The public-data folder; without one, a folder in which nothing will be found."""
    return Path(os.environ.get("EMOSAE_DATA_DIR") or cache_dir() / "datasets")


def evaluation_hashes() -> set[str]:
    """Hashes of every text that is ever evaluated on, and of its sentences, among the datasets that are here.

    A labelled set that is also a source of the mix keeps its discovery split for training; of every other set, and of
    the running text that language modelling is measured on, nothing may enter.
    """
    found: set[str] = set()
    for card in cards():
        if not is_present(card.name):
            continue
        frame = load_corpus(card.name, emotions=None).frame
        if any(source.name.startswith(card.name) for source in SOURCES):
            frame = frame[frame["split"] != "discovery"]
        found |= _hashes(frame["text"])
    for path in sorted(_data_dir().glob("wikitext-2/*.txt")):
        found |= _hashes(path.read_text(encoding="utf-8").splitlines())
    return found


# Share of documents set aside for measuring, chosen by a hash of their name.
HELD_SHARE = 0.03
# Of a corpus on the hub this many documents are streamed.
HUB_DOCUMENTS = 20_000


def _document(source: str, part: str, text: str) -> Document:
    name = f"{source}/{part}"
    return Document(source, name, text, int(sha256_text(name)[:8], 16) / 16**8 < HELD_SHARE)


def read_documents(corpus: str = "") -> tuple[list[Document], dict[str, str]]:
    """Every document of the mix's sources, and the SHA-256 of each file read.

    Args:
        corpus: empty for the recipe of the shipped dictionaries (`SOURCES`, below the public-data folder); a text
            file of one's own, one document a line; or the id of a text corpus on the hub, which is streamed.

    Raises:
        EmosaeError: if no source is there.
    """
    if corpus:
        return _own_documents(corpus) if Path(corpus).expanduser().is_file() else _hub_documents(corpus)
    documents, sums = [], {}
    folder = _data_dir()
    for source in SOURCES:
        for pattern in source.files:
            for path in sorted(folder.glob(pattern)):
                sums[str(path.relative_to(folder))] = sha256_file(path)
                for part, text in source.read(path):
                    documents.append(_document(source.name, part, text))
    if not documents:
        raise EmosaeError(
            "no training text is here; set EMOSAE_DATA_DIR to a folder that holds "
            + ", ".join(s.files[0].split("/")[0] for s in SOURCES)
        )
    return documents, sums


def _own_documents(corpus: str) -> tuple[list[Document], dict[str, str]]:
    path = Path(corpus).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise EmosaeError(f"{path} is not UTF-8 text; convert it") from error
    documents = [_document("own", str(i), line) for i, line in enumerate(lines) if line.strip()]
    return documents, {path.name: sha256_file(path)}


def _hub_documents(corpus: str) -> tuple[list[Document], dict[str, str]]:
    import datasets

    try:
        stream = datasets.load_dataset(corpus, split="train", streaming=True)
        texts = [row["text"] for _, row in zip(range(HUB_DOCUMENTS), stream, strict=False)]
    except Exception as error:  # the hub client raises dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EmosaeError(
            f"cannot read the corpus {corpus}: {reason}; name a text file or a corpus on the hub"
        ) from error
    return [_document("hub", str(i), text) for i, text in enumerate(texts)], {corpus: sha256_text(*texts)}


# Words of one sentence, and of a passage, that make a plausible report of an event.
SENTENCE_WORDS = (4, 35)
PASSAGE_WORDS = 60


def passages(documents: Sequence[Document], barred: set[str], rng: np.random.Generator) -> dict[str, list[list[str]]]:
    """Runs of one to three sentences per source, in a random order, none of which shares a sentence with `barred`.

    Returns:
        For each source, lists of sentences.
    """
    found: dict[str, list[list[str]]] = {}
    for document in documents:
        run: list[str] = []
        length = int(rng.integers(1, 4))
        for sentence in sentences(document.text):
            words = normalised(sentence)
            n = words.count(" ") + 1
            fits = SENTENCE_WORDS[0] <= n <= SENTENCE_WORDS[1] and sha256_text(words) not in barred
            too_long = sum(len(s.split()) for s in run) + n > PASSAGE_WORDS
            if run and (not fits or too_long or len(run) == length):
                found.setdefault(document.source, []).append(run)
                run, length = [], int(rng.integers(1, 4))
            if fits:
                run.append(sentence)
        if run:
            found.setdefault(document.source, []).append(run)
    for name, runs in found.items():
        found[name] = [
            runs[i] for i in rng.permutation(len(runs)) if sha256_text(normalised(" ".join(runs[i]))) not in barred
        ]
    return found


def _wordings() -> dict[str, list[str]]:
    """Templates by what stands before their text: prompts of one group share their beginning."""
    groups: dict[str, list[str]] = {}
    for template in TEMPLATES.values():
        groups.setdefault(template.body.split("{text}")[0], []).append(template.name)
    return groups


def prompts_of(
    passage: Sequence[str], wordings: Sequence[str], rng: np.random.Generator, n_persons: int = 3
) -> list[tuple[str, str, str]]:
    """Emotion prompts about a passage, asked after each of its sentences: template name, person and prompt text."""
    prompts = []
    for end in range(1, len(passage) + 1):
        text = " ".join(passage[:end])
        others = rng.choice(len(PERSONS) - 1, size=n_persons - 1, replace=False) + 1
        for name in wordings:
            for person in (PERSONS[0], *(PERSONS[i] for i in others)):
                body = TEMPLATES[name].body
                prompts.append((name, person, body.format(text=text, person=person, options=options_text(EMOTIONS))))
    return prompts


@dataclass(frozen=True)
class Item:
    """Token sequences that belong together, with the positions to keep.

    Prompts share a beginning and are read at their last token; a running text is one sequence read everywhere, with
    an empty template and person.
    """

    ids: tuple[tuple[int, ...], ...]
    templates: tuple[str, ...]
    persons: tuple[str, ...]
    source: str
    held_out: bool


def training_items(
    lm: LM, *, n_prompts: int, n_running: int, seed: int, width: int = 128, corpus: str = ""
) -> tuple[list[Item], dict[str, object]]:
    """The mix for one model, in a random order, and the recipe that made it.

    Args:
        lm: whose tokenizer is used.
        n_prompts: emotion prompts, at least; all different.
        n_running: positions of running text, at least.
        seed: of every choice.
        width: tokens of one running text.
        corpus: see `read_documents`.

    Raises:
        EmosaeError: if the sources hold too little text.
    """
    rng = np.random.default_rng(seed)
    documents, sums = read_documents(corpus)
    shares = {source.name: source.share for source in SOURCES} if not corpus else {documents[0].source: 1.0}
    held = {True: [d for d in documents if d.held_out], False: [d for d in documents if not d.held_out]}
    barred = evaluation_hashes()
    items: list[Item] = []
    counts: dict[str, dict[str, int]] = {}
    for held_out, share in ((False, 1.0), (True, 0.04)):
        by_source = passages(held[held_out], barred, rng)
        for source, own_share in shares.items():
            n_ends, n_text = (int(np.ceil(n * share * own_share)) for n in (n_prompts, n_running))
            made = _prompt_items(lm, by_source.get(source, []), source, held_out, n_ends, rng)
            run = _running_items(lm, held[held_out], source, held_out, n_text, width, barred, rng)
            counts[f"{source}{' (held out)' if held_out else ''}"] = {
                "prompts": sum(len(i.ids) for i in made),
                "running positions": sum(len(i.ids[0]) - 1 for i in run),
            }
            items += [*made, *run]
    recipe = {
        "sources": {s.name: s.licence for s in SOURCES} if not corpus else {corpus: "the user's own choice"},
        "sha256": sums,
        "barred hashes": len(barred),
        "counts": counts,
        "seed": seed,
    }
    return [items[i] for i in rng.permutation(len(items))], recipe


# How often each group of templates is asked; the group of the default template most.
_SHARE_OF_DEFAULT = 0.4


def _prompt_items(
    lm: LM, runs: Sequence[Sequence[str]], source: str, held_out: bool, wanted: int, rng: np.random.Generator
) -> list[Item]:
    groups = list(_wordings().values())
    others = (1 - _SHARE_OF_DEFAULT) / (len(groups) - 1)
    weights = np.array([_SHARE_OF_DEFAULT if DEFAULT_TEMPLATE in group else others for group in groups])
    made: list[Item] = []
    seen: set[str] = set()
    n = 0
    for run in runs:
        if n >= wanted:
            break
        pairs = prompts_of(run, groups[int(rng.choice(len(groups), p=weights))], rng)
        pairs = [p for p in pairs if p[2] not in seen]
        if not pairs:
            continue
        seen |= {text for _, _, text in pairs}
        ids = tuple(tuple(x) for x in lm.tokenizer([text for _, _, text in pairs])["input_ids"])
        names, persons = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        made.append(Item(ids, names, persons, source, held_out))
        n += len(pairs)
    if n < wanted:
        raise EmosaeError(f"{source} has text for {n} prompts and {wanted} were asked for; ask for fewer")
    return made


def _running_items(
    lm: LM,
    documents: Sequence[Document],
    source: str,
    held_out: bool,
    wanted: int,
    width: int,
    barred: set[str],
    rng: np.random.Generator,
) -> list[Item]:
    """Running text of `width` tokens; short documents are joined, as in pre-training."""
    own = [d for d in documents if d.source == source]
    made: list[Item] = []
    n, waiting = 0, ""
    for i in rng.permutation(len(own)):
        clean = " ".join(s for s in sentences(own[i].text) if sha256_text(normalised(s)) not in barred)
        # From a long document a part only, so that no book takes the whole share.
        if len(clean) > 8000:
            start = int(rng.integers(0, len(clean) - 8000))
            clean = clean[start : start + 8000]
        waiting = f"{waiting}\n{clean}" if waiting else clean
        if len(waiting) < 8 * width:
            continue
        ids = lm.tokenizer(waiting)["input_ids"]
        waiting = ""
        start_token = ids[:1] if lm.tokenizer.bos_token_id == ids[0] else []
        body = ids[len(start_token) :]
        step = width - len(start_token)
        for at in range(0, len(body) - step + 1, step):
            made.append(Item(((*start_token, *body[at : at + step]),), ("",), ("",), source, held_out))
            n += width - 1
            if n >= wanted:
                return made
    raise EmosaeError(f"{source} has {n} positions of running text and {wanted} were asked for; ask for fewer")
