"""python -m federation.audit A [B]: verify a party's record of a run, or two parties' against each other.

A chain of hashes shows every line that was changed, dropped, moved or put in later, unless all lines after it were
written anew. Two files show that, too: each holds heads of the other, and lines that came in at one side must have
gone out at the other.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from federation.console import Parser, clean, fail, say
from federation.security import identity
from federation.security.audit import ARRAYS, FIRST, KEYS, KINDS, SERVER, line_of, signed_text

DESCRIPTION = "Verify a party's record of a run, or the server's and a client's against each other."
EPILOG = """\
exit code: 0 nothing was changed, 1 something was, or can't be verified, 2 wrong use
examples:
  python -m federation.audit RUN_DIR/audit.jsonl                              one file
  python -m federation.audit RUN_DIR/audit.jsonl audit/RUN_ID-client-0.jsonl  the server's and a client's
"""


@dataclass
class Record:
    """A file as it was read. problems: a line each for what can't be as its party wrote it; notes: what can be so."""

    name: str
    lines: list[dict] = field(default_factory=list)  # an empty one for one that a crash cut
    hashes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def first(self) -> dict:
        return next(filter(None, self.lines), {})

    @property
    def run(self) -> str:
        return self.first.get("run", "")

    @property
    def party(self) -> str:
        return self.first.get("from", "")

    def keys(self, *parties: str) -> set[str]:
        """The public keys that these have, as it says; none where they have none."""
        return {line["key"] for line in self.lines if "key" in line and line["from"] in parties}

    @property
    def ended(self) -> bool:
        return bool(self.lines) and self.lines[-1].get("kind") == "end"

    def number(self, line: dict) -> int:
        """Of one of its lines, from 1 on."""
        if not self._numbers:
            self._numbers.update({id(each): place for place, each in enumerate(self.lines, 1)})
        return self._numbers[id(line)]

    def of_sessions(self, sessions: set[str]) -> list[dict]:
        return [line for line in self.lines if line.get("session") in sessions]


def read_record(path: Path) -> Record:
    """The file, with what is wrong in it by itself. Raises OSError."""
    record, content = Record(str(path)), path.read_bytes()
    texts = content.split(b"\n")
    whole = texts.pop() == b""
    if not whole:
        texts = content.split(b"\n")
    previous, torn = FIRST, 0
    for number, text in enumerate(texts, 1):
        line, wrong = _read_line(text)
        if torn and line.get("kind") != "resume":
            record.problems.append(f"line {torn} is no line of a record")
        elif torn:
            record.notes.append(f"line {torn} was cut by a crash; the run was resumed after it")
        torn = 0
        if wrong:
            if text and number < len(texts) and not line:
                torn = number  # a crash may have cut it: the next line tells
            elif number == len(texts) and not whole:
                record.problems.append(f"line {number}, the last, is cut in the middle: by a crash, or by somebody")
            else:
                record.problems.append(f"line {number} {wrong}")
        if line and line.get("previous") != previous:
            before = "the beginning" if number == 1 else f"line {number - 1}"
            record.problems.append(
                f"line {number} does not follow {before}: one of the two was changed, or a line between them "
                "dropped, moved or put in"
            )
        record.lines.append(line)
        previous = hashlib.sha256(text).hexdigest()
        record.hashes.append(previous)
    if not texts:
        record.problems.append("it is empty")
    others = {line["run"] for line in record.lines if line.get("run", record.run) != record.run}
    if others:
        record.problems.append(f"lines of other runs: {', '.join(sorted(clean(run, 20) for run in others))}")
    return record


