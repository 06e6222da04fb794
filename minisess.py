"""Server-side sessions that hold typed components, for any WSGI application: one file, no dependencies.

You *adapt* a request to its session, and keep on it what you like::

    from minisess import ISession, SessionMiddleware

    def app(environ, start_response):
        session = ISession(environ)
        session.hits = getattr(session, "hits", 0) + 1
        ...

    application = SessionMiddleware(app)

Then you adapt the session to what you want of it::

    class ICounter(Interface):
        hits: int

    @implementer(ICounter)
    class Counter:
        def __init__(self, session):
            self.hits = 0

    registerAdapter(Counter, Session, ICounter)

    ICounter(ISession(environ)).hits += 1     # made on first use, the same ever after

The vocabulary is that of Nevow and Twisted (2004).  Three words carry the rest.  A *record* is
what a store keeps of one visitor.  A `Session` is one request's view of a record.  A *hold* is a
request's right to change a record, from ``ISession(environ)`` until its headers leave; it dies
with the request.  The file reads from top to bottom, each section uses only what stands above it:

    Errors             what can go wrong, and what to do about it; how it is logged
    Interfaces         Interface, implementer, registerAdapter: how IFoo(obj) finds its answer
    Components         Componentized, Adapter: objects that remember what they were adapted to
    Sessions           the record, Session, ISession: one request's view of what a visitor has
    Holding            who may change a record, in one process
    Records            what may be stored, how it is written, sealed and read
    Memory store       IStore, MemoryStore: what every store promises, and the one for one process
    Persistent stores  for many processes and hosts: SQLite, PostgreSQL, Redis
    Cookies            reading one, writing one
    WSGI               SessionMiddleware, peek: each request gets its session, each response its headers
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import copyreg
import enum
import io
import itertools
import logging
import os
import pickle
import re
import secrets
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from hmac import compare_digest
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from weakref import ref

TYPE_CHECKING = False  # As typing's, which takes 5 ms to import.
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any, Generic, NoReturn, TypeVar, overload

    Clock = Callable[[], float]
    Connect = Callable[[], AbstractContextManager[Any]]
    Path = str | os.PathLike[str]
    Secret = str | bytes | Sequence[str | bytes]
    D = TypeVar("D")
    I = TypeVar("I", bound="Interface")  # noqa: E741
    T = TypeVar("T")

__version__ = "0.2.0"

# fmt: off
__all__ = [
    "Adapter", "AdapterRegistry", "CannotAdapt", "Componentized", "DuplicateAdapter", "GuardSession", "HELD",
    "ISession", "IStore", "Interface", "InterfaceMeta", "MOVED", "MemoryStore", "NotStorable", "PersistentStore",
    "PostgresStore", "RedisStore", "SQLiteStore", "SealError", "Session", "SessionBusy", "SessionConflict",
    "SessionError", "SessionMiddleware", "StoreError", "implementedBy", "implementer", "peek", "providedBy",
    "registerAdapter", "registry", "storable",
]
# fmt: on


# Errors
# ---------------------------------------------------------------------------


class SessionError(Exception):
    """Base of all errors of this module."""

    def __init__(self, *args: object, **details: object) -> None:
        super().__init__(*args)
        vars(self).update(details)


class CannotAdapt(SessionError, TypeError):
    """`original` has no answer for `interface`, and no default was given."""

    original: object
    interface: type

    def __init__(self, original: object, interface: type, advice: str | None = None) -> None:
        super().__init__(original, interface, advice, original=original, interface=interface)

    def __str__(self) -> str:
        kind, name, advice = type(self.args[0]).__name__, self.args[1].__name__, self.args[2]
        advice = advice or f"registerAdapter(factory, {kind}, {name}), or give a default: {name}(obj, None)"
        return f"cannot adapt {kind} to {name}: {advice}"


class DuplicateAdapter(SessionError, ValueError):
    """`original` has an adapter to `interface` already, `factory`; ``registry.unregister`` it first."""

    factory: object
    original: type
    interface: type

    def __init__(self, factory: object, original: type, interface: type) -> None:
        super().__init__(factory, original, interface, factory=factory, original=original, interface=interface)

    def __str__(self) -> str:
        factory, original, interface = self.args
        return (
            f"{original.__name__} has an adapter to {interface.__name__} already, {factory!r}: "
            "take it out with registry.unregister before you register another"
        )


class SessionBusy(SessionError, TimeoutError):
    """Another request of the same session didn't let go of it within `patience` seconds.  A 503, mostly."""

    patience: float = 0


class SessionConflict(SessionError, RuntimeError):
    """Somebody else has changed the session since this request let go of it, or lost its `lease`: nothing was saved."""

    lease: float | None = None  # in seconds, if that is why


class StoreError(SessionError):
    """The store can't be reached or can't do what was asked; the session is as it was."""


class NotStorable(StoreError, TypeError):
    """A component or attribute, `name` ("the component app.ICart"), has an `offender` in it that can't be stored."""

    name: str = ""
    offender: str = ""


class SealError(SessionError, ValueError):
    """A record isn't what this store wrote.  Stores turn it into "no such session" and log it."""


class _CannotOpen(StoreError):
    """A component is there, but its class is missing in this process, or fails."""


_logger = logging.getLogger("minisess")


def _log(level: int, event: str, handle: str, message: str, *args: object, exc_info: Any = None, **more: Any) -> None:
    """Log to ``logging.getLogger("minisess")`` what happened to the session *handle*; its uid is never shown.

    The record's attributes are *event* (a word), *session* (the handle), *owner* and *reason*.
    """
    if _logger.isEnabledFor(level):
        extra = {"event": event, "session": handle, "owner": None, "reason": None, **more}
        _logger.log(level, "session %s " + message, handle, *args, exc_info=exc_info, extra=extra, stacklevel=2)


# Interfaces
# ---------------------------------------------------------------------------


# No such argument, where None won't do.
_MISSING: Any = type("_Missing", (), {"__repr__": lambda self: "..."})()

# What an interface remembers of a type, besides None (nothing) and a callable (the adapter):
_ITSELF: Any = "itself"  # the object is the answer
_KEPT: Any = "kept"  # look at what obj keeps, see Componentized

# What was found out: how to adapt (by interface and type), by which factory, and in which order
# classes and interfaces are looked at.  `AdapterRegistry.forget` puts new dicts in their places, so
# whoever finds something out while things change writes it where nobody looks.  No look-up locks.
_plans: dict[type, dict[type, Any]] = {}
_direct: dict[tuple[type, type], Any] = {}
_orders: dict[type, tuple[type, ...]] = {}

# Interfaces by name, for records that name them.
_interfaces: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class InterfaceMeta(type):
    """The type of interfaces: calling one adapts, it never makes an instance."""

    #: The registry that interfaces ask.
    registry: AdapterRegistry
    __advice__: str | None

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> InterfaceMeta:
        """Make an interface and note its name; TypeError if it extends anything but interfaces."""
        for base in bases:
            if not isinstance(base, InterfaceMeta):
                raise TypeError(f"{name} is an interface and can only extend interfaces, not {base.__name__}")
        cls = super().__new__(mcs, name, bases, namespace, **options)
        _interfaces[_name(cls)] = cls
        return cls

    # Checkers read the signatures of Interface.__new__ instead.
    if not TYPE_CHECKING:

        def __call__(cls, obj=_MISSING, default=_MISSING):
            """Adapt *obj*; answer *default* where that can't be, or raise `CannotAdapt`.

            The order is that of zope.interface: ``obj.__conform__(cls)``, then *obj* itself if its
            class implements this interface, then the registered factory.

            Strategy: one look-up by type finds what to do.  Trying __conform__ first, as
            zope.interface does, costs four times as much for objects that have none.
            """
            try:
                plan = _plans[cls][type(obj)]
            except KeyError:
                plan = cls.registry.plan(cls, type(obj))
            if plan is _KEPT:
                try:
                    return obj._components[cls]
                except KeyError:
                    answer = None
                try:
                    answer = type(obj).__conform__(obj, cls)
                except _CannotOpen:
                    if default is _MISSING:
                        raise
            elif plan is _ITSELF:
                return obj
            else:
                answer = None if plan is None else plan(obj)
            if answer is not None:
                return answer
            if default is _MISSING:
                raise CannotAdapt(obj, cls, cls.__advice__)
            return default

        #: What editors and help() show.
        __signature__ = None

    def __subclasscheck__(cls, other: type) -> bool:
        """Do instances of class *other* provide this interface?"""
        return isinstance(other, type) and cls in cls.registry.order(other)

    def __instancecheck__(cls, obj: object) -> bool:
        """Does *obj* provide this interface?"""
        return cls in cls.registry.order(type(obj))

    implementedBy, providedBy = __subclasscheck__, __instancecheck__


class Interface(metaclass=InterfaceMeta):
    """Subclass it to name what objects can do; the body holds annotations and method stubs.

    ``IFoo(obj)`` reads "adapt obj to IFoo": it answers an object that provides IFoo, made from
    *obj* where needed, or raises `CannotAdapt`; ``IFoo(obj, default)`` answers *default* instead.
    """

    __slots__ = ()

    #: What CannotAdapt recommends, if not to register an adapter.
    __advice__: str | None = None

    if TYPE_CHECKING:

        @overload
        def __new__(cls: type[I], obj: object) -> I: ...
        @overload
        def __new__(cls: type[I], obj: object, default: D) -> I | D: ...  # type: ignore[misc]
        def __new__(cls, obj: object, default: Any = ...) -> Any: ...


# What `implementer` declared, by class.
_declared: weakref.WeakKeyDictionary[type, tuple[Any, ...]] = weakref.WeakKeyDictionary()

# Classes by name that may be part of a stored record, see `storable`.
_storables: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()

# The `__conform__` and getComponent functions that answer with what Componentized keeps, if it does.
_keepers: set[Any] = set()

# Guards declarations and registrations.
_lock = threading.RLock()


def _require_interfaces(interfaces: Iterable[object]) -> None:
    for interface in interfaces:
        if not isinstance(interface, InterfaceMeta):
            advice = "subclass minisess.Interface"
            if type(interface).__name__ == "InterfaceMeta":
                advice = f"it belongs to another copy of minisess, {type(interface).__module__}, not to {__name__}"
            elif isinstance(interface, type):
                advice = "an interface subclasses minisess.Interface, and a decorator is written @implementer(IFoo)"
            raise TypeError(f"{interface!r} isn't an interface: {advice}")


def _bases(node: type) -> tuple[type, ...]:
    """What stands directly above a class or interface: declared interfaces first, then base classes."""
    if isinstance(node, InterfaceMeta):
        return tuple(base for base in node.__bases__ if base is not object)
    return (*_declared.get(node, ()), *node.__bases__)


def _depth_first(node: type) -> list[type]:
    """*node* and all above it, depth first, each at the last of its places."""
    found = [node]
    for base in _bases(node):
        found += _depth_first(base)
    return list(reversed(dict.fromkeys(reversed(found))))


def _merge(sequences: list[list[type]]) -> list[type] | None:
    """The C3 merge of Python's own method resolution order; None where there is no consistent order."""
    merged: list[type] = []
    while sequences := [s for s in sequences if s]:
        candidate = next((s[0] for s in sequences if not any(s[0] in each[1:] for each in sequences)), None)
        if candidate is None:
            return None
        merged.append(candidate)
        sequences = [[each for each in s if each is not candidate] for s in sequences]
    return merged


def _special(kind: type, name: str) -> Any:
    """The attribute *name* as Python looks up special methods: on the type, not on its metaclass."""
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def _conforming(conform: Any, interface: Any, kind: type, fallback: Any) -> Callable[[Any], Any]:
    """The plan for a type with a `__conform__` of its own."""
    bind = getattr(conform, "__get__", None)

    def plan(obj: Any) -> Any:
        answer = (bind(obj, kind) if bind else conform)(interface)
        if answer is not None:
            return answer
        if fallback is _ITSELF:
            return obj
        return None if fallback is None else fallback(obj)

    return plan


def _refuse_state(member: object, state: object) -> None:
    raise SealError(f"a record can't set the state of {member!r}, which all share")


def storable(cls: type[T]) -> type[T]:
    """Class decorator: instances may be part of what a persistent store keeps.

    Classes decorated with `implementer` and registered adapter classes are storable already.
    Enum classes are stored by the names of their members; foreign classes can be declared, too:
    ``storable(http.HTTPStatus)``.

    Whoever knows the secret can forge records.  Such a record can construct objects of these
    classes in any state, have those methods called that pickle and callbacks call
    (``__call__``, ``__setstate__``, ``append``, ``__setitem__``, any without arguments), or make
    the process fail; no other code runs, and nothing that it didn't make itself is changed.
    """
    if not isinstance(cls, type):
        raise TypeError(f"storable decorates classes, {cls!r} isn't one")
    if issubclass(cls, enum.Enum):
        # Its members are the process's: pickle must not set what is in them to what a record says.
        if issubclass(cls, (list, dict, set, bytearray)):
            raise TypeError(f"{cls.__name__} can't be stored: its members can be changed, and all share them")
        cls.__setstate__ = _refuse_state  # type: ignore[attr-defined]
    _storables[_name(cls)] = cls
    return cls


class AdapterRegistry:
    """Adapter factories by what they adapt from and to.  `registry` is the one that interfaces ask."""

    # How many types are remembered before it starts anew, so that dynamic classes don't pile up.
    _most = 1000

    def __init__(self) -> None:
        self._factories: dict[type, dict[type, Any]] = {}
        # All target interfaces, in the order in which they are tried for one of their bases:
        # a derived interface after its bases, and of unrelated ones the newest first (as zope.interface).
        self._targets: list[type] = []

    def register(self, factory: Callable[[Any], object], original: type, *interfaces: type) -> None:
        """Make ``IFoo(obj)`` answer ``factory(obj)`` for objects of *original*, a class or an interface.

        As twisted.python.components.registerAdapter.  An exception in *factory* propagates; if it
        answers None, ``IFoo(obj)`` can't adapt.  Raises `DuplicateAdapter` if a pair is taken (by the
        same factory, too) and TypeError for what can't be an adapter; then nothing is registered.
        """
        if not callable(factory):
            raise TypeError(f"an adapter factory is called with the object to adapt, {factory!r} can't be called")
        if isinstance(factory, InterfaceMeta):
            raise TypeError(
                f"{factory.__name__} is an interface, since it extends one, and makes no objects: "
                f"decorate a plain class with @implementer({factory.__bases__[0].__name__}) instead"
            )
        if not isinstance(original, type):
            raise TypeError(f"adapters are registered for a class or an interface, not for {original!r}")
        if not interfaces:
            raise TypeError("registerAdapter(factory, original, *interfaces) needs at least one interface")
        _require_interfaces(interfaces)
        with _lock:
            known = dict(self._factories.get(original, {}))
            for interface in interfaces:
                if interface in known:
                    raise DuplicateAdapter(known[interface], original, interface)
            for interface in interfaces:
                known[interface] = factory
                if interface not in self._targets:
                    is_above = set(self.order(interface)).__contains__
                    self._targets = sorted([*self._targets, interface], key=is_above, reverse=True)
            self._factories[original] = known
            if isinstance(factory, type):
                storable(factory)
            self.forget()

    def unregister(self, factory: Callable[[Any], object], original: type, *interfaces: type) -> None:
        """Undo `register` of the same arguments.  Raises KeyError for what isn't registered."""
        with _lock:
            known = dict(self._factories.get(original, {}))
            for interface in dict.fromkeys(interfaces):
                if known.pop(interface, _MISSING) != factory:
                    raise KeyError((factory, original, interface))
            self._factories[original] = known
            if not known:
                del self._factories[original]
            targets = {t for each in self._factories.values() for t in each}
            self._targets = [t for t in self._targets if t in targets]
            self.forget()

    def lookup(self, original: type, interface: type, default: Any = None) -> Any:
        """The factory that adapts objects of *original*, a class or an interface, to *interface*, or *default*.

        The most specific source wins; for one source, an adapter registered for a derived
        interface also answers for its bases, the closest first.
        """
        for source in self.order(original):
            if known := self._factories.get(source):
                for target in (interface, *self._targets):
                    if target in known and issubclass(target, interface):
                        return known[target]
        return default

    def order(self, node: type) -> tuple[type, ...]:
        """The classes and interfaces from *node* upwards, most specific first: C3, as zope.interface has it.

        Declarations that C3 can't order (a base before its derived interface) fall back on depth
        first, which still puts the derived one first.  `Interface` is always last.
        """
        orders = _orders
        order = orders.get(node)
        if order is None:
            bases = _bases(node)
            merged = _merge([[node], *(list(self.order(base)) for base in bases), list(bases)])
            order = (*(n for n in merged or _depth_first(node) if n is not Interface), Interface)
            if len(orders) >= self._most:
                self.forget()
            orders[node] = order
        return order

    def direct(self, interface: Any, kind: type) -> Any:
        """How objects of type *kind* adapt to *interface* when they have no say in it."""
        direct = _direct
        plan = direct.get((kind, interface), _MISSING)
        if plan is _MISSING:
            _require_interfaces([interface])
            plan = _ITSELF if interface in self.order(kind) else self.lookup(kind, interface)
            if len(direct) >= self._most:
                self.forget()
            direct[kind, interface] = plan
        return plan

    def plan(self, interface: Any, kind: type) -> Any:
        """Find out, and let *interface* remember, how objects of type *kind* adapt to it."""
        if kind is type(_MISSING):
            raise TypeError(f"{interface.__name__}() needs the object to adapt: {interface.__name__}(session)")
        plans = _plans
        plan = self.direct(interface, kind)
        conform = _special(kind, "__conform__")
        if conform is not None:
            if _keepers.issuperset([conform, _special(kind, "getComponent")]):
                plan = _KEPT
            else:
                plan = _conforming(conform, interface, kind, plan)
        plans.setdefault(interface, {})[kind] = plan
        return plan

    def forget(self) -> None:
        """Drop all that was found out: it may be wrong by now, and it keeps classes alive."""
        global _plans, _direct, _orders
        _plans, _direct, _orders = {}, {}, {}


registry = InterfaceMeta.registry = AdapterRegistry()
registerAdapter = registry.register


def implementer(*interfaces: type) -> Callable[[type[T]], type[T]]:
    """Class decorator: instances provide *interfaces*, besides what the base classes implement.

    Naming one that is inherited changes nothing.  Works on built-in and foreign classes, too:
    ``implementer(IFoo)(dict)``.
    """
    _require_interfaces(interfaces)

    def declare(cls: type[T]) -> type[T]:
        if not isinstance(cls, type) or isinstance(cls, InterfaceMeta):
            raise TypeError(f"implementer decorates classes, {cls!r} isn't one")
        with _lock:
            inherited, own = registry.order(cls), _declared.get(cls, ())
            added = dict.fromkeys(i for i in interfaces if i not in inherited)
            # What extends an interface declared before goes in front of it, or there would be no C3 order.
            before = [i for i in added if any(issubclass(i, o) for o in own)]
            _declared[cls] = (*before, *own, *(i for i in added if i not in before))
            if cls.__module__ != __name__:  # sessions and stores are no part of a record
                storable(cls)
            registry.forget()
        return cls

    return declare


