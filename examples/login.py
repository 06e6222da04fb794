"""A small real application: logging in, "remember me", your devices, the password again for what matters.

    python3 -m examples.login       (open it in two browsers, log in as alice, password wonderland)

Read `Site` from top to bottom.  `enter` logs in, and sets a component that describes the device.
`devices` lists what ``store.sessions(owner)`` knows, `leave` ends one of them by its handle, or all
others.  `address` asks for the password again, five minutes after the last time.  Pages that only
look `peek`; what changes something is posted, with the token of examples/csrf.py.  With curl:

    form() { curl -s -c jar -b jar http://127.0.0.1:8000$1 | grep -o 'token value="[^"]*' | head -1 | cut -d'"' -f2; }
    post() { curl -si -c jar -b jar -d "token=$(form $1)&$3" http://127.0.0.1:8000$2; }

    curl -i -c jar -b jar http://127.0.0.1:8000/devices     # 303, to /login
    cp jar before                                           # what somebody has who planted alice's session id
    curl -i -d 'name=alice&password=wonderland' http://127.0.0.1:8000/login             # 403, there is no token
    post /login /login 'name=alice&password=wonderland&remember=on'     # 303, to /devices; Max-Age=2592000
    curl -i -c jar -b jar http://127.0.0.1:8000/devices     # 200, one device: curl
    curl -i -b before http://127.0.0.1:8000/devices         # 303, that id is dead
    post /devices /leave others=yes                         # 303, all other devices are logged out
    post /devices /leave                                    # 303, so is this one
"""

import os
import time
from base64 import b64encode
from dataclasses import dataclass
from hashlib import scrypt, sha256
from hmac import compare_digest
from html import escape

from examples import read_form, serve
from examples.csrf import IToken, Token
from minisess import Interface, ISession, MemoryStore, SessionMiddleware, implementer, peek

REMEMBER = 30 * 86400
FRESH = 5 * 60  # for how many seconds nobody has to give the password again

# Who there is
# ---------------------------------------------------------------------------


def hashed(password, salt):
    return salt, scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


USERS = {"alice": hashed("wonderland", os.urandom(16)), "bob": hashed("builder", os.urandom(16))}


def is_right(name, password):
    """Takes as long for names that there aren't."""
    salt, right = USERS.get(name, (b"", bytes(64)))
    return compare_digest(hashed(password, salt)[1], right)


class IDevice(Interface):
    browser: str
    since: float
    remember: float | None


@implementer(IDevice)
@dataclass
class Device:
    """What somebody has logged in with.  Set by logging in, not by an adapter: there is none before."""

    browser: str
    since: float
    remember: float | None


PROGRAMS = {"Edg/": "Edge", "OPR/": "Opera", "Firefox/": "Firefox", "Chrome/": "Chrome", "Safari/": "Safari"}
SYSTEMS = "iPhone", "iPad", "Android", "Windows", "Macintosh", "Linux"


def browser(agent):
    """A User-Agent in words that people know their devices by."""
    name = next((PROGRAMS[mark] for mark in PROGRAMS if mark in agent), agent.partition("/")[0][:30] or "A program")
    return " on ".join([name, *[system for system in SYSTEMS if system in agent][:1]])


# How it looks
# ---------------------------------------------------------------------------

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f3ee; --card: #fff; --ink: #23201b; --soft: #6d675d; --line: #e5e0d6; --accent: #3a5bc7;
  --on: #fff; --mark: #e9eefc; --stop: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16171b; --card: #1f2126; --ink: #e9e7e2; --soft: #a19d95; --line: #34363d; --accent: #8fa8ff;
    --on: #10131f; --mark: #2a3150; --stop: #ff8a80;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, "Segoe UI", sans-serif; }
