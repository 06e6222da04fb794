"""A page to look at: what your session is, what is kept on it, and how long it will live.

    python3 -m examples.inspector       (open it, press the buttons; then open a second tab, or a private window)

    curl -c jar -b jar http://127.0.0.1:8000/                                   the page, with its token=...
    curl -i -c jar -b jar -d 'do=click&token=...' http://127.0.0.1:8000/        303; or do=touch, renew, login, ...
    curl -i -c jar -b jar -d 'do=click' http://127.0.0.1:8000/                  403, the token is missing

It ends after a minute without a request, so that one can watch it do so.
"""

from hmac import compare_digest
from html import escape
from secrets import token_urlsafe

from examples import read_form, serve
from minisess import Interface, ISession, MemoryStore, Session, SessionMiddleware, implementer, registerAdapter

# What is kept on the session
# ---------------------------------------------------------------------------


class IClicks(Interface):
    count: int


class IToken(Interface):
    value: str

    def check(self, form): ...


class IVisitor(Interface):
    name: str


@implementer(IClicks)
class Clicks:
    def __init__(self, session):
        self.count = 0

    def __repr__(self):
        return f"Clicks, count = {self.count}"


@implementer(IToken)
class Token:
    """A secret that only our own pages contain, so other sites can't press our buttons."""

    def __init__(self, session):
        self.value = token_urlsafe(16)

    def check(self, form):
        return compare_digest(form.get("token", "").encode(), self.value.encode())

    def __repr__(self):
        return f"Token, value = {self.value[:4]}…"


@implementer(IVisitor)
class Visitor:
    """Made by logging in, not by an adapter: there is no visitor before."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"Visitor, name = {self.name}"


registerAdapter(Clicks, Session, IClicks)
registerAdapter(Token, Session, IToken)

# What the buttons do
# ---------------------------------------------------------------------------


def click(session, form):
    IClicks(session).count += 1


def touch(session, form):
    session.touch()  # every request does that, this one does nothing else


def renew(session, form):
    session.renew()


def login(session, form):
    name = form.get("name", "").strip()[:20] or "somebody"
    session.login(name)
    session.setComponent(IVisitor, Visitor(name))


def end(session, form):
    session.expire()


# What they do, their text, what that means, and where they lead.
BUTTONS = {
    "click": (click, "Count", "Adds one to a component, which is made when it is first asked for.", "/"),
    "touch": (touch, "Keep alive", "Does nothing else: any request starts the minute again.", "/"),
    "renew": (renew, "Renew", "Gives it a new id. What is kept stays, the old id is dead.", "/"),
    "login": (login, "Log in", "Makes it yours: a new id, an owner, and a component that says who.", "/"),
    "logout": (end, "Log out", "Ends it: gone from the store, with all that is kept, and the cookie.", "/gone"),
    "expire": (end, "End it", "As when its time is up: gone from the store, with all that is kept.", "/gone"),
}

# The page
# ---------------------------------------------------------------------------

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f3f4f1; --card: #fff; --ink: #1c2321; --soft: #66706c; --line: #e2e5e1; --well: #eceeea;
  --accent: #0f766e; --accent-ink: #fff; --warn: #b45309; --stop: #b91c1c;
  --shadow: 0 1px 2px #0000000d, 0 12px 32px -12px #00000024;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121615; --card: #1b201f; --ink: #e6ebe8; --soft: #98a39e; --line: #2e3533; --well: #262c2a;
    --accent: #4fd1c0; --accent-ink: #06201c; --warn: #f0a848; --stop: #f47c74;
    --shadow: 0 12px 32px -12px #000;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: clamp(.75rem, 4vw, 3rem) clamp(.75rem, 4vw, 2rem); background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main {
  max-width: 42rem; margin: 0 auto; padding: clamp(1.1rem, 4vw, 2rem); border: 1px solid var(--line);
  border-radius: 1rem; background: var(--card); box-shadow: var(--shadow);
}
header { display: flex; flex-wrap: wrap; align-items: center; gap: .75rem 1rem; }
.swatch {
  flex: none; width: 3.25rem; height: 3.25rem; border-radius: .9rem;
  background: linear-gradient(135deg, hsl(var(--hue) 60% 58%), hsl(calc(var(--hue) + 45) 60% 42%));
}
header p { margin: 0; color: var(--soft); font-size: .875rem; }
h1 { margin: 0; font-size: clamp(1rem, 5.2vw, 1.6rem); line-height: 1.35; }
h1, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-weight: 600; }
.owner {
  margin-left: auto; padding: .25rem .75rem; border-radius: 1rem; background: var(--well);
  font-size: .875rem; overflow-wrap: anywhere;
}
.bar { height: .6rem; margin: 1.6rem 0 .5rem; overflow: hidden; border-radius: .3rem; background: var(--well); }
.bar i {
  display: block; width: 100%; height: 100%; border-radius: inherit; background: var(--accent);
  transform-origin: left; transition: transform .2s linear, background-color .6s;
}
.low .bar i { background: var(--warn); }
.time { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin: 0; color: var(--soft); }
.time b { color: var(--ink); font-variant-numeric: tabular-nums; }
.low .time b { color: var(--warn); }
.buttons { margin: 1.4rem 0 0; }
.buttons form { display: flex; align-items: center; gap: .3rem 1rem; padding: .4rem 0; }
.buttons p { margin: 0; color: var(--soft); font-size: .875rem; line-height: 1.4; }
button, .button, input {
  min-height: 2.75rem; padding: 0 1.1rem; border: 1px solid var(--line); border-radius: .65rem;
  background: var(--card); color: inherit; font: inherit; font-weight: 500;
}
button, .button {
  display: inline-flex; align-items: center; justify-content: center; cursor: pointer; text-decoration: none;
}
button:hover, .button:hover { background: var(--well); }
.main, .main:hover { border-color: var(--accent); background: var(--accent); color: var(--accent-ink); }
.main:hover { filter: brightness(1.08); }
.stop { color: var(--stop); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.do { display: flex; flex: none; width: 11rem; }
.do button { flex: 1; white-space: nowrap; }
.do input { flex: 1; width: 0; border-radius: .65rem 0 0 .65rem; border-right: 0; font-weight: 400; }
.do input + button { flex: none; border-radius: 0 .65rem .65rem 0; }
h2 { margin: 1.8rem 0 .3rem; color: var(--soft); font-size: .875rem; font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; margin: 0; }
dt, dd { margin: 0; padding: .5rem 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
dt { color: var(--soft); }
dt:has(code) { color: inherit; }
code { font-size: .9em; }
footer { max-width: 42rem; margin: 1.2rem auto 0; color: var(--soft); font-size: .875rem; text-align: center; }
a { color: inherit; }
.gone { display: none; margin: 1.4rem 0 0; }
.over .gone { display: block; }
.over :is(.buttons, .time, .owner, .kept), .over footer { display: none; }
.over .swatch { background: var(--well); }
.over .bar i { transform: scaleX(0); }
.over h1 { color: var(--soft); }
.live.over h1 { text-decoration: line-through; text-decoration-thickness: 1px; }
@media (max-width: 30rem) {
  .owner { margin: 0; }
  .buttons form { flex-direction: column; align-items: stretch; padding: .75rem 0; }
  .do { width: auto; }
  dl { grid-template-columns: 7rem 1fr; }
}
@media (prefers-reduced-motion: reduce) { * { transition: none !important; } }
"""