def implementedBy(cls: type) -> tuple[type, ...]:
    """The interfaces declared on *cls* and its base classes (without their bases), most specific first."""
    if not isinstance(cls, type):
        raise TypeError(f"implementedBy takes a class; for an object like {cls!r} it is providedBy(obj)")
    declared = {i for base in cls.__mro__ for i in _declared.get(base, ())}
    return tuple(i for i in registry.order(cls) if i in declared)


def providedBy(obj: object) -> tuple[type, ...]:
    """The interfaces declared for the class of *obj*, most specific first."""
    return implementedBy(type(obj))


# Components
# ---------------------------------------------------------------------------


class Componentized:
    """An object that remembers what it was adapted to, as twisted.python.components.Componentized.

    ``IFoo(obj)`` answers the component kept for IFoo, or makes one by the registered adapter and
    keeps it.  An adapter class with a true ``temporaryAdapter`` isn't kept; one with a true
    ``multiComponent`` is kept under every interface that it provides and is the adapter for.
    """

    # By interface.  Each change is one operation of the dict, which threads may do at once.
    _components: dict[Any, Any]

    def __init__(self) -> None:
        self._components = {}

    def setComponent(self, interface: type, component: object) -> None:
        """Make *component*, any object but None, the answer to ``interface(self)``."""
        _require_interfaces([interface])
        if component is None:
            raise TypeError(f"None means that there is no component: use unsetComponent({interface.__name__})")
        self._components[interface] = component

    if TYPE_CHECKING:

        @overload
        def getComponent(self, interface: type[I]) -> I | None: ...
        @overload
        def getComponent(self, interface: type[I], default: D) -> I | D: ...

    def getComponent(self, interface: Any, default: Any = None) -> Any:
        """The component for *interface*, made and kept if an adapter is registered, or *default*."""
        kept = self._components.get(interface)
        if kept is not None:
            return kept
        plan = registry.direct(interface, type(self))
        if plan is _ITSELF:
            return self
        adapter = None if plan is None else plan(self)
        if adapter is None:
            return default
        if getattr(adapter, "temporaryAdapter", False):
            return adapter
        # Another thread, or the adapter itself, may have kept one, too: the first is everyone's.
        kept = self._components.setdefault(interface, adapter)
        if kept is adapter and getattr(adapter, "multiComponent", False):
            for other in providedBy(adapter):
                if self.locateAdapterClass(type(self), other, None) is type(adapter):
                    self._components.setdefault(other, adapter)
        return kept

    def __contains__(self, interface: object) -> bool:
        """Is a component kept for *interface*?  Makes none."""
        return interface in self._components

    def unsetComponent(self, interface: type) -> None:
        """Forget the component for *interface*; KeyError if there is none."""
        del self._components[interface]

    def removeComponent(self, component: object) -> list[type]:
        """Forget *component* under all its interfaces, and answer these."""
        removed = [interface for interface, kept in list(self._components.items()) if kept is component]
        for interface in removed:
            self._components.pop(interface, None)
        return removed

    def addComponent(self, component: object, ignoreClass: bool = False) -> None:
        """Keep *component* for those interfaces it provides whose registered adapter is its class.

        With *ignoreClass*, for all that it provides.
        """
        for interface in providedBy(component):
            if ignoreClass or self.locateAdapterClass(type(self), interface, None) is type(component):
                self.setComponent(interface, component)

    def addAdapter(self, factory: Callable[[Any], T], ignoreClass: bool = False) -> T:
        """``addComponent(factory(self))``; answers the new component."""
        adapter = factory(self)
        self.addComponent(adapter, ignoreClass)
        return adapter

    def setAdapter(self, interface: type, factory: Callable[[Any], object]) -> None:
        """``setComponent(interface, factory(self))``."""
        self.setComponent(interface, factory(self))

    def locateAdapterClass(self, cls: type, interface: type, default: Any) -> Any:
        """The factory registered for *cls* and *interface*, or *default*."""
        return registry.lookup(cls, interface, default)

    def __conform__(self, interface: Any) -> Any:
        return self.getComponent(interface)


_keepers |= {Componentized.__conform__, Componentized.getComponent}


class Adapter:
    """A base for adapters: keeps the adapted object as ``original`` and lets it answer for other interfaces.

    So ``IB(IA(session))`` finds the session's own component for IB (as twisted.python.components.Adapter).
    """

    temporaryAdapter = False
    multiComponent = True

    def __init__(self, original: Any) -> None:
        self.original = original

    def __conform__(self, interface: Any) -> Any:
        kind = type(self.original)
        conform = _special(kind, "__conform__")
        return None if conform is None else conform.__get__(self.original, kind)(interface)


# Sessions
# ---------------------------------------------------------------------------

# The states of a record: not stored yet; stored; the stand-in for one that has moved to a new uid,
# which is never stored; over.
_NEW, _STORED, _MOVED, _ENDED = "new", "stored", "moved", "ended"

# What a record has besides its contents, in the order in which it is written.  The first two make
# no difference to others.
_FIELDS = (
    "lastModified",
    "cookie",  # (when it was sent, when it ends) for a cookie with Max-Age, or None
    "created",
    "lifetime",
    "max_lifetime",
    "since",  # when the absolute timeout began to run: at the beginning, or at the last login
    "owner",
    "forgotten",  # (lifetime, max_lifetime) for when it is no longer remembered, or None
    "callbacks",  # functions, or for a persistent store pairs: an interface's name, and a method of its component
)


def _new_uid() -> str:
    """256 random bits, URL-safe: 43 letters, digits, "-" and "_"."""
    return secrets.token_urlsafe(32)


def _hash(uid: str, place: str = "") -> str:
    """64 hex digits that stand for *uid*, and from which it can't be found."""
    where = place.encode()
    what = b"%d:%s%s" % (len(where), where, uid.encode())
    return blake2b(what, digest_size=32, person=b"minisess key").hexdigest()


def _new_fields(now: float, lifetime: float, max_lifetime: float) -> tuple[Any, ...]:
    """The `_FIELDS` of one that begins *now*."""
    return now, None, now, lifetime, max_lifetime, now, None, None, ()


def _seconds(value: float | None, name: str) -> float:
    """A positive number of seconds; None stands for no limit."""
    if value is None:
        return float("inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} is a positive number of seconds, or None for no limit, not {value!r}")
    return float(value)


def _check_lifetimes(lifetime: float, max_lifetime: float, remedy: str) -> None:
    if max_lifetime < lifetime < float("inf"):
        raise ValueError(f"a lifetime of {lifetime:g} s would be cut by max_lifetime={max_lifetime:g}: {remedy}")


def _check_owner(owner: object) -> None:
    if not isinstance(owner, str) or not owner:
        raise TypeError(f"an owner is a name, a str that isn't empty, not {owner!r} (store.clear() ends everybody's)")


class _Record:
    """What a store keeps of one visitor.  It does little by itself: `Session` is what people use."""

    __slots__ = (*_FIELDS, "uid", "key", "components", "attributes", "state", "due", "hold")

    #: What can't be opened in this process, by name: what stands for it, and the error.  (Of stored records only.)
    closed: dict[str, tuple[Any, Exception | None]] = {}

    def __init__(self, uid: str, key: str, fields: tuple[Any, ...]) -> None:
        """An empty record of these `_FIELDS`; without *fields*, one that is filled later."""
        self.uid, self.key, self.state = uid, key, _NEW  # its store keeps it under the key
        self.due: float = 0  # the deadline under which its store looks at it next; 0: at each access
        self.hold: Any = None  # who held it when it ended
        self.components: dict[Any, Any] = {}
        self.attributes: dict[str, Any] = {}
        if fields:
            self.fill(fields)

    def fill(self, fields: tuple[Any, ...]) -> None:
        """Have these values of `_FIELDS`."""
        self.lastModified, self.cookie, self.created, self.lifetime, self.max_lifetime, *rest = fields
        self.since, self.owner, self.forgotten, self.callbacks = rest

    @property
    def expires(self) -> float:
        return min(self.lastModified + self.lifetime, self.since + self.max_lifetime)  # type: ignore[no-any-return]

    @property
    def authenticated(self) -> float | None:
        return None if self.owner is None else self.since

    @property
    def ended(self) -> bool:
        return self.state is _ENDED

    @property
    def handle(self) -> str:
        return _hash(self.uid)[:16]

    def set(self, **fields: object) -> None:
        for name, value in fields.items():
            setattr(self, name, value)

    def is_empty(self) -> bool:
        """Is there nothing on it that anyone might come back for?"""
        return not (self.components or self.attributes or self.owner or self.callbacks)

    def clear(self) -> None:
        """Let go of all that is kept, and of the owner."""
        self.owner, self.callbacks = None, ()
        self.components.clear()
        self.attributes.clear()

    def end(self, reason: str, now: float = 0) -> BaseException | None:
        """Run the callbacks and let go of everything; whoever took it out of its store calls this, once.

        All run, whatever one of them raises; answers the first error that was no Exception (a
        SystemExit, a Timeout), or None.  Without a *reason* it is whichever deadline has passed at *now*.
        """
        if not reason:
            absolute = "absolute" if now >= self.since + self.max_lifetime else "evicted"
            reason = "idle" if now >= self.lastModified + self.lifetime else absolute
        self.state, handle, first = _ENDED, self.handle, None
        _log(logging.INFO, "ended", handle, "ended: %s", reason, owner=self.owner, reason=reason)
        for each in self.callbacks:
            try:
                (self._method(*each) if type(each) is tuple else each)()
            except BaseException as error:
                _log(logging.ERROR, "failed", handle, "callback %r failed", each, owner=self.owner, exc_info=True)
                if not isinstance(error, Exception):
                    first = first or error
        self.clear()
        return first

    def _method(self, name: str, method: str) -> Any:
        component = self.components.get(_interfaces.get(name))
        if component is None or method.startswith("__") or not hasattr(type(component), method):
            raise SealError(f"a record names {method!r} of {name} for a callback, which is no method here")
        return getattr(component, method)


# What to do instead of setting one of a session's fields, and instead of what other libraries have.
_INSTEAD = {
    "owner": "session.login(owner)",
    "lifetime": "session.setLifetime(seconds)",
    "uid": "session.renew()",
    "lastModified": "session.touch()",
    **dict.fromkeys(("get", "pop", "setdefault"), 'getattr(session, "name", None), what you keep are attributes'),
    **dict.fromkeys(("keys", "values", "items"), "vars(session), what you keep are attributes"),
    **dict.fromkeys(("clear", "flush", "delete", "invalidate"), "session.expire()"),
    **dict.fromkeys(("cycle_key", "regenerate_id", "regenerate"), "session.renew()"),
    **dict.fromkeys(("save", "modified"), "nothing, it is saved by itself when the headers leave"),
    "permanent": "session.login(owner, remember=seconds), or SessionMiddleware(persistent=True) for all",
}

if TYPE_CHECKING:

    class _Field(Generic[T]):
        def __init__(self, doc: str) -> None: ...
        def __get__(self, session: object, kind: Any = None) -> T: ...
        def __set__(self, session: object, value: NoReturn) -> None: ...

else:
    _Field = partial(property, None, None, None)  # which `_guard` replaces


class _Method(property):
    """A method that is a property; on the class it is the function."""

    def __get__(self, session: Any, kind: Any = None) -> Any:
        return self.fget if session is None else MethodType(self.fget, session)  # type: ignore[arg-type]


def _guard(name: str, get: Any, doc: str | None = None, kind: type[property] = property) -> property:
    """A name of every session's that no attribute can hide.

    Strategy: properties cost nothing where attributes are set.  A `__setattr__` that looks at each
    name makes setting one 15 times slower, and a new session five times.
    """

    def refuse(session: Session, value: object = None) -> None:
        advice = _INSTEAD.get(name, "choose another name for your attribute")
        raise AttributeError(f"session.{name} belongs to every session and can't be set or deleted: {advice}")

    return kind(get, refuse, refuse, doc)


class _Hint:
    """A name that other libraries' sessions have: where no attribute is called so, it says what to do instead.

    Strategy: with a `__getattr__` each attribute of a session, ours too, takes ten times as long on Python 3.11.
    """

    def __init__(self, name: str) -> None:
        self.name, self.__doc__ = name, f"Not a session's: {_INSTEAD[name]}"

    def __get__(self, session: object, kind: Any = None) -> Any:
        advice = f"this session has no attribute {self.name!r}: {_INSTEAD[self.name]}"
        raise AttributeError(advice, name=self.name, obj=session)


