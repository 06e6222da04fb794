"""Sessions measured side by side: python3 -m examples.benchmark [--quick] [--json FILE] [GROUP ...]

Peers take part if they are installed (zope.interface and twisted, Beaker, Django, Flask, Flask-Session
and cachelib, SQLAlchemy), stores if their server is named and its driver (redis, psycopg[pool]) is there:

    python3 -m examples.benchmark --redis redis://127.0.0.1:6379 --postgres postgresql://me@127.0.0.1/me

How to read it.  Each has a process of its own, and they take turns, a short round each: so what else
the machine does falls on all.  A figure is the best of all rounds; a request's is what the session
adds: less the best of the same request without sessions, in the same framework.  Rows of minisess are
microseconds, those below one are multiples of it.  Trust multiples: two runs differ by up to a third.
"Look only" is ``peek(environ)`` here, and with the others a request that reads: they have nothing less.
All save before the headers leave.  A faster number for less is none, so each says what it gives up:

    holds    one request of a session at a time, so no change is lost
    seal     who can write to the store can't forge a session, nor have it unpickled
    hash     what who can read the store sees there is no cookie
    end      the server ends a session: a cookie that was copied before works no more

Capacity, on paper, for one slow core.  A request that counts takes Redis 24 us of CPU and 690 bytes of
its log, PostgreSQL 140 us and 530 bytes; looking takes 6 and 30 us.  So they carry 40,000 and 7,000
requests a second, or ten times as many visitors who click every 10 seconds.  A million sessions with
a counter take 0.9 GB of memory there, 0.5 GB of disk here, up to twice that between vacuums.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from urllib.parse import urlsplit
from wsgiref.util import setup_testing_defaults

import minisess
from examples.counter import Counter, ICounter

SECRET = "only for measuring, not for keeping secrets"


Source, Plain = type("Source", (), {}), type("Plain", (), {})
minisess.registerAdapter(Counter, Source, ICounter)


# Adaptation: a function for each peer, that answers {case: what does it n times, and answers the seconds}
# ---------------------------------------------------------------------------


def timers(f, **objects):
    statements = {case: "f(x, None)" if case == "default" else "f(x)" for case in objects}
    return {
        c: timeit.Timer(statements[c], "gc.enable()", globals={"gc": gc, "f": f, "x": objects[c]}).timeit
        for c in objects
    }


def adapt_minisess():
    session = minisess.MemoryStore().create(1800, 43200)
    ICounter(session)
    return timers(ICounter, provided=Counter(None), adapter=Source(), component=session, default=Plain())


def adapt_zope():
    from twisted.python.components import Componentized, registerAdapter
    from zope.interface import Interface, implementer

    IThing = type(Interface)("IThing", (Interface,))
    registerAdapter(Counter, Source, IThing)
    kept = Componentized()
    kept.setComponent(IThing, Counter(None))
    thing = implementer(IThing)(type("Thing", (), {}))()
    return timers(IThing, provided=thing, adapter=Source(), component=kept, default=Plain())


# Requests: a function for each peer, that answers a WSGI application; a *kind* "" is the framework alone
# ---------------------------------------------------------------------------


def view(path, session):
    """Count for /rw, read for /ro and /look, not for /no; *session* answers something like a dict, or is None."""
    if path == "/no" or session is None:
        return "hello"
    hits = session().get("hits", 0)
    if path == "/rw":
        session()["hits"] = hits = hits + 1
    return f"hits: {hits}"


def respond(start_response, text, *headers):
    body = text.encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), *headers])
    return [body]


def plain(kind, place):
    """The least that a session is: a dict that is found by a cookie, and a deadline.  Without a *kind*: none."""
    sessions = {}

    def app(environ, start_response):
        if not kind:
            return respond(start_response, view(environ["PATH_INFO"], None))
        uid, now, headers = environ.get("HTTP_COOKIE", "").partition("sid=")[2].partition(";")[0], time.time(), []
        session = sessions.get(uid)
        if session is None or session["expires"] < now:
            uid, session = os.urandom(16).hex(), {}
            sessions[uid], headers = session, [("Set-Cookie", f"sid={uid}; Path=/; HttpOnly")]
        session["expires"] = now + 1800
        return respond(start_response, view(environ["PATH_INFO"], lambda: session), *headers)

    return app


def ours(kind, place):
    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/no":
            return respond(start_response, "hello")
        session = minisess.peek(environ) if path == "/look" else minisess.ISession(environ)
        if session is None:
            return respond(start_response, "hits: 0")
        counter = ICounter(session)
        if path == "/rw":
            counter.hits += 1
        return respond(start_response, f"hits: {counter.hits}")

    if kind == "memory":
        store = minisess.MemoryStore()
    elif kind == "sqlite":
        store = minisess.SQLiteStore(os.path.join(place.folder, "sessions.db"), secret=SECRET)
    elif kind == "redis":
        import redis

        store = minisess.RedisStore(redis.Redis.from_url(place.redis), secret=SECRET, prefix="benchmark:")
    else:
        from psycopg_pool import ConnectionPool

        pool = ConnectionPool(place.postgres, min_size=1, open=True)
        multiprocessing.util.Finalize(None, pool.close, exitpriority=1)  # such a process runs no atexit handlers
        store = minisess.PostgresStore(pool.connection, secret=SECRET, table="minisess_benchmark")
    return minisess.SessionMiddleware(app, store)


def beaker(kind, place):
    from beaker.middleware import SessionMiddleware

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        text = view(path, lambda: environ["beaker.session"])
        if path == "/rw":
            environ["beaker.session"].save()
        return respond(start_response, text)

    urls = {"ext:redis": place.redis, "ext:database": str(place.postgres).replace("postgresql:", "postgresql+psycopg:")}
    folders = {"session.data_dir": place.folder, "session.lock_dir": place.folder}
    return SessionMiddleware(app, {"session.type": kind, "session.url": urls.get(kind), **folders})


def django(kind, place):
    import django
    from django.conf import settings
    from django.core.management import call_command
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse
    from django.urls import path

    def answer(request):
        return HttpResponse(view(request.path, (lambda: request.session) if kind else None), content_type="text/plain")

    engine, _, where = kind.partition(" ")
    cache = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "OPTIONS": {"MAX_ENTRIES": 10**8}}
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": os.path.join(place.folder, "django.db")}
    if where == "redis":
        cache = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": place.redis}
    elif where == "postgres":
        url = urlsplit(place.postgres)
        database = {"ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "CONN_MAX_AGE": None}
        database |= {"HOST": url.hostname, "PORT": url.port, "USER": url.username, "PASSWORD": url.password}
    options = {"ALLOWED_HOSTS": ["*"], "CACHES": {"default": cache}, "DATABASES": {"default": database}}
    options |= {"SECRET_KEY": SECRET, "SESSION_ENGINE": "django.contrib.sessions.backends." + engine}
    options |= {"INSTALLED_APPS": ["django.contrib.sessions"], "LOGGING_CONFIG": None}
    options["MIDDLEWARE"] = ["django.contrib.sessions.middleware.SessionMiddleware"] if kind else []
    settings.configure(ROOT_URLCONF=tuple(path(name, answer) for name in ("rw", "ro", "look", "no")), **options)
    django.setup()
    if engine == "db":
        call_command("migrate", verbosity=0)
    return get_wsgi_application()


def flask(kind, place):
    import flask

    app = flask.Flask("benchmark")
    app.secret_key = SECRET

    @app.route("/<name>")
    def answer(name):
        return flask.Response(view("/" + name, (lambda: flask.session) if kind else None), mimetype="text/plain")

    if kind == "memory":
        import cachelib
        import flask_session

        app.config |= {"SESSION_TYPE": "cachelib", "SESSION_CACHELIB": cachelib.SimpleCache(10**8)}
        flask_session.Session(app)
    return app


# Each group's peers: the function, and for requests its kind, the framework alone, and what it gives up.
ADAPTATION = {
    "minisess": [adapt_minisess],
    "zope.interface, twisted": [adapt_zope],
    "call of a function": [lambda: timers(lambda x, default=None: x, provided=1, adapter=1, component=1, default=1)],
}
REQUESTS = {
    "nothing": [plain, "", "", ""],
    "Django": [django, "", "", ""],
    "Flask": [flask, "", "", ""],
    "minisess": [ours, "memory", "nothing", ""],
    "a dict and a deadline": [plain, "memory", "nothing", "holds, end"],
    "Beaker": [beaker, "memory", "nothing", "holds"],
    "Django, local cache": [django, "cache", "Django", "holds"],
    "Django, signed cookie": [django, "signed_cookies", "Django", "holds, end"],
    "Flask, signed cookie": [flask, "cookie", "Flask", "holds, end"],
    "Flask-Session, memory": [flask, "memory", "Flask", "holds"],
}
STORES = {name: REQUESTS[name] for name in ("nothing", "Django")} | {
    "minisess, SQLite": [ours, "sqlite", "nothing", ""],
    "Beaker, files": [beaker, "file", "nothing", "holds, seal, hash"],
    "Django, SQLite": [django, "db", "Django", "holds, hash"],
    "minisess, Redis": [ours, "redis", "nothing", ""],
    "Beaker, Redis": [beaker, "ext:redis", "nothing", "holds, seal, hash"],
    "Django, Redis": [django, "cache redis", "Django", "holds, seal, hash"],
    "minisess, PostgreSQL": [ours, "postgres", "nothing", ""],
    "Beaker, PostgreSQL": [beaker, "ext:database", "nothing", "holds, seal, hash"],
    "Django, PostgreSQL": [django, "db postgres", "Django", "holds, hash"],
}
SCALE = {name: REQUESTS[name] for name in ("minisess", "a dict and a deadline", "Beaker")}
GROUPS = {"adaptation": ADAPTATION, "requests": REQUESTS, "stores": STORES, "scale": SCALE}
CASES = {  # the path, and the cookie
    "read, write": ("/rw", "{}"),
    "read only": ("/ro", "{}"),
    "look only": ("/look", "{}"),
    "untouched": ("/no", "{}"),
    "new": ("/rw", ""),
    "forged": ("/rw", "{1}"),
    "forged, read": ("/ro", "{1}"),
    "6 cookies": ("/rw", "_ga=GA1.2.1; theme=dark; lang=en; {}; consent=yes; csrftoken=0123456789abcdef"),
}


def ask(app, path, cookie, n=1):
    """*n* requests, each with a fresh environ, read and closed: the seconds, the last body and its cookies."""
    environ, sent = {"PATH_INFO": path, "QUERY_STRING": "", "REMOTE_ADDR": "::1"}, {}
    setup_testing_defaults(environ)
    environ |= {"HTTP_COOKIE": cookie} if cookie else {}
    start = time.perf_counter()
    for _ in range(n):
        result = app(environ.copy(), lambda status, headers, exc_info=None: sent.update(headers=headers))
        body = b"".join(result)
        if hasattr(result, "close"):
            result.close()
    seconds = time.perf_counter() - start
    return seconds, body, "; ".join(v.partition(";")[0] for k, v in sent["headers"] if k.lower() == "set-cookie")


def drives(app):
    """Check that *app* counts and refuses a forged cookie; {case: what does it n times, and answers the seconds}."""
    _, first, cookie = ask(app, "/rw", "")
    _, second, changed = ask(app, "/rw", cookie)
    cookie = changed or cookie or "none=none"
    forged = "=".join([cookie.partition("=")[0], cookie.partition("=")[2][::-1]])  # as long, and of the same letters
    texts = b", ".join([first, second, ask(app, "/ro", cookie)[1], ask(app, "/ro", forged)[1]])
    if texts not in (b"hits: 1, hits: 2, hits: 2, hits: 0", b"hello, hello, hello, hello"):
        raise ValueError(f"it doesn't count right: {texts}")
    made = {case: (path, which.format(cookie, forged)) for case, (path, which) in CASES.items()}
    return {case: lambda n, asked=asked: ask(app, *asked, n)[0] for case, asked in made.items()}


def scale(app, total):
    """Among *total* live sessions: bytes of each, and requests; for minisess also while all of them are due."""
    cookies, found, peak = [], {}, {}
    for before, count in ((0, 1000), (1000, total)):
        for _ in range(before, count):
            cookies = [*cookies, ask(app, "/rw", "")[2]][:50]
        peak[count] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found[f"us, {count:,}"] = min(ask(app, "/rw", cookie, 200)[0] for cookie in cookies) * 5e3
    found["bytes each"] = (peak[total] - peak[1000]) / (total - 1000)
    for name, now in {"live": time.time(), "due": time.time() + 3600}.items() if hasattr(app, "store") else ():
        app.store.clock = lambda now=now: now
        _, _, cookie = ask(app, "/rw", "")
        times = sorted(ask(app, "/rw", cookie)[0] * 1e3 for _ in range(total // 5))
        found |= {f"{name} p99.9 ms": times[-len(times) // 1000], f"{name} worst": times[-1]}
    return found


def work(group, name, place, case=None, n=0):
    """In the process of *name*: do a case n times; first make it, and say which cases there are."""
    if case is None:
        make, *kind = GROUPS[group][name][:2]
        place.folder = tempfile.mkdtemp(dir=place.folder)
        made = make(*kind, place) if kind else make()
        work.cases = {"scale": lambda n: scale(made, n)} if group == "scale" else drives(made) if kind else made
        return list(work.cases)
    gc.collect()
    return work.cases[case](n)


def measure(group, options):
    """{name: {case: the best of all rounds}}, in microseconds."""
    servers = {"Redis": options.redis, "PostgreSQL": options.postgres}
    names = [name for name in GROUPS[group] if servers.get(name.split(", ")[-1], "none needed")]
    spawn, best, counts = multiprocessing.get_context("spawn"), {}, {}
    ask = {name: functools.partial(ProcessPoolExecutor(1, spawn).submit, work, group, name, options) for name in names}
    for name, made in [(name, ask[name]()) for name in names]:
        try:
            best[name] = dict.fromkeys(made.result(), float("inf"))
        except Exception as error:
            print(f"left out: {name}: {str(error).partition(chr(10))[0] or type(error).__name__}")
    if group == "scale":
        return {name: ask[name]("scale", 2000 if options.quick else options.sessions).result() for name in best}
    for _ in range(options.rounds + 1):
        for name, cases in best.items():
            for case in cases:
                n = counts.get((name, case), 20)
                us = ask[name](case, n).result() / n * 1e6
                cases[case] = min(cases[case], us)
                most = 300 if case in ("new", "forged", "forged, read") else 10**6  # These stay, so there are fewer.
                counts.setdefault((name, case), max(10, min(most, int(options.seconds * 1e6 / us))))
    return best


def report(group, best):
    """Print a table; answer its figures, in microseconds."""
    columns, figures = list(dict.fromkeys(case for cases in best.values() for case in cases)), {}
    print(f"\n{group:24}" + "".join(f"{column:>14}" for column in columns) + "  gives up")
    for name, cases in best.items():
        alone, gives_up = [*GROUPS[group][name], "", "", ""][2:4]
        figures[name] = {case: us - best.get(alone, {}).get(case, 0) for case, us in cases.items()}
        if name.startswith("minisess"):
            own = figures[name]
        times = group == "scale" or GROUPS[group][name][1:2] == [""] or figures[name] is own
        cells = {c: f"{us:14.2f}" if times else f"{us / own[c]:12.2f} x" for c, us in figures[name].items()}
        print(f"{name:24}" + "".join(cells.get(c, " " * 14) for c in columns) + "  " + gives_up)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS) + "; all if none is named")
    parser.add_argument("--redis", metavar="URL", help="measure stores there (it adds keys)")
    parser.add_argument("--postgres", metavar="URL", help="measure stores there (it adds tables)")
    parser.add_argument("--sessions", type=int, default=100_000, help="for scale (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only try whether all of it works")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too, in microseconds")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(unknown)}")
    options.rounds, options.seconds = (1, 0.001) if options.quick else (11, 0.05)
    figures = {"python": platform.python_version()}
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="minisess-benchmark-") as options.folder:
        for group in options.groups or GROUPS:
            figures[group] = report(group, measure(group, options))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    from examples import benchmark  # by this name the other processes know what is in here

    benchmark.main()