SCRIPT = """
const page = document.body, {state, lifetime} = page.dataset
const $ = selector => document.querySelector(selector)
const begin = Date.now() - 1000 * page.dataset.age
let end = Date.now() + 1000 * page.dataset.left

function show() {
  const left = Math.max(0, (end - Date.now()) / 1000), share = Math.min(1, left / lifetime)
  $(".bar i").style.transform = `scaleX(${share})`
  $(".bar").setAttribute("aria-valuenow", Math.round(100 * share))
  $(".time b").textContent = `${Math.floor(Math.ceil(left) / 60)}:${String(Math.ceil(left) % 60).padStart(2, "0")}`
  $(".age").textContent = `${Math.floor((Date.now() - begin) / 1000)} s`
  page.classList.toggle("low", share < .25)
  if (left === 0) over()
}
function over() {
  clearInterval(timer)
  page.classList.add("over")
  $(".bar i").style.transform = ""
  if (page.classList.contains("live")) $("header p").textContent = document.title = "Your session has expired"
}
const timer = setInterval(show, 200)
if (page.classList.contains("live")) show(); else over()

// Tabs tell each other what they were told, so that looking at it doesn't keep it alive.
const tabs = new BroadcastChannel("inspector")
tabs.onmessage = ({data}) => {
  if (data.state === state) end = data.end
  else if (data.state === "over") over()
  else location.reload()
}
if (state) tabs.postMessage({state, end})
"""

PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title><link rel=icon href="data:,">
<style nonce={nonce}>{style}</style>
<style nonce={nonce}>:root {{ --hue: {hue} }}</style>
<body class="{kind}" data-state="{state}" data-age={age:.3f} data-left={left:.3f} data-lifetime={lifetime:.0f}>
<main>
<header>
  <span class=swatch></span>
  <div><p aria-live=polite>{title}</p><h1>{tag}</h1></div>
  <span class=owner>{owner}</span>