class Session(Componentized):
    """One request's view of a visitor's record: components, attributes and deadlines, until it ends.

    ``ISession(environ)`` answers it.  Fields are read-only; any other attribute that is set on a
    session is the user's, and ``vars(session)`` shows just those.  (But for a few private ones:
    _store, _record, _components, _token, _base, _over, _patience.)

    It *holds* its record from ``ISession(environ)`` to the moment the headers leave, and may do
    everything.  Afterwards, or after `release`, it may look, `expire`, and save what nobody else
    has changed meanwhile.  When the response is over, a component that kept it
    (``self.session``) may go on using it: it acts for the request that holds the record then.
    """

    __slots__ = ("_store", "_record", "_components", "_token", "_base")

    _store: Any
    _record: Any
    _token: ref[Any]  # the request (or the session itself) that holds the record, or did
    _base: Any  # the contents as they were when it let go of the hold; None while it has it

    # The same in a request's exchange: is the response over?  How long does a late change wait for others?
    _over = False
    _patience: float = 10

    uid: _Field[str] = _Field("The visitor's secret: 256 random bits, URL-safe.")
    handle: _Field[str] = _Field(
        "16 hex digits of a hash of the uid: stands for it in logs and on pages, the same everywhere, opens nothing."
    )
    created: _Field[float] = _Field("When it began, UNIX time in seconds.")
    lastModified: _Field[float] = _Field("When it was last used, UNIX time in seconds.")
    lifetime: _Field[float] = _Field("The idle timeout in seconds; infinity is none.")
    max_lifetime: _Field[float] = _Field("The absolute timeout in seconds, from its beginning or the last login on.")
    expires: _Field[float] = _Field("When it ends unless something happens: the earlier deadline, UNIX time.")
    owner: _Field[str | None] = _Field("Who logged in, or None.")
    authenticated: _Field[float | None] = _Field(
        "When that was, UNIX time, or None: to ask for the password again after a while."
    )
    ended: _Field[bool] = _Field(
        "Is it over, or has it moved on to a new uid?  A stream stops then.  A MemoryStore knows at once, others when "
        "the request next asks the store (ISession(environ), touch, release)."
    )

    def __init__(self, store: Any, record: _Record, request: Any = None) -> None:
        """A view of *record*; its token is *request*, or the session itself where there is none."""
        self._store, self._record, self._base = store, record, None
        self._token = ref(self if request is None else request)
        self._components, self.__dict__ = record.components, record.attributes

    def _bind(self, record: _Record) -> None:
        """Be a view of *record* from now on."""
        self._record, self._base = record, None
        self._components, self.__dict__ = record.components, record.attributes

    def _detach(self) -> None:
        """Have contents of its own from now on, with the same objects."""
        self._components, self.__dict__ = self._record.components.copy(), self._record.attributes.copy()

    def _cut(self) -> None:
        """See nothing of the record any more, which has moved on to another uid, or ended."""
        old = self._record
        gone = type(old)(old.uid, old.key, _new_fields(old.created, old.lifetime, old.max_lifetime))
        gone.state, gone.hold = _ENDED, old.hold
        self._bind(gone)

    def _is_holding(self) -> bool:
        return self._store.holds.holders.get(self._record.key) is self._token

    def _is_over(self) -> bool:
        request = self._token()
        return request is None or bool(request._over)

    def _acting(self, wish: str) -> Session:
        """The view that may give the record a new uid: this one, or, if it is over, that of who holds it now."""
        record = self._record
        if record.state is _ENDED:
            raise SessionError(f"this session has ended, too late for {wish}(): ISession(environ) answers a new one")
        if record.state is not _STORED or self._is_holding():
            return self
        token = self._store.holds.holders.get(record.key) if self._is_over() else None
        holder = None if token is None else token()
        acting = holder if isinstance(holder, Session) else getattr(holder, "_session", None)
        if acting is None:
            raise SessionError(
                f"this request has let go of its session, and another one may have it: call session.{wish}() before "
                "session.release(), and before the first piece of the body"
            )
        return acting

    def setLifetime(self, seconds: float | None) -> None:
        """End the session *seconds* after the last request that used it (the idle timeout); None for never.

        ValueError for more than `max_lifetime`, which would end it earlier.
        """
        lifetime = _seconds(seconds, "lifetime")
        remedy = "login(owner, remember=seconds) raises both for one session, SessionMiddleware(max_lifetime=) for all"
        _check_lifetimes(lifetime, self._record.max_lifetime, remedy)
        self._record.lifetime = lifetime
        self._store.schedule(self._record)

    def touch(self) -> None:
        """Start the idle clock again.  (Each request that uses the session does that.)

        It counts at once if the request has let go of the session, as streams have.
        """
        self._store.touch(self)

    def notifyOnExpire(self, callback: Callable[[], object]) -> None:
        """Have *callback* called once, without arguments, when the session ends, for whatever reason.

        Callbacks run in the order of registration; one that raises is logged and stops nothing.
        On a persistent store it must be a method of one of the session's components, which is
        what outlives the process; anything else is a TypeError there.
        """
        if not callable(callback):
            raise TypeError(f"a callback is called without arguments, {callback!r} can't be called")
        kept: Any = callback
        if self._store.strict:
            target, name = getattr(callback, "__self__", None), getattr(callback, "__name__", "")
            names = [_name(interface) for interface, each in list(self._components.items()) if each is target]
            if not names or getattr(target, name, None) != callback:
                raise TypeError(
                    f"on a persistent store a callback is a method of one of the session's components, which "
                    f"{callback!r} isn't: setComponent() first, then session.notifyOnExpire(component.method)"
                )
            kept = names[0], name
        with self._store.holds.alone("callbacks"):
            self._record.callbacks = (*self._record.callbacks, kept)

    def expire(self) -> None:
        """End it: gone from the store at once, its callbacks run, the cookie is deleted by the response."""
        self._store.discard(self)

    def renew(self) -> None:
        """Give it a new uid and keep all else (OWASP: session fixation).

        The old uid is dead at once, and all that still runs with it is cut off.  That stays so even
        if the request fails later on: call it when all that may fail is done.  SessionError after
        `release`, or in a body after the headers.
        """
        acting = self._acting("renew")
        acting._store.renew(acting)

    def login(self, owner: str, remember: float | None = None) -> None:
        """It belongs to *owner* from now on: a new uid as by `renew`, and the absolute timeout starts again.

        What an anonymous visitor has on it stays.  If it was somebody else's, that session ends,
        and this one begins empty.  *remember*: for how many seconds it lasts, idle or not, and over
        restarts of the browser; None: as the middleware says.
        """
        _check_owner(owner)
        limits = None if remember is None else (_seconds(remember, "remember"),) * 2
        acting = self._acting("login")
        record, now = acting._record, acting._store.clock()
        usual = record.forgotten or (record.lifetime, record.max_lifetime)
        lifetime, max_lifetime = limits or usual
        fields = {"since": now, "lastModified": now, "cookie": None, "forgotten": usual if limits else None}
        acting._store.renew(acting, owner=owner, lifetime=lifetime, max_lifetime=max_lifetime, **fields)

    def release(self) -> None:
        """Save it now and let its next request in: before a long download or an event stream.

        What is changed afterwards is saved at the end (or by the next `release`), unless somebody
        else has changed the session since: that is a `SessionConflict`, or, once the headers have
        left, an error in the log.
        """
        self._store.save(self)

    def __contains__(self, what: object) -> bool:
        """Is a component kept for the interface *what*, or an attribute of that name?  Makes none."""
        if isinstance(what, str):
            return what in vars(self)
        return what in self._components or (isinstance(what, InterfaceMeta) and _name(what) in self._record.closed)

    if not TYPE_CHECKING:  # for checkers it is Componentized's

        def getComponent(self, interface, default=None):
            """The component for *interface*, made and kept if an adapter is registered, or *default*.

            StoreError for one whose class is missing in this process, or fails.
            """
            closed = self._record.closed
            if closed and interface in self and interface not in self._components:
                kept, error = closed[_name(interface)]
                if error is not None:
                    name = interface.__name__
                    raise _CannotOpen(
                        f"the component kept for {_name(interface)} can't be opened ({error}); it stays as it is, "
                        f"{name}(session, default) does without it, session.unsetComponent({name}) drops it"
                    ) from error
                self._components[interface] = kept  # the interface has been imported meanwhile
            return Componentized.getComponent(self, interface, default)

        __conform__ = getComponent

    def setComponent(self, interface: type, component: object) -> None:
        """Make *component*, any object but None, the answer to ``interface(self)``."""
        Componentized.setComponent(self, interface, component)
        self._record.closed.pop(_name(interface), None)

    def unsetComponent(self, interface: type) -> None:
        """Forget the component for *interface*, even if it can't be opened; KeyError if there is none."""
        if self._record.closed.pop(_name(interface), None) is None or interface in self._components:
            Componentized.unsetComponent(self, interface)

    if TYPE_CHECKING:
        # session.foo = 1 is anybody's right.
        def __setattr__(self, name: str, value: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def __getitem__(self, name: str) -> Any:
        raise TypeError(f"what you keep on a session are attributes: session.{name}, not session[{name!r}]")

    def __setitem__(self, name: str, value: object) -> None:
        self[name]

    def __setstate__(self, state: object) -> None:
        raise SealError("a record can't set the state of the session itself")

    def __repr__(self) -> str:
        names = ", ".join(sorted(interface.__name__ for interface in self._components)) or "nothing"
        owned = "" if self.owner is None else f" of {self.owner!r}"
        return f"<{type(self).__name__} {self.handle}{owned}, {self._record.state}, keeps {names}>"


for _key, _each in {**vars(Componentized), **vars(Session)}.items():
    if isinstance(_each, property):
        setattr(Session, _key, _guard(_key, attrgetter("_record." + _key), _each.__doc__))
    elif isinstance(_each, FunctionType) and not _key.startswith("__"):
        setattr(Session, _key, _guard(_key, _each, _each.__doc__, _Method))
for _key in _INSTEAD.keys() - vars(Session).keys():
    setattr(Session, _key, _Hint(_key))
for _key in ("modified", "permanent"):  # other libraries want these to be set; here that would do nothing
    _each = vars(Session)[_key]
    setattr(Session, _key, _guard(_key, _each.__get__, _each.__doc__))
_keepers |= {Session.__conform__, vars(Session)["getComponent"]}

GuardSession = Session

if TYPE_CHECKING:

    class _Adapted(Session):
        def __init__(self, *args: Any) -> None: ...  # so that checkers look at Interface.__new__ only

    class ISession(Interface, _Adapted): ...

else:

    class ISession(Interface):
        """``ISession(environ)``: the `Session` of a WSGI environ, or of a request that has one (.environ, .env)."""

        __advice__ = (
            "there is no session here; wrap the application in SessionMiddleware (and ask within its path=), "
            "and adapt the WSGI environ or a request that has it as .environ"
        )


implementer(ISession)(Session)


class _Look(Session):
    """A session to look at only, as `peek` answers it: what is set on it would go nowhere, so it is refused."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        if name not in Session.__slots__ and name != "__dict__":
            _Look._refuse(self)
        object.__setattr__(self, name, value)

    def _refuse(self, *args: object, **options: object) -> Any:
        """It is refused here: take ``ISession(environ)``."""
        raise AttributeError("this is only a look at the session: take ISession(environ) to change anything on it")

    __delattr__ = setComponent = unsetComponent = removeComponent = addComponent = addAdapter = setAdapter = _refuse
    setLifetime = notifyOnExpire = renew = login = release = _refuse


# Strategy: under that guard, setting slots by their descriptors takes a quarter of the time.
_put_store, _put_record, _put_components, _put_token, _put_base = (
    vars(Session)[name].__set__ for name in Session.__slots__
)
_put_dict = vars(Componentized)["__dict__"].__set__


def _look(store: Any, record: _Record, request: Any = None) -> Session:
    """A look at *record*, with contents of its own."""
    look = object.__new__(_Look)
    _put_store(look, store)
    _put_record(look, record)
    _put_token(look, ref(look if request is None else request))
    _put_base(look, None)
    _put_components(look, record.components.copy())
    _put_dict(look, record.attributes.copy())
    return look


# Holding
# ---------------------------------------------------------------------------

_all_holds: weakref.WeakSet[_Holds] = weakref.WeakSet()


def _busy(patience: float) -> SessionBusy:
    """The error of who has waited in vain."""
    return SessionBusy(
        f"another request has held this session for over {patience:g} s: make that request shorter, "
        "let it call session.release() before its slow part, or raise SessionMiddleware(patience=)",
        patience=patience,
    )


class _Waiter:
    """Somebody who waits, by a lock of their own: made late, so that gevent may have replaced it by then."""

    def __init__(self, token: Any) -> None:
        self.token, self.lock = token, threading.Lock()
        self.lock.acquire()


def _unlock(lock: Any) -> None:
    """Let go of a lock, whoever has it."""
    try:
        lock.release()
    except RuntimeError:
        pass  # another has done it at this moment


class _Turn:
    """``with``: a few instructions of our own that must not overlap, alone with *key*.

    It ends with the block, or with its frame, whatever exception comes at any bytecode.
    """

    __slots__ = ("holds", "key", "thread", "frame", "__weakref__")

    def __init__(self, holds: _Holds, key: str) -> None:
        self.holds, self.key, self.thread, self.frame = holds, key, threading.get_ident(), 0

    def __enter__(self) -> Any:
        """Wait until nobody else is at it, a minute at most.

        A thread that comes upon itself is a finalizer's that runs in the middle of the block, and goes
        along, or it has been torn out of the block by an exception whose traceback keeps it alive; then
        this takes over.
        """
        token, frame = ref(self), sys._getframe(1)
        self.frame = id(frame)
        holder = self.holds.holders.setdefault(self.key, token)
        if holder is not token:
            turn = holder()
            if turn is not None and turn.thread == self.thread:
                while frame is not None and id(frame) != turn.frame:
                    frame = frame.f_back  # type: ignore[assignment]
                if frame is not None:
                    return token  # a finalizer has come upon us in that turn: it goes along
                self.holds.free(self.key, holder)  # an exception that is still in flight has torn us out of that turn
            self.holds.take(self.key, token, 60)
        return token

    def __exit__(self, *exc_info: object) -> None:
        self.holds.free(self.key, ref(self))


class _Holds:
    """Who holds what, in one process.

    A *token* is ``ref(request)``: Python keeps one of them, so that ``is`` compares, and it
    answers None when the request is dead.  So a hold ends with its request, whatever happened to it.

    Strategy: to take a free hold is one operation of a dict, without a lock, and to let go of it
    when nobody waits is another.  Who must wait lines up: first come, first served.
    """

    _overdue = 1  # who has had the lock for so many seconds has died with it

    def __init__(self) -> None:
        self.holders: dict[str, Any] = {}  # by key: the token
        self.lines: dict[str, dict[ref[_Waiter], None]] = {}  # by key: those who wait, in order
        self._lock = threading.Lock()
        self.token, self.process = secrets.token_hex(8), os.getpid()  # who this process is, for stores outside of it
        _all_holds.add(self)

    def notice_fork(self) -> None:
        """Is this a fork of which nobody told Python, as uWSGI's are?  Then all is new, see `_after_fork`."""
        if self.process != os.getpid():
            with _lock:
                if self.process != os.getpid():
                    self.__init__()  # type: ignore[misc]

    def prune(self) -> None:
        """Let go of what the dead hold that nobody has asked for since."""
        heir = _Turn(self, "")
        for key, token in list(self.holders.items()):
            if token() is None and self.take_over(key, ref(heir)):
                self.free(key, ref(heir))

    def is_held(self, key: str) -> bool:
        token = self.holders.get(key)
        return token is not None and token() is not None

    def alone(self, key: str) -> _Turn:
        return _Turn(self, key)

    def take(self, key: str, token: Any, patience: float) -> None:
        """Make *token* hold *key*, within *patience* seconds, or raise `SessionBusy`."""
        if self.holders.setdefault(key, token) is not token:
            self.wait(key, token, patience)

    def free(self, key: str, token: Any) -> None:
        """Let go of *key*, if *token* holds it: whoever has waited longest gets it."""
        if self.holders.get(key) is token and (key not in self.lines or not self._pass_on(key)):
            self.holders.pop(key, None)
        if key in self.lines:
            for waiter in itertools.islice(self._waiting(key), 1):  # who has it now, or has lined up meanwhile
                _unlock(waiter.lock)

    def _pass_on(self, key: str) -> bool:
        """Let who has waited longest hold *key*; is there somebody?"""
        for waiter in self._waiting(key):
            heir = waiter.token
            if heir is not None:
                self.holders[key] = heir
                if waiter.token is None:  # it has given up at this moment
                    self.free(key, heir)
                return True
        return False

    def _waiting(self, key: str) -> Iterator[_Waiter]:
        """Those who still wait for *key*, in order."""
        return (waiter for each in list(self.lines.get(key, ())) if (waiter := each()) is not None)

    def wait(self, key: str, token: Any, patience: float) -> None:
        """Line up for *key*, which another holds."""
        self._refuse_nested(key)
        waiter, end = _Waiter(token), time.monotonic() + patience
        taken, line = False, {}
        try:
            while True:
                # Each time anew: who leaves the line last takes it away, and may not see who has just come.
                line = self.lines.setdefault(key, {})
                line[ref(waiter)] = None
                first = next(self._waiting(key), waiter) is waiter
                taken = self.holders.get(key) is token or (first and self.take_over(key, token))
                rest = end - time.monotonic()
                if taken or rest <= 0:
                    break
                # The first looks now and then whether the holder has died, the others whether they are first.
                waiter.lock.acquire(timeout=min(rest, 0.05 if first else 1))
        finally:
            line.pop(ref(waiter), None)
            if not line:
                self.lines.pop(key, None)
            if not taken:
                waiter.token = None
                self.free(key, token)  # it may have been given to us at the last moment
        if not taken:
            raise _busy(patience)

    def _refuse_nested(self, key: str) -> None:
        """Raise if the request that holds *key* is the one that called us: waiting for it would be in vain."""
        token = self.holders.get(key)
        request, frame = token and token(), sys._getframe(1)
        while request is not None and frame is not None:
            if frame.f_globals is globals() and frame.f_locals.get("exchange") is request:  # see SessionMiddleware
                raise SessionBusy(
                    "a request asks for the session that the request around it holds (the application calls itself?): "
                    "call session.release() before that, or send another cookie"
                )
            frame = frame.f_back  # type: ignore[assignment]

    def take_over(self, key: str, token: Any) -> bool:
        """Take *key* if it is free or its holder is dead; is it ours?"""
        holder = self.holders.setdefault(key, token)
        if holder is not token and holder() is None:
            # Only here is it replaced while it is held.
            self._lock.acquire(timeout=self._overdue)
            if self.holders.get(key) is holder:
                self.holders[key] = token
            _unlock(self._lock)
        return self.holders.get(key) is token


def _after_fork() -> None:
    """In a forked child the threads that held, locked or waited are gone."""
    global _lock
    _lock = threading.RLock()
    for holds in list(_all_holds):
        # With new dicts and a new lock: without a GIL those threads may have locked the old ones for ever.
        holds.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Records
# ---------------------------------------------------------------------------

# Plain values that may be stored though nobody declared them.  (Those in `_PLAIN` are part of the
# pickle format itself.)
_PLAIN = frozenset((type(None), bool, int, float, str, bytes, bytearray, tuple, list, dict, set, frozenset))
_VALUES = frozenset(
    "builtins.complex collections.deque collections.OrderedDict collections.Counter collections.defaultdict "
    "datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone zoneinfo.ZoneInfo "
    "decimal.Decimal fractions.Fraction uuid.UUID ipaddress.IPv4Address ipaddress.IPv6Address "
    "pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath".split()
)

# Of these, the ones of which all who ask may get the same object.
_SHARED = ("datetime.timezone", "zoneinfo.ZoneInfo")

# How an object is made, in a call of `_make`: by its class's __new__, by calling the class, as an
# enum's member, as a defaultdict with the factory of that name; or it is the session itself.
_NEW_OBJECT, _CALL, _MEMBER, _FACTORY, _SESSION = range(5)

# Classes about which the log has been told that no other process will find them.
_warned: set[str] = set()


def _make(*call: Any) -> Any:
    """What a record calls, and all that it can.  It is never called: `_maker` makes what is put in its place.

    ``_make(class's name, how, *args)`` makes an object, ``_make(object, (state, items, pairs))`` fills one.
    Strategy: both sides have it as number 0 in pickle's memo.  To name it in each record takes 2.5 us more.
    """


class _Closed:
    """Stands for an object that can't be opened in this process; written again, it is what it was."""

    def __init__(self, error: Exception, *call: Any) -> None:
        self.error, self.call, self.filling = error, call, None


class _Writer(pickle.Pickler):
    """Pickles what is on *session* so that only plain values and declared classes take part.

    No class or function gets into the record, but `_make`.
    """

    trouble: Exception | None = None  # the error of the first thing written that can't be opened

    def __init__(self, file: Any, session: Session) -> None:
        super().__init__(file, 5)
        self.memo = {id(_make): (0, _make)}
        self.session, self.name = session, ""

    def offence(self, offender: str) -> NotStorable:
        """The error for what can't be stored: where it is, and what to do."""
        name = f"the attribute {self.name[1:]}" if self.name.startswith(".") else f"the component {self.name}"
        return NotStorable(
            f"{name} can't be stored, it contains {offender}: decorate a class of yours with @storable (or "
            "@implementer), leave open files, locks and functions out of components (see __getstate__), or use a "
            "MemoryStore",
            name=name,
            offender=offender,
        )

    def class_name(self, cls: Any) -> str:
        """The name under which objects of *cls* are stored; NotStorable if it isn't declared."""
        name = _name(cls)
        if _storables.get(name) is not cls:
            name = name.replace("pathlib._local.", "pathlib.")  # where Python 3.13 has it
            if name not in _VALUES:
                raise self.offence(f"an object of class {name}, which isn't declared")
        elif (cls.__module__ == "__main__" or "<locals>" in name) and name not in _warned:
            _warned.add(name)
            _log(logging.WARNING, "unfindable", "-", "keeps a %s, which other processes can't find: use a module", name)
        return name

    def add(self, name: str, each: object) -> None:
        """Write *each* under *name*, behind what has been written so far."""
        self.name = name
        try:
            self.dump((name, each))
        except NotStorable:
            raise
        except Exception as error:
            raise self.offence(f"what pickle refuses ({error})") from error

    def reducer_override(self, obj: Any) -> Any:
        """How *obj* is written, as pickle asks for all but plain values: as a call of `_make`."""
        kind = type(obj)
        if kind in _PLAIN:
            return NotImplemented
        if isinstance(obj, Session) and obj._record.key == self.session._record.key:
            return _make, ("", _SESSION)  # this view of it, or that of another request
        if kind is _Closed:
            self.trouble = self.trouble or obj.error
            return (_make, obj.call) if obj.filling is None else (_make, obj.call, obj.filling, None, None, _make)
        if isinstance(obj, type):
            raise self.offence(f"the class {_name(obj)} itself")
        if isinstance(obj, enum.Enum):
            return _make, (self.class_name(kind), _MEMBER, obj.name if obj.name in kind.__members__ else obj.value)
        return self.reduced(obj, kind)

    def reduced(self, obj: Any, kind: type) -> tuple[Any, ...]:
        """What the object itself wants to be written as, by our function."""
        reduce = copyreg.dispatch_table.get(kind)
        try:
            reduced = reduce(obj) if reduce else obj.__reduce_ex__(5)
        except TypeError as error:
            raise self.offence(f"an object of class {_name(kind)} ({error})") from error
        if isinstance(reduced, str):
            raise self.offence(f"{reduced} of {kind.__module__}")
        padded: tuple[Any, ...] = (*reduced, None, None, None)
        cls, args, state, items, pairs = padded[:5]
        how: int = _CALL
        if cls is copyreg.__newobj__:  # type: ignore[attr-defined]
            (cls, *args), how = args, _NEW_OBJECT
        elif kind is defaultdict:
            factory, how = obj.default_factory, _FACTORY
            if factory is not None and not isinstance(factory, type):
                raise self.offence(f"a defaultdict with {factory!r}, which is no declared class, nor int, list, ...")
            args = ["" if not factory else factory.__name__ if factory in _PLAIN else self.class_name(factory)]
        elif _name(kind) in _SHARED:
            cls, args, state = kind, [obj.key] if hasattr(obj, "key") else obj.__getinitargs__(), None
        elif not isinstance(cls, type):
            by = getattr(cls, "__qualname__", repr(cls))
            raise self.offence(f"an object of class {_name(kind)}, which is made by {by}()")
        call = (self.class_name(cls), how, *args)
        special = not isinstance(cls.__new__, BuiltinFunctionType) and call[0] not in _VALUES
        if special and cls.__new__(cls, *args) is cls.__new__(cls, *args):
            raise self.offence(f"the one object of class {_name(cls)}, which all share: make it an enum")
        if state is None and items is None and pairs is None:
            return _make, call
        return _make, call, (state, items and list(items), pairs and list(pairs)), None, None, _make


def _dump(session: Any) -> bytes:
    """The content of a record: all components and attributes of *session*, and what can't be opened.

    Pairs of a name, that of an interface or "." and that of an attribute, and what is kept there,
    pickled one after the other with one memo: what they share stays shared.
    """
    file = io.BytesIO()
    writer, attributes = _Writer(file, session), vars(session)
    for interface, component in list(session._components.items()):
        name = _name(interface)
        if _interfaces.get(name) is not interface:
            writer.name = name
            raise writer.offence("a name that now means another interface of that name")
        writer.add(name, component)
    for name, value in list(attributes.items()):
        writer.add("." + name, value)
    for name, (kept, _) in session._record.closed.items():
        if not name.startswith(".") or name[1:] not in attributes:
            writer.add(name, kept)
    return file.getvalue()


class _Reader(pickle.Unpickler):
    """Unpickles with *make* for `_make`, if it has one; no record gets at anything else."""

    make: Any = None

    def find_class(self, module: str, name: str) -> Any:
        """What a record asks for by name: our function, once, at the beginning."""
        if self.make is None or name != "make":
            raise SealError(f"a record asks for {module}.{name}")
        return self.make


def _find_class(name: str) -> Any:
    """The class that may be stored under *name*.  It is never imported for that, unless it is in `_VALUES`."""
    cls: Any = _storables.get(name)
    if cls is None and name in _VALUES:
        module, _, attribute = name.rpartition(".")
        cls = getattr(__import__(module), attribute)
    if cls is None:
        raise SealError(f"no class {name} was declared in this process: import its module, decorate it with @storable")
    return cls


def _make_object(name: str, how: int, args: Sequence[Any]) -> Any:
    """A new object of the declared class *name*, without its state; an enum's member is the process's own."""
    cls = _find_class(name)
    if how == _MEMBER and issubclass(cls, enum.Enum):
        return cls[args[0]] if isinstance(args[0], str) and args[0] in cls.__members__ else cls(*args)
    if how == _FACTORY:
        plain = {each.__name__: each for each in _PLAIN}
        how, args = _CALL, [plain.get(args[0]) or _find_class(args[0]) if args[0] else None]
    build: Any = cls if how == _CALL else partial(cls.__new__, cls)
    made = build(*args)
    special = not isinstance(cls.__new__, BuiltinFunctionType) or type(cls).__call__ is not type.__call__
    if special and name not in _VALUES and build(*args) is made:  # a record may only fill what it has made
        raise SealError(f"{name} gives the same object to all who ask; only an enum may do that")
    return made


def _fill(obj: Any, state: Any, items: Any, pairs: Any) -> None:
    """Do what pickle does with the state, items and pairs of a reduced object."""
    if items is not None:
        obj.extend(items)
    for key, value in pairs or ():
        obj[key] = value
    if state is not None and hasattr(obj, "__setstate__"):
        obj.__setstate__(state)
    elif state is not None:
        state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if state:
            obj.__dict__.update(state)
        for name, value in (slots or {}).items():
            setattr(obj, name, value)


class _Failed(Exception):
    """The object with this number, of a class with this name, can't be filled because of this error."""


def _maker(session: Any, failed: dict[int | str, Exception]) -> Callable[..., Any]:
    """What a record calls for `_make`; what has *failed* before is closed, and what can't be made is added.

    It is made anew for each reading: all that a forged record can do to it dies with it.
    """
    made: dict[int, tuple[Any, int, str]] = {}  # by id, so that nothing else can be filled
    numbers = itertools.count()

    def make(name: Any, how: Any, *args: Any) -> Any:
        if type(how) is tuple:
            return fill(name, how)
        if how == _SESSION:
            return session
        number = next(numbers)
        try:
            error = failed.get(number, failed.get(name))
            if error is not None:
                raise error
            obj = _make_object(name, how, args)
            if how == _MEMBER or name in _SHARED:
                return obj
        except Exception as error:
            failed.setdefault(number, error)
            obj = _Closed(error, name, how, *args)
        made[id(obj)] = obj, number, name
        return obj

    def fill(obj: Any, filling: Any) -> None:
        if id(obj) not in made:
            raise SealError("a record can't set the state of what it hasn't made")
        try:
            if type(obj) is _Closed:
                obj.filling = filling
            else:
                _fill(obj, *filling)
        except Exception as error:
            raise _Failed(*made[id(obj)][1:], error) from error

    return make


def _read(content: bytes, make: Callable[..., Any]) -> dict[str, Any]:
    """What `_dump` wrote, by name."""
    content = b"cm\nmake\n\x94." + content
    file, loaded = io.BytesIO(content), {}
    reader = _Reader(file)
    reader.make = make
    reader.load()  # into the memo
    while file.tell() < len(content):
        name, each = reader.load()
        if type(name) is not str:
            raise SealError("the record has another form than this version writes")
        loaded[name] = each
    return loaded


def _load(content: bytes, session: Any) -> tuple[dict[str, Any], bool]:
    """What `_dump` wrote, by name, and whether anything in it is closed.

    An object whose class is missing or fails is a `_Closed`.  If it fails only when it is filled,
    others have it in hand already; then all of it is read again, with that one closed.
    """
    failed: dict[int | str, Exception] = {}  # by the number of the object, or by the name of its class
    for attempt in itertools.count():
        try:
            return _read(content, _maker(session, failed)), bool(failed)
        except _Failed as error:
            number, name, cause = error.args
            failed[number if attempt < 20 else name] = cause
    raise AssertionError


def _trouble(session: Any, kept: object) -> Exception | None:
    """Why *kept* can't be opened: the error of what is closed in it."""
    writer = _Writer(io.BytesIO(), session)
    try:
        writer.dump(kept)
    except NotStorable:
        pass  # what it was written from could be written
    except Exception as error:
        return writer.trouble or error
    return writer.trouble


# Memory store
# ---------------------------------------------------------------------------

#: The third answer of ``store.open(uid)``, beside a session and None: *uid* has moved on to a new one.
MOVED: Any = type("_Moved", (), {"ended": True, "__repr__": lambda self: "minisess.MOVED"})()

# For how many seconds it is remembered: what the browser sent before the login's answer came arrives within them.
_REMEMBERED = 60

_NEVER = float("inf")


class IStore(Interface):
    """What SessionMiddleware wants of its store.

    A session that isn't there, has expired or can't be trusted is None; an exception means that
    the store is broken (`StoreError`) or the session is in use (`SessionBusy`, `SessionConflict`).
    """

    def clock(self) -> float:
        """The time by which sessions expire, UNIX time in seconds."""
        ...

    def create(self, lifetime: float, max_lifetime: float) -> Session:
        """A fresh session.  It isn't in the store before it is saved."""
        ...

    def open(self, uid: str, patience: float = 10, request: object = None) -> Session | None:
        """The live session *uid*, its idle clock started again; or None, or `MOVED`.

        *request*, or the session itself, holds it until `save` or `release`, or as long as that
        object lives.  Waits *patience* seconds for others that hold it.
        """
        ...

    def peek(self, uid: str, request: object = None) -> Session | None:
        """The live session *uid* as it was last saved, to look at; or None, or `MOVED`.  Waits for nobody."""
        ...

    def save(self, session: Session) -> None:
        """Store a session, unless it is new and holds nothing, and let the next request in.

        Starts its idle clock again.  One that was ended meanwhile isn't stored, that is only logged.
        """

    def touch(self, session: Session) -> None:
        """Start its idle clock again, held or not."""

    def release(self, session: Session) -> None:
        """Let the next request in without saving.  Does nothing if *session* isn't held."""

    def renew(self, session: Session, **fields: object) -> None:
        """Move the session to a new uid and set *fields* on it; the old uid is dead from now on.

        If it belonged to another owner than that in *fields*, that one's session ends and this one is empty.
        """

    def discard(self, session: Session) -> None:
        """End the session: gone at once, its callbacks run."""

    def sweep(self) -> int:
        """End all that have expired and aren't held; answers how many.  (Requests do that bit by bit.)"""
        ...

    def sessions(self, owner: str) -> list[Session]:
        """The live sessions of *owner* as they were last saved, the oldest first; to look at, and to `expire`.

        A form names one by its `handle`: stores outside the process don't know the uids of others ("").
        """
        ...

    def expireAll(self, owner: str, keep: Session | None = None) -> int:
        """End all sessions of *owner* but *keep*; answers how many."""
        ...

    def clear(self) -> int:
        """End everybody's sessions; answers how many."""
        ...

    def __len__(self) -> int:
        """How many sessions are stored."""
        ...


def _raise_first(errors: Iterable[BaseException | None], spare: Any = ()) -> None:
    """Raise the first of what callbacks raised that was no Exception, unless it is *spare*d.

    A request that ends others' sessions on its way spares a SystemExit: that is theirs, and has been
    logged.  Anything else (Ctrl-C, gevent's Timeout) came from outside.
    """
    for error in errors:
        if error is not None and not isinstance(error, spare):
            raise error


def _created(record: _Record) -> None:
    _log(logging.INFO, "created", record.handle, "created", owner=record.owner)


def _renewed(session: Session, old: str, fresh: _Record, fields: dict[str, Any]) -> None:
    """*session* has moved from the key *old* to *fresh*; the record that it had ends, if that is another."""
    record, event = session._record, "login" if "owner" in fields else "renewed"
    session._bind(fresh)
    _log(logging.INFO, event, fresh.handle, "is its new id", owner=fresh.owner)
    session._store.holds.free(old, session._token)
    if fresh is not record:
        _raise_first([record.end("another")])


def _lost(session: Session) -> SessionError:
    """Log that *session* has ended under its request, and answer the error that says so."""
    _log(logging.WARNING, "lost", session.handle, "was ended while a request used it: nothing is saved")
    return SessionError("this session has ended: ISession(environ) answers a new one")


def _conflict(session: Session) -> SessionConflict:
    """Log that another request has changed *session*, and answer the error that says so."""
    _log(logging.WARNING, "conflict", session.handle, "was changed by another request: nothing is saved")
    return SessionConflict(
        "another request has changed this session since this one let go of it (by session.release(), or when its "
        "headers left), so what this one changed afterwards isn't saved: change it before, or in a request of its own"
    )


def _same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Have both the same objects?"""
    return len(one) == len(other) and all(other.get(key, _NEVER) is each for key, each in list(one.items()))


@implementer(IStore)
class MemoryStore:
    """Live sessions in a dict, for one process; they end with it.

    *capacity* bounds their number: past it, expired ones go first, then anonymous ones, then those
    with an owner, always those closest to their end first (ones in use stay).  *strict* refuses what
    a persistent store would refuse, so that it is noticed before the day of the move.  *clock*
    answers UNIX time in seconds.

    Components are live objects: what a request does to one is done, also if the request fails.

    Strategy: opening and letting go take no lock, see `_Holds`.  A heap has one deadline for each
    session, never later than the real one: requests only move the real one on, and the heap is put
    right when its entry comes to the top.  What adds, moves or ends a record is done alone.
    """

    # Each access looks at no more due sessions of each heap than this.  It has to be over 1 for the
    # abandoned ones to become fewer while each access adds one.
    _batch = 4

    def __init__(self, *, capacity: int | None = None, strict: bool = False, clock: Clock = time.time) -> None:
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            raise ValueError(f"capacity is the largest number of sessions, 1 or more, not {capacity!r}")
        self.capacity, self.strict, self.clock = capacity, strict, clock
        self.holds = _Holds()
        self._records: dict[str, _Record] = {}
        self._owned: dict[str | None, dict[_Record, None]] = {}  # by owner, without the anonymous
        self._moved: dict[str, float] = {}  # uids that have moved, the oldest first: until when that is remembered
        self._heaps: tuple[list[tuple[float, str]], ...] = ([], [])  # deadlines of anonymous sessions, and of owners'
        self._next = _NEVER  # no deadline is earlier
        self._running: set[Any] = set()  # weak references, which remove themselves, to views without a hold

    def __len__(self) -> int:
        return len(self._records)

    def create(self, lifetime: float, max_lifetime: float) -> Session:
        """A fresh session: see `IStore`."""
        uid = _new_uid()
        return Session(self, _Record(uid, uid, _new_fields(self.clock(), lifetime, max_lifetime)))

    def open(self, uid: str, patience: float = 10, request: object = None) -> Session | None:
        """The live session *uid*, held; or None, or `MOVED`: see `IStore`.

        Who had to wait looks again: the record may have ended or moved on meanwhile.
        """
        now = self.clock()
        if now >= self._next and not self.holds.is_held("moving"):  # else somebody is at it
            self._reclaim(now, self._batch, spare=SystemExit)
        # Strategy: a dict's get() locks it on free-threaded CPython 3.13, [] doesn't.
        try:
            record = self._records[uid]
        except KeyError:
            return self._missing(uid, now)
        session = Session(self, record, request)
        token = session._token
        if self.holds.holders.setdefault(uid, token) is not token:
            try:
                self.holds.wait(uid, token, patience)
            except SessionBusy:
                _log(logging.INFO, "busy", session.handle, "is busy", owner=record.owner)
                raise
            now = self.clock()
        if record.state is not _STORED or record.key != uid:
            self.holds.free(uid, token)
            return self._missing(uid, now)
        if now >= record.due and now >= record.expires:  # mostly the first will do
            self._end([record], "", now, spare=SystemExit)
            return None
        record.lastModified = now
        return session

    def _missing(self, uid: str, now: float) -> Session | None:
        """`MOVED` for a uid that has moved on within the last minute, or None."""
        return MOVED if self._moved.get(uid, now) > now else None

    def peek(self, uid: str, request: object = None) -> Session | None:
        """A look at the live session *uid*, which is cut off when that moves on: see `IStore`."""
        now = self.clock()
        try:
            record = self._records[uid]
        except KeyError:
            return self._missing(uid, now)
        if now < record.due or now < record.expires:
            look = _look(self, record, request)
            self._running.add(ref(look, self._running.discard))
            if record.key == uid and uid not in self._moved:  # still: who moves it later cuts it off
                if now - record.lastModified >= record.lifetime / 8:
                    record.lastModified = now
                return look
        return self._missing(uid, now)

    def save(self, session: Session) -> None:
        """Let go of a session that is stored; store one that is new and holds something: see `IStore`."""
        record, token = session._record, session._token
        new = record.state is _NEW and not record.is_empty()
        if session._base is not None:
            self.save_late(session)
        elif record.state is _STORED or new:
            if self.strict:
                _dump(session)
            record.lastModified = now = self.clock()
            if new:
                self._insert(record, now)
            request = token()
            # Strategy: asked in this order, a response that is one list has no more to do than to free its hold.
            if new or (request is None or not request._over or not record.due) and session._is_holding():
                self._let_go(session, request)
            self.holds.free(record.key, token)
        elif record.state is _ENDED:
            _lost(session)

    def _let_go(self, session: Session, request: Any) -> None:
        """From here on *session* has contents of its own, and is cut off when somebody moves its record.

        If the response to *request* is over, it goes on sharing them with whoever holds the record.
        """
        record = session._record
        if not record.due:
            self.schedule(record)
        if request is None or not request._over:
            session._base = record.attributes.copy(), record.components.copy()
            session._detach()
            self._running.add(ref(session, self._running.discard))

    def save_late(self, session: Session) -> None:
        """Save what was changed without a hold, if nobody else has changed it; `SessionConflict` otherwise."""
        record, base, mine = session._record, session._base, (vars(session), session._components)
        if record.state is not _STORED or all(map(_same, mine, base)):
            return
        if self.strict:
            _dump(session)
        key, token, now = record.key, session._token, self.clock()
        self.holds.take(key, token, getattr(token(), "_patience", 10))
        try:
            shared = record.attributes, record.components
            if record.state is not _STORED or record.key != key or now >= record.expires:
                _lost(session)
            elif not all(map(_same, shared, base)):
                raise _conflict(session)
            else:
                for theirs, ours in zip(shared, mine, strict=True):
                    theirs.update(ours)  # first, so that an exception in between loses nothing
                    for name in set(theirs) - set(ours):
                        theirs.pop(name, None)
                record.lastModified, session._base = now, tuple(each.copy() for each in mine)
        finally:
            self.holds.free(key, token)

    def touch(self, session: Session) -> None:
        """Start its idle clock again: see `IStore`."""
        record, now = session._record, self.clock()
        if now < record.expires or session._is_holding():
            record.lastModified = now

    def release(self, session: Session) -> None:
        """Let the next request in; what was done to live objects is done: see `IStore`."""
        if session._is_holding():
            self._let_go(session, session._token())
            self.holds.free(session._record.key, session._token)

    def leave(self, session: Session) -> None:
        """The response is over: what keeps the session shares the record's contents again."""
        if session._base is not None and session._record.state is _STORED:
            session._bind(session._record)
        self._running.discard(ref(session))

    def refresh(self, session: Session) -> None:
        """Find out whether it has ended: that is known at once."""

    def renew(self, session: Session, **fields: Any) -> None:
        """Move its record to a new uid; a new record if it was another owner's: see `IStore`."""
        record: _Record = session._record
        token, now, uid, old, fresh = session._token, self.clock(), _new_uid(), record.key, record
        if record.owner not in (None, fields.get("owner", record.owner)):
            fresh = _Record(uid, uid, _new_fields(now, record.lifetime, record.max_lifetime))
        if record.state in (_NEW, _MOVED):
            state = _NEW if "owner" in fields else record.state  # a login makes a stand-in real
            fresh.set(uid=uid, key=uid, state=state, **fields)
        else:
            with self.holds.alone("moving"):
                if record.state is _ENDED or self._records.get(old) is not record:  # at this moment
                    raise _lost(session)
                self.holds.take(uid, token, 0)
                self._move(record, fresh, uid, fields)
        _renewed(session, old, fresh, fields)

    def _move(self, record: _Record, fresh: _Record, uid: str, fields: dict[str, Any]) -> None:
        """Let *fresh*, mostly the same, be found under *uid* instead of *record* (alone).

        What helps to find it comes before the dict and leaves after it, so that an exception in
        between loses nothing.
        """
        old, owner, new_owner = record.key, record.owner, fields.get("owner", record.owner)
        self._moved[old] = until = self.clock() + _REMEMBERED
        self._next = min(self._next, until)
        self._cut(record)
        self._own(fresh, new_owner)
        fresh.due = record.due
        heappush(self._heaps[new_owner is not None], (fresh.due, uid))  # by which it ends, should an exception come now
        self._records[uid] = fresh
        fresh.set(key=uid, uid=uid, state=_STORED, **fields)  # by its key it has moved
        self._schedule(fresh)
        self._records.pop(old, None)
        if fresh is not record:
            record.state = _ENDED
        if fresh is not record or new_owner != owner:
            self._disown(record, owner)

    def _cut(self, record: _Record) -> None:
        """Cut off all other views of *record* that still run without a hold."""
        for reference in list(self._running):
            view = reference()
            if view is not None and view._record is record and not view._is_over():
                view._cut()

    def _own(self, record: _Record, owner: str | None) -> None:
        """Enter *record* in the list of *owner* (alone)."""
        if owner is not None:
            self._owned.setdefault(owner, {})[record] = None

    def _disown(self, record: _Record, owner: str | None) -> None:
        """Take *record* from the list of *owner* (alone)."""
        owned = self._owned.get(owner, {})
        owned.pop(record, None)
        if not owned:
            self._owned.pop(owner, None)

    def _insert(self, record: _Record, now: float) -> None:
        """Store a new record, and end what has expired or has to make room for it."""
        with self.holds.alone("moving") as token:
            ended = self._due(now, self._batch, token) if now >= self._next else []
            if self.capacity is not None:
                ended += self._evict(self.capacity - 1, now, token)
            self._own(record, record.owner)
            self._schedule(record)
            record.state = _STORED
            self._records[record.key] = record
        _created(record)
        if ended:
            self._finish(ended, "", now, spare=SystemExit)

    # Ending

    def discard(self, session: Session) -> None:
        """End the session, stored or not: see `IStore`."""
        record = session._record
        if record.state is _STORED:
            self._end([record], "logout")
        elif record.state is not _ENDED:
            _raise_first([record.end("logout")])

    def expireAll(self, owner: str, keep: Session | None = None) -> int:
        """End all sessions of *owner* but *keep*; answers how many: see `IStore`."""
        _check_owner(owner)
        kept = None if keep is None else keep._record
        return self._end([record for record in list(self._owned.get(owner, ())) if record is not kept], "all")

    def clear(self) -> int:
        """End everybody's sessions; answers how many: see `IStore`."""
        with self.holds.alone("moving"):
            for key, record in list(self._records.items()):
                if record.key != key:  # an exception has torn a move in two
                    self._records.pop(key, None)
        return self._end(list(self._records.values()), "all")

    def sweep(self) -> int:
        """End all that have expired and aren't held; answers how many: see `IStore`."""
        self.holds.prune()
        return self._reclaim(self.clock(), _NEVER)

    def sessions(self, owner: str) -> list[Session]:
        """Looks at the live sessions of *owner*, the oldest first: see `IStore`."""
        _check_owner(owner)
        now, owned = self.clock(), list(self._owned.get(owner, ()))
        live = [record for record in owned if record.state is _STORED and now < record.expires]
        return [_look(self, record) for record in sorted(live, key=attrgetter("created"))]

    def _end(self, records: list[_Record], reason: str, now: float = 0, spare: Any = ()) -> int:
        """End those of *records* that nobody else has ended; answers how many."""
        with self.holds.alone("moving"):
            mine = [record for record in records if self._take_out(record)]
        return self._finish(mine, reason, now, spare)

    def _take_out(self, record: _Record) -> bool:
        """Take *record* out (alone); was it there?  Who takes it out ends it."""
        if self._records.get(record.key) is not record:
            return False
        record.hold, record.state = self.holds.holders.get(record.key), _ENDED
        self._records.pop(record.key, None)
        self._disown(record, record.owner)
        return True

    def _finish(self, records: list[_Record], reason: str, now: float, spare: Any) -> int:
        """End what was taken out, when nobody has to wait for it any more: callbacks may use the store."""
        for record in records:
            self._cut(record)
            self.holds.free(record.key, record.hold)
        _raise_first([record.end(reason, now) for record in records], spare)
        return len(records)

    # Deadlines

    def schedule(self, record: _Record) -> None:
        """Its lifetime has changed, or it may have been found in use when it was due."""
        if record.state is _STORED and not 0 < record.due <= record.expires:
            with self.holds.alone("moving"):
                self._schedule(record)

    def _schedule(self, record: _Record) -> None:
        """Have its deadline looked at; an earlier entry is void from now on (alone)."""
        due = record.expires
        heappush(self._heaps[record.owner is not None], (due, record.key))
        record.due, self._next = due, min(self._next, due)

    def _reclaim(self, now: float, limit: float, spare: Any = ()) -> int:
        """Look at *limit* sessions that may be due, and end those that are; answers how many."""
        with self.holds.alone("moving") as token:
            records = self._due(now, limit, token)
        return self._finish(records, "", now, spare)

    def _due(self, now: float, limit: float, token: Any) -> list[_Record]:
        """Take out those that have expired, of *limit* of each heap that may have (alone)."""
        taken: list[_Record] = []
        for heap in self._heaps:
            left = limit
            while left > 0 and heap and heap[0][0] <= now:
                left -= 1
                taken += self._take(heap, now, token)
            if len(heap) > 4 * len(self._records) + 100:
                # Three in four are void: those of renewed and ended sessions with long lifetimes.
                heap[:] = {row for row in heap if (record := self._records.get(row[1])) and record.due in (0, row[0])}
                heapify(heap)
        for uid, until in list(itertools.islice(self._moved.items(), self._batch)):
            if not now < until <= now + _REMEMBERED:  # or the clock was put back
                self._moved.pop(uid, None)
        self._next = min([next(iter(self._moved.values()), _NEVER), *(heap[0][0] for heap in self._heaps if heap)])
        return taken

    def _take(self, heap: list[tuple[float, str]], now: float, token: Any) -> list[_Record]:
        """Take the first entry from a heap, and its record out if that is its end and nobody uses it (alone)."""
        due, key = heappop(heap)
        record = self._records.get(key)
        if record is not None and record.key != key:
            self._records.pop(key, None)  # an exception has torn a move in two
        if record is None or record.due not in (0, due) or record.key != key:
            return []  # void
        if not self.holds.take_over(key, token):
            record.due, due = 0, max(now, due) + 10  # in use: judged when it is asked for or let go, or later
        elif record.expires > max(now, due):
            record.due = due = record.expires  # it was used after its entry was made
        elif self._take_out(record):
            return [record]
        self.holds.free(key, token)
        heappush(heap, (due, key))
        return []

    def _evict(self, most: int, now: float, token: Any) -> list[_Record]:
        """Take out what has to go so that there are no more than *most* (alone)."""
        evicted: list[_Record] = []
        for heap in self._heaps:
            used = []
            while heap and len(self._records) > most:
                if self.holds.is_held(heap[0][1]):
                    used.append(heappop(heap))
                else:
                    evicted += self._take(heap, now, token)
            for entry in used:
                heappush(heap, entry)
        return evicted


# Persistent stores
# ---------------------------------------------------------------------------

#: What `PersistentStore.hold` answers for a record that somebody else holds.
HELD: Any = object()

_TOMBSTONE = b"\0"
_NUMBERS = frozenset((float, int))
_get_fields: Callable[[Any], tuple[Any, ...]] = attrgetter(*_FIELDS)


class _StoredRecord(_Record):
    """A record of its own for each request, read from where the store keeps it."""

    __slots__ = ("content", "fields", "closed")  # what is stored, as `_dump` writes it and of `_FIELDS`

    def __init__(self, uid: str, key: str, fields: tuple[Any, ...] = ()) -> None:
        super().__init__(uid, key, fields)
        self.content, self.fields, self.closed = b"", fields, {}

    @property
    def handle(self) -> str:
        return self.key[:16]


def _is_tombstone(raw: bytes) -> bool:
    """Is it what stands in the place of a record that has moved to another key?  It is shorter than any record.

    After `_TOMBSTONE` comes the UNIX time until which that is remembered, if the store doesn't know.
    """
    return raw[:1] == _TOMBSTONE and len(raw) < 32 and (len(raw) == 1 or raw[1:].isdigit())


def _expires(fields: tuple[Any, ...]) -> float:
    """The earlier deadline."""
    return min(fields[0] + fields[3], fields[5] + fields[4])  # type: ignore[no-any-return]


def _check_fields(fields: tuple[Any, ...]) -> tuple[Any, ...]:
    """*fields*, if they are values for `_FIELDS` that this version writes."""
    modified, cookie, created, lifetime, max_lifetime, since, owner, forgotten, callbacks = fields
    numbers = (modified, created, lifetime, max_lifetime, since, *(cookie or ()), *(forgotten or ()))
    if (
        _NUMBERS.issuperset(map(type, numbers))
        and sum(numbers) > -1e300  # nor NaN
        and (owner is None or type(owner) is str)
        and (cookie is None or type(cookie) is tuple and len(cookie) == 2)
        and (forgotten is None or type(forgotten) is tuple and len(forgotten) == 2)
        and type(callbacks) is tuple
        and (not callbacks or all(type(name) is type(method) is str for name, method in callbacks))
    ):
        modified, created, lifetime, max_lifetime, since = map(float, numbers[:5])
        return modified, cookie, created, lifetime, max_lifetime, since, owner, forgotten, callbacks
    raise SealError("the record has another form than this version writes")


@implementer(IStore)
class PersistentStore:
    """What stores outside the process have in common; a subclass says where the records lie.

    *secret*: at least 16 bytes (or a str), or a sequence of such; the first seals new records, all
    open old ones.  *place*: a name for where the records lie; those of another place don't open
    here.  *lease*: for how many seconds a request holds its session if it isn't heard of again.
    *clock*: UNIX time in seconds; hosts that share a store keep theirs in step (NTP).

    A record is ``MAC || body``: keyed BLAKE2b over place, key and body, so that it can't be forged,
    or copied to another key.  The key is a hash of the uid: who reads the database can't use what
    is there.  A record that doesn't verify is no session, is logged, left alone, and isn't unpickled.

    A hold is first one in this process, so that only one of those who wait here asks the database;
    then a lease there, under a token that all holds of this store share.

    A subclass supplies the operations below on ``(key: str, record: bytes)``.  Each is atomic, and
    answers the same if a driver that lost the answer asks again.  *token* (str) is who holds a
    record, *until* (UNIX time) for how long; *due* (UNIX time, maybe infinite) is when the store
    should look at it; *owner* is a hash, "" for none.  Their exceptions reach the application as
    `StoreError`.
    """

    strict = True

    # How many records that may be due every third new session looks at (more than three, so that
    # they become fewer), and an access after so many seconds.
    _few, _some, _pause = 6, 20, 10

    def __init__(self, *, secret: Secret, place: str = "", lease: float = 30, clock: Clock = time.time) -> None:
        self._macs, self._owner_keys = [], []
        for each in secret if isinstance(secret, (list, tuple)) else [secret]:
            if not isinstance(each, (str, bytes, bytearray)):
                raise TypeError(f"a secret is a str or bytes, not {type(each).__name__}")
            each = each.encode() if isinstance(each, str) else bytes(each)
            if len(each) < 16:
                raise ValueError(f"a secret has at least 16 bytes, not {len(each)}: take secrets.token_hex(32)")
            key = blake2b(each).digest()
            self._owner_keys.append(blake2b(key, person=b"minisess owner").digest())
            # The length delimits the place; keys have one length, and the body is the rest.
            start = b"%d:%s" % (len(place.encode()), place.encode())
            self._macs.append(blake2b(start, key=key, digest_size=32, person=b"minisess seal 2"))
        if not self._macs:
            raise ValueError("secret= needs at least one secret: take secrets.token_hex(32)")
        self.place, self.lease, self.clock = place, _seconds(lease, "lease"), clock
        self.holds = _Holds()
        self._swept, self._created_count = time.monotonic(), itertools.count()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.place}>"

    # What a subclass supplies

    def insert(self, key: str, record: bytes, due: float, owner: str) -> None:
        """Add a record."""
        raise NotImplementedError

    def hold(self, key: str, token: str, now: float, until: float) -> Any:
        """If *token* holds the record already, or nobody does by *now*: hold it and answer it.

        None if there is no such record, `HELD` if another has it.
        """
        raise NotImplementedError

    def read(self, key: str) -> bytes | None:
        """The record, held or not, or None."""
        raise NotImplementedError

    def write(self, key: str, token: str, record: bytes, due: float, owner: str) -> bool:
        """Replace the record and let go of it, if *token* was the last to hold it; was it so?"""
        raise NotImplementedError

    def free(self, key: str, token: str) -> None:
        """Let go of the record, if *token* holds it."""
        raise NotImplementedError

    def swap(self, key: str, old: bytes, new: bytes | None, due: float) -> bool:
        """If the record is *old*: replace it, or delete it if *new* is None; was it so?"""
        raise NotImplementedError

    def settle(self, verdicts: list[tuple[str, bytes, bytes | None, float]]) -> list[bool]:
        """Do `swap` with each of *verdicts*; a store that can do that at once is faster."""
        return [self.swap(*verdict) for verdict in verdicts]

    def move(self, key: str, token: str, to: str, record: bytes, due: float, owner: str, until: float) -> bool:
        """If *token* was the last to hold the record: put *record* under the key *to*, held until *until*.

        Its old place keeps a tombstone for a minute: ``b"\\0"``, and until when (UNIX time).  False if it wasn't so.
        """
        raise NotImplementedError

    def delete(self, key: str) -> bytes | None:
        """Delete the record, but no tombstone, and answer it, or None."""
        raise NotImplementedError

    def due(self, now: float, limit: int) -> list[tuple[str, bytes]]:
        """Up to *limit* records that are due by *now* and not held, those first that are due first."""
        raise NotImplementedError

    def owned(self, owner: str) -> list[tuple[str, bytes]]:
        """All records of *owner*."""
        raise NotImplementedError

    def take(self, owner: str, keep: str) -> list[tuple[str, bytes]]:
        """Delete all records of *owner*, but for the key *keep*, and answer them; none escapes by moving."""
        raise NotImplementedError

    def __len__(self) -> int:
        """How many records there are, without tombstones."""
        raise NotImplementedError

    def _ask(self, operation: Callable[..., T], *args: object) -> T:
        """Do one of the operations; what its driver raises becomes a StoreError."""
        try:
            return operation(*args)
        except SessionError:
            raise
        except Exception as error:
            name = operation.__name__.strip("_")
            raise StoreError(f"{self!r}: {name} failed: {type(error).__name__}: {error}") from error

    def _read(self, key: str) -> bytes:
        """The record, or a tombstone, or b"" for nothing."""
        return bytes(self._ask(self.read, key) or b"")

    # Sealing

    def _mac(self, mac: Any, key: str, body: bytes) -> bytes:
        """The seal of *body* under *key*, by one of the secrets."""
        mac = mac.copy()
        mac.update(key.encode())
        mac.update(body)
        return mac.digest()  # type: ignore[no-any-return]

    def _owner(self, owner: str | None, key: bytes | None = None) -> str:
        """What stands for *owner* in the database, by the first secret or by another *key*."""
        if owner is None:
            return ""
        owned = owner.encode("utf-8", "surrogatepass")
        return blake2b(owned, key=key or self._owner_keys[0], digest_size=16).hexdigest()

    def _seal(self, key: str, fields: tuple[Any, ...], content: bytes) -> bytes:
        """A record: ``MAC || how long the fields are || fields || content``."""
        head = pickle.dumps(fields, 5)
        body = b"%08d" % len(head) + head + content
        return self._mac(self._macs[0], key, body) + body

    def _unseal(self, key: str, raw: bytes) -> tuple[tuple[Any, ...], bytes]:
        """The fields and the content of a record; SealError if it isn't what this store wrote under that key."""
        seal, body = raw[:32], raw[32:]
        for mac in self._macs:
            if compare_digest(self._mac(mac, key, body), seal):
                break
        else:
            raise SealError("the seal doesn't match: forged, damaged, or sealed with another secret")
        try:
            end = 8 + int(body[:8])
            return _check_fields(_Reader(io.BytesIO(body[8:end])).load()), body[end:]
        except Exception as error:
            raise SealError(f"the record can't be read: {error}") from error

    def _refuse(self, key: str, error: Exception) -> None:
        """Log that a record can't be trusted."""
        _log(logging.WARNING, "refused", key[:16], "security: its record is refused: %s", error)

    def _fill(self, session: Session, raw: bytes) -> bool:
        """Let *session* have what is in a record; False for one that can't be trusted."""
        record = session._record
        try:
            record.fields, record.content = self._unseal(record.key, raw)
            record.fill(record.fields)
            record.state = _STORED
            items, any_closed = _load(record.content, session)
        except Exception as error:
            self._refuse(record.key, error)
            return False
        for name, each in items.items():
            trouble = _trouble(session, each) if any_closed else None
            kept: dict[Any, Any] = session._components
            key: Any = _interfaces.get(name)
            if name.startswith("."):
                kept, key = vars(session), name[1:]
                if hasattr(Session, key):
                    trouble = SealError("it would hide what belongs to every session")
            if key is not None and trouble is None:
                kept[key] = each
            else:
                record.closed[name] = each, trouble
                reason = "no such interface in this process: import its module" if trouble is None else trouble
                _log(logging.WARNING, "closed", record.handle, "keeps %s that can't be opened: %s", name, reason)
        return True

    def _revive(self, key: str, uid: str, raw: bytes, request: object = None) -> Session | None:
        """The session in a record, to look at, or None for one that can't be trusted."""
        session = Session(self, _StoredRecord(uid, key), request)
        return _look(self, session._record, request) if self._fill(session, raw) else None

    # Opening

    def create(self, lifetime: float, max_lifetime: float) -> Session:
        """A fresh session: see `IStore`."""
        uid, fields = _new_uid(), _new_fields(self.clock(), lifetime, max_lifetime)
        return Session(self, _StoredRecord(uid, _hash(uid, self.place), fields))

    def _acquire(self, session: Session, patience: float) -> bytes:
        """Hold the record and answer it, waiting for others who hold it; b"" if there is none."""
        self.holds.notice_fork()
        end, pause = time.monotonic() + patience, 0.0005
        key, token, raw = session._record.key, session._token, HELD
        try:
            self.holds.take(key, token, patience)
            while True:
                now = self.clock()
                raw = self._ask(self.hold, key, self.holds.token, now, now + self.lease)
                if raw is not HELD:
                    return bytes(raw or b"")
                rest = end - time.monotonic()
                if rest <= 0:
                    raise _busy(patience)
                # Longer and longer, and never in step with the others who wait.
                time.sleep(min(rest, pause * (0.5 + os.urandom(1)[0] / 255)))
                pause = min(pause * 1.2, 0.02)
        except SessionBusy:
            _log(logging.INFO, "busy", key[:16], "is busy")
            raise
        finally:
            if raw is HELD or not raw:
                self.holds.free(key, token)

    def open(self, uid: str, patience: float = 10, request: object = None) -> Session | None:
        """The live session *uid*, held; or None, or `MOVED`: see `IStore`.

        Now and then it ends some others first, whose time is up.
        """
        if time.monotonic() - self._swept >= self._pause:
            self._swept = time.monotonic()
            self.holds.prune()
            errors, more = self._end_due(self._some)
            if more:
                self._swept -= self._pause - 0.1  # soon again
            _raise_first(errors, spare=SystemExit)
        session = Session(self, _StoredRecord(uid, _hash(uid, self.place)), request)
        raw, record = self._acquire(session, patience), session._record
        if not raw:
            return None
        if _is_tombstone(raw) or not self._fill(session, raw):
            self.release(session)
            return self._moved(raw)
        now = self.clock()
        if now >= record.expires:
            self._discard(session, "", now, spare=SystemExit)
            return None
        record.lastModified = now
        return session

    def _moved(self, raw: bytes) -> Session | None:
        """What to answer for a tombstone, or for a record that is refused."""
        return MOVED if _is_tombstone(raw) and self.clock() < int(raw[1:] or 1 << 60) else None

    def peek(self, uid: str, request: object = None) -> Session | None:
        """A look at the live session *uid*, by one read: see `IStore`."""
        key, now = _hash(uid, self.place), self.clock()
        raw = self._read(key)
        session = None if not raw or _is_tombstone(raw) else self._revive(key, uid, raw, request)
        if session is None:
            return self._moved(raw)
        if now >= session.expires:
            return None
        if now - session.lastModified >= session.lifetime / 8:
            self._touch(session._record, raw, now)
        return session

    # Saving

    def save(self, session: Session) -> None:
        """Write the session if it is stored, or new and holds something: see `IStore`."""
        record = session._record
        if session._base is not None:
            self.save_late(session)
            self.refresh(session)
        elif record.state is _STORED:
            self._write(session, _dump(session))
        elif record.state is _ENDED:
            _lost(session)
        elif record.state is _NEW and not record.is_empty():
            # The sweep comes first, for if that fails there is no session without its cookie.
            if next(self._created_count) % 3 == 0:
                _raise_first(self._end_due(self._few)[0], spare=SystemExit)
            self._write(session, _dump(session))

    def _write(self, session: Session, content: bytes) -> None:
        """Write *content* and let go of the session, if it is new, or there and still held."""
        record, new = session._record, session._record.state is _NEW
        record.lastModified = self.clock()
        fields = _get_fields(record)
        raw, owner = self._seal(record.key, fields, content), self._owner(record.owner)
        if new:
            self._ask(self.insert, record.key, raw, record.expires, owner)
            _created(record)
        elif not self._ask(self.write, record.key, self.holds.token, raw, record.expires, owner):
            if self.refresh(session):
                raise self._lease_lost(session)
            return
        record.state, record.fields, record.content = _STORED, fields, content
        session._base = fields[2:], content
        self.holds.free(record.key, session._token)

    def _lease_lost(self, session: Session) -> SessionConflict:
        """The error for a request whose lease is over, while its session lives on with another."""
        _log(logging.WARNING, "conflict", session.handle, "was taken over after its lease ran out: nothing is saved")
        session._base = (), b""  # what others have by now is never the same
        self.holds.free(session._record.key, session._token)
        return SessionConflict(
            f"the request took longer than its lease of {self.lease:g} s and another one has changed the session "
            "meanwhile; nothing was saved: raise lease=, or call session.release() before the slow part",
            lease=self.lease,
        )

    def save_late(self, session: Session) -> None:
        """Save what was changed without a hold, if nobody else has changed it; `SessionConflict` otherwise."""
        record, base = session._record, session._base
        if record.state is not _STORED:
            return
        content = _dump(session)
        if (_get_fields(record)[2:], content) == base:
            return
        raw = self._acquire(session, getattr(session._token(), "_patience", 10))
        if not raw or _is_tombstone(raw):
            self.release(session)
            self._lose(session, raw)
            return
        try:
            fields, theirs = self._unseal(record.key, raw)
            if self.clock() >= _expires(fields):
                _lost(session)
                self._discard(session, "", self.clock(), spare=SystemExit)
            elif (fields[2:], theirs) != base:
                raise _conflict(session)
            else:
                self._write(session, content)
        finally:
            self.release(session)  # if it still holds it

    def refresh(self, session: Session) -> bytes:
        """The record, if nobody has ended or renewed it; b"" if somebody has, and then *session* has ended."""
        raw = self._read(session._record.key) if session._record.state is _STORED else b""
        if raw and not _is_tombstone(raw):
            return raw
        if session._record.state is _STORED:
            self._lose(session, raw)
        return b""

    def _lose(self, session: Session, raw: bytes) -> None:
        """*session* has ended or moved on, as its request learns now: *raw* is nothing, or a tombstone."""
        record = session._record
        if not raw:  # else another request has told the client of a new uid
            record.hold = self.holds.holders.get(record.key)
        _lost(session)
        session._cut()
        self.holds.free(record.key, session._token)

    def touch(self, session: Session) -> None:
        """Start its idle clock again; that is written at once if it isn't held: see `IStore`."""
        record, now = session._record, self.clock()
        if record.state is not _STORED or session._is_holding():
            record.lastModified = now
        elif raw := self.refresh(session):
            self._touch(record, raw, now)

    def _touch(self, record: _Record, raw: bytes, now: float) -> None:
        """Write only when it was used last."""
        try:
            fields, content = self._unseal(record.key, raw)
        except SealError as error:
            self._refuse(record.key, error)
            return
        if now < _expires(fields):
            record.lastModified, fields = now, (now, *fields[1:])
            new = self._seal(record.key, fields, content)
            self._ask(self.swap, record.key, raw, new, _expires(fields))

    def release(self, session: Session) -> None:
        """Let the next request in without saving: see `IStore`."""
        record = session._record
        if session._is_holding():
            session._base = record.fields[2:], record.content
            try:
                self._ask(self.free, record.key, self.holds.token)
            finally:
                self.holds.free(record.key, session._token)

    def leave(self, session: Session) -> None:
        """The response is over."""

    def schedule(self, record: _Record) -> None:
        """Its lifetime has changed: written with the rest of it."""

    def renew(self, session: Session, **fields: Any) -> None:
        """Move what is stored to a new key, and be a view of that: see `IStore`."""
        record, token, now, uid = session._record, session._token, self.clock(), _new_uid()
        old, new, fresh = record.key, _hash(uid, self.place), record
        if record.owner not in (None, fields.get("owner", record.owner)):
            fresh = _StoredRecord(uid, new, _new_fields(now, record.lifetime, record.max_lifetime))
        if record.state is _STORED:
            # What is stored moves; what this request changed is saved with the rest of it, or not at all.
            moved = tuple({**dict(zip(_FIELDS, fresh.fields, strict=True)), **fields}.values())
            raw, owner = self._seal(new, moved, fresh.content), self._owner(fields.get("owner", record.owner))
            due, until = _expires(moved), now + self.lease
            if not self._ask(self.move, old, self.holds.token, new, raw, due, owner, until):
                raise self._lease_lost(session) if self.refresh(session) else _lost(session)
            self.holds.take(new, token, 0)
            fresh.set(state=_STORED, fields=moved)
        elif record.state is _ENDED:
            raise _lost(session)
        elif "owner" in fields:
            fresh.state = _NEW  # a login makes a stand-in real
        fresh.set(uid=uid, key=new, **fields)
        _renewed(session, old, fresh, fields)

    # Ending

    def discard(self, session: Session) -> None:
        """End the session, stored or not: see `IStore`."""
        self._discard(session, "logout")

    def _discard(self, session: Session, reason: str, now: float = 0, spare: Any = ()) -> None:
        """Delete the record and end it, unless another was first; raises as `_raise_first`."""
        record, error = session._record, None
        record.hold = self.holds.holders.get(record.key)
        if record.state is _STORED and self._ask(self.delete, record.key) is None:
            record.hold = None
            self.refresh(session)
        elif record.state is not _ENDED:
            error = record.end(reason, now)
        if record.hold is not None:
            self.holds.free(record.key, record.hold)
        _raise_first([error], spare)

    def _end(self, key: str, raw: bytes, reason: str, now: float = 0) -> BaseException | None:
        """End a record that was taken out."""
        session = Session(self, _StoredRecord("", key))
        filled = self._fill(session, bytes(raw))
        self.holds.free(key, self.holds.holders.get(key))
        return session._record.end(reason, now) if filled else None

    def _end_due(self, limit: int, everything: bool = False) -> tuple[list[BaseException | None], bool]:
        """End up to *limit* records that are due.

        Answers what the callbacks of each raised, and whether there may be more to look at.
        """
        now, verdicts = self.clock(), []
        rows = self._ask(self.due, _NEVER if everything else now, limit)
        for key, raw in rows:
            raw, end = bytes(raw), 0.0
            if self.holds.is_held(key) and not everything:
                continue  # its lease is over, but its request isn't
            try:
                if not _is_tombstone(raw):
                    end = _expires(self._unseal(key, raw)[0])
            except SealError as error:
                # Perhaps another application's: left alone, and looked at again in an hour.
                self._refuse(key, error)
                end = now + 3600
                if everything:
                    continue
            verdicts.append((key, raw, None if everything or end <= now else raw, end))
        settled = list(zip(verdicts, self._ask(self.settle, verdicts) if verdicts else [], strict=True))
        errors = [
            self._end(key, raw, "all" if everything else "", now)
            for (key, raw, new, _), done in settled
            if done and new is None and not _is_tombstone(raw)
        ]
        # While everything is to go, what has changed at this moment is taken the next time.
        more = any(done or everything and not _is_tombstone(verdict[1]) for verdict, done in settled)
        return errors, more or len(rows) == limit

    def sweep(self, everything: bool = False) -> int:
        """End all that have expired and aren't held (or just everything); answers how many."""
        errors: list[BaseException | None] = []
        limit, more = 1000, True
        while more:
            ended, more = self._end_due(limit, everything)
            errors += ended
            limit = 1000 if ended else 2 * limit  # past those that are held, or can't be opened
        _raise_first(errors)
        return len(errors)

    def clear(self) -> int:
        """End everybody's sessions; answers how many: see `IStore`."""
        return self.sweep(everything=True)

    def sessions(self, owner: str) -> list[Session]:
        """Looks at the live sessions of *owner*, the oldest first: see `IStore`."""
        _check_owner(owner)
        rows = [row for each in self._owner_keys for row in self._ask(self.owned, self._owner(owner, each))]
        found = [self._revive(key, "", bytes(raw)) for key, raw in rows if not _is_tombstone(raw)]
        live = [each for each in found if each and each.owner == owner and self.clock() < each.expires]
        return sorted(live, key=attrgetter("created"))

    def expireAll(self, owner: str, keep: Session | None = None) -> int:
        """End all sessions of *owner* but *keep*; answers how many: see `IStore`."""
        _check_owner(owner)
        kept = "" if keep is None else keep._record.key
        rows = [row for each in self._owner_keys for row in self._ask(self.take, self._owner(owner, each), kept)]
        _raise_first([self._end(key, raw, "all") for key, raw in rows])
        return len(rows)


