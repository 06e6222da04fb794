"""Tests of minisess, section by section as the module has them."""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import datetime
import decimal
import dis
import doctest
import enum
import fractions
import functools
import gc
import glob
import http.client
import inspect
import io
import ipaddress
import json
import logging
import multiprocessing
import operator
import os
import pickle
import pydoc
import random
import re
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import typing
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref
import zipfile
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest

import minisess
from minisess import (
    Adapter,
    CannotAdapt,
    Componentized,
    DuplicateAdapter,
    GuardSession,
    Interface,
    ISession,
    IStore,
    MemoryStore,
    NotStorable,
    PersistentStore,
    PostgresStore,
    RedisStore,
    SealError,
    Session,
    SessionBusy,
    SessionConflict,
    SessionError,
    SessionMiddleware,
    SQLiteStore,
    StoreError,
    implementedBy,
    implementer,
    providedBy,
    registerAdapter,
    registry,
    storable,
)

HERE = os.path.dirname(os.path.abspath(__file__))
SECRET = "a secret of the tests' own, long enough"

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

    def __init__(self, now=1_000_000.0):
        self.now = now

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
    """Sends requests to a WSGI application, wsgiref.validate on both sides, and keeps its cookies."""

    def __init__(self, application, scheme="http"):
        self.application, self.scheme, self.cookies = application, scheme, {}

    def environ(self, path="/", method="GET", **more):
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": ""}
        environ["wsgi.url_scheme"] = self.scheme
        if self.cookies:
            environ["HTTP_COOKIE"] = "; ".join(f"{k}={v}" for k, v in self.cookies.items())
        environ.update(more)
        setup_testing_defaults(environ)
        return environ

    def request(self, path="/", method="GET", **more):
        started, written = [], []

        def start_response(status, headers, exc_info=None):
            started.append((status, list(headers)))
            return written.append

        result = validator(self.application)(self.environ(path, method, **more), start_response)
        try:
            body = b"".join([*written, *result])
        finally:
            result.close()
        status, headers = started[-1]
        response = Response(status, headers, body)
        for cookie in response.all("Set-Cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            if "Max-Age=0" in cookie:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value
        return response

    get = request


def wrap(application, *args, **options):
    """SessionMiddleware around *application*, wsgiref.validate between them."""
    return SessionMiddleware(validator(application), *args, **options)


def plain(start_response, text="", status="200 OK", headers=()):
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [str(text).encode()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port, process=None, seconds=30):
    """Wait until something listens on *port*."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 0.5).close()
            return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}")


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session):
        self.hits = 0


registerAdapter(Counter, Session, ICounter)


def counter_app(environ, start_response):
    if environ["PATH_INFO"] == "/no":
        return plain(start_response, "hello")
    counter = ICounter(ISession(environ))
    counter.hits += 1
    return plain(start_response, counter.hits)


# The module as a text
# ---------------------------------------------------------------------------

SECTIONS = [
    "Errors",
    "Interfaces",
    "Components",
    "Sessions",
    "Memory store",
    "Persistent stores",
    "Cookies",
    "WSGI",
]


class WithoutTypeChecking(ast.NodeTransformer):
    """Takes out what only type checkers read."""

    def visit_If(self, node):
        self.generic_visit(node)
        condition = ast.unparse(node.test)
        if condition == "TYPE_CHECKING":
            return node.orelse or ast.copy_location(ast.Pass(), node)
        return node.body if condition == "not TYPE_CHECKING" else node


def module_names(code, operation):
    """(name, line) of each module-level name that *code*, or what is nested in it, reads or stores."""
    operations = {
        "reads": {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"},
        "stores": {"STORE_NAME", "STORE_GLOBAL"},
    }[operation]
    in_module = code.co_name == "<module>"
    instructions = list(dis.get_instructions(code))
    own = set() if in_module else {i.argval for i in instructions if i.opname == "STORE_NAME"}
    starts, line = dict(dis.findlinestarts(code)), code.co_firstlineno
    for instruction in instructions:
        line = starts.get(instruction.offset) or line
        if instruction.opname in operations and instruction.argval not in own:
            yield instruction.argval, line
    if operation == "reads":
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                yield from module_names(constant, operation)


def forward_references(source):
    tree = ast.fix_missing_locations(WithoutTypeChecking().visit(ast.parse(source)))
    code = compile(tree, "module", "exec")
    defined = {}
    for name, line in module_names(code, "stores"):
        defined.setdefault(name, line)
    return sorted({(line, name) for name, line in module_names(code, "reads") if line < defined.get(name, 0)})


@pytest.fixture(scope="module")
def module_source():
    with open(minisess.__file__, encoding="utf-8") as file:
        return file.read()


def test_every_name_is_defined_above_its_use_function_bodies_included(module_source):
    assert forward_references(module_source) == []


def test_the_check_for_forward_references_sees_one():
    source = """
    from __future__ import annotations
    def early(x: Late = 1, late=2) -> Late:
        annotated: Late = late
        return [unseen for unseen in LATE]
    class Late:
        def own(self): return Late
    LATE = unseen = 1
    """
    assert forward_references(textwrap.dedent(source)) == [(5, "LATE")]


def test_the_sections_come_in_the_order_of_the_map_under_one_style_of_marker(module_source):
    rows = module_source.splitlines()
    ruler = "# " + "-" * 75
    rulers = [number for number, row in enumerate(rows) if re.match(r"\s*#\s*[-=#*~_]{4}", row)]
    assert [rows[number] for number in rulers] == [ruler] * len(rulers)
    assert [rows[number - 1] for number in rulers] == [f"# {title}" for title in SECTIONS]
    mapped = re.findall(r"^    (\S+(?: \S+)?) {2,}\S", module_source.split('"""')[1], re.MULTILINE)
    assert mapped == SECTIONS


def test_only_the_standard_library_is_imported(module_source):
    imported = set()
    for node in ast.walk(ast.parse(module_source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported <= sys.stdlib_module_names


def test_all_public_names_are_there_and_the_star_import_brings_no_others():
    assert sorted(minisess.__all__) == sorted(set(minisess.__all__))
    assert all(hasattr(minisess, name) for name in minisess.__all__)
    assert not any(name.startswith("_") for name in minisess.__all__)


# The mail's table
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
    def __init__(self, environ):
        self.environ = environ


@pytest.fixture
def register():
    """registerAdapter, undone after the test."""
    done = []

    def register(factory, original, *interfaces):
        compy.registerAdapter(factory, original, *interfaces)
        done.extend((factory, original, interface) for interface in interfaces)

    yield register
    for registration in done:
        with contextlib.suppress(KeyError):  # the test took it out
            registry.unregister(*registration)


@pytest.fixture
def in_a_request():
    """A function that calls another with ctx, the environ of a request; all requests are one visitor's."""
    clock = Clock()
    seen = []

    def application(environ, start_response):
        seen.append(application.work(environ))
        return plain(start_response)

    browser = Browser(wrap(application, MemoryStore(clock=clock), lifetime=60))

    def in_a_request(work):
        application.work = work
        assert browser.get().status == "200 OK"
        return seen.pop()

    in_a_request.clock, in_a_request.browser = clock, browser
    return in_a_request


@pytest.mark.parametrize("ctx", [lambda environ: environ, RequestWithEnviron], ids=["environ", "request"])
def test_an_attribute_set_on_the_session_is_there_in_the_next_request(in_a_request, ctx):
    def work(environ):
        before = getattr(ISession(ctx(environ)), "foo", None)
        ISession(ctx(environ)).foo = 1
        return before

    assert [in_a_request(work), in_a_request(work)] == [None, 1]


@pytest.mark.parametrize("user", [object(), "a name", 0, "", [], lambda: None, Session], ids=repr)
def test_any_object_is_a_component(in_a_request, user):
    in_a_request(lambda ctx: ISession(ctx).setComponent(ICurrentUser, user))
    assert in_a_request(lambda ctx: ICurrentUser(ISession(ctx))) is user


def test_getComponent_finds_what_was_set(in_a_request):
    manager = object()
    in_a_request(lambda ctx: ISession(ctx).setComponent(IUserManager, manager))
    assert in_a_request(lambda ctx: ISession(ctx).getComponent(IUserManager)) is manager


def test_adapting_fails_with_a_TypeError_if_nothing_was_set(in_a_request):
    def work(ctx):
        with pytest.raises(CannotAdapt) as caught:
            IUserManager(ISession(ctx))
        return caught.value

    assert isinstance(in_a_request(work), TypeError)


def test_a_default_is_the_answer_if_nothing_was_set(in_a_request):
    default = object()
    assert in_a_request(lambda ctx: IUserManager(ISession(ctx), default)) is default
    assert in_a_request(lambda ctx: IUserManager(ISession(ctx), None)) is None
    assert in_a_request.browser.cookies == {}


@pytest.mark.parametrize("original", [Session, GuardSession, ISession])
def test_a_registered_adapter_is_made_once_and_set_on_the_session(in_a_request, register, original):
    register(UserManager, original, IUserManager)
    first = in_a_request(lambda ctx: IUserManager(ISession(ctx)))
    assert isinstance(first, UserManager)
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


def test_applications_of_different_people_keep_their_components_apart(in_a_request):
    def somebodys_module(component):
        class IUser(Interface):
            pass

        def login(ctx):
            ISession(ctx).setComponent(IUser, component)

        return login, lambda ctx: IUser(ISession(ctx), None)

    (login, me), (_, other) = somebodys_module("ann"), somebodys_module("bob")
    in_a_request(login)
    assert (in_a_request(me), in_a_request(other)) == ("ann", None)


# Errors
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, families",
    [
        (SessionError, [Exception]),
        (CannotAdapt, [SessionError, TypeError]),
        (DuplicateAdapter, [SessionError, ValueError]),
        (SessionBusy, [SessionError]),
        (SessionConflict, [SessionError]),
        (StoreError, [SessionError]),
        (NotStorable, [StoreError]),
        (SealError, [SessionError]),
    ],
)
def test_errors_join_the_tree_and_a_builtin_family(error, families):
    assert all(issubclass(error, family) for family in families)


def test_CannotAdapt_carries_the_objects_and_says_what_to_do():
    original = UserManager(None)
    with pytest.raises(CannotAdapt, match=r"registerAdapter\(factory, UserManager, ICurrentUser\)") as caught:
        ICurrentUser(original)
    assert (caught.value.original, caught.value.interface) == (original, ICurrentUser)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("ctx", [{}, {"PATH_INFO": "/"}, RequestWithEnviron({}), object()], ids=repr)
def test_CannotAdapt_to_ISession_advises_the_middleware(ctx):
    with pytest.raises(CannotAdapt, match="wrap the application in SessionMiddleware"):
        ISession(ctx)
    assert ISession(ctx, None) is None


def test_DuplicateAdapter_carries_the_objects_and_says_what_to_do(register):
    register(UserManager, Session, IUserManager)
    with pytest.raises(DuplicateAdapter, match=r"registry\.unregister") as caught:
        registerAdapter(lambda session: None, Session, IUserManager)
    error = caught.value
    assert (error.factory, error.original, error.interface) == (UserManager, Session, IUserManager)


# Interfaces
# ---------------------------------------------------------------------------


class IAnimal(Interface):
    pass


class IBird(IAnimal):
    pass


class IParrot(IBird):
    pass


class IPet(Interface):
    pass


class IThing(Interface):
    """What adapters are registered to, where only their originals matter."""


def conforming(answer):
    return {"__conform__": lambda self, interface: answer}


def raiser(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize("factory", [None, lambda obj: "factory"], ids=["unregistered", "registered"])
@pytest.mark.parametrize("implements", [False, True])
@pytest.mark.parametrize("namespace", [{}, conforming(None), conforming("conform")], ids=["plain", "None", "conform"])
def test_conform_comes_first_then_the_object_itself_then_the_factory_then_the_default(
    register, namespace, implements, factory
):
    kind = type("Kind", (), namespace)
    if implements:
        implementer(IThing)(kind)
    if factory:
        register(factory, kind, IThing)
    obj = kind()
    by_conform = namespace["__conform__"](obj, IThing) if namespace else None
    expected = by_conform or (obj if implements else "factory" if factory else None)
    for _ in range(2):  # worked out, then remembered
        assert IThing(obj, "default") is (expected or "default")
        if expected is None:
            with pytest.raises(CannotAdapt):
                IThing(obj)
        else:
            assert IThing(obj) is expected


@pytest.mark.parametrize("answer", [0, "", False, [], 0.0], ids=repr)
@pytest.mark.parametrize("way", ["conform", "factory"])
def test_only_None_means_no(register, way, answer):
    kind = type("Kind", (), conforming(answer) if way == "conform" else {})
    if way == "factory":
        register(lambda obj: answer, kind, IThing)
    assert IThing(kind()) is answer
    assert IThing(kind(), "default") is answer


@pytest.mark.parametrize("base", [object, Componentized])
def test_a_factory_that_answers_None_ends_the_search(register, base):
    general = type("General", (base,), {})
    special = type("Special", (general,), {})
    register(lambda obj: "general", general, IThing)
    register(lambda obj: None, special, IThing)
    assert IThing(general()) == "general"
    assert IThing(special(), "default") == "default"
    with pytest.raises(CannotAdapt):
        IThing(special())


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, CannotAdapt(1, IThing)], ids=repr)
@pytest.mark.parametrize("way", ["conform", "factory", "component"])
def test_an_exception_propagates_with_a_default_and_without(register, way, error):
    error = error() if isinstance(error, type) else error
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
def test_conform_is_looked_up_on_the_type(base):
    obj = type("Kind", (base,), {})()
    obj.__conform__ = lambda interface: "from the instance"
    assert IThing(obj, None) is None


def test_conform_of_a_class_isnt_asked_for_the_class_itself():
    metaclass = type("Meta", (type,), conforming("from the metaclass"))
    kind = metaclass("Kind", (), conforming("from the class"))
    assert IThing(kind) == "from the metaclass"
    assert IThing(kind()) == "from the class"
    assert IThing(type("Plain", (), conforming("from the class")), None) is None
    assert IThing(metaclass("Plain", (), {})(), None) is None


def test_conform_isnt_looked_for_with_getattr():
    assert IThing(type("Kind", (), {"__getattr__": raiser(ZeroDivisionError)})(), None) is None


@pytest.mark.parametrize(
    "conform, expected",
    [
        (staticmethod(lambda interface: ("static", interface)), ("static", IThing)),
        (classmethod(lambda cls, interface: (cls.__name__, interface)), ("Kind", IThing)),
        (property(lambda self: lambda interface: ("property", interface)), ("property", IThing)),
        (None, "default"),
    ],
)
def test_conform_is_bound_like_any_special_method(conform, expected):
    kind = type("Kind", (), {"__conform__": conform})
    assert IThing(kind(), "default") == expected
    assert IThing(type("Derived", (kind,), {})(), "default") in (expected, ("Derived", IThing))


@pytest.mark.parametrize("arguments", [{}, {"default": None}], ids=["none", "default"])
@pytest.mark.parametrize("interface", [Interface, IThing, ISession])
def test_an_interface_called_without_an_object_is_a_TypeError(interface, arguments):
    with pytest.raises(TypeError, match=interface.__name__) as caught:
        interface(**arguments)
    assert not isinstance(caught.value, CannotAdapt)


@pytest.mark.parametrize("bases", [(IThing, int), (int, IThing), (IThing, UserManager)], ids=repr)
def test_an_interface_extends_interfaces_only(bases):
    with pytest.raises(TypeError, match="interface"):
        minisess.InterfaceMeta("IMixed", bases, {})


def test_an_object_that_provides_an_interface_is_its_own_answer_even_for_bases_and_Interface():
    parrot = implementer(IParrot)(type("Parrot", (), {}))()
    assert all(interface(parrot) is parrot for interface in (IParrot, IBird, IAnimal, Interface))


def ways_to_ask(kind, interface):
    """Five answers to: do objects of class *kind* provide *interface*?"""
    obj = kind()
    return {
        interface.implementedBy(kind),
        interface.providedBy(obj),
        issubclass(kind, interface),
        isinstance(obj, interface),
        interface(obj, None) is obj,
    }


def test_all_ways_to_ask_what_is_implemented_agree():
    bird = implementer(IBird)(type("Bird", (), {}))
    parrot = implementer(IParrot, IPet)(type("Parrot", (bird,), {}))
    builtin = implementer(IPet)(frozenset)
    expected = {
        bird: [IBird, IAnimal, Interface],
        type("Hen", (bird,), {}): [IBird, IAnimal, Interface],
        parrot: [IParrot, IBird, IAnimal, IPet, Interface],
        builtin: [IPet, Interface],
        type("Set", (frozenset,), {}): [IPet, Interface],
        type("Both", (frozenset, bird), {}): [IPet, IBird, IAnimal, Interface],
        object: [Interface],
    }
    for kind, implemented in expected.items():
        for interface in (IAnimal, IBird, IParrot, IPet, IThing, Interface):
            assert ways_to_ask(kind, interface) == {interface in implemented}, (kind, interface)


def test_implementedBy_and_providedBy_tell_what_was_declared_most_specific_first():
    bird = implementer(IBird)(type("Bird", (), {}))
    parrot = implementer(IPet, IParrot)(type("Parrot", (bird,), {}))
    assert implementedBy(bird) == providedBy(bird()) == (IBird,)
    assert implementedBy(parrot) == providedBy(parrot()) == (IPet, IParrot, IBird)
    assert implementedBy(object) == providedBy(None) == ()


def test_a_more_derived_interface_declared_later_comes_first():
    kind = implementer(IParrot)(implementer(IPet)(implementer(IAnimal)(type("Kind", (), {}))))
    assert implementedBy(kind) == (IParrot, IAnimal, IPet)


def test_declaring_what_is_inherited_changes_nothing(register):
    base = implementer(IBird)(type("Base", (), {}))
    derived = implementer(IAnimal, IBird)(type("Derived", (base,), {}))
    assert implementedBy(derived) == (IBird,)
    register(lambda obj: "interface", IBird, IThing)
    register(lambda obj: "class", base, IThing)
    assert IThing(derived()) == "class"


@pytest.mark.parametrize("interface", [int, "IBird", None, type, Interface.__class__], ids=repr)
def test_only_interfaces_can_be_implemented(interface):
    with pytest.raises(TypeError, match="interface"):
        implementer(IBird, interface)


@pytest.mark.parametrize("thing", [IBird, 5, len], ids=repr)
def test_only_classes_can_implement(thing):
    with pytest.raises(TypeError):
        implementer(IPet)(thing)


def test_interfaces_of_one_name_are_different_interfaces(register):
    def make():
        class ISame(Interface):
            pass

        return ISame

    one, other = make(), make()
    kind = implementer(one)(type("Kind", (), {}))
    assert ways_to_ask(kind, one) == {True}
    assert ways_to_ask(kind, other) == {False}
    register(lambda obj: "one", Componentized, one)
    obj = Componentized()
    obj.setComponent(other, "other")
    assert (one(obj), other(obj)) == ("one", "other")


def nothing(obj):
    return None


@pytest.mark.parametrize(
    "factory, original, interfaces",
    [
        (nothing, UserManager, ()),
        (nothing, UserManager, (IThing, int)),
        (nothing, UserManager, (IThing, "IBird")),
        (nothing, UserManager(None), (IThing,)),
        (nothing, "UserManager", (IThing,)),
        ("nothing", UserManager, (IThing,)),
        (None, UserManager, (IThing,)),
    ],
    ids=repr,
)
def test_what_cant_be_an_adapter_is_a_TypeError_and_nothing_is_registered(factory, original, interfaces):
    with pytest.raises(TypeError):
        registerAdapter(factory, original, *interfaces)
    assert registry.lookup(UserManager, IThing) is None


@pytest.mark.parametrize("original", [UserManager, IBird])
@pytest.mark.parametrize("factory", [UserManager, nothing], ids=["same factory", "another"])
def test_a_second_registration_for_a_pair_is_refused_and_nothing_of_the_call_is_registered(register, original, factory):
    register(UserManager, original, IThing)
    with pytest.raises(DuplicateAdapter):
        registerAdapter(factory, original, IPet, IThing)
    assert registry.lookup(original, IThing) is UserManager
    assert registry.lookup(original, IPet) is None


def test_what_is_registered_for_a_base_can_be_registered_for_a_derived_class_too(register):
    base = type("Base", (), {})
    derived = type("Derived", (base,), {})
    register(nothing, base, IThing)
    register(UserManager, derived, IThing)
    assert (registry.lookup(base, IThing), registry.lookup(derived, IThing)) == (nothing, UserManager)


def test_lookup_answers_the_default_if_nothing_is_registered():
    assert registry.lookup(UserManager, IThing) is None
    assert registry.lookup(UserManager, IThing, "default") == "default"


def test_unregister_undoes_just_what_it_is_told(register):
    kind = type("Kind", (), {})
    register(nothing, kind, IThing, IPet)
    registry.unregister(nothing, kind, IThing)
    assert (registry.lookup(kind, IThing), registry.lookup(kind, IPet)) == (None, nothing)
    register(UserManager, kind, IThing)
    assert registry.lookup(kind, IThing) is UserManager


@pytest.mark.parametrize(
    "factory, original, interfaces",
    [(nothing, Interface, (IPet, IThing)), (UserManager, IBird, (IPet,)), (nothing, IParrot, (IPet,))],
    ids=["one pair unknown", "another factory", "a derived original"],
)
def test_unregistering_what_isnt_registered_is_a_KeyError_and_takes_nothing_out(
    register, factory, original, interfaces
):
    register(nothing, Interface, IPet)
    register(nothing, IBird, IPet)
    with pytest.raises(KeyError):
        registry.unregister(factory, original, *interfaces)
    assert registry.lookup(Interface, IPet) is registry.lookup(IBird, IPet) is nothing


def test_a_bound_method_can_be_registered_and_unregistered(register):
    adapters = {}
    register(adapters.get, str, IThing)
    assert IThing("a", None) is None
    adapters["a"] = 1
    assert IThing("a") == 1
    registry.unregister(adapters.get, str, IThing)
    assert IThing("a", None) is None


# Look-up order
# ---------------------------------------------------------------------------


def preferred(kind, *sources):
    """The *sources* in the order in which adapters registered for them serve *kind*."""
    factories = {source: lambda obj, source=source: source for source in sources}
    order = []
    for source in sources:
        registerAdapter(factories[source], source, IThing)
    try:
        for _ in sources:
            order.append(IThing(kind(), None))
            if order[-1] is not None:
                registry.unregister(factories.pop(order[-1]), order[-1], IThing)
    finally:
        for source, factory in factories.items():
            registry.unregister(factory, source, IThing)
    return order


def test_a_class_comes_first_then_what_is_declared_on_it_then_its_bases_then_object_and_Interface():
    base = implementer(IBird)(type("Base", (), {}))
    kind = implementer(IPet)(type("Kind", (base,), {}))
    expected = [kind, IPet, base, IBird, IAnimal, object, Interface]
    assert preferred(kind, *expected) == preferred(kind, *reversed(expected)) == expected


def test_an_interface_that_a_base_also_implements_comes_after_that_base():
    base = implementer(IAnimal)(type("Base", (), {}))
    kind = implementer(IParrot)(type("Kind", (base,), {}))
    expected = [kind, IParrot, IBird, base, IAnimal]
    assert preferred(kind, *reversed(expected)) == expected


def test_a_diamond_is_linearized_as_python_does():
    top = implementer(IAnimal)(type("Top", (), {}))
    left = implementer(IPet)(type("Left", (top,), {}))
    right = implementer(IBird)(type("Right", (top,), {}))
    bottom = type("Bottom", (left, right), {})
    expected = [bottom, left, IPet, right, IBird, top, IAnimal, object]
    assert preferred(bottom, *reversed(expected)) == expected


def test_declarations_without_a_consistent_order_still_prefer_the_more_derived_interface():
    kind = implementer(IAnimal, IBird, IParrot)(type("Kind", (), {}))
    assert preferred(kind, IAnimal, IBird, IParrot, kind) == [kind, IParrot, IBird, IAnimal]


def test_an_unrelated_source_never_serves():
    assert preferred(type("Kind", (), {}), IPet, UserManager, int) == [None] * 3


@pytest.mark.parametrize("order", [(IParrot, IBird, IAnimal), (IAnimal, IBird, IParrot), (IParrot, IAnimal, IBird)])
def test_an_adapter_to_a_derived_interface_answers_for_its_bases_the_closest_first(register, order):
    kind = type("Kind", (), {})
    for interface in order:
        register(lambda obj, interface=interface: interface, kind, interface)
    for closest in (IAnimal, IBird, IParrot):
        assert IAnimal(kind()) is closest
        registry.unregister(registry.lookup(kind, closest), kind, closest)
    assert IAnimal(kind(), None) is None


def test_an_adapter_to_a_base_interface_doesnt_answer_for_derived_ones(register):
    kind = type("Kind", (), {})
    register(nothing, kind, IAnimal)
    assert registry.lookup(kind, IBird) is None


def test_the_source_counts_more_than_the_target(register):
    base = type("Base", (), {})
    kind = type("Kind", (base,), {})
    register(lambda obj: "close target", base, IAnimal)
    register(lambda obj: "close source", kind, IParrot)
    assert (IAnimal(kind()), IAnimal(base())) == ("close source", "close target")


def collect():
    for _ in range(2):  # what a class refers to weakly dies after it
        gc.collect()


class Late:
    """A class, its base and what they implement, for declarations that come late."""

    def __init__(self, base=object):
        self.Base = implementer(IPet)(type("Base", (base,), {}))
        self.Kind = type("Kind", (self.Base,), {})


@pytest.mark.parametrize("base", [object, Componentized, type("Conforming", (), conforming(None))])
@pytest.mark.parametrize("source", ["Kind", "Base", object, Interface, IPet], ids=str)
def test_a_registration_after_a_look_up_takes_effect_at_once_and_so_does_its_end(register, base, source):
    late = Late(base)
    source = getattr(late, source, None) if isinstance(source, str) else source
    assert IThing(late.Kind(), None) is None
    register(lambda obj: "late", source, IThing)
    assert IThing(late.Kind(), None) == "late"
    assert registry.lookup(late.Kind, IThing) is registry.lookup(source, IThing)
    registry.unregister(registry.lookup(source, IThing), source, IThing)
    assert IThing(late.Kind(), None) is None


@pytest.mark.parametrize("base", [object, Componentized, type("Conforming", (), conforming(None))])
@pytest.mark.parametrize("where", ["Kind", "Base"])
def test_a_declaration_after_a_look_up_takes_effect_at_once(register, base, where):
    late = Late(base)
    register(lambda obj: "adapter", IBird, IThing)
    assert ways_to_ask(late.Kind, IBird) == {False}
    assert IThing(late.Kind(), None) is None
    implementer(IBird)(getattr(late, where))
    assert ways_to_ask(late.Kind, IBird) == {True}
    assert IThing(late.Kind(), None) == "adapter"
    assert IBird in implementedBy(late.Kind)


def test_a_registry_of_ones_own_follows_late_declarations_too():
    own, kind = minisess.AdapterRegistry(), type("Kind", (), {})
    own.register(nothing, IBird, IThing)
    assert own.lookup(kind, IThing) is None
    implementer(IBird)(kind)
    assert own.lookup(kind, IThing) is nothing
    assert registry.lookup(kind, IThing) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: type("Plain", (), {}),
        lambda: type("Derived", (UserManager,), {"__init__": lambda self: None}),
        lambda: type("Conforming", (), conforming(None)),
        lambda: type("Components", (Componentized,), {}),
        lambda: implementer(IBird)(type("Implementer", (), {})),
        lambda: implementer(minisess.InterfaceMeta("IDynamic", (IBird,), {}))(type("Dynamic", (), {})),
    ],
    ids=["plain", "derived", "conforming", "componentized", "implementer", "with its own interface"],
)
def test_classes_made_dynamically_are_collected_though_they_were_looked_up(register, make):
    register(nothing, UserManager, IThing)
    alive = []
    for _ in range(50):
        kind = make()
        assert IThing(kind(), None) is None
        assert registry.lookup(kind, IPet) is None
        ways_to_ask(kind, IBird)
        registerAdapter(nothing, kind, IPet)
        registry.unregister(nothing, kind, IPet)
        alive += [weakref.ref(kind), *map(weakref.ref, set(implementedBy(kind)) - {IBird})]
        del kind
    collect()
    assert [ref() for ref in alive if ref() is not None] == []


def test_interfaces_made_dynamically_are_collected_though_they_were_asked():
    alive = []
    for _ in range(50):
        interface = minisess.InterfaceMeta("IDynamic", (IBird,), {})
        assert interface(5, None) is interface(Componentized(), None) is None
        registerAdapter(nothing, UserManager, interface)
        assert registry.lookup(UserManager, IAnimal) is nothing
        registry.unregister(nothing, UserManager, interface)
        alive.append(weakref.ref(interface))
        del interface
    collect()
    assert [ref() for ref in alive if ref() is not None] == []


