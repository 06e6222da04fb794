"""A shopping cart in an SQLite file, which any number of processes on one machine share.

Start it twice; a cookie is good for all ports of a host, so both see the same cart:

    CART=/tmp/cart.sqlite3 python3 -m examples.cart 8000 &
    CART=/tmp/cart.sqlite3 python3 -m examples.cart 8001 &

    curl -c jar -b jar -d thing=tea http://127.0.0.1:8000/      1 tea (process 4711)
    curl -c jar -b jar -d thing=tea http://127.0.0.1:8001/      2 tea (process 4712)
    curl -c jar -b jar -X DELETE http://127.0.0.1:8000/         empty (process 4711)

Kill either with -9: nothing that was answered is lost.
"""

import os
import tempfile
from collections import Counter

from examples import read_form, serve
from minisess import Interface, ISession, Session, SessionMiddleware, SQLiteStore, implementer, registerAdapter


class ICart(Interface):
    things: Counter

    def put(self, thing): ...


@implementer(ICart)
class Cart:
    def __init__(self, session):
        self.things = Counter()

    def put(self, thing):
        self.things[thing[:40]] += 1


registerAdapter(Cart, Session, ICart)


def app(environ, start_response):
    cart = ICart(ISession(environ))
    if environ["REQUEST_METHOD"] == "POST":
        form = read_form(environ)
        if "thing" in form:
            cart.put(form["thing"])
    elif environ["REQUEST_METHOD"] == "DELETE":
        ISession(environ).unsetComponent(ICart)
        cart = ICart(ISession(environ))  # a new one
    content = ", ".join(f"{count} {thing}" for thing, count in cart.things.items()) or "empty"
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{content} (process {os.getpid()})\n".encode()]


store = SQLiteStore(
    os.environ.get("CART") or os.path.join(tempfile.mkdtemp(), "cart.sqlite3"),
    # The same for all processes, and known to nobody else: python3 -c 'import secrets; print(secrets.token_hex(32))'
    secret=os.environ.get("CART_SECRET", "not a secret, since everybody can read it here"),
)
application = SessionMiddleware(app, store, lifetime=7 * 86400, max_lifetime=None, persistent=True)

if __name__ == "__main__":
    # A store keeps classes by name, and __main__.Cart isn't one that other programs could import.
    from examples.cart import application

    serve(application)