class _SQLStore(PersistentStore):
    """The operations in SQL, as SQLite and PostgreSQL have it in common.

    Strategy: writing a record mostly changes no indexed column, which costs a fifth less.  So `due`,
    which is indexed, is never later than the real deadline, and only put right by the sweep that
    comes upon it.
    """

    _relaxed = ""  # ends the condition of what needn't wait for the disk

    def __init__(self, *, secret: Secret, table: str = "minisess", lease: float = 30, clock: Clock = time.time) -> None:
        super().__init__(secret=secret, place=table, lease=lease, clock=clock)
        if not (table.isidentifier() and table.isascii()):
            raise ValueError(f"table= is the name of a table (letters, digits, underscores), not {table!r}")
        self.table = table
        self._create_table = (
            f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, record BYTEA NOT NULL, due DOUBLE PRECISION "
            "NOT NULL, owner TEXT NOT NULL, holder TEXT NOT NULL, until DOUBLE PRECISION NOT NULL); "
            f"CREATE INDEX IF NOT EXISTS {table}_due ON {table} (due); "
            f"CREATE INDEX IF NOT EXISTS {table}_owner ON {table} (owner) WHERE owner <> ''"
        )

    def _sql(self, sql: str, *args: object) -> Any:
        """Run one statement (``?``: a parameter) in its own transaction; its rows, or how many it changed if none."""
        raise NotImplementedError

    def insert(self, key: str, record: bytes, due: float, owner: str) -> None:
        sql = f"INSERT INTO {self.table} VALUES (?, ?, ?, ?, '', 0) ON CONFLICT (key) DO NOTHING"
        self._sql(sql, key, record, due, owner)

    def hold(self, key: str, token: str, now: float, until: float) -> Any:
        sql = (
            f"UPDATE {self.table} SET holder = ?, until = ? WHERE key = ? AND (until <= ? OR holder = ?)"
            f"{self._relaxed} RETURNING record"
        )
        if rows := self._sql(sql, token, until, key, now, token):
            return rows[0][0]
        return HELD if self._sql(f"SELECT 1 FROM {self.table} WHERE key = ?", key) else None

    def read(self, key: str) -> bytes | None:
        rows = self._sql(f"SELECT record FROM {self.table} WHERE key = ?", key)
        return rows[0][0] if rows else None

    def write(self, key: str, token: str, record: bytes, due: float, owner: str) -> bool:
        # The holder stays, so that the same again is answered the same.
        sql = f"UPDATE {self.table} SET record = ?, until = 0 WHERE key = ? AND holder = ? AND owner = ? AND due <= ?"
        if self._sql(sql, record, key, token, owner, due):
            return True
        # It changes hands, or ends earlier than thought; or it isn't ours any more.
        sql = f"UPDATE {self.table} SET record = ?, owner = ?, due = ?, until = 0 WHERE key = ? AND holder = ?"
        return bool(self._sql(sql, record, owner, due, key, token))

    def free(self, key: str, token: str) -> None:
        self._sql(f"UPDATE {self.table} SET until = 0 WHERE key = ? AND holder = ?", key, token)

    def swap(self, key: str, old: bytes, new: bytes | None, due: float) -> bool:
        return bool(self._sql(*self._swap(key, old, new, due)))

    def _swap(self, key: str, old: bytes, new: bytes | None, due: float) -> tuple[Any, ...]:
        """The statement for `swap`, and its parameters."""
        if new is None:
            return f"DELETE FROM {self.table} WHERE key = ? AND record = ?{self._relaxed}", key, old
        sql = f"UPDATE {self.table} SET record = ?, due = ? WHERE key = ? AND record = ?{self._relaxed}"
        return sql, new, due, key, old

    def _tombstone(self, key: str) -> tuple[str, bytes, float]:
        """What stays under *key* for a minute: key, record, until when."""
        end = self.clock() + _REMEMBERED
        return key, _TOMBSTONE + b"%d" % end, end

    def delete(self, key: str) -> bytes | None:
        rows = self._sql(f"DELETE FROM {self.table} WHERE key = ? AND length(record) > 32 RETURNING record", key)
        return rows[0][0] if rows else None

    def due(self, now: float, limit: int) -> list[tuple[str, bytes]]:
        sql = f"SELECT key, record FROM {self.table} WHERE due <= ? AND until <= ? ORDER BY due LIMIT ?"
        return self._sql(sql, now, now, limit)  # type: ignore[no-any-return]

    def owned(self, owner: str) -> list[tuple[str, bytes]]:
        sql = f"SELECT key, record FROM {self.table} WHERE owner = ? AND owner <> ''"
        return self._sql(sql, owner)  # type: ignore[no-any-return]

    def take(self, owner: str, keep: str) -> list[tuple[str, bytes]]:
        sql = f"DELETE FROM {self.table} WHERE owner = ? AND owner <> '' AND key <> ? RETURNING key, record"
        return self._sql(sql, owner, keep)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return int(self._sql(f"SELECT count(*) FROM {self.table} WHERE length(record) > 32")[0][0])


