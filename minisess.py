"""Server-side sessions that hold typed components, for any WSGI application: one file, no dependencies.

You *adapt* a request to its session, and a session to what you want of it::

    from minisess import Interface, ISession, Session, SessionMiddleware, implementer, registerAdapter

    class ICounter(Interface):
        hits: int

    @implementer(ICounter)
    class Counter:
        def __init__(self, session):
            self.hits = 0

    registerAdapter(Counter, Session, ICounter)

    def app(environ, start_response):
        counter = ICounter(ISession(environ))     # made on first use, the same object ever after
        counter.hits += 1
        ...

    application = SessionMiddleware(app)

The vocabulary is that of Nevow and Twisted (2004).  The file reads from top to bottom, and
each section uses only what stands above it:

    Errors             what can go wrong, and what to do about it; how it is logged
    Interfaces         Interface, implementer, registerAdapter: how IFoo(obj) finds its answer
    Components         Componentized, Adapter: objects that remember what they were adapted to
    Sessions           ISession, Session: one visitor's components, attributes and deadlines
    Memory store       IStore, MemoryStore: what every store promises, and the one for one process
    Persistent stores  sealed records for many processes and hosts: SQLite, PostgreSQL, Redis
    Cookies            reading one, writing one
    WSGI               SessionMiddleware: each request gets its session, each response its headers
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

import copyreg
import gc
import io
import os
import pickle
import sys
import time
import weakref
from heapq import heapify, heappop, heappush
from operator import attrgetter
from threading import Condition, RLock, get_ident

TYPE_CHECKING = False  # As typing's, which takes 5 ms to import.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, TypeVar, overload

    D = TypeVar("D")
    I = TypeVar("I", bound="Interface")  # noqa: E741
    T = TypeVar("T")

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterRegistry",
    "CannotAdapt",
    "Componentized",
    "DuplicateAdapter",
    "GuardSession",
    "HELD",
    "ISession",
    "IStore",
    "Interface",
    "InterfaceMeta",
    "MemoryStore",
    "NotStorable",
    "PersistentStore",
    "PostgresStore",
    "RedisStore",
    "SQLiteStore",
    "SealError",
    "Session",
    "SessionBusy",
    "SessionConflict",
    "SessionError",
    "SessionMiddleware",
    "StoreError",
    "implementedBy",
    "implementer",
    "providedBy",
    "registerAdapter",
    "registry",
    "storable",
]


# Errors
# ---------------------------------------------------------------------------


class SessionError(Exception):
    """Base of all errors of this module."""

    def __reduce__(self) -> Any:
        # They take the objects they speak of and keep a message: pickle brings back both.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class CannotAdapt(SessionError, TypeError):
    """*original* has no answer for *interface*, and no default was given."""

    def __init__(self, original: object, interface: type, advice: str | None = None) -> None:
        #: The object that was to be adapted, and the interface asked for.
        self.original, self.interface = original, interface
        kind, name = type(original).__name__, interface.__name__
        super().__init__(
            f"cannot adapt {kind} to {name}: "
            + (advice or f"registerAdapter(factory, {kind}, {name}), or give a default: {name}(obj, None)")
        )


class DuplicateAdapter(SessionError, ValueError):
    """There is an adapter for this pair already; ``registry.unregister`` it first."""

    def __init__(self, factory: object, original: type, interface: type) -> None:
        #: The factory that was registered before, and the pair it serves.
        self.factory, self.original, self.interface = factory, original, interface
        super().__init__(
            f"{original.__name__} has an adapter to {interface.__name__} already, {factory!r}: "
            "take it out with registry.unregister before you register another"
        )


class SessionBusy(SessionError, TimeoutError):
    """Another request of the same session didn't let go of it within *patience* seconds."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        super().__init__(
            f"another request has held this session for over {patience:g} s: make that request shorter, "
            "let it call session.release() before its slow part, or raise SessionMiddleware(patience=)"
        )


class SessionConflict(SessionError, RuntimeError):
    """The request outlasted its lease, and a later one changed the session: nothing was saved."""

    def __init__(self, lease: float) -> None:
        self.lease = lease
        super().__init__(
            f"the request took longer than its lease of {lease:g} s and another one has changed the session "
            "meanwhile; nothing was saved: raise lease=, or call session.release() before the slow part"
        )


class StoreError(SessionError):
    """The store can't be reached or can't do what was asked; the session is as it was."""


class NotStorable(StoreError, TypeError):
    """A component (or attribute) can't be written to a persistent store."""

    def __init__(self, name: str, offender: str) -> None:
        #: What is kept on the session, and what in it can't be stored.
        self.name, self.offender = name, offender
        super().__init__(
            f"{name} can't be stored, it contains {offender}: decorate a class with @storable (or @implementer), "
            "leave open files, locks and functions out of components (see __getstate__), or use a MemoryStore"
        )


class SealError(SessionError, ValueError):
    """A record isn't what this store wrote.  Stores turn it into "no such session" and log it."""


_SALT = os.urandom(16)


def _tag(uid: str) -> str:
    """Eight characters that stand for *uid* in logs: the same within a process, useless outside it."""
    from hashlib import blake2b

    return blake2b(uid.encode(), key=_SALT, digest_size=4).hexdigest()


_logger: Any = None


def _log(level: int, uid: str, message: str, *args: object, exc_info: bool = False) -> None:
    """Log to ``logging.getLogger("minisess")`` what happened to the session *uid*, which is never shown.

    *level* is logging's: 20 for what is as it should be, 30 for what isn't, 40 for somebody's mistake.

    Strategy: importing logging takes longer than all else here together.  While nobody has
    imported it nobody listens, except to warnings (30 and up), which Python shows by itself.
    """
    global _logger
    if _logger is None:
        if "logging" not in sys.modules and level < 30:
            return
        import logging

        _logger = logging.getLogger("minisess")
    if _logger.isEnabledFor(level):
        _logger.log(level, "session %s " + message, _tag(uid), *args, exc_info=exc_info)


# Interfaces
# ---------------------------------------------------------------------------


class _Missing:
    """The type of "no such argument", for which None won't do."""


_MISSING: Any = _Missing()

# What an interface remembers of a type, besides None (nothing) and a callable (the adapter):
_ITSELF: Any = object()  # the object is the answer
_KEPT: Any = object()  # look at what obj keeps, see Componentized

# What is remembered, by interface and type; see AdapterRegistry.plan.
_plans: dict[type, dict[type, Any]] = {}

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
            zope.interface does, costs five times as much for objects that have none.
            """
            try:
                plan = _plans[cls][type(obj)]
            except KeyError:
                plan = cls.registry.plan(cls, type(obj))
            if plan is _KEPT:
                if obj._first_interface is cls:
                    return obj._first_component
                answer = obj._others.get(cls)
                if answer is None:
                    answer = type(obj).__conform__(obj, cls)
                if answer is not None:
                    return answer
            elif plan is _ITSELF:
                return obj
            elif plan is not None:
                answer = plan(obj)
                if answer is not None:
                    return answer
            if default is _MISSING:
                raise CannotAdapt(obj, cls, cls.__advice__)
            return default

    def implementedBy(cls, other: type) -> bool:
        """Do instances of class *other* provide this interface?  The same as ``issubclass(other, cls)``."""
        return isinstance(other, type) and cls in cls.registry.order(other)

    def providedBy(cls, obj: object) -> bool:
        """Does *obj* provide this interface?  The same as ``isinstance(obj, cls)``."""
        return cls in cls.registry.order(type(obj))

    def __subclasscheck__(cls, other: type) -> bool:
        return cls.implementedBy(other)

    def __instancecheck__(cls, obj: object) -> bool:
        return cls.providedBy(obj)


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

# Guards declarations, registrations and what is worked out from them; look-ups that are
# remembered take no lock.
_lock = RLock()


def _require_interfaces(interfaces: Iterable[object]) -> None:
    for interface in interfaces:
        if not isinstance(interface, InterfaceMeta):
            raise TypeError(f"{interface!r} isn't an interface: subclass minisess.Interface")


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
        for candidate in (s[0] for s in sequences):
            if not any(candidate in s[1:] for s in sequences):
                break
        else:
            return None
        merged.append(candidate)
        for s in sequences:
            if s[0] is candidate:
                del s[0]
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


class AdapterRegistry:
    """Adapter factories by what they adapt from and to.  `registry` is the one that interfaces ask."""

    # What `order` worked out; it depends on declarations only, so all registries share it.
    _orders: dict[type, tuple[type, ...]] = {}

    def __init__(self) -> None:
        self._factories: dict[type, dict[type, Any]] = {}
        # All target interfaces, in the order in which they are tried for one of their bases:
        # a derived interface after its bases, and of unrelated ones the newest first (as zope.interface).
        self._targets: list[type] = []
        # What was worked out, until something changes:
        self._found: dict[tuple[type, type], Any] = {}

    def register(self, factory: Callable[[Any], object], original: type, *interfaces: type) -> None:
        """Make ``factory(obj)`` adapt objects of *original*, a class or an interface, to each of *interfaces*.

        Raises `DuplicateAdapter` if a pair is taken (by the same factory, too) and TypeError for
        what can't be an adapter; then nothing of the call is registered.
        """
        if not callable(factory):
            raise TypeError(f"an adapter factory is called with the object to adapt, {factory!r} can't be called")
        if not isinstance(original, type):
            raise TypeError(f"adapters are registered for a class or an interface, not for {original!r}")
        if not interfaces:
            raise TypeError("registerAdapter(factory, original, *interfaces) needs at least one interface")
        _require_interfaces(interfaces)
        with _lock:
            interfaces = tuple(dict.fromkeys(interfaces))
            known = self._factories.setdefault(original, {})
            for interface in interfaces:
                if interface in known:
                    raise DuplicateAdapter(known[interface], original, interface)
            for interface in interfaces:
                known[interface] = factory
                if interface not in self._targets:
                    above = set(self.order(interface))
                    bases = [t for t in self._targets if t in above]
                    others = [t for t in self._targets if t not in above]
                    self._targets = [*bases, interface, *others]
            if isinstance(factory, type):
                _storables[_name(factory)] = factory
            self.forget()

    def unregister(self, factory: Callable[[Any], object], original: type, *interfaces: type) -> None:
        """Undo `register` of the same arguments.  Raises KeyError for what isn't registered."""
        with _lock:
            interfaces = tuple(dict.fromkeys(interfaces))
            known = self._factories.get(original, {})
            for interface in interfaces:
                if interface not in known or known[interface] != factory:
                    raise KeyError((factory, original, interface))
            for interface in interfaces:
                del known[interface]
            if not known:
                self._factories.pop(original, None)
            targets = {t for known in self._factories.values() for t in known}
            self._targets = [t for t in self._targets if t in targets]
            self.forget()

    def lookup(self, original: type, interface: type, default: Any = None) -> Any:
        """The factory that adapts objects of *original*, a class or an interface, to *interface*, or *default*.

        The most specific source wins; for one source, an adapter registered for a derived
        interface also answers for its bases, the closest first.
        """
        for source in self.order(original):
            known = self._factories.get(source)
            if known:
                if interface in known:
                    return known[interface]
                for target in self._targets:
                    if target in known and issubclass(target, interface):
                        return known[target]
        return default

    def order(self, node: type) -> tuple[type, ...]:
        """The classes and interfaces from *node* upwards, most specific first: C3, as zope.interface has it.

        Declarations that C3 can't order (a base before its derived interface) fall back on depth
        first, which still puts the derived one first.  `Interface` is always last.
        """
        order = self._orders.get(node)
        if order is None:
            with _lock:
                bases = _bases(node)
                merged = _merge([[node], *(list(self.order(base)) for base in bases), list(bases)])
                rest = (n for n in merged or _depth_first(node) if n is not Interface)
                order = self._orders[node] = (*rest, Interface)
        return order

    def direct(self, interface: Any, kind: type) -> Any:
        """How objects of type *kind* adapt to *interface* when they have no say in it."""
        plan = self._found.get((kind, interface), _MISSING)
        if plan is _MISSING:
            with _lock:
                plan = _ITSELF if interface in self.order(kind) else self.lookup(kind, interface)
                self._found[kind, interface] = plan
        return plan

    def plan(self, interface: Any, kind: type) -> Any:
        """Find out, and let *interface* remember, how objects of type *kind* adapt to it."""
        if kind is _Missing:
            raise TypeError(f"{interface.__name__}() needs the object to adapt: {interface.__name__}(session)")
        with _lock:
            plan = self.direct(interface, kind)
            conform = _special(kind, "__conform__")
            if conform is not None:
                if _keepers.issuperset([conform, _special(kind, "getComponent")]):
                    plan = _KEPT
                else:
                    plan = _conforming(conform, interface, kind, plan)
            _plans.setdefault(interface, {})[kind] = plan
        return plan

    def forget(self) -> None:
        """Drop all that was worked out: it may be wrong by now, and it keeps classes alive."""
        self._orders.clear()
        self._found.clear()
        _plans.clear()


