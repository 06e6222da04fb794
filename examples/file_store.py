"""A store of your own: sessions in plain files, for all processes of one machine (with POSIX locks).

A store is nine operations on ``(key, record)``; sealing, holding, merging, expiry and callbacks
come from PersistentStore.  Each operation is atomic as it holds a lock on the folder, and whoever
is killed leaves the old file or the new one, as os.replace is atomic.  A file's time of
modification is the deadline of its session, so that looking for due ones reads no others.

    python3 -m examples.file_store

    curl -c jar -b jar http://127.0.0.1:8000/       You were here 1 times.
"""

import contextlib
import fcntl
import json
import os
import tempfile

from examples import serve
from minisess import (
    HELD,
    Interface,
    ISession,
    PersistentStore,
    Session,
    SessionMiddleware,
    implementer,
    registerAdapter,
)


class FileStore(PersistentStore):
    def __init__(self, folder, **options):
        super().__init__(**options)
        self.folder = folder
        os.makedirs(folder, mode=0o700, exist_ok=True)

    @contextlib.contextmanager
    def locked(self):
        with open(os.path.join(self.folder, ".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def get(self, key):
        """The meta data and the record of *key*; both None if there is no such file."""
        try:
            with open(os.path.join(self.folder, key), "rb") as file:
                return json.loads(file.readline()), file.read()
        except FileNotFoundError:
            return None, None

    def put(self, key, record, expires, **meta):
        new, old = os.path.join(self.folder, ".new"), os.path.join(self.folder, key)
        with open(new, "wb") as file:
            file.write(json.dumps({"expires": expires, **meta}).encode() + b"\n" + record)
        os.utime(new, (0, min(expires, 2**33)))
        os.replace(new, old)

    def keys(self):
        return [name for name in os.listdir(self.folder) if not name.startswith(".")]

    def insert(self, key, record, expires, owner, token, until):
        with self.locked():
            self.put(key, record, expires, owner=owner, holder=token, until=until)

    def hold(self, key, token, now, until):
        with self.locked():
            meta, record = self.get(key)
            if meta and meta["holder"] not in (None, token) and meta["until"] > now:
                return HELD
            if meta:
                self.put(key, record, **{**meta, "holder": token, "until": until})
            return record

    def read(self, key):
        return self.get(key)[1]

    def write(self, key, token, record, expires, owner):
        with self.locked():
            meta, _ = self.get(key)
            if meta is None or meta["holder"] != token:
                return False
            self.put(key, record, expires, owner=owner, holder=None, until=0)
            return True

    def free(self, key, token):
        with self.locked():
            meta, record = self.get(key)
            if meta and meta["holder"] == token:
                self.put(key, record, **{**meta, "holder": None})

    def delete(self, key, token=None):
        with self.locked():
            meta, record = self.get(key)
            if meta is None or token not in (None, meta["holder"]):
                return None
            os.remove(os.path.join(self.folder, key))
            return record

    def due(self, now, limit):
        with self.locked():
            late = [key for key in self.keys() if os.stat(os.path.join(self.folder, key)).st_mtime <= now + 1]
            found = [(key, *self.get(key)) for key in late]
            taken = [(k, r) for k, m, r in found if m["expires"] <= now and not (m["holder"] and m["until"] > now)]
            for key, _ in taken[:limit]:
                os.remove(os.path.join(self.folder, key))
            return taken[:limit]

    def owned(self, owner):
        with self.locked():
            return [key for key in self.keys() if self.get(key)[0]["owner"] == owner]

    def __len__(self):
        return len(self.keys())


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session):
        self.hits = 0


registerAdapter(Counter, Session, ICounter)


def app(environ, start_response):
    counter = ICounter(ISession(environ))
    counter.hits += 1
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"You were here {counter.hits} times.\n".encode()]


folder = os.path.join(tempfile.gettempdir(), f"minisess-{os.getuid()}")
secret = os.environ.get("MINISESS_SECRET", "for trying it out, not for serving")
application = SessionMiddleware(app, FileStore(folder, secret=secret))

if __name__ == "__main__":
    serve(application)