@contextlib.contextmanager
def collecting_at_every_line():
    """The garbage collector runs before every line of the module."""

    def collect_here(frame, event, argument):
        if frame.f_globals.get("__name__") != "minisess":
            return None
        gc.collect()
        return collect_here

    before = sys.gettrace()
    gc.collect()
    gc.freeze()  # makes collections fast
    sys.settrace(collect_here)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.unfreeze()


def test_look_ups_are_right_though_a_collection_may_run_at_any_moment_of_them(register):
    late = Late()
    register(lambda obj: "general", IPet, IThing)
    with collecting_at_every_line():
        assert IThing(late.Kind()) == "general"
    register(lambda obj: "special", late.Base, IThing)
    with collecting_at_every_line():
        assert IThing(late.Kind()) == "special"
        implementer(IBird)(late.Kind)
        register(lambda obj: "more special", IBird, IThing)
    assert IThing(late.Kind()) == "more special"
    assert ways_to_ask(late.Kind, IBird) == {True}


# Look-ups compared with zope.interface
# ---------------------------------------------------------------------------


class Hierarchy:
    """A random family of interfaces and classes, declared and registered with us and with zope.interface."""

    def __init__(self, seed, zope):
        self.random, self.zope = random.Random(seed), zope
        self.name = f"hierarchy {seed}"
        self.interfaces, self.classes, self.registrations = {}, [], []  # interfaces: ours -> zope's
        self.adapters = zope.adapter.AdapterRegistry()
        for number in range(self.random.randint(2, 6)):
            self.add_interface(f"I{seed}_{number}")
        for number in range(self.random.randint(2, 6)):
            self.add_class(f"C{number}")

    def some(self, things, most):
        things = list(things)
        return self.random.sample(things, min(len(things), self.random.randint(1, most)))

    def add_interface(self, name):
        bases = self.some(self.interfaces, 3) if self.interfaces and self.random.random() < 0.8 else []
        with contextlib.suppress(TypeError):  # bases that Python can't order
            ours = minisess.InterfaceMeta(name, tuple(bases) or (Interface,), {})
            theirs = tuple(self.interfaces[base] for base in bases) or (self.zope.Interface,)
            self.interfaces[ours] = self.zope.interface.InterfaceClass(name, theirs)

    def add_class(self, name):
        bases = self.some(self.classes, 3) if self.classes and self.random.random() < 0.7 else []
        with contextlib.suppress(TypeError):
            self.classes.append(type(name, tuple(bases), {}))
            if self.random.random() < 0.7:
                self.declare(self.classes[-1])

    def declare(self, kind):
        interfaces = self.some(self.interfaces, 3)
        implementer(*interfaces)(kind)
        self.zope.classImplements(kind, *(self.interfaces[interface] for interface in interfaces))

    def spec(self, source):
        return self.interfaces.get(source) or self.zope.implementedBy(source)

    def register(self):
        source = self.random.choice([*self.classes, *self.interfaces, object])
        target = self.random.choice(list(self.interfaces))

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
                    yield f"{self.name}: from {kind} to {ours}"

    def inconsistent(self):
        return any(not self.zope.ro.is_consistent(self.spec(kind)) for kind in self.classes)


def test_random_hierarchies_adapt_as_with_zope_interface():
    zope = package("zope.interface")
    for module in ("adapter", "interface", "ro"):
        package(f"zope.interface.{module}")
    differences, inconsistent = [], 0
    for seed in range(2000):
        hierarchy = Hierarchy(seed, zope)
        for _ in range(hierarchy.random.randint(2, 6)):
            hierarchy.register()
        differences += hierarchy.differences()
        inconsistent += hierarchy.inconsistent()
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
    if request.param == "Session":
        return MemoryStore().create(60, 60)
    return SQLiteStore(tmp_path / "sessions", secret=SECRET).create(60, 60)


def test_a_component_is_kept_for_its_interface_only(thing):
    component = Bird(None)
    thing.setComponent(IBird, component)
    assert IBird(thing) is thing.getComponent(IBird) is component
    assert IBird in thing
    assert all(i(thing, None) is None and i not in thing for i in (IAnimal, IParrot, IPet, IUserManager))


def test_setting_a_component_replaces_the_one_before(thing, register):
    register(Bird, Componentized, IBird)
    made = IBird(thing)
    thing.setComponent(IBird, "new")
    assert (made is not IBird(thing)) and thing.getComponent(IBird) == "new"


@pytest.mark.parametrize("component", [0, "", False, []], ids=repr)
def test_a_false_component_is_a_component(thing, component):
    thing.setComponent(IBird, component)
    assert IBird in thing
    assert IBird(thing, "default") is thing.getComponent(IBird, "default") is component


@pytest.mark.parametrize("interface, component", [(IBird, None), (int, 1), ("IBird", 1), (None, 1)], ids=repr)
def test_None_isnt_a_component_and_components_go_by_interfaces(thing, interface, component):
    with pytest.raises(TypeError):
        thing.setComponent(interface, component)
    assert interface not in thing


def test_an_adapter_made_by_adaptation_is_remembered(thing, register):
    register(Bird, Componentized, IBird)
    assert IBird not in thing
    made = thing.getComponent(IBird)
    assert made.original is thing
    assert thing.getComponent(IBird) is IBird(thing) is IBird(thing, None) is made
    assert IBird in thing


def test_asking_whether_a_component_is_kept_makes_none(thing, register):
    register(raiser(ZeroDivisionError), Componentized, IBird)
    assert IBird not in thing


def test_a_temporary_adapter_is_never_remembered(thing, register):
    class Passing(Bird):
        temporaryAdapter = 1

    register(Passing, Componentized, IBird, IPet)
    assert isinstance(IBird(thing), Passing)
    assert thing.getComponent(IBird) is not thing.getComponent(IBird)
    assert IBird not in thing and IPet not in thing


def test_None_and_a_default_are_never_remembered(thing, register):
    answers = [None, None, None, "made"]
    register(lambda obj: answers.pop(0), Componentized, IBird)
    assert (thing.getComponent(IBird), thing.getComponent(IBird, 5), IBird(thing, 6)) == (None, 5, 6)
    assert IBird not in thing
    assert IBird(thing) == "made"


def test_a_multi_component_is_added_for_all_interfaces_whose_registered_adapter_is_its_class(thing, register):
    register(Bird, Componentized, IBird)
    register(Bird, Componentized, IPet)
    made = IBird(thing)
    assert IPet in thing and IPet(thing) is made
    assert IUserManager not in thing and thing.getComponent(IUserManager) is None


@pytest.mark.parametrize("factory", ["a class that isn't multiComponent", "a function", "another class"])
def test_other_adapters_arent_shared_between_interfaces(thing, register, factory):
    class Single(Bird):
        multiComponent = False

    class Other(Bird):
        pass

    first = {"a function": lambda obj: Bird(obj), "another class": Other}.get(factory, Single)
    second = {"a function": lambda obj: Bird(obj), "another class": Bird}.get(factory, Single)
    register(first, Componentized, IBird)
    register(second, Componentized, IPet)
    made = IBird(thing)
    assert IPet not in thing
    assert IPet(thing) is not made


@pytest.mark.parametrize("base", [Adapter, object], ids=["multi", "plain"])
def test_asking_for_a_base_interface_never_replaces_the_component_of_a_derived_one(thing, register, base):
    class Kind(base):
        def __init__(self, original):
            pass

    register(implementer(IBird)(Kind), Componentized, IBird)
    mine = Bird(thing)
    thing.setComponent(IBird, mine)
    made = IAnimal(thing)
    assert isinstance(made, Kind)
    assert IBird(thing) is mine
    assert IAnimal(thing) is made


def test_an_unset_component_is_gone_and_made_anew(thing, register):
    register(Bird, Componentized, IBird)
    made = IBird(thing)
    thing.unsetComponent(IBird)
    assert IBird not in thing
    assert IBird(thing) is not made


def test_unsetting_what_isnt_there_is_a_KeyError(thing, register):
    register(Bird, Componentized, IBird)
    thing.setComponent(IPet, 1)
    with pytest.raises(KeyError):
        thing.unsetComponent(IBird)
    assert IPet(thing) == 1


def test_components_are_set_and_unset_in_any_order(thing):
    rng, expected = random.Random(0), {}
    for number in range(200):
        interface = rng.choice([IBird, IPet, IAnimal])
        if interface in expected and rng.random() < 0.5:
            thing.unsetComponent(interface)
            del expected[interface]
        else:
            thing.setComponent(interface, number)
            expected[interface] = number
        for asked in (IBird, IPet, IAnimal):
            assert asked(thing, None) == thing.getComponent(asked) == expected.get(asked)
            assert (asked in thing) is (asked in expected)


def test_removeComponent_forgets_this_very_object_everywhere_and_tells_where_it_was(thing):
    one, equal = [1], [1]
    thing.setComponent(IBird, one)
    thing.setComponent(IPet, equal)
    thing.setComponent(IUserManager, one)
    assert sorted(thing.removeComponent(one), key=repr) == sorted([IBird, IUserManager], key=repr)
    assert (IBird in thing, IUserManager in thing, IPet(thing) is equal) == (False, False, True)
    assert thing.removeComponent(one) == []


@pytest.mark.parametrize("ignore, kept", [((), [IPet]), ((True,), [IBird, IPet, IUserManager])])
def test_addComponent_keeps_it_where_its_class_is_the_registered_adapter_or_everywhere(thing, register, ignore, kept):
    register(Bird, Componentized, IPet)
    register(nothing, Componentized, IUserManager)
    bird = Bird(None)
    thing.addComponent(bird, *ignore)
    assert [i for i in (IBird, IPet, IUserManager, IAnimal) if i in thing] == kept
    assert all(i(thing) is bird for i in kept)


def test_addAdapter_makes_adds_and_answers_one(thing):
    bird = thing.addAdapter(Bird, ignoreClass=True)
    assert (type(bird), bird.original) == (Bird, thing)
    assert IBird(thing) is IPet(thing) is bird
    assert thing.addAdapter(Bird) is not bird  # made, but nowhere registered: not kept
    assert IBird(thing) is bird


def test_setAdapter_keeps_what_the_factory_makes(thing):
    thing.setAdapter(IPet, Bird)
    assert type(IPet(thing)) is Bird and IPet(thing).original is thing
    assert IBird not in thing


def test_locateAdapterClass_finds_the_registered_factory(thing, register):
    register(nothing, Componentized, IBird)
    assert thing.locateAdapterClass(type(thing), IAnimal, None) is nothing
    assert thing.locateAdapterClass(type(thing), IPet, "default") == "default"


def test_a_component_set_for_an_interface_goes_before_the_object_itself():
    kind = implementer(IBird)(type("Kind", (Componentized,), {}))
    obj = kind()
    assert IBird(obj) is obj.getComponent(IBird) is obj
    obj.setComponent(IBird, "other")
    assert IBird(obj) == obj.getComponent(IBird) == "other"


@pytest.mark.parametrize("method", ["getComponent", "__conform__"])
def test_a_derived_class_may_have_its_own_say_in_adaptation(method):
    def answer(self, interface, default=None):
        return interface.__name__ if interface is IBird else getattr(Componentized, method)(self, interface)

    obj = type("Kind", (Componentized,), {method: answer})()
    obj.setComponent(IPet, "kept")
    assert (IBird(obj), IPet(obj), IThing(obj, None)) == ("IBird", "kept", None)


def at_once(*works):
    """The results of *works*, each called in a thread of its own."""
    results = [None] * len(works)

    def run(number):
        results[number] = works[number]()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("base", [Adapter, object], ids=["multi", "plain"])
def test_threads_that_adapt_at_once_get_the_same_component(thing, register, base):
    meeting = threading.Barrier(4, timeout=20)

    class Kind(base):
        def __init__(self, original):
            meeting.wait()  # all have seen that there is none

    register(implementer(IBird, IPet)(Kind), Componentized, IBird, IPet)
    answers = at_once(*[lambda: IBird(thing)] * 4)
    assert isinstance(answers[0], Kind)
    assert all(answer is answers[0] for answer in (*answers, IBird(thing)))


def test_what_threads_get_for_two_interfaces_of_one_adapter_at_once_is_what_is_kept(thing, register):
    meeting = threading.Barrier(2, timeout=20)

    class Kind(Adapter):
        def __init__(self, original):
            meeting.wait()

    register(implementer(IBird, IPet)(Kind), Componentized, IBird, IPet)
    bird, pet = at_once(lambda: IBird(thing), lambda: IPet(thing))
    assert IBird(thing) is bird
    assert IPet(thing) is pet


def test_threads_adapt_while_others_register_and_declare(register):
    register(lambda obj: "adapter", IPet, IThing)
    stop, kinds = threading.Event(), [Late().Kind for _ in range(10)]

    def adapt():
        answers = set()
        while not stop.is_set():
            answers.update(IThing(kind()) for kind in kinds)
        return answers

    def change():
        try:
            for number in range(300):
                implementer(minisess.InterfaceMeta(f"ILate{number}", (Interface,), {}))(kinds[number % 10])
                registerAdapter(nothing, IPet, IAnimal)
                registry.unregister(nothing, IPet, IAnimal)
        finally:
            stop.set()

    assert at_once(adapt, adapt, change) == [{"adapter"}, {"adapter"}, None]


def test_an_adapter_finds_the_components_of_what_it_adapts(thing, register):
    register(Bird, Componentized, IBird)
    other = type("Other", (), {"__init__": lambda self, original: None})
    register(other, Componentized, IThing)
    bird = IBird(thing)
    assert IThing(bird) is IThing(thing)
    assert IPet(bird) is bird
    assert ICurrentUser(bird, None) is None


@pytest.mark.parametrize("original", [object(), None, 5, Componentized, Bird], ids=repr)
def test_an_adapter_of_something_without_components_adapts_as_any_object(original):
    adapter = Adapter(original)
    assert adapter.original is original
    assert IThing(adapter, "default") == "default"
    with pytest.raises(CannotAdapt):
        IThing(adapter)


# Types
# ---------------------------------------------------------------------------

# What checkers say of it: no error but in the lines marked so.
TYPED_SAMPLE = """
from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

from minisess import Adapter, Interface, ISession, Session, SessionMiddleware
from minisess import CannotAdapt, Componentized, MemoryStore, implementer, registerAdapter, registry


class ICounter(Interface):
    hits: int

    def add(self, number: int) -> str:
        raise NotImplementedError


class IMore(ICounter):
    more: bytes


@implementer(ICounter)
class Counter:
    def __init__(self, session: Session) -> None:
        self.hits = 0

    def add(self, number: int) -> str:
        return str(number)


registerAdapter(Counter, Session, ICounter)
registry.unregister(Counter, Session, ICounter)
registerAdapter("Counter", Session, ICounter)  # error


def use(session: Session, environ: dict[str, Any], request: object) -> None:
    assert_type(Counter(session), Counter)
    assert_type(ICounter(session), ICounter)
    assert_type(ICounter(session, None), ICounter | None)
    assert_type(ICounter(session, 5), ICounter | int)
    assert_type(ICounter(session).hits, int)
    assert_type(ICounter(session).add(1), str)
    assert_type(IMore(session).hits, int)
    assert_type(IMore(session).more, bytes)
    ICounter(session).nope  # error
    ICounter(session).hits = "one"  # error
    ICounter(session).add("one")  # error
    ICounter(session, None).hits  # error
    ICounter()  # error
    if isinstance(request, ICounter):
        assert_type(request.hits, int)

    assert_type(ISession(environ), ISession)
    assert_type(ISession(request).uid, str)
    assert_type(ISession(request).created, float)
    assert_type(ISession(request).expires, float)
    assert_type(ISession(request).owner, str | None)
    ISession(environ).foo = 1
    ISession(environ).setComponent(ICounter, object())
    ISession(environ).setComponent("ICounter", object())  # error
    ISession(environ).login("ann")
    ISession(environ).login(5)  # error
    ISession(environ).notifyOnExpire(lambda: None)
    ISession(environ).renew(1)  # error
    assert_type(ICounter in ISession(environ), bool)
    assert_type(ICounter(ISession(environ)), ICounter)

    for kept in (session, ISession(environ)):
        kept.unsetComponent(ICounter)
    assert_type(session.getComponent(ICounter), ICounter | None)
    assert_type(session.getComponent(ICounter, 5), ICounter | int)
    assert_type(ISession(environ).getComponent(ICounter), ICounter | None)
    assert_type(Componentized().getComponent(ICounter), ICounter | None)
    assert_type(session.addAdapter(Counter), Counter)
    assert_type(session.uid, str)
    Adapter(session).original.anything


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    try:
        counter = ICounter(ISession(environ))
    except CannotAdapt as error:
        assert_type(error.original, object)
        raise
    counter.hits += 1
    return [b""]


SessionMiddleware(application, MemoryStore(capacity=10), cookie="sid", lifetime=60, secure=True)
SessionMiddleware(application, lifetme=60)  # error
"""


@pytest.fixture(scope="module")
def typed_sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    (folder / "sample.py").write_text(TYPED_SAMPLE)
    shutil.copy(minisess.__file__, folder)
    return folder


