"""What mypy --strict and pyright's strict mode have to know about an installed minisess.

An ignored error that isn't one is an error, too.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

from minisess import Interface, ISession, MemoryStore, Session, SessionMiddleware, implementer, peek, registerAdapter


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session: Session) -> None:
        self.hits = 0


registerAdapter(Counter, Session, ICounter)
store = MemoryStore()


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    session = ISession(environ)
    session.colour = "green"
    session.owner = "x"  # type: ignore
    session.expire(1)  # type: ignore
    assert_type(session.owner, str | None)
    assert_type(ICounter(session), ICounter)
    assert_type(ICounter(session).hits, int)
    assert_type(ICounter(session, None), ICounter | None)
    assert_type(peek(environ), Session | None)
    store.expireAll("ann", keep=session)
    return []


application = SessionMiddleware(app, store)
SessionMiddleware(app, lifetme=60)  # type: ignore
