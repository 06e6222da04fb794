"""How often were you here?  The smallest program that keeps something for each visitor.

python3 -m examples.counter

curl -c jar -b jar http://127.0.0.1:8000/       Visits: 1
curl -c jar -b jar http://127.0.0.1:8000/       Visits: 2
curl http://127.0.0.1:8000/                     Visits: 1      (someone else)
"""

import sys
from wsgiref.simple_server import make_server

from minisess import Interface, ISession, Session, SessionMiddleware, implementer, registerAdapter


class ICounter(Interface):
    hits: int


@implementer(ICounter)
class Counter:
    def __init__(self, session):
        self.hits = 0


registerAdapter(Counter, Session, ICounter)


def app(environ, start_response):
    if environ["PATH_INFO"] != "/":  # browsers ask for a favicon, which is no visit
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"There is nothing here.\n"]
    counter = ICounter(ISession(environ))  # made on first use, the same object ever after
    counter.hits += 1
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"Visits: {counter.hits}\n".encode()]


application = SessionMiddleware(app)

if __name__ == "__main__":
    server = make_server("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000, application)
    print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
