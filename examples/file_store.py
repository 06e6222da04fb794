"""How to write a store: sessions in plain files, one a record, for all processes of one machine (POSIX).

A store sees no sessions: sealing, merging, expiry and callbacks come from PersistentStore, which hands
over bytes and takes them back.  What the operations below promise it:

- Each happens whole or not at all, whoever else is at work or killed: who writes holds a lock on the
  folder, and writes beside the old file, which is then replaced at once.
- Beside a record stand *due*, when to look at it; *owner*, to find it by; *holder* and *until*: the
  token of who held it last, and until when (UNIX time) nobody else may.
- Where a record has moved from, a tombstone stays for a minute: a zero byte, and when that ends.
- Not promised: that what is saved outlives a power cut (that takes an os.fsync in `put`).  Looking at
  each file is well for some thousand sessions; for more, SQLiteStore has indexes.

    python3 -m examples.file_store
    curl -c jar -b jar http://127.0.0.1:8000/       Visits: 1
"""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile

from examples import serve
from examples.counter import app
from minisess import HELD, PersistentStore, SessionMiddleware


class FileStore(PersistentStore):
    def __init__(self, folder, **options):
        super().__init__(**options)
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self):
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:  # Closing isn't enough if another thread forked: the child has the file open, too.
                fcntl.flock(lock, fcntl.LOCK_UN)

    def get(self, key):
        """The record and what stands beside it.  Needs no lock: it is that of the old file or of the new one."""
        with contextlib.suppress(FileNotFoundError), open(self.folder / key, "rb") as file:
            beside = json.loads(file.readline())
            return file.read(), beside
        return None, {"holder": None, "until": 0}

    def put(self, key, record, due, owner, holder="", until=0):
        beside, new = {"due": due, "owner": owner, "holder": holder, "until": until}, self.folder / ".new"
        new.write_bytes(json.dumps(beside).encode() + b"\n" + record)
        os.utime(new, (0, min(due, 2**33)))  # For `due`, which so opens no others.
        new.replace(self.folder / key)  # Keys are hexadecimal digits, so they are fit for names.

    def files(self, latest=2**34):
        """``(key, record, beside)`` of all that are due by *latest*.  With the lock none vanishes meanwhile."""
        found = [path for path in self.folder.glob("[!.]*") if path.stat().st_mtime <= latest]
        return [(path.name, *self.get(path.name)) for path in found]

    def insert(self, key, record, due, owner):
        with self.locked():
            self.put(key, record, due, owner)

    def read(self, key):
        """Whoever holds it: to look."""
        return self.get(key)[0]

    def hold(self, key, token, now, until):
        """Only one at a time.  It ends by itself, as its process may be gone; the same token may go on."""
        with self.locked():
            record, beside = self.get(key)
            if beside["holder"] != token and beside["until"] > now:
                return HELD
            if record is not None:
                self.put(key, record, **beside | {"holder": token, "until": until})
            return record

    def write(self, key, token, record, due, owner):
        """Lets go, too.  A hold that is over still counts, as long as nobody else has held the record since."""
        with self.locked():
            if held := self.get(key)[1]["holder"] == token:
                self.put(key, record, due, owner, token)  # *holder* stays: the same again is answered the same.
            return held

    def free(self, key, token):
        with self.locked():
            record, beside = self.get(key)
            if beside["holder"] == token:
                self.put(key, record, **beside | {"until": 0})

    def swap(self, key, old, new, due):
        """Whoever holds it: compare and replace, so what others wrote meanwhile is never overwritten."""
        with self.locked():
            record, beside = self.get(key)
            if same := record == old:
                if new is None:
                    (self.folder / key).unlink()
                else:
                    self.put(key, new, **beside | ({} if due is None else {"due": due}))
            return same

    def move(self, key, token, to, record, due, owner, until):
        """The new file first: who is killed in between leaves one that nobody knows the id of."""
        with self.locked():
            if held := self.get(key)[1]["holder"] == token:
                self.put(to, record, due, owner, token, until)
                self.put(key, b"\0%d" % (self.clock() + 60), self.clock() + 60, "")
            return held

    def delete(self, key):
        """Whoever is given the record ends the session, so only one is.  A tombstone is shorter than any record."""
        with self.locked():
            record, _ = self.get(key)
            if record is None or len(record) < 32:
                return None
            (self.folder / key).unlink()
            return record

    def due(self, now, limit):
        """Only which: what has really expired then goes by `swap`, what lives on gets a later *due*."""
        with self.locked():  # A file's time is rounded, hence a second more; what stands in it is exact.
            late = [row for row in self.files(now + 1) if row[2]["due"] <= now and row[2]["until"] <= now]
            return [row[:2] for row in sorted(late, key=lambda row: row[2]["due"])[:limit]]

    def owned(self, owner):
        with self.locked():
            return [row[:2] for row in self.files() if row[2]["owner"] == owner != ""]

    def take(self, owner, keep):
        """Held ones, too.  With the lock none moves meanwhile, so none escapes under a new key."""
        with self.locked():
            taken = [row[:2] for row in self.files() if row[2]["owner"] == owner != "" and row[0] != keep]
            for key, _ in taken:
                (self.folder / key).unlink()
            return taken

    def __len__(self):
        with self.locked():
            return sum(len(record) > 32 for _, record, _ in self.files())


folder = os.path.join(tempfile.gettempdir(), f"minisess-files-{os.getuid()}")
secret = os.environ.get("SECRET", "not a secret, since everybody can read it here")
application = SessionMiddleware(app, FileStore(folder, secret=secret))

if __name__ == "__main__":
    serve(application)