registry = InterfaceMeta.registry = AdapterRegistry()


def _forget_on_collection(phase: str, info: dict[str, int]) -> None:
    """Let classes that only look-ups remember be collected.

    Strategy: a class dies in the garbage collector only (it refers to itself), so plain dicts by
    type will do if they are emptied before each full collection.  Weak keys take 25 % longer.
    """
    if phase == "start" and info["generation"] == 2:
        registry.forget()


gc.callbacks.append(_forget_on_collection)


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
                _storables[_name(cls)] = cls
            registry.forget()
        return cls

    return declare


def implementedBy(cls: type) -> tuple[type, ...]:
    """The interfaces declared on *cls* and its base classes (without their bases), most specific first."""
    declared = {i for base in cls.__mro__ for i in _declared.get(base, ())}
    return tuple(i for i in registry.order(cls) if i in declared)


def providedBy(obj: object) -> tuple[type, ...]:
    """The interfaces declared for the class of *obj*, most specific first."""
    return implementedBy(type(obj))


def registerAdapter(factory: Callable[[Any], object], original: type, *interfaces: type) -> None:
    """Make ``IFoo(obj)`` answer ``factory(obj)`` for objects of *original*, a class or an interface.

    As twisted.python.components.registerAdapter; see `AdapterRegistry.register` for the errors.
    An exception in *factory* propagates; if it answers None, ``IFoo(obj)`` can't adapt.
    """
    registry.register(factory, original, *interfaces)


# Components
# ---------------------------------------------------------------------------


_NO_OTHERS: dict[Any, Any] = {}  # nobody writes into it


class Componentized:
    """An object that remembers what it was adapted to, as twisted.python.components.Componentized.

    ``IFoo(obj)`` answers the component kept for IFoo, or makes one by the registered adapter and
    keeps it.  An adapter class with a true ``temporaryAdapter`` isn't kept; one with a true
    ``multiComponent`` is kept under every interface that it provides and is the adapter for.
    """

    # Strategy: most sessions keep one component, so one has fields of its own and the dict comes
    # with the second: 200 bytes less, and found in half the time.  Where `_first_interface` is right,
    # `_first_component` is, too: it is set before and taken away after, and under the GIL no other
    # thread comes between reading the two (unless a trace function lets it).
    _first_interface: Any
    _first_component: Any
    _others: dict[Any, Any]

    def __init__(self) -> None:
        self._first_interface = self._first_component = None
        self._others = _NO_OTHERS

    def _kept(self) -> list[tuple[Any, Any]]:
        """All (interface, component), in no order."""
        interface, component, others = self._first_interface, self._first_component, list(self._others.items())
        return others if interface is None else [(interface, component), *others]

    def _keep(self, interface: Any, component: Any) -> None:
        # By object.__setattr__, for classes whose own protects their fields.
        if self._first_interface is interface or (self._first_interface is None and interface not in self._others):
            object.__setattr__(self, "_first_component", component)
            object.__setattr__(self, "_first_interface", interface)
        elif self._others is _NO_OTHERS:
            object.__setattr__(self, "_others", {interface: component})
        else:
            self._others[interface] = component

    def _drop(self, interface: Any) -> None:
        if self._first_interface is interface:
            object.__setattr__(self, "_first_interface", None)
            object.__setattr__(self, "_first_component", None)
        else:
            del self._others[interface]

    def setComponent(self, interface: type, component: object) -> None:
        """Make *component*, any object but None, the answer to ``interface(self)``."""
        _require_interfaces([interface])
        if component is None:
            raise TypeError(f"None means that there is no component: use unsetComponent({interface.__name__})")
        before = self._kept()  # what is replaced is destroyed when no lock is held: its __del__ may do anything
        with _lock:
            self._keep(interface, component)
        del before

    if TYPE_CHECKING:

        @overload
        def getComponent(self, interface: type[I]) -> I | None: ...
        @overload
        def getComponent(self, interface: type[I], default: D) -> I | D: ...

    def getComponent(self, interface: Any, default: Any = None) -> Any:
        """The component for *interface*, made and kept if an adapter is registered, or *default*."""
        kept = self._first_component if self._first_interface is interface else self._others.get(interface)
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
        with _lock:
            # Another thread may have made one, too: the first is everyone's.
            if Componentized.__contains__(self, interface):
                return self.getComponent(interface)
            self._keep(interface, adapter)
            if getattr(adapter, "multiComponent", False):
                for other in providedBy(adapter):
                    if other not in self and self.locateAdapterClass(type(self), other, None) is type(adapter):
                        self._keep(other, adapter)
        return adapter

    def __contains__(self, interface: object) -> bool:
        """Is a component kept for *interface*?  Makes none."""
        return interface is not None and (self._first_interface is interface or interface in self._others)

    def unsetComponent(self, interface: type) -> None:
        """Forget the component for *interface*; KeyError if there is none."""
        before = self._kept()  # as in setComponent
        with _lock:
            self._drop(interface)
        del before

    def removeComponent(self, component: object) -> list[type]:
        """Forget *component* under all its interfaces, and answer these."""
        with _lock:
            removed = [interface for interface, kept in self._kept() if kept is component]
            for interface in removed:
                self._drop(interface)
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

_NEW, _STORED, _ENDED = "new", "stored", "ended"


def _seconds(value: float | None, name: str) -> float:
    """A positive number of seconds; None stands for no limit."""
    if value is None:
        return float("inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} is a positive number of seconds, or None for no limit, not {value!r}")
    return float(value)


class ISession(Interface):
    """What ``ISession(environ)`` answers, for whoever writes or checks code against it; see `Session`."""

    __advice__ = (
        "there is no session here; wrap the application in SessionMiddleware, "
        "and adapt the WSGI environ or a request that has it as .environ"
    )

    uid: str
    created: float
    lastModified: float
    lifetime: float
    max_lifetime: float
    owner: str | None

    @property
    def expires(self) -> float: ...
    def setLifetime(self, seconds: float | None) -> None: ...
    def touch(self) -> None: ...
    def expire(self) -> None: ...
    def notifyOnExpire(self, callback: Callable[[], object]) -> None: ...
    def renew(self) -> None: ...
    def login(self, owner: str) -> None: ...
    def release(self) -> None: ...
    def setComponent(self, interface: type, component: object) -> None: ...
    def unsetComponent(self, interface: type) -> None: ...
    def removeComponent(self, component: object) -> list[type]: ...
    def addComponent(self, component: object, ignoreClass: bool = False) -> None: ...
    def addAdapter(self, factory: Callable[[Any], T], ignoreClass: bool = False) -> T: ...
    def setAdapter(self, interface: type, factory: Callable[[Any], object]) -> None: ...
    def locateAdapterClass(self, cls: type, interface: type, default: Any) -> Any: ...
    def __contains__(self, interface: object) -> bool: ...

    if TYPE_CHECKING:

        @overload
        def getComponent(self, interface: type[I]) -> I | None: ...
        @overload
        def getComponent(self, interface: type[I], default: D) -> I | D: ...
        def getComponent(self, interface: Any, default: Any = None) -> Any: ...
        # session.foo = 1 is anybody's right.
        def __setattr__(self, name: str, value: Any) -> None: ...


class _Unguarded(Componentized):
    """The fields of a session, without the guard that keeps anybody from setting them."""

    # fmt: off
    __slots__ = (
        "uid", "created", "lastModified", "lifetime", "max_lifetime", "owner",
        "_first_interface", "_first_component", "_others",
        "_callbacks", "_since", "_store", "_state", "_hold", "_due", "_by",
    )
    # fmt: on

    uid: str
    created: float
    lastModified: float
    lifetime: float
    max_lifetime: float
    owner: str | None
    _callbacks: tuple[Any, ...]  # as _stored_callback has them
    _since: float  # when the absolute timeout began to run
    _store: Any
    _state: str
    _hold: Any  # what its store knows the request by that holds it, or held it last
    _due: float  # the deadline under which a MemoryStore will look at it next
    _by: int | None  # the thread that renewed or expired it


