"""Tests of minisess, section by section as the module has them.

    Tools              one client, one application factory, a clock that stands still
    The module         what it looks like as a text
    The mail           the behaviours with which it started
    Errors, Interfaces, Look-up order, Look-ups compared with zope.interface, Components, Types
    Sessions, Holding, Memory store, Records, Persistent stores
    Cookies            what is sent, and what is read
    WSGI               each way to answer, peek, requests in parallel
    Security           what an attacker may try, what the log says
    Frameworks         their requests, and servers and clients for real: sockets, gevent, curl, Chromium
    Examples, README, What a newcomer meets, The package

All of it: ``python -m pytest``.  One part: ``-k "sqlite and contract"``, ``-k interface``, ``-k cookie``.
Whatever needs a server, driver, framework or browser that isn't there is skipped with a reason;
with MINISESS_REQUIRE_ALL=1 that fails.  Time is injected, and the order of tests doesn't matter.
"""

from __future__ import annotations

import ast
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import datetime
import decimal
import doctest
import enum
import fractions
import functools
import gc
import glob
import hashlib
import http.client
import importlib.util
import inspect
import io
import ipaddress
import itertools
import logging
import multiprocessing
import operator
import os
import pathlib
import pickle
import pydoc
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import threading
import time
import timeit
import types
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref
import zoneinfo
from dataclasses import dataclass, field
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest

import minisess

# fmt: off
# isort: off
from minisess import (
    Adapter, CannotAdapt, Componentized, DuplicateAdapter, GuardSession, Interface, ISession, IStore, MemoryStore,
    NotStorable, PersistentStore, PostgresStore, RedisStore, SealError, Session, SessionBusy, SessionConflict,
    SessionError, SessionMiddleware, SQLiteStore, StoreError, implementedBy, implementer, providedBy,
    registerAdapter, registry, storable,
)
# isort: on
# fmt: on

try:
    import tracemalloc
except ImportError:  # PyPy has none
    tracemalloc = None

# Reference counts, bytecodes and tracemalloc are CPython's.
CPYTHON = pytest.mark.skipif(sys.implementation.name != "cpython", reason="it is about CPython's insides")
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

HERE = os.path.dirname(os.path.abspath(__file__))
SECRET = "a secret of the tests' own, long enough"
UID = "[A-Za-z0-9_-]{43}"
FOREIGN = [letter * 43 for letter in "abcdef"]  # well-formed ids that no store has given out

# Tools
# ---------------------------------------------------------------------------


def missing(reason):
    """Skip the test; where everything has to be there (CI), fail it."""
    if os.environ.get("MINISESS_REQUIRE_ALL"):
        pytest.fail(f"MINISESS_REQUIRE_ALL is set, but: {reason}")
    pytest.skip(reason)


def package(name):
    """Import *name*, or skip the test."""
    try:
        return __import__(name, fromlist=["*"])
    except ImportError as error:
        return missing(f"{name} isn't installed ({error})")


def program(*names):
    """The path of the first of these programs that there is, or skip the test."""
    for name in names:
        found = shutil.which(name) or next(iter(sorted(glob.glob(name), reverse=True)), None)
        if found:
            return found
    return missing(f"no {names[0]} on this machine")


class Clock:
    """A clock that stands still until it is told to go on."""

    now = 1_000_000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class Response:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body
        self.text = body.decode("utf-8", "replace")

    def all(self, name):
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def __getitem__(self, name):
        return next(iter(self.all(name)), None)


class Browser:
    """A client that keeps its cookies.

    *target* is a WSGI application, called by the letter of PEP 3333 with wsgiref.validate in front
    of it, or the port of a server.  `events` has the statuses and pieces that an application sent.
    """

    def __init__(self, target, scheme="http", cookies=()):
        self.application, self.scheme, self.cookies, self.events = target, scheme, dict(cookies), []

    @property
    def cookie(self):
        """The Cookie header."""
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items())

    def environ(self, path="/", method="GET", **more):
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": ""}
        cookies = {"HTTP_COOKIE": self.cookie} if self.cookies else {}
        environ |= {"wsgi.url_scheme": self.scheme, **cookies, **more}
        setup_testing_defaults(environ)
        return environ

    def request(self, path="/", method="GET", body=b"", most=None, **more):
        """*most* pieces of the response; then the client goes away."""
        environ = self.environ(path, method, **more)
        if body:
            environ["CONTENT_TYPE"], environ["CONTENT_LENGTH"] = "application/x-www-form-urlencoded", str(len(body))
            environ["wsgi.input"] = io.BytesIO(body)
        by = self.by_socket if isinstance(self.application, int) else self.by_call
        response = by(environ, body, most)
        for cookie in response.all("Set-Cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
            if "Max-Age=0" in cookie:
                del self.cookies[name]
        return response

    get = request

    def post(self, path="/", **form):
        return self.request(path, "POST", urllib.parse.urlencode(form).encode())

    def by_call(self, environ, body, most):
        started, sent = [], []

        def start_response(status, headers, exc_info=None):
            if exc_info is not None and sent:
                raise exc_info[1]
            assert exc_info is not None or not started
            started.append((status, list(headers)))
            self.events.append(status)
            return send

        def send(data):
            if data:
                sent.append(data)
                self.events.append(data)

        with contextlib.closing(validator(self.application)(environ, start_response)) as result:
            for data in itertools.islice(result, most):
                send(data)
        return Response(*started[-1], b"".join(sent))

    def by_socket(self, environ, body, most):
        headers = {name[5:].replace("_", "-"): value for name, value in environ.items() if name.startswith("HTTP_")}
        if body:
            headers["Content-Type"] = environ["CONTENT_TYPE"]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.application, timeout=20)) as connection:
            connection.request(environ["REQUEST_METHOD"], environ["PATH_INFO"], body, headers)
            answer = connection.getresponse()
            return Response(f"{answer.status} {answer.reason}", answer.getheaders(), answer.read(most))


def wrap(application, *args, **options):
    """SessionMiddleware around *application*, wsgiref.validate between them."""
    return SessionMiddleware(validator(application), *args, **options)


def plain(start_response, text="", status="200 OK", headers=()):
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [str(text).encode()]


def script(*steps, headers=()):
    """An application that does *steps*, one after the other.

    A str is a status to start the response with (the second time with exc_info); bytes are a piece
    of the body; anything else is the body; an exception is raised; a function is called with the
    environ, what it answers is a step.  After `...` the call has returned, the rest is a body.
    """

    def app(environ, start_response):
        started = []

        def start(status):
            more = [("Content-Type", "text/plain")] if status[:3] not in ("204", "304") else []
            try:
                if started:
                    raise LookupError("an error of the application's")
                started.append(start_response(status, [*more, *headers]))
            except LookupError:
                start_response(status, more, sys.exc_info())

        def play(steps):
            for step in steps:
                if isinstance(step, types.FunctionType):
                    step = step(environ)
                if isinstance(step, type):
                    raise step
                if isinstance(step, str):
                    start(step)
                elif step is not None:
                    yield step

        cut = steps.index(...) if ... in steps else len(steps)
        body = []
        for piece in play(steps[:cut]):
            if isinstance(piece, bytes):
                started[0](piece)
            else:
                body = piece
        return body if cut == len(steps) else Pieces(play(steps[cut + 1 :]), app)

    app.closed = 0
    return app


class Pieces:
    """A body that wants to be closed."""

    def __init__(self, pieces, app):
        self.pieces, self.app = pieces, app

    def __iter__(self):
        return self.pieces

    def close(self):
        self.app.closed += 1
        self.pieces.close()


def acting(default, **actions):
    """An application that answers with what *default*, or at /NAME actions[NAME], makes of the session."""

    def app(environ, start_response):
        action = actions.get(environ["PATH_INFO"].rpartition("/")[2], default)
        return plain(start_response, action(ISession(environ)))

    return app


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def at_once(*works):
    """The results of *works*, each called in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        return [future.result(30) for future in [pool.submit(work) for work in works]]


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session):
        self.hits = 0


registerAdapter(Counter, Session, ICounter)


def visited(session):
    ICounter(session).hits += 1
    return ICounter(session).hits


def count(environ):
    visited(ISession(environ))


def counter_app(environ, start_response):
    return plain(start_response, "hello" if environ["PATH_INFO"] == "/no" else visited(ISession(environ)))


@pytest.fixture
def register():
    """registerAdapter, undone after the test."""
    done = []

    def register(factory, original, *interfaces):
        registerAdapter(factory, original, *interfaces)
        done.extend((factory, original, interface) for interface in interfaces)

    yield register
    for registration in done:
        with contextlib.suppress(KeyError):  # the test took it out
            registry.unregister(*registration)


def interface(name, *bases):
    return minisess.InterfaceMeta(name, bases or (Interface,), {})


# The module
# ---------------------------------------------------------------------------


def test_the_sections_come_in_the_order_of_the_map_the_library_is_enough_and_all_public_names_are_there():
    source = inspect.getsource(minisess)
    rows = source.splitlines()
    rulers = [number for number, row in enumerate(rows) if re.match(r"\s*#\s*[-=#*~_]{4}", row)]
    assert {rows[number] for number in rulers} == {"# " + "-" * 75}
    mapped = re.findall(r"^    (\S+(?: \S+)?) {2,}\S", source.split('"""')[1], re.MULTILINE)
    assert [rows[number - 1] for number in rulers] == [f"# {title}" for title in mapped]
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
    assert sorted(minisess.__all__) == sorted(set(minisess.__all__))
    assert all(hasattr(minisess, name) and not name.startswith("_") for name in minisess.__all__)


# The mail
# ---------------------------------------------------------------------------

compy = minisess  # as the mail calls it


class ICurrentUser(compy.Interface):
    name: str


class IUserManager(compy.Interface):
    pass


class UserManager:
    def __init__(self, session):
        self.session = session


class RequestWithEnviron:
    def __init__(self, environ, name="environ"):
        setattr(self, name, environ)


@pytest.fixture
def in_a_request():
    """A function that calls another with ctx, the environ of a request; all requests are one visitor's."""
    clock, seen = Clock(), []
    store, browser = MemoryStore(clock=clock), Browser(None)

    def in_a_request(work):
        app = script(lambda environ: seen.append(work(environ)), "200 OK", [])
        browser.application = wrap(app, store, lifetime=60)
        assert browser.get().status == "200 OK"
        return seen.pop()

    in_a_request.clock, in_a_request.browser = clock, browser
    return in_a_request


@pytest.mark.parametrize("name", [None, "environ", "env", "wsgi_environ"])
def test_an_attribute_set_on_the_session_is_there_in_the_next_request(in_a_request, name):
    def work(environ):
        ctx = RequestWithEnviron(environ, name) if name else environ
        before = "foo" in ISession(ctx), getattr(ISession(ctx), "foo", None), "owner" in ISession(ctx)
        ISession(ctx).foo = 1
        return before

    assert [in_a_request(work), in_a_request(work)] == [(False, None, False), (True, 1, False)]


@pytest.mark.parametrize("user", [object(), "a name", 0, "", False, [], lambda: None, Session], ids=repr)
def test_any_object_is_a_component_and_adapting_without_one_a_TypeError_or_the_default(in_a_request, user):
    with pytest.raises(TypeError) as caught:
        in_a_request(lambda ctx: ICurrentUser(ISession(ctx)))
    assert type(caught.value) is CannotAdapt
    answers = in_a_request(lambda ctx: [ICurrentUser(ISession(ctx), default) for default in ("default", None)])
    assert answers == ["default", None] and in_a_request.browser.cookies == {}
    in_a_request(lambda ctx: ISession(ctx).setComponent(ICurrentUser, user))
    assert in_a_request(lambda ctx: ICurrentUser(ISession(ctx), "default")) is user
    assert in_a_request(lambda ctx: ISession(ctx).getComponent(ICurrentUser, "default")) is user


@pytest.mark.parametrize("original", [Session, GuardSession, ISession])
def test_a_registered_adapter_is_made_once_for_a_session_and_kept_from_namesakes(in_a_request, register, original):
    register(UserManager, original, IUserManager)
    first = in_a_request(lambda ctx: IUserManager(ISession(ctx)))
    assert isinstance(first, UserManager)
    theirs = interface("IUserManager")  # of an application of other people's
    assert in_a_request(lambda ctx: theirs(ISession(ctx), None)) is None
    in_a_request(lambda ctx: ISession(ctx).setComponent(theirs, "theirs"))
    assert in_a_request(lambda ctx: IUserManager(ISession(ctx))) is first
    assert in_a_request(lambda ctx: ISession(ctx).getComponent(IUserManager)) is first


@pytest.mark.parametrize("noticed_by", ["the same visitor", "another visitor"])
def test_the_objects_are_destroyed_when_the_session_expires(in_a_request, register, noticed_by):
    register(UserManager, Session, IUserManager)
    manager = weakref.ref(in_a_request(lambda ctx: IUserManager(ISession(ctx))))
    in_a_request.clock.advance(59)
    gc.collect()
    assert manager() is not None
    in_a_request.clock.advance(1)
    if noticed_by == "another visitor":
        in_a_request.browser.cookies.clear()
    assert in_a_request(lambda ctx: IUserManager(ISession(ctx))) is not None
    gc.collect()
    assert manager() is None


# Errors
# ---------------------------------------------------------------------------


def test_errors_join_the_tree_and_a_builtin_family_and_carry_the_objects_to_wherever_they_are_sent(register):
    families = {CannotAdapt: TypeError, DuplicateAdapter: ValueError, SessionBusy: TimeoutError, StoreError: Exception}
    families |= {SessionConflict: RuntimeError, NotStorable: (StoreError, TypeError), SealError: ValueError}
    for error, family in families.items():
        assert {SessionError}.union(family if isinstance(family, tuple) else [family]) <= {*error.__mro__}
    original = UserManager(None)
    with pytest.raises(CannotAdapt) as cannot:
        ICurrentUser(original)
    assert (cannot.value.original, cannot.value.interface) == (original, ICurrentUser)
    assert cannot.value.__context__ is None
    register(UserManager, Session, IUserManager)
    with pytest.raises(DuplicateAdapter) as twice:
        registerAdapter(lambda session: None, Session, IUserManager)
    assert (twice.value.factory, twice.value.original, twice.value.interface) == (UserManager, Session, IUserManager)
    for error in (cannot.value, twice.value):  # a process pool pickles them
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.interface) == (type(error), str(error), error.interface)


def test_where_there_is_no_session_the_default_is_the_answer():
    for ctx in ({}, {"PATH_INFO": "/"}, Browser, RequestWithEnviron({}), RequestWithEnviron(1)):
        assert ISession(ctx, None) is None
        with pytest.raises(CannotAdapt):
            ISession(ctx)


# Interfaces
# ---------------------------------------------------------------------------

IAnimal, IPet = interface("IAnimal"), interface("IPet")
IBird = interface("IBird", IAnimal)
IParrot = interface("IParrot", IBird)
IThing = interface("IThing")  # what adapters are registered to, where only their originals matter


def conforming(answer):
    return {"__conform__": lambda self, interface: answer}


def raiser(error):
    def fail(*args):
        raise error

    return fail


def nothing(obj):
    return None


@pytest.mark.parametrize("made", ["unregistered", None, "made", 0, "", False, []], ids=repr)
@pytest.mark.parametrize("implements", [False, True])
@pytest.mark.parametrize("conforms", ["undefined", None, "conforms", 0, "", False, []], ids=repr)
@pytest.mark.parametrize("base", [object, Componentized])
def test_conform_goes_first_then_the_object_then_the_closest_factory_then_the_default_and_only_None_means_no(
    register, base, conforms, implements, made
):
    kind = type("Kind", (type("General", (base,), {}),), {} if conforms == "undefined" else conforming(conforms))
    answers = [] if conforms == "undefined" else [conforms]
    obj = kind()
    if implements:
        implementer(IThing)(kind)
        answers.append(obj)
    if made != "unregistered":
        register(lambda obj: "general", kind.__base__, IThing)
        register(lambda obj: made, kind, IThing)
        answers.append(made)
    expected = next((answer for answer in answers if answer is not None), "default")
    for _ in range(2):  # worked out, then remembered
        assert IThing(obj, "default") is expected
        with pytest.raises(CannotAdapt) if expected == "default" else contextlib.nullcontext():
            assert IThing(obj) is expected


@pytest.mark.parametrize("error", [TypeError(), KeyError(), AttributeError(), CannotAdapt(1, IThing)], ids=repr)
@pytest.mark.parametrize("way", ["conform", "factory", "component"])
def test_an_exception_propagates_with_a_default_and_without(register, way, error):
    base = Componentized if way == "component" else object
    kind = type("Kind", (base,), {"__conform__": raiser(error)} if way == "conform" else {})
    register(raiser(error), kind, IThing)
    for arguments in [(), ("default",), ()]:
        error.__context__ = None
        with pytest.raises(type(error)) as caught:
            IThing(kind(), *arguments)
        assert caught.value is error
        assert error.__context__ is None, "our own look-up shows in the traceback"


@pytest.mark.parametrize("base", [object, Componentized])
def test_conform_is_looked_up_on_the_type_and_bound_as_special_methods_are(base):
    obj = type("Kind", (base,), {})()
    obj.__conform__ = lambda interface: "from the instance"
    assert IThing(obj, None) is None
    assert IThing(type("Kind", (base,), {"__getattr__": raiser(ZeroDivisionError)})(), None) is None
    metaclass = type("Meta", (type,), conforming("from the metaclass"))
    kind = metaclass("Kind", (), conforming("from the class"))
    assert (IThing(kind), IThing(kind())) == ("from the metaclass", "from the class")
    assert IThing(type("Plain", (), conforming("from the class")), None) is None
    assert IThing(metaclass("Plain", (), {})(), None) is None
    static, by_class = staticmethod(lambda asked: ("static", asked)), classmethod(lambda *asked: asked)
    by_property = property(lambda self: lambda asked: ("property", asked))
    for conform, expected in ((static, "static"), (by_class, None), (by_property, "property")):
        kind = type("Kind", (base,), {"__conform__": conform})
        for each in (kind, type("Derived", (kind,), {})):
            assert IThing(each(), "default") == (expected or each, IThing)
    assert IThing(type("Unwilling", (base,), {"__conform__": None})(), "default") == "default"


def ways_to_ask(kind, interface):
    """Five answers to: do objects of class *kind* provide *interface*?"""
    obj, declared = kind(), (interface.implementedBy(kind), issubclass(kind, interface))
    return {*declared, interface.providedBy(obj), isinstance(obj, interface), interface(obj, None) is obj}


def test_all_ways_to_ask_what_is_implemented_agree_and_the_most_specific_comes_first():
    bird, namesake = implementer(IBird)(type("Bird", (), {})), interface("IBird")
    late = implementer(IParrot)(implementer(IPet)(implementer(IAnimal)(type("Late", (), {}))))
    inherited = implementer(IAnimal, IBird)(type("Inherited", (bird,), {}))  # changes nothing
    for kind, declared, implied in [
        (bird, (IBird,), {IAnimal}),
        (type("Hen", (bird,), {}), (IBird,), {IAnimal}),
        (inherited, (IBird,), {IAnimal}),
        (implementer(IPet, IParrot)(type("Parrot", (bird,), {})), (IPet, IParrot, IBird), {IAnimal}),
        (late, (IParrot, IAnimal, IPet), {IBird}),
        (implementer(IPet)(frozenset), (IPet,), set()),
        (type("Set", (frozenset,), {}), (IPet,), set()),
        (type("Both", (frozenset, bird), {}), (IPet, IBird), {IAnimal}),
        (implementer(namesake)(type("Namesake", (), {})), (namesake,), set()),
        (object, (), set()),
    ]:
        assert implementedBy(kind) == providedBy(kind()) == declared
        for each in (IAnimal, IBird, IParrot, IPet, IThing, Interface):
            assert ways_to_ask(kind, each) == {each in implied.union(declared, [Interface])}, (kind, each)
    assert preferred(inherited, IBird, bird) == [bird, IBird]


def test_a_registration_that_fails_changes_nothing_and_unregister_undoes_just_what_it_is_told(register):
    for known in (int, Interface, IBird):
        register(nothing, known, IPet)
    for change, error, factory, original, *interfaces in [
        (registerAdapter, DuplicateAdapter, nothing, int, IThing, IPet),
        (registerAdapter, DuplicateAdapter, UserManager, IBird, IThing, IPet),
        (registry.unregister, KeyError, nothing, Interface, IPet, IThing),
        (registry.unregister, KeyError, UserManager, IBird, IPet),
        (registry.unregister, KeyError, nothing, IParrot, IPet),
    ]:
        with pytest.raises(error):
            change(factory, original, *interfaces)
        assert all(registry.lookup(known, IPet) is nothing for known in (int, Interface, IBird))
        assert registry.lookup(original, IThing) is None
    kind, adapters = type("Kind", (), {}), {}
    register(adapters.get, kind, IThing, IPet)
    registry.unregister(adapters.get, kind, IThing)  # an equal one: each access makes another
    assert (registry.lookup(kind, IThing, "default"), registry.lookup(kind, IPet)) == ("default", adapters.get)
    register(UserManager, kind, IThing)
    assert registry.lookup(kind, IThing) is UserManager


# Look-up order
# ---------------------------------------------------------------------------


def preferred(kind, *sources):
    """The *sources* in the order in which adapters registered for them serve *kind*."""
    own, order = minisess.AdapterRegistry(), []
    for source in sources:
        own.register(functools.partial(nothing, source), source, IThing)
    while (found := own.lookup(kind, IThing)) is not None:
        order += found.args
        own.unregister(found, order[-1], IThing)
    return order


def test_the_most_specific_source_serves_first_in_whatever_order_they_were_registered():
    base = implementer(IBird)(type("Base", (), {}))
    kind = implementer(IPet)(type("Kind", (base,), {}))
    again = implementer(IParrot)(type("Again", (kind,), {}))  # after the base that implements it, too
    wrong = implementer(IAnimal, IBird, IParrot)(type("Wrong", (), {}))  # no consistent order
    for each, expected in {
        kind: [kind, IPet, base, IBird, IAnimal, object, Interface],
        again: [again, IParrot, kind, IPet, base, IBird, IAnimal, object, Interface],
        wrong: [wrong, IParrot, IBird, IAnimal, object, Interface],
        type("Unrelated", (), {}): [],
    }.items():
        others = [] if expected else [IPet, UserManager, int]
        assert preferred(each, *others, *expected) == preferred(each, *others, *reversed(expected)) == expected


class Late:
    """A class, its base and what they implement, for declarations that come late."""

    def __init__(self, base=object):
        self.Base = implementer(IPet)(type("Base", (base,), {}))
        self.Kind = type("Kind", (self.Base,), {})


@pytest.mark.parametrize("base", [object, Componentized, type("Conforming", (), conforming(None))])
@pytest.mark.parametrize("where", ["Kind", "Base", object, Interface, IPet], ids=str)
def test_what_is_registered_or_declared_after_a_look_up_takes_effect_at_once_and_so_does_its_end(register, base, where):
    late, own = Late(base), minisess.AdapterRegistry()
    where = getattr(late, where) if isinstance(where, str) else where
    assert IThing(late.Kind(), None) is own.lookup(late.Kind, IThing) is None
    register(lambda obj: "registered", where, IThing)
    assert IThing(late.Kind(), None) == "registered"
    assert registry.lookup(late.Kind, IThing) is registry.lookup(where, IThing)
    registry.unregister(registry.lookup(where, IThing), where, IThing)
    assert IThing(late.Kind(), None) is None
    register(lambda obj: "declared", IBird, IThing)
    own.register(nothing, IBird, IThing)
    assert IThing(late.Kind(), None) is own.lookup(late.Kind, IThing) is None
    assert ways_to_ask(late.Kind, IBird) == {False}
    implementer(IBird)(where if where is late.Base else late.Kind)
    assert ways_to_ask(late.Kind, IBird) == {True} and IBird in implementedBy(late.Kind)
    assert (IThing(late.Kind(), None), own.lookup(late.Kind, IThing)) == ("declared", nothing)


@pytest.mark.skipif(FREE_THREADED and sys.version_info < (3, 14), reason="once there was a thread, 3.13t keeps classes")
@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda base: type("Plain", (), {}), None),
        (lambda base: type("Derived", (base,), {}), "general"),
        (lambda base: type("Conforming", (Componentized, base), conforming(None)), "general"),
        (lambda base: implementer(interface("IDynamic", IBird))(type("Dynamic", (), {})), "other"),
    ],
)
def test_of_classes_made_dynamically_a_bounded_number_is_remembered_and_all_adapt_right(register, make, expected):
    late, alive = Late(), weakref.WeakSet()
    register(lambda obj: "general", IPet, IThing)
    register(lambda obj: "other", IBird, IThing)
    for number in range(10_000):
        kind = make(late.Base)
        assert (IThing(kind(), None), IThing(late.Kind())) == (expected, "general"), number
        ways_to_ask(kind, IBird)
        alive.update({kind, *implementedBy(kind)})
    # Nobody called the garbage collector: it came by itself, now and then.
    assert len(alive) < 7_000 or sys.implementation.name != "cpython"


# Look-ups compared with zope.interface
# ---------------------------------------------------------------------------


class Hierarchy:
    """A random family of interfaces and classes, declared and registered with us and with zope.interface."""

    def __init__(self, seed, zope):
        self.random, self.zope, self.seed = random.Random(seed), zope, seed
        self.interfaces, self.classes, self.registrations = {}, [], []  # interfaces: ours -> zope's
        self.adapters = zope.adapter.AdapterRegistry()
        for number in range(self.random.randint(2, 6)):
            bases = self.some([*self.interfaces], 0.8)
            theirs = tuple(map(self.interfaces.get, bases)) or (zope.Interface,)
            with contextlib.suppress(TypeError):  # bases that Python can't order
                ours = interface(f"I{seed}_{number}", *bases)
                self.interfaces[ours] = zope.interface.InterfaceClass(ours.__name__, theirs)
        for number in range(self.random.randint(2, 6)):
            with contextlib.suppress(TypeError):
                self.classes.append(type(f"C{seed}_{number}", tuple(self.some(self.classes, 0.7)), {}))
                self.declare(self.classes[-1], 0.7)

    def some(self, things, share=1.0):
        """Up to three of *things*, in a *share* of the cases; none in the others."""
        most = self.random.randint(1, 3) if self.random.random() < share else 0
        return self.random.sample(things, min(len(things), most))

    def declare(self, kind, share=1.0):
        interfaces = self.some([*self.interfaces], share)
        self.zope.classImplements(implementer(*interfaces)(kind), *map(self.interfaces.get, interfaces))

    def spec(self, source):
        return self.interfaces.get(source) or self.zope.implementedBy(source)

    def register(self):
        source, target = map(self.random.choice, ([*self.classes, *self.interfaces, object], [*self.interfaces]))

        def factory(obj):
            return factory

        with contextlib.suppress(DuplicateAdapter):
            registerAdapter(factory, source, target)
            self.adapters.register([self.spec(source)], self.interfaces[target], "", factory)
            self.registrations.append((factory, source, target))

    def unregister(self):
        factory, source, target = self.registrations.pop(self.random.randrange(len(self.registrations)))
        registry.unregister(factory, source, target)
        self.adapters.unregister([self.spec(source)], self.interfaces[target], "", factory)

    def differences(self):
        for kind in self.classes:
            obj, spec = kind(), self.spec(kind)
            for ours, theirs in self.interfaces.items():
                found = self.adapters.lookup1(spec, theirs)
                expected = obj if spec.isOrExtends(theirs) else found
                if registry.lookup(kind, ours) is not found or ours(obj, None) is not expected:
                    yield f"hierarchy {self.seed}: from {kind} to {ours}"


def test_random_hierarchies_adapt_as_with_zope_interface():
    (zope, *_), differences, inconsistent = [package(f"zope.interface{m}") for m in ("", ".adapter", ".ro")], [], 0
    for seed in range(2000):
        hierarchy = Hierarchy(seed, zope)
        for _ in range(hierarchy.random.randint(2, 6)):
            hierarchy.register()
        differences += hierarchy.differences()
        inconsistent += any(not zope.ro.is_consistent(hierarchy.spec(kind)) for kind in hierarchy.classes)
        hierarchy.declare(hierarchy.random.choice(hierarchy.classes))
        hierarchy.unregister()
        hierarchy.register()
        differences += hierarchy.differences()
        while hierarchy.registrations:
            hierarchy.unregister()
    assert differences == []
    assert inconsistent > 50, "these hierarchies say little about orders that aren't consistent"


# Components
# ---------------------------------------------------------------------------


@implementer(IBird, IPet, IUserManager)
class Bird(Adapter):
    pass


@pytest.fixture(params=["Componentized", "Session", "stored session"])
def thing(request, tmp_path):
    """Something that keeps components."""
    if request.param == "Componentized":
        return Componentized()
    store = MemoryStore() if request.param == "Session" else SQLiteStore(tmp_path / "sessions", secret=SECRET)
    return store.create(60, 60)