def check_types(folder, tool, *options):
    package(tool)
    done = subprocess.run(
        [sys.executable, "-m", tool, *options, "sample.py"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return done.stdout


def expect_marked_errors(errors):
    """*errors*: {line: message} of the sample."""
    marked = {n for n, row in enumerate(TYPED_SAMPLE.splitlines(), 1) if row.endswith("# error")}
    assert {n: errors[n] for n in errors if n not in marked} == {}
    assert marked - errors.keys() == set()
    missing_attribute = next(n for n, row in enumerate(TYPED_SAMPLE.splitlines(), 1) if ".nope" in row)
    assert "nope" in errors[missing_attribute] and "ICounter" in errors[missing_attribute]


def test_mypy_strict_sees_the_promised_types(typed_sample):
    output = check_types(typed_sample, "mypy", "--strict", "--no-error-summary", "--follow-imports=silent")
    errors = {}
    for path, line, message in re.findall(r"^(\S+):(\d+): error: (.*)", output, re.MULTILINE):
        assert path == "sample.py", output
        errors[int(line)] = message
    expect_marked_errors(errors)


def test_pyright_sees_the_promised_types(typed_sample):
    found = json.loads(check_types(typed_sample, "pyright", "--outputjson"))["generalDiagnostics"]
    errors = {}
    for each in found:
        if each["severity"] == "error":
            errors[each["range"]["start"]["line"] + 1] = each["message"]
    expect_marked_errors(errors)


# Sessions
# ---------------------------------------------------------------------------

LIFETIME, MAX_LIFETIME = 10, 100  # seconds; idle well below the lease of persistent stores


class IWitness(Interface):
    name: object


@implementer(IWitness)
class Witness:
    """A component whose methods are callbacks; what ran is in `Witness.saw`, wherever its session was stored."""

    saw: list = []

    def __init__(self, name):
        self.name = name

    def ended(self):
        Witness.saw.append(self.name)

    def ended_too(self):
        Witness.saw.append(f"{self.name} too")

    def stumble(self):
        raise ZeroDivisionError("on purpose")


class IDiary(Interface):
    pass


@implementer(IDiary)
class Diary:
    """A component that refers to its session and to another component of it."""

    def __init__(self, session, witness):
        self.session, self.witness = session, witness


class IPassing(Interface):
    pass


class Passing:
    temporaryAdapter = True

    def __init__(self, session):
        pass


class INothing(Interface):
    pass


registerAdapter(Passing, Session, IPassing)


@pytest.fixture(autouse=True)
def _nothing_seen():
    Witness.saw.clear()


def new_session(store, lifetime=LIFETIME, max_lifetime=MAX_LIFETIME, witness=None, owner=None, **attributes):
    """A session that is stored and not held; its *witness* is told of its end."""
    session = store.create(lifetime, max_lifetime)
    for name, value in attributes.items():
        setattr(session, name, value)
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
    assert session is not None
    yield session
    store.save(session)


class Background(threading.Thread):
    """A thread that runs *function*; `result` waits for what it answered or raised."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.function, self.args = function, args
        self.start()

    def run(self):
        try:
            self.answer, self.error = self.function(*self.args), None
        except BaseException as error:
            self.error = error

    def is_stuck(self):
        self.join(0.05)
        return self.is_alive()

    def result(self):
        self.join(20)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.answer


class StoreContract:
    """What every store promises.  A subclass named Test... says how to make one.

    Times in it are small: no request lasts for more than 20 seconds of the injected clock.
    """

    def make_store(self, clock, **options):
        """An empty store that goes by *clock*."""
        raise NotImplementedError

    #: How long the random walks are, and their seeds.
    steps, seeds = 400, (1, 2)

    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def store(self, clock):
        return self.make_store(clock)

    # What is stored

    def test_it_is_a_store(self, store, clock):
        assert IStore(store) is store
        assert store.clock() == clock.now
        assert len(store) == 0

    def test_uids_are_43_url_safe_characters_and_never_the_same(self, store):
        uids = {store.create(LIFETIME, MAX_LIFETIME).uid for _ in range(100)}
        assert len(uids) == 100
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", uid) for uid in uids)

    def test_looking_at_a_session_stores_nothing(self, store):
        session = store.create(LIFETIME, MAX_LIFETIME)
        assert getattr(session, "foo", None) is None
        assert IWitness not in session
        assert INothing(session, None) is None
        assert session.getComponent(INothing) is None
        assert isinstance(IPassing(session), Passing)
        session.touch()
        session.setLifetime(5)
        session.renew()
        store.save(session)
        assert len(store) == 0
        assert store.open(session.uid) is None

    @pytest.mark.parametrize(
        "use",
        [
            lambda session: setattr(session, "foo", None),
            lambda session: session.setComponent(INothing, 0),
            lambda session: ICounter(session),
            lambda session: session.login("ann"),
        ],
        ids=["attribute", "component", "adapted", "owner"],
    )
    def test_a_session_that_holds_anything_is_stored(self, store, use):
        session = store.create(LIFETIME, MAX_LIFETIME)
        use(session)
        assert len(store) == 0  # not before it is saved
        store.save(session)
        assert len(store) == 1
        assert store.open(session.uid) is not None

    def test_what_is_on_a_session_comes_back(self, store):
        session = new_session(store, foo=1, bar=[2, {"three": 3}])
        with visit(store, session.uid) as again:
            assert vars(again) == {"foo": 1, "bar": [2, {"three": 3}]}
            again.setComponent(IWitness, Witness("w"))
            ICounter(again).hits += 5
            del again.foo
        with visit(store, session.uid) as again:
            assert vars(again) == {"bar": [2, {"three": 3}]}
            assert IWitness in again
            assert IWitness(again).name == "w"
            assert ICounter(again).hits == 5
            again.unsetComponent(IWitness)
        with visit(store, session.uid) as again:
            assert IWitness not in again
            assert IWitness(again, None) is None

    def test_references_between_components_and_to_the_session_come_back(self, store):
        session = store.create(LIFETIME, MAX_LIFETIME)
        witness = Witness("w")
        session.setComponent(IDiary, Diary(session, witness))
        session.setComponent(IWitness, witness)
        session.setComponent(INothing, witness)
        store.save(session)
        with visit(store, session.uid) as again:
            assert IDiary(again).session is again
            assert IDiary(again).witness is IWitness(again)
            assert INothing(again) is IWitness(again)

    def test_its_fields_come_back(self, store, clock):
        session = new_session(store, owner="ann")
        clock.advance(3)
        with visit(store, session.uid) as again:
            again.setLifetime(7)
        clock.advance(1)
        with visit(store, session.uid) as again:
            assert (again.uid, again.owner, again.created) == (session.uid, "ann", 1_000_000)
            assert (again.lifetime, again.max_lifetime) == (7, MAX_LIFETIME)
            assert (again.lastModified, again.expires) == (clock.now, clock.now + 7)

    @pytest.mark.parametrize("uid", ["", "x", "A" * 43, "../../etc/passwd", "\x00", "é" * 43])
    def test_an_unknown_id_is_no_session(self, store, uid):
        new_session(store, foo=1)
        assert store.open(uid) is None
        assert store.open(uid, hold=False) is None
        assert len(store) == 1

    def test_len_counts_what_is_stored(self, store):
        sessions = [new_session(store, n=n) for n in range(5)]
        assert len(store) == 5
        sessions[0].expire()
        sessions[1].renew()
        assert len(store) == 4

    # Expiry

    @pytest.mark.parametrize("hold", [True, False])
    def test_it_ends_exactly_at_the_idle_deadline(self, store, clock, hold):
        early, late = new_session(store, foo=1), new_session(store, witness="late")
        clock.advance(LIFETIME - 0.001)
        with visit(store, early.uid, hold=hold):
            pass
        clock.advance(0.001)
        assert store.open(late.uid, hold=hold) is None
        assert Witness.saw == ["late"]
        assert len(store) == 1

    @pytest.mark.parametrize("limits", [(LIFETIME, 1000), (1000, LIFETIME)], ids=["idle", "absolute"])
    def test_an_expired_session_is_gone_though_many_others_are_due_before_it(self, store, clock, limits):
        for _ in range(60):
            new_session(store, LIFETIME - 1, foo=1)
        session = new_session(store, *limits, witness="w")
        clock.advance(LIFETIME)
        assert store.open(session.uid, hold=False) is None
        assert store.open(session.uid) is None
        assert Witness.saw == ["w"]

    def test_each_request_starts_the_idle_clock_again(self, store, clock):
        session = new_session(store, foo=1)
        for _ in range(5):
            clock.advance(LIFETIME - 1)
            with visit(store, session.uid):
                clock.advance(LIFETIME - 1)
        clock.advance(LIFETIME)
        assert store.open(session.uid) is None

    def test_activity_doesnt_extend_the_absolute_deadline(self, store, clock):
        session = new_session(store, max_lifetime=25, foo=1)
        for _ in range(3):
            clock.advance(8)
            with visit(store, session.uid) as again:
                again.touch()
        assert again.expires == 1_000_025
        clock.advance(1)
        assert store.open(session.uid) is None

    def test_a_request_that_outlasts_the_absolute_deadline_is_the_last(self, store, clock):
        session = new_session(store, max_lifetime=15, witness="w")
        clock.advance(9)
        with visit(store, session.uid) as again:
            clock.advance(6)
            again.foo = 1
        assert store.open(session.uid) is None
        assert Witness.saw == ["w"]

    @pytest.mark.parametrize("seconds", [3, 20])
    def test_setLifetime_sets_the_idle_timeout_of_one_session(self, store, clock, seconds):
        session, other = new_session(store, foo=1), new_session(store, foo=1)
        with visit(store, session.uid) as again:
            again.setLifetime(seconds)
        clock.advance(min(seconds, LIFETIME) - 1)
        with visit(store, other.uid):
            pass
        clock.advance(seconds - (min(seconds, LIFETIME) - 1) - 0.001)
        assert store.open(session.uid, hold=False) is not None
        later = new_session(store, foo=1)
        with visit(store, later.uid) as again:
            again.setLifetime(seconds)
        clock.advance(seconds)
        assert store.open(later.uid) is None

    def test_without_limits_it_never_ends(self, store, clock):
        never, idle = new_session(store, float("inf"), float("inf"), foo=1), new_session(store, foo=1)
        with visit(store, idle.uid) as again:
            again.setLifetime(None)
        clock.advance(MAX_LIFETIME - 1)
        assert store.open(idle.uid, hold=False) is not None
        clock.advance(10 * 365 * 86400)
        assert store.sweep() == 1
        assert store.open(never.uid) is not None

    def test_sweep_ends_those_that_are_due_and_says_how_many(self, store, clock):
        due = [new_session(store, witness=n) for n in range(30)]
        clock.advance(1)
        kept = new_session(store, witness="kept")
        clock.advance(LIFETIME - 1 - 0.001)
        assert store.sweep() == 0
        clock.advance(0.001)
        assert store.sweep() == 30
        assert store.sweep() == 0
        assert sorted(Witness.saw) == list(range(30))
        assert len(store) == 1
        assert store.open(kept.uid, hold=False) is not None
        assert all(store.open(session.uid) is None for session in due)

    def test_sweep_spares_those_that_were_used_meanwhile(self, store, clock):
        used, unused = new_session(store, foo=1), new_session(store, foo=1)
        clock.advance(LIFETIME - 1)
        with visit(store, used.uid):
            pass
        clock.advance(1)
        assert store.sweep() == 1
        assert store.open(unused.uid) is None
        clock.advance(LIFETIME - 1)
        assert store.sweep() == 1
        assert store.open(used.uid) is None

    def test_making_sessions_ends_the_abandoned_ones(self, store, clock):
        for n in range(40):
            new_session(store, witness=n)
        clock.advance(LIFETIME)
        for _ in range(40):
            new_session(store, foo=1)
        assert sorted(Witness.saw) == list(range(40))
        assert len(store) == 40

    # Callbacks

    def test_callbacks_run_once_and_in_order(self, store, clock):
        session = new_session(store, witness="w")
        with visit(store, session.uid) as again:
            again.notifyOnExpire(IWitness(again).ended_too)
        with visit(store, session.uid) as again:
            again.notifyOnExpire(IWitness(again).ended)
        assert Witness.saw == []
        with visit(store, session.uid) as again:
            again.expire()
            again.expire()
        clock.advance(LIFETIME)
        store.sweep()
        assert Witness.saw == ["w", "w too", "w"]

    def test_a_callback_that_raises_is_logged_and_stops_nothing(self, store, clock, caplog):
        session = store.create(LIFETIME, MAX_LIFETIME)
        session.setComponent(IWitness, Witness("w"))
        session.notifyOnExpire(IWitness(session).stumble)
        session.notifyOnExpire(IWitness(session).ended)
        store.save(session)
        new_session(store, witness="other")
        clock.advance(LIFETIME)
        assert store.sweep() == 2
        assert sorted(Witness.saw) == ["other", "w"]
        (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert record.name == "minisess"
        assert record.exc_info[0] is ZeroDivisionError
        assert session.uid not in caplog.text

    # Ending

    def test_expire_ends_it_at_once(self, store):
        session, other = new_session(store, witness="w"), new_session(store, foo=1)
        held = store.open(session.uid)
        held.expire()
        assert Witness.saw == ["w"]
        assert len(store) == 1
        assert store.open(session.uid) is None
        assert store.open(other.uid) is not None

    def test_what_a_request_in_flight_does_to_an_ended_session_is_lost(self, store, caplog):
        session = new_session(store, witness="w")
        mine = store.open(session.uid)
        store.open(session.uid, hold=False).expire()
        mine.foo = 1
        mine.setComponent(IDiary, 1)
        caplog.clear()
        store.save(mine)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert len(store) == 0
        assert store.open(session.uid) is None
        assert Witness.saw == ["w"]

    @pytest.mark.parametrize("change", [lambda s: s.renew(), lambda s: s.login("eve")], ids=["renew", "login"])
    def test_nobody_resurrects_an_ended_session(self, store, change):
        session = new_session(store, owner="ann")
        mine = store.open(session.uid)
        assert store.expireAll("ann") == 1
        with pytest.raises(SessionError):
            change(mine)
        store.save(mine)
        assert len(store) == 0
        assert store.open(mine.uid) is None
        assert store.expireAll("ann") == store.expireAll("eve") == 0

    def test_expireAll_ends_what_belongs_to_an_owner(self, store):
        ann = [new_session(store, witness=n, owner="ann") for n in range(3)]
        bob, nobody = new_session(store, witness="bob", owner="bob"), new_session(store, witness="nobody")
        assert store.expireAll("eve") == 0
        with visit(store, ann[1].uid) as mine:
            assert store.expireAll("ann", keep=mine) == 2
        assert sorted(Witness.saw) == [0, 2]
        assert [store.open(s.uid, hold=False) is not None for s in (*ann, bob, nobody)] == [
            False,
            True,
            False,
            True,
            True,
        ]
        assert store.expireAll("ann") == 1
        assert store.expireAll("ann") == 0
        assert len(store) == 2

    def test_expireAll_reaches_a_session_in_use(self, store):
        session = new_session(store, owner="ann")
        mine = store.open(session.uid)
        assert store.expireAll("ann") == 1
        mine.foo = 1
        store.save(mine)
        assert len(store) == 0

    # Renewing

    @pytest.mark.parametrize("change", [lambda s: s.renew(), lambda s: s.login("ann")], ids=["renew", "login"])
    def test_the_old_id_is_dead_at_once(self, store, change):
        session = new_session(store, witness="w", foo=1)
        old = session.uid
        mine = store.open(old)
        change(mine)
        assert mine.uid != old
        assert store.open(old) is None
        assert store.open(old, hold=False) is None
        store.save(mine)
        assert store.open(old) is None
        assert len(store) == 1
        assert Witness.saw == []
        with visit(store, mine.uid) as again:
            assert again.foo == 1
            assert IWitness(again).name == "w"
            again.expire()
        assert Witness.saw == ["w"]

    def test_a_session_is_held_under_its_new_id_too(self, store):
        mine = store.open(new_session(store, foo=1).uid)
        mine.renew()
        with pytest.raises(SessionBusy):
            store.open(mine.uid, patience=0)
        store.save(mine)
        assert store.open(mine.uid, patience=0) is not None

    def test_login_starts_the_absolute_clock_again_and_renew_doesnt(self, store, clock):
        one, two = new_session(store, max_lifetime=15, foo=1), new_session(store, max_lifetime=15, foo=1)
        clock.advance(9)
        with visit(store, one.uid) as one:
            one.renew()
        with visit(store, two.uid) as two:
            two.login("ann")
        assert (one.owner, two.owner) == (None, "ann")
        clock.advance(6)
        assert store.open(one.uid) is None
        with visit(store, two.uid):
            pass
        clock.advance(9)
        assert store.open(two.uid) is None

    def test_who_logs_in_again_belongs_to_the_new_owner_only(self, store):
        session = new_session(store, owner="ann")
        with visit(store, session.uid) as mine:
            mine.login("bob")
        assert store.expireAll("ann") == 0
        assert store.open(mine.uid, hold=False).owner == "bob"
        assert store.expireAll("bob") == 1

    # Holding

    def test_others_wait_until_it_is_let_go(self, store):
        session = new_session(store, n=1)
        mine = store.open(session.uid)

        def other():
            with visit(store, session.uid) as theirs:
                theirs.n *= 10
                return theirs.n

        thread = Background(other)
        assert thread.is_stuck()
        mine.n += 1
        store.save(mine)
        assert thread.result() == 20

    def test_who_waits_in_vain_is_told_so(self, store):
        session = new_session(store, foo=1)
        mine = store.open(session.uid)
        with pytest.raises(SessionBusy) as caught:
            store.open(session.uid, patience=0.02)
        assert caught.value.patience == 0.02
        assert isinstance(caught.value, TimeoutError)
        store.save(mine)
        assert store.open(session.uid, patience=0) is not None

    def test_without_hold_nobody_waits(self, store):
        session = new_session(store, foo=1)
        with visit(store, session.uid):
            assert store.open(session.uid, patience=0, hold=False).foo == 1
            with pytest.raises(SessionBusy):  # and it is held still
                store.open(session.uid, patience=0)
        assert store.open(session.uid, patience=0) is not None

    def test_what_two_requests_without_hold_set_is_both_kept(self, store):
        session = new_session(store, foo=1)
        one, two = store.open(session.uid, hold=False), store.open(session.uid, hold=False)
        one.one, two.two = 1, 2
        store.save(one)
        store.save(two)
        with visit(store, session.uid) as again:
            assert vars(again) == {"foo": 1, "one": 1, "two": 2}

    def test_callbacks_that_two_requests_without_hold_add_all_run_once(self, store):
        session = new_session(store, witness="gone")
        with visit(store, session.uid) as first:
            first.setComponent(IDiary, Witness("diary"))
        one, two = store.open(session.uid, hold=False), store.open(session.uid, hold=False)
        one.notifyOnExpire(IWitness(one).ended_too)
        two.notifyOnExpire(IDiary(two).ended)
        store.save(one)
        store.save(two)
        store.open(session.uid).expire()
        assert sorted(Witness.saw) == ["diary", "gone", "gone too"]

    @pytest.mark.parametrize(
        "end",
        [lambda s: s.renew(), lambda s: s.login("ann"), lambda s: s.expire()],
        ids=["renew", "login", "expire"],
    )
    def test_who_waits_for_an_id_that_dies_gets_nothing(self, store, end):
        session = new_session(store, foo=1)
        uid = session.uid
        mine = store.open(uid)
        thread = Background(store.open, uid)
        assert thread.is_stuck()
        end(mine)
        assert thread.result() is None
        store.save(mine)

    def test_a_session_in_use_isnt_swept_but_judged_when_it_is_let_go(self, store, clock):
        saved, dropped = new_session(store, witness="saved"), new_session(store, witness="dropped")
        one, two = store.open(saved.uid), store.open(dropped.uid)
        clock.advance(LIFETIME + 1)
        assert store.sweep() == 0
        assert len(store) == 2
        store.save(one)
        store.release(two)
        assert store.open(saved.uid) is not None
        assert store.open(dropped.uid) is None
        assert Witness.saw == ["dropped"]

    def test_release_by_the_store_lets_go_without_saving(self, store):
        session = new_session(store, foo=1)
        mine = store.open(session.uid)
        store.release(mine)
        store.release(mine)
        assert store.open(session.uid, patience=0).foo == 1

    def test_release_saves_and_lets_the_next_one_in(self, store):
        session = new_session(store, foo=1)
        mine = store.open(session.uid)
        mine.foo = 2
        mine.release()
        mine.release()
        theirs = Background(store.open, session.uid, 0).result()
        assert theirs.foo == 2
        mine.release()  # but it isn't mine any more
        with pytest.raises(SessionBusy):
            store.open(session.uid, patience=0)

    def test_release_of_a_new_session_stores_it(self, store):
        session = store.create(LIFETIME, MAX_LIFETIME)
        session.foo = 1
        session.release()
        assert store.open(session.uid, patience=0).foo == 1

    def test_each_request_builds_on_the_one_before(self, store):
        session = new_session(store, n=0)

        def requests():
            for _ in range(15):
                with visit(store, session.uid, patience=20) as mine:
                    n = mine.n
                    time.sleep(0)  # lets another thread run
                    mine.n = n + 1

        for thread in [Background(requests) for _ in range(6)]:
            thread.result()
        assert store.open(session.uid).n == 90

    # All together

    def test_a_random_walk_agrees_with_a_model(self, store, clock):
        for seed in self.seeds:
            RandomWalk(store, clock, seed).take(self.steps)


class RandomWalk:
    """Does at random what requests do to a store, and to a model of it: dicts by uid.

    Some requests are still in flight when others come.  A session's witness notes its end, so
    that at any time it is known exactly which sessions are stored: those that live, and those
    whose time is up but whom nobody has noticed yet.
    """

    def __init__(self, store, clock, seed):
        self.store, self.clock, self.random, self.seed = store, clock, random.Random(seed), seed
        self.live = {}  # uid -> what the session should be
        self.due = {}  # witness name -> model of those that are past their deadline
        self.ended = []  # names of witnesses whose sessions were ended by us
        self.dead = []  # uids that were used once
        self.flights = []  # (session, model, when it was opened)
        self.names = 0
        store.sweep()
        Witness.saw.clear()
        self.already = len(store)

    def take(self, steps):
        actions = [self.begin, self.finish, self.visit, self.look, self.expire_other, self.expire_all, self.sweep]
        weights = [3, 3, 8, 2, 1, 1, 1]
        for self.step in range(steps):
            for action in [self.create, self.pass_time, *self.random.choices([*actions], weights, k=2)]:
                if action in (self.create, self.pass_time) and self.random.random() < 0.5:
                    continue
                try:
                    action()
                    self.check()
                except BaseException as error:
                    where = f"seed {self.seed}, step {self.step}, {action.__name__}"
                    raise AssertionError(f"the store and the model part at {where}") from error
        while self.flights:
            self.finish()
        self.clock.advance(1000)
        self.judge()
        self.sweep()
        self.check()
        assert len(self.store) == self.already

    # The model

    def judge(self):
        """Put those aside whose time is up, but not while they are held."""
        held = {id(model) for _, model, _ in self.flights}
        for uid, model in list(self.live.items()):
            deadline = min(model["used"] + model["lifetime"], model["since"] + model["max"])
            if self.clock.now >= deadline and id(model) not in held:
                self.due[model["name"]] = self.live.pop(uid)
                self.dead.append(uid)

    def check(self):
        for name in Witness.saw:
            if name in self.due:
                self.ended.append(name)
                del self.due[name]
        assert sorted(Witness.saw) == sorted(self.ended)
        assert len(self.store) - self.already == len(self.live) + len(self.due)
        del self.dead[:-30]

    def kill(self, uid):
        self.ended.append(self.live.pop(uid)["name"])
        self.dead.append(uid)

    def in_flight(self, model):
        return any(other is model for _, other, _ in self.flights)

    def pick(self, free=None):
        """Some uid of a live session, or (rarely) another; *free*: not one in flight."""
        uids = [uid for uid, model in self.live.items() if not (free and self.in_flight(model))]
        if not uids or self.random.random() < 0.15:
            uids = self.dead or ["A" * 43]
        return self.random.choice(uids)

    # The steps

    def create(self):
        random, now = self.random, self.clock.now
        session = self.store.create(random.choice([4, 8, 15]), random.choice([20, 40, 80]))
        uid, owner = session.uid, random.choice([None, None, "ann", "bob"])
        if random.random() < 0.2:
            self.store.save(session)  # it is empty: never heard of again
            self.dead.append(uid)
            return
        self.names += 1
        session.setComponent(IWitness, Witness(self.names))
        session.notifyOnExpire(IWitness(session).ended)
        session.n = 0
        if owner:
            session.login(owner)
        self.store.save(session)
        model = {"name": self.names, "n": 0, "owner": owner, "used": now, "since": now}
        self.live[session.uid] = {**model, "lifetime": session.lifetime, "max": session.max_lifetime}

    def pass_time(self):
        seconds = self.random.choice([0.5, 1, 2, 5])
        while self.flights and self.clock.now + seconds - self.flights[0][2] > 20:
            self.finish(first=True)
        self.clock.advance(seconds)
        self.judge()

    def open(self, uid, hold):
        """Open *uid*, and see that the session is as it should be; answers it and its model, or None."""
        model = self.live.get(uid)
        if model is not None and hold and self.in_flight(model):
            with pytest.raises(SessionBusy):
                self.store.open(uid, patience=0)
            return None
        session = self.store.open(uid, patience=0, hold=hold)
        assert (session is None) == (model is None)
        if session is None:
            return None
        model["used"] = self.clock.now
        assert (session.uid, session.owner, session.lifetime) == (uid, model["owner"], model["lifetime"])
        assert vars(session) == {"n": model["n"]}
        assert IWitness(session).name == model["name"]
        return session, model

    def begin(self):
        if len(self.flights) < 3:
            opened = self.open(self.pick(), hold=True)
            if opened:
                self.flights.append((*opened, self.clock.now))

    def finish(self, first=False):
        if self.flights:
            session, model, _ = self.flights.pop(0 if first else self.random.randrange(len(self.flights)))
            self.use(session, model)

    def visit(self):
        opened = self.open(self.pick(), hold=True)
        if opened:
            self.use(*opened)

    def use(self, session, model):
        """The rest of a request: change something, save, let go."""
        uid = session.uid
        alive = self.live.get(uid) is model
        change = self.random.choice(["count", "count", "count", "renew", "login", "expire", "setLifetime"])
        if change == "expire":
            session.expire()
            if alive:
                self.kill(uid)
                alive = False
        elif change == "setLifetime":
            session.setLifetime(self.random.choice([4, 8, 15]))
            model["lifetime"] = session.lifetime
        elif change == "count":
            session.n = model["n"] = model["n"] + 1
        else:
            owner = self.random.choice(["ann", "bob"])
            with contextlib.nullcontext() if alive else pytest.raises(SessionError):
                session.renew() if change == "renew" else session.login(owner)
            if alive:
                assert session.uid != uid
                self.dead.append(uid)
                self.live[session.uid] = self.live.pop(uid)
                if change == "login":
                    model.update(owner=owner, since=self.clock.now)
        self.store.save(session)
        if alive:
            model["used"] = self.clock.now
        self.judge()

    def look(self):
        """A request that holds nothing."""
        uid = self.pick(free=True)
        opened = self.open(uid, hold=False)
        if opened:
            session, model = opened
            session.n = model["n"] = model["n"] + 1
            self.store.save(session)

    def expire_other(self):
        """End a session, in flight or not, by somebody who doesn't hold it."""
        uid = self.pick()
        model = self.live.get(uid)
        if model is not None and self.clock.now < min(model["used"] + model["lifetime"], model["since"] + model["max"]):
            self.store.open(uid, hold=False).expire()
            self.kill(uid)

    def expire_all(self):
        owner, keep = self.random.choice(["ann", "bob", "eve"]), None
        if self.flights and self.random.random() < 0.5:
            keep = self.random.choice(self.flights)[0]
        theirs = [uid for uid, model in self.live.items() if model["owner"] == owner]
        due = [name for name, model in self.due.items() if model["owner"] == owner]
        if keep is not None and keep.uid in theirs:
            theirs.remove(keep.uid)
        assert self.store.expireAll(owner, keep=keep) == len(theirs) + len(due)
        for uid in theirs:
            self.kill(uid)

    def sweep(self):
        assert self.store.sweep() == len(self.due)
        assert set(self.due) <= set(Witness.saw)


class TestSession:
    """What needs no store in particular."""

    @pytest.fixture
    def session(self):
        return MemoryStore(clock=Clock()).create(LIFETIME, MAX_LIFETIME)

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("owner", r"session\.login\(owner\)"),
            ("lifetime", r"session\.setLifetime\(seconds\)"),
            ("uid", r"session\.renew\(\)"),
            *(
                (name, "another name")
                for name in ("created", "expires", "expire", "setComponent", "_state", "__class__")
            ),
        ],
    )
    def test_names_of_its_own_cant_be_set_or_deleted(self, session, name, hint):
        before = getattr(session, name)
        with pytest.raises(AttributeError, match=hint):
            setattr(session, name, "mine")
        with pytest.raises(AttributeError):
            delattr(session, name)
        assert getattr(session, name) == before
        assert vars(session) == {}

    def test_its_dict_is_exactly_the_users(self, session):
        session.foo = 1
        session._bar = 2
        session.setComponent(IWitness, Witness("w"))
        assert vars(session) == {"foo": 1, "_bar": 2}
        del session.foo
        assert vars(session) == {"_bar": 2}
        with pytest.raises(AttributeError):
            del session.foo

    def test_GuardSession_is_another_name_for_it(self, session):
        assert GuardSession is Session
        assert ISession(session) is session
        assert isinstance(session, ISession)

    @pytest.mark.parametrize("seconds", [0, -1, "5", True, float("nan")])
    def test_a_lifetime_is_a_positive_number(self, session, seconds):
        with pytest.raises(ValueError, match="positive number of seconds"):
            session.setLifetime(seconds)
        assert session.lifetime == LIFETIME

    @pytest.mark.parametrize("owner", [None, "", 7, b"ann"])
    def test_an_owner_is_a_str_that_isnt_empty(self, session, owner):
        uid = session.uid
        with pytest.raises(TypeError, match="an owner is a name"):
            session.login(owner)
        assert (session.uid, session.owner) == (uid, None)

    def test_a_callback_can_be_called(self, session):
        with pytest.raises(TypeError, match="can't be called"):
            session.notifyOnExpire("no")

    def test_neither_repr_nor_logs_show_a_uid(self, session, caplog):
        caplog.set_level(logging.DEBUG, "minisess")
        store, uids = session._store, [session.uid]
        session.setComponent(IWitness, Witness("w"))
        assert re.fullmatch(r"<Session [0-9a-f]{8}, new, keeps IWitness>", repr(session))
        store.save(session)
        session.login("ann")
        uids.append(session.uid)
        shown = repr(session)
        session.expire()
        store.save(session)
        messages = [record.getMessage() for record in caplog.records]
        assert [message.split(" ", 2)[2].split(":")[0] for message in messages] == [
            "created",
            "renewed",
            "ended",
            "has ended while a request used it",
        ]
        assert not any(uid in text for uid in uids for text in [shown, repr(session), *messages])
        assert "of 'ann'" in shown


# Memory store
# ---------------------------------------------------------------------------


class TestMemoryStoreContract(StoreContract):
    steps, seeds = 3000, (1, 2, 3)

    def make_store(self, clock, **options):
        return MemoryStore(clock=clock, **options)


@contextlib.contextmanager
def often_switching():
    """Threads take turns after a few instructions already."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class TestMemoryStore:
    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def store(self, clock):
        return MemoryStore(clock=clock)

    @pytest.fixture
    def without_gc(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    # Holding

    def test_16_threads_count_to_8000(self):
        def application(environ, start_response):
            counter = ICounter(ISession(environ))
            hits = counter.hits
            time.sleep(0)  # the others would read the same number now
            counter.hits = hits + 1
            start_response("200 OK", [])
            return []

        store = MemoryStore()
        wrapped = SessionMiddleware(application, store, patience=25)
        uid = new_session(store, 1000, 1000, foo=1).uid

        def requests():
            for _ in range(500):
                wrapped({"wsgi.url_scheme": "http", "HTTP_COOKIE": f"sid={uid}"}, lambda *_: None)

        for thread in [Background(requests) for _ in range(16)]:
            thread.result()
        assert ICounter(store.open(uid)).hits == 8000

    def test_requests_that_dont_touch_the_session_never_wait(self, store):
        browser = Browser(wrap(counter_app, store, patience=0))
        browser.get()
        mine = store.open(browser.cookies["sid"])
        assert browser.get("/no").text == "hello"
        with pytest.raises(SessionBusy):
            browser.get()
        store.save(mine)
        assert browser.get().text == "2"

    def test_without_locking_nobody_waits(self, store):
        browser = Browser(wrap(counter_app, store, locking=False, patience=0))
        browser.get()
        mine = store.open(browser.cookies["sid"])
        assert Background(browser.get).result().text == "2"
        with pytest.raises(SessionBusy):
            store.open(mine.uid, patience=0)
        store.save(mine)
        assert store.open(mine.uid, patience=0) is not None

    def raises(self, call):
        raise ZeroDivisionError

    def exits(self, call):
        raise SystemExit

    def returns_nothing_at_all(self, call):
        return None

    def doesnt_start(self, call):
        return []

    def lists(self, call):
        call("200 OK", [])
        return [b"1"]

    def generates(self, call):
        call("200 OK", [])
        yield b"1"
        yield b"2"

    def generates_an_error(self, call):
        call("200 OK", [])
        raise ZeroDivisionError
        yield

    def generates_an_error_later(self, call):
        call("200 OK", [])
        yield b"1"
        raise ZeroDivisionError

    def releases(self, call):
        call("200 OK", [])
        self.session.release()
        return iter([b"1"])

    def expires(self, call):
        call("200 OK", [])
        self.session.expire()
        return [b"1"]

    def iterate(body):
        return list(body)

    def leave(body):
        pass

    def close(body):
        body.close()

    def close_twice(body):
        next(body)
        body.close()
        body.close()

    def close_elsewhere(body):
        Background(body.close).result()

    def iterate_elsewhere(body):
        Background(list, body).result()
        body.close()

    @pytest.mark.parametrize(
        ("answer", "take"),
        [
            (raises, iterate),
            (exits, iterate),
            (returns_nothing_at_all, iterate),
            (doesnt_start, iterate),
            (lists, leave),
            (generates, iterate),
            (generates, leave),
            (generates, close),
            (generates, close_twice),
            (generates, close_elsewhere),
            (generates, iterate_elsewhere),
            (generates_an_error, iterate),
            (generates_an_error_later, iterate),
            (releases, leave),
            (releases, iterate),
            (expires, iterate),
        ],
    )
    def test_it_is_let_go_whatever_happens(self, store, answer, take):
        def application(environ, start_response):
            self.session = ISession(environ)
            return answer(self, start_response)

        session = new_session(store, foo=1)
        environ = {"wsgi.url_scheme": "http", "HTTP_COOKIE": f"sid={session.uid}"}
        with contextlib.suppress(ZeroDivisionError, SystemExit, TypeError, AssertionError):
            take(SessionMiddleware(application, store)(environ, lambda *_: None))
        again = store.open(session.uid, patience=0)
        assert again is (None if answer.__name__ == "expires" else session)

    def test_it_is_let_go_if_the_server_refuses_the_headers(self, store):
        def refuse(*_):
            raise ZeroDivisionError

        session = new_session(store, foo=1)
        with pytest.raises(ZeroDivisionError):
            SessionMiddleware(counter_app, store)(Browser(None).environ(HTTP_COOKIE=f"sid={session.uid}"), refuse)
        assert store.open(session.uid, patience=0) is session

    def test_a_forgotten_body_is_let_go_by_the_garbage_collector_wherever_that_strikes(self, store):
        def application(environ, start_response):
            ISession(environ)
            return iter(())

        class Sessions(dict):
            """Runs the garbage collector while somebody waits."""

            def __contains__(self, uid):
                cycle.clear()
                gc.collect()
                return super().__contains__(uid)

        forgotten, busy = new_session(store, foo=1), new_session(store, foo=1)
        environ = Browser(None).environ(HTTP_COOKIE=f"sid={forgotten.uid}")
        cycle = [[SessionMiddleware(application, store)(environ, None)]]
        cycle[0].append(cycle[0])
        store.open(busy.uid)
        store._sessions = Sessions(store._sessions)
        with pytest.raises(SessionBusy):
            Background(store.open, busy.uid, 0.01).result()
        assert store.open(forgotten.uid, patience=0) is not None

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_inherits_neither_holds_nor_locks(self, store):
        held = store.open(new_session(store, foo=1).uid)
        with store._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads may be about
            child = os.fork()
            if not child:
                try:
                    signal.alarm(10)
                    mine = store.open(held.uid, patience=0)
                    mine.renew()
                    store.save(mine)
                    new_session(store, foo=1)
                    os._exit(len(store))
                finally:
                    os._exit(99)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 2
        with pytest.raises(SessionBusy):
            store.open(held.uid, patience=0)

    # Ending

    def test_a_request_in_flight_while_its_session_ends_finishes_and_the_next_starts_anew(self, store):
        def application(environ, start_response):
            session = ISession(environ)
            if environ["PATH_INFO"] == "/slow":
                Background(lambda: store.open(session.uid, hold=False).expire()).result()
                session.foo = 1
            return counter_app(environ, start_response)

        browser = Browser(wrap(application, store))
        assert [browser.get().text, browser.get().text] == ["1", "2"]
        first = browser.cookies["sid"]
        assert browser.get("/slow").status == "200 OK"
        assert store.open(first) is None
        browser.get()
        assert browser.cookies["sid"] != first
        assert len(store) <= 2

    def test_a_response_keeps_its_hands_off_the_cookie_if_another_thread_ended_the_session(self, store):
        def application(environ, start_response):
            session = ISession(environ)
            if environ["PATH_INFO"] == "/login":
                session.login("ann")
            else:
                Background(store.expireAll, "ann").result()
            return plain(start_response)

        browser = Browser(wrap(application, store))
        browser.get("/login")
        assert browser.get()["Set-Cookie"] is None

    def test_an_id_planted_by_an_attacker_is_worth_nothing_after_the_login(self, store):
        def application(environ, start_response):
            session = ISession(environ)
            if environ["PATH_INFO"] == "/login":
                session.login("ann")
            session.seen = True
            return plain(start_response, session.owner)

        attacker, victim = (Browser(wrap(application, store)) for _ in range(2))
        attacker.get()
        victim.cookies.update(attacker.cookies)
        assert victim.get("/login").text == "ann"
        assert victim.get().text == "ann"
        assert attacker.get().text == "None"

    @pytest.mark.parametrize("ender", ["expire", "open", "sweep", "expireAll", "capacity", "another's request"])
    def test_it_ends_by_reference_counting_alone(self, clock, without_gc, ender):
        store = MemoryStore(clock=clock, capacity=1)
        session = store.create(LIFETIME, MAX_LIFETIME)
        witness, lines = Witness("w"), []
        diary = Diary(session, witness)
        witness.session = session.attribute = session.me = session
        session.setComponent(IDiary, diary)
        session.setComponent(IWitness, witness)
        session.notifyOnExpire(witness.ended)
        session.notifyOnExpire(lambda session=session: lines.append(session))
        session.login("ann")
        store.save(session)
        uid, refs = session.uid, [weakref.ref(each) for each in (session, witness, diary)]
        del session, witness, diary
        assert None not in [ref() for ref in refs]
        if ender in ("open", "sweep", "another's request"):
            clock.advance(LIFETIME)
        {
            "expire": lambda: store.open(uid).expire(),
            "open": lambda: store.open(uid),
            "sweep": store.sweep,
            "expireAll": lambda: store.expireAll("ann"),
            "capacity": lambda: new_session(store, foo=1),
            "another's request": lambda: store.open("A" * 43),
        }[ender]()
        assert len(lines) == 1
        lines.clear()
        assert [ref() for ref in refs] == [None] * 3

    def test_a_failed_request_leaves_nothing_to_the_garbage_collector(self, store, without_gc):
        refs = []

        def application(environ, start_response):
            session = ISession(environ)
            session.setComponent(IDiary, Diary(session, None))
            refs.append(weakref.ref(IDiary(session)))
            raise ZeroDivisionError

        with contextlib.suppress(ZeroDivisionError):
            SessionMiddleware(application, store)(Browser(None).environ(), None)
        assert refs[0]() is None

    def test_callbacks_may_use_the_store_and_other_sessions(self, store, clock):
        other, seen = new_session(store, 1000, 1000, foo=1, owner="ann"), []

        def callback():
            session.expire()
            seen.append(len(store))
            seen.append(store.open(session.uid))
            with visit(store, other.uid) as opened:
                opened.foo += 1
                opened.renew()
            new_session(store, 1000, 1000, foo=1)
            store.sweep()
            store.expireAll("bob")

        def expire():
            session.expire()

        def open_it():
            store.open(session.uid)

        for end in (expire, store.sweep, open_it):
            session = new_session(store, owner="bob")
            with visit(store, session.uid):
                session.notifyOnExpire(callback)
            clock.advance(LIFETIME if seen else 0)
            Background(end).result()
        assert (other.foo, len(store)) == (4, 4)
        assert seen == [1, None, 2, None, 3, None]

    def test_an_expired_session_ends_once_however_many_notice(self, store, clock):
        sessions = [new_session(store, witness=n, owner="ann") for n in range(300)]
        clock.advance(LIFETIME)
        start = threading.Barrier(5)

        def notice(how):
            start.wait(10)
            return how()

        with often_switching():
            opening = [Background(notice, lambda: [store.open(s.uid) for s in sessions]) for _ in range(2)]
            counting = [Background(notice, how) for how in (store.sweep, lambda: store.expireAll("ann"))]
            expiring = Background(notice, lambda: [session.expire() for session in reversed(sessions)])
            assert all(session is None for thread in opening for session in thread.result())
            assert sum(thread.result() for thread in counting) <= 300
            expiring.result()
        assert sorted(Witness.saw) == list(range(300))
        assert len(store) == 0

    def test_of_two_renewals_at_once_both_leave_it_where_its_uid_says(self, store):
        start = threading.Barrier(3)

        def renew(session):
            start.wait(10)
            session.renew()

        with often_switching():
            for _ in range(100):
                session = new_session(store, foo=1)
                threads = [Background(renew, session) for _ in range(3)]
                for thread in threads:
                    thread.result()
                assert store.open(session.uid, hold=False) is session
                session.expire()
                assert len(store) == 0

    def test_in_the_end_nothing_is_held_lost_or_forgotten(self, clock):
        """Threads do what they can to get in each other's way; then all that lives is free, and all ends once."""
        store = MemoryStore(clock=clock, capacity=12)
        uids, names = [], iter(range(10**6))

        def trouble(seed):
            rng = random.Random(seed)
            for _ in range(400):
                known = list(uids)
                if not known or rng.random() < 0.2:
                    uids.append(new_session(store, witness=next(names), owner="ann").uid)
                    del uids[:-15]
                    continue
                session = store.open(rng.choice(known), patience=5, hold=rng.random() < 0.8)
                clock.advance(0.02)
                if session is None:
                    continue
                with contextlib.suppress(SessionError):
                    for change in rng.choices([session.renew, session.release, session.touch, store.sweep], k=2):
                        change()
                        uids.append(session.uid)
                if rng.random() < 0.1:
                    store.expireAll("ann", keep=session)
                store.save(session)

        with often_switching():
            for thread in [Background(trouble, seed) for seed in range(6)]:
                thread.result()
        for uid in uids:
            session = store.open(uid, patience=0)
            if session is not None:
                store.save(session)
        clock.advance(MAX_LIFETIME)
        store.sweep()
        assert len(store) == 0
        assert sorted(Witness.saw) == list(range(next(names)))

    # Bounds

    def test_past_its_capacity_expired_ones_go_first_then_those_closest_to_expiry(self, clock):
        store = MemoryStore(clock=clock, capacity=4)
        for name, lifetime in [("long", 50), ("short", 20), ("middle", 30), ("expired", 5)]:
            session = new_session(store, lifetime, witness=name)
            if name == "short":
                short = session
        clock.advance(5)
        with visit(store, short.uid):
            short.setLifetime(40)
        for _ in range(5):
            new_session(store, 60, foo=1)
        assert Witness.saw == ["expired", "middle", "short", "long"]
        assert len(store) == 4

    def test_capacity_spares_sessions_in_use(self, clock):
        store = MemoryStore(clock=clock, capacity=1)
        used = store.open(new_session(store, witness="used").uid)
        new_session(store, 50, witness="other")
        assert Witness.saw == []
        store.save(used)
        new_session(store, 60, witness="another")
        assert Witness.saw == ["used", "other"]
        assert len(store) == 1

    def test_capacity_holds_with_many_threads(self):
        store = MemoryStore(capacity=20)

        def fill():
            most = 0
            for _ in range(150):
                new_session(store, foo=1)
                most = max(most, len(store))
            return most

        with often_switching():
            assert max(thread.result() for thread in [Background(fill) for _ in range(6)]) == 20

    @pytest.mark.parametrize("capacity", [0, -1, 1.5, "3"])
    def test_a_capacity_is_a_positive_int(self, capacity):
        with pytest.raises(ValueError, match="capacity"):
            MemoryStore(capacity=capacity)

    def test_no_request_pays_for_many_and_in_the_end_all_are_gone(self, store, clock):
        for n in range(5000):
            new_session(store, witness=n)
        clock.advance(LIFETIME)
        left = 5000
        for _ in range(5000):
            if not left:
                break
            store.open("A" * 43)
            assert 0 < left - len(store) <= 8
            left = len(store)
        assert left == 0
        assert len(Witness.saw) == 5000

    def test_a_save_while_the_callbacks_of_others_run_is_logged(self, store, caplog):
        sessions = [new_session(store, owner="alice", foo=1) for _ in range(3)]
        for session in sessions:
            session.notifyOnExpire(lambda: [store.save(other) for other in sessions])
        caplog.clear()
        assert store.expireAll("alice") == 3
        assert sum("nothing is saved" in record.getMessage() for record in caplog.records) == 9
        assert len(store) == 0

    @pytest.mark.parametrize("how", ["replaced", "unset", "removed", "ended", "cleared"])
    def test_a_component_is_destroyed_when_no_lock_is_held(self, store, how):
        class Witnessed:
            def __del__(self):
                def work():
                    Componentized().setComponent(IDiary, object())
                    new_session(store, 10, 10, foo=1)
                    done.append(how)

                thread = threading.Thread(target=work, daemon=True)
                thread.start()
                thread.join(5)

        done = []
        session = new_session(store, 10, 10, foo=1)
        session.setComponent(IDiary, Witnessed())
        if how == "replaced":
            session.setComponent(IDiary, object())
        elif how == "unset":
            session.unsetComponent(IDiary)
        elif how == "removed":
            session.removeComponent(session.getComponent(IDiary))
        elif how == "ended":
            session.expire()
        else:
            session._clear()
        assert done == [how]

    def test_100000_visits_that_only_look_leave_nothing(self):
        def application(environ, start_response):
            session = ISession(environ)
            getattr(session, "foo", None)
            IWitness(session, None)
            IPassing(session)
            return plain(start_response, IDiary in session)

        store, headers = MemoryStore(), []
        wrapped = SessionMiddleware(application, store)
        for _ in range(100_000):
            wrapped({"wsgi.url_scheme": "http"}, lambda status, h: headers.extend(h))
        assert len(store) == 0
        assert {name for name, _ in headers} == {"Content-Type", "Vary"}

    def test_a_session_with_a_counter_takes_less_than_700_bytes(self):
        store, count = MemoryStore(), 20_000

        def fill():
            for _ in range(count):
                session = store.create(1800, 43200)
                ICounter(session).hits += 1
                store.save(session)

        gc.collect()
        tracemalloc.start()
        try:
            fill()
            used = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert used / count < 700, used / count

    @pytest.mark.parametrize("limit", [1000, float("inf")])
    def test_its_heap_doesnt_grow_with_use(self, store, limit):
        session = new_session(store, limit, limit, foo=1)
        for n in range(2000):
            with visit(store, session.uid):
                session.touch()
                session.setLifetime(min(limit, 3000) - n / 10)
                session.renew()
            with visit(store, session.uid):
                session.setLifetime(limit)
            store.release(store.open(session.uid))
            new_session(store, limit, limit, foo=1).expire()
        assert len(store) == 1
        assert len(store._heap) < 200
        assert not store._held