_sqlite_stores: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()


class SQLiteStore(_SQLStore):
    """Sessions in an SQLite file, for all processes of one machine.

    WAL, ``synchronous=NORMAL``: what was saved survives the death of any process; the last moments
    before a power failure may be lost.  A new file can be read by its owner only (0600).  Pages of
    ended sessions are used again; the file itself shrinks by ``VACUUM`` only.  The other
    arguments: see `PersistentStore`.
    """

    # One connection for all threads, used by one at a time; which file it has open, and in which process.
    _connection: Any = None
    _file: Any = None
    _process = 0
    _turn: _Turn | None = None  # while the process forks

    def __init__(
        self, path: Path, *, secret: Secret, table: str = "minisess", lease: float = 30, clock: Clock = time.time
    ) -> None:
        import sqlite3

        if sqlite3.sqlite_version_info < (3, 35):
            raise StoreError(f"SQLiteStore needs SQLite 3.35 or newer (for RETURNING), not {sqlite3.sqlite_version}")
        super().__init__(secret=secret, table=table, lease=lease, clock=clock)
        self.path = os.fspath(path)
        if self.path == ":memory:" or not self.path:
            raise ValueError("SQLiteStore needs a file: a :memory: of its own is what MemoryStore is")
        self.path = os.path.abspath(self.path)
        self._sqlite: Any = sqlite3
        _sqlite_stores.add(self)
        self._ask(self._open)

    def _open(self) -> None:
        """Is the path any good?  It is closed again, for a server may fork now (uWSGI without telling Python)."""
        with self.holds.alone("connection"):
            self._connect()
            self._disconnect()

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path}>"

    def _identify(self) -> Any:
        """Which file is at our path: its device and number, or None."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _connect(self) -> Any:
        """The connection, opened if need be (alone)."""
        if self._connection is not None:
            if self._process != os.getpid():
                raise StoreError(
                    f"the server has forked while {self.path} was open, and didn't tell Python: "
                    "call store.close() before it forks, or let it fork first (uWSGI: --lazy-apps)"
                )
            if self._identify() == self._file:
                return self._connection
            self._disconnect()
            raise StoreError(f"{self.path} was deleted or replaced while it was in use: what was in it is gone")
        # Not by SQLite, which lets others read it; its other files get the rights of this one.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        # Without a GIL a statement that another thread has prepared outlives close(), and with it the open file.
        cached = 128 if getattr(sys, "_is_gil_enabled", lambda: True)() else 0
        options = {"isolation_level": None, "check_same_thread": False, "cached_statements": cached}
        connection = self._sqlite.connect(self.path, timeout=10, **options)
        try:
            # Each write copies a page to the log, and sessions are small: a tenth of the time.  (For new files.)
            pragmas = "PRAGMA page_size=2048; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; "
            connection.executescript(pragmas + self._create_table)
        except BaseException:
            connection.close()
            raise
        self._connection, self._file, self._process = connection, self._identify(), os.getpid()
        return connection

    def _sql(self, sql: str, *args: object) -> Any:
        with self.holds.alone("connection"):
            connection = self._connection
            # Strategy: what saves a session was opened before; to look again whether the file is there takes 3 %.
            if connection is None or "SET record" not in sql:
                connection = self._connect()
            cursor = connection.execute(sql, args)
            return cursor.fetchall() if cursor.description else cursor.rowcount

    def _together(self, *statements: tuple[Any, ...]) -> list[bool]:
        """Run *statements* in one transaction; did each change anything?"""
        with self.holds.alone("connection"):
            connection = self._connect()
            try:
                connection.execute("BEGIN IMMEDIATE")
                done = [connection.execute(sql, args).rowcount > 0 for sql, *args in statements]
                connection.execute("COMMIT")  # not by `with connection`: an exception may come just before its end
            finally:
                if connection.in_transaction:
                    connection.rollback()
        return done

    def settle(self, verdicts: list[tuple[str, bytes, bytes | None, float]]) -> list[bool]:
        return self._together(*(self._swap(*verdict) for verdict in verdicts))

    def move(self, key: str, token: str, to: str, record: bytes, due: float, owner: str, until: float) -> bool:
        sql = f"UPDATE {self.table} SET key = ?, record = ?, due = ?, owner = ?, until = ? WHERE key = ? AND holder = ?"
        insert = f"INSERT INTO {self.table} SELECT ?, ?, ?, '', '', 0 WHERE changes() > 0"
        moving = sql, to, record, due, owner, until, key, token
        return self._together(moving, (insert, *self._tombstone(key)))[0]

    def _disconnect(self) -> None:
        """Close the connection, if there is one (alone)."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close the connection; it opens again when it is needed."""
        with self.holds.alone("connection"):
            self._disconnect()

    __del__ = _disconnect


