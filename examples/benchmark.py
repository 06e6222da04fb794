"""The README's figures, measured side by side in one run: python3 -m examples.benchmark [--json FILE]

Shows what adaptation, a request's session, many sessions and each store cost, as times and as
ratios to minisess.  Machines are noisy: trust ratios, not times.  Peers take part if they are installed
(zope.interface, twisted, Beaker, Flask), stores if they are named:

    python3 -m examples.benchmark --redis redis://127.0.0.1:6379 --postgres "host=127.0.0.1 user=me"
    python3 -m examples.benchmark --sessions 1000000 adaptation requests scale
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import os
import platform
import sys
import tempfile
import time
import timeit

from minisess import (
    Interface,
    ISession,
    PostgresStore,
    RedisStore,
    Session,
    SessionMiddleware,
    SQLiteStore,
    implementer,
    registerAdapter,
)

SECRET = "only for measuring, not for keeping secrets"


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session=None):
        self.hits = 0


class Plain:
    pass


class ISource(Interface):
    pass


@implementer(ISource)
class Source:
    pass


registerAdapter(Counter, Session, ICounter)
registerAdapter(Counter, ISource, ICounter)


# What is measured: each function answers {row: a function of one argument, n, that answers seconds for n times}
# ---------------------------------------------------------------------------


def timer(statement, **names):
    return timeit.Timer(statement, "gc.enable()", globals={**names, "gc": gc}).timeit


def adaptation():
    """IFoo(obj): obj provides it / through an adapter / a session's component / the default."""
    session = SessionMiddleware(lambda *_: []).store.create(1800, 43200)
    ICounter(session)
    rows = {
        "minisess, provided": timer("I(x)", I=ICounter, x=Counter()),
        "minisess, adapter": timer("I(x)", I=ICounter, x=Source()),
        "minisess, component": timer("I(x)", I=ICounter, x=session),
        "minisess, default": timer("I(x, 7)", I=ICounter, x=Plain()),
        "a call of a Python function": timer("f(x)", f=lambda x: x, x=Plain()),
    }
    dispatch = functools.singledispatch(lambda obj: None)
    dispatch.register(Source, Counter)
    rows["functools.singledispatch, adapter"] = timer("f(x)", f=dispatch, x=Source())
    try:
        from twisted.python.components import Componentized
        from twisted.python.components import registerAdapter as register
        from zope.interface import Interface as ZopeInterface
        from zope.interface import implementer as declare
    except ImportError:
        return rows
    IThing = type(ZopeInterface)("IThing", (ZopeInterface,))
    Thing = declare(IThing)(type("Thing", (), {}))
    register(Counter, Source, IThing)
    kept = Componentized()
    kept.setComponent(IThing, Counter())
    rows["zope.interface, provided"] = timer("I(x)", I=IThing, x=Thing())
    rows["zope.interface, adapter"] = timer("I(x)", I=IThing, x=Source())
    rows["zope.interface, component"] = timer("I(x)", I=IThing, x=kept)
    rows["zope.interface, default"] = timer("I(x, 7)", I=IThing, x=Plain())
    return rows


def answer(start_response, text):
    body = str(text).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def bare(environ, start_response):
    # Looks at its path, as the others do.
    return answer(start_response, 1 if environ["PATH_INFO"] == "/untouched" else 2)


def counter(environ, start_response):
    if environ["PATH_INFO"] == "/untouched":
        return answer(start_response, 1)
    count = ICounter(ISession(environ))
    count.hits += 1
    return answer(start_response, count.hits)


def beaker_counter(environ, start_response):
    if environ["PATH_INFO"] == "/untouched":
        return answer(start_response, 1)
    session = environ["beaker.session"]
    session["hits"] = session.get("hits", 0) + 1
    session.save()
    return answer(start_response, session["hits"])


