"""A form that other sites can't send in your visitor's name: the token is a component of the session.

python3 -m examples.csrf

curl -c jar -b jar http://127.0.0.1:8000/                                   ... name=token value=Hb3...
curl -c jar -b jar -d 'said=hello' http://127.0.0.1:8000/                   403, the token is missing
curl -c jar -b jar -d 'said=hello&token=Hb3...' http://127.0.0.1:8000/      303
curl -c jar -b jar http://127.0.0.1:8000/                                   ... <li>hello
"""

from hmac import compare_digest
from html import escape
from secrets import token_urlsafe

from examples import read_form, serve
from minisess import Interface, ISession, Session, SessionMiddleware, implementer, registerAdapter


class IToken(Interface):
    value: str

    def field(self): ...
    def check(self, form): ...


@implementer(IToken)
class Token:
    """A secret of one session that only our own pages contain."""

    def __init__(self, session):
        self.value = token_urlsafe(16)

    def field(self):
        return f'<input type=hidden name=token value="{self.value}">'

    def check(self, form):
        return compare_digest(form.get("token", "").encode(), self.value.encode())


registerAdapter(Token, Session, IToken)


def app(environ, start_response):
    session = ISession(environ)
    said = getattr(session, "said", [])
    html = [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")]
    if environ["REQUEST_METHOD"] == "POST":
        form = read_form(environ)
        if IToken not in session or not IToken(session).check(form):
            start_response("403 Forbidden", html)
            return [b"<!doctype html><title>No</title><p>This didn't come from our form.\n"]
        session.said = [*said, form.get("said", "...")][-10:]
        start_response("303 See Other", [*html, ("Location", "/")])
        return [b""]
    start_response("200 OK", html)
    items = "".join(f"<li>{escape(each)}" for each in said)
    form = f"<form method=post>{IToken(session).field()}<input name=said> <button>Say it</button></form>"
    return [f"<!doctype html><title>Say something</title><ul>{items}</ul>{form}\n".encode()]


application = SessionMiddleware(app)

if __name__ == "__main__":
    serve(application)