def _before_fork() -> None:
    """Close what a child mustn't inherit: it would believe that it holds its parent's locks, too."""
    for store in list(_sqlite_stores):
        turn = store.holds.alone("connection")
        turn.__enter__()  # after the statement in flight
        store._turn = turn  # not before: until now another thread may have had its own there
        store._disconnect()


def _after_fork_in_parent() -> None:
    """Let others at the connections again."""
    for store in list(_sqlite_stores):
        if store._turn is not None:
            store._turn.__exit__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)


class PostgresStore(_SQLStore):
    """Sessions in PostgreSQL, for many hosts.  Its table is created on first use.

    *connect* answers a context manager that gives a DB-API connection (of psycopg, psycopg2 or
    pg8000), such as ``psycopg_pool.ConnectionPool(...).connection``.  A connection is taken for one
    statement at a time, so a transaction pooler (PgBouncer) in between will do, but not for pg8000,
    which prepares a statement in one transaction and runs it in the next.  The other arguments: see
    `PersistentStore`.
    """

    # A hold needn't survive a crash of the server, nor what a sweep does, so they don't wait for the disk.
    _relaxed = " AND set_config('synchronous_commit', 'off', true) = 'off'"

    def __init__(
        self, connect: Connect, *, secret: Secret, table: str = "minisess", lease: float = 30, clock: Clock = time.time
    ) -> None:
        if not callable(connect):
            raise TypeError(
                f"connect is called for a connection, {connect!r} can't be: take "
                "psycopg_pool.ConnectionPool('host=...').connection, without parentheses at its end"
            )
        super().__init__(secret=secret, table=table, lease=lease, clock=clock)
        self._connect, self._created = connect, False

    def _sql(self, sql: str, *args: object) -> Any:
        """See `_SQLStore`; the first makes the table, under a lock, since processes that start at once all try."""
        if not self._created:
            if self._execute("SELECT to_regclass(%s)", self.table)[0][0] is None:
                self._execute("SELECT pg_advisory_xact_lock(7306377); " + self._create_table)
            self._created = True
        for attempt in itertools.count():
            try:
                return self._execute(sql.replace("?", "%s"), *args)
            except Exception as error:
                # A serialization failure or deadlock: somebody else was at it, and all can be asked again.
                details = error.args[0] if error.args and isinstance(error.args[0], dict) else {}  # pg8000's
                state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or details.get("C")
                if state not in ("40001", "40P01") or attempt >= 50:
                    raise
                time.sleep(0.001 * (1 + os.urandom(1)[0] / 64))
        raise AssertionError

    def _execute(self, sql: str, *args: object) -> Any:
        """Run one statement on a connection that commits it at once; its rows as tuples, or how many it changed."""
        with self._connect() as connection:
            # One statement, one round trip: without this there would be a BEGIN and a COMMIT.
            before, connection.autocommit = connection.autocommit, True
            cursor = connection.cursor()
            try:
                cursor.execute(sql, args) if args else cursor.execute(sql)
                if not cursor.description:
                    return cursor.rowcount
                return [tuple(row.values()) if isinstance(row, dict) else row for row in cursor.fetchall()]
            finally:
                cursor.close()
                if not getattr(connection, "closed", False):
                    connection.autocommit = before

    def move(self, key: str, token: str, to: str, record: bytes, due: float, owner: str, until: float) -> bool:
        # In place, so that a DELETE that waits for this row finds it afterwards, too.
        sql = (
            f"WITH moved AS (UPDATE {self.table} SET key = ?, record = ?, due = ?, owner = ?, until = ? "
            "WHERE key = ? AND holder = ? RETURNING 1) "
            f"INSERT INTO {self.table} SELECT ?, ?, ?, '', '', 0 FROM moved"
        )
        return bool(self._sql(sql, to, record, due, owner, until, key, token, *self._tombstone(key)))