def environ_of(path="/", cookie=None):
    environ = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "x"}
    environ |= {"SERVER_PORT": "80", "HTTP_HOST": "x", "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http"}
    environ |= {"wsgi.input": io.BytesIO(), "wsgi.errors": sys.stderr, "wsgi.version": (1, 0)}
    environ |= {"wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False}
    return environ | ({"HTTP_COOKIE": cookie} if cookie else {})


def run(application, environ):
    """One request; the cookies that it set."""
    started = []
    result = application(environ.copy(), lambda status, headers, exc_info=None: started.append(headers))
    b"".join(result)
    if hasattr(result, "close"):
        result.close()
    return "; ".join(value.partition(";")[0] for name, value in started[-1] if name.lower() == "set-cookie")


def driver(application, path="/", cookie=None):
    environ = environ_of(path, cookie)

    def drive(n):
        start = time.perf_counter()
        for _ in range(n):
            run(application, environ)
        return time.perf_counter() - start

    return drive


def with_cookies(name, application, base):
    """Rows for the cases of one application, each less its *base*, the application without sessions."""
    cookie = run(application, environ_of())
    forged = cookie[:-1] + ("A" if cookie[-1] != "A" else "B")
    many = f"_ga=GA1.2.1; theme=dark; lang=en; {cookie}; consent=yes; csrftoken=0123456789abcdef"
    return {
        f"{name}, read and write": (driver(application, "/", cookie), base),
        f"{name}, untouched": (driver(application, "/untouched", cookie), base),
        f"{name}, new session": (driver(application), base),
        f"{name}, forged cookie": (driver(application, "/", forged), base),
        f"{name}, six cookies": (driver(application, "/", many), base),
    }


def requests():
    """One request with a session in memory, less the same request of the bare application."""
    rows = with_cookies("minisess", SessionMiddleware(counter), driver(bare))
    try:
        from beaker.middleware import SessionMiddleware as Beaker

        rows |= with_cookies("Beaker", Beaker(beaker_counter, {"session.type": "memory"}), driver(bare))
    except ImportError:
        pass
    try:
        import flask
    except ImportError:
        return rows
    app = flask.Flask("benchmark")
    app.secret_key = SECRET

    @app.route("/")
    def count():
        flask.session["hits"] = flask.session.get("hits", 0) + 1
        return str(flask.session["hits"])

    app.add_url_rule("/bare", view_func=lambda: "1", endpoint="bare")
    cookie = run(app, environ_of())
    return rows | {"Flask's signed cookie, read and write": (driver(app, "/", cookie), driver(app, "/bare"))}


def stores(redis_url=None, postgres=None):
    """One request that reads and writes, on each store, less the same request of the bare application."""
    folder = tempfile.mkdtemp(prefix="minisess-benchmark-")
    made = {"minisess, on disk": SQLiteStore(os.path.join(folder, "sessions.db"), secret=SECRET)}
    peers = {"Beaker's files, on disk": {"session.type": "file", "session.data_dir": folder}}
    with contextlib.suppress(ImportError):
        import sqlalchemy

        url = sqlalchemy.URL.create("sqlite", database=os.path.join(folder, "beaker.db"))
        options = {"session.type": "ext:database", "session.url": str(url), "session.lock_dir": folder}
        peers["Beaker with SQLAlchemy, on disk"] = options
    if redis_url:
        import redis

        made["minisess, Redis"] = RedisStore(redis.Redis.from_url(redis_url), secret=SECRET)
        peers["Beaker, Redis"] = {"session.type": "ext:redis", "session.url": redis_url, "session.lock_dir": folder}
    if postgres:
        import psycopg_pool

        pool = psycopg_pool.ConnectionPool(postgres, min_size=1, open=True)
        made["minisess, PostgreSQL"] = PostgresStore(pool.connection, secret=SECRET)
    applications = {name: SessionMiddleware(counter, store) for name, store in made.items()}
    with contextlib.suppress(ImportError):
        from beaker.middleware import SessionMiddleware as Beaker

        applications |= {name: Beaker(beaker_counter, options) for name, options in peers.items()}
    base = driver(bare)
    return {name: (driver(app, "/", run(app, environ_of())), base) for name, app in applications.items()}


# How it is measured
# ---------------------------------------------------------------------------


def measure(rows, rounds=9, seconds=0.05):
    """The best of some rounds for each row, in microseconds, less the best of its base, if it has one.

    The rows take turns, so that noise falls on all of them.
    """
    timed = {name: row if isinstance(row, tuple) else (row,) for name, row in rows.items()}
    counts = {name: max(20, int(seconds * 50 / row[0](50))) for name, row in timed.items()}
    best = {name: [float("inf")] * len(row) for name, row in timed.items()}
    for _ in range(rounds):
        for name, row in timed.items():
            gc.collect()
            n = counts[name]
            best[name] = [min(known, drive(n) / n * 1e6) for known, drive in zip(best[name], row, strict=True)]
    return {name: found[0] - sum(found[1:]) for name, found in best.items()}


def table(title, best, unit="us"):
    """Print the rows, with the ratio to minisess's row of the same case."""
    print(f"\n{title}")
    for name, value in best.items():
        peer, _, case = name.partition(", ")
        ours = best.get(f"minisess, {case}")
        ratio = f"{value / ours:8.2f} x" if ours and ours > 0 and peer != "minisess" else ""
        print(f"  {name:42} {value:10.2f} {unit} {ratio}")


def resident():
    """Bytes of memory that this process has; 0 where /proc doesn't tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def scale(total):
    """Live sessions in memory: bytes each, a request among few and among many, pauses when all are due."""
    now = [1e9]
    application = SessionMiddleware(counter)
    application.store.clock = lambda: now[0]
    found, environ = {}, environ_of()

    def request_us():
        return min(driver(application, "/", cookie)(500) for cookie in cookies[:20]) / 500 * 1e6

    cookies = [run(application, environ) for _ in range(1000)]
    few = request_us()
    gc.collect()
    before = resident()
    for _ in range(total - 1000):
        run(application, environ)
    gc.collect()
    found["bytes for a session (RSS)"] = (resident() - before) / (total - 1000)
    found[f"a request among {total:,}, x of one among 1,000"] = request_us() / few
    now[0] += 3600
    environ = environ_of("/", run(application, environ))
    pauses = []
    while len(application.store) > 1:
        start = time.perf_counter()
        run(application, environ)
        pauses.append(time.perf_counter() - start)
    pauses.sort()
    found["all of them due: requests until they are gone"] = len(pauses)
    found["the longest request meanwhile, ms"] = pauses[-1] * 1e3
    found["p99.9, ms"] = pauses[-len(pauses) // 1000] * 1e3
    print(f"\nScale: {scale.__doc__}")
    for name, value in found.items():
        print(f"  {name:50} {value:12.2f}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help="adaptation, requests, stores, scale; all if none is named")
    parser.add_argument("--redis", metavar="URL", help="measure RedisStore there (it adds keys)")
    parser.add_argument("--postgres", metavar="CONNINFO", help="measure PostgresStore there (it adds a table)")
    parser.add_argument("--sessions", type=int, default=100_000, help="for scale (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    groups = options.groups or ["adaptation", "requests", "stores", "scale"]
    if unknown := set(groups) - {"adaptation", "requests", "stores", "scale"}:
        parser.error(f"no such group: {', '.join(unknown)}")
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    figures = {"python": platform.python_version()}
    if "scale" in groups:  # first, while there is no memory to use again
        figures["scale"] = scale(options.sessions)
    if "adaptation" in groups:
        best = measure(adaptation(), options.rounds)
        figures["adaptation, us"] = best
        table(f"Adaptation. {adaptation.__doc__}", best)
    if "requests" in groups:
        figures["requests, us"] = best = measure(requests(), options.rounds)
        table(f"Requests. {requests.__doc__}", best)
    if "stores" in groups:
        figures["stores, us"] = best = measure(stores(options.redis, options.postgres), options.rounds)
        table(f"Stores. {stores.__doc__}", best)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
