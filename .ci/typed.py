"""What type checkers have to know about minisess, by mypy --strict and by pyright's strict mode.

An ignored error that isn't one is an error, too.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

from minisess import (
    Adapter,
    CannotAdapt,
    Componentized,
    Interface,
    ISession,
    MemoryStore,
    Session,
    SessionMiddleware,
    implementer,
    peek,
    registerAdapter,
    registry,
)


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
registerAdapter("Counter", Session, ICounter)  # type: ignore[arg-type]
store = MemoryStore(capacity=10)


def use(session: Session, environ: dict[str, Any], request: object) -> None:
    assert_type(Counter(session), Counter)
    assert_type(ICounter(session), ICounter)
    assert_type(ICounter(session, None), ICounter | None)
    assert_type(ICounter(session, 5), ICounter | int)
    assert_type(ICounter(session).hits, int)
    assert_type(ICounter(session).add(1), str)
    assert_type((IMore(session).hits, IMore(session).more), tuple[int, bytes])
    print(ICounter(session).nope)  # type: ignore[attr-defined]
    ICounter(session).hits = "one"  # type: ignore[assignment]
    ICounter(session).add("one")  # type: ignore[arg-type]
    print(ICounter(session, None).hits)  # type: ignore[union-attr]
    ICounter()  # type: ignore[call-overload]
    if isinstance(request, ICounter):
        assert_type(request.hits, int)

    assert_type(ISession(environ), ISession)
    assert_type(ISession(environ, None), ISession | None)
    assert_type(ISession(request).uid, str)
    assert_type(ISession(request).expires, float)
    assert_type(ISession(request).owner, str | None)
    assert_type(peek(environ), Session | None)
    mine = ISession(environ)
    mine.colour = "red"
    assert_type(ISession(environ).colour, Any)
    mine.owner = "x"  # type: ignore[assignment]
    session.uid = "x"  # type: ignore[assignment]
    mine.login("ann", remember=60)
    mine.login(5)  # type: ignore[arg-type]
    mine.notifyOnExpire(lambda: None)
    mine.renew(1)  # type: ignore[call-arg]
    assert_type(store.expireAll("ann", keep=mine), int)
    assert_type(store.sessions("ann"), list[Session])

    mine.setComponent(ICounter, object())
    mine.setComponent("ICounter", object())  # type: ignore[arg-type]
    assert_type(ICounter in mine, bool)
    assert_type(ICounter(mine), ICounter)
    session.unsetComponent(ICounter)
    assert_type(session.getComponent(ICounter), ICounter | None)
    assert_type(session.getComponent(ICounter, 5), ICounter | int)
    assert_type(mine.getComponent(ICounter), ICounter | None)
    assert_type(Componentized().getComponent(ICounter), ICounter | None)
    assert_type(session.addAdapter(Counter), Counter)
    print(Adapter(session).original.anything)


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    try:
        ICounter(ISession(environ)).hits += 1
    except CannotAdapt as error:
        assert_type(error.original, object)
    return [b""]


SessionMiddleware(application, store, cookie="sid", lifetime=60, secure=True)
SessionMiddleware(application, lifetme=60)  # type: ignore[call-arg]