# Persistent stores: places for records
# ---------------------------------------------------------------------------


class Server:
    """A program that serves a port; tests may stop it and start it again."""

    def __init__(self, command, **options):
        self.port, self.command, self.options = free_port(), command, options
        self.start()

    def start(self):
        command = [part.replace("PORT", str(self.port)) for part in self.command]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self.options)
        wait_for(self.port, self.process)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@contextlib.contextmanager
def running(command, **options):
    server = Server(command, **options)
    try:
        yield server
    finally:
        server.stop()


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
    package("psycopg")
    package("psycopg_pool")
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
            psycopg = package("psycopg")
            wait_until(lambda: psycopg.connect(server.address).close() or True, psycopg.OperationalError)
            yield server


def wait_until(answers, *errors, seconds=30):
    """Call *answers* until it answers something true and raises none of *errors*; that answer."""
    end = time.monotonic() + seconds
    while True:
        try:
            answer = answers()
        except errors:
            if time.monotonic() > end:
                raise
            answer = None
        if answer:
            return answer
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


class Place:
    """Where records lie; makes stores that share it.  Another process makes one of the same arguments."""

    def __init__(self, kind, address, name):
        self.arguments = kind, address, name
        self.kind, self.address, self.name = kind, address, name
        self.closing = contextlib.ExitStack()

    def __enter__(self):
        if self.kind == "postgres":
            pool = package("psycopg_pool").ConnectionPool(self.address, min_size=1, max_size=4, timeout=5, open=True)
            self.pool = self.closing.enter_context(pool)
            self.connect = self.pool.connection
        elif self.kind == "redis":
            self.client = package("redis").Redis(port=self.address)
            self.closing.callback(self.client.close)
        return self

    def __exit__(self, *exc_info):
        self.closing.close()

    def store(self, secret=SECRET, **options):
        if self.kind == "sqlite":
            store = SQLiteStore(self.address, secret=secret, **options)
            self.closing.callback(store.close)
            return store
        if self.kind == "postgres":
            return PostgresStore(self.connect, secret=secret, table=self.name, **options)
        if self.kind == "redis":
            return RedisStore(self.client, secret=secret, prefix=self.name + ":", **options)
        from examples.file_store import FileStore

        return FileStore(self.address, secret=secret, **options)


_places = iter(range(1_000_000))


@pytest.fixture
def place_of(request, tmp_path):
    """``place_of("redis")`` is an empty place there."""
    with contextlib.ExitStack() as stack:

        def make(kind):
            number = next(_places)
            if kind in ("redis", "postgres"):
                address = request.getfixturevalue(f"{kind}_server").address
            else:
                address = str(tmp_path / f"{kind}{number}")
            return stack.enter_context(Place(kind, address, f"test{number}"))

        yield make


@pytest.fixture(params=["sqlite", "postgres", "redis", "file"])
def place(request, place_of):
    return place_of(request.param)


@pytest.fixture
def sqlite(place_of):
    """An SQLite store, for what is the same in all of them."""
    return place_of("sqlite").store()


class TestStoresOutside(StoreContract):
    """SQLite, PostgreSQL, Redis, and the example of a store of one's own."""

    @pytest.fixture(autouse=True)
    def _here(self, place):
        self.place = place

    steps, seeds = 100, (1,)

    def make_store(self, clock, **options):
        return self.place.store(clock=clock, **options)


# Persistent stores: what can be stored
# ---------------------------------------------------------------------------


class IKept(Interface):
    pass


class IOther(Interface):
    pass


class IThird(Interface):
    pass


@storable
class Box:
    """Holds anything."""

    def __init__(self, **content):
        self.__dict__.update(content)

    def open_it(self):
        pass


@storable
class Slotted:
    __slots__ = ("left", "right")


@storable
class Color(enum.Enum):
    RED = "red"


@storable
class Size(enum.IntEnum):
    LARGE = 3


@storable
class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@storable
class Point(typing.NamedTuple):
    x: int
    y: int


@storable
@dataclass(frozen=True)
class Price:
    amount: decimal.Decimal
    currency: str = "EUR"
    notes: list = field(default_factory=list)


@storable
class Words(list):
    pass


@storable
class Table(dict):
    pass


class Stranger:
    """Nobody declared it."""


def kept(store, **components):
    """Store a session that has these for its components (thing=, other=, third=) and answer its uid."""
    session = store.create(1800, 43200)
    for name, component in components.items():
        session.setComponent({"thing": IKept, "other": IOther, "third": IThird}[name], component)
    store.save(session)
    return session.uid


def reopened(store, uid):
    return store.open(uid, hold=False)


def record_of(store, uid):
    return store._unseal(store._key(uid), store.read(store._key(uid)))


UTC = datetime.timezone.utc
STORABLE_VALUES = [
    1 << 200,
    -0.5,
    True,
    "text \N{SNOWMAN}",
    b"bytes",
    3 + 4j,
    (1, (2, (3,))),
    [1, [2, [3]]],
    {"a": {"b": {1: (2,)}}},
    {1, 2},
    frozenset({"a"}),
    bytearray(b"array"),
    datetime.datetime(2024, 2, 29, 12, tzinfo=UTC),
    datetime.datetime(2024, 1, 1, fold=1, tzinfo=datetime.timezone(datetime.timedelta(hours=1), "CET")),
    datetime.date(1, 1, 1),
    datetime.time(23, 59),
    datetime.timedelta(days=-1, microseconds=1),
    decimal.Decimal("1.10"),
    fractions.Fraction(2, 3),
    uuid.UUID(int=5),
    ipaddress.ip_address("127.0.0.1"),
    ipaddress.ip_address("::1"),
    collections.deque([1, 2], maxlen=2),
    collections.OrderedDict(b=1, a=2),
    collections.Counter("hello"),
    Color.RED,
    Size.LARGE,
    Rights.READ | Rights.WRITE,
    Point(1, 2),
    Price(decimal.Decimal(3), notes=[1]),
    Words(["a"]),
    Table(a=1),
]


@pytest.mark.parametrize("value", STORABLE_VALUES, ids=lambda value: f"{type(value).__name__}")
def test_a_value_comes_back_equal_as_a_component_an_attribute_and_inside_others(sqlite, value):
    session = sqlite.create(1800, 43200)
    session.value, session.nested = value, [{"key": (value, [value])}]
    session.setComponent(IKept, value)
    session.setComponent(IOther, Box(value=value))
    sqlite.save(session)
    for _ in range(2):
        again = reopened(sqlite, session.uid)
        found = [again.value, again.nested[0]["key"][0], IKept(again), IOther(again).value]
        assert found == [value] * 4
        assert {type(each) for each in found} == {type(value)}
        sqlite.save(again)


def test_slots_come_back(sqlite):
    thing = Slotted()
    thing.left, thing.right = 1, thing
    again = IKept(reopened(sqlite, kept(sqlite, thing=thing)))
    assert again.left == 1
    assert again.right is again


def test_what_components_share_and_refer_to_is_the_same_object_afterwards(sqlite):
    shared, counter = [1], Box(n=0)
    session = sqlite.create(1800, 43200)
    session.setComponent(IKept, Box(list=shared, other=counter, session=session, again=shared))
    session.setComponent(IOther, counter)
    session.setComponent(IThird, shared)
    session.attribute = counter
    counter.back = IKept(session)
    shared.append(counter)
    sqlite.save(session)
    for order in ([IKept, IOther, IThird], [IThird, IOther, IKept], [IOther, IKept, IThird]):
        again = reopened(sqlite, session.uid)
        for interface in order:
            interface(again)
        thing, other, third = IKept(again), IOther(again), IThird(again)
        assert thing.list is thing.again is third
        assert thing.other is other is again.attribute is third[1]
        assert other.back is thing
        assert thing.session is again


@pytest.mark.parametrize("container", [[], {}, set(), bytearray(b"x"), Words(), Table(), collections.deque()])
def test_one_component_under_two_interfaces_stays_one(sqlite, container):
    session = reopened(sqlite, kept(sqlite, thing=container, other=container, third=Box(it=container)))
    assert IOther(session) is IKept(session) is IThird(session).it


@pytest.mark.parametrize("order", [(IKept, IOther), (IOther, IKept)], ids=["container first", "element first"])
@pytest.mark.parametrize("make", [list, dict.fromkeys, collections.deque, Words, set], ids=lambda make: make.__name__)
def test_a_container_and_what_is_in_it_may_refer_to_each_other(sqlite, make, order):
    element = Box()
    element.container = make([element])
    uid = kept(sqlite, thing=element.container, other=element)
    session = reopened(sqlite, uid)
    for interface in order:
        interface(session)
    assert list(IKept(session)) == [IOther(session)]
    assert IOther(session).container is IKept(session)


@pytest.mark.parametrize(
    "content",
    [
        {"name": "name", "list": ["name", "na" + "me"]},
        {"when": datetime.datetime(2024, 1, 1, tzinfo=UTC), "sum": decimal.Decimal(1), "id": uuid.UUID(int=1)},
        {"words": Words("ab"), "table": Table(a=1), "deque": collections.deque([1], 3), "point": Point(1, 2)},
        {"color": Color.RED, "price": Price(decimal.Decimal(1)), "set": {1, 2}, "bytes": bytearray(b"x")},
    ],
)
def test_reading_isnt_a_change(sqlite, content):
    """What was loaded is dumped as the same bytes, so that it counts as unchanged."""
    uid = kept(sqlite, thing=Box(**content), other=[1], third=Box())
    reader, writer = reopened(sqlite, uid), reopened(sqlite, uid)
    IKept(reader)
    IKept(writer).changed = True
    sqlite.save(writer)
    sqlite.save(reader)
    assert IKept(reopened(sqlite, uid)).changed


def test_reading_a_set_isnt_a_change_in_another_process(sqlite):
    """Sets come in another order there."""
    uid = kept(sqlite, thing=Box(words={f"word {n}" for n in range(100)}))
    script = f"""
        from {__name__} import *
        store = SQLiteStore({sqlite.path!r}, secret=SECRET)
        reader, writer = reopened(store, {uid!r}), reopened(store, {uid!r})
        IKept(reader)
        IKept(writer).changed = True
        store.save(writer)
        store.save(reader)
        print(IKept(reopened(store, {uid!r})).changed)"""
    for seed in "12":
        run = run_python(textwrap.dedent(script), PYTHONHASHSEED=seed)
        assert run.stdout == "True\n", run.stderr


def run_python(script, *arguments, **environment):
    """Run *script* where this file and the module can be imported."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_only_what_changed_is_written_as_changed(sqlite):
    uid = kept(sqlite, thing=Box(n=1), other=Box(n=1), third=[1])
    before = record_of(sqlite, uid)[1]
    session = sqlite.open(uid)
    IKept(session).n, IOther(session).n = 2, 1
    sqlite.save(session)
    after = record_of(sqlite, uid)[1]
    assert [key.rpartition(".")[2] for key in after if after[key] != before[key]] == ["IKept"]


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
    "a default factory": (lambda: collections.defaultdict(list), "defaultdict"),
    "partial": (lambda: functools.partial(print), "partial"),
    "too deep nesting": (lambda: functools.reduce(lambda inner, _: [inner], range(100_000), []), "recursion"),
}


@pytest.mark.parametrize("what", CANT)
def test_what_cant_be_stored_fails_at_save_and_says_what_where_and_what_to_do(place_of, what):
    store = place_of("sqlite").store()
    make, offender = CANT[what]
    uid = kept(store, other=[1])
    session = store.open(uid)
    session.setComponent(IKept, make())
    with pytest.raises(NotStorable, match=r"IKept.*@storable") as caught:
        store.save(session)
    assert "IKept" in caught.value.name
    assert offender in caught.value.offender
    session.unsetComponent(IKept)
    session.attribute = make()
    with pytest.raises(NotStorable, match="attribute attribute"):
        store.save(session)
    store.release(session)
    assert IOther(store.open(uid, patience=0)) == [1]


def test_a_request_whose_session_cant_be_stored_fails_and_changes_nothing(sqlite):
    def app(environ, start_response):
        counter = ICounter(ISession(environ))
        counter.hits += 1
        if environ["PATH_INFO"] == "/bad":
            counter.file = Stranger()
        return plain(start_response, counter.hits)

    browser = Browser(wrap(app, sqlite))
    assert browser.get().text == "1"
    with pytest.raises(NotStorable):
        browser.get("/bad")
    assert browser.get().text == "2"


def test_two_interfaces_of_one_name_dont_share_a_component(sqlite):
    def interface():
        class ISame(Interface):
            pass

        return ISame

    first, second = interface(), interface()
    session = sqlite.create(1800, 43200)
    session.setComponent(first, [1])
    session.setComponent(second, [2])
    with pytest.raises(NotStorable, match="ISame.*another interface of that name"):
        sqlite.save(session)
    session.unsetComponent(first)
    sqlite.save(session)
    again = reopened(sqlite, session.uid)
    assert second(again) == [2]
    assert first(again, None) is None


def test_a_callback_is_a_method_of_a_component(sqlite):
    session = sqlite.create(1800, 43200)
    box = Box()
    for callback in (lambda: None, print, box.open_it, "append".upper):
        with pytest.raises(TypeError, match="method of one of the session's components"):
            session.notifyOnExpire(callback)
    session.setComponent(IKept, box)
    session.notifyOnExpire(box.open_it)


# Persistent stores: classes that come and go
# ---------------------------------------------------------------------------


@storable
class Moody:
    refuses = False

    def __setstate__(self, state):
        if Moody.refuses:
            raise ValueError("not today")
        self.__dict__.update(state)


@pytest.fixture
def bad_mood(monkeypatch):
    monkeypatch.setattr(Moody, "refuses", True)


@pytest.fixture
def undeclared(monkeypatch):
    """As in a process that hasn't imported the module of Moody."""
    monkeypatch.delitem(minisess._storables, f"{Moody.__module__}.Moody")


@pytest.mark.parametrize("trouble", ["bad_mood", "undeclared"])
def test_a_component_that_cant_be_opened_harms_no_other_and_stays(sqlite, request, trouble):
    moody = Moody()
    other = Box(n=0, moody=None)
    moody.other = other
    uid = kept(sqlite, thing=moody, other=other)
    before = record_of(sqlite, uid)[1]
    request.getfixturevalue(trouble)
    session = sqlite.open(uid)
    with pytest.raises(StoreError, match=r"IKept can't be opened .*unsetComponent\(IKept\)"):
        IKept(session)
    assert IKept in session
    IOther(session).n = 1
    sqlite.save(session)
    after = record_of(sqlite, uid)[1]
    key = next(key for key in before if key.endswith("IKept"))
    assert after[key] == before[key]
    session = sqlite.open(uid)
    assert IOther(session).n == 1
    session.unsetComponent(IKept)
    sqlite.save(session)
    assert list(record_of(sqlite, uid)[1]) == [k for k in before if k != key]


@pytest.mark.parametrize("hold", [True, False])
def test_a_component_that_cant_be_opened_can_be_replaced(sqlite, hold):
    uid = kept(sqlite, other=Box(n=1))
    session = sqlite.open(uid)
    session.setComponent(IKept, Box())
    sqlite.save(session)
    fields, blobs = record_of(sqlite, uid)
    blobs = {key: blob.replace(b".Box", b".Moo") if key.endswith("IKept") else blob for key, blob in blobs.items()}
    put_record(sqlite, uid, sqlite._seal(sqlite._key(uid), fields, blobs))
    session = sqlite.open(uid, hold=hold)
    session.setComponent(IKept, Box(new=1))
    sqlite.save(session)
    session = sqlite.open(uid)
    assert IKept(session).new == IOther(session).n == 1


def test_a_component_that_cant_be_opened_stays_whole_in_those_that_refer_to_it(sqlite, monkeypatch):
    moody, friend = Moody(), Box()
    moody.friend, friend.moody, moody.secret = friend, moody, "kept"
    uid = kept(sqlite, thing=moody, other=friend)
    monkeypatch.setattr(Moody, "refuses", True)
    session = sqlite.open(uid)
    for interface in (IKept, IOther):
        with pytest.raises(StoreError):
            interface(session)
    sqlite.save(session)
    monkeypatch.undo()
    session = reopened(sqlite, uid)
    assert IOther(session).moody is IKept(session)
    assert IKept(session).secret == "kept"
    assert IKept(session).friend is IOther(session)


def test_a_class_that_lost_and_got_attributes_opens_with_what_was_stored(sqlite, monkeypatch):
    uid = kept(sqlite, thing=Box(old=1))
    monkeypatch.setattr(Box, "new", 2, raising=False)
    thing = IKept(reopened(sqlite, uid))
    assert (thing.old, thing.new) == (1, 2)


def test_an_interface_that_isnt_imported_here_keeps_its_component(sqlite):
    class IElsewhere(Interface):
        pass

    session = sqlite.create(1800, 43200)
    session.setComponent(IElsewhere, [1])
    session.attribute = 1
    sqlite.save(session)
    before = record_of(sqlite, session.uid)[1]
    del minisess._interfaces[f"{IElsewhere.__module__}.{IElsewhere.__qualname__}"]
    again = sqlite.open(session.uid)
    again.attribute = 2
    again.removeComponent(object())
    sqlite.save(again)
    after = record_of(sqlite, session.uid)[1]
    assert [key for key in before if after[key] != before[key]] == [".attribute"]


# Persistent stores: seals and what is in a record
# ---------------------------------------------------------------------------


def put_record(store, uid, record):
    key = store._key(uid)
    store.delete(key)
    store.insert(key, record, store.clock() + 1800, None, None, 0)


@pytest.fixture
def unpicklings(monkeypatch):
    """Everything that is unpickled from now on; it fails."""
    seen = []

    def spy(self, data, *args):
        seen.append(data)
        raise AssertionError("this was unpickled")

    monkeypatch.setattr(minisess._Reader, "__init__", spy)
    monkeypatch.setattr(pickle, "loads", spy)
    return seen


def flip(record, bit):
    flipped = bytearray(record)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