@implementer(ISession)
class Session(_Unguarded):
    """One visitor's components and attributes, until it ends.

    Stores make sessions, requests get theirs by ``ISession(environ)``.

    *uid*: 256 random bits, URL-safe.  *owner*: who logged in, a str, or None.
    *created*, *lastModified*: UNIX time in seconds.
    *lifetime*, *max_lifetime*: seconds; the idle and the absolute timeout, infinity is none.

    The fields are read-only; every other attribute set on a session is the user's,
    ``vars(session)`` shows just those.
    """

    __slots__ = ()

    def __init__(self, store: Any, uid: str, now: float, lifetime: float, max_lifetime: float) -> None:
        # To be unguarded meanwhile, as StoredSession is, leaves a dict behind (64 bytes each on Python 3.11).
        put = object.__setattr__
        put(self, "uid", uid)
        put(self, "created", now)
        put(self, "lastModified", now)
        put(self, "lifetime", lifetime)
        put(self, "max_lifetime", max_lifetime)
        put(self, "owner", None)
        put(self, "_first_interface", None)
        put(self, "_first_component", None)
        put(self, "_others", _NO_OTHERS)
        put(self, "_callbacks", ())
        put(self, "_since", now)
        put(self, "_store", store)
        put(self, "_state", _NEW)
        put(self, "_hold", None)
        put(self, "_due", 0.0)
        put(self, "_by", None)

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(type(self), name):
            change = {"owner": "login(owner)", "lifetime": "setLifetime(seconds)", "uid": "renew()"}.get(name)
            raise AttributeError(
                f"session.{name} belongs to every session and can't be set: "
                + (f"call session.{change}" if change else "choose another name for your attribute")
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"session.{name} belongs to every session and can't be deleted")
        object.__delattr__(self, name)

    def _put(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        names = sorted(interface.__name__ for interface, _ in self._kept())
        owned = "" if self.owner is None else f" of {self.owner!r}"
        return f"<{type(self).__name__} {_tag(self.uid)}{owned}, {self._state}, keeps {', '.join(names) or 'nothing'}>"

    @property
    def expires(self) -> float:
        """When it ends unless something happens: the earlier of the idle and the absolute deadline, UNIX time."""
        return min(self.lastModified + self.lifetime, self._since + self.max_lifetime)

    def setLifetime(self, seconds: float | None) -> None:
        """End the session *seconds* after the last request that used it (the idle timeout); None for never."""
        self._put(lifetime=_seconds(seconds, "lifetime"))

    def touch(self) -> None:
        """Start the idle clock again.  (Each request that uses the session does that.)"""
        self._put(lastModified=self._store.clock())

    def notifyOnExpire(self, callback: Callable[[], object]) -> None:
        """Have *callback* called once, without arguments, when the session ends, for whatever reason.

        Callbacks run in the order of registration; one that raises is logged and stops nothing.
        On a persistent store it must be a method of one of the session's components, which is
        what outlives the process; anything else is a TypeError there.
        """
        if not callable(callback):
            raise TypeError(f"a callback is called without arguments, {callback!r} can't be called")
        self._put(_callbacks=(*self._callbacks, self._stored_callback(callback)))

    def _stored_callback(self, callback: Any) -> Any:
        """What to keep of a callback."""
        return callback

    def _live_callback(self, stored: Any) -> Any:
        """The callback of which `_stored_callback` kept *stored*."""
        return stored

    def expire(self) -> None:
        """End it: gone from the store at once, its callbacks run, the cookie is deleted by the response."""
        self._put(_by=get_ident())
        self._store.discard(self)

    def renew(self) -> None:
        """Give it a new uid and keep all else; the old uid is dead at once (OWASP: session fixation).

        That stays so even if the request fails later on: call it when all that may fail is done.
        """
        self._change_uid()

    def login(self, owner: str) -> None:
        """It belongs to *owner* from now on: a new uid, and the absolute timeout starts again."""
        if not isinstance(owner, str) or not owner:
            raise TypeError(f"an owner is a name, a str that isn't empty, not {owner!r}")
        self._change_uid(owner=owner, _since=self._store.clock())

    def _change_uid(self, **fields: object) -> None:
        if self._state is _ENDED:
            raise SessionError("this session has ended: ISession(environ) answers a new one")
        self._put(_by=get_ident())
        self._store.renew(self, **fields)
        _log(20, self.uid, "renewed")

    def release(self) -> None:
        """Save it now and let its next request in: before a long download or an event stream.

        Only the request that holds the session can; otherwise nothing happens.
        """
        if self._hold == get_ident() or self._state is _NEW:
            self._store.save(self)

    def _is_empty(self) -> bool:
        """Is there nothing on it that anyone might come back for?"""
        return self._first_interface is None and not (self._others or self.owner or self._callbacks or self.__dict__)

    def _is_changed(self) -> bool:
        """Does it differ from what is stored?  (Sessions in memory are what is stored.)"""
        return False

    def _end(self) -> None:
        """Run the callbacks and let go of everything; whoever took it out of the store calls this, once."""
        self._put(_state=_ENDED, _by=get_ident())
        _log(20, self.uid, "ended")
        for callback in self._callbacks:
            try:
                self._live_callback(callback)()
            except Exception:
                _log(40, self.uid, "callback %r failed", callback, exc_info=True)
        self._clear()

    def _clear(self) -> None:
        """Break the cycles through components that refer to the session."""
        before = self._kept()  # as in setComponent
        with _lock:
            self._put(_first_interface=None, _first_component=None, _others=_NO_OTHERS)
        del before
        self._put(_callbacks=())
        self.__dict__.clear()


GuardSession = Session

# Strategy: Session.__setattr__ protects users, not us.  Setting a slot by its descriptor takes a
# fifth of the time of `_put`, and requests set these again and again.
_set_modified = Session.lastModified.__set__  # type: ignore[attr-defined]
_set_hold = Session._hold.__set__
_set_due = Session._due.__set__  # type: ignore[attr-defined]


# Memory store
# ---------------------------------------------------------------------------


def _new_uid() -> str:
    """256 random bits, URL-safe: 43 letters, digits, "-" and "_"."""
    global _new_uid
    from functools import partial  # Strategy: secrets takes 4 ms to import, and each import statement 0.8 us.
    from secrets import token_urlsafe

    _new_uid = partial(token_urlsafe, 32)
    return _new_uid()


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

    def open(self, uid: str, patience: float = 10, hold: bool = True) -> Session | None:
        """The live session *uid*, its idle clock started again, or None.

        With *hold*, nobody else can open it before `release`; wait *patience* seconds for that.
        """
        ...

    def save(self, session: Session) -> None:
        """Store a session, unless it is new and holds nothing, and let the next request in.

        Starts its idle clock again.  One that was ended meanwhile isn't stored, that is only logged.
        """
        ...

    def release(self, session: Session) -> None:
        """Let the next request in without saving.  Does nothing if *session* isn't held."""
        ...

    def renew(self, session: Session, **fields: object) -> None:
        """Move the session to a new uid and set *fields* on it; the old uid is dead from now on."""
        ...

    def discard(self, session: Session) -> None:
        """End the session: gone at once, its callbacks run."""
        ...

    def sweep(self) -> int:
        """End all that have expired and aren't held; answers how many.  (Requests do that bit by bit.)"""
        ...

    def expireAll(self, owner: str, keep: Session | None = None) -> int:
        """End all sessions of *owner* but *keep*; answers how many."""
        ...

    def __len__(self) -> int:
        """How many sessions are stored."""
        ...


_NEVER = float("inf")
# The deadline of a session that has no entry in the heap: NaN, neither early nor late, nor equal to itself.
_UNSCHEDULED = float("nan")

_memory_stores: weakref.WeakSet[MemoryStore] = weakref.WeakSet()


@implementer(IStore)
class MemoryStore:
    """Live sessions in a dict, for one process; they end with it.

    *capacity* bounds their number: past it, expired ones go first, then those that are closest to
    expiry (ones in use stay).  *clock* answers UNIX time in seconds.

    Strategy: opening and letting go take no lock.  Single dict operations are atomic, so
    ``_held.setdefault(uid, token)`` decides who holds a session.  Only those who must wait use the
    condition `_freed`; `_lock` guards the heap and changes of uids and owners.

    The heap has one deadline for each session, never later than the real one.  Requests only move
    the real deadline on; the heap is put right when its entry comes to the top.
    """

    # Each access looks at no more due sessions than this.  It has to be over 1 for the abandoned
    # ones to become fewer while each access adds one.
    _batch = 4

    def __init__(self, *, capacity: int | None = None, clock: Callable[[], float] = time.time) -> None:
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            raise ValueError(f"capacity is the largest number of sessions, 1 or more, not {capacity!r}")
        self.capacity = capacity
        self.clock = clock
        self._sessions: dict[str, Session] = {}
        self._owned: dict[str, set[Session]] = {}
        self._heap: list[tuple[float, str]] = []
        self._next = _NEVER  # the deadline on top of the heap
        self._held: dict[str, int] = {}
        self._unlock()
        _memory_stores.add(self)

    def _unlock(self) -> None:
        """Start with nothing held or locked: when new, and in a forked child, whose parent's threads are gone."""
        # Reentrant, since the garbage collector may let go of a session (_Body.__del__) in a thread that has a lock.
        self._lock = RLock()
        self._freed = Condition(RLock())
        self._waiting = 0
        self._held.clear()

    def __len__(self) -> int:
        return len(self._sessions)

    def create(self, lifetime: float, max_lifetime: float) -> Session:
        return Session(self, _new_uid(), self.clock(), lifetime, max_lifetime)

    def open(self, uid: str, patience: float = 10, hold: bool = True) -> Session | None:
        now = self.clock()
        if now >= self._next:
            self._reclaim(now, self._batch)
        token = None
        if hold:
            # Strategy: an int of its own each time, so `is` tells requests apart, even of one thread.
            token = get_ident()
            if self._held.setdefault(uid, token) is not token:
                self._wait(uid, token, patience)
                now = self.clock()
        session = self._sessions.get(uid)
        if session is None:
            self._free(uid, token)
            return None
        if hold:
            _set_hold(session, token)
        if now >= session.lastModified + session.lifetime or now >= session._since + session.max_lifetime:
            if hold or uid not in self._held:  # who holds it is the one to judge it
                self.discard(session)
            self._free(uid, token)
            return None
        _set_modified(session, now)
        return session

    def _wait(self, uid: str, token: int, patience: float) -> None:
        """Wait until *token* holds the session *uid*, or there is none (any more)."""
        end = time.monotonic() + patience
        with self._freed:
            self._waiting += 1
            try:
                while uid in self._sessions and self._held.setdefault(uid, token) is not token:
                    rest = end - time.monotonic()
                    if rest <= 0:
                        raise SessionBusy(patience)
                    self._freed.wait(rest)
            finally:
                self._waiting -= 1

    def _free(self, uid: str, token: int | None) -> None:
        if token is not None and self._held.get(uid) is token:
            self._held.pop(uid, None)
        self._wake()

    def _wake(self) -> None:
        if self._waiting:
            with self._freed:
                self._freed.notify_all()

    def save(self, session: Session) -> None:
        now, uid = self.clock(), session.uid
        if session._state is _STORED:
            _set_modified(session, now)
        elif session._state is _ENDED:
            _log(30, uid, "has ended while a request used it: nothing is saved")
        elif not session._is_empty():
            _set_modified(session, now)
            self._insert(session, now)
        # Strategy: this is _free, without the call.  The session may be held by another request, if
        # this one saves what its body did after it had let go.
        token = session._hold
        if token == get_ident() and self._held.get(uid) is token:
            self._held.pop(uid, None)
        if self._waiting:
            self._wake()
        # Its entry in the heap may be early but not late, and not missing.  After it is let go: see _take.
        if session._state is _STORED and not now + session.lifetime >= session._due:
            with self._lock:
                self._schedule(session)

    def release(self, session: Session) -> None:
        self._free(session.uid, session._hold)
        if session._due != session._due and session._state is _STORED:  # it is _UNSCHEDULED
            with self._lock:
                self._schedule(session)

    def _insert(self, session: Session, now: float) -> None:
        if now >= self._next:
            self._reclaim(now, self._batch)
        with self._lock:
            evicted = [] if self.capacity is None else self._evict(self.capacity - 1, now)
            session._put(_state=_STORED)
            self._enter(session)
        _log(20, session.uid, "created")
        if evicted:
            self._end_all(evicted)

    def _enter(self, session: Session) -> None:
        """Add it to the dict, its owner's sessions and the heap (under the lock)."""
        self._sessions[session.uid] = session
        if session.owner is not None:
            self._owned.setdefault(session.owner, set()).add(session)
        self._schedule(session)

    def _leave(self, session: Session) -> bool:
        """Take it out again (under the lock); was it there?  Its entry in the heap is void then."""
        if self._sessions.pop(session.uid, None) is not session:
            return False
        if session.owner is not None:
            sessions = self._owned.get(session.owner, set())
            sessions.discard(session)
            if not sessions:
                self._owned.pop(session.owner, None)
        return True

    def renew(self, session: Session, **fields: object) -> None:
        old, new, token = session.uid, _new_uid(), session._hold
        mine = token == get_ident() and self._held.get(old) is token
        if not mine:
            # After session.release(), or without locking: nobody may let go or get hold of it meanwhile.
            token = get_ident()
            if self._held.setdefault(old, token) is not token:
                self._wait(old, token, 10)
        with self._lock:
            late = session.uid != old  # another thread has renewed it
            if not late:
                stored = self._leave(session)
                if mine:
                    self._held[new] = token
                else:
                    _set_hold(session, None)  # whose it was before has let go, and isn't told the new uid
                session._put(uid=new, **fields)
                if stored:
                    self._enter(session)
        self._free(old, token)
        if late:
            self.renew(session, **fields)

    def discard(self, session: Session) -> None:
        # Whoever takes it out of the dict ends it; and outside the lock, so that callbacks may use the store.
        with self._lock:
            mine = self._leave(session)
        if mine or session._state is _NEW:
            session._end()
            self._wake()

    def sweep(self) -> int:
        return self._reclaim(self.clock(), len(self._heap))

    def expireAll(self, owner: str, keep: Session | None = None) -> int:
        with self._lock:
            sessions = [s for s in list(self._owned.get(owner, ())) if s is not keep and self._leave(s)]
        return self._end_all(sessions)

    def _end_all(self, sessions: list[Session]) -> int:
        for session in sessions:
            session._put(_state=_ENDED)  # for those who use one whose turn comes late
        for session in sessions:
            session._end()
        self._wake()
        return len(sessions)

    def _schedule(self, session: Session) -> None:
        """Enter the session into the heap (under the lock); an earlier entry of it is void from now on."""
        deadline = session.expires
        _set_due(session, deadline)
        heappush(self._heap, (deadline, session.uid))
        if len(self._heap) > 4 * len(self._sessions) + 100:
            # Three in four are void: those of renewed and ended sessions with long lifetimes.
            self._heap[:] = [(s._due, uid) for uid, s in self._sessions.items() if s._due == s._due]
            heapify(self._heap)
        self._next = self._heap[0][0] if self._heap else _NEVER

    def _take(self, now: float) -> Session | None:
        """Take the first entry from the heap, and its session out of the store; None if the entry was out of date."""
        deadline, uid = heappop(self._heap)
        session = self._sessions.get(uid)
        if session is None or session._due != deadline:
            return None
        # Who takes it out holds it first, so that no request gets hold of what is about to end.
        token = get_ident()
        while self._held.setdefault(uid, token) is not token:
            _set_due(session, _UNSCHEDULED)  # it is judged when it is let go; has that just been?
            if uid in self._held:
                return None
        due = session.expires <= max(now, deadline)  # _evict comes before the deadline
        if due:
            self._leave(session)
        else:
            self._schedule(session)  # it was used after its entry was made
        self._held.pop(uid, None)  # those who wait are woken by _end_all, outside the lock
        return session if due else None

    def _reclaim(self, now: float, limit: int) -> int:
        """Look at *limit* sessions that may be due and end those that are; answers how many."""
        ended = []
        with self._lock:
            while limit > 0 and self._heap and self._heap[0][0] <= now:
                limit -= 1
                session = self._take(now)
                if session is not None:
                    ended.append(session)
            self._next = self._heap[0][0] if self._heap else _NEVER
        return self._end_all(ended)

    def _evict(self, most: int, now: float) -> list[Session]:
        """Take out those closest to expiry until there are no more than *most* (under the lock)."""
        evicted = []
        while len(self._sessions) > most and self._heap:
            session = self._take(now)
            if session is not None:
                evicted.append(session)
        return evicted


def _after_fork() -> None:
    global _lock
    _lock = RLock()
    for store in list(_memory_stores):
        store._unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Persistent stores
# ---------------------------------------------------------------------------


def storable(cls: type[T]) -> type[T]:
    """Class decorator: instances may be part of what a persistent store keeps.

    Classes decorated with `implementer` and registered adapter classes are storable already.

    Whoever knows the secret can forge records.  Such a record can construct objects of these
    classes in any state, have those methods called that pickle and callbacks call
    (``__setstate__``, ``append``, ``__setitem__``, any without arguments), or make the process
    fail; no other code runs.
    """
    if not isinstance(cls, type):
        raise TypeError(f"storable decorates classes, {cls!r} isn't one")
    _storables[_name(cls)] = cls
    return cls


# Plain values that may be stored though nobody declared them.  (int, str, bytes, float, bool, None,
# list, tuple, dict, set, frozenset and bytearray are part of the pickle format itself.)
_VALUES = frozenset(
    "builtins.list builtins.dict builtins.set builtins.complex "
    "collections.deque collections.OrderedDict collections.Counter "
    "datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone "
    "decimal.Decimal fractions.Fraction uuid.UUID ipaddress.IPv4Address ipaddress.IPv6Address".split()
)

# Flags in a call of `_make`:
_CALL = 1  # made by calling the class, not by its __new__
_ROOT = 2  # the component itself, which others may ask for while it is being filled

# What pickle writes in one piece, so that reducer_override never sees it, though it may be shared.
_CONTAINERS = (list, dict, set, bytearray)
# What has no identity worth keeping: never a reference, always written again.
_ATOMS = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset)