def _read_line(text: bytes) -> tuple[dict, str]:
    """Its values, and what is wrong with it; {} where it can't be read."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}, "is no JSON"
    if not isinstance(line, dict) or not {"previous", "time", "run", "round", "kind", "from", "privacy"} <= set(line):
        return {}, "is no line of a record"
    odd = [name for name in line if name not in KEYS or not isinstance(line[name], KEYS[name])]
    if odd:
        return {}, f"holds what no record holds: {clean(', '.join(odd), 100)}"
    if line["kind"] not in KINDS:
        return {}, f"is of no kind that is known: {clean(line['kind'], 40)}"
    return line, "" if line_of(line) == text else "is not written as a record writes it"


def compare(one: Record, other: Record) -> list[str]:
    """What does not fit between a server's record and a client's."""
    server, client = (one, other) if one.party == SERVER else (other, one)
    if server.run != client.run:
        return [f"{server.name} is of run {server.run}, {client.name} of run {client.run}"]
    sessions = {line["session"] for line in client.lines if "session" in line}
    ours = server.of_sessions(sessions)
    if sessions and not ours:
        return [f"{server.name} has no line about {client.party} of {client.name}"]
    problems = list(_came_in(client, client.of_sessions(sessions), server, ours))
    problems += _came_in(server, ours, client, client.of_sessions(sessions))
    for holder, lines, party in ((server, ours, client), (client, client.lines, server)):
        heads = [line for line in lines if line.get("kind") == "head"]
        theirs, as_known = party.keys(party.party), holder.keys(*(line["from"] for line in heads))
        if as_known and theirs != as_known:
            problems.append(f"{holder.name} knows its party by another key than {party.name} has")
        problems += _heads(holder, heads, party, theirs)
    return problems


def _came_in(receiver: Record, received: Sequence[dict], sender: Record, sent: Sequence[dict]) -> Iterator[str]:
    """What came in at one side must have gone out at the other, in this order. The last may still be on its way."""
    went = [line for line in sent if line["from"] != receiver.party and line["kind"] in ARRAYS]
    place = 0
    for line in received:
        if line["from"] == receiver.party or line["kind"] not in ARRAYS:
            continue
        wanted = _matter(line)
        found = next((i for i in range(place, len(went)) if _matter(went[i]) == wanted), None)
        if found is None:
            where = f"{receiver.name}, line {receiver.number(line)} ({_title(line)})"
            yield f"{where}: {sender.name} has no line for it at that place"
        else:
            place = found + 1


def _matter(line: dict) -> tuple:
    return tuple(line.get(name) for name in ("kind", "round", "bytes", "sha256", "session"))


def _title(line: dict) -> str:
    return line["kind"] + (f" of round {line['round']}" if line["round"] is not None else "")


def _heads(holder: Record, heads: Sequence[dict], party: Record, keys: set[str]) -> Iterator[str]:
    """Every head that one party told is the hash of a line in its file, in this order; signatures are its own."""
    places = {each: place for place, each in enumerate(party.hashes)}
    newest = 0
    for line in heads:
        place = places.get(line["head"])
        number = holder.number(line)
        if place is None:
            yield (
                f"{holder.name}, line {number}: {party.name} lacks the line that its party told as its newest in "
                f"{_title(line).partition(' of ')[2] or 'its last message'}: it was cut off there, or written anew"
            )
        elif place < newest:
            yield f"{holder.name}, line {number}: an older head of {party.name} than in the lines before"
        newest = max(newest, place or 0)
        text = signed_text(line["run"], line["round"], line["head"])
        if "signature" not in line:
            if keys:
                yield f"{holder.name}, line {number}: {party.name} has a key, and did not sign its head"
        elif not any(identity.verify(key, line["signature"], text) for key in keys):
            yield f"{holder.name}, line {number}: the signature is not by the key of {party.name}"


def describe(record: Record) -> Iterator[str]:
    """What there is to know of a file, in words."""
    times = [line["time"] for line in record.lines if line]
    rounds = [line["round"] for line in record.lines if line.get("round") is not None]
    last = f", rounds {min(rounds)} to {max(rounds)}" if rounds else ""
    yield f"{record.name}: {clean(record.party, 80)}, run {clean(record.run, 20)}, {len(record.lines):,} lines{last}"
    if times:
        yield f"  from {clean(times[0], 30)} to {clean(times[-1], 30)}"
    yield from (f"  key {_fingerprint(key)}" for key in sorted(record.keys(record.party)))
    yield from (f"  note: {note}" for note in record.notes)
    if record.problems:
        yield from (f"  WRONG: {problem}" for problem in record.problems[:10])
        if len(record.problems) > 10:
            yield f"  WRONG: and {len(record.problems) - 10:,} more"
    elif record.ended:
        yield "  every line follows the one before, and the last one closes it"
    else:
        yield (
            "  every line follows the one before, but none closes it: the run goes on, or was killed, or the end "
            "was cut off; the other party's file tells"
        )


def _fingerprint(key: str) -> str:
    try:
        return identity.fingerprint(key)
    except ValueError:
        return f"{clean(key, 20)}, which is none"


def main() -> int:
    parser = Parser(DESCRIPTION, usage="%(prog)s FILE [FILE]", epilog=EPILOG, prog="python -m federation.audit")
    parser.add_argument("files", nargs="+", metavar="FILE", help="audit.jsonl of a run folder, or a client's file")
    paths = parser.parse_args().files
    if len(paths) > 2:
        parser.error(f"one file, or two, got {len(paths)}")
    try:
        records = [read_record(Path(path)) for path in paths]
    except OSError as error:
        fail(f"{error.filename} can't be read ({error.strerror}); give an audit.jsonl", 2)
    for record in records:
        for words in describe(record):
            say(words)
    wrong = any(record.problems for record in records)
    if len(records) == 2:
        if sum(record.party == SERVER for record in records) != 1:
            parser.error(f"two files are compared where one is the server's: {paths[0]} {paths[1]}")
        problems = compare(records[0], records[1])
        for problem in problems[:20]:
            say(f"WRONG: {problem}")
        wrong = wrong or bool(problems)
        say("the two files don't fit each other" if problems else "the two files fit each other")
    elif not wrong:
        say(
            "one file alone can't show lines cut off behind the last one, nor a file that was written anew as a whole; "
            "give the other party's file, too"
        )
    return int(wrong)