# What a thief who can write to the database but doesn't know the secret may put there.
TAMPERED = {
    "nothing": lambda record, other: [b""],
    "a seal only": lambda record, other: [record[:32]],
    "truncated": lambda record, other: [record[:1], record[:31], record[: len(record) // 2], record[:-1]],
    "longer": lambda record, other: [record + b"\0", b"\0" + record],
    "copied from another session": lambda record, other: [other],
    "another's seal or body": lambda record, other: [other[:32] + record[32:], record[:32] + other[32:]],
    "forged": lambda record, other: [bytes(32) + record[32:], bytes(32) + pickle.dumps(os.getcwd)],
    "bits flipped": lambda record, other: [flip(record, bit) for bit in range(3, 8 * len(record), 101)],
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_record_that_was_tampered_with_is_no_session_and_never_unpickled(place, how, unpicklings, caplog):
    store = place.store()
    uid, other = kept(store, thing=[1]), kept(store, thing=[2])
    record, others = (bytes(store.read(store._key(each))) for each in (uid, other))
    for tampered in TAMPERED[how](record, others):
        caplog.clear()
        put_record(store, uid, tampered)
        assert store.open(uid) is None
        assert store.open(uid, hold=False) is None
        assert [r.getMessage().partition("security")[1] for r in caplog.records] == ["security"] * 2
        assert uid not in caplog.text
    assert unpicklings == []


def test_a_record_sealed_with_another_secret_is_no_session_and_never_unpickled(place, unpicklings, caplog):
    uid = kept(place.store(), thing=[1])
    assert place.store(secret="another secret, long enough").open(uid) is None
    assert "security" in caplog.text
    assert unpicklings == []


def test_secrets_rotate_the_first_seals_and_all_open(place):
    old, new = "the old secret, long enough", b"the new secret, long enough"
    uid = kept(place.store(secret=old), thing=[1])
    both = place.store(secret=[new, old])
    session = both.open(uid)
    IKept(session).append(2)
    both.save(session)
    assert IKept(place.store(secret=(new,)).open(uid, hold=False)) == [1, 2]
    assert place.store(secret=old).open(uid, hold=False) is None


@pytest.mark.parametrize(
    "secret", ["", "fifteen bytes..", b"", b"x" * 15, [], (), ["x" * 16, ""], None, 16, [16], (32, 32), [None], {}]
)
def test_a_bad_secret_is_refused_at_construction(tmp_path, secret):
    with pytest.raises((ValueError, TypeError), match="secret"):
        SQLiteStore(tmp_path / "store", secret=secret)


def test_a_secret_may_be_given_as_str_bytes_or_bytearray(place_of):
    place = place_of("sqlite")
    uid = kept(place.store(secret="sixteen bytes..."), thing=[1])
    for secret in (b"sixteen bytes...", bytearray(b"sixteen bytes..."), ["sixteen bytes..."]):
        assert IKept(place.store(secret=secret).open(uid, hold=False)) == [1]


def test_who_reads_the_records_learns_no_uid(place, tmp_path):
    store = place.store()
    session = store.create(1800, 43200)
    session.login("ann")
    store.save(session)
    for key in store.owned("ann"):
        assert session.uid not in key
        assert session.uid.encode() not in bytes(store.read(key))


# What follows is sealed with the right secret: the secret has leaked, or another application has it.

TRAP = []


def trap(*args):
    """Must never run."""
    TRAP.append(args)
    return []


class Trapped:
    def __init__(self, function, *args, **state):
        self.reduced = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.reduced


def text(string):
    return b"X" + len(string.encode()).to_bytes(4, "little") + string.encode()


def made(name, flags=1, arguments=b""):
    """Pickle code for: an object as _make makes it."""
    return b"cminisess\n_make\n(" + text(name) + b"K%c" % flags + arguments + b"tR"


SESSION = b"cminisess\n_ref\n" + text("") + b"\x85R"
BOX = made(f"{Box.__module__}.Box")


class Callable(Box):
    def __call__(self, *args):
        trap(*args)


def poisons():
    for protocol in (0, 2, 4, 5):
        yield f"a function, protocol {protocol}", pickle.dumps(Trapped(trap, 1), protocol)
    for function, *args in [
        (os.system, "exit 1"),
        (eval, "trap()"),
        (exec, "trap()"),
        (getattr, Box, "mro"),
        (__import__, "antigravity"),
        (functools.partial, trap),
        (operator.attrgetter, "__class__"),
        (operator.methodcaller, "open_it"),
        (subprocess.Popen, "true"),
        (pickle.loads, b"N."),
        (type, "Type", (), {}),
        (object,),
        (Stranger,),
        (Box,),
        (Session, None, "", 0, 0, 0),
    ]:
        yield f"calls {function.__name__}", pickle.dumps(Trapped(function, *args))
        if isinstance(function, type):
            yield f"state for {function.__name__}", pickle.dumps(Trapped(function, *args, a=1))
    for name in [
        "os.system", "builtins.eval", "builtins.type", "builtins.object", "builtins.open", "functools.partial",
        "subprocess.Popen", "collections.defaultdict", "collections.abc.Callable", "minisess.SQLiteStore",
        "minisess.Session", "minisess.StoredSession", "minisess.MemoryStore", "minisess.PersistentStore",
        "minisess._make", f"{__name__}.Stranger", f"{__name__}.Callable", f"{__name__}.trap", "", ".", "Box",
        f"{__name__}.Box.open_it", "datetime.datetime.now", "uuid.os.system",
    ]:  # fmt: skip
        for flags in (0, 1, 2, 3):
            yield f"makes {name} {flags}", made(name, flags) + b"."
    yield "a dotted name", text("os") + text("path.join") + b"\x93."
    yield "a class on the old way", b"(ios\nsystem\n."
    yield "an extension", b"\x82\x01."
    yield "a persistent id of nothing here", b"Pnothing\n."
    yield "a reference to itself", b"Ptest\n.".replace(b"test", f"{__name__}.IKept".encode())
    yield "the state of the session", SESSION + b"}" + text("renew") + BOX + b"sb."
    yield "the slots of the session", SESSION + b"N}" + text("_store") + BOX + b"s\x86b."
    yield "the state of _make", b"cminisess\n_make\nN}" + text("__code__") + b"Ns\x86b."
    yield "the class of a box", BOX + b"N}" + text("__class__") + BOX + b"s\x86b."
    yield "a call of the session", SESSION + b")R."
    yield "an item of the session", SESSION + text("a") + b"a."
    yield "a claim of 100 MB", b"B" + (100 << 20).to_bytes(4, "little") + b"x"
    yield "a claim of 2**62 bytes", b"\x8e" + (1 << 62).to_bytes(8, "little") + b"x"
    yield "a frame of 2**62 bytes", b"\x80\x05\x95" + (1 << 62).to_bytes(8, "little") + b"N."
    yield "a buffer from elsewhere", b"\x97."
    yield "an endless text", b"V" + b"x" * 1000
    yield "no end", b"]" * 1000
    yield "nothing to answer", b"."
    yield "no code at all", b"\xff\xff"
    yield "no bytes", b""


POISONS = dict(poisons())


@pytest.fixture
def nothing_runs():
    TRAP.clear()
    before = {**sys.modules}
    yield
    assert TRAP == []
    assert "antigravity" not in sys.modules or "antigravity" in before
    assert vars(minisess._make) == vars(minisess._ref) == {}


@pytest.mark.parametrize("what", POISONS)
def test_a_poisonous_component_is_refused_and_nothing_run_though_the_secret_is_right(sqlite, what, nothing_runs):
    uid = kept(sqlite, thing=[1], other=[2])
    fields, blobs = record_of(sqlite, uid)
    for key in blobs:
        if key.endswith("IKept"):
            blobs[key] = POISONS[what]
    put_record(sqlite, uid, sqlite._seal(sqlite._key(uid), fields, blobs))
    session = sqlite.open(uid)
    with pytest.raises(StoreError, match="can't be opened"):
        IKept(session)
    assert IOther(session) == [2]
    assert vars(session) == {}
    sqlite.save(session)
    assert record_of(sqlite, uid)[1] == blobs


def test_a_poisonous_attribute_is_left_out(sqlite, nothing_runs, caplog):
    uid = kept(sqlite, other=[2])
    fields, blobs = record_of(sqlite, uid)
    blobs[".good"], blobs[".bad"] = pickle.dumps(1), POISONS["calls system"]
    blobs[".expire"] = blobs["._end"] = pickle.dumps("hides a method")
    put_record(sqlite, uid, sqlite._seal(sqlite._key(uid), fields, blobs))
    session = sqlite.open(uid)
    assert vars(session) == {"good": 1}
    assert "attribute bad that can't be opened" in caplog.text
    session.expire()
    assert sqlite.open(uid) is None


BODIES = {
    **{name: body for name, body in POISONS.items() if not name.startswith("makes")},
    "no tuple": pickle.dumps(5),
    "too short": pickle.dumps((1, 2, {})),
    "too long": pickle.dumps((1.0, 1.0, 1.0, 1.0, 1.0, None, (), (), {})),
    "text for a time": pickle.dumps((1.0, "1", 1.0, 1.0, 1.0, None, (), {})),
    "a number for an owner": pickle.dumps((1.0, 1.0, 1.0, 1.0, 1.0, 5, (), {})),
    "callbacks of another form": pickle.dumps((1.0, 1.0, 1.0, 1.0, 1.0, None, ("x",), {})),
    "blobs of another form": pickle.dumps((1.0, 1.0, 1.0, 1.0, 1.0, None, (), {"a": "text"})),
    "a list for blobs": pickle.dumps((1.0, 1.0, 1.0, 1.0, 1.0, None, (), [])),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_poisonous_record_is_no_session_though_the_secret_is_right(sqlite, what, nothing_runs, caplog):
    uid = kept(sqlite, thing=[1])
    key = sqlite._key(uid)
    put_record(sqlite, uid, sqlite._mac(sqlite._macs[0], key, BODIES[what]) + BODIES[what])
    assert sqlite.open(uid) is None
    assert "security" in caplog.text


@pytest.mark.parametrize("name", ["__reduce__", "__class__", "nothing", "content"])
def test_a_forged_callback_calls_nothing_but_methods(sqlite, name, caplog):
    uid = kept(sqlite, thing=Box(content=1))
    fields, blobs = record_of(sqlite, uid)
    fields = (*fields[:6], ((f"{__name__}.IKept", name),))
    put_record(sqlite, uid, sqlite._seal(sqlite._key(uid), fields, blobs))
    sqlite.open(uid).expire()
    assert "which is no method" in caplog.text


def test_deep_nesting_is_opened_but_not_stored_again(sqlite):
    uid = kept(sqlite, thing=[1])
    fields, blobs = record_of(sqlite, uid)
    blobs = dict.fromkeys(blobs, b"]" * 50_000 + b"a" * 49_999 + b".")
    put_record(sqlite, uid, sqlite._seal(sqlite._key(uid), fields, blobs))
    session = sqlite.open(uid)
    IKept(session).append(1)
    with pytest.raises(NotStorable):
        sqlite.save(session)


# Persistent stores: leases, processes, accidents
# ---------------------------------------------------------------------------


def test_a_request_that_outlasts_its_lease_saves_if_nobody_took_over(place):
    clock = Clock()
    store = place.store(clock=clock, lease=30)
    uid = kept(store, thing=Box(n=0))
    slow = store.open(uid)
    with pytest.raises(SessionBusy):
        store.open(uid, patience=0)
    clock.advance(31)
    IKept(slow).n = 1
    store.save(slow)
    assert IKept(store.open(uid)).n == 1


@pytest.mark.parametrize("successor_works", [True, False], ids=["at work", "done"])
@pytest.mark.parametrize("attempt", ["save", "renew"])
def test_a_request_that_outlasts_its_lease_changes_nothing_of_its_successor(place, attempt, successor_works):
    clock = Clock()
    store = place.store(clock=clock, lease=30)
    uid = kept(store, thing=Box(n=0))
    slow = store.open(uid)
    IKept(slow).n = 1
    clock.advance(30)
    successor = store.open(uid, patience=0)
    IKept(successor).n += 10
    if not successor_works:
        store.save(successor)
    with pytest.raises(SessionConflict, match="30 s") as caught:
        getattr(store, attempt)(slow)
    assert caught.value.lease == 30
    store.release(slow)
    if successor_works:
        with pytest.raises(SessionBusy):
            store.open(uid, patience=0)
        store.save(successor)
    assert IKept(store.open(uid, patience=0)).n == 10
    assert len(store) == 1


def test_a_request_that_fails_after_its_lease_leaves_its_successor_alone(place):
    clock = Clock()
    store = place.store(clock=clock, lease=30)
    uid = kept(store, thing=[1])
    slow = store.open(uid)
    clock.advance(30)
    successor = store.open(uid, patience=0)
    store.release(slow)
    with pytest.raises(SessionBusy):
        store.open(uid, patience=0)
    store.save(successor)


@pytest.mark.parametrize("change", [lambda s: s.renew(), lambda s: s.login("ann")], ids=["renew", "login"])
def test_renewing_keeps_what_others_merged(place, change):
    store = place.store()
    uid = kept(store, thing=Box(n=0))
    renewing, other = store.open(uid, hold=False), store.open(uid, hold=False)
    IKept(other).n = 1
    store.save(other)
    change(renewing)
    store.save(renewing)
    assert IKept(store.open(renewing.uid)).n == 1
    assert store.open(uid) is None


WORK = [
    type(Interface)(f"IWork{n}", (Interface,), {"__module__": __name__, "__qualname__": f"IWork{n}"}) for n in range(16)
]


def work_app(environ, start_response):
    """Counts one more for the worker whose number is the path."""
    session, interface = ISession(environ), WORK[int(environ["PATH_INFO"][1:])]
    if interface not in session:
        session.setComponent(interface, Box(n=0))
    box = session.getComponent(interface)
    box.n += 1
    return plain(start_response, box.n)


def visitor(application, uid, **options):
    browser = Browser(wrap(application, **options))
    browser.cookies["sid"] = uid
    return browser


def work(arguments, process, together, apart, count):
    """What each of the processes does."""
    failed = []

    def requests(number):
        try:
            for uid, path, locking in [(together, "/0", True), (apart, f"/{number}", False)]:
                browser = visitor(work_app, uid, store=store, locking=locking, patience=60)
                for _ in range(count):
                    assert browser.get(path).status == "200 OK"
        except BaseException as error:
            failed.append(error)
            raise

    with Place(*arguments) as place:
        store = place.store()
        threads = [threading.Thread(target=requests, args=(4 * process + n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.exit(len(failed))


def run_processes(calls):
    """Run each (function, *arguments) in a new process; none may fail."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=function, args=arguments, daemon=True) for function, *arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
        process.close()


def test_4_processes_with_4_threads_lose_no_update(place):
    """With locking on one component, without it each on a component of its own."""
    store = place.store()
    together, apart = kept(store, other=[1]), kept(store, other=[1])
    run_processes([(work, place.arguments, n, together, apart, 100) for n in range(4)])
    assert WORK[0](store.open(together)).n == 1600
    session = store.open(apart)
    assert [interface(session).n for interface in WORK] == [100] * 16


def test_a_merge_into_a_session_that_ends_at_that_moment_stores_nothing(sqlite, monkeypatch, caplog):
    uid = kept(sqlite, thing=[1])
    session, write = sqlite.open(uid, hold=False), sqlite.write
    monkeypatch.setattr(sqlite, "write", lambda key, *args: sqlite.delete(key) and write(key, *args))
    session.attribute = 1
    sqlite.save(session)
    assert "ended" in caplog.text
    assert len(sqlite) == 0


@storable
class Bell:
    """Rings when its session ends."""

    rung = collections.Counter()

    def __init__(self, name):
        self.name = name

    def ring(self):
        self.rung[self.name] += 1


def test_many_who_end_sessions_at_once_end_each_one_once(place):
    clock = Clock()
    stores = [place.store(clock=clock) for _ in range(4)]
    Bell.rung.clear()
    uids = []
    for name in range(40):
        session = stores[0].create(1800, 43200)
        session.setComponent(IKept, Bell(name))
        session.notifyOnExpire(IKept(session).ring)
        if name < 20:
            session.login("ann")
        stores[0].save(session)
        uids.append(session.uid)
    start, failed = threading.Barrier(4, timeout=20), []

    def end(number):
        try:
            for uid in uids[:10]:
                start.wait()
                session = stores[number].open(uid, hold=False)
                if session is not None:
                    session.expire()
            start.wait()
            stores[number].expireAll("ann")
            start.wait()
            clock.advance(1000)
            stores[number].sweep()
        except BaseException as error:
            failed.append(error)
            start.abort()

    threads = [threading.Thread(target=end, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert Bell.rung == dict.fromkeys(range(40), 1)
    assert len(stores[0]) == 0


def accident_worker(arguments, uids, seed, responses):
    """Sends requests for ever; notes what each response was."""
    chance = random.Random(seed)
    with Place(*arguments) as place:
        store = place.store(lease=0.5)
        browsers = [visitor(work_app, uid, store=store, patience=5) for uid in uids]
        while True:
            number = chance.randrange(len(uids))
            with contextlib.suppress(SessionBusy, SessionConflict):
                os.write(responses, f"{number} {browsers[number].get('/0').text}\n".encode())


def accidents(arguments, uids, kills, path):
    """Three workers, of whom one is killed and replaced every few moments."""
    responses = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    workers = []

    def hire(seed):
        pid = os.fork()
        if not pid:
            try:
                accident_worker(arguments, uids, seed, responses)
            finally:
                os._exit(1)
        workers.append(pid)

    def fire():
        pid = workers.pop(random.randrange(len(workers)))
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1] == signal.SIGKILL

    try:
        for seed in range(3):
            hire(seed)
        told = 0
        for seed in range(kills):
            # However slow the machine is: not before a few more responses are there, and then at any moment.
            end = time.monotonic() + 20
            while os.fstat(responses).st_size < told + 20 and time.monotonic() < end:
                time.sleep(0.002)
            told = os.fstat(responses).st_size
            time.sleep(random.uniform(0, 0.03))
            assert fire(), "a worker failed"
            hire(3 + seed)
    finally:
        while workers:
            fire()
    os.close(responses)


def test_who_is_killed_loses_nothing_that_a_client_was_told(place, tmp_path):
    kills = 50
    store = place.store(lease=0.5)
    uids = [kept(store, other=[1]) for _ in range(4)]
    run_processes([(accidents, place.arguments, uids, kills, tmp_path / "responses")])
    ended_at, lost = time.monotonic(), 0
    received = [tuple(map(int, line.split())) for line in (tmp_path / "responses").read_text().splitlines()]
    for number, uid in enumerate(uids):
        hits = WORK[0](store.open(uid)).n
        told = [n for who, n in received if who == number]
        assert len(set(told)) == len(told)
        assert max(told) <= hits
        lost += hits - len(told)
    # Whoever is killed may have saved one that it didn't get to tell.
    assert 0 <= lost <= kills + 3
    assert len(received) > kills
    assert time.monotonic() - ended_at < 0.5 + 5
    assert len(store) == len(uids)


# Persistent stores: the server goes away, the disk is full
# ---------------------------------------------------------------------------


def served(browser, path="/"):
    """The response that a server gives, also where the application raises."""
    from wsgiref.handlers import SimpleHandler

    out = io.BytesIO()
    handler = SimpleHandler(io.BytesIO(), out, io.StringIO(), browser.environ(path, SCRIPT_NAME=""), False, False)
    handler.run(browser.application)
    head, _, body = out.getvalue().decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    return Response(status.partition(" ")[2], [tuple(line.split(": ", 1)) for line in lines], body.encode())


@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_while_the_server_is_away_requests_fail_and_afterwards_all_is_as_before(place_of, request, kind):
    place, server = place_of(kind), request.getfixturevalue(f"{kind}_server")
    if kind == "redis":
        place.client.set_retry(package("redis.retry").Retry(package("redis.backoff").NoBackoff(), 0))
    else:
        place.pool.timeout = 0.3

    def app(environ, start_response):
        counter = ICounter(ISession(environ))
        counter.hits += 1
        if environ["PATH_INFO"] == "/stop":
            server.stop()
        return plain(start_response, counter.hits)

    store = place.store(lease=0.5)
    browser = Browser(wrap(app, store))
    first = served(browser)
    assert first.text == "1"
    browser.cookies["sid"] = first["Set-Cookie"].partition(";")[0].partition("=")[2]
    try:
        for path in ("/stop", "/", "/"):
            response = served(browser, path)
            assert response.status.startswith("500")
            assert response["Set-Cookie"] is None
        with pytest.raises(StoreError, match=type(store).__name__):
            store.open(browser.cookies["sid"])
    finally:
        server.start()
    response = wait_until(lambda: (r := served(browser)).status == "200 OK" and r)
    assert (response.text, response["Set-Cookie"]) == ("2", None)


def test_a_full_disk_is_a_StoreError_and_loses_nothing(tmp_path):
    run = run_python(f"""
import resource
from {__name__} import *
store = SQLiteStore({str(tmp_path / "store")!r}, secret=SECRET)
uid = kept(store, thing=b"small")
session = store.open(uid)
session.setComponent(IKept, bytes(5_000_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    store.save(session)
except StoreError as error:
    print(error)
store.release(session)
session = store.open(uid, patience=0)
print(IKept(session))
session.setComponent(IKept, b"other")
store.save(session)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
session = store.open(uid, patience=0)
print(IKept(session))
session.setComponent(IKept, bytes(5_000_000))
store.save(session)
print(len(IKept(store.open(uid))))
""")
    assert re.fullmatch(r"SQLiteStore.write failed: .*(full|I/O).*\nb'small'\nb'other'\n5000000\n", run.stdout), run


def test_a_read_only_file_is_a_StoreError_and_loses_nothing():
    run = run_python(f"""
from {__name__} import *
with tempfile.TemporaryDirectory() as folder:
    store = SQLiteStore(folder + "/store", secret=SECRET)
    uid = kept(store, thing=b"here")
    store.close()
    os.chmod(folder, 0o555)
    os.chmod(folder + "/store", 0o444)
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # root may write anyway
    for use in (lambda: store.open(uid), lambda: kept(store, thing=1), lambda: SQLiteStore(store.path, secret=SECRET)):
        try:
            use()
        except StoreError as error:
            print(error)
    os.seteuid(me)
    os.chmod(folder, 0o755)
    os.chmod(folder + "/store", 0o644)
    print(IKept(store.open(uid)))
    store.close()
""")
    assert re.fullmatch(r"(SQLiteStore.\w+ failed: \w+: (.*readonly.*|unable to open.*)\n){3}b'here'\n", run.stdout), (
        run
    )


def test_an_sqlite_without_RETURNING_is_refused_at_construction(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(StoreError, match="3.35"):
        SQLiteStore(tmp_path / "store", secret=SECRET)


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_an_sqlite_store_wants_a_file(path):
    with pytest.raises(ValueError, match="file"):
        SQLiteStore(path, secret=SECRET)


@pytest.mark.parametrize("table", ["", "a b", "a;b", "1a", "\N{LATIN SMALL LETTER E WITH ACUTE}", 'a"'])
def test_a_table_is_named_by_a_plain_word(tmp_path, table):
    with pytest.raises(ValueError, match="table"):
        SQLiteStore(tmp_path / "store", secret=SECRET, table=table)


def test_a_redis_client_that_decodes_is_refused(redis_server):
    client = package("redis").Redis(port=redis_server.port, decode_responses=True)
    with client, pytest.raises(ValueError, match="decode_responses"):
        RedisStore(client, secret=SECRET)


def test_postgres_wants_something_to_call():
    with pytest.raises(TypeError, match="ConnectionPool"):
        PostgresStore("host=127.0.0.1", secret=SECRET)


def test_processes_that_start_at_once_make_the_table_once(place_of):
    place = place_of("postgres")
    stores = [place.store() for _ in range(4)]
    start = threading.Barrier(4, timeout=20)
    counts = []

    def count(each):
        start.wait()
        counts.append(len(each))

    threads = [threading.Thread(target=count, args=(each,)) for each in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert counts == [0] * 4


# Persistent stores: forks and round trips
# ---------------------------------------------------------------------------


def test_after_a_fork_each_process_counts_for_itself(tmp_path):
    """SQLite's locks belong to a process: a connection open at the fork would make the child believe it had them."""
    run = run_python(f"""
from {__name__} import *
store = SQLiteStore({str(tmp_path / "store")!r}, secret=SECRET)
uid = kept(store, thing=Box(n=1))
def add():
    session = store.open(uid, patience=0)
    IKept(session).n += 1
    store.save(session)
steps = [os.pipe() for _ in range(3)]
child = os.fork()
if not child:
    add()
    os.write(steps[0][1], b"x")
    os.read(steps[1][0], 1)
    add()
    os.write(steps[2][1], b"x")
    signal.pause()
os.read(steps[0][0], 1)
add()
store.close()
os.write(steps[1][1], b"x")
os.read(steps[2][0], 1)
script = "from {__name__} import *; print(IKept(SQLiteStore(sys.argv[1], secret=SECRET).open(sys.argv[2])).n)"
print(run_python(script, store.path, uid).stdout)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
""")
    assert run.stdout.strip() == "4", run


def test_gunicorn_with_preload_serves_one_sqlite_store_by_three_workers(tmp_path):
    package("gunicorn")
    (tmp_path / "preloaded.py").write_text(f"""
import os
from {__name__} import *
store = SQLiteStore({str(tmp_path / "store")!r}, secret=SECRET)
kept(store, thing=[1])  # before the fork
def app(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.1)  # so that this worker can't take them all
    counter = ICounter(ISession(environ))
    counter.hits += 1
    return plain(start_response, f"{{os.getpid()}} {{counter.hits}}")
application = SessionMiddleware(app, store)
""")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [
        sys.executable,
        "-m",
        "gunicorn",
        "--preload",
        "-w",
        "3",
        "-b",
        "127.0.0.1:PORT",
        "preloaded:application",
    ]
    with running([*command, "--no-control-socket"], env=environment, cwd=tmp_path) as server:

        def get(cookie="", path="/"):
            request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers={"Cookie": cookie})
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.read().split(), response.headers["Set-Cookie"]

        cookie = get()[1].partition(";")[0]
        answers = []

        def ask(path, times):
            asking = lambda: answers.extend(get(cookie, path)[0] for _ in range(times))  # noqa: E731
            threads = [threading.Thread(target=asking) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)

        ask("/", 20)
        for _ in range(50):  # until the others have started, too
            if len({pid for pid, _ in answers}) == 3:
                break
            ask("/slow", 1)
    assert len({pid for pid, _ in answers}) == 3
    assert sorted(int(hits) for _, hits in answers) == list(range(2, 2 + len(answers)))


@contextlib.contextmanager
def counted(place, monkeypatch):
    """The round trips to the server as they happen."""
    trips = []
    if place.kind == "redis":
        connection = package("redis").Connection
        send = connection.send_packed_command
        monkeypatch.setattr(connection, "send_packed_command", lambda *a, **k: trips.append(a[1]) or send(*a, **k))
    else:
        # What libpq sends; a round trip ends when the server is ready for the next.
        connect = place.connect

        @contextlib.contextmanager
        def traced():
            with tempfile.TemporaryFile() as file, connect() as connection:
                connection.pgconn.trace(file.fileno())
                try:
                    yield connection
                finally:
                    connection.pgconn.untrace()
                    file.seek(0)
                    trips.extend(line for line in file if b"ReadyForQuery" in line)

        place.connect = traced
    yield trips
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_a_request_costs_two_round_trips_and_none_if_it_doesnt_touch_the_session(place_of, kind, monkeypatch):
    place = place_of(kind)
    with counted(place, monkeypatch) as trips:
        browser = Browser(wrap(counter_app, place.store()))
        browser.get()
        browser.get()
        trips.clear()
        assert browser.get().text == "3"
        assert len(trips) == 2
        browser.get("/no")
        assert len(trips) == 2


# Persistent stores: the example of a store of one's own
# ---------------------------------------------------------------------------


def test_the_example_of_a_store_of_ones_own_counts():
    from examples.file_store import application

    browser = Browser(wrap(application.app, application.store))
    assert [browser.get().text for _ in range(2)] == ["You were here 1 times.\n", "You were here 2 times.\n"]
    application.store.open(browser.cookies["sid"]).expire()


# Cookies
# ---------------------------------------------------------------------------

UID = "[A-Za-z0-9_-]{43}"
FOREIGN = [letter * 43 for letter in "abcdef"]  # well-formed ids that no store has given out


class SpyStore(MemoryStore):
    """Writes down what is asked of it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.events, self.opened = [], []

    def open(self, uid, *args, **options):
        self.opened.append(uid)
        return super().open(uid, *args, **options)

    def save(self, session):
        self.events.append("save")
        super().save(session)

    def release(self, session):
        self.events.append("release")
        super().release(session)


class BrokenStore(MemoryStore):
    def save(self, session):
        raise StoreError("the store is down")


def look(environ, start_response):
    """An application that only looks, and tells whether it knows the visitor."""
    return plain(start_response, getattr(ISession(environ), "name", "nobody"))


def known_visitor(store=None, **options):
    """A middleware around `look`, and the id of a session that it answers with "known"."""
    store = SpyStore() if store is None else store
    session = store.create(1800, 43200)
    session.name = "known"
    store.save(session)
    return SessionMiddleware(look, store, **options), session.uid


def cookie_parts(header):
    """A Set-Cookie header as name, value, attributes."""
    pair, *attributes = header.split("; ")
    name, _, value = pair.partition("=")
    assert len(set(attributes)) == len(attributes)
    return name, value, set(attributes)


USUAL = {"Path=/", "HttpOnly", "SameSite=Lax"}


@pytest.mark.parametrize(
    ("scheme", "options", "name", "attributes"),
    [
        ("http", {}, "sid", USUAL),
        ("https", {}, "__Host-sid", USUAL | {"Secure"}),
        ("http", {"secure": True}, "__Host-sid", USUAL | {"Secure"}),
        ("https", {"secure": False}, "sid", USUAL),
        ("http", {"cookie": "x.y_z"}, "x.y_z", USUAL),
        ("https", {"cookie": "x.y_z"}, "__Host-x.y_z", USUAL | {"Secure"}),
        ("https", {"path": "/app"}, "sid", {"Path=/app", "HttpOnly", "SameSite=Lax", "Secure"}),
        ("https", {"domain": "example.com"}, "sid", USUAL | {"Domain=example.com", "Secure"}),
        ("http", {"samesite": "Strict"}, "sid", {"Path=/", "HttpOnly", "SameSite=Strict"}),
        (
            "https",
            {"samesite": "None", "secure": True},
            "__Host-sid",
            {"Path=/", "HttpOnly", "SameSite=None", "Secure"},
        ),
        ("http", {"persistent": True, "lifetime": 60}, "sid", USUAL | {"Max-Age=60"}),
        ("http", {"persistent": True, "lifetime": 99, "max_lifetime": 50}, "sid", USUAL | {"Max-Age=50"}),
        ("http", {"persistent": True, "lifetime": None, "max_lifetime": None}, "sid", USUAL | {"Max-Age=34560000"}),
        ("https", {"cookie": "__Host-mine", "secure": True}, "__Host-mine", USUAL | {"Secure"}),
        ("https", {"cookie": "__Secure-mine", "secure": True}, "__Secure-mine", USUAL | {"Secure"}),
    ],
)
def test_a_cookie_and_its_deletion_carry_the_same_name_and_flags(scheme, options, name, attributes):
    def app(environ, start_response):
        if environ["PATH_INFO"] == "/out":
            ISession(environ).expire()
            return plain(start_response)
        return counter_app(environ, start_response)

    browser = Browser(wrap(app, MemoryStore(clock=Clock()), **options), scheme)
    (header,) = browser.get().all("Set-Cookie")
    got_name, value, got_attributes = cookie_parts(header)
    assert (got_name, got_attributes) == (name, attributes) and re.fullmatch(UID, value)
    assert browser.get().text == "2"
    (header,) = browser.get("/out").all("Set-Cookie")
    got_name, value, got_attributes = cookie_parts(header)
    (expires,) = (a for a in got_attributes if a.startswith("Expires="))
    assert parsedate_to_datetime(expires.partition("=")[2]).timestamp() == 0
    lasting = {a for a in attributes if not a.startswith("Max-Age")}
    assert (got_name, value, got_attributes) == (name, "", lasting | {"Max-Age=0", expires})


def test_a_cookie_is_sent_once_unless_it_is_to_be_refreshed():
    clock = Clock()
    browser = Browser(wrap(counter_app, MemoryStore(clock=clock)))
    refreshed = Browser(wrap(counter_app, MemoryStore(clock=clock), persistent=True, max_lifetime=2000))
    assert [len(browser.get().all("Set-Cookie")) for _ in range(3)] == [1, 0, 0]
    ages = []
    for _ in range(3):
        (header,) = refreshed.get().all("Set-Cookie")
        ages.append(next(a for a in cookie_parts(header)[2] if a.startswith("Max-Age")))
        clock.advance(1000)
    assert ages == ["Max-Age=1800", "Max-Age=1000", "Max-Age=1800"]  # the third time it is another session
    assert refreshed.get("/no").all("Set-Cookie") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samesite": "None"}, ("samesite", "secure")),
        ({"samesite": "None", "secure": False}, ("samesite", "secure")),
        ({"cookie": "__Host-x"}, ("cookie", "secure")),
        ({"cookie": "__Secure-x", "secure": False}, ("cookie", "secure")),
        ({"cookie": "__Host-x", "secure": True, "domain": "example.com"}, ("cookie", "domain")),
        ({"cookie": "__host-x", "secure": True, "path": "/a"}, ("cookie", "path")),
        ({"samesite": "lax"}, ("samesite", "Lax")),
        ({"samesite": "Lax\r\nX-Evil: 1"}, ("samesite",)),
        ({"cookie": ""}, ("cookie",)),
        ({"cookie": "a b"}, ("cookie",)),
        ({"cookie": "a=b"}, ("cookie",)),
        ({"cookie": "a;b"}, ("cookie",)),
        ({"cookie": "sid\r\nX-Evil: 1"}, ("cookie",)),
        ({"cookie": "s\xefd"}, ("cookie",)),
        ({"domain": ""}, ("domain",)),
        ({"domain": "example.com;Path=/x"}, ("domain",)),
        ({"domain": "example.com\r\nX-Evil: 1"}, ("domain",)),
        ({"path": ""}, ("path",)),
        ({"path": "app"}, ("path",)),
        ({"path": "/;Domain=example.com"}, ("path",)),
        ({"path": "/\nX-Evil: 1"}, ("path",)),
        ({"path": "/caf\xe9"}, ("path",)),
        ({"lifetime": 0}, ("lifetime",)),
        ({"max_lifetime": -1}, ("max_lifetime",)),
        ({"patience": -1}, ("patience",)),
    ],
)
def test_options_that_contradict_or_could_forge_headers_are_refused_with_their_names(options, words):
    with pytest.raises(ValueError) as caught:
        SessionMiddleware(counter_app, **options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("header", ["Set-Cookie", "set-cookie"])
def test_the_applications_own_cookies_survive_and_ours_is_there_once(header):
    def app(environ, start_response):
        ISession(environ).name = "x"
        return plain(start_response, headers=[(header, "lang=de; Path=/"), ("X-Other", "1"), (header, "sidekick=1")])

    response = Browser(wrap(app)).get()
    cookies = response.all("Set-Cookie")
    assert [c for c in cookies if not c.startswith("sid=")] == ["lang=de; Path=/", "sidekick=1"]
    assert len(cookies) == 3 and response["X-Other"] == "1"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ([], ["Cookie"]),
        (["Accept"], ["Accept, Cookie"]),
        (["Accept", "Origin"], ["Accept, Origin, Cookie"]),
        (["Accept, cookie"], ["Accept, cookie"]),
        (["*"], ["*"]),
        (["Cookies"], ["Cookies, Cookie"]),
    ],
)
def test_vary_is_merged_once(given, sent):
    def app(environ, start_response):
        ISession(environ)
        return plain(start_response, headers=[("vary", value) for value in given])

    assert Browser(wrap(app)).get().all("Vary") == sent


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ([], ['no-cache="Set-Cookie"']),
        (["public, max-age=60"], ['public, max-age=60, no-cache="Set-Cookie"']),
        (["public", "max-age=60"], ['public, max-age=60, no-cache="Set-Cookie"']),
        (["no-store"], ["no-store"]),
        (["Private, max-age=60"], ["Private, max-age=60"]),
        (["no-cache"], ["no-cache"]),
        (["max-age=0, no-cacheable"], ['max-age=0, no-cacheable, no-cache="Set-Cookie"']),
    ],
)
def test_a_response_with_a_cookie_is_not_for_shared_caches(given, sent):
    def app(environ, start_response):
        ISession(environ).name = "x"
        return plain(start_response, headers=[("cache-control", value) for value in given])

    browser = Browser(wrap(app))
    assert browser.get().all("Cache-Control") == sent
    assert browser.get().all("Cache-Control") == given  # no cookie this time


JUNK_HEADERS = {
    "alone": ("sid={uid}", True),
    "between others": ("a=1; sid={uid}; b=2", True),
    "no blanks": ("a=1;sid={uid};b=2", True),
    "blanks and tabs": (" a = 1 ;\t sid = {uid}\t; ", True),
    "nothing": ("", False),
    "no equals sign": ("sid; {uid}; sid={uid}; sid", True),
    "empty pairs": (";;; ; =; ==;sid={uid};;", True),
    "empty value": ("sid=; sid={uid}", True),
    "only an empty value": ("sid=", False),
    "quoted": ('sid="{uid}"', True),
    "a quote left open before": ('a="b; sid={uid}', True),
    "a quote around": ('a="; sid={uid}; b="', True),
    "an escaped quote": ('a="\\"; sid={uid}; b="\\', True),
    "$Version": ('$Version="1"; sid="{uid}"; $Path="/"', True),
    "attributes": ("sid={uid}; Path=/; HttpOnly; Secure; expires=Thu, 01 Jan 1970 00:00:00 GMT", True),
    "8 KB before": ("a=" + "x" * 8192 + "; sid={uid}", True),
    "8 KB after": ("sid={uid}; a=" + "=;" * 4096, True),
    "8 KB as our value": ("sid=" + "x" * 8192 + "; sid={uid}", True),
    "NUL": ("\0=\0; a\0; sid={uid}", True),
    "Latin-1 bytes": ("\xff\xfe=\xe9\x80; sid={uid}", True),
    "UTF-8 bytes": ("caf\xc3\xa9=\xe2\x82\xac; sid={uid}", True),
    "JSON": ('a={{"b":[1,2;3],"c":"d"}}; sid={uid}', True),
    "a comma in a value": ("a=1,2, 3; sid={uid}", True),
    "other names like ours": ("xsid=1; sid2=2; SID=3; __Host-sid=4; sid={uid}", True),
    "path-like": ("sid=../../../../etc/passwd; sid=..%2f" + "." * 38, False),
    "too short": ("sid={short}", False),
    "too long": ("sid={uid}A", False),
    "not of our letters": ("sid={short}\xe9; sid={short}+; sid={short}\0; sid={short}\u0660", False),
    "name in capitals": ("SID={uid}", False),
    "name with a prefix": ("xsid={uid}; __Host-sid={uid}; $sid={uid}", False),
    "within a value": ("a=sid={uid}; b:sid={uid}", False),
    "a line break": ("a=1\r\nsid={uid}", False),
    "after a dead one": ("sid={foreign[0]}; sid={uid}", True),
    "fourth of four": ("sid={foreign[0]}; sid={foreign[1]}; sid={foreign[2]}; sid={uid}", True),
    "fourth after junk": (
        "sid=; sid={foreign[0]}; sid=x; sid={foreign[1]}; sid={foreign[1]}; sid={foreign[2]}; sid={uid}",
        True,
    ),
    "after a dead one, with blanks": ("sid={foreign[0]}; sid = {uid}", True),
    "after a dead one, quoted": ('sid={foreign[0]};sid="{uid}"', True),
    "before a dead one, quoted": ('sid="{uid}"; sid={foreign[0]}', True),
    "fifth": ("sid={foreign[0]}; sid={foreign[1]}; sid={foreign[2]}; sid={foreign[3]}; sid={uid}", False),
}


@pytest.mark.parametrize("kind", JUNK_HEADERS)
def test_our_cookie_is_found_among_junk_and_nothing_else_reaches_the_store(kind):
    header, found = JUNK_HEADERS[kind]
    application, uid = known_visitor()
    header = header.format(uid=uid, short=uid[:42], foreign=FOREIGN)
    assert Browser(application).get(HTTP_COOKIE=header).text == ("known" if found else "nobody")
    opened = application.store.opened
    assert len(opened) <= 4 and all(re.fullmatch(UID, asked) for asked in opened)


def test_a_hundred_thousand_random_headers_raise_nothing_and_never_hide_our_cookie():
    chance = random.Random(20)
    application, uid = known_visitor()
    letters = '=;," \t\\$%/.-_:{}[]()<>@!?#\0\r\n\x7f\x80\x85\xa0\xe9\xff' + "abcsidSID019"
    names = ["sid", "sid ", "Sid", "xsid", "sid2", "__Host-sid", "$sid", '"sid"', "si", "\xa0x", ""]
    bad_values = [uid[:42], uid + "A", uid[:42] + "+", uid[:42] + "\xe9", "", '"', "../" * 14 + "x", "x" * 300]
    junk = ["".join(chance.choices(letters, k=chance.choice((0, 1, 3, 10, 40)))) for _ in range(3000)]
    junk += [f"{chance.choice(names)}={chance.choice(bad_values)}" for _ in range(1000)]
    junk = [piece for piece in junk if not re.search("[,;]?\\s*sid\\s*=\\W*" + UID, piece)]
    environ, started = {}, []
    setup_testing_defaults(environ)
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
    assert set(application.store.opened) <= {uid, *FOREIGN}


@pytest.mark.parametrize("piece", [";", "a=b; ", '"', "sid=", "sid=x;", " ", "\\", ",", "=", "sid=" + "a" * 43 + "; "])
def test_reading_cookies_takes_linear_time(piece):
    application, _ = known_visitor()
    environ = {}
    setup_testing_defaults(environ)

    def cost(size):
        header = (piece * (size // len(piece) + 1))[:size]
        times = []
        for _ in range(7):
            start = time.perf_counter()
            application({**environ, "HTTP_COOKIE": header}, lambda *args: None)
            times.append(time.perf_counter() - start)
        return min(times)

    # Eight times the length; quadratic would be 64 times the cost.
    assert cost(65536) < 30 * cost(8192) + 0.001


# What a neighbour can put in front of ours: with Domain= from a sibling domain, or over http.
@pytest.mark.parametrize(
    ("scheme", "header"),
    [
        ("https", "sid={uid}"),
        ("https", "__Secure-sid={uid}"),
        ("https", "__host-sid={uid}"),
        ("https", "x=1,__Host-sid={uid}"),
        ("https", "\xa0__Host-sid={uid}"),
        ("https", "x=1; \x85__Host-sid={uid}"),
        ("https", "\x1c__Host-sid={uid}; \x0b__Host-sid={uid}"),
        ("https", '"__Host-sid"={uid}'),
        ("https", "=__Host-sid={uid}"),
        ("https", "__Host-sid%3D={uid}; __Host-sid[]={uid}"),
        ("http", "__Host-sid={uid}"),
    ],
)
def test_only_the_cookie_with_exactly_our_name_counts(scheme, header):
    application, uid = known_visitor()
    assert Browser(application, scheme).get(HTTP_COOKIE=header.format(uid=uid)).text == "nobody"
    assert application.store.opened == []


# WSGI
# ---------------------------------------------------------------------------


class Gateway:
    """A server by the letter of PEP 3333, wsgiref.validate in front of it, that remembers what happened in order."""

    def __init__(self, application, events=None):
        self.application, self.events = application, [] if events is None else events

    def start_response(self, status, headers, exc_info=None):
        if exc_info is not None and self.sent:
            raise exc_info[1]
        assert exc_info is not None or self.headers is None
        self.headers = headers
        self.events.append(status)
        return self.send

    def send(self, data):
        if data:
            self.sent = True
            self.events.append(data)

    def run(self, most=None, **environ):
        """Send *most* pieces of the body, then the client goes away."""
        self.headers, self.sent = None, False
        environ = Browser(None).environ(**environ)
        result = validator(self.application)(environ, self.start_response)
        try:
            for i, data in enumerate(result):
                self.send(data)
                if i + 1 == most:
                    break
        finally:
            result.close()
        return Response("", self.headers, b"")


def count(environ):
    ICounter(ISession(environ)).hits += 1


def text_headers():
    return [("Content-Type", "text/plain")]


class Body:
    """An iterable with close(), which may start the response as late as its first piece."""

    closed = 0

    def __init__(self, environ, start_response):
        self.environ, self.start_response, self.pieces = environ, start_response, iter([b"one ", b"two"])

    def __iter__(self):
        return self

    def __next__(self):
        if self.start_response:
            self.start_response("200 OK", text_headers())
            self.start_response = None
            count(self.environ)
        return next(self.pieces)

    def close(self):
        type(self).closed += 1


# Each of these touches the session at the last moment that it can.


def list_app(environ, start_response):
    start_response("200 OK", text_headers())
    count(environ)
    return [b"one ", b"two"]


def tuple_app(environ, start_response):
    return tuple(list_app(environ, start_response))


def empty_list_app(environ, start_response):
    list_app(environ, start_response)
    return []


def generator_app(environ, start_response):
    """start_response before the first next()."""
    start_response("200 OK", text_headers())

    def body():
        count(environ)
        yield b"one "
        yield b"two"

    return body()


def late_generator_app(environ, start_response):
    """start_response at the first next()."""
    start_response("200 OK", text_headers())
    count(environ)
    yield b"one "
    yield b"two"


def empty_first_app(environ, start_response):
    start_response("200 OK", text_headers())
    count(environ)
    yield b""
    yield b"one two"


def empty_generator_app(environ, start_response):
    start_response("200 OK", text_headers())
    count(environ)
    yield from ()


def write_app(environ, start_response):
    write = start_response("200 OK", text_headers())
    count(environ)
    write(b"one ")
    write(b"two")
    return []


def write_and_body_app(environ, start_response):
    write = start_response("200 OK", text_headers())
    count(environ)
    write(b"one ")
    return iter([b"two"])


def second_start_app(environ, start_response):
    start_response("200 OK", [*text_headers(), ("X-First", "1")])
    try:
        raise RuntimeError("an error before anything was sent")
    except RuntimeError:
        start_response("500 Oops", text_headers(), sys.exc_info())
    count(environ)
    return [b"one ", b"two"]


def second_start_in_generator_app(environ, start_response):
    yield from second_start_app(environ, start_response)


def no_content_app(environ, start_response):
    start_response("204 No Content", [])
    count(environ)
    return []


def not_modified_app(environ, start_response):
    start_response("304 Not Modified", [("ETag", '"x"')])
    count(environ)
    return iter([])


def file_app(environ, start_response):
    start_response("200 OK", text_headers())
    count(environ)
    return environ["wsgi.file_wrapper"](io.BytesIO(b"one two"), 4)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("app", "status", "body"),
    [
        (list_app, "200 OK", b"one two"),
        (tuple_app, "200 OK", b"one two"),
        (empty_list_app, "200 OK", b""),
        (generator_app, "200 OK", b"one two"),
        (late_generator_app, "200 OK", b"one two"),
        (empty_first_app, "200 OK", b"one two"),
        (empty_generator_app, "200 OK", b""),
        (write_app, "200 OK", b"one two"),
        (write_and_body_app, "200 OK", b"one two"),
        (second_start_app, "500 Oops", b"one two"),
        (second_start_in_generator_app, "500 Oops", b"one two"),
        (no_content_app, "204 No Content", b""),
        (not_modified_app, "304 Not Modified", b""),
        (file_app, "200 OK", b"one two"),
        (Body, "200 OK", b"one two"),
    ],
)
def test_what_happens_before_the_first_piece_of_the_body_is_saved_before_the_headers_leave(app, status, body, method):
    def inner(environ, start_response):
        if environ["PATH_INFO"] == "/count":
            return counter_app(environ, start_response)
        if environ["REQUEST_METHOD"] == "HEAD":
            environ = {**environ, "REQUEST_METHOD": "GET"}
            return [] if b"".join(app(environ, start_response)) else []
        return app(environ, start_response)

    # (write() counts as a body too, so it has no place in the answer to a HEAD request.)
    if method == "HEAD" and app in (write_app, write_and_body_app):
        app = list_app
    store = SpyStore()
    application = SessionMiddleware(validator(inner), store, patience=0)
    gateway = Gateway(application, store.events)
    closed = Body.closed
    response = gateway.run(method=method, **{"wsgi.file_wrapper": FileWrapper})
    assert store.events[:2] == ["save", status]
    sent = [event for event in store.events[2:] if isinstance(event, bytes)]
    assert b"".join(sent) == (b"" if method == "HEAD" else body)
    assert Body.closed - closed == (app is Body and method == "GET")
    (cookie,) = response.all("Set-Cookie")
    assert response["Vary"] == "Cookie" and response["X-First"] is None
    assert Browser(application).get("/count", HTTP_COOKIE=cookie.partition(";")[0]).text == "2"


def test_lists_tuples_and_files_reach_the_server_as_they_are():
    made = []

    class ServersWrapper(FileWrapper):
        pass

    def app(environ, start_response):
        count(environ)
        start_response("200 OK", text_headers())
        path = environ["PATH_INFO"]
        file = io.BytesIO(b"x")
        made.append({"/list": [b"x"], "/tuple": (b"x",), "/file": environ["wsgi.file_wrapper"](file)}[path])
        return made[-1]

    application = SessionMiddleware(app)
    for path in ("/list", "/tuple", "/file"):
        environ = Browser(None).environ(path, **{"wsgi.file_wrapper": ServersWrapper})
        assert application(environ, lambda *args: None) is made[-1]


def test_a_request_that_never_asks_for_its_session_changes_no_header_and_asks_no_store():
    headers = [("Content-Type", "text/plain")]

    def app(environ, start_response):
        start_response("200 OK", headers)
        return [b"x"]

    store = SpyStore()
    gateway = Gateway(wrap(app, store))
    assert gateway.run(HTTP_COOKIE="sid=" + FOREIGN[0]).headers == headers
    assert (store.events, store.opened) == ([], [])


def test_the_applications_own_header_list_is_left_alone():
    headers = text_headers()

    def app(environ, start_response):
        count(environ)
        start_response("200 OK", headers)
        return [b"x"]

    gateway = Gateway(wrap(app))
    assert gateway.run()["Vary"] == "Cookie"
    assert headers == text_headers()


def freed(application, cookie):
    """Can the session be had at once?"""
    assert application.patience == 0
    return Browser(application).get("/count", HTTP_COOKIE=cookie).text


def held_app(body):
    """A middleware whose session has a counter, around an application that opens it and goes on with *body*."""

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/count":
            return counter_app(environ, start_response)
        count(environ)
        return body(environ, start_response)

    application = SessionMiddleware(app, patience=0)
    browser = Browser(application)
    browser.get("/count")
    return application, "; ".join(f"{k}={v}" for k, v in browser.cookies.items())


@pytest.mark.parametrize("when", ["in the call", "before the first piece", "mid-stream", "after write"])
def test_an_exception_of_the_application_reaches_the_server_and_the_session_is_let_go(when):
    def body(environ, start_response):
        write = start_response("200 OK", text_headers())
        if when == "in the call":
            raise LookupError(when)
        if when == "after write":
            write(b"one")
            raise LookupError(when)

        def pieces():
            if when == "mid-stream":
                yield b"one"
            raise LookupError(when)

        return pieces()

    application, cookie = held_app(body)
    gateway = Gateway(application)
    with pytest.raises(LookupError, match=when):
        gateway.run(HTTP_COOKIE=cookie)
    assert gateway.events == (["200 OK", b"one"] if when in ("mid-stream", "after write") else [])
    assert freed(application, cookie) == "3"


def test_a_new_session_of_a_request_that_raises_is_not_kept():
    def app(environ, start_response):
        count(environ)
        raise LookupError

    application = SessionMiddleware(app)
    with pytest.raises(LookupError):
        Gateway(application).run()
    assert len(application.store) == 0


@pytest.mark.parametrize("most", [None, 1])
def test_a_client_that_goes_away_closes_the_body_and_frees_the_session(most):
    ended = []

    def body(environ, start_response):
        start_response("200 OK", text_headers())

        def pieces():
            try:
                yield b"one"
                yield b"two"
            finally:
                ended.append(ISession(environ).uid)

        return pieces()

    application, cookie = held_app(body)
    Gateway(application).run(most, HTTP_COOKIE=cookie)
    assert ended == [cookie.partition("=")[2]]
    assert freed(application, cookie) == "3"


def test_a_client_that_goes_away_before_the_first_piece_frees_the_session():
    application, cookie = held_app(generator_app)
    result = application(Browser(None).environ(HTTP_COOKIE=cookie), lambda *args: None)
    result.close()
    assert freed(application, cookie) == "3"
    result = application(Browser(None).environ(HTTP_COOKIE=cookie), lambda *args: None)
    del result  # a server that forgets close()
    assert freed(application, cookie) == "5"


@pytest.mark.parametrize("pieces", [["x"], []])
def test_a_generator_without_start_response_is_reported_and_frees_the_session(pieces):
    application, cookie = held_app(lambda environ, start_response: (piece.encode() for piece in pieces))
    result = application(Browser(None).environ(HTTP_COOKIE=cookie), lambda *args: None)
    with contextlib.closing(result), pytest.raises(AssertionError, match="start_response"):
        next(result)
    assert freed(application, cookie) == "3"


def test_a_list_without_start_response_is_reported_and_frees_the_session():
    application, cookie = held_app(lambda environ, start_response: [b"x"])
    with pytest.raises(AssertionError, match="start_response"):
        application(Browser(None).environ(HTTP_COOKIE=cookie), lambda *args: None)
    assert freed(application, cookie) == "3"


class Task:
    """Does a request as waitress does: keeps the environ for as long as the request takes."""

    def __init__(self, reads=True, sent=False):
        self.reads, self.sent = reads, sent

    def run(self, application):
        def start_response(status, headers, exc_info=None):
            try:
                if exc_info and self.sent:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None
            return self.write

        self.environ = {}
        setup_testing_defaults(self.environ)
        result = application(self.environ, start_response)
        try:
            for _ in result if self.reads else ():
                self.sent = True
        finally:
            if hasattr(result, "close"):
                result.close()

    def write(self, data):
        self.sent = True


ENDS = ["a list", "write()", "a generator", "an exception", "mid-body"]
ENDS += ["exc_info", "exc_info, then an exception", "exc_info, nobody reads", "exc_info mid-body", "exc_info, refused"]


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("how", ENDS)
def test_no_request_is_left_to_the_garbage_collector(how, touched):
    def pieces(start_response):
        start_response("200 OK", text_headers())
        yield b"one"
        if how == "mid-body":
            raise LookupError
        if how == "exc_info mid-body":
            failing(start_response)
        yield b"two"

    def failing(start_response):
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", text_headers(), sys.exc_info())

    def app(environ, start_response):
        if touched:
            count(environ)
        if how == "an exception":
            raise LookupError
        if how in ("a generator", "mid-body", "exc_info mid-body"):
            return pieces(start_response)
        if how.startswith("exc_info"):
            failing(start_response)
            if how.endswith("exception"):
                raise LookupError
            return iter([b"x"])
        write = start_response("200 OK", text_headers())
        if how == "write()":
            write(b"one")
        return [b"two"]

    application, task = SessionMiddleware(app), Task(how != "exc_info, nobody reads", how == "exc_info, refused")
    alive = weakref.ref(task)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(LookupError):
            task.run(application)
        del task
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("body", [list, iter])
def test_to_send_more_when_the_response_is_over_is_an_error(body):
    def app(environ, start_response):
        late.extend((start_response, start_response("200 OK", text_headers())))
        return body([b"x"])

    late = []
    response = Browser(SessionMiddleware(app)).get()
    start_response, write = late
    assert response.text == "x"
    with pytest.raises(AssertionError, match="the response is over"):
        write(b"y")
    with pytest.raises(AssertionError, match="twice"):
        start_response("200 OK", text_headers())
    with pytest.raises(LookupError, match="too late"):
        start_response("500 Oops", text_headers(), (LookupError, LookupError("too late"), None))


@pytest.mark.parametrize("sent", [False, True])
def test_start_response_twice_without_exc_info_is_an_error(sent):
    def body(environ, start_response):
        start_response("200 OK", text_headers())
        if sent:
            yield b"x"
        start_response("200 OK", text_headers())
        yield b"y"

    application, cookie = held_app(body)
    with pytest.raises(AssertionError, match="PEP 3333"):
        Gateway(application).run(HTTP_COOKIE=cookie)
    assert freed(application, cookie) == "3"


def test_exc_info_after_the_headers_left_raises_the_error_again():
    def body(environ, start_response):
        start_response("200 OK", text_headers())
        yield b"one"
        try:
            raise LookupError("mid-stream")
        except LookupError:
            start_response("500 Oops", text_headers(), sys.exc_info())
        yield b"two"

    application, cookie = held_app(body)
    gateway = Gateway(application)
    with pytest.raises(LookupError, match="mid-stream"):
        gateway.run(HTTP_COOKIE=cookie)
    assert gateway.events == ["200 OK", b"one"]


def test_exc_info_after_an_empty_piece_still_replaces_the_headers_and_keeps_the_cookie():
    def app(environ, start_response):
        start_response("200 OK", text_headers())
        count(environ)
        yield b""
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", text_headers(), sys.exc_info())
        yield b"sorry"

    gateway = Gateway(wrap(app))
    response = gateway.run()
    assert gateway.events == ["200 OK", "500 Oops", b"sorry"]
    assert len(response.all("Set-Cookie")) == 1 and response["Vary"] == "Cookie"


def test_write_after_the_first_piece_still_writes():
    def app(environ, start_response):
        write = start_response("200 OK", text_headers())
        count(environ)
        yield b"one"
        write(b"two")

    gateway = Gateway(wrap(app))
    gateway.run()
    assert gateway.events == ["200 OK", b"one", b"two"]


class ClosingList(list):
    closed = 0

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("kind", ["list", "file", "generator"])
def test_the_body_is_closed_when_its_session_cannot_be_saved(kind):
    made = []

    def app(environ, start_response):
        start_response("200 OK", text_headers())
        count(environ)
        file = io.BytesIO(b"x")

        def pieces():
            with file:
                yield b"x"

        answer = {"list": ClosingList(), "file": environ["wsgi.file_wrapper"](file), "generator": pieces()}[kind]
        made.extend((file, answer))
        return answer

    gateway = Gateway(wrap(app, BrokenStore()))
    with pytest.raises(StoreError):
        gateway.run(**{"wsgi.file_wrapper": FileWrapper})
    file, answer = made
    assert answer.closed == 1 if kind == "list" else file.closed
    assert gateway.events == []


def test_a_store_that_fails_sends_no_headers_and_leaves_the_cookie_alone():
    gateway = Gateway(wrap(generator_app, BrokenStore()))
    with pytest.raises(StoreError, match="down"):
        gateway.run()
    assert gateway.events == []


def test_a_new_session_after_the_headers_left_is_a_clear_error():
    def app(environ, start_response):
        start_response("200 OK", text_headers())
        yield b"x"
        ISession(environ).name = "late"

    with pytest.raises(SessionError, match="headers have left.*before the first piece"):
        Gateway(wrap(app)).run()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_session_that_exists_can_be_used_after_the_headers_left(kind, tmp_path):
    store = MemoryStore() if kind == "memory" else SQLiteStore(tmp_path / "s.db", secret=SECRET)

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/late":
            start_response("200 OK", text_headers())
            yield b"x"
            count(environ)
        else:
            yield from counter_app(environ, start_response)

    browser = Browser(wrap(app, store, patience=0))
    browser.get()
    assert browser.get("/late").all("Set-Cookie") == []
    assert browser.get().text == "3"


def test_nested_middlewares_with_the_same_cookie_share_one_session():
    store = MemoryStore()
    browser = Browser(wrap(wrap(counter_app), store))
    response = browser.get()
    assert len(response.all("Set-Cookie")) == 1 and response.all("Vary") == ["Cookie"]
    assert browser.get().text == "2" and len(store) == 1
    browser = Browser(wrap(wrap(counter_app, store), store, patience=0))
    assert [browser.get().text, browser.get().text] == ["1", "2"]


def test_nested_middlewares_with_different_cookies_have_a_session_each():
    inner = wrap(counter_app, cookie="inner")

    def app(environ, start_response):
        count(environ)
        before = ISession(environ)
        result = inner(environ, start_response)
        assert ISession(environ) is before
        return result

    browser = Browser(wrap(app, cookie="outer"))
    response = browser.get()
    assert set(browser.cookies) == {"inner", "outer"} and len(response.all("Set-Cookie")) == 2
    assert response.all("Vary") == ["Cookie"] and response.all("Cache-Control") == ['no-cache="Set-Cookie"']
    assert browser.get().text == "2" and len(set(browser.cookies.values())) == 2


def test_a_middleware_shares_with_one_of_its_cookie_however_far_out():
    store = MemoryStore()
    innermost = SessionMiddleware(counter_app, store, patience=0)
    between = SessionMiddleware(innermost, cookie="between")

    def app(environ, start_response):
        count(environ)
        return between(environ, start_response)

    browser = Browser(wrap(app, store))
    response = browser.get()
    assert response.text == "2" and len(response.all("Set-Cookie")) == 1
    assert browser.get().text == "4" and len(store) == 1


def test_nested_middlewares_with_one_cookie_and_two_stores_are_refused():
    application = SessionMiddleware(SessionMiddleware(counter_app, MemoryStore()), MemoryStore())
    with pytest.raises(SessionError, match="different stores.*cookie="):
        Gateway(application).run()


def test_an_empty_place_in_the_environ_is_no_session_of_an_outer_middleware():
    browser = Browser(lambda environ, start_response: counted({**environ, "minisess.session": None}, start_response))
    counted = wrap(guard_app)
    assert [browser.get().text, browser.get().text] == ["None 1", "None 2"]


def test_a_second_try_with_the_same_environ_is_a_request_of_its_own():
    tries = []

    def app(environ, start_response):
        tries.append(environ["PATH_INFO"])
        count(environ)
        if len(tries) == 1:
            raise LookupError("the first time")
        return counter_app(environ, start_response)

    application = SessionMiddleware(app)

    def retrying(environ, start_response):
        try:
            return application(environ, start_response)
        except LookupError:
            return application(environ, start_response)

    browser = Browser(retrying)
    response = browser.get()
    assert response.text == "2" and len(response.all("Set-Cookie")) == 1
    assert len(application.store) == 1 and browser.get().text == "4"


@pytest.mark.parametrize("app", [list_app, generator_app])
def test_an_environ_that_served_one_request_can_serve_another(app):
    application = SessionMiddleware(app)
    environ, cookies = Browser(None).environ(), []
    for _ in range(2):
        result = application(environ, lambda status, headers: cookies.append(dict(headers)["Set-Cookie"]))
        assert b"".join(result) == b"one two"
        if app is generator_app:
            result.close()
    assert len(set(cookies)) == 2


def test_looking_at_the_session_after_its_request_failed_holds_nothing():
    def app(environ, start_response):
        if environ["PATH_INFO"] == "/count":
            return counter_app(environ, start_response)
        raise LookupError

    application = SessionMiddleware(app, patience=0)
    browser = Browser(application)
    browser.get("/count")
    cookie = "sid=" + browser.cookies["sid"]
    environ = browser.environ()
    with pytest.raises(LookupError):
        application(environ, lambda *args: None)
    assert ICounter(ISession(environ)).hits == 1  # as an error page around the middleware does
    assert freed(application, cookie) == "2"


# Security
# ---------------------------------------------------------------------------


def guard_app(environ, start_response):
    """Counts; /login, /renew and /logout do what they say; /look only looks."""
    session, path = ISession(environ), environ["PATH_INFO"]
    if path == "/login":
        session.login("alice")
    elif path == "/renew":
        session.renew()
    elif path == "/logout":
        session.expire()
        return plain(start_response, "bye")
    elif path == "/look":
        seen = [getattr(session, "name", None), ICounter in session, session.owner, len(vars(session)), repr(session)]
        return plain(start_response, len(seen))
    count(environ)
    return plain(start_response, f"{session.owner} {ICounter(session).hits}")


def test_ids_are_256_random_bits_that_no_seed_determines():
    store, uids = MemoryStore(), []
    for _ in range(200):
        random.seed(1)
        uids.append(store.create(1, 1).uid)
    assert all(re.fullmatch(UID, uid) for uid in uids) and len(set(uids)) == 200
    raw = [int.from_bytes(base64.urlsafe_b64decode(uid + "="), "big") for uid in uids]
    both = [{number >> bit & 1 for number in raw} for bit in range(256)]
    assert both == [{0, 1}] * 256


def test_an_id_that_the_client_made_up_is_never_adopted():
    store = MemoryStore()
    browser = Browser(wrap(guard_app, store))
    browser.cookies["sid"] = FOREIGN[0]
    assert browser.get().text == "None 1"
    assert browser.cookies["sid"] != FOREIGN[0] and store.open(FOREIGN[0]) is None


@pytest.mark.parametrize("path", ["/login", "/renew"])
def test_a_planted_id_is_worth_nothing_after_login_or_renewal(path):
    application = wrap(guard_app)
    attacker, victim = Browser(application), Browser(application)
    attacker.get()
    victim.cookies.update(attacker.cookies)
    assert victim.get(path).text.endswith(" 2")
    assert victim.cookies != attacker.cookies
    assert attacker.get().text == "None 1"  # a new session
    assert victim.get().text.endswith(" 3")


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"lifetime": 100}, [(99.9, "2"), (99.9, "3"), (100, "1")]),
        ({"lifetime": 100, "max_lifetime": 250}, [(90, "2"), (90, "3"), (69.9, "4"), (0.1, "1")]),
    ],
)
def test_timeouts_are_kept_by_the_server_whatever_the_client_keeps(options, steps):
    clock = Clock()
    browser = Browser(wrap(counter_app, MemoryStore(clock=clock), **options))
    browser.get()
    for seconds, text in steps:
        clock.advance(seconds)
        assert browser.get().text == text


def test_logging_out_deletes_the_state_and_the_cookie():
    store = MemoryStore()
    browser = Browser(wrap(guard_app, store))
    browser.get("/login")
    stolen = dict(browser.cookies)
    assert browser.get("/logout").text == "bye"
    assert browser.cookies == {} and len(store) == 0
    browser.cookies = stolen
    assert browser.get().text == "None 1"


def test_a_client_cannot_make_the_server_keep_anything_by_looking():
    store = SpyStore()
    application = wrap(guard_app, store)
    for i in range(200):
        browser = Browser(application)
        browser.cookies["sid"] = base64.urlsafe_b64encode(i.to_bytes(32, "big")).decode().rstrip("=")
        response = browser.get("/look")
        assert response.all("Set-Cookie") == [] and response["Vary"] == "Cookie"
    # Whatever its containers are called, none of them has grown.
    sizes = {name: len(value) for name, value in vars(store).items() if hasattr(value, "__len__")}
    assert not any(size for name, size in sizes.items() if name not in ("events", "opened")), sizes


@pytest.fixture(params=["memory", "sqlite"])
def store_of_kind(request, tmp_path):
    if request.param == "memory":
        return MemoryStore()
    return SQLiteStore(tmp_path / "sessions.db", secret=SECRET)


def test_an_unknown_id_costs_the_store_one_question(store_of_kind):
    application, _ = known_visitor(store_of_kind)
    opened, open_ = [], store_of_kind.open
    store_of_kind.open = lambda uid, *args, **options: opened.append(uid) or open_(uid, *args, **options)
    for header, most in ((f"sid={FOREIGN[0]}", 1), ("; ".join(f"sid={uid}" for uid in FOREIGN * 20), 4)):
        opened.clear()
        assert Browser(application).get(HTTP_COOKIE=header).text == "nobody"
        assert len(opened) <= most


def test_what_the_client_sends_never_comes_back_in_a_header():
    evil = 'sid=x\r\nX-Evil: 1; sid="\r\nSet-Cookie: a=b"; sid=' + "%0d%0a" * 7 + "x"
    response = Browser(wrap(guard_app), "https").get("/login", HTTP_COOKIE=evil + "; __Host-" + evil)
    assert {name for name, _ in response.headers} == {"Content-Type", "Vary", "Set-Cookie", "Cache-Control"}
    assert not any("\r" in value or "\n" in value or "evil" in value.lower() for _, value in response.headers)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("then", ["used", "looked at", "logged in"])
def test_a_session_that_follows_an_expired_one_gets_its_cookie(store_of_kind, known, then):
    def app(environ, start_response):
        if environ["PATH_INFO"] == "/again":
            ISession(environ).expire()
            if then == "logged in":
                ISession(environ).login("bob")
            elif then == "used":
                count(environ)
            else:
                assert ICounter not in ISession(environ)
            return plain(start_response)
        return guard_app(environ, start_response)

    browser = Browser(wrap(app, store_of_kind))
    if known:
        browser.get("/login")
        browser.get()
    before = dict(browser.cookies)
    browser.get("/again")
    assert browser.cookies != before or not known
    assert browser.get().text == {"used": "None 2", "looked at": "None 1", "logged in": "bob 1"}[then]


@pytest.mark.parametrize("path", ["/login", "/renew", "/logout"])
@pytest.mark.parametrize("how", ["locking=False", "release"])
def test_a_request_in_flight_with_the_old_id_is_not_given_the_new_one(store_of_kind, how, path):
    opened, go_on = threading.Event(), threading.Event()

    def app(environ, start_response):
        if environ["PATH_INFO"] != "/slow":
            return guard_app(environ, start_response)
        count(environ)
        if how == "release":
            ISession(environ).release()
        opened.set()
        assert go_on.wait(10)
        return plain(start_response)

    application = SessionMiddleware(app, store_of_kind, locking=how != "locking=False", patience=5)
    attacker, victim = Browser(application), Browser(application)
    attacker.get()
    victim.cookies.update(attacker.cookies)
    responses = []
    slow = threading.Thread(target=lambda: responses.append(attacker.get("/slow")))
    slow.start()
    assert opened.wait(10)
    try:
        victim.get(path)
    finally:
        go_on.set()
        slow.join(10)
    (response,) = responses
    assert response.all("Set-Cookie") == []  # neither the new id, nor a deletion of what the login just set
    assert attacker.get().text == "None 1"


def test_a_login_after_release_is_for_its_own_client_alone(store_of_kind):
    released, logged_in = threading.Event(), threading.Event()

    def app(environ, start_response):
        if environ["PATH_INFO"] in ("/attack", "/login"):
            session = ISession(environ)
            session.release()
            if environ["PATH_INFO"] == "/attack":
                released.set()
                assert logged_in.wait(10)
            else:
                attack.start()
                assert released.wait(10)
                session.login("alice")
            return plain(start_response)
        return guard_app(environ, start_response)

    application = SessionMiddleware(app, store_of_kind)
    attacker, victim = Browser(application), Browser(application)
    attacker.get()
    victim.cookies.update(attacker.cookies)
    responses = []
    attack = threading.Thread(target=lambda: responses.append(attacker.get("/attack")))
    victim.get("/login")
    logged_in.set()
    attack.join(10)
    assert responses[0].all("Set-Cookie") == []
    assert attacker.get().text == "None 1" and victim.get().text.startswith("alice ")


@pytest.mark.parametrize("persistent", [False, True])
def test_a_login_that_comes_in_as_soon_as_a_request_lets_go_is_for_its_own_client_alone(persistent):
    class Overtaken(MemoryStore):
        def save(self, session):
            super().save(session)
            if threading.current_thread() is threading.main_thread() and waiting:
                login = threading.Thread(target=lambda: logged_in.append(waiting.pop().get("/login")))
                login.start()
                login.join()

    waiting, logged_in = [], []
    application = SessionMiddleware(guard_app, Overtaken(), persistent=persistent)
    attacker, victim = Browser(application), Browser(application)
    attacker.get()
    victim.cookies.update(attacker.cookies)
    waiting.append(victim)
    response = attacker.get()
    assert logged_in[0].text.startswith("alice ")
    assert victim.cookies["sid"] not in str(response.headers)
    assert attacker.get().text == "None 1" and victim.get().text.startswith("alice ")


def test_who_is_overtaken_by_a_renewal_while_the_store_answers_is_not_given_the_new_id():
    class Overtaken(MemoryStore):
        def open(self, uid, patience=10, hold=True):
            session = super().open(uid, patience, hold)
            thread = threading.Thread(target=session.renew)
            thread.start()
            thread.join()
            return session

    application = SessionMiddleware(guard_app, Overtaken(), locking=False, persistent=True)
    browser = Browser(application)
    browser.get("/login")
    response = browser.get()
    assert response.text == "alice 2" and response.all("Set-Cookie") == []


def test_no_id_is_ever_logged_or_shown(caplog, tmp_path):
    caplog.set_level(logging.DEBUG, logger="minisess")
    clock, uids, shown = Clock(), set(), []
    store = SQLiteStore(tmp_path / "s.db", secret=SECRET, clock=clock)
    thief = SQLiteStore(tmp_path / "s.db", secret="another secret, long enough", clock=clock)

    def app(environ, start_response):
        session = ISession(environ)
        shown.extend((repr(session), str(session), repr(environ["minisess.session"]), f"{session!r}"))
        uids.add(session.uid)
        result = guard_app(environ, start_response)
        uids.add(session.uid)
        return result

    browser = Browser(wrap(app, store, patience=0))
    browser.get()
    browser.get("/login")
    held = store.open(browser.cookies["sid"])
    try:
        browser.get()
    except SessionBusy:
        shown.append(traceback.format_exc())
    store.release(held)
    assert thief.open(browser.cookies["sid"]) is None
    browser.get("/logout")
    browser.cookies["sid"] = FOREIGN[0]
    browser.get()
    assert "SessionBusy" in "".join(shown)
    messages = " ".join(record.getMessage() for record in caplog.records)
    for word in ("created", "renewed", "ended", "known", "seal"):
        assert word in messages
    text = caplog.text + "".join(shown)
    assert len(uids) == 3
    for uid in (*uids, FOREIGN[0]):
        assert uid not in text and uid[:8] not in text


@pytest.mark.parametrize(
    ("path", "level", "words"),
    [
        ("/", "INFO", ["created"]),
        ("/look", "INFO", []),
        ("/login", "INFO", ["renewed", "created"]),
        ("/logout", "INFO", ["ended"]),
    ],
)
def test_the_life_of_a_session_is_logged(caplog, path, level, words):
    caplog.set_level(logging.INFO, logger="minisess")
    Browser(wrap(guard_app)).get(path)
    assert [record.levelname for record in caplog.records] == [level] * len(words)
    assert all(word in record.getMessage() for word, record in zip(words, caplog.records, strict=True))


def test_the_log_calls_a_session_by_the_same_short_name_throughout(caplog):
    caplog.set_level(logging.INFO, logger="minisess")
    browser = Browser(wrap(guard_app))
    browser.get()
    browser.get("/logout")
    Browser(browser.application).get()
    tags = [re.search(r"session (\w+) ", record.getMessage())[1] for record in caplog.records]
    assert len(tags) == 3 and tags[0] == tags[1] != tags[2] and len(tags[0]) < 12


def test_the_repr_of_a_session_says_what_it_keeps():
    session = MemoryStore().create(10, 20)
    ICounter(session)
    session.login("alice")
    assert "ICounter" in repr(session) and "alice" in repr(session) and session.uid not in repr(session)


# Frameworks
# ---------------------------------------------------------------------------


def hit(request):
    """What a view does, whatever its framework calls a request."""
    counter = ICounter(ISession(request))
    counter.hits += 1
    ISession(request).foo = getattr(ISession(request), "foo", 0) + 1
    return f"{counter.hits} {ISession(request).foo}"


def flask_app():
    flask = package("flask")
    app = flask.Flask("minisess_test")
    app.add_url_rule("/", view_func=lambda: hit(flask.request))
    return app.wsgi_app


def bottle_app():
    bottle = package("bottle")
    app = bottle.Bottle()
    app.route("/", callback=lambda: hit(bottle.request))
    return app


def werkzeug_app():
    wrappers = package("werkzeug.wrappers")

    @wrappers.Request.application
    def app(request):
        return wrappers.Response(hit(request))

    return app


def webob_app():
    dec = package("webob.dec")
    return dec.wsgify(lambda request: hit(request))


def pyramid_app():
    config, response = package("pyramid.config"), package("pyramid.response")
    with config.Configurator() as configurator:
        configurator.add_route("home", "/")
        configurator.add_view(lambda request: response.Response(hit(request)), route_name="home")
        return configurator.make_wsgi_app()


def django_app():
    django, conf, http = package("django"), package("django.conf"), package("django.http")
    if not conf.settings.configured:
        urls = type(sys)("minisess_test_urls")
        urls.urlpatterns = [package("django.urls").path("", lambda request: http.HttpResponse(hit(request)))]
        conf.settings.configure(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], SECRET_KEY=SECRET, LOGGING_CONFIG=None)
        django.setup(set_prefix=False)
    return package("django.core.wsgi").get_wsgi_application()


@pytest.mark.parametrize("make", [flask_app, bottle_app, werkzeug_app, webob_app, pyramid_app, django_app])
def test_a_frameworks_request_adapts_to_its_session(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own, about their age
        browser = Browser(SessionMiddleware(validator(make())))
        responses = [browser.get(), browser.get()]
    assert [response.text for response in responses] == ["1 1", "2 2"]
    assert [len(response.all("Set-Cookie")) for response in responses] == [1, 0]


@pytest.mark.parametrize("request_", [{}, Browser, types.SimpleNamespace(environ={}), types.SimpleNamespace(environ=1)])
def test_outside_the_middleware_the_error_says_what_to_do(request_):
    with pytest.raises(CannotAdapt, match="wrap the application in SessionMiddleware"):
        ISession(request_)
    assert ISession(request_, None) is None


# Servers and clients
# ---------------------------------------------------------------------------

SERVED = '''
"""One application for all servers; under /checked wsgiref.validate stands on both sides of the middleware."""

import sys, io
from wsgiref.validate import validator
from minisess import *


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session):
        self.hits = 0


registerAdapter(Counter, Session, ICounter)
closed = []
file_seen = []


def count(environ):
    counter = ICounter(ISession(environ))
    counter.hits += 1
    return b"%d" % counter.hits


def stream(environ, start_response, kind):
    try:
        if kind == "late":
            start_response("200 OK", [("Content-Type", "text/plain")])
        yield count(environ) + b" "
        if kind == "boom":
            raise LookupError("mid-stream")
        while kind == "endless":
            yield b"x" * 65536
        yield b"done"
    finally:
        closed.append(kind)


def app(environ, start_response):
    path = environ["PATH_INFO"].removeprefix("/checked")
    start = lambda status="200 OK", *more: start_response(status, [("Content-Type", "text/plain"), *more])
    if path == "/list":
        start()
        return [count(environ)]
    if path in ("/early", "/boom", "/endless"):
        start()
        return stream(environ, start_response, path[1:])
    if path == "/late":
        return stream(environ, start_response, "late")
    if path == "/write":
        write = start()
        write(count(environ) + b" ")
        return [b"done"]
    if path == "/error":
        start()
        try:
            raise LookupError("before anything was sent")
        except LookupError:
            start_response("500 Oops", [("Content-Type", "text/plain")], sys.exc_info())
        return [count(environ)]
    if path == "/none":
        start_response("204 No Content", [])
        count(environ)
        return []
    if path == "/unmodified":
        start_response("304 Not Modified", [])
        count(environ)
        return iter(())
    if path == "/empty":
        start()
        count(environ)
        return []
    if path == "/file":
        start()
        return environ["wsgi.file_wrapper"](io.BytesIO(count(environ) + b" file"), 8192)
    if path == "/nothing":
        count(environ)
        return [b"no start_response"]
    start()
    return [repr({"/closed": closed, "/seen": file_seen}[path]).encode()]


store = MemoryStore()
inner = SessionMiddleware(app, store, patience=2)
checked = validator(SessionMiddleware(validator(app), store, patience=2))


def application(environ, start_response):
    if environ["PATH_INFO"].startswith("/checked"):
        return checked(environ, start_response)
    result = inner(environ, start_response)
    if environ["PATH_INFO"] == "/file":
        file_seen.append(isinstance(result, environ["wsgi.file_wrapper"]))
    return result


if __name__ == "__main__":
    from wsgiref.simple_server import make_server

    make_server("127.0.0.1", int(sys.argv[1]), application).serve_forever()
'''


@contextlib.contextmanager
def server_process(command, port, log):
    """A server process for as long as the block lasts."""
    path = os.pathsep.join((os.path.dirname(minisess.__file__), *filter(None, [os.environ.get("PYTHONPATH")])))
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=os.path.dirname(log), env={**os.environ, "PYTHONPATH": path}
        )
        try:
            wait_for(port, process)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module", params=["wsgiref", "waitress", "gunicorn"])
def real_server(request, tmp_path_factory):
    """The name and port of a real server with SERVED behind it."""
    folder, port, name = tmp_path_factory.mktemp("served"), free_port(), request.param
    (folder / "served.py").write_text(SERVED)
    command = [sys.executable, "served.py", str(port)]
    if name != "wsgiref":
        package(name)
        command = [sys.executable, "-m", name, f"--listen=127.0.0.1:{port}", "served:application"]
    if name == "gunicorn":
        command[3:4] = [f"--bind=127.0.0.1:{port}", "--worker-class=gthread", "--threads=4"]
    with server_process(command, port, str(folder / "log")):
        yield name, port


class Client:
    """A client of a real server, with a cookie jar for one cookie."""

    def __init__(self, port):
        self.port, self.cookie = port, None

    def get(self, path, method="GET"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers={"Cookie": self.cookie} if self.cookie else {})
            answer = connection.getresponse()
            response = Response(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()
        for cookie in response.all("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        return response


@pytest.mark.parametrize("prefix", ["", "/checked"])
@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/list", 200, "1"),
        ("/early", 200, "1 done"),
        ("/late", 200, "1 done"),
        ("/write", 200, "1 done"),
        ("/error", 500, "1"),
        ("/none", 204, ""),
        ("/unmodified", 304, ""),
        ("/empty", 200, ""),
        ("/file", 200, "1 file"),
    ],
)
def test_real_servers_send_the_body_and_one_cookie(real_server, path, status, body, prefix):
    name, port = real_server
    client = Client(port)
    response = client.get(prefix + path)
    assert (response.status, response.text) == (status, body)
    assert len(response.all("Set-Cookie")) == 1 and response.all("Vary") == ["Cookie"]
    if not prefix and path in ("/list", "/error") and name != "gunicorn":  # gunicorn never counts a body
        assert response["Content-Length"] == "1" and response["Transfer-Encoding"] is None
    if path in ("/early", "/late") and name != "wsgiref":
        assert response["Transfer-Encoding"] == "chunked"
    assert client.get("/list").text == "2"


def test_real_servers_answer_head_requests_with_the_headers_alone(real_server):
    _, port = real_server
    client = Client(port)
    response = client.get("/empty", "HEAD")
    assert response.text == "" and len(response.all("Set-Cookie")) == 1
    assert client.get("/list").text == "2"


def test_real_servers_get_their_own_file_wrapper_back(real_server):
    name, port = real_server
    response = Client(port).get("/file")
    assert "False" not in Client(port).get("/seen").text
    if name == "waitress":
        assert response["Content-Length"] == "6"  # it asks its own wrapper for the size


@pytest.mark.parametrize("path", ["/boom", "/nothing"])
def test_real_servers_survive_broken_applications_and_the_session_is_free(real_server, path):
    _, port = real_server
    client = Client(port)
    client.get("/list")
    try:
        client.get(path)
    except (http.client.HTTPException, OSError):
        pass  # the connection is cut
    assert client.get("/list").text == "3"


def test_real_servers_close_the_body_of_a_client_that_went_away(real_server):
    _, port = real_server
    client = Client(port)
    client.get("/list")
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        request = f"GET /endless HTTP/1.1\r\nHost: x\r\nCookie: {client.cookie}\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(1000)
    end = time.monotonic() + 10
    while "endless" not in Client(port).get("/closed").text and time.monotonic() < end:
        time.sleep(0.02)
    assert "endless" in Client(port).get("/closed").text
    assert client.get("/list").text == "3"


PAGE = b"""<!doctype html><title>waiting</title><p id=count></p><script>
(async () => {
  let text = "";
  for (let i = 0; i < 3; i++) text = await (await fetch("/count")).text();
  document.getElementById("count").textContent = text;
  document.title = "done";
})();
</script>"""

FOREIGN_PAGE = b"""<!doctype html><title>waiting</title><p id=seen></p><script>
(async () => {
  const url = decodeURIComponent(location.hash.slice(1));
  let seen = "nothing";
  try { seen = await (await fetch(url, {credentials: "include"})).text(); } catch (error) {}
  await fetch(url, {credentials: "include", mode: "no-cors"});
  document.getElementById("seen").textContent = seen;
  document.title = "done";
})();
</script>"""


def page_app(environ, start_response):
    """/count counts; /total tells the count of this visitor; / and /foreign are pages with a script."""
    path = environ["PATH_INFO"]
    if path in ("/", "/foreign"):
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
        return [PAGE if path == "/" else FOREIGN_PAGE]
    if path == "/count":
        return counter_app(environ, start_response)
    if path == "/out":
        ISession(environ).expire()
    return plain(start_response, ICounter(ISession(environ)).hits if path == "/total" else "")


class ThreadingServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A browser that hangs up is no news."""


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def in_thread(application, certificate=None):
    """wsgiref's server in a thread, over TLS with a *certificate*; answers its port."""
    server = make_server("127.0.0.1", 0, application, ThreadingServer, QuietHandler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.base_environ["HTTPS"] = "on"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tls") / "both.pem")
    command = [program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", path, "-out", path + ".crt"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    with open(path, "a") as both, open(path + ".crt") as public:
        both.write(public.read())
    return path


@pytest.mark.parametrize(("scheme", "name"), [("http", "sid"), ("https", "__Host-sid")])
def test_curl_with_a_cookie_jar_counts_and_logs_out(scheme, name, certificate, tmp_path):
    jar = tmp_path / "jar"
    with in_thread(wrap(page_app), certificate if scheme == "https" else None) as port:

        def curl(path, *options):
            command = [program("curl"), "-sSk", "--noproxy", "*", "-m", "10", "-b", jar, "-c", jar, *options]
            url = f"{scheme}://127.0.0.1:{port}{path}"
            return subprocess.run([*command, url], check=True, capture_output=True, text=True, timeout=20).stdout

        assert [curl("/count"), curl("/count"), curl("/count")] == ["1", "2", "3"]
        line = next(line for line in jar.read_text().splitlines() if line.startswith("#HttpOnly_127.0.0.1"))
        _, _, path, secure, expires, got_name, uid = line.split("\t")
        assert (path, secure, expires, got_name) == ("/", str(scheme == "https").upper(), "0", name)
        assert re.fullmatch(UID, uid)
        assert "set-cookie" not in curl("/count", "-i").lower()
        assert "set-cookie" in curl("/out", "-i").lower()
        assert uid not in jar.read_text()
        assert curl("/count") == "1"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Headless Chromium with a fresh profile, driven by selenium."""
    webdriver = package("selenium.webdriver")
    service = package("selenium.webdriver.chrome.service")
    driver_path = program("chromedriver", "/usr/bin/chromedriver", "/usr/lib/chromium/chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    options.accept_insecure_certs = True
    profile = tmp_path_factory.mktemp("profile")
    for switch in """headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
        disable-component-update disable-sync disable-dev-shm-usage no-proxy-server""".split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={profile}")
    driver = webdriver.Chrome(options=options, service=service.Service(driver_path))
    driver.set_page_load_timeout(20)
    yield driver
    driver.quit()


def shown(driver, url, element):
    """Load *url*, wait for its script, and tell what it wrote into *element*."""
    driver.get("about:blank")
    driver.get(url)
    end = time.monotonic() + 15
    while driver.title != "done" and time.monotonic() < end:
        time.sleep(0.02)
    return driver.execute_script(f"return document.getElementById('{element}').textContent")


def chromium_total(driver, origin):
    driver.get(origin + "/total")
    return driver.execute_script("return document.body.textContent")


@pytest.mark.parametrize(("scheme", "name"), [("http", "sid"), ("https", "__Host-sid")])
def test_a_browser_counts_and_no_script_of_any_origin_sees_the_session(chromium, certificate, scheme, name):
    pem = certificate if scheme == "https" else None
    with in_thread(wrap(page_app), pem) as port, in_thread(page_app, pem) as other_port:
        ours = f"{scheme}://127.0.0.1:{port}"
        assert shown(chromium, ours + "/", "count") == "3"
        assert shown(chromium, ours + "/", "count") == "6"
        assert chromium.execute_script("return document.cookie") == ""
        (cookie,) = (c for c in chromium.get_cookies() if c["name"] == name)
        assert cookie["httpOnly"] and cookie["secure"] == (scheme == "https") and cookie["sameSite"] == "Lax"
        assert re.fullmatch(UID, cookie["value"]) and "expiry" not in cookie
        # Another port is another origin of the same site: its requests carry the cookie, it can't read the answers.
        for host, carried in (("127.0.0.1", 1), ("localhost", 0)):
            before = int(chromium_total(chromium, ours))
            url = f"{scheme}://{host}:{other_port}/foreign#{ours}/count"
            assert shown(chromium, url, "seen") == "nothing"
            assert chromium.execute_script("return document.cookie") == ""
            assert int(chromium_total(chromium, ours)) - before == 2 * carried
        chromium.get(ours + "/out")
        assert not [c for c in chromium.get_cookies() if c["name"] == name]


# Examples
# ---------------------------------------------------------------------------

EXAMPLES = sorted(
    os.path.basename(path)[:-3]
    for path in glob.glob(os.path.join(HERE, "examples", "*.py"))
    if not path.endswith(("__init__.py", "benchmark.py"))
)


class Visitor:
    """A client with a cookie jar, over a real socket."""

    def __init__(self, port, cookies=()):
        self.port, self.cookies = port, dict(cookies)

    def request(self, path="/", method="GET", **form):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        body = None
        if method == "POST":
            body, headers["Content-Type"] = urllib.parse.urlencode(form), "application/x-www-form-urlencoded"
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            response = Response(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()
        for cookie in response.all("Set-Cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
            if "Max-Age=0" in cookie:
                del self.cookies[name]
        return response

    def get(self, path="/"):
        return self.request(path).text.strip()

    def post(self, path="/", **form):
        return self.request(path, "POST", **form)


@contextlib.contextmanager
def example(name, **environment):
    """``python -m examples.NAME`` in the checkout; answers (process, port)."""
    process = subprocess.Popen(
        [sys.executable, "-B", "-m", f"examples.{name}", "0"],
        cwd=HERE,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            said = process.stdout.readline()
            port = re.match(r"http://127\.0\.0\.1:(\d+)/", said)
            assert port, said + process.stdout.read()
            yield process, int(port[1])
        finally:
            process.kill()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_shows_and_what_to_try(name):
    with open(os.path.join(HERE, "examples", f"{name}.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    text = ast.get_docstring(tree)
    assert f"python3 -m examples.{name}" in text and "curl " in text
    assert "application" in [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        assert f"`{name}`" in file.read()


def test_the_counter_counts_each_visitor():
    with example("counter") as (_, port):
        ann, bob = Visitor(port), Visitor(port)
        assert [ann.get(), ann.get(), bob.get(), ann.get()] == [f"You were here {n} times." for n in (1, 2, 1, 3)]


def test_a_browser_that_loads_the_counter_again_was_there_twice(chromium):
    with example("counter") as (_, port):
        chromium.delete_all_cookies()
        for times in (1, 2):  # it asks for a favicon, too
            chromium.get(f"http://127.0.0.1:{port}/")
            assert (
                chromium.execute_script("return document.body.textContent").strip() == f"You were here {times} times."
            )


def test_ctrl_c_ends_an_example_quietly():
    with example("mixed") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""


def test_the_login_guards_a_page():
    with example("login") as (_, port):
        alice, phone = Visitor(port), Visitor(port)
        assert alice.request("/secret")["Location"] == "/login"
        fixed = Visitor(port, alice.cookies)
        assert alice.post("/login", name="alice", password="wrong").status == 403
        assert alice.post("/login", name="nobody", password="").status == 403
        assert alice.post("/login", name="alice", password="wonderland")["Location"] == "/secret"
        assert "alice is here" in alice.get("/secret")
        # Whoever knew her session's id from before the login has nothing.
        assert fixed.cookies["sid"] != alice.cookies["sid"]
        assert fixed.request("/secret")["Location"] == "/login"
        phone.post("/login", name="alice", password="wonderland")
        assert alice.post("/logout")["Location"] == "/"
        assert not alice.cookies and alice.request("/secret").status == 303
        assert "alice is here" in phone.get("/secret")


def test_the_login_ends_all_sessions_of_a_user():
    with example("login") as (_, port):
        alice, phone, bob = Visitor(port), Visitor(port), Visitor(port)
        for visitor in (alice, phone):
            visitor.post("/login", name="alice", password="wonderland")
        bob.post("/login", name="bob", password="builder")
        alice.post("/logout-everywhere")
        assert [v.request("/secret").status for v in (alice, phone, bob)] == [303, 303, 200]


def test_two_applications_share_a_session_and_never_meet():
    with example("mixed") as (_, port):
        visitor = Visitor(port)
        assert visitor.get("/shop/tea") == "In your basket: tea"
        assert visitor.get("/quiz/yes") == "1 answers so far"
        assert visitor.get("/shop/milk") == "In your basket: tea, milk"
        assert re.fullmatch(r"<Session \w{8}, stored, keeps IItems, IItems>", visitor.get())


def test_the_cart_is_shared_by_processes_and_survives_them(tmp_path):
    cart = {"CART": str(tmp_path / "cart.sqlite3")}
    with example("cart", **cart) as (_, port), example("cart", **cart) as (victim, other):
        visitor = Visitor(port)
        assert visitor.post(thing="tea").text.startswith("1 tea (")
        elsewhere = Visitor(other, visitor.cookies)
        assert elsewhere.post(thing="tea").text.startswith("2 tea (")
        victim.kill()
        assert visitor.get().startswith("2 tea (")
        assert visitor.request(method="DELETE").text.startswith("empty (")


@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_the_counters_of_many_hosts_count_one_session(kind, request):
    address = request.getfixturevalue(f"{kind}_server").address
    where = {"REDIS_URL": f"redis://127.0.0.1:{address}/0", "DATABASE_URL": str(address)}
    with example(f"{kind}_counter", **where) as (_, port), example(f"{kind}_counter", **where) as (_, other):
        here = Visitor(port)
        assert here.get().startswith("You were here 1 times")
        there = Visitor(other, here.cookies)
        assert there.get().startswith("You were here 2 times")
        assert here.get().startswith("You were here 3 times")


def test_a_form_without_the_sessions_token_is_refused():
    with example("csrf") as (_, port):
        ann, eve = Visitor(port), Visitor(port)
        tokens = [re.search(r'name=token value="([^"]+)"', visitor.get())[1] for visitor in (ann, eve)]
        assert [ann.post(said="no").status, ann.post(said="no", token=tokens[1]).status] == [403, 403]
        assert ann.post(said="<yes>", token=tokens[0]).status == 303
        assert "<ul><li>&lt;yes&gt;</ul>" in ann.get()


def test_an_event_stream_tells_what_other_requests_of_its_session_do():
    with example("streaming") as (_, port):
        visitor = Visitor(port)
        assert visitor.post().text == "1\n"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/events", headers={"Cookie": f"sid={visitor.cookies['sid']}"})
        received = []
        reader = threading.Thread(target=lambda: received.append(connection.getresponse().readline()), daemon=True)
        reader.start()
        count = 1
        while reader.is_alive() and count < 200:
            count += 1
            assert visitor.post().text == f"{count}\n"  # while the stream waits for something to tell
            reader.join(0.05)
        connection.close()
        event = re.fullmatch(rb"data: (\d+)\n", received[0])
        assert 1 < int(event[1]) <= count


# The inspector in a browser
# ---------------------------------------------------------------------------


def test_the_inspector_refuses_buttons_pressed_by_other_sites():
    with example("inspector") as (_, port):
        visitor = Visitor(port)
        assert visitor.post(do="click").status == 403 and not visitor.cookies  # and no session was made for it
        token = re.search(r'name=token value="([^"]+)"', visitor.get())[1]
        assert visitor.post(do="click").status == 403
        assert visitor.post(do="dance", token=token).status == 403
        assert visitor.post(do="click", token=token)["Location"] == "/"
        assert "Clicks, count = 1" in visitor.get()
        assert visitor.post(do="login", token=token, name="<b>eve").status == 303
        assert "<b>eve" not in visitor.get() and "&lt;b&gt;eve" in visitor.get()


class Page:
    """A page in headless Chromium; what a person does with it."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)

    def until(self, condition, *args):
        """Wait until the JavaScript *condition* holds; its value."""
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(package("selenium.common.exceptions").WebDriverException):
                value = self.driver.execute_script(f"return document.readyState === 'complete' && ({condition})", *args)
                if value:
                    return value
            assert time.monotonic() < end, f"{condition} never came true on {self.driver.page_source[-3000:]}"
            time.sleep(0.02)

    def text(self, selector):
        return self.until("document.querySelector(arguments[0]).innerText", selector)

    def press(self, name):
        """Click a button, and wait for the page that comes."""
        self.driver.execute_script("window.before = true")
        self.driver.find_element("css selector", f"button[value={name}]").click()
        self.until("!window.before")


@pytest.fixture
def inspector(chromium):
    with example("inspector") as (_, port):
        chromium.get_log("browser")
        page, window = Page(chromium, f"http://127.0.0.1:{port}/"), chromium.current_window_handle
        yield page
        assert chromium.get_log("browser") == []  # no script failed, nothing broke the content security policy
        chromium.delete_all_cookies()
        for other in chromium.window_handles:
            if other != window:
                chromium.switch_to.window(other)
                chromium.close()
        chromium.switch_to.window(window)
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        chromium.get("about:blank")


def test_the_inspectors_buttons_do_what_they_say(inspector):
    tag = inspector.text("h1")
    assert inspector.text(".owner") == "nobody's"
    inspector.press("click")
    inspector.press("click")
    assert "Clicks, count = 2" in inspector.text(".kept")
    inspector.press("touch")
    assert "'Keep alive'" in inspector.text(".kept")
    assert inspector.text("h1") == tag
    inspector.press("renew")
    renewed = inspector.text("h1")
    assert renewed != tag and "Clicks, count = 2" in inspector.text(".kept")
    inspector.press("login")
    assert inspector.text(".owner") == "ann" and "IVisitor" in inspector.text(".kept")
    assert inspector.text("h1") not in (tag, renewed)
    inspector.press("logout")
    assert inspector.text(".owner") == "nobody's" and "IClicks" not in inspector.text(".kept")
    inspector.press("expire")
    assert inspector.text("header p") == "Your session has expired"
    assert inspector.driver.get_cookies() == []


def test_the_inspectors_bar_runs_out_and_the_page_says_expired(inspector):
    share = "new DOMMatrix(getComputedStyle(document.querySelector('.bar i')).transform).a"
    assert inspector.until(share) > 0.9
    inspector.driver.execute_script("end = Date.now() + 10000")  # on the page's clock
    inspector.until(f"document.body.classList.contains('low') && {share} < 0.2")
    inspector.driver.execute_script("end = Date.now() + 300")
    inspector.until("document.querySelector('header p').innerText === 'Your session has expired'")
    assert not inspector.driver.find_element("css selector", "button[value=click]").is_displayed()
    inspector.driver.find_element("link text", "Start a new one").click()
    inspector.until("document.querySelector('header p').innerText === 'Your session'")


def test_a_second_tab_shows_the_same_session_and_follows(inspector):
    driver, first = inspector.driver, inspector.driver.current_window_handle
    tag = inspector.text("h1")
    driver.find_element("link text", "second tab").click()
    driver.switch_to.window(next(handle for handle in driver.window_handles if handle != first))
    assert inspector.text("h1") == tag
    inspector.press("click")
    driver.switch_to.window(first)
    inspector.until("document.querySelector('.kept').innerText.includes('count = 1')")
    inspector.press("expire")
    driver.switch_to.window(next(handle for handle in driver.window_handles if handle != first))
    inspector.until("document.querySelector('header p').innerText === 'Your session has expired'")


def test_the_inspector_is_light_or_dark_and_fits_a_phone(inspector):
    driver = inspector.driver
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colour = inspector.until("getComputedStyle(document.body).backgroundColor")
        seen[scheme] = sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert seen["light"] > 600 and seen["dark"] < 150
    phone = {"width": 340, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    inspector.until("innerWidth === 340 && document.documentElement.scrollWidth <= 340")
    heights = "[...document.querySelectorAll('button')].map(button => button.offsetHeight)"
    assert min(inspector.until(heights)) >= 44  # a finger's width


# README
# ---------------------------------------------------------------------------


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def readme_blocks():
    """(section, language, code) of each code block."""
    section, blocks = "", []
    for title, language, code in re.findall(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", readme(), re.M | re.S):
        if title:
            section = title
        else:
            blocks.append((section, language, code))
    return blocks


def readme_code(section, language="python"):
    return next(code for where, kind, code in readme_blocks() if (where, kind) == (section, language))


@pytest.fixture
def page(monkeypatch):
    """A module in which README's first program was run."""
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    exec(readme_code("minisess"), vars(module))
    return module


def counts(application):
    visitor = Browser(application)
    return [visitor.get().text for _ in range(2)] == [f"You were here {n} times.\n" for n in (1, 2)]


def check_first_program(page):
    assert counts(SessionMiddleware(page.app))


def check_stub(page):
    assert issubclass(page.IBasket, Interface)


def check_application(page):
    assert counts(page.application)


def check_login(page):
    page.ICurrentUser = types.new_class("ICurrentUser", (Interface,))
    page.store = MemoryStore()

    def application(environ, start_response):
        session, path = ISession(environ), environ["PATH_INFO"]
        if path == "/in":
            page.log_in(environ, "ann")
        elif path == "/out":
            page.log_out(environ)
        elif path == "/everywhere":
            page.log_out_everywhere(environ)
        return plain(start_response, page.ICurrentUser(session, "nobody"))

    here, there = [Browser(wrap(application, page.store)) for _ in range(2)]
    assert [here.get("/in").text, there.get("/in").text] == ["ann", "ann"]
    here.get("/everywhere")
    assert [here.get().text, there.get().text] == ["ann", "nobody"]
    here.get("/out")
    assert here.get().text == "nobody" and len(page.store) == 0


def check_report(page):
    store = MemoryStore()
    held = []

    def make_report(wanted):
        other = store.open(visitor.cookies["sid"], patience=0)
        held.append(other.wanted)
        store.release(other)
        return [wanted.encode()]

    def application(environ, start_response):
        ISession(environ).wanted = "some"
        return page.report(environ, start_response)

    page.make_report = make_report
    visitor = Browser(wrap(counter_app, store))
    visitor.get()
    visitor.application = SessionMiddleware(application, store)
    assert visitor.get().text == "some" and held == ["some"]


def check_upload(page):
    clock = Clock()
    store = MemoryStore(clock=clock)
    session = store.create(60, 600)
    path = page.IUpload(session).path
    store.save(session)
    assert os.path.isdir(path)
    clock.advance(60)
    assert store.open(session.uid) is None and not os.path.exists(path)


def check_own_store(page):
    assert counts(SessionMiddleware(page.app, page.DictStore(secret=SECRET)))


PROGRAMS = {
    "minisess": check_first_program,
    "How to read `IFoo(session)`": check_stub,
    "Plain WSGI": check_application,
    "Logging in and out": check_login,
    "Long answers": check_report,
    "When sessions end": check_upload,
    "Writing a store": check_own_store,
}
FRAMEWORKS = ["Flask", "Bottle", "Django", "Pyramid"]


@pytest.mark.parametrize("section", PROGRAMS)
def test_a_program_in_the_readme_does_what_it_says(section, page):
    exec(readme_code(section), vars(page))
    PROGRAMS[section](page)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_recipe_in_the_readme_is_a_whole_program(framework, tmp_path):
    """In a process of its own: Django can be set up only once."""
    package(framework.lower())
    visits = """
from urllib.request import Request, urlopen
import threading
server = make_server("127.0.0.1", 0, application)
threading.Thread(target=server.serve_forever, daemon=True).start()
url, cookie = f"http://127.0.0.1:{server.server_port}/", ""
for _ in range(2):
    with urlopen(Request(url, headers={"Cookie": cookie})) as answer:
        cookie = answer.headers.get("Set-Cookie", cookie).partition(";")[0]
        print(answer.read().decode(), end="")
server.shutdown()
"""
    program = tmp_path / "recipe.py"
    start = readme_code("minisess").partition("if __name__")[0]
    program.write_text(start + readme_code(framework) + visits)
    path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "You were here 1 times.\nYou were here 2 times.\n", done.stderr


def test_the_transcript_of_adaptation_in_the_readme_is_true(page):
    def app(environ, start_response):
        page.environ = environ
        code = readme_code("How to read `IFoo(session)`", "pycon")
        test = doctest.DocTestParser().get_doctest(code, vars(page), "README", None, 0)
        results.append(doctest.DocTestRunner().run(test, out=said.append))
        return plain(start_response)

    results, said = [], []
    Browser(wrap(app)).get()
    assert results[0].attempted > 8 and said == []


def test_the_stub_in_the_readme_satisfies_mypy(tmp_path):
    package("mypy")
    stub = readme_code("How to read `IFoo(session)`")
    dots = stub.replace("raise NotImplementedError", "...")
    found = {}
    for name, text in (("stub", stub), ("dots", dots), ("told", '# mypy: disable-error-code="empty-body"\n' + dots)):
        (tmp_path / f"{name}.py").write_text(text.replace("class", "from minisess import Interface\n\nclass", 1))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        tmp_path / "cache",
        "stub.py",
        "dots.py",
        "told.py",
    ]
    folder = os.path.dirname(minisess.__file__)
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MYPYPATH": folder}, capture_output=True, text=True)
    found = sorted(re.findall(r"^(\w+)\.py:\d+: error: .*\[(.*)\]", done.stdout, re.M))
    assert found == [("dots", "empty-body")], done.stdout + done.stderr


def test_each_store_of_the_readme_serves_the_same_application(
    page, tmp_path, monkeypatch, redis_server, postgres_server
):
    code = readme_code("Stores")
    for there, here in (
        ("/var/lib/app/sessions.sqlite3", str(tmp_path / "sessions.sqlite3")),
        ("redis://sessions.internal", f"redis://127.0.0.1:{redis_server.address}"),
        ("host=sessions.internal dbname=app", postgres_server.address),
    ):
        assert there in code
        code = code.replace(there, here)
    monkeypatch.setenv("SECRET", SECRET)
    exec(code, vars(page))
    try:
        lines = re.findall(r"^store = (.*)$", code, re.M)
        assert len(lines) == 4
        for line in lines:
            page.store = eval(line, vars(page))
            assert counts(SessionMiddleware(page.app, page.store)), line
        page.store = None
    finally:
        page.pool.close()


class TestReadmeStore(StoreContract):
    """The store that README writes keeps what all stores promise."""

    steps, seeds = 100, (1,)

    @pytest.fixture(autouse=True)
    def _page(self, page):
        self.page = page
        exec(readme_code("Writing a store"), vars(page))

    def make_store(self, clock, **options):
        return self.page.DictStore(clock=clock, **{"secret": SECRET, **options})


def test_the_readmes_partitioned_table_serves_sessions(postgres_server):
    psycopg = package("psycopg")
    with psycopg.connect(postgres_server.address, autocommit=True) as admin:
        admin.execute("CREATE SCHEMA partitions")
    connection = psycopg.connect(postgres_server.address + " options=-csearch_path=partitions", autocommit=True)
    with connection:
        for statement in readme_code("How much one server carries, on paper", "sql").split(";")[:-1]:
            connection.execute(statement)
        clock = Clock()
        store = PostgresStore(lambda: contextlib.nullcontext(connection), secret=SECRET, clock=clock)
        for owner in ["ann"] * 20 + ["bob"]:
            session = store.create(60, 600)
            session.login(owner)
            store.save(session)
        assert len(store) == 21
        for number in range(4):
            assert connection.execute(f"SELECT count(*) FROM minisess_{number}").fetchone()[0] > 0
        assert store.open(session.uid).owner == "bob"
        assert store.expireAll("ann") == 20
        clock.advance(601)
        assert store.sweep() == 1 and len(store) == 0


def test_the_transcript_with_curl_in_the_readme_is_true(tmp_path):
    program("curl")
    with example("counter") as (_, port):
        said = ""
        transcript = readme_code("minisess", "console")
        for line in re.findall(r"^\$ (.*)$", transcript, re.M):
            command = line.replace("curl", "curl -s").replace(":8000", f":{port}").split()
            said += f"$ {line}\n{subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout}"
    assert said == transcript


def test_the_commands_in_the_readme_work():
    def output(line):
        command = [sys.executable, *shlex.split(line)[1:]]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=True).stdout

    lines = [line for _, language, code in readme_blocks() if language == "sh" for line in code.splitlines()]
    assert len(lines) == 5
    for line in lines:
        if line.startswith("python3 -c"):
            assert re.fullmatch(r"[0-9a-f]{64}\n", output(line))
        elif line.startswith("python3 -m examples.benchmark"):
            assert "--json" in output(line + " --help")
        else:
            # The counter is tried above, the package below, and .ci/run runs the tests with this line.
            assert line in ("python3 -m examples.counter", "pip install .") or line.startswith(
                "python3 -m venv .venv && "
            )


def test_all_code_in_the_readme_is_tried():
    tried = {(section, "python") for section in [*PROGRAMS, *FRAMEWORKS, "Stores"]}
    tried |= {("How to read `IFoo(session)`", "pycon"), ("How much one server carries, on paper", "sql")}
    tried |= {("minisess", "console"), ("A request's way through the file", "text")}
    blocks = [(section, language) for section, language, _ in readme_blocks() if language != "sh"]
    assert sorted(blocks) == sorted(tried)


def test_the_readmes_diagram_names_the_modules_sections():
    diagram = readme_code("A request's way through the file", "text")
    sections = re.findall(r"^# (.+)\n# -{75}$", inspect.getsource(minisess), re.M)
    assert sections == "Errors,Interfaces,Components,Sessions,Memory store,Persistent stores,Cookies,WSGI".split(",")
    for title in sections[1:]:
        assert title in diagram


def test_the_readmes_tables_tell_all_options_and_all_names():
    text = readme()
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|", text.partition("### Options")[2].partition("\n## ")[0], re.M))
    options = {name.strip("` "): value for names, value in rows.items() for name in names.split(", ")}
    for name, parameter in list(inspect.signature(SessionMiddleware).parameters.items())[1:]:
        assert name in options, name
        if name not in ("store", "domain", "path"):
            assert options[name] == f"`{parameter.default!r}`".replace("'", '"') or options[name] == str(
                parameter.default
            )
    names = re.findall(r"\w+", text.partition("## API at a glance")[2])
    assert set(minisess.__all__) <= set(names)


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", readme()):
        assert os.path.exists(os.path.join(HERE, target)), target


# What a newcomer meets
# ---------------------------------------------------------------------------


class INever(Interface):
    pass


class Undeclared:
    pass


def fail_without_middleware(tmp_path):
    ISession({"PATH_INFO": "/"})


def fail_without_adapter(tmp_path):
    INever(MemoryStore().create(60, 600))


def fail_registering_twice(tmp_path):
    registerAdapter(Counter, Session, ICounter)


def fail_storing(tmp_path):
    store = SQLiteStore(tmp_path / "db", secret=SECRET)
    session = store.create(60, 600)
    session.setComponent(INever, Undeclared())
    store.save(session)


def fail_storing_a_lock(tmp_path):
    store = SQLiteStore(tmp_path / "db", secret=SECRET)
    session = store.create(60, 600)
    session.guard = threading.Lock()
    store.save(session)


def fail_without_secret(tmp_path):
    SQLiteStore(tmp_path / "db")


def fail_with_short_secret(tmp_path):
    SQLiteStore(tmp_path / "db", secret="hunter2")


def fail_after_the_headers(tmp_path):
    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"too early"
        ISession(environ).late = True

    Browser(wrap(app)).get()


def fail_nesting(tmp_path):
    inner = SessionMiddleware(counter_app, MemoryStore())
    Browser(SessionMiddleware(inner, MemoryStore())).get()


def fail_without_argument(tmp_path):
    ICounter()


def fail_setting_a_field(tmp_path):
    MemoryStore().create(60, 600).owner = "ann"


def fail_hiding_a_method(tmp_path):
    MemoryStore().create(60, 600).touch = 1


def fail_implementing_a_class(tmp_path):
    implementer(Counter)


def fail_without_a_folder(tmp_path):
    SQLiteStore(tmp_path / "missing" / "db", secret=SECRET)


def fail_with_a_connection(tmp_path):
    PostgresStore(object(), secret=SECRET)


def fail_with_no_store(tmp_path):
    SessionMiddleware(counter_app, "sessions.db")


def fail_waiting(tmp_path):
    store = MemoryStore()
    session = store.create(60, 600)
    session.here = True
    store.save(session)
    store.open(session.uid)
    store.open(session.uid, patience=0)


@pytest.mark.parametrize(
    "mistake, error, advice",
    [
        (fail_without_middleware, CannotAdapt, ["dict to ISession", "wrap the application in SessionMiddleware"]),
        (fail_without_adapter, CannotAdapt, ["registerAdapter(factory, Session, INever)", "INever(obj, None)"]),
        (fail_registering_twice, DuplicateAdapter, ["Session", "ICounter", "registry.unregister"]),
        (fail_storing, NotStorable, ["INever", "Undeclared", "@storable", "MemoryStore"]),
        (fail_storing_a_lock, NotStorable, ["attribute guard", "lock", "__getstate__"]),
        (fail_without_secret, TypeError, ["'secret'"]),
        (fail_with_short_secret, ValueError, ["16 bytes, not 7", "secrets.token_hex(32)"]),
        (fail_after_the_headers, SessionError, ["headers have left", "before the first piece of the body"]),
        (fail_nesting, SessionError, ["two SessionMiddlewares", "'sid'", "different stores", "cookie="]),
        (fail_without_argument, TypeError, ["ICounter() needs the object to adapt", "ICounter(session)"]),
        (fail_setting_a_field, AttributeError, ["session.owner", "session.login(owner)"]),
        (fail_hiding_a_method, AttributeError, ["session.touch", "another name"]),
        (fail_implementing_a_class, TypeError, ["Counter", "isn't an interface", "subclass minisess.Interface"]),
        (fail_without_a_folder, StoreError, ["SQLiteStore", "unable to open database file"]),
        (fail_with_a_connection, TypeError, ["ConnectionPool(...).connection"]),
        (fail_with_no_store, CannotAdapt, ["str to IStore"]),
        (fail_waiting, SessionBusy, ["session.release()", "patience="]),
    ],
)
def test_an_error_says_what_to_do(mistake, error, advice, tmp_path):
    with pytest.raises(error) as caught:
        mistake(tmp_path)
    for words in advice:
        assert words in str(caught.value)


def test_every_public_name_is_documented():
    undocumented = []
    for name in minisess.__all__:
        each = getattr(minisess, name)
        if not inspect.getdoc(each):
            undocumented.append(name)
        for attribute, value in vars(each).items() if inspect.isclass(each) else ():
            # Session tells what ISession's methods do, and IStore what those of stores do.
            places = [getattr(place, attribute, None) for place in (each, Session, IStore, PersistentStore)]
            public = not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
            if public and not any(map(inspect.getdoc, filter(None, places))):
                undocumented.append(f"{name}.{attribute}")
    assert undocumented == []


def test_help_reads_well():
    text = pydoc.render_doc(minisess, renderer=pydoc.plaintext)
    assert text.splitlines()[3].strip().startswith("minisess - Server-side sessions")
    assert not re.search(r"<(object|function|class) .* at 0x", text)


def test_the_docstrings_code_runs():
    assert doctest.testmod(minisess).failed == 0
    example = minisess.__doc__.partition("::\n\n")[2].partition("\nThe vocabulary")[0]
    names = {"__name__": "docstring"}
    exec(textwrap.dedent(example), names)
    assert isinstance(names["application"], SessionMiddleware)


# The package
# ---------------------------------------------------------------------------


def test_the_wheel_and_the_source_package_contain_what_they_should(tmp_path):
    package("build")
    import importlib.metadata

    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 61:
        missing("setuptools is older than 61")
    source, dist, installed = tmp_path / "source", tmp_path / "dist", tmp_path / "installed"
    source.mkdir()
    for name in ("minisess.py", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"):
        if not os.path.exists(os.path.join(HERE, name)):
            pytest.skip("this isn't a checkout")
        shutil.copy(os.path.join(HERE, name), source)
    # Both from the checkout and nothing but it: no network, no build isolation.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel, archive = [next(dist.glob(f"*.{kind}")) for kind in ("whl", "tar.gz")]
    version = minisess.__version__
    assert wheel.name == f"minisess-{version}-py3-none-any.whl"
    info = f"minisess-{version}.dist-info"
    files = ["METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"]
    with zipfile.ZipFile(wheel) as opened:
        assert sorted(opened.namelist()) == sorted(["minisess.py", *(f"{info}/{name}" for name in files)])
        metadata = opened.read(f"{info}/METADATA").decode()
    assert "Requires-Dist" not in metadata and "Requires-Python: >=3.10" in metadata
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"minisess.py", "README.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= names
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", installed, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    ask = [sys.executable, "-c", "import minisess; print(minisess.__file__)"]
    told = subprocess.run(ask, cwd=installed, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)
    assert told.stdout.strip() == str(installed / "minisess.py")