def _storable_class(name: str) -> type:
    """The class that may be stored under *name*.  It is never imported for that, unless it is in `_VALUES`."""
    cls = _storables.get(name)
    if cls is None and name in _VALUES:
        module, _, attribute = name.rpartition(".")
        cls = getattr(__import__(module), attribute)
    if cls is None:
        raise SealError(f"no class {name} was declared in this process: import its module, decorate it with @storable")
    return cls


def _make(name: str, flags: int, *args: object) -> Any:
    """Stands in a record for: an object of the class *name*.  Never called: `_Reader` puts another in its place."""


def _ref(key: str) -> Any:
    """Stands in a record for: the component under *key*; "" is the session.  Never called either."""


def _fill(container: set[Any], items: tuple[Any, ...]) -> None:
    """Stands in a record for: put *items* into a set.  Nor is this."""


class _Root:
    """Wraps a list, dict or set that is a component, so that it is made before what it contains."""

    def __init__(self, container: Any) -> None:
        self.container = container


class _Writer(pickle.Pickler):
    """Pickles one component so that only classes that declared themselves take part.

    No class or function gets into the record.  An object is written as ``_make(name of its class,
    ...)``; the session and its other components as ``_ref(key)``.

    *name* is what errors call the component, *root* the component itself (None if it is written as
    a reference, or an attribute); *refs* has the keys of the session and its components by id().
    """

    name: str
    root: object
    refs: dict[int, str]

    def class_name(self, cls: Any) -> str:
        name = _name(cls)
        if _storables.get(name) is not cls and name not in _VALUES:
            raise NotStorable(self.name, f"an object of class {name}, which isn't declared")
        return name

    def reducer_override(self, obj: Any) -> Any:
        if obj is _make or obj is _ref or obj is _fill:
            return NotImplemented
        if isinstance(obj, _Root):
            kind = type(obj.container)
            if kind is set:
                return _make, (_name(kind), _CALL | _ROOT), tuple(obj.container), None, None, _fill
            items = iter(obj.container) if kind is list else None
            pairs = iter(obj.container.items()) if kind is dict else None
            return _make, (_name(kind), _CALL | _ROOT), None, items, pairs
        key = self.refs.get(id(obj))
        if key is not None and obj is not self.root:
            return _ref, (key,)
        if isinstance(obj, type):
            raise NotStorable(self.name, f"the class {_name(obj)} itself")
        reduce = copyreg.dispatch_table.get(type(obj))
        try:
            reduced = reduce(obj) if reduce else obj.__reduce_ex__(5)
        except TypeError as error:
            raise NotStorable(self.name, f"an object of class {_name(type(obj))} ({error})") from error
        if isinstance(reduced, str):
            raise NotStorable(self.name, f"{reduced} of {type(obj).__module__}")
        function, args, *rest = reduced
        flags = _ROOT if obj is self.root else 0
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            cls, *args = args
        elif isinstance(function, type):
            cls, flags = function, flags | _CALL
        else:
            name = getattr(function, "__qualname__", repr(function))
            raise NotStorable(self.name, f"an object of class {_name(type(obj))}, which is made by {name}()")
        return (_make, (self.class_name(cls), flags, *args), *rest)


class _LinkingWriter(_Writer):
    """A `_Writer` that also keeps shared containers shared.

    Strategy: persistent_id is called for every single object, so this is for those sessions only
    that have a list, dict, set or bytearray as a component.
    """

    def persistent_id(self, obj: object) -> str | None:
        shared = type(obj) in _CONTAINERS and (obj is not self.root or type(obj) is not bytearray)
        return self.refs.get(id(obj)) if shared else None


class _Reader(pickle.Unpickler):
    """Unpickles with *make* and *ref* for `_make` and `_ref`, and set.update for `_fill`.

    No record gets at anything else; without *make*, at nothing but plain values.
    """

    def __init__(self, blob: bytes, make: Any = None, ref: Any = None) -> None:
        super().__init__(io.BytesIO(blob))
        self.functions = {"_make": make, "_ref": ref, "_fill": set.update if make else None}

    def find_class(self, module: str, name: str) -> Any:
        function = self.functions.get(name)
        if function is None:
            raise SealError(f"a record asks for {module}.{name}")
        return function

    def persistent_load(self, key: Any) -> Any:
        return self.functions["_ref"](key)


# The fields of a session that are stored, in this order.
_FIELDS = ("created", "lastModified", "lifetime", "max_lifetime", "_since", "owner", "_callbacks")
_get_fields: Callable[[Any], tuple[Any, ...]] = attrgetter(*_FIELDS)


class _UnguardedStored(_Unguarded):
    """The fields of a stored session, without the guard."""

    __slots__ = ("_key", "_blobs", "_opened", "_meta")

    _key: str  # the hash of its uid
    _blobs: dict[str, bytes]  # what is stored
    _opened: set[str]  # the keys of those blobs that are objects by now, or were removed
    _meta: tuple[Any, ...]  # the fields as they are stored


class StoredSession(_UnguardedStored, Session):
    """A session of a persistent store: each component is a blob, opened when it is first asked for.

    Blobs go by their interface's name, or "." and an attribute's name.
    """

    __slots__ = ()

    def __init__(
        self: Any, store: Any, uid: str, key: str, state: str, fields: tuple[Any, ...], blobs: dict[str, bytes]
    ) -> None:
        # Strategy: while it is unguarded, setting its fields takes a fifth of the time.
        object.__setattr__(self, "__class__", _UnguardedStored)
        self.created, self.lastModified, self.lifetime, self.max_lifetime, self._since, self.owner, self._callbacks = (
            fields
        )
        self.uid, self._key, self._blobs, self._opened, self._meta = uid, key, blobs, set(), fields
        self._store, self._state, self._hold, self._due, self._by = store, state, None, 0.0, None
        self._first_interface, self._first_component, self._others = None, None, _NO_OTHERS
        self.__class__ = StoredSession

    # Reading

    def __setstate__(self, state: object) -> None:
        raise SealError("a record can't set the state of the session itself")

    def _load(self, key: str, interface: Any = None) -> Any:
        """Open the blob under *key*; SealError (or what its class raises) if that can't be."""
        interface = interface or _interfaces.get(key)
        if interface is None and not key.startswith("."):
            raise SealError(f"no interface {key} in this process: import its module")

        # These are made anew for each blob: all that a forged record can do to them dies with it.
        def make(name: str, flags: int, *args: object) -> Any:
            cls = _storable_class(name)
            made = cls(*args) if flags & _CALL else cls.__new__(cls, *args)
            if flags & _ROOT and interface is not None:
                self._keep(interface, made)  # now: what it contains may refer to it
            return made

        def ref(other: str) -> Any:
            if not other:
                return self
            kept = dict(self._kept()).get(_interfaces.get(other))
            if kept is not None:
                return kept
            if other in self._opened:
                raise SealError(f"{key} and {other} contain each other, and neither can be made first")
            return self._load(other)

        before = self._opened.copy()
        self._opened.add(key)
        try:
            component = _Reader(self._blobs[key], make, ref).load()
        except BaseException:
            # Components that were opened on its behalf may refer to something half made: open them anew.
            for kept, _ in self._kept():
                if _name(kept) in self._opened - before:
                    self._drop(kept)
            self._put(_opened=before)
            raise
        if interface is not None:
            self._keep(interface, component)
        return component

    def getComponent(self, interface: Any, default: Any = None) -> Any:
        key = _name(interface)
        if key not in self._blobs or key in self._opened or _interfaces.get(key) is not interface:
            return super().getComponent(interface, default)
        try:
            return self._load(key, interface)
        except Exception as error:
            raise StoreError(
                f"the component kept for {key} can't be opened ({error}); it stays as it is, "
                f"session.unsetComponent({key.rpartition('.')[2]}) drops it"
            ) from error

    def _load_attributes(self) -> None:
        for key in self._blobs:
            if key.startswith("."):
                try:
                    if hasattr(type(self), key[1:]):
                        raise SealError("it would hide what belongs to every session")
                    self.__dict__[key[1:]] = self._load(key)
                except Exception as error:
                    _log(30, self.uid, "keeps an attribute %s that can't be opened: %s", key[1:], error)

    def _load_all(self) -> None:
        """Open what can be opened: before a component goes, those that refer to it must have it in hand."""
        for key in [key for key in self._blobs if key not in self._opened]:
            try:
                self._load(key)
            except Exception as error:
                _log(30, self.uid, "keeps %s that can't be opened: %s", key, error)

    def __contains__(self, interface: object) -> bool:
        if not isinstance(interface, InterfaceMeta):
            return False
        key = _name(interface)
        unopened = key in self._blobs and key not in self._opened and _interfaces.get(key) is interface
        return super().__contains__(interface) or unopened

    def setComponent(self, interface: type, component: object) -> None:
        if interface in self:
            self._load_all()
        super().setComponent(interface, component)
        self._opened.add(_name(interface))

    def unsetComponent(self, interface: type) -> None:
        if interface in self:
            self._load_all()
            self._opened.add(_name(interface))
            if not super().__contains__(interface):
                return  # it can't be opened, and goes as well
        super().unsetComponent(interface)

    def removeComponent(self, component: object) -> list[type]:
        self._load_all()
        return super().removeComponent(component)

    def release(self) -> None:
        if self._hold is not None or self._state is _NEW:
            self._store.save(self)

    # Callbacks: (key, name of a method)

    def _stored_callback(self, callback: Any) -> Any:
        target, name = getattr(callback, "__self__", None), getattr(callback, "__name__", "")
        for interface, component in self._kept():
            if component is target and getattr(component, name, None) == callback:
                return _name(interface), name
        raise TypeError(
            f"on a persistent store a callback is a method of one of the session's components, which {callback!r} "
            "isn't: setComponent() first, then session.notifyOnExpire(component.method)"
        )

    def _live_callback(self, stored: Any) -> Any:
        key, name = stored
        component = dict(self._kept()).get(_interfaces.get(key))
        component = self._load(key) if component is None else component
        if name.startswith("__") or not hasattr(type(component), name):
            raise SealError(f"a record names {name!r} for a callback, which is no method")
        return getattr(component, name)

    # Writing

    def _dump(self) -> dict[str, bytes]:
        """The blobs of all that was opened or set."""
        items: dict[str, Any] = {}
        refs = {id(self): ""}
        writer: type[_Writer] = _Writer
        for interface, component in self._kept():
            key = _name(interface)
            if _interfaces.get(key) is not interface:
                raise NotStorable(f"the component {key}", "a name that now means another interface of that name")
            items[key] = component
            if not isinstance(component, _ATOMS):
                refs.setdefault(id(component), key)
            if type(component) in _CONTAINERS:
                writer = _LinkingWriter
        items.update(("." + name, value) for name, value in self.__dict__.items())
        self._opened.update(items)
        return {key: self._dump_item(writer, key, item, refs) for key, item in items.items()}

    def _dump_item(self, writer: type[_Writer], key: str, item: Any, refs: dict[int, str]) -> bytes:
        file = io.BytesIO()
        attribute = key.startswith(".")
        name = f"the attribute {key[1:]}" if attribute else f"the component {key}"
        # A component that is kept for another interface, too, becomes a reference to that.
        root = None if attribute or refs.get(id(item), key) != key else item
        pickler = writer(file, 5)
        pickler.name, pickler.root, pickler.refs = name, root, refs
        try:
            pickler.dump(_Root(item) if root is not None and type(item) in (list, dict, set) else item)
        except NotStorable:
            raise
        except Exception as error:
            raise NotStorable(name, f"what pickle refuses ({error})") from error
        return file.getvalue()

    def _changes(self) -> dict[str, bytes | None]:
        """What this request did: new blobs by key, None for those that are gone."""
        stored, current = self._blobs, self._dump()
        changes: dict[str, bytes | None] = {k: None for k in self._opened if k in stored and k not in current}
        for key, blob in current.items():
            if stored.get(key) != blob:
                changes[key] = blob
        return changes

    def _real_changes(self) -> dict[str, bytes | None]:
        """`_changes` without components that were only read.

        Equal objects may have different bytes (the order in a set, strings that are or aren't the
        same object): what counts is whether that which is stored, opened again, gives these bytes.
        """
        changes = self._changes()
        twin = StoredSession(self._store, self.uid, self._key, _STORED, self._meta, self._blobs)
        for key in changes:
            if changes[key] is not None and key in self._blobs:
                try:
                    component = twin._load(key)
                except Exception:
                    continue  # what can't be opened wasn't read
                if key.startswith("."):
                    twin.__dict__[key[1:]] = component
        unread = twin._dump()
        return {key: blob for key, blob in changes.items() if blob is None or unread.get(key) != blob}

    def _is_changed(self) -> bool:
        fields, stored = self._fields(), self._meta
        # To have been used, lastModified, is no change.
        return (fields[0], *fields[2:]) != (stored[0], *stored[2:]) or bool(self._changes())

    def _fields(self) -> tuple[Any, ...]:
        return _get_fields(self)

    def _set_fields(self, fields: tuple[Any, ...]) -> None:
        self._put(_meta=fields, **dict(zip(_FIELDS, fields, strict=True)))