</header>
<div class=bar role=progressbar aria-label="Time left" aria-valuemin=0 aria-valuemax=100><i></i></div>
<p class=time><span><b role=timer>{left:.0f} s</b> left</span> <span>{until}</span></p>
<div class=gone>
  <p>It is gone from the store, with all that was kept on it.</p>
  <a class="button main" href="/">Start a new one</a>
</div>
<div class=buttons>{buttons}</div>
<div class=kept>{tables}</div>
</main>
<footer>{footer}</footer>
<script nonce={nonce}>{script}</script>
"""


def button(token, name, kind="", field=""):
    _, text, meaning, _ = BUTTONS[name]
    press = f'{field}<button name=do value={name} class="{kind}" aria-describedby=is-{name}>{text}</button>'
    hidden = f'<input type=hidden name=token value="{token.value}">'
    return f"<form method=post>{hidden}<span class=do>{press}</span><p id=is-{name}>{meaning}</p></form>"


def table(title, rows):
    cells = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f"<h2>{title}</h2><dl>{cells or '<dt>none</dt><dd></dd>'}</dl>"


def row(name, value):
    return f"<code>{escape(name)}</code>", escape(repr(value))


def live_page(session):
    """What PAGE has to be told of a session."""
    tag = session.handle  # a hash of its id, as the log has it
    now, token = store.clock(), IToken(session)
    kept = [interface for interface in (IClicks, IToken, IVisitor) if interface in session]
    who = '<input name=name value=ann maxlength=20 required aria-label="Your name">'
    buttons = [
        button(token, "click", "main"),
        button(token, "touch"),
        button(token, "renew"),
        *([] if session.owner else [button(token, "login", field=who)]),
        button(token, "logout" if session.owner else "expire", "stop"),
    ]
    return {
        "title": "Your session",
        "kind": "live",
        "tag": tag,
        "hue": int(tag, 16) % 360,
        "owner": escape(session.owner or "nobody's"),
        "age": now - session.created,
        "left": session.expires - now,
        "lifetime": session.lifetime,
        "until": "whatever you do"
        if session.expires < session.lastModified + session.lifetime
        else "unless you do something",
        "state": f"{tag} {IClicks(session).count if IClicks in session else 0}",
        "buttons": "".join(buttons),
        "tables": table("Components", [row(interface.__name__, interface(session)) for interface in kept])
        + table("Attributes", [row(name, value) for name, value in sorted(vars(session).items())])
        + table(
            "The session itself",
            [
                ("Age", f"<span class=age>{now - session.created:.0f} s</span>"),
                ("Owner", escape(session.owner or "none")),
                ("Idle timeout", f"{session.lifetime:.0f} s without a request"),
                ("Absolute timeout", f"{session.max_lifetime / 60:.0f} min after it began, or after the last login"),
            ],
        ),
        "footer": "A <a href=/ target=_blank>second tab</a> shows the same session, a private window another one.",
    }


def dead_page(title, state=""):
    """The same for one that is over; it makes no new one."""
    blank = dict.fromkeys(("owner", "until", "buttons", "tables", "footer"), "")
    return {
        **blank,
        "title": title,
        "kind": "over",
        "tag": "gone",
        "hue": 0,
        "state": state,
        "age": 0,
        "left": 0,
        "lifetime": LIFETIME,
    }


# The application
# ---------------------------------------------------------------------------


def app(environ, start_response):
    def answer(page, status="200 OK", *headers):
        nonce = token_urlsafe(12)
        policy = f"default-src 'none'; img-src data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        policy += "; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        kind = ("Content-Type", "text/html; charset=utf-8")
        start_response(status, [kind, ("Content-Security-Policy", policy), ("Cache-Control", "no-store"), *headers])
        return [PAGE.format(**page, nonce=nonce, style=STYLE, script=SCRIPT).encode()]

    if environ["PATH_INFO"] != "/":
        # Nothing here asks for the session, so this is no activity and starts none.
        found = environ["PATH_INFO"] == "/gone"
        return answer(dead_page("Your session has expired", "over"), "200 OK" if found else "404 Not Found")
    session = ISession(environ)
    if environ["REQUEST_METHOD"] != "POST":
        return answer(live_page(session))
    form = read_form(environ)
    if IToken not in session or not IToken(session).check(form) or form.get("do") not in BUTTONS:
        return answer(dead_page("That form was of another session"), "403 Forbidden")
    action, session.last_button, _, where = BUTTONS[form["do"]]
    action(session, form)
    return answer(dead_page("Done"), "303 See Other", ("Location", where))


LIFETIME = 60
store = MemoryStore(capacity=100_000)
application = SessionMiddleware(app, store, lifetime=LIFETIME, max_lifetime=600)

if __name__ == "__main__":
    serve(application)