def test_components_are_set_and_unset_in_any_order_each_for_its_own_interface_only(thing):
    rng, expected = random.Random(0), {}
    for _ in range(200):
        each, component = rng.choice([IBird, IPet, IAnimal]), Bird(None)
        if rng.random() < 0.5:
            thing.setComponent(each, component)
            expected[each] = component
        elif each in expected:
            thing.unsetComponent(each)
            del expected[each]
        else:
            with pytest.raises(KeyError):
                thing.unsetComponent(each)
        for asked in (IBird, IPet, IAnimal, IParrot, IUserManager):
            assert asked(thing, None) is thing.getComponent(asked) is expected.get(asked)
            assert (asked in thing) is (asked in expected)


def test_an_adapter_is_remembered_until_it_is_unset_but_temporary_ones_None_and_a_default_never(thing, register):
    register(Bird, Componentized, IBird)
    assert IBird not in thing
    made = thing.getComponent(IBird)
    assert made.original is thing and IBird in thing
    assert thing.getComponent(IBird) is IBird(thing) is IBird(thing, None) is made
    thing.unsetComponent(IBird)
    assert IBird not in thing and IBird(thing) is not made
    register(type("Fleeting", (Bird,), {"temporaryAdapter": 1}), Componentized, IPet, IThing)
    assert IPet(thing) is not thing.getComponent(IPet)
    assert IPet not in thing and IThing not in thing
    answers = [None, None, None, "made"]
    register(lambda obj: answers.pop(0), Componentized, IAnimal)
    assert (thing.getComponent(IAnimal), thing.getComponent(IAnimal, 5), IAnimal(thing, 6)) == (None, 5, 6)
    assert IAnimal not in thing and IAnimal(thing) == "made"


FUNCTION, OTHER = functools.partial(Bird), type("Other", (Bird,), {})
ALONE = type("Alone", (Bird,), {"multiComponent": False})


@pytest.mark.parametrize("factories", [(Bird, Bird), (ALONE, ALONE), (FUNCTION, FUNCTION), (OTHER, Bird)], ids=str)
def test_a_multi_component_is_kept_for_all_interfaces_to_which_its_class_is_registered(thing, register, factories):
    for factory, each in zip(factories, (IBird, IPet), strict=True):
        register(factory, Componentized, each)
    made, shared = IBird(thing), factories == (Bird, Bird)
    assert (IPet in thing, IPet(thing) is made, IUserManager in thing) == (shared, shared, False)
    assert thing.getComponent(IUserManager) is None


@pytest.mark.parametrize("base", [Adapter, object], ids=["multi", "plain"])
def test_asking_for_a_base_interface_never_replaces_the_component_of_a_derived_one(thing, register, base):
    kind = type("Kind", (base,), {"__init__": lambda self, original: None})
    register(implementer(IBird)(kind), Componentized, IBird)
    mine = Bird(thing)
    thing.setComponent(IBird, mine)
    made = IAnimal(thing)
    assert isinstance(made, kind)
    assert IBird(thing) is mine and IAnimal(thing) is made


def test_Twisteds_ways_to_keep_and_forget_a_component_and_what_a_factory_makes(thing, register):
    def where(component):
        return [each for each in (IBird, IPet, IUserManager, IAnimal) if each in thing and each(thing) is component]

    register(Bird, Componentized, IPet)
    register(nothing, Componentized, IUserManager)
    one = Bird(None)
    thing.addComponent(one)  # where its class is the registered adapter
    assert where(one) == [IPet]
    thing.addComponent(one, True)
    assert where(one) == [IBird, IPet, IUserManager]
    two = thing.addAdapter(Bird)
    assert (type(two), two.original, where(two), where(one)) == (Bird, thing, [IPet], [IBird, IUserManager])
    assert where(thing.addAdapter(Bird, ignoreClass=True)) == [IBird, IPet, IUserManager]
    thing.setAdapter(IAnimal, Bird)
    assert type(IAnimal(thing)) is Bird and IAnimal(thing).original is thing and where(IAnimal(thing)) == [IAnimal]
    assert thing.locateAdapterClass(type(thing), IPet, None) is Bird
    assert thing.locateAdapterClass(type(thing), IBird, "default") == "default"
    this, equal = [1], [1]
    for each, component in ((IBird, this), (IPet, equal), (IUserManager, this)):
        thing.setComponent(each, component)
    assert {*thing.removeComponent(this)} == {IBird, IUserManager}  # this very object
    assert (where(this), where(equal), thing.removeComponent(this)) == ([], [IPet], [])


@pytest.mark.parametrize("method", ["getComponent", "__conform__", "none"])
def test_a_component_goes_before_the_object_itself_and_a_derived_class_has_its_own_say(method):
    def answer(self, asked, default=None):
        return "its own say" if asked is IBird else getattr(Componentized, method)(self, asked)

    obj = implementer(IPet)(type("Kind", (Componentized,), {method: answer}))()
    assert IPet(obj) is obj and Componentized.getComponent(obj, IPet) is obj
    obj.setComponent(IPet, "kept")
    assert IBird(obj, None) == (None if method == "none" else "its own say")
    assert (IPet(obj), obj.getComponent(IPet), IThing(obj, None)) == ("kept", "kept", None)


@pytest.mark.parametrize("asked", [[IBird] * 4, [IBird, IPet]], ids=["one interface", "two"])
@pytest.mark.parametrize("base", [Adapter, object], ids=["multi", "plain"])
def test_threads_that_adapt_at_once_get_what_is_kept(thing, register, base, asked):
    meeting = threading.Barrier(len(asked), timeout=20)

    class Kind(base):
        def __init__(self, original):
            meeting.wait()  # all have seen that there is none

    register(implementer(IBird, IPet)(Kind), Componentized, IBird, IPet)
    answers = at_once(*[functools.partial(each, thing) for each in asked])
    assert {type(answer) for answer in answers} == {Kind}
    assert all(each(thing) is answer for each, answer in zip(asked, answers, strict=True))


def test_threads_adapt_while_others_register_and_declare(register):
    register(lambda obj: "adapter", IPet, IThing)
    stop, kinds = threading.Event(), [Late().Kind for _ in range(10)]

    def adapt():
        return {IThing(kind()) for _ in iter(stop.is_set, True) for kind in kinds}

    def change():
        try:
            for number in range(300):
                implementer(interface(f"ILate{number}"))(kinds[number % 10])
                registerAdapter(nothing, IPet, IAnimal)
                registry.unregister(nothing, IPet, IAnimal)
        finally:
            stop.set()

    assert at_once(adapt, adapt, change) == [{"adapter"}, {"adapter"}, None]


def test_an_adapter_adapts_as_what_it_adapts_but_for_what_it_provides_itself(thing, register):
    register(Bird, Componentized, IBird)
    register(lambda original: [original], Componentized, IThing)
    bird = IBird(thing)
    assert IThing(bird) is IThing(thing) and IPet(bird) is bird and ICurrentUser(bird, None) is None
    for original in (object(), None, 5, Componentized, Bird):  # without components
        adapter = Adapter(original)
        assert adapter.original is original and IThing(adapter, "default") == "default"
        with pytest.raises(CannotAdapt):
            IThing(adapter)


# Types
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["mypy --strict --follow-imports=silent", "pyright"])
def test_type_checkers_see_the_promised_types_and_mistakes(tool, tmp_path):
    package(tool.split()[0])
    for path in (minisess.__file__, os.path.join(HERE, ".ci", "typed.py")):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "-m", *tool.split(), "typed.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


# Sessions
# ---------------------------------------------------------------------------

LIFETIME, MAX_LIFETIME, EON = 10, 100, 10**9  # seconds; idle well below the lease of persistent stores
MOVED = minisess.MOVED
RENEW, LOG_IN, EXPIRE = (operator.methodcaller(*call) for call in (["renew"], ["login", "ann"], ["expire"]))
MOVES = pytest.mark.parametrize("move", [RENEW, LOG_IN], ids=["renew", "login"])


class IWitness(Interface): ...


@implementer(IWitness)
class Witness:
    """A component whose methods are callbacks; what ran is in `Witness.saw`, wherever its session was stored."""

    saw, error = [], None

    def __init__(self, name, session=None):
        self.name, self.session = name, session

    def ended(self):
        Witness.saw.append(self.name)

    def ended_too(self):
        Witness.saw.append(f"{self.name} too")

    def fail(self):
        raise Witness.error("on purpose")


@pytest.fixture(autouse=True)
def _nothing_seen():
    Witness.saw.clear()


@pytest.fixture
def clock():
    return Clock()


def put(**attributes):
    """A function that sets these attributes of a session."""
    return lambda session: [setattr(session, *item) for item in attributes.items()] and None


def new_session(store, lifetime=LIFETIME, max_lifetime=MAX_LIFETIME, witness=None, owner=None, **attributes):
    """A session that is stored and not held; its *witness* is told of its end."""
    session = store.create(lifetime, max_lifetime)
    put(**attributes)(session)
    if witness is not None:
        session.setComponent(IWitness, Witness(witness))
        session.notifyOnExpire(IWitness(session).ended)
    if owner is not None:
        session.login(owner)
    store.save(session)
    return session


@contextlib.contextmanager
def visit(store, uid, **options):
    """What a request does with a session that is there."""
    session = store.open(uid, **options)
    assert isinstance(session, Session)
    yield session
    store.save(session)


def counting(store, uid, **options):
    """A request that counts one more, with time for others to come in between."""
    with visit(store, uid, **options) as session:
        before = session.n
        time.sleep(0)
        session.n = before + 1


def lives(store, uid):
    """Is there such a session?  Looks only."""
    return isinstance(store.peek(uid), Session)


class Background(threading.Thread):
    """A thread that runs *function*; `result` waits for what it answered or raised."""

    def __init__(self, function, *args, **options):
        super().__init__(daemon=True)
        self.work = functools.partial(function, *args, **options)
        self.start()

    def run(self):
        try:
            self.answer, self.error = self.work(), None
        except BaseException as error:
            self.error = error

    def is_stuck(self):
        self.join(0.05)
        return self.is_alive()

    def result(self):
        self.join(30)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.answer


class Guest(Browser):
    """A browser whose requests do with their session what the test says; `was_told` is the last Set-Cookie, or None."""

    def __init__(self, store, cookies=(), **options):
        steps = [lambda environ: environ["test.work"](environ), lambda environ: environ.get("test.status", "200 OK")]
        super().__init__(wrap(script(*steps), store, **options), cookies=cookies)

    def do(self, work, find=ISession, **more):
        """A request that calls ``work(ISession(environ))``; its answer."""
        answers = []
        self.response = self.request(**{"test.work": lambda environ: answers.append(work(find(environ))), **more})
        self.was_told = self.response["Set-Cookie"]
        return answers[0]

    def stream(self, work, find=ISession):
        """A request whose body is the generator ``work(ISession(environ))``; the rest after its first piece."""

        def pieces():
            environ = self.environ(**{"test.work": lambda environ: work(find(environ))})
            with contextlib.closing(self.application(environ, lambda status, headers, exc_info=None: None)) as body:
                yield from body

        rest = pieces()
        next(rest)
        return rest

    @property
    def sid(self):
        return self.cookies.get("sid")


@pytest.fixture
def often_switching():
    """Threads take turns after a few instructions already."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class StoreContract:
    """What every store promises.  A subclass named Test... says how to make one.

    Times in it are small: no request lasts for more than 20 seconds of the injected clock.
    """

    #: Are its sessions live objects of this process?  How many steps has a random walk, and from which seeds?
    live, steps, seeds = False, 400, (1, 2)

    def make_store(self, clock):
        """An empty store that goes by *clock*."""
        raise NotImplementedError

    def elsewhere(self, store):
        """The same store as another process sees it, if others can."""
        return store

    @pytest.fixture
    def store(self, clock):
        return self.make_store(clock)

    # What is stored

    def test_it_keeps_sessions_that_hold_anything_and_opens_no_uid_that_it_never_gave(self, store, clock, register):
        class Passing(Adapter):
            temporaryAdapter = True

        session = store.create(LIFETIME, MAX_LIFETIME)
        assert (IStore(store), store.clock(), bool(re.fullmatch(UID, session.uid))) == (store, clock.now, True)
        assert "foo" not in session and getattr(session, "foo", None) is None
        assert ICurrentUser not in session and ICurrentUser(session, None) is session.getComponent(ICurrentUser) is None
        register(Passing, Session, ICurrentUser)
        assert isinstance(ICurrentUser(session), Passing)
        session.touch()
        session.setLifetime(5)
        session.renew()
        store.save(session)
        assert (len(store), store.open(session.uid)) == (0, None)
        for stored, use in enumerate([put(foo=None), lambda s: s.setComponent(ICurrentUser, 0), ICounter, LOG_IN]):
            session = store.create(LIFETIME, MAX_LIFETIME)
            use(session)
            assert len(store) == stored  # not before it is saved
            store.save(session)
            assert (len(store), lives(store, session.uid)) == (stored + 1, True)
        for uid in ("", "x", "A" * 43, "../../etc/passwd", "\x00", "é" * 43):
            assert store.open(uid) is store.peek(uid) is None
        assert len(store) == 4

    # Expiry

    # What the random walk hasn't: the first and the last moment, and limits that are none or long.
    @pytest.mark.parametrize(
        ("limits", "steps", "end", "reason"),
        [
            ((10, 100), [], 10, "idle"),
            ((10, 25), [(put(n=1), 8), (put(n=2), 16), (lambda s: s.touch(), 24)], 25, "absolute"),
            ((10, 100), [("look", 1), ("look", 9)], 19, "idle"),
            ((10, 100), [(lambda s: s.setLifetime(None), 5)], 100, "absolute"),
            ((10, 100), [(lambda s: s.release() or s.setLifetime(3), 5)], 8, "idle"),
            ((10, float("inf")), [(lambda s: s.setLifetime(None), 5), ("look", EON), (EXPIRE, EON)], EON, "logout"),
            ((10, 15), [(lambda s: s.login("ann", remember=30), 9), (RENEW, 20), (put(n=1), 30)], 39, "absolute"),
            ((10, 70), [(lambda s: s.login("ann", remember=30), 9), (LOG_IN, 20)], 30, "idle"),
            ((10, 15), [(lambda s: s.login("ann", remember=30), 5), (LOG_IN, 20), (put(n=1), 28)], 35, "absolute"),
            ((10, 15), [(put(n=1), 16)], 16, "absolute"),  # it outlasts its deadline, and is the last
            ((10, 50), [(lambda s: s._store.sweep() or s._store.release(s), 11)], 11, "idle"),  # and was found in use
            # The clock steps back and forth.
            ((50, 90), [step for t in (-40, 0, 40, 0) for step in (("look", t), (put(n=t), t))], 50, "idle"),
        ],
    )
    def test_it_ends_exactly_at_its_deadline_and_not_before(self, store, clock, limits, steps, end, reason, caplog):
        """*steps*: what a request does, and when."""
        caplog.set_level(logging.INFO, "minisess")
        uid, start = new_session(store, *limits, witness="w").uid, clock.now
        for work, when in steps:
            if work == "look":
                clock.now = start + when
                assert (store.sweep(), lives(store, uid)) == (0, True)
                continue
            with visit(store, uid) as session:
                clock.now = start + when
                work(session)
            uid = session.uid
        if clock.now < start + end:
            clock.now = start + end - 0.001
            assert (store.sweep(), len(store)) == (0, 1)
        clock.now = start + end
        assert store.peek(uid) is store.open(uid) is None
        assert (Witness.saw, len(store)) == (["w"], 0)
        assert [r.reason for r in caplog.records if r.event == "ended"] == [reason]

    def test_the_expired_are_gone_though_many_are_due_before_them_and_many_others_were_used(self, store, clock, caplog):
        caplog.set_level(logging.INFO, "minisess")
        used = [new_session(store, n=n).uid for n in range(60)]
        clock.advance(1)
        limits = (LIFETIME, 1000), (1000, LIFETIME)
        expired = [new_session(store, *limits[n % 3 > 1], witness=n).uid for n in range(60)]
        clock.advance(LIFETIME - 2)
        for uid in used:
            store.save(store.open(uid))
        clock.advance(2)
        assert [store.peek(uid) or store.open(uid) for uid in expired[-2:]] == [None, None]
        already = sorted(Witness.saw)
        assert already[-2:] == [58, 59]
        assert (store.sweep(), sorted(Witness.saw)) == (60 - len(already), list(range(60)))
        assert sorted(r.reason for r in caplog.records if r.event == "ended") == ["absolute"] * 20 + ["idle"] * 40
        clock.advance(LIFETIME - 2)
        assert (store.sweep(), len(store)) == (60, 0)

    @pytest.mark.parametrize("ahead", [0, 1e9])
    def test_new_sessions_end_the_abandoned_ones_though_the_clock_was_years_ahead_once(self, store, clock, ahead):
        clock.advance(ahead)
        new_session(store, foo=1)
        clock.advance(-ahead)
        for n in range(40):
            new_session(store, witness=n)
        clock.advance(LIFETIME)
        for _ in range(30):
            new_session(store, foo=1)
        assert sorted(Witness.saw) == list(range(40))
        assert len(store) == (31 if ahead else 30)

    @pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("ender", "sweep expireAll clear expire request".split())
    def test_callbacks_run_once_and_in_order_whatever_one_raises(self, store, clock, ender, error, monkeypatch, caplog):
        monkeypatch.setattr(Witness, "error", error)
        for n in range(4):
            session = new_session(store, witness=n, owner="ann")
            for name in ("fail", "ended_too", "ended"):
                with visit(store, session.uid) as session:
                    session.notifyOnExpire(getattr(IWitness(session), name))
        clock.advance(LIFETIME if ender in ("sweep", "request") else 0)
        ends = store.sweep, lambda: store.expireAll("ann"), store.clear, session.expire, lambda: new_session(store, n=1)
        end = ends["sweep expireAll clear expire request".split().index(ender)]
        # An Exception is logged; a SystemExit is nothing to a request that only happens to pay for the sweep, either.
        spared = error is ZeroDivisionError or (error is SystemExit and ender == "request")
        with contextlib.nullcontext() if spared else pytest.raises(error, match="on purpose"):
            for _ in range(4):
                end()
        ended = Witness.saw[::3]
        assert len(ended) == len(set(ended)) == {"expire": 1, "request": len(ended) or 1}.get(ender, 4)
        assert Witness.saw == [name for n in ended for name in (n, f"{n} too", n)]
        failed = [record for record in caplog.records if record.levelname == "ERROR"]
        assert [(r.name, r.event, r.exc_info[0]) for r in failed] == [("minisess", "failed", error)] * len(ended)
        assert session.uid not in caplog.text

    # Ending

    @pytest.mark.parametrize("by", ["itself", "another request"])
    def test_expire_ends_it_at_once_and_what_its_request_does_afterwards_is_lost(self, store, by, caplog):
        caplog.set_level(logging.INFO, "minisess")
        made, other = new_session(store, witness="w", owner="ann"), new_session(store, foo=1)
        mine = store.open(made.uid)
        (mine if by == "itself" else store.peek(made.uid)).expire()
        assert (Witness.saw, len(store), store.open(made.uid), lives(store, other.uid)) == (["w"], 1, None, True)
        if by == "itself":
            assert mine.ended and vars(mine) == {} and IWitness not in mine
        mine.foo = 1
        mine.setComponent(ICurrentUser, 1)
        fresh = store.create(LIFETIME, MAX_LIFETIME)
        for work in (put(foo=1), EXPIRE, store.save):
            work(fresh)
        store.save(mine)
        assert (Witness.saw, len(store), store.open(made.uid)) == (["w"], 1, None)
        said = [(r.event, r.owner, r.reason) for r in caplog.records if r.session == made.handle]
        assert said[:2] == [("login", "ann", None), ("created", "ann", None)]
        assert said[2:] == [("ended", "ann", "logout"), ("lost", None, None)]
        assert caplog.records[-1].levelname == "WARNING" and made.uid not in caplog.text

    def test_many_who_end_sessions_at_once_end_each_one_once(self, store, clock, often_switching):
        uids = [new_session(store, witness=n, owner="ann" if n < 20 else None).uid for n in range(40)]
        start = threading.Barrier(4, timeout=20)

        def end(store):
            for uid in uids[:10]:
                start.wait()
                if look := store.peek(uid):
                    look.expire()
            start.wait()
            store.expireAll("ann")
            start.wait()
            clock.advance(1000)
            store.sweep()
            return [store.open(uid) for uid in uids]

        stores = [store, self.elsewhere(store), self.elsewhere(store), store]
        assert at_once(*(functools.partial(end, each) for each in stores)) == [[None] * 40] * 4
        assert (sorted(Witness.saw), len(store)) == (list(range(40)), 0)

    def test_sessions_and_expireAll_are_about_one_owner_and_clear_ends_everybodys(self, store, caplog):
        caplog.set_level(logging.INFO, "minisess")
        for n in range(30):
            new_session(store, witness=n, owner=[None, "ann", "bob"][n % 3])
        for _ in range(1000):
            new_session(store, owner="eve")
        mine = store.open(new_session(store, witness=30, owner="eve").uid)
        for nobody, refused in itertools.product((None, "", 7), (store.expireAll, store.sessions)):
            with pytest.raises(TypeError, match="clear"):
                refused(nobody)
        assert len(store.sessions("eve")) == 1001
        assert min(timeit.repeat(lambda: store.sessions("eve"), number=1, repeat=3)) < 1
        assert (store.expireAll("eve", keep=mine), Witness.saw) == (1000, [])
        assert (self.elsewhere(store).clear(), sorted(Witness.saw)) == (31, list(range(31)))
        mine.foo = 1
        store.save(mine)
        assert (len(store), store.sessions("ann"), store.clear()) == (0, [], 0)
        assert [r.reason for r in caplog.records if r.event == "ended"] == ["all"] * 1031

    def test_expireAll_isnt_escaped_by_renewing_in_a_loop(self, store):
        def thief(uid):
            with contextlib.suppress(SessionError):
                while isinstance(session := store.open(uid), Session):
                    session.renew()
                    store.save(session)
                    uid = session.uid
            return uid

        admin = self.elsewhere(store)
        for _ in range(100):
            running = Background(thief, new_session(store, 1000, 10000, owner="ann").uid)
            time.sleep(random.uniform(0, 0.004))
            assert admin.expireAll("ann") == 1 and not lives(admin, running.result())
        assert len(store) == 0

    # Renewing

    @MOVES
    def test_the_old_id_is_dead_at_once_and_for_60_seconds_known_to_have_moved(self, store, clock, move, caplog):
        caplog.set_level(logging.INFO, "minisess")
        old, here, there = new_session(store, 1000, 1000, witness="w", owner="ann").uid, store, self.elsewhere(store)
        mine = store.open(old)
        move(mine)
        said, event = caplog.records[-1], "renewed" if move is RENEW else "login"
        assert mine.uid != old and (said.event, said.session, said.owner) == (event, mine.handle, "ann")
        assert here.open(old) is here.peek(old) is there.open(old) is there.peek(old) is MOVED
        mine.foo = 1
        store.save(mine)
        clock.advance(59.75)
        assert store.sweep() == 0
        assert store.open(old) is store.peek(old) is MOVED and MOVED.ended is True
        self.let_a_minute_pass(store, clock, old)
        assert store.open(old) is store.peek(old) is None
        with visit(there, mine.uid) as again:
            assert (again.foo, IWitness(again).name) == (1, "w")
            again.renew()
        assert (len(store), len(store.sessions("ann")), Witness.saw) == (1, 1, [])
        assert (store.expireAll("ann"), Witness.saw, len(store), store.clear()) == (1, ["w"], 0, 0)

    def let_a_minute_pass(self, store, clock, uid):
        clock.advance(0.25)
        store.sweep()

    def test_sessions_lists_an_owners_live_ones_as_last_saved_the_oldest_first(self, store, clock):
        new_session(store, owner="bob")
        made = {}
        for name in ("phone", "desk", "gone", "couch"):
            made[name] = new_session(store, 30, owner="ann", device=name)
            clock.advance(1)
        made.pop("gone").expire()
        mine = store.open(made["desk"].uid)
        mine.device = "unsaved" if not self.live else "desk"
        new_session(store, 5, owner="ann", device="expired by then")
        clock.advance(5)
        listed = self.elsewhere(store).sessions("ann")
        seen = [(s.device, s.handle, s.created, s.authenticated) for s in listed]
        assert seen == [(name, s.handle, s.created, s.created) for name, s in made.items()]
        assert [s.lastModified for s in listed[::2]] == [s.created for s in listed[::2]]  # listing isn't activity
        assert len({s.handle for s in listed if re.fullmatch("[0-9a-f]{16}", s.handle)}) == 3
        assert store.open(mine.handle) is store.peek(mine.handle) is None
        assert store.sessions("eve") == []

    def test_a_look_waits_for_nobody_and_changes_nothing(self, store):
        uid = new_session(store, foo=1, owner="ann").uid
        mine, other = store.open(uid), self.elsewhere(store)
        for look in (other.peek(uid), *other.sessions("ann")):
            assert (look.foo, look.owner, look.handle) == (1, "ann", mine.handle)
            for change in (
                *(put(bar=1), lambda s: delattr(s, "foo"), lambda s: s.setComponent(ICurrentUser, 1), RENEW, LOG_IN),
                *(lambda s: s.setLifetime(5), lambda s: s.release(), lambda s: s.notifyOnExpire(print)),
            ):
                with pytest.raises(AttributeError, match="ISession"):
                    change(look)
            assert ICounter(look).hits == 0
        for each in (store, other):  # it is held still
            with pytest.raises(SessionBusy) as caught:
                each.open(uid, patience=0.02)
            assert caught.value.patience == 0.02
        store.save(mine)
        with visit(store, uid, patience=0) as again:
            assert vars(again) == {"foo": 1} and ICounter not in again

    # Holding

    def test_who_came_first_is_served_first(self, store):
        def wait():
            with visit(store, uid):
                go.wait(20)
                return next(turns)

        uid, turns, waiting, go = new_session(store, n=0).uid, itertools.count(), [], threading.Event()
        with visit(store, uid):
            for _ in range(6):
                waiting.append(Background(wait))
                assert waiting[-1].is_stuck()
        with pytest.raises(SessionBusy):  # nor does anybody push in
            store.open(uid, patience=0)
        go.set()
        assert [thread.result() for thread in waiting] == list(range(6))

    @pytest.mark.parametrize("end", [RENEW, LOG_IN, EXPIRE], ids=["renew", "login", "expire"])
    def test_who_waits_for_an_id_that_dies_gets_nothing(self, store, end):
        uid = new_session(store, foo=1).uid
        with visit(store, uid) as mine:
            threads = [Background(each.open, uid) for each in (store, self.elsewhere(store))]
            assert [thread.is_stuck() for thread in threads] == [True, True]
            end(mine)
            assert [thread.result() for thread in threads] == [None if end is EXPIRE else MOVED] * 2

    @CPYTHON
    def test_a_hold_ends_with_the_object_that_has_it(self, store, clock):
        uid = new_session(store, witness="w").uid
        mine = [store.open(uid)]
        mine.append(mine)
        waiting = Background(lambda: IWitness(store.open(uid)).name)
        assert waiting.is_stuck()
        del mine
        gc.collect()
        assert waiting.result() == "w"
        mine = [store.open(uid, patience=0) for uid in (uid, new_session(store, witness="too").uid)]
        clock.advance(20)
        assert (store.sweep(), Witness.saw) == (0, [])
        mine.clear()
        assert store.peek(uid) is store.open(uid) is None
        clock.advance(40)
        assert (store.sweep(), Witness.saw) == (1, ["w", "too"])
        store.open(new_session(store, foo=1).uid)
        assert store.sweep() == 0 and not (self.live and store.holds.holders)  # nor is the dead one's name kept

    def test_release_lets_the_next_one_in_and_what_nobody_else_has_changed_is_saved_afterwards(self, store, clock):
        uid, other = new_session(store, foo=1).uid, self.elsewhere(store)
        mine = store.open(uid)
        store.release(mine)
        store.release(mine)
        mine = store.open(uid, patience=0)
        assert mine.foo == 1
        mine.foo = 2
        mine.release()
        mine.release()
        theirs = other.open(uid, patience=0)
        assert theirs.foo == 2
        mine.release()  # but it isn't mine any more
        with pytest.raises(SessionBusy):
            store.open(uid, patience=0)
        clock.advance(3)
        theirs.touch()
        other.save(theirs)  # somebody else has only looked
        mine.bar = 2
        mine.setComponent(IWitness, Witness("w"))
        mine.notifyOnExpire(IWitness(mine).ended)
        mine.release()
        mine.baz = 3
        store.save(mine)
        with visit(other, uid) as again:
            assert vars(again) == {"foo": 2, "bar": 2, "baz": 3}
            again.expire()
        assert Witness.saw == ["w"]

    # Running without a hold

    @MOVES
    def test_a_planted_id_shows_nothing_of_what_the_victims_login_brings(self, store, move):
        """The attacker's requests have let go, or stream; meanwhile the victim logs in with the id it planted."""

        def look(session, error=None):
            for wish in (RENEW, LOG_IN):
                with pytest.raises(SessionError, match=error):
                    wish(session)
            session.mallory = 1
            seen.append((getattr(session, "card", None), session.owner, IWitness(session, None), session.uid))

        def stream(session):
            session.touch()
            yield b"1"
            look(session)
            session.touch()
            seen.append(session.ended)
            look(session)
            yield b"2"

        attacker, seen = Guest(store), []
        attacker.do(put(basket=1))
        planted, victim = attacker.sid, Guest(self.elsewhere(store), attacker.cookies)
        body, mine = attacker.stream(stream), store.open(planted)
        mine.release()
        look(mine, error=r"before session\.release\(\)")
        victim.do(lambda s: move(s) or put(card="4111")(s) or s.setComponent(IWitness, Witness("victim's")))
        look(mine)
        assert list(body) == [b"2"]
        assert seen == [(None, None, None, planted)] * 3 + [True] + [(None, None, None, planted)]
        assert attacker.sid == planted != victim.sid
        assert victim.do(lambda s: (vars(s), IWitness(s).name)) == ({"basket": 1, "card": "4111"}, "victim's")
        assert len(store) == 1

    @pytest.mark.parametrize("ask", ["ISession", "touch", "release"])
    def test_a_request_that_asks_the_store_again_finds_its_session_ended_and_empty(self, store, ask):
        def work(environ):
            session = ISession(environ)
            session.release()
            self.elsewhere(store).expireAll("ann")
            assert session.ended == self.live  # others haven't asked
            ISession(environ) if ask == "ISession" else getattr(session, ask)()
            assert (session.ended, session.owner, vars(session), IWitness in session) == (True, None, {}, False)
            return ISession(environ) is session

        visitor = Guest(store, {"sid": new_session(store, witness="w", owner="ann", foo=1).uid})
        assert visitor.do(work, find=lambda environ: environ) is False
        assert len(store) == 0

    def test_touch_in_a_body_counts_at_once_but_brings_no_expired_session_back(self, store, clock):
        def stream(session):
            session.foo = 1
            yield b"1"
            for _ in range(4):
                clock.advance(LIFETIME - 1)
                session.touch()
                assert self.elsewhere(store).peek(session.uid).lastModified == clock.now
            clock.advance(LIFETIME)
            session.touch()
            assert not lives(store, session.uid)
            yield b"2"

        assert list(Guest(store, lifetime=LIFETIME).stream(stream)) == [b"2"]

    def test_what_a_body_changes_is_saved_at_its_end_or_logged_as_a_conflict_and_then_it_is_let_go(self, store, caplog):
        def stream(session):
            yield b"1"
            session.late = [*getattr(session, "late", ()), session.foo]

        def ask_late(environ):
            environs.append(environ)
            yield b"1"
            ISession(environ).late = open

        visitor, environs = Guest(store, patience=0), []
        visitor.do(put(foo=1))
        assert list(visitor.stream(stream)) == []
        assert visitor.do(lambda session: session.late) == [1]
        body = visitor.stream(stream)
        with visit(self.elsewhere(store), visitor.sid) as theirs:
            theirs.late = [2]
        caplog.clear()
        assert list(body) == []
        assert visitor.do(lambda session: session.late) == [2]
        assert ("ERROR", "conflict") in [(r.levelname, r.event) for r in caplog.records]
        with pytest.raises(NotStorable) if store.strict else contextlib.nullcontext():
            list(visitor.stream(ask_late, find=lambda environ: environ))
        assert store.open(visitor.sid, patience=0)  # though the environ is still there

    def test_a_component_that_keeps_its_session_works_in_later_requests(self, store):
        def write(session):
            (kept := IWitness(session).session).release()
            kept.foo = 7
            return session.foo

        visitor, ids = Guest(store), []
        visitor.do(lambda session: session.setComponent(IWitness, Witness("w", session)))
        visitor.do(lambda session: session.release() or setattr(session, "late", 1))
        early = script(lambda environ: ids.append(ISession(environ)) or ids[0].release(), "200 OK", [])
        SessionMiddleware(early, store)(visitor.environ(), lambda *args: None)
        visitor.do(put(foo=3))
        assert getattr(ids.pop(), "foo", None) == (3 if self.live else None)
        for move in (LOG_IN, RENEW, LOG_IN):
            ids.append(visitor.sid)
            visitor.do(lambda session, move=move: move(IWitness(session).session))
            assert visitor.do(write) == visitor.do(lambda session: session.foo) == 7
            mine = visitor.do(lambda s: (s.owner, IWitness(s).session.owner, IWitness(s).session.uid))
            assert mine == ("ann", "ann", visitor.sid)
        assert len({*ids, visitor.sid}) == 4 and not any(lives(store, uid) for uid in ids)
        visitor.do(lambda session: IWitness(session).session.expire())
        assert (visitor.sid, len(store)) == (None, 0)

    def test_a_login_stays_though_its_request_fails_and_another_has_the_old_id_which_may_log_in_anew(self, store):
        def log_in(session):
            waiting.append(Background(parallel.do, put(seen=1)))
            assert waiting[0].is_stuck()
            session.login("ann")
            session.basket = 2

        visitor, waiting = Guest(store, patience=0), []
        visitor.do(put(basket=0), **{"test.status": "503 Later"})
        assert (visitor.was_told, len(store)) == (None, 0)
        visitor.do(put(basket=1), **{"test.status": "404 Not Found"})
        parallel = Guest(self.elsewhere(store), visitor.cookies)
        visitor.do(log_in, **{"test.status": "500 Oops"})
        assert visitor.do(lambda session: session.basket) == 1 + self.live  # (live objects have been changed already)
        waiting[0].result()
        assert parallel.was_told is None
        assert parallel.do(lambda session: put(seen=2)(session) or session.owner) is None
        assert parallel.do(lambda session: (vars(session), session.owner)) == ({}, None)
        assert parallel.was_told is None
        assert (len(store), [s.handle for s in store.sessions("ann")]) == (1, [store.peek(visitor.sid).handle])
        parallel.do(LOG_IN)
        assert parallel.was_told and parallel.sid != visitor.sid
        assert [guest.do(lambda session: session.owner) for guest in (visitor, parallel)] == ["ann", "ann"]
        assert len(store) == 2

    def test_a_random_walk_agrees_with_a_model(self, store, clock):
        for seed in self.seeds:
            RandomWalk(store, self.elsewhere(store), clock, seed).take(self.steps)