header, main { max-width: 38rem; margin: 0 auto; padding: 0 1rem; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 0 1.25rem; padding-block: 1rem; }
header strong { margin-right: auto; font-size: 1.1rem; }
header a { padding: .6rem 0; color: var(--soft); }
header [aria-current] { color: var(--ink); font-weight: 600; text-decoration: none; }
main > * {
  margin: 0 0 1rem; padding: clamp(1rem, 5vw, 1.75rem); border: 1px solid var(--line); border-radius: 1rem;
  background: var(--card);
}
h1 { margin: 0 0 .75rem; font-size: 1.5rem; line-height: 1.25; }
p { margin: 0 0 1rem; overflow-wrap: anywhere; }
p:last-child { margin: 0; }
li p, mark { font-size: .875rem; }
li p { color: var(--soft); }
a { color: var(--accent); }
label { display: block; margin-bottom: 1rem; font-weight: 600; }
label:has([type=checkbox]) { display: flex; align-items: center; gap: .6rem; min-height: 2.75rem; font-weight: 400; }
input { display: block; width: 100%; min-height: 2.75rem; margin-top: .25rem; padding: 0 .75rem; font: inherit; }
input, button { border: 1px solid var(--line); border-radius: .6rem; background: var(--page); color: inherit; }
[type=checkbox] { flex: none; width: 1.25rem; min-height: 1.25rem; margin: 0; accent-color: var(--accent); }
button { min-height: 2.75rem; padding: .4rem 1rem; font: inherit; font-weight: 600; line-height: 1.25; }
button { cursor: pointer; }
button:hover { border-color: currentcolor; }
.main { border-color: var(--accent); background: var(--accent); color: var(--on); }
.stop, .wrong { color: var(--stop); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
ul { margin: 0 0 1rem; padding: 0; list-style: none; }
li { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem 1rem; padding: .9rem 0; }
li { border-top: 1px solid var(--line); }
li div { flex: 1 1 13rem; }
mark { margin-left: .5rem; padding: .1rem .55rem; border-radius: 1rem; background: var(--mark); color: inherit; }
"""
POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'; img-src data:; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", POLICY),
]
PAGE = f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>%s</title><link rel=icon href="data:,"><style>{STYLE.replace("%", "%%")}</style>
<header><strong>Wonderland</strong>%s</header>
<main>%s</main>
"""
PASSWORD = "<label>Password<input name=password type=password required autocomplete=current-password></label>"
WRONG = "<p class=wrong role=alert>That is wrong.</p>"
NOTHING = "Not found", "<section><h1>There is nothing here</h1></section>"
TOO_OLD = "Too old", "<section><h1>This form is too old</h1><p>Load its page again, then try once more.</p></section>"


def links(owner, path):
    texts = {"/devices": "Devices", "/address": "E-mail"} if owner else {"/login": "Log in"}
    return "".join(f"<a href={to}{' aria-current=page' * (to == path)}>{text}</a>" for to, text in texts.items())


def form(session, action, content):
    return f"<form method=post action={action}>{IToken(session).field()}{content}</form>"


def ago(seconds):
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


# What it does
# ---------------------------------------------------------------------------


class Site:
    """The application.  Its pages answer (title, content), or the path to go to next."""

    def __init__(self, store):
        self.store, self.addresses = store, {}
        self.looks = {"/": self.home, "/login": self.door, "/devices": self.devices, "/address": self.address}
        self.acts = {"/login": self.enter, "/address": self.set_address, "/leave": self.leave}

    def __call__(self, environ, start_response):
        path, posted = environ["PATH_INFO"], environ["REQUEST_METHOD"] == "POST"
        pages = self.acts if posted else self.looks
        # Who only looks waits for nobody and stores nothing.  A form to log in has a token, which is kept.
        session = ISession(environ) if posted or path == "/login" else peek(environ)
        owner = session.owner if session else None
        if path not in pages:
            answer = NOTHING
        elif not owner and path not in ("/", "/login"):
            if not posted:
                ISession(environ).wanted = path
            answer = "/login"
        elif posted:
            fields = read_form(environ)
            known = IToken in session and IToken(session).check(fields)
            answer = pages[path](session, fields, environ) if known else TOO_OLD
        else:
            # peek starts the idle clock once in an eighth of the lifetime, "last seen" wants more than that.
            if owner and self.store.clock() - session.lastModified >= 60:
                session.touch()
            answer = pages[path](session)
        if isinstance(answer, str):
            start_response("303 See Other", [*HEADERS, ("Location", answer)])
            return [b""]
        status = "404 Not Found" if answer is NOTHING else "403 Forbidden" if posted else "200 OK"
        start_response(status, HEADERS)
        return [(PAGE % (answer[0], links(owner, path), answer[1])).encode()]

    # Pages to look at

    def home(self, session):
        who = escape(session.owner) if session and session.owner else "stranger"
        return "Wonderland", f"<section><h1>Hello, {who}</h1><p>Everybody may see this page.</p></section>"

    def door(self, session, wrong=""):
        content = f"""<h1>Log in</h1>{wrong}
            <label>Name<input name=name required maxlength=40 autocomplete=username></label>{PASSWORD}
            <label><input type=checkbox name=remember> Remember me on this device for 30 days</label>
            <button class=main>Log in</button>"""
        return "Log in", form(session, "/login", content)

    def devices(self, session):
        items = []
        for each in self.store.sessions(session.owner):
            device, this = IDevice(each), each.handle == session.handle
            name = escape(device.browser)
            button = f'<button name=handle value={each.handle} aria-label="Log out {name}">Log out</button>'
            since = time.strftime("%d %b %Y, %H:%M UTC", time.gmtime(device.since))
            seen = "now" if this else ago(self.store.clock() - each.lastModified)
            items.append(f"""<li><div><strong>{name}</strong>{"<mark>this one</mark>" * this}
                <p>Logged in {since}{", remembered" if device.remember else ""}<br>Last seen {seen}</p></div>
                {form(session, "/leave", button)}</li>""")
        content = f"<h1>Your devices</h1><ul>{''.join(items)}</ul>"
        if len(items) > 1:
            button = "<button class=stop name=others value=yes>Log out everywhere else</button>"
            content += form(session, "/leave", button)
        return "Your devices", f"<section>{content}</section>"

    def address(self, session):
        if self.store.clock() - session.authenticated >= FRESH:
            return self.ask(session)
        content = f"""<h1>Your e-mail address</h1><p>A new password would be sent there, so this page asks for
            the one you have, if you gave it more than five minutes ago.</p>
            <label>E-mail<input name=address type=email required maxlength=80
            value="{escape(self.addresses.get(session.owner, ""))}"></label><button class=main>Save</button>"""
        return "Your e-mail address", form(session, "/address", content)

    def ask(self, session, wrong="<p>This page wants your password again.</p>"):
        content = f"<h1>Is it still you?</h1>{wrong}{PASSWORD}<button class=main>Go on</button>"
        return "Your password, please", form(session, "/address", content)

    # What is posted

    def admit(self, session, name, device):
        session.login(name, remember=device.remember)  # a new id: whoever knew the one from before knows nothing now
        session.setComponent(IDevice, device)
        session.setComponent(IToken, Token(session))  # new for the same reason

    def enter(self, session, fields, environ):
        name, remember = fields.get("name", ""), REMEMBER if "remember" in fields else None
        if not is_right(name, fields.get("password", "")):
            return self.door(session, WRONG)
        self.admit(session, name, Device(browser(environ.get("HTTP_USER_AGENT", "")), self.store.clock(), remember))
        return getattr(session, "wanted", "/devices")

    def set_address(self, session, fields, environ):
        if "password" in fields:
            if not is_right(session.owner, fields["password"]):
                return self.ask(session, WRONG)
            self.admit(session, session.owner, IDevice(session))
        elif self.store.clock() - session.authenticated < FRESH:
            self.addresses[session.owner] = fields.get("address", "")[:80]
        return "/address"

    def leave(self, session, fields, environ):
        if "others" in fields:
            self.store.expireAll(session.owner, keep=session)
        elif fields.get("handle", session.handle) == session.handle:
            session.expire()
            return "/"
        for each in self.store.sessions(session.owner):  # of this owner: nobody logs out somebody else
            if each.handle == fields.get("handle"):
                each.expire()
        return "/devices"


def make_application(store):
    return SessionMiddleware(Site(store), store)


application = make_application(MemoryStore())

if __name__ == "__main__":
    serve(application)