_keepers.add(StoredSession.getComponent)


#: What `PersistentStore.hold` answers for a record that somebody else holds.
HELD: Any = object()


@implementer(IStore)
class PersistentStore:
    """What stores outside the process have in common; a subclass says where the records lie.

    *secret*: at least 16 bytes (or a str), or a sequence of such; the first seals new records, all
    open old ones.  *lease*: for how many seconds a request holds its session if it isn't heard of
    again.  *clock*: UNIX time in seconds; hosts that share a store keep theirs in step (NTP).

    A record is ``MAC || body``: keyed BLAKE2b over the key and the body, so that it can't be
    forged, or copied to another key.  The key is a hash of the uid: who reads the database can't
    use what is there.  A record that doesn't verify is no session, is logged, and isn't unpickled.

    A subclass supplies nine operations on ``(key: str, record: bytes)``, each atomic by itself.
    *token* (str) is who holds a record, *until* (UNIX time) for how long.  Their exceptions reach
    the application as `StoreError`.
    """

    def __init__(
        self,
        *,
        secret: str | bytes | Sequence[str | bytes],
        lease: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from hashlib import blake2b
        from hmac import compare_digest

        secrets = list(secret) if isinstance(secret, (list, tuple)) else [secret]
        self._macs = []
        for each in secrets:
            if not isinstance(each, (str, bytes, bytearray)):
                raise TypeError(f"a secret is a str or bytes, not {type(each).__name__}")
            each = each.encode() if isinstance(each, str) else bytes(each)
            if len(each) < 16:
                raise ValueError(f"a secret has at least 16 bytes, not {len(each)}: take secrets.token_hex(32)")
            self._macs.append(blake2b(key=blake2b(each).digest(), digest_size=32, person=b"minisess seal"))
        if not self._macs:
            raise ValueError("secret= needs at least one secret: take secrets.token_hex(32)")
        self._hash, self._same = blake2b, compare_digest
        self.lease = _seconds(lease, "lease")
        self.clock = clock
        self._next_sweep = clock() + 10

    # What a subclass supplies

    def insert(
        self, key: str, record: bytes, expires: float, owner: str | None, token: str | None, until: float
    ) -> None:
        """Add a record, held by *token* unless that is None."""
        raise NotImplementedError

    def hold(self, key: str, token: str, now: float, until: float) -> Any:
        """If nobody holds the record, or their time is up by *now*: hold it and answer it.

        None if there is no such record, `HELD` if another has it.
        """
        raise NotImplementedError

    def read(self, key: str) -> bytes | None:
        """The record, held or not, or None."""
        raise NotImplementedError

    def write(self, key: str, token: str, record: bytes, expires: float, owner: str | None) -> bool:
        """Replace the record and let go of it, if *token* still holds it; was it so?"""
        raise NotImplementedError

    def free(self, key: str, token: str) -> None:
        """Let go of the record, if *token* holds it."""
        raise NotImplementedError

    def delete(self, key: str, token: str | None = None) -> bytes | None:
        """Delete the record (if *token* holds it, where that is given) and answer it, or None."""
        raise NotImplementedError

    def due(self, now: float, limit: int) -> list[tuple[str, bytes]]:
        """Delete up to *limit* records that have expired by *now* and aren't held, and answer them."""
        raise NotImplementedError

    def owned(self, owner: str) -> list[str]:
        """The keys of all records of *owner*."""
        raise NotImplementedError

    def __len__(self) -> int:
        """How many records there are."""
        raise NotImplementedError

    # Sealing

    def _key(self, uid: str) -> str:
        return self._hash(uid.encode(), digest_size=32, person=b"minisess key").hexdigest()

    def _mac(self, mac: Any, key: str, body: bytes) -> bytes:
        mac = mac.copy()
        mac.update(key.encode() + body)
        digest: bytes = mac.digest()
        return digest

    def _seal(self, key: str, fields: tuple[Any, ...], blobs: dict[str, bytes]) -> bytes:
        body = pickle.dumps((*fields, blobs), 5)
        return self._mac(self._macs[0], key, body) + body

    def _unseal(self, key: str, record: bytes) -> tuple[tuple[Any, ...], dict[str, bytes]]:
        """The fields and blobs of a record; SealError if it isn't what this store wrote under that key."""
        record = bytes(record)
        seal, body = record[:32], record[32:]
        if not any(self._same(self._mac(mac, key, body), seal) for mac in self._macs):
            raise SealError("the seal doesn't match: forged, damaged, or sealed with another secret")
        try:
            *numbers, owner, callbacks, blobs = values = _Reader(body).load()
            well_formed = (
                len(numbers) == 5
                and {float, int}.issuperset(map(type, numbers))
                and (owner is None or type(owner) is str)
                and all(type(k) is str and type(n) is str for k, n in callbacks)
                and {str}.issuperset(map(type, blobs))
                and {bytes}.issuperset(map(type, blobs.values()))
            )
        except Exception as error:
            raise SealError(f"the record can't be read: {error}") from error
        if not well_formed:
            raise SealError("the record has another form than this version writes")
        return tuple(values[:-1]), blobs

    def _revive(self, key: str, uid: str, record: bytes) -> StoredSession | None:
        """The session in a record, or None for one that can't be trusted."""
        try:
            fields, blobs = self._unseal(key, record)
        except SealError as error:
            _log(30, uid, "security: its record is refused: %s", error)
            return None
        return StoredSession(self, uid, key, _STORED, fields, blobs)

    # What IStore promises

    def _ask(self, operation: Callable[..., T], *args: object) -> T:
        """Do one of the operations; what its driver raises becomes a StoreError."""
        try:
            return operation(*args)
        except SessionError:
            raise
        except Exception as error:
            name = f"{type(self).__name__}.{operation.__name__}"
            raise StoreError(f"{name} failed: {type(error).__name__}: {error}") from error

    def _acquire(self, key: str, token: str, patience: float) -> Any:
        """Hold the record and answer it, waiting for others who hold it; None if there is none."""
        end, pause = time.monotonic() + patience, 0.0005
        while True:
            now = self.clock()
            record = self._ask(self.hold, key, token, now, now + self.lease)
            if record is not HELD:
                return record
            if time.monotonic() >= end:
                raise SessionBusy(patience)
            # Longer and longer, and never in step with the others who wait.
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 255))
            pause = min(pause * 1.2, 0.02)

    def _fetch(self, uid: str, patience: float, hold: bool = True) -> StoredSession | None:
        """The session as it is stored, held if so wanted; None if it isn't there or can't be trusted."""
        key, token = self._key(uid), os.urandom(8).hex()
        record = self._acquire(key, token, patience) if hold else self._ask(self.read, key)
        session = None if record is None else self._revive(key, uid, record)
        if hold and session is not None:
            _set_hold(session, token)
        elif hold and record is not None:
            self._ask(self.free, key, token)
        return session

    def create(self, lifetime: float, max_lifetime: float) -> Session:
        uid, now = _new_uid(), self.clock()
        return StoredSession(self, uid, self._key(uid), _NEW, (now, now, lifetime, max_lifetime, now, None, ()), {})

    def open(self, uid: str, patience: float = 10, hold: bool = True) -> Session | None:
        if self.clock() >= self._next_sweep:
            self._next_sweep = self.clock() + 10
            self._end_due(20)
        session = self._fetch(uid, patience, hold)
        if session is None:
            return None
        now = self.clock()
        if now >= session.expires:
            if hold:  # else another request may hold it, or the sweep comes upon it
                self.discard(session)
            return None
        _set_modified(session, now)
        session._load_attributes()
        return session

    def save(self, session: Any) -> None:
        if session._state is _ENDED:
            _log(30, session.uid, "has ended while a request used it: nothing is saved")
        elif session._state is _STORED:
            _set_modified(session, self.clock())
            if session._hold is None:
                self._save_merged(session)
            else:
                self._save_held(session, session._blobs, session._changes())
        elif not session._is_empty():
            self._end_due(2)  # first, for if that fails there is no session without its cookie
            _set_modified(session, self.clock())
            key, blobs, fields = session._key, session._dump(), session._fields()
            self._ask(self.insert, key, self._seal(key, fields, blobs), session.expires, session.owner, None, 0.0)
            session._put(_state=_STORED, _blobs=blobs, _meta=fields)
            _log(20, session.uid, "created")

    def _save_held(self, session: Any, stored: dict[str, bytes], changes: dict[str, bytes | None]) -> None:
        """Write *stored* with *changes* and let go of the session, if it is there and still held."""
        changed = {**stored, **changes}.items()
        key, blobs, fields = session._key, {k: blob for k, blob in changed if blob is not None}, session._fields()
        record = self._seal(key, fields, blobs)
        done = self._ask(self.write, key, session._hold, record, session.expires, session.owner)
        _set_hold(session, None)
        if done:
            session._put(_blobs=blobs, _meta=fields)
        elif self._ask(self.read, key) is None:
            session._put(_state=_ENDED)
            _log(30, session.uid, "was ended by another request: nothing is saved")
        else:
            _log(30, session.uid, "was taken over after its lease ran out: nothing is saved")
            raise SessionConflict(self.lease)

    def _save_merged(self, session: Any) -> None:
        """Bring the changes of a request that held nothing into what is stored by now, component by component."""
        changes, before = session._real_changes(), session._blobs
        current = self._fetch(session.uid, self.lease)
        if current is None:
            session._put(_state=_ENDED)
            _log(30, session.uid, "was ended by another request: nothing is saved")
            return
        for key, blob in changes.items():
            if current._blobs.get(key) not in (before.get(key), blob):
                _log(30, session.uid, "has two versions of %s: the last one stays", key)
        # The same for the fields: what this request changed, and else what is stored by now.
        mine, base, theirs = session._fields(), session._meta, current._fields()
        merged = [m if m != b else t for m, b, t in zip(mine, base, theirs, strict=True)]
        merged[-1] = tuple(dict.fromkeys([*theirs[-1], *mine[-1]]))  # the callbacks of both
        session._set_fields(tuple(merged))
        session._put(_hold=current._hold)
        self._save_held(session, current._blobs, changes)

    def release(self, session: Any) -> None:
        hold = session._hold
        if hold is not None:
            session._put(_hold=None)
            if session._state is _STORED:
                self._ask(self.free, session._key, hold)

    def renew(self, session: Any, **fields: object) -> None:
        uid = _new_uid()
        key = self._key(uid)
        if session._state is _STORED:
            # What is stored moves; what this request changed is saved with the rest of it, or not at all.
            token, meta, blobs = session._hold, session._meta, session._blobs
            if token is None:
                # Others may have merged something into it meanwhile; from here on they wait, in vain.
                current = self._fetch(session.uid, self.lease)
                if current is None:
                    session._put(_state=_ENDED)
                    raise SessionError("this session has ended: ISession(environ) answers a new one")
                token, meta, blobs = current._hold, current._meta, current._blobs
            record = self._seal(key, meta, blobs)
            until = self.clock() + self.lease
            self._ask(self.insert, key, record, session.expires, meta[5], session._hold, until)
            if self._ask(self.delete, session._key, token) is None:
                self._ask(self.delete, key)
                session._put(_hold=None)
                raise SessionConflict(self.lease)
        session._put(uid=uid, _key=key, **fields)

    def discard(self, session: Any) -> None:
        if session._state is _STORED:
            if self._ask(self.delete, session._key) is not None:
                session._end()
            session._put(_state=_ENDED, _hold=None)
        elif session._state is _NEW:
            session._end()

    def sweep(self) -> int:
        total = 0
        while count := self._end_due(1000):
            total += count
        return total

    def _end_due(self, limit: int) -> int:
        records = self._ask(self.due, self.clock(), limit)
        for key, record in records:
            self._end_record(key, record)
        return len(records)

    def _end_record(self, key: str, record: bytes) -> None:
        session = self._revive(key, key, record)  # the uid is unknown; in logs the key stands for it
        if session is not None:
            session._end()

    def expireAll(self, owner: str, keep: Session | None = None) -> int:
        kept = None if keep is None else self._key(keep.uid)
        ended = 0
        for key in self._ask(self.owned, owner):
            if key != kept:
                record = self._ask(self.delete, key)
                if record is not None:
                    self._end_record(key, record)
                    ended += 1
        return ended


