"""An event stream beside other requests of the same session: release() lets them in while it waits.

python3 -m examples.streaming       (open it, and press the button)

curl -c jar -b jar -X POST http://127.0.0.1:8000/       1
curl -c jar -b jar -N http://127.0.0.1:8000/events &    waits, then prints what the other requests do:
curl -c jar -b jar -X POST http://127.0.0.1:8000/       2       data: 2
curl -c jar -b jar -X POST http://127.0.0.1:8000/       3       data: 3
curl -c jar -b jar -X DELETE http://127.0.0.1:8000/     ended   : goodbye
"""

import time

from examples import serve
from minisess import Interface, ISession, Session, SessionMiddleware, implementer, registerAdapter

PAGE = """<!doctype html><title>Streaming</title>
<p><output>-</output> <button onclick="fetch('/', {method: 'POST'})">+1</button>
<button onclick="fetch('/', {method: 'DELETE'})">End the session</button>
<script>
new EventSource("/events").onmessage = event => document.querySelector("output").textContent = event.data
</script>
"""


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session):
        self.hits = 0


registerAdapter(Counter, Session, ICounter)


def events(session, counter, seconds=60):
    """What happens to *counter*, for a minute or until the session ends; then the browser asks again."""
    end, seen = time.monotonic() + seconds, counter.hits
    while time.monotonic() < end and not session.ended:
        # A MemoryStore keeps live objects, so this one shows what other requests do, and session.ended
        # is known at once.  With another store it is this request's own copy: let a message broker
        # tell what happened, and session.touch() whether the session has ended.
        if counter.hits != seen:
            seen = counter.hits
            yield f"data: {seen}\n\n".encode()
        time.sleep(0.05)
    yield b": goodbye\n\n"


def app(environ, start_response):
    if environ["PATH_INFO"] == "/events":
        session = ISession(environ)
        counter = ICounter(session)
        session.release()  # Until its first piece is there a response holds its session, and that may take a while.
        start_response("200 OK", [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")])
        return events(session, counter)
    start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
    if environ["REQUEST_METHOD"] == "POST":
        counter = ICounter(ISession(environ))
        counter.hits += 1
        return [f"{counter.hits}\n".encode()]
    if environ["REQUEST_METHOD"] == "DELETE":
        ISession(environ).expire()
        return [b"ended\n"]
    return [PAGE.encode()]


application = SessionMiddleware(app)

if __name__ == "__main__":
    serve(application)