class RedisStore(PersistentStore):
    """Sessions in Redis (or Valkey), for many hosts.

    *client* is a ``redis.Redis``, also one from Sentinel, or a ``RedisCluster``, without
    decode_responses.  Each session is a hash ``prefix + "{key}"`` with a time to live, so all that
    must be atomic happens to one key.  ``prefix + "due"`` and ``prefix + "owner:..."``, sorted by
    deadline, only serve to find sessions: each is written before the session, again when the
    deadline has moved on by half an hour, and forgets what has expired.  The other arguments: see
    `PersistentStore`.
    """

    # A session that nobody swept goes by itself so many seconds after its end, without callbacks.
    _grace = 3600

    # Each is one call on one key, and answers a repetition like the first time: a record that was
    # deleted stays for a minute as "was", with "by", who did it; one that has moved is a tombstone, with "to".
    _HOLD = """-- ARGV: token, now, until
        local v = redis.call('HMGET', KEYS[1], 'record', 'holder', 'until')
        if not v[1] then return 0 end
        if v[2] and v[2] ~= ARGV[1] and tonumber(v[3]) > tonumber(ARGV[2]) then return 1 end
        if #v[1] > 1 then redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', ARGV[3]) end
        return v[1]"""
    _WRITE = """-- ARGV: token, record, due, owner, ttl, are the indexes right?
        local v = redis.call('HMGET', KEYS[1], 'holder', 'owner', 'due', 'record')
        if not v[4] or v[1] ~= ARGV[1] then return 0 end
        local due, indexed = tonumber(ARGV[3]), tonumber(v[3])
        if ARGV[6] == '1' then redis.call('HSET', KEYS[1], 'due', ARGV[3], 'owner', ARGV[4])
        elseif v[2] ~= ARGV[4] or due < indexed or due > indexed + 1800 then return v[2] end
        redis.call('HSET', KEYS[1], 'record', ARGV[2], 'until', 0)
        redis.call('PEXPIRE', KEYS[1], ARGV[5])
        return 1"""
    _FREE = """-- ARGV: token
        local v = redis.call('HMGET', KEYS[1], 'holder', 'due')
        if v[1] ~= ARGV[1] then return false end
        redis.call('HSET', KEYS[1], 'until', 0)
        return v[2]"""
    _PARK = """-- ARGV: now
        local v = redis.call('HGET', KEYS[1], 'until')
        if v and tonumber(v) > tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'due', 'inf') end"""
    _SWAP = """-- ARGV: old, new, due, ttl or ''
        local v = redis.call('HGET', KEYS[1], 'record')
        if v ~= ARGV[1] then return v == ARGV[2] and 1 or 0 end
        redis.call('HSET', KEYS[1], 'record', ARGV[2], 'due', ARGV[3])
        if ARGV[4] ~= '' then redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
        return 1"""
    _END = """-- ARGV: by, a field, what must be in it or '', the key to which the record moves or ''
        local v = redis.call('HMGET', KEYS[1], 'record', 'owner', 'to', 'by', 'was', ARGV[2])
        if v[4] == ARGV[1] then return {v[5], v[2], false} end
        if not v[1] or v[3] and ARGV[2] ~= 'record' or ARGV[3] ~= '' and v[6] ~= ARGV[3] then
            return {false, false, v[3]}
        end
        redis.call('DEL', KEYS[1])
        redis.call('HSET', KEYS[1], 'by', ARGV[1], 'owner', v[2])
        if ARGV[4] == '' then redis.call('HSET', KEYS[1], 'was', v[1])
        else redis.call('HSET', KEYS[1], 'record', string.char(0), 'to', ARGV[4]) end
        redis.call('PEXPIRE', KEYS[1], 60000)
        return {v[1], v[2], false}"""
    _SCRIPTS = (_HOLD, _WRITE, _FREE, _PARK, _SWAP, _END)

    def __init__(
        self,
        client: Any,
        *,
        secret: Secret,
        prefix: str = "minisess:",
        lease: float = 30,
        clock: Clock = time.time,
    ) -> None:
        super().__init__(secret=secret, place=prefix, lease=lease, clock=clock)
        if not hasattr(client, "register_script"):
            raise TypeError(f"RedisStore takes a client, like redis.Redis.from_url('redis://...'), not {client!r}")
        if client.get_encoder().decode_responses:
            raise ValueError("records are bytes: make the Redis client without decode_responses=True")
        self._client, self._prefix, self._due_index = client, prefix, prefix + "due"
        self._scripts = {script: client.register_script(script) for script in self._SCRIPTS}

    def _place(self, key: str) -> str:
        """The Redis key of a record; what is in braces decides where in a cluster it lies."""
        return f"{self._prefix}{{{key}}}"

    def _owner_index(self, owner: str | bytes) -> str:
        """The Redis key of an owner's sorted set."""
        return f"{self._prefix}owner:{owner if isinstance(owner, str) else owner.decode()}"

    def _eval(self, script: str, key: str, *args: Any) -> Any:
        """Run a script on the record of *key*."""
        registered = self._scripts[script]
        try:
            # Strategy: what Script.__call__ does, with 6 % of a request less.
            return self._client.execute_command("EVALSHA", registered.sha, 1, self._place(key), *args)
        except Exception as error:
            if type(error).__name__ != "NoScriptError":  # the driver's; we don't import drivers
                raise
            return registered([self._place(key)], args)  # loads it into a server that is new

    def _ttl(self, due: float) -> int:
        """Milliseconds; a lifetime without end gets a hundred years."""
        return int(min(max(due - self.clock(), 0) + self._grace, 3.2e9) * 1000)

    def _index(self, key: str, due: float, owner: str | bytes) -> None:
        """Have the record found by its deadline and its owner; forget what has expired there."""
        self._client.zadd(self._due_index, {key: due})
        if owner:
            index, ttl = self._owner_index(owner), self._ttl(due)
            pipeline = self._client.pipeline(transaction=False)
            pipeline.zremrangebyscore(index, "-inf", self.clock() - self._grace)
            pipeline.zadd(index, {key: due})
            pipeline.pttl(index)
            if pipeline.execute()[-1] < ttl:
                self._client.pexpire(index, ttl)

    def _unindex(self, *gone: tuple[str, str | bytes]) -> None:
        """Take the key of each out of the indexes, also out of that of its owner."""
        pipeline = self._client.pipeline(transaction=False)
        for key, owner in gone:
            pipeline.zrem(self._due_index, key)
            if owner:
                pipeline.zrem(self._owner_index(owner), key)
        pipeline.execute()

    def insert(self, key: str, record: bytes, due: float, owner: str) -> None:
        self._put(key, record, due, owner)
        self._index(key, due, owner)  # second, since who finds an entry without a record takes it out

    def _put(self, key: str, record: bytes, due: float, owner: str, **hold: Any) -> None:
        """Write a whole record under *key*, with its time to live."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hset(self._place(key), mapping={"record": record, "due": due, "owner": owner, **hold})
        pipeline.pexpire(self._place(key), self._ttl(due))
        pipeline.execute()

    def hold(self, key: str, token: str, now: float, until: float) -> Any:
        answer = self._eval(self._HOLD, key, token, now, until)
        return {0: None, 1: HELD}[answer] if isinstance(answer, int) else answer

    def read(self, key: str) -> bytes | None:
        return self._client.hget(self._place(key), "record")  # type: ignore[no-any-return]

    def write(self, key: str, token: str, record: bytes, due: float, owner: str) -> bool:
        args = [token, record, due, owner, self._ttl(due)]
        before = done = self._eval(self._WRITE, key, *args, 0)
        if isinstance(before, bytes):
            # It changes hands, or ends earlier than thought, or much later: say so where it is looked for first.
            self._index(key, due, owner)
            done = self._eval(self._WRITE, key, *args, 1)
            if done and before and before != owner.encode():
                self._client.zrem(self._owner_index(before), key)
        return bool(done)

    def free(self, key: str, token: str) -> None:
        if self._eval(self._FREE, key, token) == b"inf":  # perhaps found in use when it was due
            self._client.zadd(self._due_index, {key: self.clock()})

    def swap(self, key: str, old: bytes, new: bytes | None, due: float) -> bool:
        if new is None:
            return bool(self._remove("record", {key: old})[key][0])
        self._index(key, due, self._client.hget(self._place(key), "owner") or b"")
        return bool(self._eval(self._SWAP, key, old, new, due, "" if new == old else self._ttl(due)))

    def _remove(self, field: str, expected: dict[str, Any]) -> dict[str, Any]:
        """Delete the record of each key, if what is expected, or "", is in its *field*; a tombstone only by its record.

        For each key: the record that was deleted, or None; its owner; and the key to which it had moved.
        """
        pipeline, by = self._client.pipeline(transaction=False), secrets.token_hex(8)
        for key, value in expected.items():  # a cluster's pipeline has no eval()
            pipeline.execute_command("EVAL", self._END, 1, self._place(key), by, field, value, "")
        answers = dict(zip(expected, pipeline.execute(), strict=True))
        self._unindex(*((key, owner) for key, (record, owner, _) in answers.items() if record))
        return answers

    def settle(self, verdicts: list[tuple[str, bytes, bytes | None, float]]) -> list[bool]:
        ended = self._remove("record", {key: old for key, old, new, _ in verdicts if new is None})
        return [bool(ended[v[0]][0]) if v[2] is None else self.swap(*v) for v in verdicts]

    def move(self, key: str, token: str, to: str, record: bytes, due: float, owner: str, until: float) -> bool:
        # The new one first, but in no index: whoever deletes all of an owner's follows from the old one to it.
        self._put(to, record, due, owner, holder=token, until=until)
        left = self._eval(self._END, key, to, "holder", token, to)[1]
        if left is None:
            self.delete(to)
            return False
        self._index(to, due, owner)
        self._unindex((key, left))
        if not self._client.hexists(self._place(to), "record"):  # ended before it was in the index
            self._unindex((to, owner))
        return True

    def delete(self, key: str) -> bytes | None:
        return self._remove("owner", {key: ""})[key][0]  # type: ignore[no-any-return]

    def due(self, now: float, limit: int) -> list[tuple[str, bytes]]:
        """See `PersistentStore`; looks on where all that was due is held or gone."""
        while True:
            keys = self._client.zrangebyscore(self._due_index, "-inf", now, start=0, num=limit)
            rows = self._rows(keys, now)
            if rows or len(keys) < limit or limit < 1000:  # else all of them went by themselves, or are held
                return rows

    def _rows(self, keys: list[bytes], now: float) -> list[tuple[str, bytes]]:
        """The records of those *keys* that there are and that nobody holds; the index of deadlines is put right."""
        rows, names, pipeline = [], [key.decode() for key in keys], self._client.pipeline(transaction=False)
        for key in names:
            pipeline.hmget(self._place(key), "record", "until")
        for key, (record, until) in zip(names, pipeline.execute(), strict=True):
            if record is None:
                self._client.zrem(self._due_index, key)
            elif float(until or 0) > now:
                # In use: looked at when it is let go, or when its lease is over.
                self._client.zadd(self._due_index, {key: float(until)})
                self._eval(self._PARK, key, now)
            else:
                rows.append((key, record))
        return rows

    def owned(self, owner: str) -> list[tuple[str, bytes]]:
        return self._rows(self._client.zrange(self._owner_index(owner), 0, -1), _NEVER)

    def take(self, owner: str, keep: str) -> list[tuple[str, bytes]]:
        taken, index = [], self._owner_index(owner)
        listed = keys = [key.decode() for key in self._client.zrange(index, 0, -1) if key != keep.encode()]
        while keys:
            answers = self._remove("owner", dict.fromkeys(keys, owner))
            taken += [(key, record) for key, (record, _, _) in answers.items() if record]
            keys = [to.decode() for _, _, to in answers.values() if to and to != keep.encode()]
        if listed:
            self._client.zrem(index, *listed)
        return taken

    def __len__(self) -> int:
        return int(self._client.zcard(self._due_index))


# Cookies
# ---------------------------------------------------------------------------

# Can it be one of our ids?
_is_uid = re.compile("[A-Za-z0-9_-]{43}").fullmatch


def _all_cookies(header: str, name: str) -> list[str]:
    """The uids in a Cookie header that stand under *name*, whatever else is there; four at most.

    Browsers send the cookie of the longest path first (RFC 6265, 5.4); one of the same name may
    come from another application on this or a parent domain.  Only ";" separates and only blanks
    are trimmed, as browsers do it: else a neighbour's cookie could carry one with a __Host- name.
    """
    pairs = (pair.partition("=") for pair in header.split(";"))
    values = (value.strip(' \t"') for key, _, value in pairs if key.strip(" \t") == name)
    return list(dict.fromkeys(filter(_is_uid, values)))[:4]


def _check_cookie_options(
    name: str, secure: bool | None, samesite: str, domain: str | None, path: str, partitioned: bool
) -> None:
    """Raise ValueError for what RFC 6265 doesn't allow or browsers would refuse."""
    host = "localhost" if domain is None else domain
    for option, value, pattern, rule in (
        ("cookie", name, "[A-Za-z0-9!#$%&'*+.^_`|~-]+", "made of letters, digits and !#$%&'*+-.^_`|~"),
        ("samesite", samesite, "Lax|Strict|None", "'Lax', 'Strict' or 'None'"),
        ("path", path, "/[!-+.-:<-~-]*", "a slash and then visible ASCII characters but ; and ,"),
        ("domain", host, "[.]*[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", "a domain; leave it out for this host alone"),
    ):
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"{option}={value!r}: it is a str, {rule}")
    if secure not in (None, True, False):
        raise ValueError(f"secure={secure!r}: it is True, False or None (by wsgi.url_scheme)")
    if samesite == "None" and not secure:
        raise ValueError("samesite='None' needs secure=True: browsers refuse such cookies without Secure")
    if partitioned and not (samesite == "None" and secure):
        raise ValueError("partitioned=True needs samesite='None' and secure=True: such cookies are for embedded pages")
    if name.lower().startswith(("__host-", "__secure-")):
        if not secure:
            raise ValueError(f"cookie={name!r} needs secure=True: browsers refuse this prefix without Secure")
        if name[2] in "Hh" and (domain is not None or path != "/"):
            raise ValueError(f"cookie={name!r} goes with path='/' and no domain=, that is what the prefix promises")


# WSGI
# ---------------------------------------------------------------------------

# Where the environ has the exchange; a vendored copy of this file has a place of its own.
_KEY = sys.intern(f"{__name__}.session")

# What a response with a new cookie says to shared caches, and what says more.
_NO_CACHE = 'no-cache="Set-Cookie"'
_STRICTER = ("no-store", "private", "no-cache", _NO_CACHE.lower())


def _with_directive(
    headers: list[tuple[str, str]], name: str, directive: str, enough: tuple[str, ...]
) -> list[tuple[str, str]]:
    """*headers* with *directive* in the one header *name*, unless that holds any of *enough* already."""
    others = [(n, v) for n, v in headers if n.lower() != name.lower()]
    values = [v for n, v in headers if n.lower() == name.lower()]
    if any(d.strip().lower() in enough for v in values for d in v.split(",")):
        return list(headers)
    return [*others, (name, ", ".join([*filter(None, values), directive]))]


def _too_late(data: object, headers: object = None, exc_info: Any = None) -> Any:
    """Stands for the server's start_response and write() when the response is over."""
    if exc_info:
        raise exc_info[1]
    raise AssertionError("the response is over, nothing more can be sent (PEP 3333)")