class _SQLStore(PersistentStore):
    """The operations in SQL, as SQLite and PostgreSQL have it in common; `?` is a parameter.

    Strategy: writing a record changes no indexed column, so it costs no more than its own page.
    That is why a record has two deadlines: `expires` is the real one; `due`, which is indexed, is
    never later and is put right by the sweep that comes upon it.
    """

    # What PostgreSQL adds to a SELECT of rows to take, and to the condition of a hold.
    _skip_locked = ""
    _relaxed = ""

    def __init__(
        self,
        *,
        secret: str | bytes | Sequence[str | bytes],
        table: str = "minisess",
        lease: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(secret=secret, lease=lease, clock=clock)
        if not (table.isidentifier() and table.isascii()):
            raise ValueError(f"table= is the name of a table (letters, digits, underscores), not {table!r}")
        self.table = table
        self._create_table = [
            f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, record BYTEA NOT NULL, "
            "expires DOUBLE PRECISION NOT NULL, due DOUBLE PRECISION NOT NULL, owner TEXT NOT NULL, "
            "holder TEXT, until DOUBLE PRECISION)",
            f"CREATE INDEX IF NOT EXISTS {table}_due ON {table} (due)",
            f"CREATE INDEX IF NOT EXISTS {table}_owner ON {table} (owner) WHERE owner <> ''",
        ]
        free = "(holder IS NULL OR until <= ?)"
        done = "holder = NULL, until = NULL"
        some = f"SELECT key FROM {table} WHERE due <= ?"
        self._insert_sql = f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._hold_sql = (
            f"UPDATE {table} SET holder = ?, until = ? WHERE key = ? AND {free}{self._relaxed} RETURNING record"
        )
        self._read_sql = f"SELECT record FROM {table} WHERE key = ?"
        self._write_sql = (
            f"UPDATE {table} SET record = ?, expires = ?, {done} "
            "WHERE key = ? AND holder = ? AND owner = ? AND due <= ?"
        )
        self._rewrite_sql = (
            f"UPDATE {table} SET record = ?, expires = ?, owner = ?, due = ?, {done} WHERE key = ? AND holder = ?"
        )
        self._free_sql = f"UPDATE {table} SET {done} WHERE key = ? AND holder = ?"
        self._delete_sql = f"DELETE FROM {table} WHERE key = ? RETURNING record"
        self._delete_held_sql = f"DELETE FROM {table} WHERE key = ? AND holder = ? RETURNING record"
        self._due_sql = (
            f"DELETE FROM {table} WHERE key IN ({some} AND expires <= ? AND {free} "
            f"ORDER BY due LIMIT ?{self._skip_locked}) RETURNING key, record"
        )
        self._defer_sql = (
            f"UPDATE {table} SET due = CASE WHEN expires > ? THEN expires ELSE until END "
            f"WHERE key IN ({some} AND NOT (expires <= ? AND {free}) ORDER BY due LIMIT ?{self._skip_locked})"
        )
        self._owned_sql = f"SELECT key FROM {table} WHERE owner = ? AND owner <> ''"
        self._count_sql = f"SELECT count(*) FROM {table}"

    def _run(self, sql: str, *args: object) -> Any:
        """Run one statement in a transaction of its own; its rows, or how many it changed if it has none."""
        raise NotImplementedError

    def insert(
        self, key: str, record: bytes, expires: float, owner: str | None, token: str | None, until: float
    ) -> None:
        self._run(self._insert_sql, key, record, expires, expires, owner or "", token, until)

    def hold(self, key: str, token: str, now: float, until: float) -> Any:
        rows = self._run(self._hold_sql, token, until, key, now)
        if rows:
            return rows[0][0]
        return HELD if self._run(self._read_sql, key) else None

    def read(self, key: str) -> bytes | None:
        rows = self._run(self._read_sql, key)
        return rows[0][0] if rows else None

    def write(self, key: str, token: str, record: bytes, expires: float, owner: str | None) -> bool:
        count: int = self._run(self._write_sql, record, expires, key, token, owner or "", expires)
        if count < 1:
            # It changes hands, or ends earlier than thought; or it isn't ours any more.
            count = self._run(self._rewrite_sql, record, expires, owner or "", expires, key, token)
        return count > 0

    def free(self, key: str, token: str) -> None:
        self._run(self._free_sql, key, token)

    def delete(self, key: str, token: str | None = None) -> bytes | None:
        rows = self._run(self._delete_sql, key) if token is None else self._run(self._delete_held_sql, key, token)
        return rows[0][0] if rows else None

    def due(self, now: float, limit: int) -> list[tuple[str, bytes]]:
        taken: list[tuple[str, bytes]] = self._run(self._due_sql, now, now, now, limit)
        self._run(self._defer_sql, now, now, now, now, limit)
        return taken

    def owned(self, owner: str) -> list[str]:
        return [key for (key,) in self._run(self._owned_sql, owner)]

    def __len__(self) -> int:
        return int(self._run(self._count_sql)[0][0])


_sqlite_stores: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()


def _before_fork() -> None:
    # A child that inherits an open connection believes that it holds its parent's locks, too.
    for store in list(_sqlite_stores):
        store.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


class SQLiteStore(_SQLStore):
    """Sessions in an SQLite file, for all processes of one machine.

    WAL, ``synchronous=NORMAL``: what was saved survives the death of any process; the last moments
    before a power failure may be lost.  The other arguments: see `PersistentStore`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        secret: str | bytes | Sequence[str | bytes],
        table: str = "minisess",
        lease: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        import sqlite3

        if sqlite3.sqlite_version_info < (3, 35):
            raise StoreError(f"SQLiteStore needs SQLite 3.35 or newer (for RETURNING), not {sqlite3.sqlite_version}")
        super().__init__(secret=secret, table=table, lease=lease, clock=clock)
        self.path = os.fspath(path)
        if self.path == ":memory:" or not self.path:
            raise ValueError("SQLiteStore needs a file, each of its connections has a :memory: of its own")
        self._connect = sqlite3.connect
        # Connections that no thread uses just now, and the process they belong to.
        self._idle: list[Any] = []
        self._pid = os.getpid()
        _sqlite_stores.add(self)
        for statement in self._create_table:
            self._ask(self._run, statement)

    def _open_connection(self) -> Any:
        connection = self._connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
        # Each write copies a page to the log, and sessions are small: a tenth of the time.  (For new files.)
        connection.execute("PRAGMA page_size=2048")
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def _run(self, sql: str, *args: object) -> Any:
        if self._pid != os.getpid():
            # After a fork: SQLite forbids even closing the parent's connections here.
            self._inherited, self._idle, self._pid = self._idle, [], os.getpid()
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._open_connection()
        try:
            cursor = connection.execute(sql, args)
            answer = cursor.fetchall() if cursor.description else cursor.rowcount
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def close(self) -> None:
        """Close the connections; they open again when they are needed."""
        while self._idle and self._pid == os.getpid():
            self._idle.pop().close()

    def __del__(self) -> None:
        if hasattr(self, "_pid"):
            self.close()


class PostgresStore(_SQLStore):
    """Sessions in PostgreSQL, for many hosts.  Its table is created on first use.

    *connect* answers a context manager that gives a DB-API connection, such as
    ``psycopg_pool.ConnectionPool(...).connection``.  A connection is taken for one statement at a
    time, so a transaction pooler (PgBouncer) in between will do.  The other arguments: see
    `PersistentStore`.
    """

    _skip_locked = " FOR UPDATE SKIP LOCKED"
    # A hold needn't survive a crash of the server, so it doesn't wait for the disk.  (Half the time.)
    _relaxed = " AND set_config('synchronous_commit', 'off', true) = 'off'"

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Any]],
        *,
        secret: str | bytes | Sequence[str | bytes],
        table: str = "minisess",
        lease: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not callable(connect):
            raise TypeError(f"connect is called for a connection, like ConnectionPool(...).connection, not {connect!r}")
        super().__init__(secret=secret, table=table, lease=lease, clock=clock)
        self._connect = connect
        self._created = False
        for name, value in list(vars(self).items()):
            if name.endswith("_sql"):
                setattr(self, name, value.replace("?", "%s"))

    def _run(self, sql: str, *args: object) -> Any:
        if not self._created:
            if self._execute("SELECT to_regclass(%s)", self.table)[0][0] is None:
                # Processes that start at once may get in each other's way here.
                self._execute("; ".join(["SELECT pg_advisory_xact_lock(7306377)", *self._create_table]))
            self._created = True
        return self._execute(sql, *args)

    def _execute(self, sql: str, *args: object) -> Any:
        with self._connect() as connection:
            # One statement, one round trip: without this there would be a BEGIN and a COMMIT.
            before, connection.autocommit = connection.autocommit, True
            cursor = connection.cursor()
            try:
                cursor.execute(sql, args or None)
                return cursor.fetchall() if cursor.description else cursor.rowcount
            finally:
                cursor.close()
                if not connection.closed:
                    connection.autocommit = before


class RedisStore(PersistentStore):
    """Sessions in Redis (or Valkey), for many hosts.

    *client* is a ``redis.Redis``, also one from Sentinel, or a ``RedisCluster``, without
    decode_responses.  Each session is a hash ``prefix + "{key}"`` with a time to live, so all that
    must be atomic happens to one key.  ``prefix + "due"`` (sorted by deadline) and ``prefix +
    "owner:..."`` only serve to find sessions: each is written before the session and put right when
    it is read.  The other arguments: see `PersistentStore`.
    """

    # A session that nobody swept goes by itself so many seconds after its end, without callbacks.
    _grace = 3600

    _HOLD = """-- ARGV: token, now, until
        local v = redis.call('HMGET', KEYS[1], 'record', 'holder', 'until')
        if not v[1] then return 0 end
        if v[2] and v[2] ~= ARGV[1] and tonumber(v[3]) > tonumber(ARGV[2]) then return 1 end
        redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', ARGV[3])
        return v[1]"""
    _WRITE = """-- ARGV: token, record, expires, owner, ttl, are the indexes right?
        local v = redis.call('HMGET', KEYS[1], 'holder', 'owner', 'expires')
        if v[1] ~= ARGV[1] then return 0 end
        if ARGV[6] == '0' and (v[2] ~= ARGV[4] or tonumber(ARGV[3]) < tonumber(v[3])) then return v[2] end
        redis.call('HSET', KEYS[1], 'record', ARGV[2], 'expires', ARGV[3], 'owner', ARGV[4])
        redis.call('HDEL', KEYS[1], 'holder', 'until')
        redis.call('PEXPIRE', KEYS[1], ARGV[5])
        return 1"""
    _FREE = """-- ARGV: token
        if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then redis.call('HDEL', KEYS[1], 'holder', 'until') end"""
    _DELETE = """-- ARGV: token, or ''
        local v = redis.call('HMGET', KEYS[1], 'record', 'holder', 'owner')
        if not v[1] or (ARGV[1] ~= '' and v[2] ~= ARGV[1]) then return 0 end
        redis.call('DEL', KEYS[1])
        return {v[1], v[3] or ''}"""
    _TAKE = """-- ARGV: now
        local v = redis.call('HMGET', KEYS[1], 'record', 'holder', 'until', 'expires', 'owner')
        if not v[1] then return 0 end
        local now = tonumber(ARGV[1])
        if v[2] and tonumber(v[3]) > now then return v[3] end
        if tonumber(v[4]) > now then return v[4] end
        redis.call('DEL', KEYS[1])
        return {v[1], v[5] or ''}"""

    def __init__(
        self,
        client: Any,
        *,
        secret: str | bytes | Sequence[str | bytes],
        prefix: str = "minisess:",
        lease: float = 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(secret=secret, lease=lease, clock=clock)
        if client.get_encoder().decode_responses:
            raise ValueError("records are bytes: make the Redis client without decode_responses=True")
        self._client, self._prefix = client, prefix
        scripts = (self._HOLD, self._WRITE, self._FREE, self._DELETE, self._TAKE)
        self._scripts = {script: client.register_script(script) for script in scripts}

    def _place(self, key: str) -> str:
        return f"{self._prefix}{{{key}}}"

    def _eval(self, script: str, key: str, *args: Any) -> Any:
        """Run a script on the record of *key*."""
        registered = self._scripts[script]
        try:
            # Strategy: what Script.__call__ does, a tenth faster.
            return self._client.execute_command("EVALSHA", registered.sha, 1, self._place(key), *args)
        except Exception as error:
            if type(error).__name__ != "NoScriptError":  # the driver's; we don't import drivers
                raise
            return registered([self._place(key)], args)  # loads it into a server that is new

    def _ttl(self, expires: float) -> int:
        """Milliseconds; a lifetime without end gets a hundred years."""
        return int(min(expires - self.clock() + self._grace, 3.2e9) * 1000)

    def _index(self, key: str, expires: float, owner: str | None) -> None:
        self._client.zadd(self._prefix + "due", {key: expires})
        if owner is not None:
            self._client.sadd(f"{self._prefix}owner:{owner}", key)

    def _unindex(self, key: str, owner: bytes) -> None:
        self._client.zrem(self._prefix + "due", key)
        if owner:
            self._client.srem(self._prefix.encode() + b"owner:" + owner, key)

    def insert(
        self, key: str, record: bytes, expires: float, owner: str | None, token: str | None, until: float
    ) -> None:
        self._index(key, expires, owner)
        holder = {} if token is None else {"holder": token, "until": until}
        fields = {"record": record, "expires": expires, "owner": owner or "", **holder}
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hset(self._place(key), mapping=fields)
        pipeline.pexpire(self._place(key), self._ttl(expires))
        pipeline.execute()

    def hold(self, key: str, token: str, now: float, until: float) -> Any:
        answer = self._eval(self._HOLD, key, token, now, until)
        return {0: None, 1: HELD}[answer] if isinstance(answer, int) else answer

    def read(self, key: str) -> bytes | None:
        record: bytes | None = self._client.hget(self._place(key), "record")
        return record

    def write(self, key: str, token: str, record: bytes, expires: float, owner: str | None) -> bool:
        args = [token, record, expires, owner or "", self._ttl(expires)]
        before = done = self._eval(self._WRITE, key, *args, 0)
        if isinstance(before, bytes):
            # It changes hands, or ends earlier than thought: say so where it is looked for, then write.
            self._index(key, expires, owner)
            done = self._eval(self._WRITE, key, *args, 1)
            if done and before and before != (owner or "").encode():
                self._client.srem(self._prefix.encode() + b"owner:" + before, key)
        return bool(done)

    def free(self, key: str, token: str) -> None:
        self._eval(self._FREE, key, token)

    def delete(self, key: str, token: str | None = None) -> bytes | None:
        found = self._eval(self._DELETE, key, token or "")
        if not found:
            return None
        record, owner = found
        self._unindex(key, owner)
        return bytes(record)

    def due(self, now: float, limit: int) -> list[tuple[str, bytes]]:
        taken: list[tuple[str, bytes]] = []
        while keys := self._client.zrangebyscore(self._prefix + "due", "-inf", now, start=0, num=limit):
            for key in map(bytes.decode, keys):
                found = self._eval(self._TAKE, key, now)
                if isinstance(found, list):
                    taken.append((key, found[0]))
                    self._unindex(key, found[1])
                elif found:
                    self._client.zadd(self._prefix + "due", {key: float(found)})
                else:
                    self._client.zrem(self._prefix + "due", key)
            if taken or limit < 1000:  # a request looks at a few, a sweep at all that may be due
                break
        return taken

    def owned(self, owner: str) -> list[str]:
        keys = [key.decode() for key in self._client.smembers(f"{self._prefix}owner:{owner}")]
        # What is there says where to look; whose a session is, the session says.
        return [key for key in keys if self._client.hget(self._place(key), "owner") == owner.encode()]

    def __len__(self) -> int:
        return int(self._client.zcard(self._prefix + "due"))


# Cookies
# ---------------------------------------------------------------------------

_UID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def _is_uid(value: str) -> bool:
    """Can it be one of our ids?"""
    return len(value) == 43 and value.isascii() and _UID_CHARACTERS.issuperset(value)


class _Uids:
    """The set of all well-formed ids."""

    def __contains__(self, value: str) -> bool:
        return _is_uid(value)


def _all_cookies(header: str, name: str, but: str = "") -> list[str]:
    """The uids in a Cookie header that stand under *name*, whatever else is there.

    Four at most, with *but*, which the caller has tried already and doesn't want again.

    Browsers send the cookie of the longest path first (RFC 6265, 5.4); one of the same name may
    come from another application on this or a parent domain.  Only ";" separates and only blanks
    are trimmed, as browsers do it: else a neighbour's cookie could carry one with a __Host- name.
    """
    found = [but] if _is_uid(but) else []
    for pair in header.split(";"):
        key, _, value = pair.partition("=")
        value = value.strip(' \t"')
        if key.strip(" \t") == name and _is_uid(value) and value not in found:
            found.append(value)
            if len(found) == 4:
                break
    return [value for value in found if value != but]


def _check_cookie_options(name: str, secure: bool | None, samesite: str, domain: str | None, path: str) -> None:
    """Raise ValueError for what RFC 6265 doesn't allow or browsers would refuse."""
    for option, value in (("cookie", name), ("samesite", samesite), ("path", path), ("domain", domain or "")):
        if not isinstance(value, str):
            raise ValueError(f"{option}={value!r}: it is a str")
    if secure not in (None, True, False):
        raise ValueError(f"secure={secure!r}: it is True, False or None (by wsgi.url_scheme)")
    token = _UID_CHARACTERS.union("!#$%&'*+.^`|~")
    if not name or not token.issuperset(name):
        raise ValueError(f"cookie={name!r}: a cookie's name is made of letters, digits and !#$%&'*+-.^_`|~")
    if samesite not in ("Lax", "Strict", "None"):
        raise ValueError(f"samesite={samesite!r}: it is 'Lax', 'Strict' or 'None'")
    if samesite == "None" and not secure:
        raise ValueError("samesite='None' needs secure=True: browsers refuse such cookies without Secure")
    if not path.startswith("/") or not all(" " < c <= "~" and c not in ";," for c in path):
        raise ValueError(f"path={path!r} has to start with a slash and be made of visible ASCII characters but ; and ,")
    if domain is not None and (
        not domain.strip(".")
        or not domain.isascii()
        or domain.strip(".-") != domain.lstrip(".")
        or not domain.replace(".", "").replace("-", "").isalnum()
    ):
        raise ValueError(f"domain={domain!r} is no domain; leave it out for this host alone")
    if name.lower().startswith(("__host-", "__secure-")) and not secure:
        raise ValueError(f"cookie={name!r} needs secure=True: browsers refuse this prefix without Secure")
    if name.lower().startswith("__host-") and (domain is not None or path != "/"):
        raise ValueError(f"cookie={name!r} goes with path='/' and no domain=, that is what the prefix promises")


# WSGI
# ---------------------------------------------------------------------------

_KEY = "minisess.session"

# What a response with a new cookie says to shared caches, and what says more.
_NO_CACHE = 'no-cache="Set-Cookie"'
_STRICTER = ("no-store", "private", "no-cache", _NO_CACHE.lower())


def _with_directive(
    headers: list[tuple[str, str]], name: str, directive: str, enough: tuple[str, ...]
) -> list[tuple[str, str]]:
    """*headers* with *directive* in the one header *name*, unless that holds any of *enough* already."""
    others = [(n, v) for n, v in headers if n.lower() != name.lower()]
    values = [v for n, v in headers if n.lower() == name.lower()]
    directives = [d.strip().lower() for v in values for d in v.split(",")]
    if any(d in enough for d in directives):
        return list(headers)
    return [*others, (name, ", ".join([*filter(None, values), directive]))]


def _over(data: object, headers: object = None, exc_info: Any = None) -> Any:
    """Stands for the server's start_response and write() when the response is over."""
    if exc_info:
        raise exc_info[1]
    raise AssertionError("the response is over, nothing more can be sent (PEP 3333)")


class _Exchange:
    """One request and its response: opens the session when it is first asked for, saves it before the headers leave.

    The application's start_response is recorded, and passed on when the first of its body is
    there (PEP 3333 lets headers go no earlier), so that whatever it does until then counts.
    """

    # fmt: off
    __slots__ = (
        "_middleware", "_start", "_response", "_sent", "_send", "_outer",
        "_session", "_secure", "_uid", "_hold", "_cookie",
    )
    # fmt: on

    _middleware: SessionMiddleware
    # The server's start_response and write(), until the response is over: a server that keeps the
    # environ, as waitress does, would refer to itself through them, and wait for the garbage collector.
    _start: Any
    _send: Any
    _response: Any  # what the application gave to ours: (status, headers, exc_info), or None
    _sent: bool  # did the headers leave?
    _outer: _Exchange | None  # that of a middleware around this one, with another cookie
    _session: Any
    # These are set once there is a session:
    _secure: bool  # does the cookie need Secure?
    _uid: str | None  # the live session that the client has a cookie of
    _hold: Any  # what that session's hold was when it was opened
    _cookie: str | None  # a Set-Cookie header

    # The session

    def open(self, environ: dict[str, Any]) -> Any:
        """The live session that the request has a cookie of, or else a new one."""
        middleware, session, hold = self._middleware, None, None
        self._secure = secure = environ["wsgi.url_scheme"] in middleware._secure_schemes
        self._uid = self._hold = self._cookie = None
        header = environ.get("HTTP_COOKIE")
        if header is not None:
            hold = middleware.locking and not self._sent  # once they have left, nothing would let go of it
            # Strategy: in a well-formed header the value stands after "; name=".  Finding it there takes
            # 0.15 us whatever the header's length, http.cookies 5 to 27.
            uid = ("; " + header).partition(middleware._marks[secure])[2].partition(";")[0]
            if uid in middleware._candidates:
                session = middleware.store.open(uid, middleware.patience, hold)
            if session is None:
                uid, session = self._open_another(header, uid, hold)
            if session is not None:
                self._uid = uid
                if hold:
                    self._hold = session._hold
        self._session = session = session or self._create()
        return session

    def _open_another(self, header: str, uid: str, hold: bool) -> tuple[str, Any]:
        """Another of our cookies and its session, if *uid*, which was tried first, has none."""
        middleware = self._middleware
        name = middleware._names[self._secure]
        if _is_uid(uid):
            _log(20, uid, "isn't known (any more)")
            if header.count(name) == 1:  # that was it
                return uid, None
        for other in _all_cookies(header, name, uid):
            session = middleware.store.open(other, middleware.patience, hold)
            if session is not None:
                return other, session
            _log(20, other, "isn't known (any more)")
        return uid, None

    def replace(self) -> Any:
        """A new session, after the one of this request has ended."""
        self.abort()
        if self._session._by != get_ident():
            self._uid = None  # others ended it, the client's cookie may be a new one by now
        session = self._session = self._create()
        session._put(_by=get_ident())  # so its cookie is for this client
        self._hold = None
        return session

    def _create(self) -> Any:
        if self._sent:
            raise SessionError(
                "the headers have left, so a new session couldn't send its cookie: "
                "call ISession(environ) before the first piece of the body"
            )
        middleware = self._middleware
        return middleware.store.create(middleware.lifetime, middleware.max_lifetime)

    # The response

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """PEP 3333's start_response, for the application."""
        if self._response is None or exc_info is not None and not self._sent:
            self._response = status, headers, exc_info
            return self
        if exc_info is None:
            raise AssertionError("start_response was called twice without exc_info (PEP 3333)")
        # A server that has the headers still may replace them, it raises exc_info otherwise.
        try:
            return self._start(status, headers if self._session is None else self._dress(headers), exc_info)
        finally:
            exc_info = None  # its traceback refers to this frame

    def __call__(self, data: bytes) -> None:
        """PEP 3333's write().  (Strategy: making a bound method for it takes longer than recording the response.)"""
        if not self._sent:
            self.commit()
        self._send(data)

    def commit(self) -> None:
        """Save the session, find out what cookie the client needs, and let the headers leave."""
        if self._response is None:
            raise AssertionError("the application answered without calling start_response (PEP 3333)")
        status, headers, exc_info = self._response
        session = self._session
        if session is not None:
            # Its uid before it is saved: then a login may come in, whose new uid isn't for this client.
            middleware, uid = self._middleware, session.uid
            # After session.release() somebody else may hold it.
            held = self._hold is not None and session._hold is self._hold
            if held or session._state is not _STORED or not middleware.locking or session._is_changed():
                if session._state is not _ENDED:
                    middleware.store.save(session)
                # Nothing is saved of a session that ended, and in another thread save() doesn't let go.
                if held and (session._state is _ENDED or self._hold != get_ident()):
                    middleware.store.release(session)
            if uid != self._uid or session._state is not _STORED or middleware.persistent:
                self._cookie = self._choose_cookie(session, uid, held)
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

    def _choose_cookie(self, session: Any, uid: str, held: bool) -> str | None:
        """The Set-Cookie header for a session that is new, renewed or over, if it is for this client.

        Who renewed or ended a session matters: a request that still came with the old id (that
        may be an attacker's) must not be told the new one, nor take away what a login just set.
        """
        middleware, mine = self._middleware, session._by == get_ident()
        if session._state is _STORED:
            if held or mine or self._uid in (None, uid):
                return middleware._set_cookie(self._secure, uid, session.expires)
        elif self._uid is not None and (mine or session._state is _NEW):
            return middleware._delete_cookie(self._secure)
        return None

    def _dress(self, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The application's headers and ours, in a list of our own (theirs may be a constant)."""
        cookie = self._cookie
        # Strategy: most responses have neither Vary nor Cache-Control, which lengths tell for half the price.
        for name, _ in headers:
            if len(name) == 4 or len(name) == 13:
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
        if session._state is _NEW:
            session._clear()
        elif session._hold is not None and session._hold is self._hold:
            try:
                self._middleware.store.release(session)
            except SessionError as error:
                _log(30, session.uid, "wasn't let go, its lease will end: %s", error)

    def close(self) -> None:
        """The response is over.  What a body did to its session while it was sent is saved now."""
        session, sent = self._session, self._sent
        if not sent:
            self.abort()
        self._session, self._sent = None, True  # from here on it is too late for a new session
        self._start = self._send = _over
        self._response = ()
        if sent and session is not None and session._state is _STORED and session._is_changed():
            self._middleware.store.save(session)


class _Body:
    """The application's body, if it isn't a list: its first piece, or its end, lets the headers leave."""

    __slots__ = ("_exchange", "_result", "_next")

    def __init__(self, exchange: _Exchange, result: Iterable[bytes]) -> None:
        self._exchange, self._result = exchange, result
        self._next = iter(result).__next__

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        exchange = self._exchange
        try:
            chunk = self._next()
        except StopIteration:
            if not exchange._sent:  # write() may have been called
                exchange.commit()
            raise
        if not exchange._sent:
            exchange.commit()
        return chunk

    def close(self) -> None:
        try:
            close = getattr(self._result, "close", None)
            if close is not None:
                close()
        finally:
            self._exchange.close()

    def __del__(self) -> None:
        # A server that forgets close() doesn't leave the session locked.
        self._exchange.close()


class SessionMiddleware:
    """Wrap a WSGI application so that ``ISession(environ)`` is the visitor's session (PEP 3333).

    *store*: whatever adapts to `IStore`; None is a `MemoryStore` of its own.
    *cookie*: the cookie's name; over https it gets the prefix ``__Host-``.
    *lifetime*: seconds without a request after which a session ends (``session.setLifetime`` overrides it).
    *max_lifetime*: seconds after which it ends whatever happens.  None is no limit, for both.
    *locking*: one request of a session at a time; else changes are merged component by component.
    *patience*: seconds that a request waits for another of the same session, before `SessionBusy`.
    *secure*: True where a proxy ends TLS; None goes by ``wsgi.url_scheme``; False never sets Secure.
    *samesite*, *domain*, *path*: as in RFC 6265bis.
    *persistent*: the cookie outlives the browser (Max-Age), as long as the session does.
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        store: object = None,
        *,
        cookie: str = "sid",
        lifetime: float | None = 1800,
        max_lifetime: float | None = 43200,
        locking: bool = True,
        patience: float = 10,
        secure: bool | None = None,
        samesite: str = "Lax",
        domain: str | None = None,
        path: str = "/",
        persistent: bool = False,
    ) -> None:
        if not callable(app):
            raise TypeError(f"{app!r} isn't a WSGI application, it can't be called")
        if not isinstance(patience, (int, float)) or not patience >= 0:
            raise ValueError(f"patience is a number of seconds, not {patience!r}")
        _check_cookie_options(cookie, secure, samesite, domain, path)
        self.app = app
        self.store: Any = MemoryStore() if store is None else IStore(store)
        self.cookie = cookie
        self.lifetime, self.max_lifetime = _seconds(lifetime, "lifetime"), _seconds(max_lifetime, "max_lifetime")
        self.locking, self.patience, self.secure, self.persistent = locking, patience, secure, persistent
        self._has_default_store = store is None
        self._secure_schemes = {None: ("https",), True: ("http", "https"), False: ()}[secure]
        # What may be a session's id.  Strategy: what is in the dict is well-formed, and finding it
        # there takes a tenth of checking its characters.
        self._candidates = self.store._sessions if isinstance(self.store, MemoryStore) else _Uids()
        host = secure is not False and path == "/" and domain is None and not cookie.lower().startswith("__")
        # Each of these for http and for https: the cookie's name, how it begins in a header, what follows its value.
        self._names = (cookie, "__Host-" + cookie if host else cookie)
        self._marks = tuple(f"; {name}=" for name in self._names)
        attributes = f"; Path={path}" + (f"; Domain={domain}" if domain else "") + f"; HttpOnly; SameSite={samesite}"
        self._attributes = (attributes, attributes + "; Secure")

    def _set_cookie(self, secure: bool, uid: str, expires: float) -> str:
        age = ""
        if self.persistent:
            # Browsers keep a cookie for 400 days at most.
            age = f"; Max-Age={int(min(expires - self.store.clock(), 34560000))}"
        return f"{self._names[secure]}={uid}{self._attributes[secure]}{age}"

    def _delete_cookie(self, secure: bool) -> str:
        end = "; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT"
        return f"{self._names[secure]}={self._attributes[secure]}{end}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        outer = None
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
        exchange._middleware, exchange._start, exchange._outer = self, start_response, outer
        exchange._response = exchange._session = None
        exchange._sent = False
        result = None
        try:
            app = self.app
            result = app(environ, exchange.start_response)
            if type(result) is list or isinstance(result, (list, tuple)) or self._is_file(environ, result):
                if not exchange._sent:
                    exchange.commit()
                exchange._start = exchange._send = _over
                return result
            return _Body(exchange, result)
        except BaseException:
            # Nobody else will close what there is.
            try:
                exchange.close()
            finally:
                close = getattr(result, "close", None)
                if close is not None:
                    close()
            raise

    def _is_file(self, environ: dict[str, Any], result: object) -> bool:
        wrapper = environ.get("wsgi.file_wrapper")
        return isinstance(wrapper, type) and isinstance(result, wrapper)

    def _check_same_store(self, outer: SessionMiddleware) -> None:
        if not self._has_default_store and self.store is not outer.store:
            raise SessionError(
                f"two SessionMiddlewares, one in the other, use the cookie {self.cookie!r} but different stores: "
                "give one of them another name (cookie=), or both the same store"
            )


def _session_of_environ(environ: dict[str, Any]) -> Any:
    exchange = environ.get(_KEY)
    if exchange is None:
        return None
    session = exchange._session
    if session is None:
        return exchange.open(environ)
    return exchange.replace() if session._state is _ENDED else session


def _session_of_request(request: object) -> Any:
    environ = getattr(request, "environ", None)
    return _session_of_environ(environ) if isinstance(environ, dict) else None


registerAdapter(_session_of_environ, dict, ISession)
registerAdapter(_session_of_request, object, ISession)
