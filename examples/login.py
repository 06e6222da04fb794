"""Who may see what: logging in and out, a page behind a login, "log out everywhere" (as Nevow's guard did).

python3 -m examples.login       (then log in as alice, password wonderland)

curl -i -c jar -b jar http://127.0.0.1:8000/secret                                  303, to /login
cp jar before                       # what somebody who fixed Alice's session id would know
curl -i -c jar -b jar -d 'name=alice&password=wonderland' http://127.0.0.1:8000/login      303, to /secret
curl -c jar -b jar http://127.0.0.1:8000/secret                                     The secret is ...
curl -i -b before http://127.0.0.1:8000/secret                                      303: that id is dead
curl -i -c jar -b jar -X POST http://127.0.0.1:8000/logout                          or /logout-everywhere
"""

from hashlib import scrypt
from hmac import compare_digest
from html import escape
from urllib.parse import parse_qs

from examples import serve
from minisess import Interface, ISession, MemoryStore, SessionMiddleware, implementer


class ICurrentUser(Interface):
    name: str


@implementer(ICurrentUser)
class User:
    def __init__(self, name):
        self.name = name


def hashed(password):
    return scrypt(password.encode(), salt=b"one for each user, from os.urandom", n=1024, r=8, p=1)


PASSWORDS = {"alice": hashed("wonderland"), "bob": hashed("builder")}
NOBODY = bytes(64)
FORM = "<form method=post><input name=name> <input name=password type=password> <button>Log in</button></form>"
BUTTON = "<form method=post action={}><button>Log out{}</button></form>"
EXITS = BUTTON.format("/logout", "") + BUTTON.format("/logout-everywhere", " everywhere")


def app(environ, start_response):
    def answer(html, status="200 OK", *headers):
        start_response(status, [("Content-Type", "text/html; charset=utf-8"), *headers])
        return [f"<!doctype html><title>Login</title><p>{html}\n".encode()]

    session, page = ISession(environ), (environ["REQUEST_METHOD"], environ["PATH_INFO"])
    user = ICurrentUser(session, None)
    if page == ("POST", "/login"):
        form = parse_qs(environ["wsgi.input"].read(min(int(environ.get("CONTENT_LENGTH") or 0), 1000)).decode())
        name, password = form.get("name", [""])[0], form.get("password", [""])[0]
        if not compare_digest(hashed(password), PASSWORDS.get(name, NOBODY)):
            return answer("That is wrong. " + FORM, "403 Forbidden")
        session.login(name)  # a new id: whoever knew the one from before knows nothing now
        session.setComponent(ICurrentUser, User(name))
        return answer("Welcome.", "303 See Other", ("Location", getattr(session, "wanted", "/")))
    if page[0] == "POST" and user is not None:
        if page[1] == "/logout-everywhere":
            store.expireAll(user.name, keep=session)
        session.expire()
        return answer("Bye.", "303 See Other", ("Location", "/"))
    if page[1] == "/login":
        return answer(FORM)
    if page[1] == "/secret" and user is None:
        session.wanted = "/secret"  # where to go after the login
        return answer("Log in first.", "303 See Other", ("Location", "/login"))
    if page[1] == "/secret":
        return answer(f"The secret is that {escape(user.name)} is here. {EXITS}")
    return answer("Everybody may see this. <a href=/secret>The secret</a>")


store = MemoryStore()
application = SessionMiddleware(app, store)

if __name__ == "__main__":
    serve(application)