class _Exchange:
    """One request and its response: opens the session when it is first asked for, saves it before the headers leave.

    The application's start_response is recorded, and passed on when the first of its body is
    there (PEP 3333 lets headers go no earlier), so that whatever it does until then counts.
    Only the environ refers to it, so that the hold dies with the request.
    """

    # Strategy: slots, since on Python 3.11 what a class has as defaults takes ten times as long to read.
    __slots__ = (
        "_middleware _outer _start _send _response _sent _over _opened _session _look _secure _came _gone _cookie "
        "__weakref__".split()
    )

    _middleware: SessionMiddleware
    _outer: _Exchange | None  # that of a middleware around this one, with another cookie
    # The server's start_response and write(), until the response is over: a server that keeps the
    # environ, as waitress does, would refer to itself through them, and wait for the garbage collector.
    _start: Any
    _send: Any
    _response: Any  # what the application gave to ours: (status, headers, exc_info)
    _sent: bool  # did the headers leave?
    _over: bool  # is the response over?
    _opened: list[Session]  # what threads of this request have opened at once: the first is everyone's
    _session: Any
    _look: Any  # what `peek` has answered
    _secure: bool  # does the cookie need Secure?  (Known when a session is asked for.)
    _came: str | None  # the uid of the live session that the request came with
    _gone: bool  # has that ended while this request held it?
    _cookie: str | None  # a Set-Cookie header

    @property
    def _patience(self) -> float:
        return self._middleware.patience

    # The session

    def open(self, environ: dict[str, Any], peeking: bool = False) -> Any:
        """The live session that the request has a cookie of, or else a new one (None for who only looks)."""
        middleware, session, tried = self._middleware, None, ""
        self._came, self._cookie, self._gone = None, None, False
        self._secure = secure = environ["wsgi.url_scheme"] in middleware._secure_schemes
        header = environ.get("HTTP_COOKIE")
        if header is not None:
            # Strategy: in a well-formed header the value stands after "; name=".  Finding it there takes
            # 0.15 us whatever the header's length, http.cookies 6 to 17.
            uid = ("; " + header).partition(middleware._marks[secure])[2].partition(";")[0]
            if middleware._may_be_uid(uid):
                tried, store = uid, middleware.store
                session = store.peek(uid, self) if peeking else store.open(uid, middleware.patience, self)
            if session is None or session is MOVED:
                session = self._search(uid, header, tried, session, peeking)
            else:
                self._came = uid
        if session is None or session is MOVED:
            if peeking:
                return None
            session = self._create(session is MOVED)
            if not secure and environ.get("HTTP_X_FORWARDED_PROTO") == "https":
                middleware._warn_of_proxy()
        elif peeking:
            return session
        if self._sent:
            middleware._warn_of_vary(self._response[1])
        self._opened.append(session)
        self._session = session = self._opened[0]
        if self._over:  # it has ended while a thread of it opened this
            session._store.release(session)
        return session

    def _search(self, uid: str, header: str, tried: str, found: Any, peeking: bool) -> Any:
        """Look at the other cookies, of which one may be the right one; most often there is no other."""
        middleware, name = self._middleware, self._middleware._names[self._secure]
        is_only = _is_uid(uid) and header.count(name) == 1
        for each in [uid] if is_only else _all_cookies(header, name):
            if each != tried:
                store = middleware.store
                answer = store.peek(each, self) if peeking else store.open(each, middleware.patience, self)
                if answer is not None and answer is not MOVED:
                    self._came = each
                    return answer
                found = answer or found
            if _logger.isEnabledFor(logging.INFO):
                handle = _hash(each, getattr(middleware.store, "place", ""))[:16]
                _log(logging.INFO, "unknown", handle, "has moved on, or isn't known (any more)")
        return found

    def peek(self, environ: dict[str, Any]) -> Session | None:
        """The session as it was last saved, or the one that this request has opened."""
        found = self._session
        if found is None:
            if self._look is _MISSING:
                self._look = self.open(environ, peeking=True)
            found = self._look
        return None if found is None or found._record.state is _ENDED else found

    def again(self, session: Session) -> Session:
        """*session*, which has let go of its record or ended, or what comes after it."""
        if session._record.state is not _ENDED and not self._over:
            session._store.refresh(session)
        record = session._record
        if record.state is not _ENDED or self._sent:
            return session
        self._gone = self._gone or record.hold is session._token
        moved = not self._gone and self._came is not None and self._middleware.store.peek(self._came) is MOVED
        self._session = session = self._create(moved)
        self._opened = [session]
        return session

    def _create(self, moved: bool = False) -> Session:
        """A new session; a stand-in that is never stored, if what the request came with has moved on."""
        if self._sent or self._over:
            raise SessionError(
                "the headers have left, so a new session couldn't send its cookie: "
                "call ISession(environ) before the first piece of the body"
            )
        middleware = self._middleware
        session: Session = middleware.store.create(middleware.lifetime, middleware.max_lifetime)
        session._token = ref(self)
        if moved:
            session._record.state = _MOVED
        return session

    # The response

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """PEP 3333's start_response, for the application."""
        if self._response is None or exc_info is not None and not self._sent:
            self._response = status, headers, exc_info
            return self  # it is its own write(): a bound method would take 3 % of a request without a session
        if exc_info is None:
            raise AssertionError("start_response was called twice without exc_info (PEP 3333)")
        # A server that has the headers still may replace them, it raises exc_info otherwise.
        try:
            return self._start(status, headers if self._session is None else self._dress(headers), exc_info)
        finally:
            exc_info = None  # its traceback refers to this frame

    def __call__(self, data: bytes) -> None:
        """PEP 3333's write(), for the application."""
        if not self._sent:
            self.commit()
        self._send(data)

    def commit(self) -> None:
        """Save the session, unless the request has failed, and let the headers leave.

        A response carries the id of its record, if that isn't the id its request came with and the
        record lives; it deletes the cookie, if the record ended while this request held it.
        """
        if self._response is None:
            raise AssertionError("the application answered without calling start_response (PEP 3333)")
        status, headers, exc_info = self._response
        session = self._session
        if session is not None:
            middleware, record = self._middleware, session._record
            # The uid is read before the hold is let go of: afterwards it may be another's.
            uid, refreshed = record.uid, False
            if status >= "5":
                self.abort()
            elif session._base is not None:
                session._store.save_late(session)
            elif record.state is not _ENDED:
                if record.forgotten is not None or middleware.persistent:
                    refreshed = middleware._renew_cookie(record)
                middleware.store.save(session)
            record = session._record  # another, if it was found to have moved
            if record.state is _STORED:
                if uid != self._came or refreshed:
                    self._cookie = middleware._set_cookie(self._secure, uid, record)
            elif self._came is not None and (self._gone or record.state is _ENDED and record.hold is session._token):
                self._cookie = middleware._delete_cookie(self._secure)
            if self._over and session._base is not None:
                session._store.leave(session)
            headers = self._dress(headers)
        elif self._look is not _MISSING:
            headers = self._dress(headers)
        self._sent, start = True, self._start
        if exc_info is None:
            self._send = start(status, headers)
        else:
            self._response = status, headers, None
            try:
                self._send = start(status, headers, exc_info)
            finally:
                exc_info = None  # its traceback refers to this frame

    def _dress(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The application's headers and ours, in a list of our own (theirs may be a constant)."""
        cookie = self._cookie
        # Strategy: most responses have neither Vary nor Cache-Control, which lengths tell for half the price (8 %).
        for name, _ in headers:
            if len(name) in {4, 13}:
                headers = _with_directive(headers, "Vary", "Cookie", ("*", "cookie"))
                if cookie is not None:
                    headers = _with_directive(headers, "Cache-Control", _NO_CACHE, _STRICTER)
                break
        else:
            if cookie is None:
                return [*headers, ("Vary", "Cookie")]
            headers = [*headers, ("Vary", "Cookie"), ("Cache-Control", _NO_CACHE)]
        return headers if cookie is None else [*headers, ("Set-Cookie", cookie)]

    # The end

    def abort(self) -> None:
        """The request failed: let go of its session, save nothing."""
        session = self._session
        if session is None:
            return
        if session._record.state in (_NEW, _MOVED):
            session._record.clear()
            return
        try:
            self._middleware.store.release(session)
        except SessionError as error:
            _log(logging.WARNING, "failed", session.handle, "wasn't let go, its lease will end: %s", error)

    def close(self) -> None:
        """The response is over.  What a body did to its session while it was sent is saved now."""
        session = self._session
        self._over = True
        try:
            if not self._sent or self._response[0] >= "5":
                self.abort()
            elif session is not None and session._record.state is _STORED:
                late = session._base is not None
                session._store.save_late(session) if late else self._middleware.store.save(session)
        except SessionConflict as error:
            assert session is not None
            _log(logging.ERROR, "conflict", session.handle, "after the headers had left: %s", error)
        except BaseException:
            self.abort()
            raise
        finally:
            self._sent, self._response = True, ("", [], None)
            self._start = self._send = _too_late
            if session is not None:
                session._store.leave(session)

    def finish(self, body: Any) -> None:
        """Close the application's *body*, which may still use the session, and this."""
        try:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        finally:
            self.close()


class _Body:
    """The application's body, if it isn't a list: its first piece, or its end, lets the headers leave."""

    __slots__ = ("_exchange", "_result", "_iterator")

    def __init__(self, exchange: _Exchange, result: Iterable[bytes]) -> None:
        self._exchange, self._result = exchange, result
        self._iterator = iter(result)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The next piece; the headers leave before the first."""
        exchange = self._exchange
        try:
            chunk = next(self._iterator, _MISSING)
            if not exchange._sent:  # write() may have been called
                exchange.commit()
        except BaseException:
            if not exchange._sent:  # some servers don't call close() then
                exchange.abort()
            raise
        if chunk is _MISSING:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """PEP 3333: the server calls it, whatever happened."""
        self._exchange.finish(self._result)

    def __del__(self) -> None:
        """A server that forgets close() doesn't leave the session locked."""
        exchange = getattr(self, "_exchange", None)  # an exception may have come before there was one
        if exchange is not None and not exchange._over:
            exchange.close()


def _as_store(store: object) -> Any:
    """*store*, or what it adapts to; TypeError for what only looks like one."""
    if store is None:
        return MemoryStore()
    if isinstance(store, type):
        raise TypeError(f"a store is an object, {store.__name__} is a class: write {store.__name__}(...)")
    if isinstance(store, (str, os.PathLike)):
        raise TypeError(f"a store is an object, not {store!r}: take SQLiteStore({str(store)!r}, secret=...)")
    return IStore(store)


class SessionMiddleware:
    """Wrap a WSGI application so that ``ISession(environ)`` is the visitor's session (PEP 3333).

    *store*: whatever adapts to `IStore`; None is a `MemoryStore` of its own.
    *cookie*: the cookie's name; over https it gets the prefix ``__Host-``, or ``__Secure-``.
    *lifetime*: seconds without a request after which a session ends (``session.setLifetime`` overrides it).
    *max_lifetime*: seconds after which it ends whatever happens.  None is no limit, for both.
    *patience*: seconds that a request waits for another of the same session, before `SessionBusy`.
    *secure*: True where a proxy ends TLS; None goes by ``wsgi.url_scheme``; False never sets Secure.
    *samesite*, *domain*, *path*: as in RFC 6265bis.  Outside *path* there is no session.
    *partitioned*: the cookie is kept apart for each site that embeds this one (CHIPS).
    *persistent*: the cookie outlives the browser (Max-Age), as long as the session does.  (It has
    nothing to do with `PersistentStore`; for those who tick "remember me" it is ``login(remember=)``.)

    A request's way::

        SessionMiddleware     puts an exchange into the environ, calls the application
        ISession(environ)     the exchange finds the cookie, the store opens and holds the session
                              (it waits while another request holds it)
        IFoo(session)         the component kept for IFoo, or a new one from the adapter
        start_response        recorded, not yet sent
        first piece of body   the session is saved, if anything is kept on it; the next request may
                              begin; the headers leave, with Vary, and Set-Cookie if the id is new
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        store: object = None,
        *,
        cookie: str = "sid",
        lifetime: float | None = 1800,
        max_lifetime: float | None = 43200,
        patience: float = 10,
        secure: bool | None = None,
        samesite: str = "Lax",
        domain: str | None = None,
        path: str = "/",
        partitioned: bool = False,
        persistent: bool = False,
    ) -> None:
        if not callable(app):
            raise TypeError(f"{app!r} isn't a WSGI application, it can't be called")
        if not isinstance(patience, (int, float)) or not patience >= 0:
            raise ValueError(f"patience is a number of seconds, not {patience!r}")
        _check_cookie_options(cookie, secure, samesite, domain, path, partitioned)
        self.app, self.cookie, self.path, self.store = app, cookie, path, _as_store(store)
        self.lifetime, self.max_lifetime = _seconds(lifetime, "lifetime"), _seconds(max_lifetime, "max_lifetime")
        _check_lifetimes(self.lifetime, self.max_lifetime, "give SessionMiddleware a larger max_lifetime=, or None")
        self.patience, self.secure, self.persistent = patience, secure, persistent
        self._has_default_store = store is None
        self._secure_schemes = {None: ("https",), True: ("http", "https"), False: ()}[secure]
        # What may be a session's id.  Strategy: what is in the dict is well-formed, and finding it
        # there takes a tenth of checking its characters.
        self._may_be_uid: Any = _is_uid
        if isinstance(self.store, MemoryStore):
            self._may_be_uid = self.store._records.__contains__
        prefix = "__Host-" if path == "/" and domain is None else "__Secure-"
        # Each of these for http and for https: the cookie's name, how it begins in a header, what follows its value.
        self._names = (cookie, cookie if secure is False or cookie.startswith("__") else prefix + cookie)
        self._marks = tuple(f"; {name}=" for name in self._names)
        attributes = f"; Path={path}" + (f"; Domain={domain}" if domain else "") + f"; HttpOnly; SameSite={samesite}"
        self._attributes = (attributes, attributes + "; Secure" + ("; Partitioned" if partitioned else ""))
        self._warned: set[str] = set()

    def _renew_cookie(self, record: _Record) -> bool:
        """Has a tenth of the cookie's Max-Age gone?  Then *record* notes that there will be another."""
        now = self.store.clock()
        sent, end = record.cookie or (now, now)
        if 0 <= now - sent < (end - sent) / 10:
            return False
        record.cookie = now, min(now + record.lifetime, record.since + record.max_lifetime)
        return True

    def _set_cookie(self, secure: bool, uid: str, record: _Record) -> str:
        """The Set-Cookie header for *uid*, with Max-Age if *record* says until when (RFC 6265)."""
        age = ""
        if record.cookie is not None:
            # Browsers keep a cookie for 400 days at most.
            age = f"; Max-Age={round(min(record.cookie[1] - record.cookie[0], 34560000))}"
        return f"{self._names[secure]}={uid}{self._attributes[secure]}{age}"

    def _delete_cookie(self, secure: bool) -> str:
        """The Set-Cookie header that takes the cookie away."""
        end = "; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT"
        return f"{self._names[secure]}={self._attributes[secure]}{end}"

    def _warn(self, event: str, place: str, message: str) -> None:
        """Log a warning, once for each *place*."""
        if place not in self._warned:
            self._warned.add(place)
            _log(logging.WARNING, event, "-", message)

    def _warn_of_proxy(self) -> None:
        """TLS seems to end at a proxy, and nobody has told us."""
        if self.secure is None:
            self._warn(
                "insecure",
                "proxy",
                "a proxy says X-Forwarded-Proto: https, but the scheme is http, so cookies aren't Secure: "
                "SessionMiddleware(secure=True), or let the server set wsgi.url_scheme",
            )

    def _warn_of_vary(self, headers: list[tuple[str, str]]) -> None:
        """The session is first used when the headers have left; they don't keep caches off."""
        if not any(name.lower() == "vary" and ("cookie" in value.lower() or "*" in value) for name, value in headers):
            frame: Any = sys._getframe()
            while frame.f_back is not None and frame.f_globals is globals():
                frame = frame.f_back
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self._warn(
                "vary",
                place,
                f"{place} uses the session first when the headers have left without Vary: Cookie, so a cache may give "
                "the response to others: call ISession(environ) before the first piece of the body",
            )

    def _covers(self, environ: dict[str, Any]) -> bool:
        """Is the request within the cookie's path?  (RFC 6265, 5.1.4)"""
        path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        ours = self.path
        return path == ours or path.startswith(ours if ours.endswith("/") else ours + "/")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """PEP 3333's application: calls the one that is wrapped, with a session at hand.

        Within another SessionMiddleware of the same cookie it does nothing; one with another cookie gets
        an environ of its own.
        """
        outer = None
        if self.path != "/" and not self._covers(environ):
            return self.app(environ, start_response)
        if _KEY in environ:
            outer = environ[_KEY]
            if outer is None or outer._sent:  # of an earlier request with this environ, somebody tries again
                outer = None
            same = outer
            while same is not None and same._middleware.cookie != self.cookie:
                same = same._outer
            if same is not None:
                self._check_same_store(same._middleware)
                return self.app({**environ, _KEY: same} if same is not outer else environ, start_response)
            environ = environ.copy()  # so that there are two sessions, each where it belongs
        # Strategy: an __init__ would take longer than all of its assignments.
        exchange = environ[_KEY] = _Exchange()
        exchange._middleware, exchange._outer, exchange._start = self, outer, start_response
        exchange._session = exchange._response = result = None
        exchange._sent = exchange._over = False
        exchange._opened, exchange._look = [], _MISSING
        try:
            result = self.app(environ, exchange.start_response)
            if type(result) is list or isinstance(result, (list, tuple)) or self._is_file(environ, result):
                exchange._over = True
                if exchange._sent:  # by write()
                    exchange.close()
                else:
                    exchange.commit()
                exchange._start = exchange._send = _too_late
                return result
            return _Body(exchange, result)
        except BaseException:
            exchange.finish(result)  # nobody else will
            raise

    def _is_file(self, environ: dict[str, Any], result: object) -> bool:
        wrapper = environ.get("wsgi.file_wrapper")
        return isinstance(wrapper, type) and isinstance(result, wrapper)

    def _check_same_store(self, outer: SessionMiddleware) -> None:
        """Raise if two middlewares would fight for one cookie."""
        if not self._has_default_store and self.store is not outer.store:
            raise SessionError(
                f"two SessionMiddlewares, one in the other, use the cookie {self.cookie!r} but different stores: "
                "give one of them another name (cookie=), or both the same store"
            )


def _environ(request: object) -> dict[str, Any]:
    """The environ of a framework's request, by the names they have for it."""
    if type(request) is dict:
        return request
    for name in ("environ", "env", "wsgi_environ"):
        environ = getattr(request, name, None)
        if isinstance(environ, dict):
            return environ
    return request if isinstance(request, dict) else {}


def _session_of_environ(environ: dict[str, Any]) -> Any:
    """The adapter from an environ to its session; None where there is no middleware."""
    exchange = environ.get(_KEY)
    if exchange is None:
        return None
    session = exchange._session
    if session is None:
        # When the response is over, an error page around the middleware may still look.
        return (exchange.peek(environ) or exchange._create()) if exchange._over else exchange.open(environ)
    if session._base is not None or session._record.state is _ENDED:
        return exchange.again(session)
    return session


registerAdapter(_session_of_environ, dict, ISession)
registerAdapter(lambda request: _session_of_environ(_environ(request)), object, ISession)


def peek(request: object) -> Session | None:
    """The visitor's session as it was last saved, or None; for requests that only look, which are most.

    *request* is what ISession takes.  It holds nothing, waits for nobody, creates nothing, and
    writes nothing, but that once in an eighth of the lifetime the idle clock starts again.  To set
    anything on it is an error; a component that an adapter makes for it isn't kept.  The response
    gets ``Vary: Cookie``.  After ``ISession(environ)`` in the same request it answers that session.

    In a MemoryStore components are live objects: what another request does to them is seen.
    """
    environ = _environ(request)
    exchange: _Exchange | None = environ.get(_KEY)
    if exchange is None:
        raise CannotAdapt(request, ISession, ISession.__advice__)
    return exchange.peek(environ)