class RandomWalk:
    """Does at random what requests do to a store, and to a model of it: dicts by uid.

    Some requests are still in flight when others come, some have let go and change things later.
    A session's witness notes its end, so that at any time it is known exactly which sessions are
    stored: those that live, and those whose time is up but whom nobody has noticed yet.
    """

    def __init__(self, store, other, clock, seed):
        self.store, self.other, self.clock, self.seed = store, other, clock, seed
        self.live = {}  # uid -> what the session should be
        self.due = {}  # witness name -> model of those that are past their deadline
        self.ended = []  # names of witnesses whose sessions were ended by us
        self.dead = ["A" * 43]  # uids that were used once
        self.moved = {}  # uids that were left, and when
        self.flights = []  # (session, model, when it was opened)
        self.late = []  # (session, model, contents as they were, uid) of requests that have let go
        self.random, self.names, self.thing = random.Random(f"walk {seed}"), itertools.count(), [1, {"two": "three"}]
        Witness.saw.clear()

    def take(self, steps):
        actions = [self.begin, self.finish, self.look, self.change_late, self.expire_other, self.expire_all, self.sweep]
        for step in range(steps):
            also = [action for action in (self.create, self.pass_time) if self.random.random() < 0.5]
            for action in also + self.random.choices(actions, [11, 3, 2, 2, 1, 1, 1], k=2):
                print("seed", self.seed, "step", step, action.__name__)  # pytest shows it if something is wrong
                action()
                self.check()
        while self.flights:
            self.finish()
        self.clock.advance(1000)
        self.check()
        self.sweep()
        self.check()
        assert len(self.store) == 0

    def deadline(self, model):
        return min(model["lastModified"] + model["lifetime"], model["since"] + model["max_lifetime"])

    def check(self):
        """Put those aside whose time is up, but not while they are held; all that have ended are known."""
        for uid, model in list(self.live.items()):
            if self.clock.now >= self.deadline(model) and not self.in_flight(model):
                self.due[model["name"]] = self.live.pop(uid)
                self.dead.append(uid)
        self.ended += [name for name in Witness.saw if self.due.pop(name, None)]
        assert sorted(Witness.saw) == sorted(self.ended)
        assert len(self.store) == len(self.live) + len(self.due)

    def kill(self, uid):
        self.ended.append(self.live.pop(uid)["name"])
        self.dead.append(uid)

    def contents(self, model):
        return model["user"], dict(model["attributes"])

    def in_flight(self, model):
        return any(other is model for _, other, _ in self.flights)

    def pick(self, free=False):
        """Some uid of a live session, or (rarely) another; *free*: not one in flight."""
        uids = [uid for uid, model in self.live.items() if not (free and self.in_flight(model))]
        return self.random.choice(uids if uids and self.random.random() < 0.85 else self.dead[-30:])

    def fill(self, session, **fields):
        """Put on an empty session what is looked for later; answers its model."""
        name, now = next(self.names), self.clock.now
        session.setComponent(IWitness, Witness(name))
        session.notifyOnExpire(IWitness(session).ended)
        session.n = 0
        contents = {"name": name, "user": None, "attributes": {"n": 0}}
        return {**contents, "created": now, "lastModified": now, "since": now, **fields}

    def change(self, session, model):
        """Change something on a session: an attribute, or whether there is another, or a component."""
        attributes, what = model["attributes"], self.random.choice(["count", "attribute", "component"])
        if what == "count":
            session.n = attributes["n"] = attributes["n"] + 1
        elif what == "component":
            session.unsetComponent(ICurrentUser) if model["user"] else session.setComponent(ICurrentUser, self.thing)
            model["user"] = None if model["user"] else self.thing
        elif attributes.pop("more", None):
            del session.more
        else:
            session.more = attributes["more"] = self.thing

    def create(self):
        lifetime, longest = self.random.choice([4, 8, 15]), self.random.choice([20, 40, 80])
        session, owner = self.store.create(lifetime, longest), self.random.choice([None, None, "ann", "bob"])
        if owner:
            session.login(owner)
        model = self.fill(session, lifetime=lifetime, max_lifetime=longest)
        self.store.save(session)
        model.update(owner=owner, authenticated=self.clock.now if owner else None, handle=session.handle)
        self.live[session.uid] = model

    def pass_time(self):
        seconds = self.random.choice([0.5, 1, 2, 5])
        while self.flights and self.clock.now + seconds - self.flights[0][2] > 20:
            self.finish(0)
        self.clock.advance(seconds)

    def open(self, uid, patience=0):
        """Open *uid* (or just look), and see that it is as it should be; answers the session and its model, or None."""
        model, looks = self.live.get(uid), patience is None
        used = uid in [each.uid for each, _, _ in self.flights]
        if used and not looks and (model is not None or self.other is not self.store):  # it doesn't know of its end yet
            with pytest.raises(SessionBusy):
                self.store.open(uid, patience)
            return None
        session = self.other.peek(uid) if looks else self.store.open(uid, patience)
        if model is None:
            left = self.moved.get(uid)
            assert session is (MOVED if left and self.clock.now < left + 60 else None) or (left and session is MOVED)
            return None
        if not looks or self.clock.now - model["lastModified"] >= model["lifetime"] / 8:
            model["lastModified"] = self.clock.now
        fields = "handle created lastModified owner authenticated lifetime max_lifetime".split()
        assert [getattr(session, name) for name in fields] == [model[name] for name in fields]
        assert (session.uid, session.expires, session.ended) == (uid, self.deadline(model), False)
        assert [each in session for each in (IWitness, ICurrentUser)] == [True, model["user"] is not None]
        contents = session.getComponent(ICurrentUser), vars(session)
        assert (IWitness(session).name, contents) == (model["name"], self.contents(model))
        return session, model

    def begin(self):
        if opened := self.open(self.pick()):
            self.flights.append((*opened, self.clock.now))
            if len(self.flights) > 3 or self.random.random() < 0.7:
                self.finish(-1)

    def finish(self, which=None):
        """The rest of a request: change something, save, let go."""
        if not self.flights:
            return
        which = self.random.randrange(len(self.flights)) if which is None else which
        session, model, _ = self.flights.pop(which)
        uid, alive = session.uid, self.live.get(session.uid) is model
        change = self.random.choice(["change", "change", "change", "renew", "login", "expire", "setLifetime"])
        if change == "expire":
            session.expire()
            if alive:
                self.kill(uid)
                alive = False
        elif change == "setLifetime":
            session.setLifetime(self.random.choice([4, 8, 15]))
            model["lifetime"] = session.lifetime
            self.late = [late for late in self.late if late[1] is not model]
        elif change == "change":
            self.change(session, model) if alive else put(n=1, more=2)(session)
        elif not alive:
            with pytest.raises(SessionError):
                session.renew() if change == "renew" else session.login("ann")
        else:
            model = self.move(session, model, self.random.choice(["ann", "bob"]) if change == "login" else None)
        self.store.save(session)
        assert not session._is_holding()
        if alive:
            model["lastModified"] = self.clock.now
            self.late = [*self.late[-9:], (session, model, self.contents(model), session.uid)]

    def move(self, session, model, owner):
        """Renew a session, or log *owner* in; answers its model from then on."""
        uid, now = session.uid, self.clock.now
        session.login(owner) if owner else session.renew()
        assert session.uid != uid
        self.dead.append(uid)
        self.moved[uid] = now
        if owner and model["owner"] not in (None, owner):
            assert (vars(session), IWitness in session) == ({}, False)
            self.kill(uid)
            model = self.fill(session, lifetime=model["lifetime"], max_lifetime=model["max_lifetime"])
        else:
            del self.live[uid]
        self.live[session.uid] = model
        model.update({"owner": owner, "since": now, "authenticated": now} if owner else {}, handle=session.handle)
        return model

    def look(self):
        """A request that only looks.  (One in flight may be kept alive by it alone.)"""
        self.open(self.pick(free=True), patience=None)

    def change_late(self):
        """A request that has let go long ago changes something."""
        if not self.late or self.flights:
            return
        session, model, seen, uid = self.late.pop(self.random.randrange(len(self.late)))
        alive = self.live.get(uid) is model
        session.n = -next(self.names)  # never seen before
        vars(session).pop("more", None)
        with pytest.raises(SessionConflict) if alive and self.contents(model) != seen else contextlib.nullcontext():
            self.store.save(session)
            if alive:
                model["attributes"], model["lastModified"] = {"n": session.n}, self.clock.now
        self.late = [late for late in self.late if late[0] is not session]

    def expire_other(self):
        """End a session, in flight or not, by somebody who doesn't hold it: found by its uid, or listed."""
        uid = self.pick()
        model = self.live.get(uid)
        if model is None or self.clock.now >= self.deadline(model):
            return
        looks = [self.other.peek(uid)]
        if model["owner"] and self.random.random() < 0.5:
            looks = [each for each in self.other.sessions(model["owner"]) if each.handle == model["handle"]]
        if None in looks or not looks:
            assert self.in_flight(model)  # it is over by what was saved last
            return
        looks[0].expire()
        looks[0].expire()
        self.kill(uid)

    def expire_all(self):
        owner = self.random.choice(["ann", "bob", "eve"])
        keep = self.random.choice(self.flights)[0] if self.flights and self.random.random() < 0.5 else None
        theirs = [uid for uid, model in self.live.items() if model["owner"] == owner and not (keep and uid == keep.uid)]
        due = [model for model in self.due.values() if model["owner"] == owner]
        assert self.other.expireAll(owner, keep=keep) == len(theirs) + len(due)
        for uid in theirs:
            self.kill(uid)

    def sweep(self):
        assert self.other.sweep() == len(self.due)
        assert set(self.due) <= set(Witness.saw)


HINTS = {"owner": "login(owner)", "lifetime": "setLifetime(seconds)", "uid": "renew()", "lastModified": "touch()"}
OWN = [*HINTS, *"created expires ended handle authenticated expire login setComponent removeComponent".split()]
TIMES = 0, -1, "5", True, float("nan")
CALLBACKS = (lambda: None), print, "append".upper, Witness("w").ended
# What a newcomer tries is at the end of this file; these are the others.
MORE_MISTAKES = [
    *((operator.methodcaller("__setattr__", n, 1), AttributeError, HINTS.get(n, "another name")) for n in OWN),
    *((operator.methodcaller("__delattr__", n), AttributeError, HINTS.get(n, "another name")) for n in OWN),
    *((operator.methodcaller("login", owner), TypeError, "an owner is a name") for owner in (None, "", 7, b"a")),
    *((operator.methodcaller("login", "ann", t), ValueError, "remember is a positive number") for t in TIMES),
    *((operator.methodcaller("setLifetime", t), ValueError, "lifetime is a positive number of seconds") for t in TIMES),
    *((operator.methodcaller("notifyOnExpire", c), TypeError, "method of one of the session's") for c in CALLBACKS),
    *((lambda s, n=n: MemoryStore(capacity=n), ValueError, "capacity") for n in (-1, 1.5, "3")),
    # (PyPy says nothing, if the object's __dict__ was set.)
    pytest.param(operator.methodcaller("__delattr__", "foo"), AttributeError, "foo", marks=CPYTHON),
    (operator.attrgetter("permanent"), AttributeError, "remember="),
]


@pytest.mark.parametrize("use, error, advice", MORE_MISTAKES)
def test_what_a_session_refuses_changes_nothing_and_the_error_says_what_to_do(use, error, advice):
    session, own = MemoryStore(strict=True).create(LIFETIME, MAX_LIFETIME), operator.attrgetter(*OWN)
    before = own(session)
    with pytest.raises(error, match=re.escape(advice)):
        use(session)
    assert (own(session), vars(session)) == (before, {})


def test_a_session_adapts_to_itself_and_its_dict_is_the_users_and_its_repr_names_no_uid():
    session = MemoryStore().create(LIFETIME, MAX_LIFETIME)
    put(foo=1, _bar=2)(session)
    session.setComponent(IWitness, Witness("w"))
    assert ISession(session) is session and isinstance(session, ISession) and GuardSession is Session
    assert vars(session) == {"foo": 1, "_bar": 2}
    assert repr(session) == f"<Session {session.handle}, new, keeps IWitness>"
    session.login("ann")
    session.release()
    assert repr(session) == f"<Session {session.handle} of 'ann', stored, keeps IWitness>"


# Holding
# ---------------------------------------------------------------------------


class Interrupted(BaseException):
    """What may be raised anywhere: Ctrl-C, a Timeout, a worker's death sentence."""


def interrupt_at(call, number, work):
    """Call *work*, and raise Interrupted at that bytecode of that call within the module; were there the two?"""
    calls, opcodes = itertools.count(), itertools.count()

    def trace(frame, event, arg):
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return trace if frame.f_code.co_filename == minisess.__file__ and next(calls) == call else None
        if event == "opcode" and next(opcodes) == number:
            sys.settrace(None)
            raise Interrupted
        return trace

    sys.settrace(trace)
    with contextlib.suppress(Interrupted):
        work()
    sys.settrace(None)
    return next(calls) > call, next(opcodes) > number


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="since 3.12 tracing opcodes misses some")
@pytest.mark.parametrize(
    ("before", "work"),
    [
        (put(n=0), put(n=1)),
        (id, put(n=1)),
        (put(n=0), RENEW),
        (LOG_IN, lambda session: session.login("bob")),
        (put(n=0), EXPIRE),
        (put(n=0), lambda session: session.release() or put(n=1)(session)),
    ],
    ids="changing creating renewing another ending releasing".split(),
)
@CPYTHON
def test_an_exception_at_any_bytecode_of_a_request_leaves_nothing_held(before, work, store_of_kind, monkeypatch):
    def afterwards(uid):
        """What must go on working, for this visitor (if the session is there still) and for others."""
        session = store.open(uid, patience=0)
        assert not isinstance(session, Session) or vars(session) or session.owner  # nothing has emptied it
        session = session if isinstance(session, Session) else store.create(1000, 1000)
        session.after = 1
        session.renew()
        store.save(session)
        store.open(session.uid, patience=0).expire()
        if number == 0:
            store.sweep()
            store.expireAll("bob")

    monkeypatch.setattr(minisess._Holds, "_overdue", 0.001)
    gc.collect()  # else what other tests have left would be finalized in here
    store = store_of_kind
    application = script(lambda environ: work(ISession(environ)) and None, "200 OK", [])
    application = SessionMiddleware(application, store, patience=0)
    call, number, there = 0, 0, True
    while there:
        session = store.create(1000, 1000)
        before(session)
        store.save(session)
        store.open(session.uid)  # by somebody who dies with it
        environ = Browser(None, cookies={"sid": session.uid}).environ()
        # In a thread of its own: CPython may go on handling what was handled at that bytecode, with its traceback.
        request = functools.partial(application, environ, lambda status, headers: None)
        there, done = Background(interrupt_at, call, number, request).result()
        del request, environ
        print("call", call, "bytecode", number)  # pytest shows it if something is held since
        afterwards(session.uid)
        call, number = (call, number + 1) if done else (call + 1, 0)
    assert call > 10
    store.clock.advance(2000)
    store.sweep()
    assert len(store) == 0  # what nobody knows any more ends, too


@CPYTHON
def test_exceptions_from_other_threads_leave_nothing_held(store_of_kind):
    """As a server raises them in a worker that takes too long: at any moment, also within C code."""

    def worker(uid):
        while not stop.is_set():
            try:
                while not stop.is_set():
                    application(Browser(None, cookies={"sid": uid}).environ(), lambda *_: None)
            except Interrupted:
                pass  # no more, for a second one here would end the thread and be kept with the request of the first
            hits.append(uid)

    application = SessionMiddleware(script(count, "200 OK", []), store_of_kind, patience=5)
    uids = [new_session(store_of_kind, 1000, 1000, n=0).uid for _ in range(3)]
    stop, hits, start = threading.Event(), [], time.monotonic()
    threads = [Background(worker, uid) for uid in [*uids, uids[0]]]
    while time.monotonic() < start + (0.5 if len(hits) > 100 else 30):
        time.sleep(0.002)
        target = ctypes.c_ulong(random.choice(threads).ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(Interrupted))
    stop.set()
    for thread in threads:
        with contextlib.suppress(Interrupted):
            thread.result()
    assert len(hits) > 100
    for uid in uids:
        counting(store_of_kind, uid, patience=1)
    new_session(store_of_kind, foo=1)
    assert store_of_kind.clear() == 4


def test_a_helper_thread_that_asks_while_its_request_ends_leaves_nothing_held(store_of_kind, often_switching):
    def help_out(environ):
        go.wait(5)
        with contextlib.suppress(SessionError):
            ISession(environ)

    go, helpers = threading.Event(), []
    start_help = script(lambda environ: helpers.append(Background(help_out, environ)), "200 OK", [])
    application = SessionMiddleware(start_help, store_of_kind)
    for _ in range(60):
        uid = new_session(store_of_kind, witness="w").uid
        environ = Browser(None, cookies={"sid": uid}).environ()
        go.clear()
        threading.Timer(random.uniform(0, 0.0005), go.set).start()
        application(environ, lambda *_: None)
        helpers.pop().result()
        store_of_kind.release(store_of_kind.open(uid, patience=0))  # it isn't held, though the server keeps the environ
    del environ
    store_of_kind.clock.advance(1000)
    assert store_of_kind.sweep() == 60


def test_helper_threads_of_one_request_share_its_session(store_of_kind, often_switching):
    def work(environ):
        sessions = at_once(*[lambda: start.wait(10) and None or ISession(environ)] * 4)
        sessions[0].bar = 2
        return [session is ISession(environ) for session in sessions]

    guest, start = Guest(store_of_kind, patience=0), threading.Barrier(4)
    guest.do(put(foo=1))
    for _ in range(20):
        assert guest.do(work, find=lambda environ: environ) == [True] * 4
    assert guest.do(lambda session: session.bar) == 2


def test_an_application_that_calls_itself_is_told_so_at_once(store_of_kind):
    def nested(session):
        return Guest(store_of_kind, guest.cookies, patience=30).do(lambda session: session.foo)

    guest = Guest(store_of_kind, patience=30)
    guest.do(put(foo=1))
    start = time.monotonic()
    with pytest.raises(SessionBusy, match="calls itself"):
        guest.do(nested)
    assert time.monotonic() - start < 5
    assert guest.do(lambda session: session.release() or nested(session)) == 1


def test_1000_requests_that_wait_for_one_session_cost_those_of_others_nothing():
    def some():
        return timeit.timeit(lambda: store.save(store.open(other)), number=100)

    store = MemoryStore()
    crowded, other = (new_session(store, 1000, 1000, n=0).uid for _ in range(2))
    mine, before = store.open(crowded), sorted(some() for _ in range(60))[30]
    threads = [Background(counting, store, crowded, patience=60) for _ in range(1000)]
    time.sleep(0.5)  # all have looked in vain, and wait
    wait_until(lambda: sorted(some() for _ in range(60))[30] < 2 * before)  # at once, but where a compiler is at work
    store.save(mine)
    assert [thread.result() for thread in threads] == [None] * 1000
    assert store.open(crowded).n == 1000


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "redis"])
def test_32_who_wait_ask_the_database_no_more_than_150_times_a_second_together(place_of, kind, monkeypatch):
    place, asked = place_of(kind), []
    store, other = place.store(), place.store()
    hold = store.hold
    monkeypatch.setattr(store, "hold", lambda *args: asked.append(args) or hold(*args))
    uid = new_session(store, n=0).uid
    theirs = other.open(uid)
    threads = [Background(counting, store, uid, patience=30) for _ in range(32)]
    time.sleep(0.5)  # the first one's pauses have grown by then
    start, before = time.monotonic(), len(asked)
    time.sleep(1)
    rate = (len(asked) - before) / (time.monotonic() - start)
    other.save(theirs)
    assert [thread.result() for thread in threads] == [None] * 32
    assert 0 < rate <= 150
    assert store.open(uid).n == 32


# Memory store
# ---------------------------------------------------------------------------


class TestMemoryStoreContract(StoreContract):
    live, steps, seeds, strict = True, 3000, (1, 2), False

    def make_store(self, clock):
        return MemoryStore(clock=clock, strict=self.strict)


class TestStrictMemoryStoreContract(TestMemoryStoreContract):
    steps, strict = 300, True


class TestMemoryStore:
    @pytest.fixture
    def store(self, clock):
        return MemoryStore(clock=clock)

    def test_16_threads_count_to_8000(self, store):
        uid = new_session(store, n=0).uid
        at_once(*[lambda: [counting(store, uid, patience=25) for _ in range(500)]] * 16)
        assert store.open(uid).n == 8000

    @pytest.mark.parametrize("before", [ICounter, Session.release, Session.touch])
    @pytest.mark.parametrize("most", [0, 1, 3])
    def test_a_session_is_let_go_by_whatever_thread_reads_the_body_to_its_end_or_closes_it(self, store, before, most):
        def read():
            with contextlib.closing(body), contextlib.suppress(SystemExit):
                list(itertools.islice(body, most))

        uid = new_session(store, foo=1).uid
        environ = Browser(None, cookies={"sid": uid}).environ()  # kept, so that nothing is left to finalizers
        steps = [lambda environ: before(ISession(environ)) and None, "200 OK", ..., b"1", b"2", SystemExit]
        body = SessionMiddleware(script(*steps), store)(environ, lambda *args: None)
        Background(read).result()
        assert store.open(uid, patience=0).foo == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # other threads are about
    def test_a_forked_child_inherits_neither_holds_nor_locks(self, store):
        def work():
            while not stop.is_set():
                new_session(store, foo=1).expire()
                store.sweep()

        def child():
            signal.alarm(10)
            with visit(store, held.uid, patience=0) as mine:
                mine.renew()
            new_session(store, foo=1)

        held, stop = store.open(new_session(store, foo=1).uid), threading.Event()
        threads = [Background(work) for _ in range(3)]
        for _ in range(10):
            run_processes([[child]], "fork")
        stop.set()
        [thread.result() for thread in threads]
        with pytest.raises(SessionBusy):
            store.open(held.uid, patience=0)

    @pytest.mark.parametrize(
        ("end", "pause"),
        [
            (lambda store, uid: store.open(uid).expire(), 0),
            (lambda store, uid: store.expireAll("ann"), 0),
            (lambda store, uid: new_session(store, owner="ann"), 0),  # it is over its capacity then
            (lambda store, uid: store.open(uid), LIFETIME),
            (lambda store, uid: store.open("A" * 43), LIFETIME),
            (lambda store, uid: store.sweep(), LIFETIME),
            (None, 0),  # its request fails
        ],
    )
    @CPYTHON
    def test_it_ends_by_reference_counting_alone(self, clock, request, end, pause):
        def fill(session):
            witness = session.witness = Witness("w", session)
            session.attribute = session.me = session
            session.setComponent(IWitness, witness)
            session.setComponent(ICurrentUser, Witness(witness, session))
            session.notifyOnExpire(witness.ended)
            session.notifyOnExpire(lambda session=session: lines.append(session))
            refs.extend(weakref.ref(each) for each in (session, witness, ICurrentUser(session)))
            if end:
                session.login("ann")

        gc.collect()
        gc.disable()
        request.addfinalizer(gc.enable)
        store, lines, refs = MemoryStore(clock=clock, capacity=1), [], []
        guest = Guest(store, lifetime=LIFETIME)
        with contextlib.suppress(ZeroDivisionError):
            guest.do(fill, **{"test.status": "200 OK" if end else ZeroDivisionError})
        if end:
            clock.advance(pause)
            end(store, guest.sid)
            assert len(lines) == 1
            lines.clear()
        assert [ref() for ref in refs] == [None] * 3

    def test_callbacks_and_finalizers_may_use_the_store_and_other_sessions(self, store, clock):
        class Last:
            def __del__(self):
                Background(use_store).result()

        def use_store():
            nonlocal other
            session.expire()
            seen.append(store.open(session.uid))
            with visit(store, other) as opened:
                opened.n += 1
                opened.renew()
            other = opened.uid
            new_session(store, 1000, 1000, foo=1)
            store.sweep()
            store.expireAll("bob")

        other, seen = new_session(store, 1000, 1000, n=0, owner="ann").uid, []
        for end in (Session.expire, lambda session: store.sweep(), lambda session: store.open(session.uid)):
            session = new_session(store, owner="bob", last=Last())
            session.notifyOnExpire(use_store)
            clock.advance(LIFETIME if seen else 0)
            Background(end, session).result()
        gc.collect()
        assert (store.peek(other).n, len(store), seen) == (6, 7, [None] * 6)

    def test_callbacks_registered_by_many_threads_all_run(self, store, often_switching):
        session, count = new_session(store, foo=1), []
        at_once(*[lambda: [session.notifyOnExpire(lambda: count.append(1)) for _ in range(200)]] * 6)
        session.expire()
        assert len(count) == 1200

    def test_in_the_end_nothing_is_held_lost_or_forgotten(self, clock, often_switching):
        """Threads do what they can to get in each other's way; then all that lives is free, and all ends once."""

        def trouble(seed):
            rng = random.Random(seed)
            for _ in range(400):
                if not uids or rng.random() < 0.2:
                    uids.append(new_session(store, witness=next(names), owner="ann").uid)
                    assert len(store) <= 13  # of which one may be moving at this moment
                    del uids[:-15]
                    continue
                session = store.open(rng.choice(list(uids)), patience=5)
                clock.advance(0.02)
                if not isinstance(session, Session):
                    continue
                with contextlib.suppress(SessionError):
                    for change in rng.choices([session.renew, session.release, session.touch, store.sweep], k=2):
                        change()
                        uids.append(session.uid)
                    if rng.random() < 0.1:
                        store.expireAll("ann", keep=session)
                    session.late = rng.random()
                    store.save(session)

        store, uids, names = MemoryStore(clock=clock, capacity=12), [], itertools.count()
        at_once(*(functools.partial(trouble, seed) for seed in range(6)))
        for uid in uids:
            if isinstance(session := store.open(uid, patience=0), Session):
                store.save(session)
        clock.advance(MAX_LIFETIME)
        store.sweep()
        assert (len(store), sorted(Witness.saw)) == (0, list(range(next(names))))

    def test_past_its_capacity_expired_ones_go_first_then_those_closest_to_expiry_but_none_in_use(self, clock):
        store = MemoryStore(clock=clock, capacity=1)
        used = store.open(new_session(store, foo=1).uid)
        assert (new_session(store, foo=1).ended, used.ended, len(store)) == (False, False, 2)
        store, uids = MemoryStore(clock=clock, capacity=5), {}
        for name, lifetime in [("long", 50), ("short", 20), ("middle", 30), ("expired", 5), ("used", 2)]:
            uids[name] = new_session(store, lifetime, witness=name).uid
        used = store.open(uids["used"])
        clock.advance(5)
        with visit(store, uids["short"]) as short:
            short.setLifetime(40)
        for _ in range(5):
            new_session(store, 60, foo=1)
        assert (len(store), Witness.saw) == (5, ["expired", "middle", "short", "long"])
        store.save(used)
        new_session(store, 60, foo=1)
        assert (len(store), Witness.saw[4:]) == (5, ["used"])

    def test_a_flood_of_new_visitors_logs_nobody_out(self, clock, caplog):
        store = MemoryStore(clock=clock, capacity=1000)
        for n in range(500):
            new_session(store, 5 if n < 5 else 30, owner=f"user {n}", witness=n)
        caplog.set_level(logging.INFO, "minisess")
        took = timeit.repeat(lambda: new_session(store, 1000, 1000, n=1), number=1, repeat=3000)
        assert (Witness.saw, len(store)) == ([], 1000)
        assert [r.reason for r in caplog.records if r.event == "ended"] == ["evicted"] * 2500
        assert sorted(took)[len(took) // 2] < 0.001
        for n in range(600):
            new_session(store, 40, owner=f"new {n}")
        assert (len(store), len(Witness.saw)) == (1000, 100)  # only then owners' go, those closest to their end first
        assert set(range(5)) <= set(Witness.saw)

    def test_no_request_pays_for_many_and_in_the_end_all_are_gone(self, store, clock):
        for n in range(5000):
            new_session(store, witness=n)
        clock.advance(LIFETIME)
        while left := len(store):
            store.open("A" * 43)
            assert 0 < left - len(store) <= 8
        assert len(Witness.saw) == 5000

    def allocated(self, work, *args):
        """How many bytes *work* allocates that are still there afterwards."""
        gc.collect()
        tracemalloc.start()
        try:
            work(*args)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    @CPYTHON
    def test_a_session_with_a_counter_takes_less_than_850_bytes(self, store):
        def come(visitors):
            for _ in range(visitors):
                session = store.create(1800, 43200)
                ICounter(session).hits += 1
                store.save(session)

        # Objects became smaller with Python 3.11.
        assert self.allocated(come, 20_000) / 20_000 < (850 if sys.version_info >= (3, 11) else 900)

    @pytest.mark.parametrize("limit", [1000, float("inf")])
    @CPYTHON
    def test_it_doesnt_grow_with_use(self, store, clock, limit):
        def use(times):
            nonlocal uid
            for n in range(times):
                with visit(store, uid) as session:
                    session.touch()
                    session.setLifetime(min(limit, 1000) - n / 10)
                    session.renew()
                uid = session.uid
                with visit(store, uid) as session:
                    session.setLifetime(limit)
                store.release(store.open(uid))
                store.peek(uid)
                new_session(store, limit, limit, owner="ann").expire()
                clock.advance(0.1)

        uid = new_session(store, limit, limit, foo=1).uid
        use(1500)
        assert self.allocated(use, 3000) < 150_000
        assert len(store) == 1


# Persistent stores: places for records
# ---------------------------------------------------------------------------


class running:
    """A program that serves a port for as long as this lasts; tests may stop it and start it again."""

    def __init__(self, command, **options):
        self.port, self.options = free_port(), options
        self.command = [part.replace("PORT", str(self.port)) for part in command]

    def start(self):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, start_new_session=True, **silent, **self.options)
        wait_until(self.listens, OSError)
        return self

    def listens(self):
        assert self.process.poll() is None, f"nothing will listen on port {self.port}"
        socket.create_connection(("127.0.0.1", self.port), 0.5).close()
        return True

    def stop(self, *exc_info):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:  # a server that waits for its clients
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(15)

    __enter__, __exit__ = start, stop


@pytest.fixture(scope="session")
def redis_server():
    package("redis")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "yes"]
        with running([program("redis-server"), "--port", "PORT", *options]) as server:
            server.address = server.port
            yield server


@pytest.fixture(scope="session")
def postgres_server():
    psycopg, _ = package("psycopg"), package("psycopg_pool")
    initdb = program("initdb", "/usr/lib/postgresql/*/bin/initdb")
    # PostgreSQL refuses to run as root.
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, "postgres")
        settings = ["-A", "trust", "-U", "minisess", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run([initdb, "-D", f"{folder}/data", *settings], check=True, capture_output=True, cwd="/", **user)
        command = [os.path.join(os.path.dirname(initdb), "postgres"), "-D", f"{folder}/data", "-p", "PORT"]
        with running([*command, "-k", folder, "-h", "127.0.0.1", "-F"], cwd="/", **user) as server:
            server.address = f"host=127.0.0.1 port={server.port} user=minisess dbname=postgres connect_timeout=10"
            wait_until(lambda: psycopg.connect(server.address).close() or True, psycopg.OperationalError)
            yield server


def wait_until(answers, *errors):
    """Call *answers* until it answers something true and raises none of *errors*; that answer."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with contextlib.suppress(*errors):
            if answer := answers():
                return answer
        time.sleep(0.01)
    return pytest.fail("it never came true")


class Place(contextlib.ExitStack):
    """Where records lie; makes stores that share it.  Another process makes one of the same arguments."""

    def __init__(self, kind, address, name):
        super().__init__()
        self.arguments = self.kind, self.address, self.name = kind, address, name
        if kind == "postgres":
            pool = package("psycopg_pool").ConnectionPool(address, min_size=1, max_size=4, timeout=5, open=True)
            self.pool = self.enter_context(pool)
        elif kind == "redis":
            self.client = self.enter_context(package("redis").Redis(port=address))

    def store(self, name=None, **options):
        options, name = {"secret": SECRET, **options}, name or self.name
        if self.kind == "sqlite":
            return self.enter_context(contextlib.closing(SQLiteStore(self.address, table=name, **options)))
        if self.kind == "postgres":
            return PostgresStore(self.pool.connection, table=name, **options)
        if self.kind == "redis":
            return RedisStore(self.client, prefix=name + ":", **options)
        return package("examples.file_store").FileStore(self.address, **options)


_places = itertools.count()


@pytest.fixture
def place_of(request, tmp_path):
    """``place_of("redis")`` is an empty place there."""
    with contextlib.ExitStack() as stack:

        def make(kind):
            name = f"{kind}{next(_places)}"
            has_server = kind in ("redis", "postgres")
            address = request.getfixturevalue(f"{kind}_server").address if has_server else str(tmp_path / name)
            return stack.enter_context(Place(kind, address, name))

        yield make


@pytest.fixture(params=["sqlite", "postgres", "redis", "file"])
def place(request, place_of):
    return place_of(request.param)


@pytest.fixture
def sqlite(place_of):
    """An SQLite store, for what is the same in all of them."""
    return place_of("sqlite").store()


class TestOtherStoresContract(StoreContract):
    """SQLite, PostgreSQL, Redis, and the example of a store of one's own."""

    steps, seeds = 100, (1,)

    @pytest.fixture(autouse=True)
    def _here(self, place):
        self.place = place

    def make_store(self, clock, **options):
        return self.place.store(clock=clock, **options)

    def elsewhere(self, store):
        return self.place.store(clock=store.clock)

    def let_a_minute_pass(self, store, clock, uid):
        if self.place.kind == "redis":  # whose server goes by a clock of its own
            name = f"{self.place.name}:{{{key_of(store, uid)}}}"
            assert 50_000 < self.place.client.pttl(name) <= 60_000
            self.place.client.delete(name)
        super().let_a_minute_pass(store, clock, uid)


# Records: what can be stored
# ---------------------------------------------------------------------------


class IKept(Interface): ...


class IOther(Interface): ...


@storable
class Box:
    def __init__(self, **content):
        self.__dict__.update(content)

    def open_it(self): ...


@storable
@dataclass(slots=True)
class Slotted:
    left: int
    right: list


@storable
@dataclass(frozen=True)
class Price:
    amount: decimal.Decimal
    currency: str = "EUR"
    notes: list = field(default_factory=list)


@storable
class Single:  # all who ask get the same object
    one = None

    def __new__(cls):
        cls.one = cls.one or object.__new__(cls)
        return cls.one


@storable
class Unit:  # all who ask for the same unit get the same object
    @functools.lru_cache  # noqa: B019
    def __new__(cls, name="none"):
        return object.__new__(cls)


class Stranger(Box):  # nobody declared it
    def __call__(self, *args):
        trap(*args)


Undeclared = enum.Enum("Undeclared", "ONE")
Planet = storable(enum.Enum("Planet", {"EARTH": (5.97, "blue")}))  # its member has state, which is everybody's
Color, Size = storable(enum.Enum("Color", "RED")), storable(enum.IntEnum("Size", "SMALL LARGE"))
Rights = storable(enum.Flag("Rights", "READ WRITE"))
Point = storable(collections.namedtuple("Point", "x y"))
Words, Table = storable(type("Words", (list,), {})), storable(type("Table", (dict,), {}))
storable(http.HTTPStatus)


def kept(store, **contents):
    """Store a session with components (thing=, other=) and attributes, and answer its uid."""
    session, interfaces = store.create(1800, 43200), {"thing": IKept, "other": IOther}
    for name, each in contents.items():
        session.setComponent(interfaces[name], each) if name in interfaces else setattr(session, name, each)
    store.save(session)
    return session.uid


def key_of(store, uid):
    """The key under which *store* asks for the record of *uid*."""
    return minisess._hash(uid, store.place)


UTC, hour = datetime.timezone.utc, datetime.timedelta(hours=1)
STORABLE_VALUES = [
    *(1 << 200, -0.5, True, "text \N{SNOWMAN}", b"bytes", bytearray(b"array"), 3 + 4j),
    *((1, (2, (3,))), [1, [2, [3]]], {"a": {"b": {1: (2,)}}}, {1, 2}, frozenset({"a"})),
    *(datetime.date(1, 1, 1), datetime.time(23, 59), datetime.timedelta(days=-1, microseconds=1)),
    datetime.datetime(2024, 2, 29, 12, tzinfo=UTC),
    datetime.datetime(2024, 1, 1, fold=1, tzinfo=datetime.timezone(hour, "CET")),
    datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    *(zoneinfo.ZoneInfo("UTC"), uuid.UUID(int=5), decimal.Decimal("1.10"), fractions.Fraction(2, 3)),
    *(ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")),
    *(pathlib.Path("/tmp/a"), pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/a")),
    *(collections.deque([1, 2], maxlen=2), collections.OrderedDict(b=1, a=2), collections.Counter("hello")),
    *(collections.defaultdict(list, a=[1]), collections.defaultdict(int, a=1), collections.defaultdict(None, a=1)),
    collections.defaultdict(Table, a=Table(b=1)),
    *(Color.RED, Size.LARGE, Rights.READ | Rights.WRITE, Planet.EARTH, http.HTTPStatus.NOT_FOUND),
    *(Point(1, 2), Price(decimal.Decimal(3), notes=[1]), Slotted(1, [2]), Words(["a"]), Table(a=1)),
]


@pytest.mark.parametrize("value", STORABLE_VALUES, ids=lambda value: f"{type(value).__name__}")
def test_a_value_comes_back_equal_as_a_component_an_attribute_and_inside_others(sqlite, value):
    uid = kept(sqlite, value=value, nested=[{"key": (value, [value])}], thing=value, other=Box(value=value))
    for _ in range(2):
        with visit(sqlite, uid) as again:
            found = [again.value, again.nested[0]["key"][0], IKept(again), IOther(again).value]
            assert found == [value] * 4
            assert {type(each) for each in found} == {type(value)}
            assert getattr(again.value, "default_factory", None) == getattr(value, "default_factory", None)


@pytest.mark.parametrize("order", list(itertools.permutations(["thing", "other", "element"])), ids=" ".join)
@pytest.mark.parametrize("make", [list, dict.fromkeys, collections.deque, Words, set], ids=lambda make: make.__name__)
def test_what_components_and_attributes_share_and_refer_to_is_the_same_object_afterwards(sqlite, make, order):
    element = Box()
    element.container = element.again = make([element])
    everything = {"thing": element.container, "other": Box(element=element), "element": element}
    again = sqlite.peek(kept(sqlite, **{name: everything[name] for name in order}))
    assert IOther(again).element is again.element is list(IKept(again))[0]
    assert again.element.container is again.element.again is IKept(again)


def run_python(script, *arguments, **environment):
    """Run *script* where this file and the module can be imported, with all names of this file."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-c", f"from {__name__} import *\n{textwrap.dedent(script)}", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("seed", "12")
def test_reading_isnt_a_change_though_sets_come_in_another_order_in_each_process(sqlite, seed):
    """What was loaded is dumped as the same bytes, so that a late look is no conflict."""
    words = {f"word {n}" for n in range(100)}
    uid = kept(sqlite, thing=Box(values=STORABLE_VALUES, words=words, list=["name", "na" + "me"]), other=[1])
    script = """
        path, table, uid = sys.argv[1:]
        store = SQLiteStore(path, secret=SECRET, table=table)
        reader = store.open(uid)
        reader.release()
        with visit(store, uid) as writer:
            IOther(writer).append(2)
        IKept(reader)
        store.save(reader)
        print(IOther(store.peek(uid)))"""
    run = run_python(script, sqlite.path, sqlite.table, uid, PYTHONHASHSEED=seed)
    assert (run.stdout, run.stderr, run.returncode) == ("[1, 2]\n", "", 0)  # though the store is open at the end


# What can't be stored: its component, and how the message names the offender.
CANT = {
    "a class that isn't declared": (lambda: Box(list=[Stranger()]), "Stranger"),
    "a function": (lambda: Box(function=len), "len"),
    "a lambda": (lambda: Box(function=lambda: 1), "function"),
    "a method": (lambda: Box(method=Box().open_it), "method"),
    "a class": (lambda: Box(cls=Box), "Box"),
    "a module": (lambda: Box(module=os), "module"),
    "a lock": (lambda: Box(lock=threading.Lock()), "lock"),
    "an open file": (lambda: Box(file=io.BytesIO), "BytesIO"),
    "a generator": (lambda: Box(generator=iter(())), "iter"),
    "a default factory": (lambda: collections.defaultdict(lambda: 1), "defaultdict"),
    "an enum that isn't declared": (lambda: [Undeclared.ONE], "Undeclared"),
    "the one object of a class": (lambda: Single(), "Single"),
    "the one object for an argument": (lambda: Unit("kg"), "Unit"),
    "partial": (lambda: functools.partial(print), "partial"),
    "too deep nesting": (lambda: functools.reduce(lambda inner, _: [inner], range(100_000), []), "what pickle refuses"),
}


@pytest.mark.parametrize("kind", ["sqlite", "strict memory"])
@pytest.mark.parametrize("what", CANT)
def test_what_cant_be_stored_fails_its_request_changes_nothing_and_says_what_where_and_what_to_do(place_of, what, kind):
    store = place_of("sqlite").store() if kind == "sqlite" else MemoryStore(strict=True)
    guest, (make, offender) = Guest(store, patience=0), CANT[what]
    guest.do(lambda session: session.setComponent(IOther, [1]))
    with pytest.raises(NotStorable, match=r"IKept.*@storable") as caught:
        guest.do(lambda session: session.setComponent(IKept, make()))
    assert "IKept" in caught.value.name and offender in caught.value.offender
    with pytest.raises(NotStorable, match="attribute attribute"):
        Guest(store).do(lambda session: setattr(session, "attribute", make()))
    assert len(store) == 1
    session = store.open(guest.sid, patience=0)
    assert IOther(session) == [1]
    assert kind != "sqlite" or IKept not in session  # (in memory it is live)


def test_two_interfaces_of_one_name_dont_share_a_component(sqlite):
    first, second = [type(Interface)("ISame", (Interface,), {}) for _ in range(2)]
    session = sqlite.create(1800, 43200)
    session.setComponent(first, [1])
    session.setComponent(second, [2])
    with pytest.raises(NotStorable, match="ISame.*another interface of that name"):
        sqlite.save(session)
    session.unsetComponent(first)
    sqlite.save(session)
    again = sqlite.peek(session.uid)
    assert (first(again, None), second(again)) == (None, [2])


def test_a_class_that_no_other_process_can_find_is_warned_about_once(sqlite, caplog):
    here = storable(type("Here", (), {"__qualname__": "a_function.<locals>.Here"}))
    for component in (here(), here(), Box()):
        kept(sqlite, thing=component)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "<locals>.Here" in record.getMessage() and record.event == "unfindable"


# Records: classes that come and go
# ---------------------------------------------------------------------------


def raw_record(store, uid):
    return bytes(store.read(key_of(store, uid)))


def put_record(store, uid, record):
    """Put *record* in the place of the stored one, as one can who has the database; it is due at once."""
    assert store.swap(key_of(store, uid), raw_record(store, uid), record, store.clock())


def sealed(store, key, body):
    """A record as one can make it who knows the secret, too."""
    start = f"{len(store.place.encode())}:{store.place}{key}".encode()
    seal = {"key": hashlib.blake2b(SECRET.encode()).digest(), "digest_size": 32, "person": b"minisess seal 2"}
    return hashlib.blake2b(start + body, **seal).digest() + body


def forge(store, uid, change=lambda content: content, **fields):
    """Change the content of a record, and set fields of it."""
    names = "lastModified cookie created lifetime max_lifetime since owner forgotten callbacks".split()
    body = raw_record(store, uid)[32:]
    values, end = dict(zip(names, pickle.loads(body[8:]), strict=True)), 8 + int(body[:8])
    head = pickle.dumps(tuple({**values, **fields}.values()))
    put_record(store, uid, sealed(store, key_of(store, uid), b"%08d" % len(head) + head + change(body[end:])))


def rename(store, uid, old, new):
    """Let a record have another name for a class or interface (as long as before), as if that were unknown here."""
    assert old in raw_record(store, uid) and len(old) == len(new)
    forge(store, uid, lambda content: content.replace(old, new))


@storable
class Moody:
    refuses = False

    def __setstate__(self, state):
        if self.refuses or "bad" in state:
            raise ValueError("not today")
        self.__dict__.update(state)


@pytest.mark.parametrize("value", [Color.RED, UTC, zoneinfo.ZoneInfo("Europe/Berlin"), [1, Color.RED]], ids=str)
@pytest.mark.parametrize("trouble", ["it refuses", "its class isn't imported"])
def test_what_cant_be_opened_harms_nothing_else_and_comes_back_whole(sqlite, monkeypatch, trouble, value, caplog):
    moody, friend = Moody(), Box()
    moody.friend, moody.secret, friend.moody = friend, "kept", moody
    uid = kept(sqlite, other=Box(n=0, before=value), thing=moody, friend=friend, after=value)
    if trouble == "it refuses":
        monkeypatch.setattr(Moody, "refuses", True)
    else:
        rename(sqlite, uid, b".Moody", b".Gone!")
    for n in range(2):
        with visit(sqlite, uid) as again:
            with pytest.raises(StoreError, match=r"IKept can't be opened .*unsetComponent\(IKept\)"):
                IKept(again)
            assert IKept(again, None) is None and IKept(again, "default") == "default"
            assert IKept in again
            assert (vars(again), vars(IOther(again))) == ({"after": value}, {"n": n, "before": value})
            IOther(again).n += 1
    assert [r.event for r in caplog.records].count("closed") >= 2
    monkeypatch.undo()
    if trouble != "it refuses":
        rename(sqlite, uid, b".Gone!", b".Moody")
    with visit(sqlite, uid) as again:
        moody = IKept(again)
        assert (moody.secret, IOther(again).n) == ("kept", 2)
        assert moody.friend is again.friend and again.friend.moody is moody


@pytest.mark.parametrize("how", ["replaced", "unset"])
def test_a_component_that_cant_be_opened_closes_no_other_of_its_class_and_can_be_replaced_or_dropped(sqlite, how):
    good, bad = Moody(), Moody()
    good.name, bad.bad = "good", True
    uid = kept(sqlite, thing=bad, other=good, box=Box(good=good))
    with visit(sqlite, uid) as session:
        assert IKept(session, None) is None and session.box.good is IOther(session)
        session.setComponent(IKept, Box(new=1)) if how == "replaced" else session.unsetComponent(IKept)
        assert (IKept in session) is (how == "replaced")
    session = sqlite.peek(uid)
    assert (IKept in session, IOther(session).name) == (how == "replaced", "good")
    assert how == "unset" or IKept(session).new == 1


def test_an_interface_that_isnt_imported_keeps_its_component_and_a_renamed_class_opens_under_an_alias(sqlite):
    uid = kept(sqlite, thing=Box(n=1), other=[1], attribute=1)
    rename(sqlite, uid, b".Box", b".Old")
    rename(sqlite, uid, b".IOther", b".ILater")
    with visit(sqlite, uid) as session:
        session.attribute = 2
        session.removeComponent(object())
    with pytest.raises(StoreError, match="Old"):
        IKept(sqlite.peek(uid))

    class ILater(Interface):
        __qualname__ = "ILater"

    # The recipe: an empty subclass that has the old name, and is it no more.
    @storable
    class Alias(Box):
        __qualname__ = "Old"

        def __setstate__(self, state):
            self.__class__ = Box
            self.__dict__.update(state)

    with visit(sqlite, uid) as session:
        assert type(IKept(session)) is Box and IKept(session).n == 1
        assert (ILater(session), session.attribute) == ([1], 2)
    assert b".Box" in raw_record(sqlite, uid) and b".Old" not in raw_record(sqlite, uid)


# Records: seals, and what is in one
# ---------------------------------------------------------------------------


@pytest.fixture
def unpickled():
    """All calls from now on in which something is unpickled."""
    seen = []

    def spy(frame, event, arg):
        if arg is pickle.loads or isinstance(getattr(arg, "__self__", frame.f_locals.get("self")), pickle.Unpickler):
            seen.append(arg)

    sys.setprofile(spy)
    yield seen
    sys.setprofile(None)


def test_who_reads_the_database_learns_no_uid_and_who_writes_makes_no_session(place, unpickled, caplog):
    store = place.store()
    uid, other = kept(store, thing=[1]), kept(store, thing=[2])
    key, record = key_of(store, uid), raw_record(store, uid)
    assert uid.encode() not in record + key.encode() and store.open(key) is None
    other, number, bits = raw_record(store, other), int.from_bytes(record, "big"), range(3, 8 * len(record), 101)
    for bad in [
        *(b"hello", b"\0x", b"", record[:32], record[:33], record[: len(record) // 2], record[:-1]),
        *(record + b"\0", b"\0" + record, other, other[:32] + record[32:], record[:32] + other[32:]),
        *(bytes(32) + record[32:], bytes(32) + pickle.dumps(os.getcwd)),
        *((number ^ 1 << bit).to_bytes(len(record), "big") for bit in bits),
    ]:
        put_record(store, uid, bad)
        unpickled.clear()
        caplog.clear()
        assert store.open(uid) is store.peek(uid) is None, bad
        assert [r.getMessage().partition("security")[1] for r in caplog.records] == ["security"] * 2 * bool(bad)
        assert {r.event for r in caplog.records} <= {"refused"} and uid not in caplog.text
        assert (store.sweep(), store.read(key), unpickled) == (0, bad, [])  # left alone
        assert key not in store.holds.holders


def test_applications_with_different_secrets_never_touch_each_others_sessions(place, clock, unpickled, caplog):
    mine, theirs = place.store(clock=clock), place.store(clock=clock, secret="another secret, long enough")
    uids = [kept(mine, thing=[n]) for n in range(30)]
    unpickled.clear()
    assert theirs.open(uids[0]) is theirs.peek(uids[0]) is None
    assert "security" in caplog.text
    assert theirs.clear() == theirs.sweep() == 0
    clock.advance(2000)
    theirs.sweep()
    for _ in range(10):
        new_session(theirs, 10**6, 10**7, owner="ann")
    assert unpickled == []
    assert theirs.expireAll("ann") == 10
    clock.advance(3600)  # when what was refused is looked at again
    assert mine.sweep() == 30


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "redis"])
def test_a_record_of_another_place_doesnt_open_here_though_the_secret_is_the_same(place_of, kind):
    place = place_of(kind)
    one, two = place.store(), place.store(name="another")
    uid = kept(one, thing=[1])
    assert two.open(uid) is None
    # Copied under the key that it would have there, and under the same.
    for key in (key_of(two, uid), key_of(one, uid)):
        two.insert(key, raw_record(one, uid), 10**10, "")
    assert two.open(uid) is two.peek(uid) is two.open(one.peek(uid).handle) is None
    assert key_of(one, uid) != key_of(two, uid)
    assert IKept(one.peek(uid)) == [1]


def test_secrets_rotate_the_first_seals_and_all_open(place):
    old, new = "the old secret, long enough", b"the new secret, long enough"
    uid = kept(place.store(secret=old), thing=[1])
    both = place.store(secret=[new, old])
    with visit(both, uid) as session:
        IKept(session).append(2)
        session.login("ann")
    assert IKept(place.store(secret=(bytearray(new),)).peek(session.uid)) == [1, 2]
    assert place.store(secret=old).peek(session.uid) is None
    new_session(place.store(secret=old.encode()), owner="ann")
    assert len(both.sessions("ann")) == both.expireAll("ann") == 2


def test_clear_ends_a_session_that_is_used_at_this_moment_though_a_thousand_records_dont_open(place):
    def use_it(verdicts):
        store.settle = settle
        counting(store, uid)
        return settle(verdicts)

    store = place.store()
    uid, settle, store.settle = kept(store, n=1), store.settle, use_it
    key, record = key_of(store, uid), raw_record(store, uid)
    for number in range(1100):
        store.insert(f"{number:064}", b"x" * 100, 5.0, "")
    # What moves from the key into the body breaks the seal, too.
    store.insert(key[:-1], record[:32] + key[-1:].encode() + record[32:], 5.0, "")
    store.insert(key + "0", record, 5.0, "")
    assert (store.clear(), store.peek(uid), len(store)) == (1, None, 1102)


def go_through_a_visit(store):
    """Everything that a middleware and an application ask of *store*."""

    def peek_and_ask(environ):
        look, session = minisess.peek(environ), ISession(environ)
        assert look is not session is minisess.peek(RequestWithEnviron(environ))
        return look.n, look.owner

    visitor = Guest(store)
    visitor.do(put(n=1))
    visitor.do(lambda session: (session.release(), setattr(session, "n", 2)))
    assert visitor.do(lambda session: session.n) == 2

    def stream(session):
        yield b"1"
        session.n = 3

    assert list(visitor.stream(stream)) == []
    visitor.do(lambda session: session.login("ann"))
    assert visitor.do(peek_and_ask, find=lambda environ: environ) == (3, "ann")
    assert [each.handle for each in store.sessions("ann")] == [visitor.do(lambda session: session.handle)]
    visitor.do(lambda session: session.expire())
    assert len(store) == 0
    visitor.do(lambda session: session.login("ann"))
    assert (len(store), store.sweep(), store.expireAll("ann"), len(store)) == (1, 0, 1, 0)


def test_a_store_that_has_the_methods_of_IStore_and_no_others_will_do(store_of_kind):
    def delegate(name):
        return lambda self, *args, **options: getattr(store_of_kind, name)(*args, **options)

    names = [name for name, each in vars(IStore).items() if callable(each) and hasattr(store_of_kind, name)]
    methods = {name: delegate(name) for name in names if not name.startswith("_") or name == "__len__"}
    go_through_a_visit(implementer(IStore)(type("Delegating", (), methods))())


# What follows is sealed with the right secret: the secret has leaked, or another application has it.
def trap(*args):
    """Must never run."""
    trap.ran = args


class Trapped:
    def __init__(self, function, *args, **state):
        self.reduced = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.reduced


def text(string):
    return b"X" + len(string.encode()).to_bytes(4, "little") + string.encode()


def made(name, how=0, arguments=b""):
    """Pickle code for: an object as _make makes it."""
    return b"h\0(" + text(name) + b"K%c" % how + arguments + b"tR"


def filled(code, state):
    """Pickle code for: that object with this state, as _make sets it."""
    return code + b"q\xc8h\0(h\xc8(" + state + b"NNttR0"


SESSION, BOX, PLANET = made("", 4), made(f"{__name__}.Box"), f"{__name__}.Planet"
STATE = b"}" + text("color") + text("red") + b"s"
CALLS = [
    *((os.system, "exit 1"), (eval, "trap()"), (exec, "trap()"), (getattr, Box, "mro"), (__import__, "antigravity")),
    *((functools.partial, trap), (operator.attrgetter, "__class__"), (operator.methodcaller, "open_it")),
    *((subprocess.Popen, "true"), (pickle.loads, b"N."), (type, "Type", (), {}), (object,), (Stranger,), (Box,)),
    (Session, None, "", 0, 0, 0),
]
NAMES = [
    *("os.system", "builtins.eval", "builtins.type", "builtins.object", "builtins.open", "functools.partial"),
    *("subprocess.Popen", "collections.abc.Callable", "minisess.SQLiteStore", "minisess.Session"),
    *("minisess.MemoryStore", "minisess.PersistentStore", "minisess._make", f"{__name__}.Stranger"),
    *(f"{__name__}.trap", "", ".", "Box", f"{__name__}.Box.open_it", "datetime.datetime.now"),
    "uuid.os.system",
]
# An enum's member, and that by its class, the one object of a class, the session, a plain value.
SHARED = [
    *(made(PLANET, 2, text("EARTH")), made(PLANET, 1, b"(G@\x17\xe1G\xae\x14z\xe1" + text("blue") + b"t")),
    *(made(f"{__name__}.Single"), made(f"{__name__}.Single", 3, text("")), SESSION, b"]"),
]
OBJECTS = [made(name, how) + b"." for name in NAMES for how in (0, 1, 2, 3, 5)]
POISONS = [
    *(pickle.dumps(Trapped(trap, 1), protocol) for protocol in (0, 2, 4, 5)),
    *(pickle.dumps(Trapped(*call)) for call in CALLS),
    *(pickle.dumps(Trapped(*call, a=1)) for call in CALLS if type(call[0]) is type),
    *(filled(shared, STATE) + b"." for shared in SHARED),
    *(shared + STATE + b"b." for shared in SHARED),
    # A dotted name, a class on the old way, an extension; a persistent id of nothing here, and a reference to itself.
    *(text("os") + text("path.join") + b"\x93.", b"(ios\nsystem\n.", b"\x82\x01."),
    *(b"Pnothing\n.", b"P%s.IKept\n." % __name__.encode()),
    # State and slots of the session, the state of _make, the class of a box; a call of the session, and an item.
    *(SESSION + b"}" + text("renew") + BOX + b"sb.", SESSION + b"N}" + text("_store") + BOX + b"s\x86b."),
    *(b"h\0N}" + text("__code__") + b"Ns\x86b.", BOX + b"N}" + text("__class__") + BOX + b"s\x86b."),
    *(SESSION + b")R.", SESSION + text("a") + b"a."),
    # Claims of 100 MB and of 2**62 bytes, and such a frame; a buffer from elsewhere, and an endless text.
    *(b"B" + (100 << 20).to_bytes(4, "little") + b"x", b"\x8e" + (1 << 62).to_bytes(8, "little") + b"x"),
    *(b"\x80\x05\x95" + (1 << 62).to_bytes(8, "little") + b"N.", b"\x97.", b"V" + b"x" * 1000),
    # Members that an enum hasn't, a factory that isn't declared.
    *(made(PLANET, 2, text("__class__")) + b".", made(PLANET, 2, text("mro")) + b"."),
    made("collections.defaultdict", 3, text("os.system")) + b".",
    # No end, nothing to answer, no code at all, no bytes.
    *(b"]" * 1000, b".", b"\xff\xff", b""),
]


@pytest.fixture
def nothing_runs():
    def state():
        kinds = types.FunctionType, type
        ours = {name: dict(vars(each)) for name, each in vars(minisess).items() if isinstance(each, kinds)}
        return ours, "antigravity" in sys.modules, [dict(vars(e)) for e in (trap, Single(), Planet.EARTH, Color.RED)]

    before = state()
    yield
    assert state() == before


def pairs(**items):
    """The content of a record: for each name pickle code, as a thief would put it there."""
    names = {"thing": f"{__name__}.IKept", "other": f"{__name__}.IOther"}
    return b"".join(b"\x80\x05" + text(names.get(n, f".{n}")) + code[:-1] + b"\x86." for n, code in items.items())


@pytest.mark.parametrize("poison", POISONS + OBJECTS, ids=lambda poison: repr(poison)[:70])
def test_poison_is_refused_and_nothing_run_though_the_secret_is_right(sqlite, poison, nothing_runs, caplog):
    """Either the record is no session, or all else in it is there, and the poison is closed and stays so."""
    if poison[2:3] == b"\x95" and sys.implementation.name == "pypy":
        pytest.skip("PyPy's pickle takes a frame that is shorter than it says")
    uid, poison = kept(sqlite, thing=[1], other=[2]), poison or b"."
    forge(sqlite, uid, lambda _: pairs(other=pickle.dumps([2]), thing=poison, attribute=poison))
    session = sqlite.open(uid)
    if session is None:
        assert "security" in caplog.text
        assert sqlite.peek(uid) is None
        return
    with pytest.raises(StoreError, match="can't be opened"):
        IKept(session)
    assert (IKept(session, None), IOther(session), vars(session)) == (None, [2], {})
    assert "closed" in [r.event for r in caplog.records]
    sqlite.save(session)
    again = sqlite.open(uid)
    assert IKept(again, None) is None and IKept in again and vars(again) == {}


def test_a_forged_record_makes_declared_objects_in_any_state_but_hides_no_method(sqlite, nothing_runs, caplog):
    uid, value = kept(sqlite, thing=[1]), pickle.dumps("hides a method")
    hidden = {"good": pickle.dumps(1), "expire": value, "_record": value, "__class__": value, "__dict__": value}
    names = ["__reduce__", "__class__", "nothing", "color"]
    callbacks = tuple((f"{__name__}.IKept", name) for name in names)
    forge(sqlite, uid, lambda _: pairs(thing=filled(BOX, STATE) + b".", **hidden), callbacks=callbacks)
    session = sqlite.open(uid)
    assert (IKept(session).color, vars(session)) == ("red", {"good": 1})
    session.expire()
    assert sqlite.open(uid) is None
    assert re.findall(r"'(\w+)' of \S+ for a callback, which is no method", caplog.text) == names


# Instead of the fields: other bytes, or fields of which one is wrong.
BAD_FIELDS = [
    *(*POISONS, pickle.dumps(5), pickle.dumps((1, 2, 3))),
    *({"created": "1"}, {"owner": 5}, {"callbacks": ("x",)}, {"callbacks": ((1, 2),)}),
    *({"callbacks": []}, {"cookie": [1.0, 2.0]}, {"cookie": (float("nan"),) * 2}),
    *({"cookie": (1, 2, 3)}, {"forgotten": ("a", "b")}, {"lifetime": 10**400}, {"lifetime": float("nan")}),
]


@pytest.mark.parametrize("bad", BAD_FIELDS, ids=lambda bad: repr(bad)[:70])
def test_poisonous_fields_are_no_session_and_stop_no_sweep(place_of, clock, bad, nothing_runs, caplog):
    store = place_of("sqlite").store(clock=clock)
    uid, other = kept(store, thing=[1]), kept(store, thing=[2])
    if isinstance(bad, dict):
        forge(store, uid, **bad)
    else:
        put_record(store, uid, sealed(store, key_of(store, uid), b"%08d" % len(bad) + bad))
    assert store.open(uid) is store.peek(uid) is None
    assert "security" in caplog.text
    clock.advance(50_000)
    assert (store.sweep(), store.peek(other)) == (1, None)


def test_deep_nesting_is_opened_but_not_stored_again(sqlite):
    uid = kept(sqlite, thing=[1])
    forge(sqlite, uid, lambda _: pairs(thing=b"]" * 50_000 + b"a" * 49_999 + b"."))
    session = sqlite.open(uid)
    IKept(session).append(1)
    with pytest.raises(NotStorable):
        sqlite.save(session)


# Persistent stores: leases, processes, accidents
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("successor", ["nobody", "at work", "done", "logs in"])
@pytest.mark.parametrize("attempt", ["save", "renew", "fail"])
def test_a_request_that_outlasts_its_lease_changes_nothing_of_its_successor(place, attempt, successor):
    clock, theirs = Clock(), None
    store, other = (place.store(clock=clock, lease=30) for _ in range(2))
    guest = Guest(store)
    guest.do(put(n=0))

    def slow(session):
        nonlocal theirs
        session.n = 1
        for busy, seconds in [(other, 29), (store, 1)]:  # in its process it is known to be alive
            clock.advance(seconds)
            with pytest.raises(SessionBusy):
                busy.open(guest.sid, patience=0)
        if successor != "nobody":
            theirs = other.open(guest.sid, patience=0)
            theirs.n += 10
            if successor == "logs in":
                theirs.login("bob")
            if successor != "at work":
                other.save(theirs)
        if attempt == "renew":
            session.renew()
        elif attempt == "fail":
            raise ZeroDivisionError

    lost = SessionConflict if successor in ("at work", "done") else SessionError if attempt == "renew" else ()
    error = ZeroDivisionError if attempt == "fail" else lost if successor != "nobody" else ()
    with pytest.raises(error) if error else contextlib.nullcontext() as caught:
        guest.do(slow)
    if error is SessionConflict:
        assert caught.value.lease == 30 and "30 s" in str(caught.value)
    elif not error:
        assert (guest.was_told is None) is (attempt == "save")  # who lost it deletes no cookie
    if successor == "at work":
        for each in (store, other):
            with pytest.raises(SessionBusy):
                each.open(guest.sid, patience=0)
        other.save(theirs)
    uid = guest.sid if theirs is None else theirs.uid
    assert store.open(uid, patience=0).n == (10 if theirs else attempt != "fail")
    assert len(store) == 1


def worker(arguments, uids, path, lease, threads, times):
    """Sends requests, and notes in a file what the response to each was."""
    responses, chance = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), random.SystemRandom()

    def work():
        guests = [Guest(store, {"sid": uid}, patience=60) for uid in uids]
        for _ in range(times):
            number = chance.randrange(len(uids))
            with contextlib.suppress(SessionBusy, SessionConflict):
                os.write(responses, f"{number} {guests[number].do(visited)}\n".encode())

    with Place(*arguments) as place:
        store = place.store(lease=lease)
        for thread in [Background(work) for _ in range(threads)]:
            thread.join()
            thread.result()


def run_processes(calls, method="spawn"):
    """Run each (function, *arguments) in a new process; none may fail."""
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=function, args=arguments) for function, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def test_4_processes_with_4_threads_lose_no_update(place, tmp_path):
    store, path = place.store(), tmp_path / "responses"
    uid = kept(store, other=[1])
    run_processes([(worker, place.arguments, [uid], path, 30, 4, 100)] * 4)
    assert len(set(path.read_text().splitlines())) == ICounter(store.open(uid)).hits == 1600


def accidents(*arguments):
    """Three workers, of whom one is killed and replaced every few moments, 25 times."""
    fork, path, workers = multiprocessing.get_context("fork"), arguments[2], []
    path.touch()
    for hired in range(28):
        if hired >= 3:
            # However slow the machine is: not before a few more responses are there, and then at any moment.
            told = path.stat().st_size
            wait_until(lambda told=told: path.stat().st_size >= told + 10)
            time.sleep(random.uniform(0, 0.03))
            fired = workers.pop(random.randrange(len(workers)))
            fired.kill()
            fired.join()
            assert fired.exitcode == -signal.SIGKILL, "a worker failed"
        if hired < 25:
            workers.append(fork.Process(target=worker, args=arguments))
            workers[-1].start()


def test_who_is_killed_loses_nothing_that_a_client_was_told(place, tmp_path):
    store, path = place.store(lease=0.1), tmp_path / "responses"
    uids = [kept(store, other=[1]) for _ in range(4)]
    run_processes([(accidents, place.arguments, uids, path, 0.1, 1, sys.maxsize)])
    ended_at, lost = time.monotonic(), 0
    received = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    assert len(received) > 50
    for number, uid in enumerate(uids):
        hits = ICounter(store.open(uid)).hits
        told = [n for who, n in received if who == number]
        assert len(set(told)) == len(told) and max(told) <= hits
        lost += hits - len(told)
    # Whoever is killed may have saved one that it didn't get to tell.
    assert 0 <= lost <= 25
    assert time.monotonic() - ended_at < 0.1 + 5
    assert len(store) == len(uids)


# Persistent stores: servers that go away, full disks, drivers, forks, round trips
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_while_the_server_is_away_requests_fail_and_afterwards_all_is_as_before(place_of, request, kind):
    place, server = place_of(kind), request.getfixturevalue(f"{kind}_server")
    if kind == "redis":
        place.client.set_retry(package("redis.retry").Retry(package("redis.backoff").NoBackoff(), 0))
    else:
        place.pool.timeout = 0.3
    store = place.store(lease=0.5)
    guest = Guest(store)
    assert guest.do(visited) == 1
    guest.events.clear()
    try:
        for work in (lambda session: visited(session) and server.stop(), visited, visited):
            with pytest.raises(StoreError, match=type(store).__name__):
                guest.do(work)
        assert guest.events == []
    finally:
        server.start()
    assert wait_until(lambda: guest.do(visited), StoreError) == 2
    assert guest.was_told is None


def test_a_full_disk_is_a_StoreError_and_loses_nothing(sqlite):
    resource, guest = package("resource"), Guest(sqlite, patience=0)

    def change(value):
        return guest.do(lambda session: [session.value, setattr(session, "value", value)][0])

    guest.do(put(value=b"small"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="<SQLiteStore .*>: write failed: .*(full|I/O)"):
            change(bytes(5_000_000))
        assert change(b"other") == b"small"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert change(bytes(5_000_000)) == b"other"
    assert len(change(b"")) == 5_000_000


def test_an_sqlite_file_is_its_owners_only_and_an_error_names_it_if_it_is_read_only_or_was_deleted():
    error, me = r"<SQLiteStore .*/store>: \w+ failed: \w+: .*(readonly|Permission denied|unable to open)", os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # only its owner gets at tmp_path
        store = SQLiteStore(folder + "/store", secret=SECRET)
        uid = kept(store, thing=b"here")
        rights = {path.name: oct(path.stat().st_mode & 0o777) for path in pathlib.Path(folder).iterdir()}
        assert rights == dict.fromkeys(["store", "store-wal", "store-shm"], "0o600")
        store.close()
        os.chmod(folder, 0o555)
        os.chmod(store.path, 0o444)
        try:
            os.seteuid(me or 65534)  # root may write anyway
            for use in (store.open, lambda uid: kept(store, n=1), lambda uid: SQLiteStore(store.path, secret=SECRET)):
                with pytest.raises(StoreError, match=error):
                    use(uid)
        finally:
            os.seteuid(me)
            os.chmod(folder, 0o755)
            os.chmod(store.path, 0o644)
        with visit(store, uid) as session:
            assert IKept(session) == b"here"  # nothing is lost
        for path in pathlib.Path(folder).iterdir():
            path.unlink()
        with pytest.raises(StoreError, match=f"{folder}/store was deleted"):
            store.open(uid)
        assert store.open(uid) is None  # in a new file
        assert IKept(store.peek(kept(store, thing=[2]))) == [2]
        store.close()


def test_what_a_store_cant_do_with_is_refused_at_construction(tmp_path, monkeypatch):
    bad = ["", "fifteen bytes..", b"", b"x" * 15, [], (), ["x" * 16, ""], None, 16, [16], (32, 32), [None], {}]
    refused = [("secret", secret, (ValueError, TypeError), "secret") for secret in bad]
    refused += [("path", path, ValueError, "file") for path in ("", ":memory:")]
    refused += [("table", table, ValueError, "table") for table in ("", "a b", "a;b", "1a", "\xe9", 'a"')]
    for option, value, error, hint in refused:
        with pytest.raises(error, match=hint):
            SQLiteStore(**{"path": tmp_path / "store", "secret": SECRET, option: value})
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))  # which has no RETURNING
    with pytest.raises(StoreError, match="3.35"):
        SQLiteStore(tmp_path / "store", secret=SECRET)
    with pytest.raises(ValueError, match="decode_responses"):
        RedisStore(package("redis").Redis(decode_responses=True), secret=SECRET)


def test_a_cluster_of_three_nodes_keeps_sessions(tmp_path, clock):
    cluster = package("redis.cluster")
    server = [program("redis-server"), "--port", "PORT", "--bind", "127.0.0.1", "--save", ""]
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(3):
            (tmp_path / f"{number}").mkdir()
            bus = str(free_port())
            options = ["--dir", str(tmp_path / f"{number}"), "--cluster-enabled", "yes", "--cluster-port", bus]
            port = stack.enter_context(running([*server, *options])).port
            nodes.append(stack.enter_context(package("redis").Redis(port=port)))
            slots = range(number * 16384 // 3, (number + 1) * 16384 // 3)
            nodes[-1].execute_command("CLUSTER ADDSLOTS", *slots)
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", port, bus)
        wait_until(lambda: all(node.cluster("INFO")["cluster_state"] == "ok" for node in nodes))
        client = stack.enter_context(cluster.RedisCluster(host="127.0.0.1", port=port))
        store = RedisStore(client, secret=SECRET, clock=clock)
        RandomWalk(store, store, clock, seed=1).take(100)
        for _ in range(40):
            new_session(store, owner="ann", foo=1)
        assert all(len(node.keys("minisess:{*")) > 3 for node in nodes)
        assert (len(store.sessions("ann")), store.expireAll("ann"), len(store)) == (40, 40, 0)


def test_a_driver_that_lost_a_reply_and_asks_again_gets_the_same_answer(place_of, monkeypatch, clock):
    redis, place, chance, left = package("redis"), place_of("redis"), random.Random(1), 0
    place.client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 3))
    read = redis.Connection.read_response

    def lose(connection, *args, **options):
        nonlocal left
        reply = read(connection, *args, **options)
        left -= 1
        if left < 0:
            left = chance.randrange(5, 50)
            connection.disconnect()
            raise redis.ConnectionError("the reply got lost")
        return reply

    monkeypatch.setattr(redis.Connection, "read_response", lose)
    store = place.store(clock=clock)
    for seed in range(8):
        RandomWalk(store, store, clock, seed).take(100)
        go_through_a_visit(store)


@pytest.mark.parametrize("moves", [True, False], ids=["moves", "begins"])
def test_a_session_that_moves_or_begins_while_all_are_ended_ends_once(place_of, clock, moves):
    place, turn, left = place_of("redis"), 0, 0
    store, other = place.store(clock=clock), place.store(clock=clock)

    def meddle(ask, *args, **options):
        nonlocal left
        left -= 1
        if left == 0:
            listed.append(len(other.sessions("ann")))
            ended.append(other.expireAll("ann"))
        return ask(*args, **options)

    while left <= 0:  # before the first command, before the second, ..., after the last
        turn, listed, ended = turn + 1, [], []
        Witness.saw.clear()
        begin = functools.partial(new_session, store, witness="w", owner="ann")
        work, left = store.open(begin().uid).renew if moves else begin, turn
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SessionError):
            for name in ("execute_command", "pipeline"):
                patch.setattr(place.client, name, functools.partial(meddle, getattr(place.client, name)))
            work()
        ended.append(other.expireAll("ann"))
        assert (sum(ended), Witness.saw, store.sessions("ann")) == (1, ["w"], [])
        assert turn > 1 or listed == [moves]
        clock.advance(100)
        assert (store.sweep(), len(store)) == (0, 0)
    assert turn > 3


def test_what_redis_has_besides_sessions_forgets_them(place_of):
    place, clock = place_of("redis"), Clock()
    store, client = place.store(clock=clock), place.client
    for _ in range(20):
        new_session(store, 1800, 43200, owner="ann")
    (owners,) = client.keys(place.name + ":owner:*")
    assert client.zcard(owners) == 20
    assert 1800 < client.ttl(owners) < 43200
    client.delete(*client.keys(place.name + ":{*"))  # as their time to live does it
    clock.advance(20_000)
    assert store.sweep() == 0
    new_session(store, 1800, 43200, owner="ann")
    assert (client.zcard(owners), len(store)) == (1, 1)
    for _ in range(3):
        uid = new_session(store, 1800, 43200, owner="ann").uid
        client.delete(f"{place.name}:{{{key_of(store, uid)}}}")
    assert store.expireAll("ann") == 1
    assert not client.exists(owners)


@pytest.mark.parametrize("driver", ["pg8000.dbapi", "psycopg2", "psycopg with rows that are dicts"])
def test_other_drivers_of_postgres_will_do(postgres_server, driver):
    connect, options = package(driver.split()[0]).connect, {"dsn": postgres_server.address}
    if driver == "pg8000.dbapi":
        options = {"host": "127.0.0.1", "port": postgres_server.port, "user": "minisess", "database": "postgres"}
    elif driver != "psycopg2":
        options = {"conninfo": postgres_server.address, "row_factory": package("psycopg.rows").dict_row}
    place = {"secret": SECRET, "table": driver[:6]}
    go_through_a_visit(PostgresStore(lambda: contextlib.closing(connect(**options)), **place))


def test_postgres_with_serializable_transactions_serves_all(place_of):
    place = place_of("postgres")
    options = " options='-c default_transaction_isolation=serializable'"
    with package("psycopg_pool").ConnectionPool(place.address + options, min_size=8, open=True) as pool:
        store = PostgresStore(pool.connection, secret=SECRET, table=place.name)
        uid = new_session(store, 1800, 43200, n=0).uid

        def load():
            for _ in range(25):
                counting(store, uid)
                with visit(store, new_session(store, 1800, 43200, owner="ann").uid) as session:
                    session.renew()

        at_once(*[load] * 8)
        assert store.open(uid).n == 200
        assert store.expireAll("ann") == 200


def fill_with(store, place, count, until, first=0):
    """Store *count* sessions that are due, by what the database says, though they may have been used since."""
    uid, due = kept(store, thing=[1]), store.clock() - 1
    forge(store, uid, lastModified=until - 1800.0)
    body = raw_record(store, uid)[32:]
    store.delete(key_of(store, uid))
    rows = ((key, sealed(store, key, body), due, "", "", 0) for key in (f"{first + n:064x}" for n in range(count)))
    if place.kind == "redis":
        pipeline = place.client.pipeline(transaction=False)
        for key, record, *_ in rows:
            pipeline.hset(f"{place.name}:{{{key}}}", mapping={"record": record, "due": due, "owner": ""})
            pipeline.zadd(f"{place.name}:due", {key: due})
        pipeline.execute()
        return
    driver, mark = (sqlite3, "?") if place.kind == "sqlite" else (package("psycopg"), "%s")
    with contextlib.closing(driver.connect(place.address)) as connection:
        connection.cursor().executemany(f"INSERT INTO {place.name} VALUES ({', '.join([mark] * 6)})", rows)
        connection.commit()


@pytest.mark.parametrize("state", ["expired", "used since"])
@pytest.mark.parametrize("kind", ["sqlite", "postgres", "redis"])
def test_100000_that_are_due_cost_a_request_next_to_nothing(place_of, clock, kind, state):
    def cost(store):
        return sorted(timeit.repeat(lambda: new_session(store, 1800, 43200, foo=1), number=1, repeat=90))[45]

    place, empty = place_of(kind), place_of(kind).store(clock=clock)
    store = place.store(clock=clock)
    kept(empty, thing=[1])
    fill_with(store, place, 100_000, clock.now + (0 if state == "expired" else 900))
    wait_until(lambda: cost(store) < 3 * cost(empty) + 0.0005)  # at once, but where the machine is busy
    assert (len(store) < 100_000) is (state == "expired")


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "redis"])
def test_sweep_finds_5000_expired_ones_behind_5000_active_ones_and_an_end_that_cant_be_written(place_of, clock, kind):
    place = place_of(kind)
    store = place.store(clock=clock)
    fill_with(store, place, 5000, clock.now + 900)
    forge(store, kept(store, thing=[1]), lifetime=2**70, max_lifetime=2**70)
    clock.advance(10)
    fill_with(store, place, 5000, clock.now, first=5000)
    assert (store.sweep(), len(store)) == (5000, 5001)
    clock.advance(2000)
    assert store.sweep() == 5000


def test_a_connection_that_is_in_a_transaction_is_refused(place_of):
    place = place_of("postgres")
    store = place.store()
    uid = kept(store, thing=[1])
    with package("psycopg").connect(place.address) as connection:
        connection.execute("SELECT 1")
        busy = PostgresStore(lambda: contextlib.nullcontext(connection), secret=SECRET, table=place.name)
        with pytest.raises(StoreError, match="transaction"):
            busy.open(uid)
    assert IKept(store.open(uid)) == [1]


def test_processes_that_start_at_once_make_the_table_once(place_of):
    place, start = place_of("postgres"), threading.Barrier(4, timeout=20)
    for n in range(10):
        assert at_once(*[lambda name=f"table{n}": start.wait() < 4 and len(place.store(name))] * 4) == [0] * 4


def test_48_forks_under_load_by_8_threads_hurt_nobody(tmp_path):
    script = """
        warnings.simplefilter("ignore", DeprecationWarning)
        store = SQLiteStore(sys.argv[1], secret=SECRET)
        uids, stop, done = [kept(store, n=0) for _ in range(8)], threading.Event(), []

        def load(uid):
            while not stop.is_set():
                counting(store, uid, patience=30)
                done.append(uid)

        def child(uid):
            signal.alarm(40)
            counting(store, uid, patience=30)

        threads = [Background(load, uid) for uid in uids]
        run_processes([(child, uid) for uid in uids * 6], "fork")
        stop.set()
        [thread.result() for thread in threads]
        print(set(uids) == set(done), sum(store.peek(uid).n for uid in uids) - len(done))
        for store in [store, *[SQLiteStore(store.path, secret=SECRET)] * 4]:
            if ctypes.PyDLL(None).fork() == 0:  # Python isn't told of it, as by uWSGI
                with contextlib.suppress(StoreError):  # "the server has forked while ... was open"
                    os._exit(len([child(uids[0]) for _ in range(25)]))
                os._exit(1)
            store.close()
        print(sorted(os.wait()[1] >> 8 for _ in range(5)), store.open(uids[0]).n - done.count(uids[0]))
        store.close()
        print(sqlite3.connect(store.path).execute("PRAGMA integrity_check").fetchall())"""
    run = run_python(script, str(tmp_path / "store"))
    assert run.stdout == "True 48\n[1, 25, 25, 25, 25] 106\n[('ok',)]\n", run


@pytest.mark.parametrize("kind", ["redis", "postgres", "sqlite"])
def test_a_request_costs_two_round_trips_a_look_one_and_one_without_the_session_none(place_of, kind, monkeypatch):
    place, trips = place_of(kind), []
    store = place.store()

    def note(owner, name):
        ask = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: trips.append(name) or ask(*args, **options))

    @contextlib.contextmanager
    def traced():
        """What libpq sends; a round trip ends when the server is ready for the next."""
        with tempfile.TemporaryFile() as file, place.pool.connection() as connection:
            connection.pgconn.trace(file.fileno())
            yield connection
            connection.pgconn.untrace()
            file.seek(0)
            trips.extend(line for line in file if b"ReadyForQuery" in line)

    def cost(*args, **options):
        trips.clear()
        guest.do(*args, **options)
        return len(trips)

    if kind == "redis":
        go_through_a_visit(store)  # so that the server has the scripts
        note(package("redis").Connection, "send_packed_command")
    elif kind == "postgres":
        store = PostgresStore(traced, table=place.name, secret=SECRET)
    else:  # in which each operation is one
        for name in "insert hold read write free swap settle move delete due owned take".split():
            note(store, name)
    guest = Guest(store)
    guest.do(put(n=1))
    assert cost(lambda look: look.n, find=minisess.peek) == 1
    assert cost(put(n=2)) == cost(lambda session: session.n) == 2
    assert cost(lambda environ: None, find=lambda environ: environ) == 0
    # What the indexes need besides is in the same statement, but in Redis.
    assert cost(lambda session: session.login("ann")) == (3 if kind != "redis" else len(trips))
    assert cost(put(n=3)) == 2


def test_the_example_of_a_store_of_ones_own_counts():
    from examples.file_store import application

    browser = Browser(wrap(application.app, application.store))
    assert [browser.get().text for _ in range(2)] == ["Visits: 1\n", "Visits: 2\n"]
    application.store.open(browser.cookies["sid"]).expire()


# Cookies
# ---------------------------------------------------------------------------


def note_calls(store, name, notes):
    """From now on *notes* gets the first argument of each call of this method of *store*."""
    method = getattr(store, name)
    setattr(store, name, lambda first, *args, **options: notes.append(first) or method(first, *args, **options))


@pytest.fixture(params=["memory", "sqlite"])
def store_of_kind(request, place_of):
    """One whose records requests share, and one where each reads its own."""
    return MemoryStore(clock=Clock()) if request.param == "memory" else place_of("sqlite").store(clock=Clock())


def known_visitor(store):
    """A middleware around an application that only looks, and the id of a session that it answers with "known"."""
    look = acting(lambda session: getattr(session, "name", "nobody"))
    return SessionMiddleware(look, store), new_session(store, 1800, 43200, name="known").uid


USUAL = ["Path=/", "HttpOnly", "SameSite=Lax"]
EMBEDDED, EVERYWHERE = {"samesite": "None", "secure": True}, ["Path=/", "HttpOnly", "SameSite=None", "Secure"]


@pytest.mark.parametrize(
    ("scheme", "options", "name", "attributes"),
    [
        ("http", {}, "sid", USUAL),
        ("https", {}, "__Host-sid", [*USUAL, "Secure"]),
        ("http", {"secure": True}, "__Host-sid", [*USUAL, "Secure"]),
        ("https", {"secure": False}, "sid", USUAL),
        ("https", {"cookie": "_"}, "__Host-_", [*USUAL, "Secure"]),
        ("https", {"path": "/app"}, "__Secure-sid", ["Path=/app", "HttpOnly", "SameSite=Lax", "Secure"]),
        ("https", {"domain": "example.com"}, "__Secure-sid", [*USUAL, "Domain=example.com", "Secure"]),
        ("http", {"samesite": "Strict"}, "sid", ["Path=/", "HttpOnly", "SameSite=Strict"]),
        ("https", EMBEDDED, "__Host-sid", EVERYWHERE),
        ("http", {"persistent": True, "lifetime": 60}, "sid", [*USUAL, "Max-Age=60"]),
        ("https", {**EMBEDDED, "partitioned": True}, "__Host-sid", [*EVERYWHERE, "Partitioned"]),
        ("http", {"persistent": True, "lifetime": None, "max_lifetime": 50}, "sid", [*USUAL, "Max-Age=50"]),
        ("http", {"persistent": True, "lifetime": None, "max_lifetime": None}, "sid", [*USUAL, "Max-Age=34560000"]),
        ("https", {"cookie": "__Host-mine", "secure": True}, "__Host-mine", [*USUAL, "Secure"]),
        ("https", {"cookie": "__Secure-mine", "secure": True}, "__Secure-mine", [*USUAL, "Secure"]),
    ],
)
def test_a_cookie_and_its_deletion_carry_the_same_name_and_flags(scheme, options, name, attributes):
    app = acting(visited, out=lambda session: session.expire())
    browser, where = Browser(wrap(app, MemoryStore(clock=Clock()), **options), scheme), options.get("path", "")
    (header,) = browser.get(where + "/").all("Set-Cookie")
    pair, *sent = header.split("; ")
    assert re.fullmatch(f"{re.escape(name)}={UID}", pair) and sorted(sent) == sorted(attributes)
    assert browser.get(where + "/").text == "2"
    (header,) = browser.get(where + "/out").all("Set-Cookie")
    pair, *sent = header.split("; ")
    lasting = [each for each in attributes if not each.startswith("Max-Age")]
    assert pair == f"{name}="
    assert sorted(sent) == sorted([*lasting, "Max-Age=0", "Expires=Thu, 01 Jan 1970 00:00:00 GMT"])


def test_a_lasting_cookie_is_sent_again_when_a_tenth_of_its_age_has_gone(clock):
    browser = Browser(wrap(counter_app, MemoryStore(clock=clock), persistent=True, lifetime=1000, max_lifetime=2050))

    def ages(*pauses, path="/"):
        for pause in pauses:
            clock.advance(pause)
            yield re.findall("Max-Age=[0-9]+", "; ".join(browser.get(path).all("Set-Cookie")))

    sent = [["Max-Age=1000"], [], ["Max-Age=1000"], [], ["Max-Age=1000"], ["Max-Age=150"], [], ["Max-Age=135"]]
    assert list(ages(0, 99, 1, 99, 801, 900, 14, 1)) == sent
    assert list(ages(100, path="/no")) == [[]]  # who doesn't use the session doesn't prolong it
    assert list(ages(35)) == [["Max-Age=1000"]] and browser.get().text == "2"  # just then it was over


def test_remember_me_is_for_those_who_tick_it_and_the_cookie_lives_as_long_as_the_session(store_of_kind):
    clock, month = store_of_kind.clock, 30 * 86400
    browser, other = Guest(store_of_kind), Guest(store_of_kind)

    def age(work=visited, visitor=browser):
        visitor.do(work)
        return [re.findall("Max-Age=([0-9]+)", cookie) for cookie in visitor.response.all("Set-Cookie")]

    tick = operator.methodcaller("login", "ann", remember=month)
    assert age() == [[]]  # a cookie that ends with the browser
    assert (age(LOG_IN, other), age(tick), age()) == ([[]], [[str(month)]], [])
    clock.advance(month / 10)
    left = str(month * 9 // 10)  # the absolute timeout is measured from the login
    assert (age(), age(RENEW)) == ([[left]], [[left]])
    assert age(visitor=other) == [[]]  # hers ended after half an hour
    assert age(operator.methodcaller("login", "bob")) == [[]]  # what one has ticked says nothing about another
    assert (age(tick), age(LOG_IN)) == ([[str(month)]], [[]])


def test_outside_of_its_path_the_middleware_isnt_there():
    def app(environ, start_response):
        return plain(start_response, ISession(environ, None) and visited(ISession(environ)))

    browser = Browser(wrap(app, path="/app"))
    inside = [("", "/app"), ("", "/app/"), ("", "/app/x"), ("/app", "/x"), ("/app", "")]
    for number, (script_name, path) in enumerate(inside, 1):
        assert browser.get(path, SCRIPT_NAME=script_name).text == str(number)
    for path in ("/", "/application", "/other/app"):
        response = browser.get(path)
        assert (response.text, response["Set-Cookie"], response["Vary"]) == ("None", None, None)


# Values of an option, or several options, and what the error names.
REFUSED = {
    "cookie": ["", "a b", "a=b", "a;b", "sid\r\nX-Evil: 1", "s\xefd"],
    "samesite": ["Lax\r\nX-Evil: 1"],
    "domain": ["", "example.com-", "example.com;Path=/x", "example.com\r\nX-Evil: 1"],
    "path": ["", "app", "/;Domain=example.com", "/\nX-Evil: 1", "/caf\xe9"],
    "lifetime": [0],
    "max_lifetime": [-1],
    "patience": [-1],
    "samesite secure": [{"samesite": "None"}, {"samesite": "None", "secure": False}],
    "samesite Lax": [{"samesite": "lax"}],
    "cookie secure": [{"cookie": "__Host-x"}, {"cookie": "__Secure-x", "secure": False}],
    "cookie domain": [{"cookie": "__Host-x", "secure": True, "domain": "example.com"}],
    "cookie path": [{"cookie": "__host-x", "secure": True, "path": "/a"}],
    "partitioned samesite='None' secure": [{"partitioned": True}, {"partitioned": True, "secure": True}],
}


@pytest.mark.parametrize("words, value", [(words, value) for words, values in REFUSED.items() for value in values])
def test_options_that_contradict_or_could_forge_headers_are_refused_with_their_names(words, value):
    with pytest.raises(ValueError) as caught:
        SessionMiddleware(counter_app, **value if isinstance(value, dict) else {words: value})
    assert all(word in str(caught.value) for word in words.split())


CACHED = [], ["public, max-age=60"], ["public", "max-age=60"], ["max-age=0, no-cacheable"]
# Headers of an application, and what is added to their values.
HEADERS = [
    *(("Vary", given, ", Cookie") for given in ([], ["Accept"], ["Accept", "Origin"], ["Cookies"])),
    *(("Vary", given, "") for given in (["Accept, cookie"], ["*"])),
    *(("Cache-Control", given, ', no-cache="Set-Cookie"') for given in CACHED),
    *(("Cache-Control", given, "") for given in (["no-store"], ["Private, max-age=60"], ["no-cache"])),
    ("Set-Cookie", ["lang=de; Path=/", "sidekick=1"], None),
]


@pytest.mark.parametrize("name, given, added", HEADERS)
@pytest.mark.parametrize("spell", [str, str.lower])
def test_the_applications_headers_survive_and_ours_are_there_once(name, given, added, spell):
    headers = [("Content-Type", "text/plain"), *((spell(name), value) for value in given), ("X-Other", "1")]
    constant, sent = headers.copy(), given if added is None else [(", ".join(given) + added).removeprefix(", ")]

    def app(environ, start_response):
        count(environ)
        start_response("200 OK", headers)
        return [b"x"]

    browser = Browser(wrap(app))
    first, second = browser.get(), browser.get()
    cookies = first.all("Set-Cookie")
    assert re.match("sid=", cookies.pop()) and (cookies if name == "Set-Cookie" else first.all(name)) == sent
    assert second.all(name) == (sent if name == "Vary" else given)  # it has no cookie of ours
    assert first["X-Other"] == "1" and headers == constant


# Cookie headers in which the session's id is to be found, and in which it isn't.
FOUND = [
    *("sid={uid}", "a=1; sid={uid}; b=2", "a=1;sid={uid};b=2", " a = 1 ;\t sid = {uid}\t; ", 'sid="{uid}"'),
    *("sid; {uid}; sid={uid}; sid", ";;; ; =; ==;sid={uid};;", "sid=; sid={uid}"),
    *('a="b; sid={uid}', 'a="; sid={uid}; b="', 'a="\\"; sid={uid}; b="\\', '$Version="1"; sid="{uid}"; $Path="/"'),
    "sid={uid}; Path=/; HttpOnly; Secure; expires=Thu, 01 Jan 1970 00:00:00 GMT",
    *("a=" + "x" * 8192 + "; sid={uid}", "sid={uid}; a=" + "=;" * 4096, "sid=" + "x" * 8192 + "; sid={uid}"),
    *("\0=\0; a\0; sid={uid}", "\xff\xfe=\xe9\x80; sid={uid}", "caf\xc3\xa9=\xe2\x82\xac; sid={uid}"),
    *('a={{"b":[1,2;3],"c":"d"}}; sid={uid}', "a=1,2, 3; sid={uid}"),
    "xsid=1; sid2=2; SID=3; __Host-sid=4; sid={uid}",
    *("sid={foreign[0]}; sid={uid}", "sid={foreign[0]}; sid = {uid}", 'sid={foreign[0]};sid="{uid}"'),
    *('sid="{uid}"; sid={foreign[0]}', "sid={foreign[0]}; sid={foreign[1]}; sid={foreign[2]}; sid={uid}"),
    "sid=; sid={foreign[0]}; sid=x; sid={foreign[1]}; sid={foreign[1]}; sid={foreign[2]}; sid={uid}",
]
NOT_FOUND = [
    *("", "sid=", "sid=../../../../etc/passwd; sid=..%2f" + "." * 38, "sid={short}", "sid={uid}A"),
    "sid={short}\xe9; sid={short}+; sid={short}\0; sid={short}\u0660",
    *("SID={uid}", "xsid={uid}; __Host-sid={uid}; $sid={uid}", "a=sid={uid}; b:sid={uid}", "a=1\r\nsid={uid}"),
    "sid={foreign[0]}; sid={foreign[1]}; sid={foreign[2]}; sid={foreign[3]}; sid={uid}",
]
# What a neighbour can put in front of ours over https: with Domain= from a sibling domain, or over http.
PLANTED = [
    *("sid={uid}", "__Secure-sid={uid}", "__host-sid={uid}", "x=1,__Host-sid={uid}", "\xa0__Host-sid={uid}"),
    *("x=1; \x85__Host-sid={uid}", "\x1c__Host-sid={uid}; \x0b__Host-sid={uid}", '"__Host-sid"={uid}'),
    *("=__Host-sid={uid}", "__Host-sid%3D={uid}; __Host-sid[]={uid}"),
]


@pytest.mark.parametrize(
    "scheme, headers, text, asked",
    [("http", FOUND, "known", 4), ("http", NOT_FOUND, "nobody", 4), ("https", PLANTED, "nobody", 0)],
)
def test_our_cookie_is_found_among_junk_and_no_junk_reaches_the_store(store_of_kind, scheme, headers, text, asked):
    (application, uid), opened = known_visitor(store_of_kind), []
    note_calls(store_of_kind, "open", opened)
    for header in headers:
        opened.clear()
        header = header.format(uid=uid, short=uid[:42], foreign=FOREIGN)
        assert Browser(application, scheme).get(HTTP_COOKIE=header).text == text, header
        assert len(opened) == len(set(opened)) <= asked and all(re.fullmatch(UID, each) for each in opened), header


def test_a_hundred_thousand_random_headers_raise_nothing_and_never_hide_our_cookie():
    chance, opened = random.Random(20), []
    application, uid = known_visitor(MemoryStore())
    note_calls(application.store, "open", opened)
    letters = '=;," \t\\$%/.-_:{}[]()<>@!?#\0\r\n\x7f\x80\x85\xa0\xe9\xff' + "abcsidSID019"
    names = ["sid", "sid ", "Sid", "xsid", "sid2", "__Host-sid", "$sid", '"sid"', "si", "\xa0x", ""]
    bad_values = [uid[:42], uid + "A", uid[:42] + "+", uid[:42] + "\xe9", "", '"', "../" * 14 + "x", "x" * 300]
    junk = ["".join(chance.choices(letters, k=chance.choice((0, 1, 3, 10, 40)))) for _ in range(3000)]
    junk += [f"{chance.choice(names)}={chance.choice(bad_values)}" for _ in range(1000)]
    junk = [piece for piece in junk if not re.search("[,;]?\\s*sid\\s*=\\W*" + UID, piece)]
    environ, started = Browser(None).environ(), []
    for i in range(100_000):
        pieces = chance.choices(junk, k=chance.randrange(6))
        pieces += [f"sid={foreign}" for foreign in FOREIGN[: chance.choice((0, 0, 0, 1, 3))]]
        if i % 2:
            pieces.append(chance.choice((f"sid={uid}", f" sid = {uid} ", f'sid="{uid}"')))
        chance.shuffle(pieces)
        header = chance.choice(("; ", ";")).join(pieces)
        body = application({**environ, "HTTP_COOKIE": header}, lambda *args: started.append(args))
        assert body == [b"known" if i % 2 else b"nobody"], header
    assert len(started) == 100_000 and len(application.store) == 1
    assert set(opened) <= {uid, *FOREIGN}


@pytest.mark.parametrize("piece", [";", "a=b; ", '"', "sid=", "sid=x;", " ", "\\", ",", "=", "sid=" + "a" * 43 + "; "])
def test_reading_cookies_takes_linear_time(piece):
    (application, _), environ = known_visitor(MemoryStore()), Browser(None).environ()

    def cost(size):
        asked = {**environ, "HTTP_COOKIE": (piece * (size // len(piece) + 1))[:size]}
        request = functools.partial(application, start_response=lambda *args: None)
        return min(timeit.repeat(lambda: request(asked.copy()), timer=time.thread_time, number=1, repeat=7))

    # Eight times the length; quadratic would be 64 times the cost.
    assert cost(65536) < 30 * cost(8192) + 0.001


# WSGI
# ---------------------------------------------------------------------------


def tell(environ):
    return b"%d" % visited(ISession(environ))


def file_of(environ):
    return environ.get("wsgi.file_wrapper", FileWrapper)(io.BytesIO(b"one two"), 4)  # not every server has one


BOTH = b"one ", b"two"

# Each touches the session at the last moment that it can.
ANSWERS = {
    "a list": (script("200 OK", count, [*BOTH]), "200 OK", b"one two"),
    "a tuple": (script("200 OK", count, BOTH), "200 OK", b"one two"),
    "an empty list": (script("200 OK", count, []), "200 OK", b""),
    "a file": (script("200 OK", count, file_of), "200 OK", b"one two"),
    "a body": (script("200 OK", ..., count, *BOTH), "200 OK", b"one two"),
    "a body that starts the response": (script(..., "200 OK", count, *BOTH), "200 OK", b"one two"),
    "an empty piece first": (script("200 OK", ..., count, b"", *BOTH), "200 OK", b"one two"),
    "no piece": (script(..., "200 OK", count), "200 OK", b""),
    "write()": (script("200 OK", count, *BOTH), "200 OK", b"one two"),
    "write() and a body": (script("200 OK", count, b"one ", ..., b"two"), "200 OK", b"one two"),
    "an error": (script("200 OK", "400 Oops", count, [*BOTH], headers=[("X-First", "1")]), "400 Oops", b"one two"),
    "an error in the body": (script("200 OK", ..., "400 Oops", count, *BOTH), "400 Oops", b"one two"),
    "an error after an empty piece": (script("200 OK", ..., count, b"", "400 Oops", *BOTH), "200 OK", b"one two"),
    "no content": (script("204 No Content", count, []), "204 No Content", b""),
    "not modified": (script("304 Not Modified", count, ...), "304 Not Modified", b""),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_happens_before_the_first_piece_of_the_body_is_saved_before_the_headers_leave(kind):
    app, status, body = ANSWERS[kind]
    store, closed = MemoryStore(), app.closed
    browser = Browser(wrap(app, store, patience=0))
    note_calls(store, "save", browser.events)
    response = browser.get(**{"wsgi.file_wrapper": FileWrapper})
    assert (type(browser.events[0]), browser.events[1], response.body) == (Session, status, body)
    assert app.closed - closed == (kind in ("a body", "no piece", "not modified") or "body" in kind or "piece" in kind)
    assert len(response.all("Set-Cookie")) == 1
    assert response["Vary"] == "Cookie" and response["X-First"] is None
    browser.application = wrap(counter_app, store, patience=0)
    assert browser.get().text == "2"


@pytest.mark.parametrize("kind", [list, tuple, type("ServersWrapper", (FileWrapper,), {})])
def test_lists_tuples_and_files_reach_the_server_as_they_are(kind):
    body, wrapper = kind(io.BytesIO(b"x")), kind if issubclass(kind, FileWrapper) else FileWrapper
    environ = Browser(None).environ(**{"wsgi.file_wrapper": wrapper})
    assert SessionMiddleware(script("200 OK", count, lambda _: body))(environ, lambda *args: None) is body


def test_a_request_that_never_asks_for_its_session_changes_no_header_and_asks_no_store():
    store = implementer(IStore)(type("StoreThatCanDoNothing", (), {}))()
    response = Browser(wrap(script("200 OK", [b"x"]), store)).get(HTTP_COOKIE="sid=" + FOREIGN[0])
    assert response.headers == [("Content-Type", "text/plain")]


def held(app):
    """The browser of a visitor who was counted once; *app* may hold the session and let go of it, nobody waits."""

    def inner(environ, start_response):
        return (counter_app if environ["PATH_INFO"] == "/count" else app)(environ, start_response)

    browser = Browser(SessionMiddleware(inner, patience=0))
    browser.get("/count")
    browser.events.clear()
    return browser


def call(browser):
    """What the application answers to a server that does nothing with it."""
    return browser.application(browser.environ(), lambda *args: None)


def begin(browser):
    """Ask for the first piece, and close nothing."""
    browser.body = call(browser)
    next(browser.body)


# What an application does, what is done with its body, what that raises, what was sent, whether the body was closed.
ENDINGS = [
    (["200 OK", LookupError], Browser.get, LookupError, [], 0),
    (["200 OK", ..., LookupError], Browser.get, LookupError, [], 1),
    (["200 OK", ..., b"one", LookupError], Browser.get, LookupError, ["200 OK", b"one"], 1),
    (["200 OK", b"one", LookupError], Browser.get, LookupError, ["200 OK", b"one"], 0),
    (["200 OK", ..., b"one", "500 Too late", b"two"], Browser.get, LookupError, ["200 OK", b"one"], 1),
    (["200 OK", ..., LookupError], begin, LookupError, [], 0),
    ([..., b"x"], lambda browser: next(call(browser)), AssertionError, [], 0),  # without start_response
    ([...], lambda browser: next(call(browser)), AssertionError, [], 0),
    ([[b"x"]], call, AssertionError, [], 0),
    (["200 OK", ..., *BOTH], Browser.get, None, ["200 OK", *BOTH], 1),
    (["200 OK", ..., *BOTH], lambda browser: browser.get(most=1), None, ["200 OK", BOTH[0]], 1),
    (["200 OK", ..., *BOTH], lambda browser: call(browser).close(), None, [], 1),
    (["200 OK", ..., *BOTH], lambda browser: call(browser) and None, None, [], 0),
]


@pytest.mark.parametrize("steps, treat, error, sent, closed", ENDINGS)
def test_however_a_response_ends_its_body_is_closed_and_the_session_let_go(steps, treat, error, sent, closed):
    app = script(count, *steps)
    browser = held(app)
    match = "without calling start_response" if error is AssertionError else None
    with pytest.raises(error, match=match) if error else contextlib.nullcontext():
        treat(browser)
    gc.collect()
    assert (browser.events, app.closed) == (sent, closed)
    assert browser.get("/count").text == "3"


@pytest.mark.parametrize("failing", [LookupError, "500 Oops", "503 Later"])
def test_a_request_that_fails_saves_nothing_and_sends_no_cookie(store_of_kind, failing):
    def see(session):
        session.seen = getattr(session, "seen", 0) + 1

    guest = Guest(store_of_kind, persistent=True, patience=0)
    for status, kept in [(failing, 0), ("200 OK", 1), (failing, 1), ("200 OK", 2)]:
        with contextlib.suppress(LookupError):
            guest.do(see, **{"test.status": status})
            assert len(guest.response.all("Set-Cookie")) == (status == "200 OK")
        assert len(store_of_kind) == bool(kept)
        if kept and isinstance(store_of_kind, SQLiteStore):  # (in memory attributes are live)
            assert store_of_kind.peek(guest.sid).seen == kept
        store_of_kind.clock.advance(1000)


def serve_as_waitress_does(application, reads=True, sent=False):
    """Do a request in a task that keeps the environ for as long as it takes; a weak reference to that task."""

    def start_response(status, headers, exc_info=None):
        try:
            if exc_info and task.sent:
                raise exc_info[1].with_traceback(exc_info[2])
        finally:
            exc_info = None
        return lambda data: setattr(task, "sent", True)

    task = Browser(None)
    task.given, task.sent = task.environ(), sent
    with contextlib.suppress(LookupError, AssertionError):
        result = application(task.given, start_response)
        with contextlib.closing(result) if hasattr(result, "close") else contextlib.nullcontext():
            for _ in result if reads else ():
                task.sent = True
    return weakref.ref(task)


@pytest.mark.parametrize("first", [[], [count]], ids=["untouched", "touched"])
@pytest.mark.parametrize("how", [{}, {"reads": False}, {"sent": True}], ids=str)
@pytest.mark.parametrize("replaced", [[], ["400 Oops"]], ids=["", "replaced"])
@pytest.mark.parametrize("steps", [*(row[0] for row in ENDINGS), ["200 OK", [b"x"]], ["200 OK", b"one", [b"two"]]])
@CPYTHON
def test_no_request_is_left_to_the_garbage_collector(steps, replaced, how, first):
    application = SessionMiddleware(script(*first, *steps[:1], *replaced, *steps[1:]))
    gc.disable()
    try:
        assert serve_as_waitress_does(application, **how)() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("streams", [False, True])
def test_in_a_body_write_works_but_to_start_again_or_to_send_more_when_all_is_over_is_an_error(streams):
    def app(environ, start_response):
        def body():
            yield b"one "
            late[1](b"two")

        late.extend((start_response, start_response("200 OK", [("Content-Type", "text/plain")])))
        with pytest.raises(AssertionError, match="twice"):
            start_response("200 OK", [])
        return body() if streams else [*BOTH]

    late = []
    assert Browser(SessionMiddleware(app)).get().text == "one two"
    start_response, write = late
    with pytest.raises(AssertionError, match="the response is over"):
        write(b"y")
    with pytest.raises(AssertionError, match="twice"):
        start_response("200 OK", [])
    with pytest.raises(LookupError, match="too late"):
        start_response("500 Oops", [], (LookupError, LookupError("too late"), None))


@pytest.mark.parametrize("kind", ["list", "file", "body"])
def test_nothing_is_sent_and_the_body_is_closed_when_its_session_cannot_be_saved(kind):
    file, store = io.BytesIO(b"x"), MemoryStore(strict=True)
    closing = type("ClosingList", (list,), {"close": lambda self: file.close()})
    answer = {"list": closing([b"x"]), "file": FileWrapper(file), "body": file}[kind]
    browser = Browser(wrap(script(lambda environ: put(bad=open)(ISession(environ)), "200 OK", lambda _: answer), store))
    with pytest.raises(NotStorable):
        browser.get(**{"wsgi.file_wrapper": FileWrapper})
    assert file.closed and browser.events == []


def test_nested_middlewares_with_the_same_cookie_share_a_session_and_those_with_different_ones_have_one_each():
    def around(inner):
        def app(environ, start_response):
            count(environ)
            before = ISession(environ)
            result = inner(environ, start_response)
            same.append(ISession(environ) is before)
            return result

        return app

    store, same = MemoryStore(), []
    between = wrap(wrap(counter_app, store, patience=0), cookie="between")  # however far out the other one is
    for application, cookies, text in [
        (wrap(wrap(counter_app), store), {"sid"}, "2"),
        (wrap(around(between), store), {"sid"}, "4"),
        (wrap(around(wrap(counter_app, cookie="inner")), cookie="outer"), {"inner", "outer"}, "2"),
        (wrap(wrap(around(wrap(counter_app, store)), cookie="inner"), store), {"sid", "inner"}, "2"),
    ]:
        browser = Browser(application)
        response = browser.get()
        assert len(response.all("Set-Cookie")) == len(cookies) and response.all("Vary") == ["Cookie"]
        assert response.all("Cache-Control") == ['no-cache="Set-Cookie"']
        assert (browser.get().text, set(browser.cookies)) == (text, cookies)
        assert len(set(browser.cookies.values())) == len(cookies)
    assert (len(store), same) == (3, [True] * 6)


def test_a_second_try_with_the_same_environ_is_a_request_of_its_own():
    tries = iter([LookupError, "200 OK", "200 OK"])
    application = SessionMiddleware(script(count, lambda environ: next(tries), lambda environ: [tell(environ)]))

    def retrying(environ, start_response):
        with contextlib.suppress(LookupError):
            return application(environ, start_response)
        return application(environ, start_response)

    browser = Browser(retrying)
    first, second = browser.get(), browser.get()
    assert (first.text, second.text, len(first.all("Set-Cookie")), len(application.store)) == ("2", "4", 1, 1)


def test_looking_at_the_session_after_its_request_failed_holds_nothing():
    browser = held(script(LookupError))
    environ = browser.environ()
    with pytest.raises(LookupError):
        browser.application(environ, lambda *args: None)
    assert ICounter(ISession(environ)).hits == 1  # as an error page around the middleware does
    assert browser.get("/count").text == "2"


def test_a_look_sends_no_cookie_and_finds_nothing_by_an_id_that_is_unknown_or_has_moved(store_of_kind):
    guest = Guest(store_of_kind, persistent=True)
    guest.do(put(n=1))
    old = dict(guest.cookies)
    guest.do(RENEW)
    store_of_kind.clock.advance(1000)
    assert guest.do(lambda look: look.n, find=minisess.peek) == 1
    assert (guest.was_told, guest.response.all("Vary")) == (None, ["Cookie"])
    for cookies in (old, {"sid": FOREIGN[0]}):
        assert Guest(store_of_kind, cookies).do(lambda look: look, find=minisess.peek) is None


def test_first_used_after_the_headers_a_session_is_saved_and_without_Vary_warned_about(store_of_kind, caplog):
    browser = Browser(wrap(counter_app, store_of_kind, patience=0))
    browser.get()
    for header, warned in [("Vary", 0), ("X-Vary", 1)]:
        late = script("200 OK", ..., b"x", count, headers=[(header, "Accept, COOKIE")])
        browser.application = wrap(late, store_of_kind, patience=0)
        assert [browser.get()["Set-Cookie"] for _ in range(3)] == [None] * 3
        records = [record for record in caplog.records if record.event == "vary"]
        assert len(records) == warned and all(os.path.basename(__file__) in record.getMessage() for record in records)
    assert ICounter(store_of_kind.peek(browser.cookies["sid"])).hits == 7


@pytest.mark.parametrize("scheme, said", [*itertools.product(("http", "https"), repeat=2)])
@pytest.mark.parametrize("secure", [None, True, False])
def test_a_proxy_that_says_https_to_a_server_that_doesnt_know_is_warned_about_once(caplog, scheme, secure, said):
    application = wrap(counter_app, secure=secure)
    for _ in range(3):
        Browser(application, scheme).get(HTTP_X_FORWARDED_PROTO=said)
    warned = (scheme, secure, said) == ("http", None, "https")
    assert [record.event for record in caplog.records] == ["insecure"] * warned
    assert "secure=True" in caplog.text or not warned


def test_two_copies_of_the_module_in_one_process_dont_meet(monkeypatch):
    spec = importlib.util.spec_from_file_location("vendored_minisess", minisess.__file__)
    vendored = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, vendored)
    spec.loader.exec_module(vendored)

    def app(environ, start_response):
        theirs = vendored.ISession(environ)
        theirs.seen = getattr(theirs, "seen", 0) + 1
        with pytest.raises(TypeError, match="another copy.*vendored_minisess"):
            ISession(environ).setComponent(vendored.ISession, theirs)
        return plain(start_response, f"{theirs.seen} {visited(ISession(environ))}")

    browser = Browser(vendored.SessionMiddleware(wrap(app), cookie="other"))
    assert [browser.get().text for _ in range(3)] == ["1 1", "2 2", "3 3"]
    assert len(set(browser.cookies.values())) == 2


# Security
# ---------------------------------------------------------------------------


def test_ids_are_256_random_bits_that_no_seed_determines():
    store, uids = MemoryStore(), []
    for _ in range(200):
        random.seed(1)
        uids.append(store.create(1, 1).uid)
    assert all(re.fullmatch(UID, uid) for uid in uids) and len(set(uids)) == 200
    raw = [int.from_bytes(base64.urlsafe_b64decode(uid + "="), "big") for uid in uids]
    assert [{number >> bit & 1 for number in raw} for bit in range(256)] == [{0, 1}] * 256


@CPYTHON
def test_a_client_cannot_make_the_server_keep_anything_by_looking():
    def look_often():
        for _ in range(300):
            guest.cookies["sid"] = other.create(1, 1).uid
            guest.do(lambda s: (getattr(s, "name", None), ICounter in s, s.owner, vars(s), repr(s)))
            assert guest.was_told is None and guest.response["Vary"] == "Cookie"
        guest.events.clear()

    store, other = MemoryStore(), MemoryStore()
    guest = Guest(store)
    look_often()
    assert TestMemoryStore().allocated(look_often) < 300 * 50
    assert len(store) == 0


def test_what_the_client_sends_never_comes_back_in_a_header_and_an_id_that_it_made_up_is_never_adopted():
    evil = 'sid=x\r\nX-Evil: 1; sid="\r\nSet-Cookie: a=b"; sid=' + "%0d%0a" * 7 + "x; sid=" + FOREIGN[0]
    guest = Guest(MemoryStore(), secure=True)
    guest.do(put(n=1), HTTP_COOKIE=evil + "; " + evil.replace("sid=", "__Host-sid="))
    assert {name for name, _ in guest.response.headers} == {"Content-Type", "Vary", "Set-Cookie", "Cache-Control"}
    sent = "".join(value for _, value in guest.response.headers)
    assert not re.search("\r|\n|evil|" + FOREIGN[0], sent, re.IGNORECASE)


@pytest.mark.parametrize("then", [put(new=1), LOG_IN, vars])
@pytest.mark.parametrize("before", [put(old=1), LOG_IN, vars])
def test_a_session_that_follows_an_expired_one_gets_a_cookie_if_it_is_stored(store_of_kind, before, then):
    def work(environ):
        ISession(environ).expire()
        then(ISession(environ))
        return ISession(environ).handle

    guest = Guest(store_of_kind)
    guest.do(before)
    handle = guest.do(work, find=lambda environ: environ)
    assert (guest.sid is None) == (then is vars)
    assert (guest.do(lambda session: session.handle) == handle) == (then is not vars)


@pytest.mark.parametrize("move", [RENEW, LOG_IN, EXPIRE], ids=["renew", "login", "logout"])
def test_a_request_in_flight_with_the_old_id_is_not_given_the_new_one(store_of_kind, move):
    def work(session):
        session.basket = 2
        session.release()
        victim.do(move)
        with pytest.raises(SessionError, match=r"before session\.release\(\)|ended"):
            session.login("eve")
        return visited(session) if session.ended else "not known yet"  # a store outside is asked by ISession

    attacker = Guest(store_of_kind, persistent=True)
    attacker.do(put(basket=1))
    planted, victim = attacker.sid, Guest(store_of_kind, attacker.cookies, persistent=True)
    assert attacker.do(work) == (1 if isinstance(store_of_kind, MemoryStore) else "not known yet")
    assert attacker.was_told is None  # neither the new id, nor a deletion of what the login just set
    assert attacker.sid == planted and attacker.do(vars) == {}
    assert victim.do(vars) == ({} if move is EXPIRE else {"basket": 2})


@pytest.mark.parametrize("persistent", [False, True])
def test_a_login_that_comes_in_as_soon_as_a_request_lets_go_is_for_its_own_client_alone(persistent):
    class Overtaken(MemoryStore):
        def save(self, session):
            super().save(session)
            if waiting:
                waiting.pop().get("/login")

    waiting, app = [], acting(visited, login=LOG_IN)
    attacker = Browser(SessionMiddleware(app, Overtaken(), persistent=persistent))  # whose body is a list
    attacker.get()
    victim = Browser(attacker.application, cookies=attacker.cookies)
    waiting.append(victim)
    response = attacker.get()
    assert victim.cookies["sid"] not in str(response.headers)
    assert (attacker.get().text, victim.get().text) == ("1", "3")


def test_the_log_tells_programs_what_happens_to_which_session_of_whom_and_why(store_of_kind, caplog):
    caplog.set_level(logging.INFO, logger="minisess")
    store, guest = store_of_kind, Guest(store_of_kind, max_lifetime=3000)
    works = (vars, visited, RENEW, LOG_IN, operator.methodcaller("login", "bob"), EXPIRE)
    look, use, renew, log_in, log_bob_in, log_out = (functools.partial(guest.do, work) for work in works)
    for act, pause, *expected in [
        (look, 0),
        (use, 0, ("created", "new", None, None)),
        (use, 0),
        (log_in, 0, ("login", "new", "ann", None)),
        (renew, 0, ("renewed", "new", "ann", None)),
        (log_bob_in, 0, ("login", "new", "bob", None), ("ended", "old", "ann", "another")),
        (log_out, 0, ("ended", "old", "bob", "logout")),
        (log_in, 0, ("login", "new", "ann", None), ("created", "new", "ann", None)),
        (lambda: store.expireAll("ann"), 0, ("ended", "old", "ann", "all")),
        (use, 0, ("created", "new", None, None)),
        (store.sweep, 1800, ("ended", "old", None, "idle")),
        (log_in, 0, ("login", "new", "ann", None), ("created", "new", "ann", None)),
        (use, 1500),
        (look, 1500, ("ended", "old", "ann", "absolute")),
        (log_in, 0, ("login", "new", "ann", None), ("created", "new", "ann", None)),
        (look, 1800, ("ended", "old", "ann", "idle")),
    ]:
        caplog.clear()
        before = store.peek(guest.sid or "")
        store.clock.advance(pause)
        act()
        after = store.peek(guest.sid or "")
        known = {each.handle: name for each, name in ((before, "old"), (after, "new")) if each}
        assert {(r.levelname, bool(r.exc_info), len(r.session)) for r in caplog.records} <= {("INFO", False, 16)}
        assert not any(each.uid in caplog.text for each in (before, after) if each)
        records = [(r.event, known.get(r.session), r.owner, r.reason) for r in caplog.records if r.event != "unknown"]
        assert records == expected


# Frameworks
# ---------------------------------------------------------------------------


# The README's code, which is run below, has Flask, Django, Bottle and Pyramid.
@pytest.mark.parametrize("name", ["falcon", "cherrypy"])
def test_a_frameworks_request_adapts_to_its_session(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own, about their age
        framework = package(name)
        if name == "falcon":
            app, home = framework.App(), types.SimpleNamespace()
            home.on_get = lambda request, response: setattr(response, "text", str(visited(ISession(request))))
            app.add_route("/", home)
        else:
            framework.config.update({"environment": "embedded"})
            app = framework.Application(framework.expose(lambda: str(visited(ISession(framework.serving.request)))))
        browser = Browser(SessionMiddleware(validator(app)))
        assert [browser.get().text for _ in range(2)] == ["1", "2"]


def test_starlettes_middleware_closes_no_body_and_the_session_is_let_go():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wsgi, client = package("starlette.middleware.wsgi"), package("starlette.testclient")
        browser = held(script("200 OK", ..., count, LookupError))
        visitor = client.TestClient(wsgi.WSGIMiddleware(browser.application), cookies=browser.cookies)
        for _ in range(2):
            with pytest.raises(LookupError):
                visitor.get("/")
        assert visitor.get("/count").text == "4"


def test_gevent_that_patches_late_stops_no_request_that_waits():
    """The module is imported and has served requests; then everything is patched."""
    package("gevent")
    code = """
        visitor = Browser(SessionMiddleware(SLOW))
        visitor.get()
        from gevent import joinall, monkey, spawn
        monkey.patch_all()
        jobs = [spawn(visitor.get) for _ in range(5)]
        joinall(jobs, timeout=8)
        print([job.value.text for job in jobs])"""
    done = run_python(code)
    assert done.stdout == "['4', '6', '8', '10', '12']\n", done.stderr


# Servers and clients
# ---------------------------------------------------------------------------


def endless(environ):
    try:
        while True:
            yield b"x" * 65536
    finally:
        count(environ)


SLOW = script(count, lambda environ: time.sleep(0.2), "200 OK", lambda environ: [tell(environ)])
SERVED = {f"/{kind}": app for kind, (app, _, _) in ANSWERS.items()} | {
    "/list": script("200 OK", lambda environ: [tell(environ)]),
    "/nothing": script(count, [b"no start_response"]),
    "/boom": script("200 OK", ..., tell, LookupError),
    "/lazy": script("200 OK", ..., count, LookupError),
    "/endless": script("200 OK", count, endless),
    "/slow": SLOW,
    "/look": script("200 OK", lambda environ: [b"%d" % ICounter(minisess.peek(environ)).hits]),
}
site = SessionMiddleware(lambda environ, start: SERVED[environ["PATH_INFO"]](environ, start), patience=2)
GUNICORN = "-m gunicorn --bind=127.0.0.1:PORT test_minisess:site"
SERVERS = {
    "wsgiref": "-c import examples as e, test_minisess as t; "
    "t.make_server('', PORT, t.site, e.ThreadingServer).serve_forever()",
    "waitress": "-m waitress --listen=127.0.0.1:PORT test_minisess:site",
    "gunicorn": f"{GUNICORN} --worker-class=gthread --threads=4",
    "gevent": f"{GUNICORN} --worker-class=gevent",
    "gevent preloaded": f"{GUNICORN} --worker-class=gevent --preload",
    "twisted": "-m twisted web --listen=tcp:PORT:interface=127.0.0.1 --wsgi=test_minisess.site",
}


@pytest.fixture(scope="module", params=SERVERS)
def real_server(request):
    """The name and port of a real server."""
    name = request.param
    for needed in re.findall("waitress|gunicorn|gevent|twisted", SERVERS[name]):
        package(needed)
    words = SERVERS[name].split(" ", 1 if name == "wsgiref" else -1)
    path = os.pathsep.join(filter(None, sys.path))
    with running([sys.executable, *words], env={**os.environ, "PYTHONPATH": path}, cwd=HERE) as server:
        yield name, server.port


@pytest.mark.parametrize("kind", sorted(ANSWERS.keys() - {"an error after an empty piece"}))  # they differ in that
def test_real_servers_send_the_body_and_one_cookie(real_server, kind):
    name, port = real_server
    client = Browser(port)
    response = client.get(urllib.parse.quote("/" + kind))
    assert (response.status[:3], response.body) == (ANSWERS[kind][1][:3], ANSWERS[kind][2])
    assert len(response.all("Set-Cookie")) == 1 and response.all("Vary") == ["Cookie"]
    if kind.startswith("a body") and name != "wsgiref":
        assert response["Transfer-Encoding"] == "chunked"
    response = client.get("/list")
    assert response.text == "2"
    if name in ("wsgiref", "waitress"):  # others never count a body
        assert response["Content-Length"] == "1" and response["Transfer-Encoding"] is None


def test_real_servers_survive_broken_applications_and_clients_that_go_away_and_the_session_is_free(real_server):
    client = Browser(real_server[1])
    client.get("/list")
    for path, hits in ("/boom", "3"), ("/nothing", "5"), ("/lazy", "7"):
        with contextlib.suppress(http.client.HTTPException, OSError):  # the connection is cut
            client.get(path)
        begun = time.monotonic()
        assert client.get("/list").text == hits
        assert time.monotonic() - begun < 1.5  # nobody had to wait for *patience* seconds
    with socket.create_connection(("127.0.0.1", client.application), 10) as connection:
        connection.sendall(f"GET /endless HTTP/1.1\r\nHost: x\r\nCookie: {client.cookie}\r\n\r\n".encode())
        assert connection.recv(1000)
    wait_until(lambda: client.get("/look").text == "9")  # the body was closed


def test_real_servers_let_the_next_request_wait_for_the_session(real_server):
    client = Browser(real_server[1])
    client.get("/list")
    assert {response.text for response in at_once(*[lambda: client.get("/slow")] * 3)} == {"3", "5", "7"}


# Asks twice for what stands behind the #, or for /count, and shows what it may read of that.
PAGE = """<!doctype html><title>waiting</title><p></p><script>
(async () => {
  const url = decodeURIComponent(location.hash.slice(1)) || "/count";
  let seen = "nothing";
  for (const mode of ["cors", "no-cors"]) {
    try { seen = await (await fetch(url, {credentials: "include", mode})).text() || seen; } catch (error) {}
  }
  document.querySelector("p").textContent = seen;
  document.title = "done";
})();
</script>"""


def page_app(environ, start_response):
    actions = {"/count": visited, "/total": lambda session: ICounter(session).hits, "/out": Session.expire}
    if environ["PATH_INFO"] in actions:
        return plain(start_response, actions[environ["PATH_INFO"]](ISession(environ)))
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
    return [PAGE.encode()]


@contextlib.contextmanager
def in_thread(application):
    """wsgiref's server in a thread; answers its port."""
    from examples import ThreadingServer

    quiet = type("Quiet", (WSGIRequestHandler,), {"log_message": lambda *args: None})
    with make_server("127.0.0.1", 0, application, ThreadingServer, quiet) as server:
        thread = Background(server.serve_forever, 0.02)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(10)


@pytest.fixture
def chromium(tmp_path):
    """Chromium with a profile of its own, driven by selenium."""
    webdriver, service = package("selenium.webdriver"), package("selenium.webdriver.chrome.service")
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    switches = """headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
        disable-component-update disable-sync disable-dev-shm-usage no-proxy-server""".split()
    for switch in [*switches, f"user-data-dir={tmp_path / 'chromium'}"]:
        options.add_argument(f"--{switch}")
    path = program("chromedriver", "/usr/bin/chromedriver", "/usr/lib/chromium/chromedriver")
    driver = webdriver.Chrome(options=options, service=service.Service(path))
    driver.set_page_load_timeout(20)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """A page in a browser; what a person does with it."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get("about:blank")  # what is the same but for its # isn't loaded again
        driver.get(url)

    def until(self, condition, *args):
        """Wait until the JavaScript *condition* holds; its value."""
        ready, error = "document.readyState === 'complete'", package("selenium.common.exceptions").WebDriverException
        return wait_until(lambda: self.driver.execute_script(f"return {ready} && ({condition})", *args), error)

    def text(self, selector="body"):
        return self.until("document.querySelector(arguments[0]).innerText", selector)

    def press(self, selector):
        """Click, and wait for the page that comes."""
        self.driver.execute_script("window.before = true")
        self.driver.find_element("css selector", selector).click()
        self.until("!window.before")


@pytest.mark.parametrize(("secure", "name"), [(False, "sid"), (True, "__Host-sid")])  # 127.0.0.1 passes for secure
def test_a_browser_counts_and_no_script_of_any_origin_sees_the_session(chromium, secure, name):
    def shown(url):
        page = Page(chromium, url)
        page.until("document.title === 'done'")
        assert chromium.execute_script("return document.cookie") == ""
        return page.text("p")

    with in_thread(wrap(page_app, secure=secure)) as port, in_thread(page_app) as other_port:
        ours = f"http://127.0.0.1:{port}"
        assert [shown(ours + "/"), shown(ours + "/")] == ["2", "4"]
        (cookie,) = (c for c in chromium.get_cookies() if c["name"] == name)
        assert cookie["httpOnly"] and cookie["secure"] == secure and cookie["sameSite"] == "Lax"
        assert re.fullmatch(UID, cookie["value"]) and cookie["path"] == "/" and "expiry" not in cookie
        # Another port is another origin of the same site: its requests carry the cookie, it can't read the answers.
        for host in ("127.0.0.1", "localhost"):  # the latter is another site: no cookie
            assert shown(f"http://{host}:{other_port}/#{ours}/count") == "nothing"
            assert Page(chromium, ours + "/total").text() == "6"
        Page(chromium, ours + "/out")
        assert not [c for c in chromium.get_cookies() if c["name"] == name]
        assert shown(ours + "/") == "2"


# Examples
# ---------------------------------------------------------------------------

EXAMPLES = sorted({path.stem for path in pathlib.Path(HERE, "examples").glob("*.py")} - {"__init__", "benchmark"})


@contextlib.contextmanager
def example(name, **environment):
    """``python -m examples.NAME`` in the checkout; answers (process, port)."""
    command = [sys.executable, "-B", "-m", f"examples.{name}", "0"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=HERE, env={**os.environ, **environment}, **options) as process:
        try:
            said = process.stdout.readline()
            port = re.match(r"http://127\.0\.0\.1:(\d+)/", said)
            assert port, said + process.stdout.read()
            yield process, int(port[1])
        finally:
            process.kill()


def token_on(page):
    """What makes a form on this page one of ours."""
    return re.search(r'name=token value="([^"]+)"', page)[1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_shows_and_what_to_try(name):
    tree = ast.parse(pathlib.Path(HERE, "examples", f"{name}.py").read_text("utf-8"))
    text = ast.get_docstring(tree)
    assert f"python3 -m examples.{name}" in text and "curl " in text
    assert "application" in [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    assert f"`{name}`" in readme()


def test_two_applications_share_a_session_and_never_meet_and_ctrl_c_ends_them_quietly():
    with example("mixed") as (process, port):
        visitor = Browser(port)
        paths = ["/shop/tea", "/quiz/yes", "/shop/milk"]
        told = ["In your basket: tea\n", "Answers so far: 1\n", "In your basket: tea, milk\n"]
        assert [visitor.get(path).text for path in paths] == told
        assert re.fullmatch(r"<Session \w{16}, stored, keeps IItems, IItems>\n", visitor.get().text)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and all('"GET /' in line for line in said.splitlines())


def test_the_cart_is_shared_by_processes_survives_them_and_can_be_opened_by_any_program(tmp_path):
    from examples.cart import ICart

    path = tmp_path / "cart.sqlite3"
    where = {"CART": str(path), "CART_SECRET": SECRET}
    with example("cart", **where) as (_, port), example("cart", **where) as (victim, other):
        visitor = Browser(port)
        assert visitor.post(thing="tea").text.startswith("1 tea (")
        assert Browser(other, cookies=visitor.cookies).post(thing="tea").text.startswith("2 tea (")
        victim.kill()
        assert visitor.get().text.startswith("2 tea (")
        # Not only by one that was started like it: __main__.Cart is another class there.
        session = SQLiteStore(path, secret=SECRET).peek(visitor.cookies["sid"])
        assert ICart(session).things == {"tea": 2}
        assert visitor.request(method="DELETE").text.startswith("empty (")


@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_the_counters_of_many_hosts_count_one_session(kind, request):
    address = request.getfixturevalue(f"{kind}_server").address
    where = {"REDIS_URL": f"redis://127.0.0.1:{address}/0", "DATABASE_URL": str(address)}
    with example(f"{kind}_counter", **where) as (_, port), example(f"{kind}_counter", **where) as (_, other):
        here = Browser(port)
        assert here.get().text.startswith("Visits: 1 (")
        assert Browser(other, cookies=here.cookies).get().text.startswith("Visits: 2 (")


@pytest.mark.parametrize(
    ("name", "fields", "status", "shown"),
    [
        ("csrf", {"said": "<yes>"}, "303 See Other", "<ul><li>&lt;yes&gt;</ul>"),
        ("inspector", {"do": "click"}, "303 See Other", "Clicks, count = 1"),
        ("inspector", {"do": "login", "name": "<b>eve"}, "303 See Other", "&lt;b&gt;eve"),
        ("inspector", {"do": "dance"}, "403 Forbidden", "Your session"),
    ],
)
def test_a_form_without_its_sessions_token_is_refused_and_what_it_says_is_escaped(name, fields, status, shown):
    with example(name) as (_, port):
        ann, eve = Browser(port), Browser(port)
        assert ann.post(**fields).status == "403 Forbidden" and not ann.cookies  # and no session was made for it
        mine, hers = token_on(ann.get().text), token_on(eve.get().text)
        assert {ann.post(**fields).status, ann.post(**fields, token=hers).status} == {"403 Forbidden"}
        assert ann.post(**fields, token=mine).status == status
        page = ann.get().text
        assert shown in page and "<yes>" not in page and "<b>eve" not in page


def test_an_event_stream_tells_what_other_requests_of_its_session_do_and_stops_when_it_ends():
    with example("streaming") as (_, port):
        visitor = Browser(port)
        assert visitor.post().text == "1\n"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/events", headers={"Cookie": visitor.cookie})
        reader, clicks = Background(lambda: (answer := connection.getresponse(), answer.readline())), 1
        while reader.is_stuck() and clicks < 200:
            clicks += 1
            assert visitor.post().text == f"{clicks}\n"  # while the stream waits for something to tell
        stream, event = reader.result()
        assert 1 < int(re.fullmatch(rb"data: (\d+)\n", event)[1]) <= clicks
        assert visitor.request(method="DELETE").text == "ended\n" and not visitor.cookies
        assert stream.read().endswith(b": goodbye\n\n")  # one whose session lives goes on for a minute
        connection.close()


def test_of_a_form_of_the_examples_the_first_values_and_its_beginning_are_read():
    from examples import read_form

    body = b"a=1&a=2&b=%C3%A4&c=%FF&d=" + b"x" * 20_000
    form = read_form({"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))})
    assert (form["a"], form["b"], form["c"]) == ("1", "\u00e4", "\ufffd") and len(form["d"]) < 10_000
    for length in ({}, *({"CONTENT_LENGTH": text} for text in ("", "-1", "x"))):
        assert read_form({"wsgi.input": io.BytesIO(b"a=1"), **length}) == {}


# The inspector in a browser
# ---------------------------------------------------------------------------

EXPIRED = "Your session has expired"


@pytest.fixture
def inspector(chromium):
    with example("inspector") as (_, port):
        yield Page(chromium, f"http://127.0.0.1:{port}/")
        assert chromium.get_log("browser") == []  # no script failed, nothing broke the content security policy


def test_the_inspectors_buttons_do_what_they_say_and_when_its_bar_has_run_out_the_page_says_expired(inspector):
    tag = inspector.text("h1")
    assert inspector.text(".owner") == "nobody's"
    for name in ("click", "click", "touch"):
        inspector.press(f"[value={name}]")
    assert "Clicks, count = 2" in inspector.text(".kept") and inspector.text("h1") == tag
    inspector.press("[value=renew]")
    renewed = inspector.text("h1")
    assert renewed != tag and "Clicks, count = 2" in inspector.text(".kept")
    inspector.press("[value=login]")
    assert inspector.text(".owner") == "ann" and "IVisitor" in inspector.text(".kept")
    assert inspector.text("h1") not in (tag, renewed)
    for end in ("logout", "expire"):
        inspector.press(f"[value={end}]")
        assert inspector.text("header p") == EXPIRED and inspector.driver.get_cookies() == []
        inspector.press(".gone a")
        assert inspector.text(".owner") == "nobody's" and "IClicks" not in inspector.text(".kept")
    share = "new DOMMatrix(getComputedStyle(document.querySelector('.bar i')).transform).a"
    assert inspector.until(share) > 0.9
    inspector.driver.execute_script("end = Date.now() + 10000")  # on the page's clock
    inspector.until(f"document.body.classList.contains('low') && {share} < 0.2")
    inspector.driver.execute_script("end = Date.now() + 300")
    inspector.until("document.querySelector('header p').innerText === arguments[0]", EXPIRED)
    assert not inspector.driver.find_element("css selector", "button[value=click]").is_displayed()


def test_a_second_tab_shows_the_same_session_and_follows(inspector):
    driver, first = inspector.driver, inspector.driver.current_window_handle
    tag = inspector.text("h1")
    driver.find_element("link text", "second tab").click()
    (second,) = {*driver.window_handles} - {first}
    driver.switch_to.window(second)
    assert inspector.text("h1") == tag
    inspector.press("[value=click]")
    driver.switch_to.window(first)
    inspector.until("document.querySelector('.kept').innerText.includes('count = 1')")
    inspector.press("[value=expire]")
    driver.switch_to.window(second)
    inspector.until("document.querySelector('header p').innerText === arguments[0]", EXPIRED)


# The login example
# ---------------------------------------------------------------------------

IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Version/18.0 Safari/604.1"
WINDOWS = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:130.0) Gecko/20100101 Firefox/130.0"


class Person(Browser):
    """Somebody with an account."""

    def send(self, page, action, agent="Test/1.0", **fields):
        """Fill in the form of *page* that leads to *action*."""
        form = re.search(rf"<form method=post action={action}>.*?</form>", self.get(page).text, re.S)[0]
        fields["token"] = token_on(form)
        return self.request(action, "POST", urllib.parse.urlencode(fields).encode(), HTTP_USER_AGENT=agent)

    def log_in(self, name="alice", password="wonderland", **more):
        return self.send("/login", "/login", name=name, password=password, **more)

    def devices(self):
        """(name, is it this one?, the other words, handle) of each."""
        text = self.get("/devices").text
        items = re.findall(r"<li>.*?<strong>(.*?)</strong>(.*?)<p>(.*?)</p>.*?name=handle value=(\w+)", text, re.S)
        return [(name, "this one" in mark, words, handle) for name, mark, words, handle in items]

    def may_enter(self):
        return self.get("/devices")["Location"] != "/login"


@pytest.fixture
def wonderland(store_of_kind):
    """The login example with its store and clock, and a function that makes somebody who is logged in."""
    from examples import login

    if not hasattr(login.scrypt, "cache_info"):  # which is slow on purpose
        login.scrypt = functools.cache(login.scrypt)

    def enter(**form):
        person = Person(site)
        person.log_in(**form)
        return person

    site, clock = login.make_application(store_of_kind), store_of_kind.clock
    clock.now = 1_800_000_000.0  # 15 Jan 2027, 08:00 UTC
    return types.SimpleNamespace(site=site, store=store_of_kind, clock=clock, enter=enter)


ALICE, BOB = {"name": "alice", "password": "wonderland"}, {"name": "bob", "password": "builder"}


@pytest.mark.parametrize("name", ["alice", "nobody", "", "<b>"])
def test_a_page_behind_the_login_opens_to_the_right_name_and_password_and_to_nobody_who_planted_an_id(wonderland, name):
    alice = Person(wonderland.site)
    assert "stranger" in alice.get("/").text and not alice.cookies
    assert alice.get("/address")["Location"] == "/login"
    answer = alice.log_in(name, "builder")
    assert answer.status == "403 Forbidden" and "That is wrong" in answer.text and not alice.may_enter()
    assert alice.get("/address")["Location"] == "/login"
    token, eve = token_on(alice.get("/login").text), Person(wonderland.site, cookies=alice.cookies)
    answer = alice.log_in()
    assert (answer.status, answer["Location"]) == ("303 See Other", "/address")
    assert token not in alice.get("/devices").text and not eve.may_enter()  # who planted her id
    assert alice.get("/address").status == "200 OK" and "alice" in alice.get("/").text
    assert alice.get("/nowhere").status == "404 Not Found"


def test_your_devices_are_listed_with_what_they_are_since_when_and_last_seen(wonderland):
    phone = wonderland.enter(agent=IPHONE, remember="on")
    wonderland.clock.advance(2 * 86400)
    desk, _ = wonderland.enter(agent=WINDOWS), wonderland.enter(**BOB)
    wonderland.clock.advance(180)
    assert [device[:2] for device in desk.devices()] == [("Safari on iPhone", False), ("Firefox on Windows", True)]
    words = [device[2] for device in desk.devices()]
    assert "15 Jan 2027, 08:00 UTC, remembered" in words[0] and "Last seen 2 days ago" in words[0]
    assert "17 Jan 2027, 08:00 UTC<br>" in words[1] and "Last seen now" in words[1]
    # Looking is being seen, though an eighth of 30 days is far.
    phone.get("/")
    wonderland.clock.advance(60)
    assert "Last seen 1 minute ago" in desk.devices()[0][2]


def test_a_device_logs_out_another_then_all_others_then_itself_and_nobody_elses(wonderland):
    phone, desk, tablet, bob = everyone = [wonderland.enter(**form) for form in ({}, {"remember": "on"}, {}, BOB)]

    def leave(person, to, **fields):
        assert person.send("/devices", "/leave", **fields)["Location"] == to
        assert bool(person.cookies) is (to != "/")
        return [each.may_enter() for each in everyone]

    first, own, _ = [device[3] for device in desk.devices()]
    assert leave(bob, "/devices", handle=first) == [True, True, True, True]
    for _ in ("pressed", "pressed twice"):
        assert leave(desk, "/devices", handle=first) == [False, True, True, True]
    answer = phone.post("/address", address="a@example.org")  # a form that was open
    assert (answer.status, answer["Location"]) == ("303 See Other", "/login")
    assert leave(desk, "/devices", others="yes") == [False, True, False, True]
    assert len(desk.devices()) == 1 and "everywhere" not in desk.get("/devices").text
    phone.log_in()
    assert leave(desk, "/", handle=own) == [True, False, False, True]


@pytest.mark.parametrize("remember", [{}, {"remember": "on"}], ids=["browser session", "remembered"])
def test_five_minutes_after_the_password_it_is_asked_for_again(wonderland, remember):
    alice = wonderland.enter(**remember)
    wonderland.clock.advance(299)
    assert alice.send("/address", "/address", address="alice@example.org").status == "303 See Other"
    assert "alice@example.org" in alice.get("/address").text
    stale = token_on(alice.get("/address").text)
    wonderland.clock.advance(1)
    page = alice.get("/address").text
    assert "Is it still you?" in page and "alice@example.org" not in page
    alice.post("/address", token=stale, address="eve@example.org")  # an open form isn't a way around it
    before = dict(alice.cookies)
    answer = alice.send("/address", "/address", password="wrong")
    assert answer.status == "403 Forbidden" and "That is wrong" in answer.text and alice.cookies == before
    answer = alice.send("/address", "/address", password="wonderland")
    assert answer["Location"] == "/address" and alice.cookies != before
    assert ("Max-Age=2592000" in answer["Set-Cookie"]) is bool(remember)  # who was remembered still is
    page = alice.get("/address").text
    assert "alice@example.org" in page and "eve@example.org" not in page
    assert len(alice.devices()) == 1


@pytest.mark.parametrize("token", [{}, {"token": ""}, {"token": "another's"}, {"token": "\u20ac"}], ids=str)
@pytest.mark.parametrize(
    ("action", "fields"),
    [("/leave", {}), ("/leave", {"others": "yes"}), ("/address", {"address": "eve@example.org"}), ("/login", BOB)],
)
def test_a_form_of_the_login_without_its_token_does_nothing(wonderland, action, fields, token):
    alice, phone = wonderland.enter(), wonderland.enter()
    if token.get("token") == "another's":
        token = {"token": token_on(phone.get("/devices").text)}
    answer = alice.post(action, **fields, **token)
    assert answer.status == "403 Forbidden" and "too old" in answer.text
    assert alice.may_enter() and phone.may_enter() and "alice" in alice.get("/").text
    assert "eve@example.org" not in alice.get("/address").text


def test_pages_of_the_login_wait_for_no_request_are_escaped_kept_by_no_cache_and_run_no_script(wonderland):
    alice = wonderland.enter(agent="<script>x</script>/1.0")
    alice.send("/address", "/address", address='"><script>y</script>')
    held = wonderland.store.open(alice.cookies["sid"], patience=0)
    assert "alice" in alice.get("/").text and len(alice.devices()) == 1  # who has to wait raises SessionBusy
    wonderland.store.release(held)
    for path in ("/", "/login", "/devices", "/address", "/nowhere"):
        answer = alice.get(path)
        assert answer["Cache-Control"] == "no-store" and "default-src 'none'" in answer["Content-Security-Policy"]
        assert "<script" not in answer.text
        assert ("&lt;script&gt;" in answer.text) is (path in ("/devices", "/address"))


def test_the_curl_lines_of_the_login_do_what_stands_behind_them(tmp_path):
    from examples import login

    program("curl")
    lines = re.findall("^    ((?:curl|post|form|cp).*)", login.__doc__, re.M)
    lines = [line if "()" in line or line.startswith("cp") else f"echo '--'; {line}" for line in lines]
    with in_thread(login.make_application(MemoryStore())) as port:
        command = [program("bash"), "-c", "\n".join(lines).replace(":8000", f":{port}")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    answers = done.stdout.split("--\n")[1:]
    promised = [line.rpartition("# ")[2] for line in lines if line.startswith("echo")]
    assert len(answers) == len(promised) == 7, done.stderr
    for answer, promise in zip(answers, promised, strict=True):
        assert f" {promise[:3]} " in answer.partition("\n")[0]
        for words in re.findall(r"to (/\w*)|(Max-Age=\d+)|: (curl)", promise):
            assert "".join(words) in answer


@pytest.mark.parametrize("store_of_kind", ["memory"], indirect=True)
def test_a_browser_logs_others_out_and_itself(wonderland, chromium):
    phone, desk = wonderland.enter(agent=IPHONE, remember="on"), wonderland.enter(agent=WINDOWS)
    with in_thread(wonderland.site) as port:
        page = Page(chromium, f"http://127.0.0.1:{port}/devices")
        for name, text in ALICE.items():
            chromium.find_element("name", name).send_keys(text)
        chromium.find_element("name", "remember").click()
        page.press("button.main")
        assert "expiry" in chromium.get_cookie("sid")
        assert re.search(r"Safari on iPhone\s+Logged in .*, remembered\s+Last seen just now", page.text())
        assert re.search(r"Chrome on \w+\s*this one\s+Logged in .*, remembered\s+Last seen now", page.text())
        page.press("button[aria-label^='Log out Safari']")
        assert "Safari" not in page.text() and not phone.may_enter() and desk.may_enter()
        page.press("button[name=others]")
        assert "Firefox" not in page.text() and not desk.may_enter()
        page.press("button[aria-label^='Log out Chrome']")
        assert "Hello, stranger" in page.text() and not chromium.get_cookies()
        assert chromium.get_log("browser") == []  # nothing broke the content security policy


@pytest.mark.parametrize("store_of_kind", ["memory"], indirect=True)
def test_the_pages_of_the_inspector_and_the_login_are_light_or_dark_and_fit_a_phone(wonderland, chromium):
    def look_at(url):
        page, seen = Page(chromium, url), {}
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            colour = page.until("getComputedStyle(document.body).backgroundColor")
            seen[scheme] = sum(map(int, re.findall(r"\d+", colour)[:3]))
        assert seen["light"] > 600 and seen["dark"] < 150 and chromium.current_url == url
        assert page.until("[innerWidth, document.documentElement.scrollWidth]") == [320, 320]
        fingers = "button, input:not([type=hidden], [type=checkbox])"
        heights = "[...document.querySelectorAll(arguments[0])].map(each => each.offsetHeight).concat(44)"
        assert min(page.until(heights, fingers)) == 44  # a finger's width

    phone = {"width": 320, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    wonderland.enter(agent="A-program-with-a-name-that-is-long/1.0", remember="on")
    with in_thread(wonderland.site) as port, example("inspector") as (_, inspector):
        url = f"http://127.0.0.1:{port}"
        chromium.get(url)
        chromium.add_cookie({"name": "sid", "value": wonderland.enter().cookies["sid"]})
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        for path in ("/", "/login", "/devices", "/address"):
            look_at(url + path)
        wonderland.clock.advance(300)
        look_at(url + "/address")  # which asks for the password
        look_at(f"http://127.0.0.1:{inspector}/")


# The example for Django
# ---------------------------------------------------------------------------


@pytest.fixture
def client():
    """Django's own, of the example."""
    package("django")
    from django.test import Client, utils

    from examples import django_sessions

    django_sessions.STORE = MemoryStore()
    utils.setup_test_environment()
    client = Client()
    client.example = django_sessions
    yield client
    utils.teardown_test_environment()


def test_djangos_test_client_logs_in_as_the_examples_docstring_says(client):
    code = [textwrap.dedent(block) for block in client.example.__doc__.split("\n\n") if "client." in block]
    assert len(code) == 2
    for block in code:
        names = {"django": package("django"), "STORE": client.example.STORE, "client": client}
        exec(block, names)
        assert names["client"].get("/").content.endswith(b", by alice\n")


def test_a_django_view_has_its_visitors_session_and_logging_in_and_out_changes_and_deletes_the_cookie(client):
    first = client.get("/")
    assert first.content == b"Visits: 1, by nobody\n"
    assert first["Vary"] == "Cookie" and first["Cache-Control"] == 'no-cache="Set-Cookie"'
    cookie = first.cookies["sid"]
    assert cookie["httponly"] and cookie["samesite"] == "Lax" and cookie["path"] == "/" and not cookie["max-age"]
    second = client.get("/")
    assert second.content == b"Visits: 2, by nobody\n"
    assert second["Vary"] == "Cookie" and not second.cookies and not second.has_header("Cache-Control")
    assert type(client)().get("/").content == b"Visits: 1, by nobody\n"
    assert type(client)().get("/", secure=True).cookies["__Host-sid"]["secure"]
    first = client.cookies["sid"].value
    for name, password, status in (("alice", "wrong", 403), ("nobody", "", 403), ("alice", "wonderland", 303)):
        assert client.post("/login", {"name": name, "password": password}).status_code == status
    assert client.cookies["sid"].value != first and client.get("/").content == b"Visits: 3, by alice\n"
    gone = client.post("/logout").cookies["sid"]
    assert gone.value == "" and gone["max-age"] == "0" and client.get("/").content == b"Visits: 1, by nobody\n"
    assert type(client)(enforce_csrf_checks=True).post("/login", ALICE).status_code == 403


def test_a_django_stream_lets_the_next_request_in_and_saves_at_its_end(client, tmp_path):
    client.example.STORE = SQLiteStore(tmp_path / "sessions", secret=SECRET)
    assert client.get("/report")["Location"] == "/login"
    client.post("/login", ALICE)
    stream = client.get("/report")
    assert stream.streaming and stream["Vary"] == "Cookie"
    assert client.get("/").content == b"Visits: 1, by alice\n"  # before the stream has begun
    late = client.get("/report")
    assert b"".join(late.streaming_content) == b"line 1 for alice\nline 2 for alice\nline 3 for alice\n"
    assert client.get("/").content == b"Visits: 2, by alice, who has read 1 report\n"
    stream.close()
    assert client.get("/").content == b"Visits: 3, by alice, who has read 1 report\n"


def test_django_views_keep_their_headers_and_one_that_fails_saves_nothing(client):
    from django.http import FileResponse, HttpResponse
    from django.urls import path

    def boom(request):
        ISession(request).visits = 100
        raise LookupError

    def headers(request):
        ISession(request).visits = 7
        return HttpResponse("", headers={"Vary": "Accept-Language", "Cache-Control": "private", "X-Own": "1"})

    views = {"boom": boom, "headers": headers, "no": lambda request: HttpResponse("hello")}
    views["file"] = lambda request: FileResponse(io.BytesIO(str(ISession(request).visits).encode()))
    client.example.urlpatterns += [path(name, view) for name, view in views.items()]
    assert not client.get("/no").has_header("Vary")  # it didn't ask for the session
    client.raise_request_exception = False
    failed = client.get("/boom")
    assert failed.status_code == 500 and not failed.cookies and len(client.example.STORE) == 0
    answer = client.get("/headers")
    assert (answer["Vary"], answer["Cache-Control"], answer["X-Own"]) == ("Accept-Language, Cookie", "private", "1")
    assert b"".join(client.get("/file").streaming_content) == b"7"


def test_the_django_example_serves_its_pages_to_who_fills_in_its_form():
    package("django")
    with example("django_sessions") as (_, port):
        alice = Browser(port)
        token = re.search('name=csrfmiddlewaretoken value="([^"]+)"', alice.get("/login").text)[1]
        assert alice.post("/login", **ALICE, csrfmiddlewaretoken=token)["Location"] == "/"
        assert alice.get("/report").text == "".join(f"line {number} for alice\n" for number in (1, 2, 3))
        assert alice.get().text == "Visits: 1, by alice, who has read 1 report\n"


# README
# ---------------------------------------------------------------------------


def readme():
    return pathlib.Path(HERE, "README.md").read_text("utf-8")


def readme_blocks(*languages):
    """(section, language, code) of each code block in these languages."""
    section, blocks = "", []
    for title, language, code in re.findall(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", readme(), re.M | re.S):
        section = title or section
        if not title and language in languages:
            blocks.append((section, language, code))
    return blocks


def run_readme(places):
    """Run all of README's Python in one namespace (in a process of its own, for Django), and visit each application."""
    module = sys.modules["readme"] = types.ModuleType("readme")
    server = types.SimpleNamespace(serve_forever=lambda: None)
    sys.modules["wsgiref.simple_server"].make_server = lambda host, port, app: setattr(module, "served", app) or server
    for section, language, code in readme_blocks("python", "pycon"):
        for there, here in places.items():
            code = code.replace(there, here)
        before = dict(vars(module))
        if language == "pycon":

            def check(environ, code=code):
                names = {**vars(module), "environ": environ}
                test = doctest.DocTestParser().get_doctest(code, names, "README.md", None, 0)
                assert doctest.DocTestRunner(verbose=False).run(test).failed == 0

            Browser(wrap(script(check, "200 OK", []))).get()
        else:
            exec(compile(code, f"README.md, {section}", "exec"), vars(module))
        for name in ("application", "served"):
            if vars(module).get(name) is not before.get(name):
                browser = Browser(vars(module)[name])
                assert [browser.get().text for _ in range(2)] == ["Visits: 1\n", "Visits: 2\n"], section
        print("ran:", section)


def test_the_code_in_the_readme_runs_block_by_block(tmp_path, redis_server, postgres_server):
    for name in ("bottle", "django", "flask", "pyramid"):
        package(name)
    places = {
        "/var/lib/app/": f"{tmp_path}/",
        "redis://sessions.internal": f"redis://127.0.0.1:{redis_server.address}",
        "host=sessions.internal dbname=app": str(postgres_server.address),
    }
    done = run_python(f"run_readme({places!r})", SECRET=SECRET)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert done.stdout.count("ran: ") == len(readme_blocks("python", "pycon")) > 5


def test_the_counter_answers_as_the_transcripts_with_curl_in_the_readme_say(tmp_path):
    with example("counter") as (_, port):
        assert Browser(port).get("/favicon.ico").status == "404 Not Found"  # browsers ask for it
        program("curl")
        for _, _, transcript in readme_blocks("console"):
            said = ""
            for line in re.findall(r"^\$ (.*)$", transcript, re.M):
                command = shlex.split(line.replace("curl", "curl -s").replace(":8000", f":{port}"))
                said += f"$ {line}\n{subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout}"
            assert said == transcript


def test_the_readme_tells_all_options_and_their_defaults_and_its_commands_and_links_lead_somewhere():
    options, text = {}, readme()
    for names, value in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", text, re.M):
        options.update((name.strip("` "), value) for name in names.split(", "))
    for name, parameter in list(inspect.signature(SessionMiddleware).parameters.items())[1:]:
        assert name in options, name
        if name not in ("store", "domain", "path"):
            assert options[name].strip("`").replace('"', "'").partition(" ")[0] == repr(parameter.default), name
    makes_a_secret = shlex.split(re.search(r"`python3 (-c '[^`]+')`", text)[1])
    assert re.fullmatch(r"[0-9a-f]{64}\n", subprocess.check_output([sys.executable, *makes_a_secret], text=True))
    shown = re.findall(r"python3 -m examples\.(\w+)", text)
    assert shown and {*shown} <= {*EXAMPLES, "benchmark"}
    assert "--json" in subprocess.check_output([sys.executable, "-m", "examples.benchmark", "-h"], cwd=HERE, text=True)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.removeprefix("#") in anchors or os.path.exists(os.path.join(HERE, target)), target


# What a newcomer meets
# ---------------------------------------------------------------------------


def session_():
    return MemoryStore().create(60, 600)


NESTED = SessionMiddleware(SessionMiddleware(counter_app, MemoryStore()), MemoryStore())
TOO_LATE = script("200 OK", ..., b"too early", count)

# What somebody does (p is a folder), what is raised, and what that says.
MISTAKES = [
    (lambda p: ISession({"PATH_INFO": "/"}), CannotAdapt, ["dict to ISession", "in SessionMiddleware"]),
    (lambda p: IThing(session_()), CannotAdapt, ["registerAdapter(factory, Session", "IThing(obj, None)"]),
    (lambda p: ICounter(), TypeError, ["ICounter() needs the object to adapt", "ICounter(session)"]),
    (lambda p: ISession(default=None), TypeError, ["ISession() needs the object to adapt"]),
    # Interfaces and adapters
    (lambda p: registerAdapter(Counter, Session, ICounter), DuplicateAdapter, ["ICounter", "registry.unregister"]),
    (lambda p: registerAdapter(IBird, Session, IAnimal), TypeError, ["is an interface", "@implementer(IAnimal)"]),
    (lambda p: registerAdapter("Counter", Session, IThing), TypeError, ["'Counter' can't be called"]),
    (lambda p: registerAdapter(Counter, "Session", IThing), TypeError, ["an interface, not for 'Session'"]),
    (lambda p: registerAdapter(Counter, Session), TypeError, ["at least one interface"]),
    (lambda p: minisess.InterfaceMeta("IX", (IBird, int), {}), TypeError, ["can only extend interfaces, not int"]),
    (lambda p: implementer(Counter), TypeError, ["Counter", "@implementer(IFoo)", "minisess.Interface"]),
    (lambda p: implementer("IBird"), TypeError, ["'IBird' isn't an interface", "minisess.Interface"]),
    (lambda p: implementer(IPet)(IBird), TypeError, ["decorates classes", "IBird"]),
    (lambda p: implementer(IPet)(5), TypeError, ["decorates classes, 5 isn't one"]),
    (lambda p: implementedBy(Counter(None)), TypeError, ["takes a class", "providedBy(obj)"]),
    (lambda p: storable(Counter(None)), TypeError, ["storable decorates classes"]),
    # Sessions
    (lambda p: session_().getComponent("x"), TypeError, ["'x' isn't an interface"]),
    (lambda p: session_().getComponent(Counter), TypeError, ["Counter", "isn't an interface"]),
    (lambda p: session_().setComponent(Counter, 1), TypeError, ["Counter", "isn't an interface"]),
    (lambda p: session_().setComponent(IPet, None), TypeError, ["unsetComponent(IPet)"]),
    (lambda p: session_()["x"], TypeError, ["session.x", "attributes"]),
    (lambda p: operator.setitem(session_(), "x", 1), TypeError, ["session.x", "attributes"]),
    (lambda p: session_().get("x"), AttributeError, ['getattr(session, "name", None)']),
    (lambda p: session_().items(), AttributeError, ["vars(session)"]),
    (lambda p: session_().clear(), AttributeError, ["session.expire()"]),
    (lambda p: session_().flush(), AttributeError, ["session.expire()"]),
    (lambda p: session_().cycle_key(), AttributeError, ["session.renew()"]),
    (lambda p: session_().save(), AttributeError, ["saved by itself"]),
    (lambda p: setattr(session_(), "modified", True), AttributeError, ["saved by itself"]),
    (lambda p: setattr(session_(), "permanent", True), AttributeError, ["remember=", "persistent=True"]),
    (lambda p: session_().nothing, AttributeError, ["'nothing'"]),
    (lambda p: session_().login(""), TypeError, ["isn't empty, not ''"]),
    (lambda p: session_().setLifetime(601), ValueError, ["remember=", "SessionMiddleware(max_lifetime=)"]),
    (lambda p: session_().notifyOnExpire("x"), TypeError, ["called without arguments", "'x'"]),
    # Stores
    (lambda p: [s.open(u, 0) for s in [MemoryStore()] for u in [kept(s, n=0)] * 2], SessionBusy, ["release()"]),
    (lambda p: MemoryStore(capacity=0), ValueError, ["capacity", "1 or more, not 0"]),
    (lambda p: MemoryStore().expireAll(None), TypeError, ["not None", "store.clear()"]),
    (lambda p: MemoryStore().sessions(None), TypeError, ["not None"]),
    (lambda p: new_session(MemoryStore(strict=True), x=Clock()), NotStorable, ["attribute x", "Clock", "@stor"]),
    (lambda p: new_session(MemoryStore(strict=True), x=threading.Lock()), NotStorable, ["attribute x", "__getstate__"]),
    (lambda p: SQLiteStore(p / "db"), TypeError, ["secret"]),
    (lambda p: SQLiteStore(p / "db", secret="hunter2"), ValueError, ["not 7", "secrets.token_hex(32)"]),
    (lambda p: SQLiteStore(p / "db", secret=5), TypeError, ["a str or bytes, not int"]),
    (lambda p: SQLiteStore(p / "db", secret=[]), ValueError, ["at least one secret"]),
    (lambda p: SQLiteStore(p / "missing" / "db", secret=SECRET), StoreError, ["missing/db", "No such file"]),
    (lambda p: PostgresStore(object(), secret=SECRET), TypeError, ["ConnectionPool", ".connection"]),
    (lambda p: PostgresStore("host=x", secret=SECRET), TypeError, ["'host=x'", "ConnectionPool('host=...')"]),
    (lambda p: RedisStore("redis://x", secret=SECRET), TypeError, ["from_url('redis://...'), not 'redis://x'"]),
    # The middleware
    (lambda p: SessionMiddleware(counter_app, MemoryStore), TypeError, ["is a class", "MemoryStore(...)"]),
    (lambda p: SessionMiddleware(counter_app, "x.sqlite3"), TypeError, ["SQLiteStore('x.sqlite3', secret="]),
    (lambda p: SessionMiddleware(counter_app, 5), CannotAdapt, ["int to IStore"]),
    (lambda p: SessionMiddleware("app"), TypeError, ["'app' isn't a WSGI application"]),
    (lambda p: SessionMiddleware(counter_app, lifetime=43201), ValueError, ["max_lifetime=, or None", "43201"]),
    (lambda p: Browser(wrap(TOO_LATE)).get(), SessionError, ["headers have left", "before the first"]),
    (lambda p: Browser(NESTED).get(), SessionError, ["'sid'", "different stores", "cookie="]),
]


@pytest.mark.parametrize("mistake, error, advice", MISTAKES, ids=[advice[0] for *_, advice in MISTAKES])
def test_an_error_says_what_to_do(mistake, error, advice, tmp_path):
    with pytest.raises(error) as caught:
        mistake(tmp_path)
    for words in advice:
        assert words in str(caught.value)


def test_every_public_name_is_documented_and_help_reads_well():
    for name in minisess.__all__:
        each = getattr(minisess, name)
        assert each.__doc__ or not callable(each), name
        for attribute, value in vars(each).items() if inspect.isclass(each) else ():
            if not attribute.startswith("_") and isinstance(value, (types.FunctionType, property)):
                # IStore tells what the methods of stores do.
                told = [getattr(place, attribute, None) for place in (each, IStore, PersistentStore)]
                assert any(place.__doc__ for place in told if place), (name, attribute)
    text = pydoc.render_doc(minisess, renderer=pydoc.plaintext)
    assert text.splitlines()[3].strip().startswith("minisess - Server-side sessions")
    assert not re.search(r"<(object|function|class) .* at 0x|_Missing", text)
    assert str(inspect.signature(ISession)) == str(inspect.signature(ICounter)) == "(obj=..., default=...)"
    about_login = pydoc.render_doc(Session.login, renderer=pydoc.plaintext)
    assert "login(self, owner: str, remember: float | None = None)" in about_login.replace("'", "")


def test_the_docstrings_code_runs():
    assert doctest.testmod(minisess).failed == 0
    blocks = re.findall(r"::\n\n((?:(?: {4}.*)?\n)+)", minisess.__doc__)
    names = {"__name__": "docstring", "__builtins__": __builtins__}
    exec("from minisess import *\n" + textwrap.dedent(blocks[0]), names)
    session = session_()
    exec(textwrap.dedent(blocks[1]).replace("ISession(environ)", "session"), {**names, "session": session})
    assert isinstance(names["application"], SessionMiddleware) and "ICounter" in repr(session)


# The package
# ---------------------------------------------------------------------------


def test_the_wheel_made_of_the_source_package_is_the_module_with_its_types(tmp_path):
    package("build")
    package("hatchling")
    source, dist, installed = tmp_path / "source", tmp_path / "dist", tmp_path / "installed"
    shutil.copytree(HERE, source, ignore=shutil.ignore_patterns(".git", "*cache*", "*.egg-info"))
    # Both from the checkout and nothing but it: no network, no build isolation.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(dist.glob("*.tar.gz"))) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    expected = "minisess.py test_minisess.py README.md LICENSE CHANGELOG.md pyproject.toml PKG-INFO examples/counter.py"
    assert set(expected.split()) <= names
    name = f"minisess-{minisess.__version__}"
    wheel, about = dist / f"{name}-py3-none-any.whl", f"{name}.dist-info"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", installed, wheel], check=True, capture_output=True)
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(about)} == {"minisess.py", "minisess-stubs/__init__.pyi"}
    metadata = (installed / about / "METADATA").read_text("utf-8")
    assert "Requires-Dist" not in metadata and "Requires-Python: >=3.10" in metadata
    assert (installed / "minisess.py").read_bytes() == pathlib.Path(HERE, "minisess.py").read_bytes()
