"""The web page that people judge on: sessions, what is shown now, votes, undo, images.

Starlette rather than FastAPI: eight routes without a schema to publish need no pydantic. The page holds no
resource from elsewhere, and a vote is on the disk before it is acknowledged.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import threading
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspo_jax import spelling
from dspo_jax.errors import UserError
from dspo_jax.people.pictures import SIDES, Pictures
from dspo_jax.people.showing import Showings
from dspo_jax.people.votes import SKIP, TIE, Choice, Showing, VoteStore

LONGEST_NAME = 80
"""Characters of a person's name."""
MAX_BODY = 16 * 1024
"""Bytes of a request; a vote has about a hundred."""

_SECONDS_FOR_BODY = 10
_PAGE = Path(__file__).parent / "page"
_FILES = {"vote.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_YEAR = 365 * 24 * 3600
_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # The token of a link goes to no other page.
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class _Guard:
    """Refuses foreign pages (Origin) and, on this machine alone, foreign names of it; adds the headers."""

    def __init__(self, app: ASGIApp, local: bool):
        self._app, self._local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        problem = None
        # A name of someone else's that leads here (DNS rebinding) would make this page a part of theirs.
        if self._local and host.rsplit(":", 1)[0] not in _LOCAL and host not in _LOCAL:
            problem = "this server answers to 127.0.0.1 and localhost only"
        elif scope["method"] == "POST" and origin is not None and urlsplit(origin).netloc != host:
            problem = "sent from another page"
        app = self._app if problem is None else JSONResponse({"error": problem}, 403)
        await app(scope, receive, send_guarded)


class _Server:
    """The routes; state lies in the file of votes, and what is derived from it in `Showings`."""

    def __init__(self, store: VoteStore, token: str | None, allow_outside: bool):
        self._store, self._token = store, token
        self._showings, self._lock = Showings(store), threading.Lock()
        self._pictures = Pictures(store, allow_outside=allow_outside)
        self._names = store.people()
        # Two collections on one host have different ports, but one jar of cookies.
        self._cookie = "dspo_" + hashlib.sha256(store.secret.encode()).hexdigest()[:12]
        self._templates = Environment(
            loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined
        )

    def routes(self) -> list[Route]:
        return [
            Route("/", self.index),
            Route("/join", self.join, methods=["POST"]),
            Route("/leave", self.leave, methods=["POST"]),
            Route("/state", self.state),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/undo", self.undo, methods=["POST"]),
            Route("/image/{name}", self.image),
            Route("/page/{name}", self.file),
        ]

    def _render(self, template: str, status: int = 200, **values: object) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(values), status)

    async def _person(self, request: Request) -> int:
        """Returns whose session a request is of.

        Raises:
          HTTPException: it is of none.
        """
        session = request.cookies.get(self._cookie, "")
        person = await run_in_threadpool(self._store.person_of, _digest(session))
        if person is None:
            raise HTTPException(401, "no session; open the link again and enter your name")
        return person

    async def index(self, request: Request) -> Response:
        try:
            person = await self._person(request)
        except HTTPException:
            return self._join_page(
                request.query_params.get("token", ""), request.query_params.get("name", "")
            )
        return self._render("vote.html", name=self._names[person])

    def _join_page(self, token: str, name: str, problem: str = "") -> Response:
        if not self._admits(token):
            return self._render("refused.html", 403)
        name = name[:LONGEST_NAME]
        values = {"token": token, "name": name, "problem": problem, "longest": LONGEST_NAME}
        return self._render("join.html", 400 if problem else 200, **values)

    def _admits(self, token: str) -> bool:
        return self._token is None or hmac.compare_digest(token.encode(), self._token.encode())

    async def join(self, request: Request) -> Response:
        body = await _read(request)
        try:
            fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=10)
        except ValueError as error:
            raise HTTPException(400, "not a form") from error
        token, name = (fields.get(key, [""])[0] for key in ("token", "name"))
        name = unicodedata.normalize("NFC", " ".join(name.split()))
        if not self._admits(token):
            return self._render("refused.html", 403)
        if not name or len(name) > LONGEST_NAME or spelling.fault_of_text(name) or not name.isprintable():
            return self._join_page(token, name, f"A name has 1 to {LONGEST_NAME} letters.")
        session = secrets.token_urlsafe(32)
        person = await run_in_threadpool(self._store.join, name, _digest(session))
        self._names.setdefault(person, name)
        response = RedirectResponse("/", 303)
        response.set_cookie(self._cookie, session, max_age=_YEAR, httponly=True, samesite="lax")
        return response

    async def leave(self, request: Request) -> Response:
        await run_in_threadpool(self._store.leave, _digest(request.cookies.get(self._cookie, "")))
        response = self._render("left.html")
        response.delete_cookie(self._cookie, httponly=True, samesite="lax")
        return response

    async def state(self, request: Request) -> Response:
        person = await self._person(request)
        return JSONResponse(await run_in_threadpool(self._state, person))

    def _state(self, person: int) -> dict[str, object]:
        """Returns all that the page shows."""
        with self._lock:
            current = self._showings.current(person, self._names[person])
            last, progress = self._showings.last_vote(person), self._showings.progress(person)
        state: dict[str, object] = {
            **progress._asdict(),
            "last": last.number if last else None,
            "showing": None,
        }
        if current is not None:
            showing, question = current
            group = self._store.groups[showing.group]
            names = list(self._store.plan.questions)
            state |= {
                "showing": showing.number,
                "prompt": group.prompt,
                "images": [self._pictures.address(group.images[place]) for place in showing.places],
                "init_image": None if group.init_image is None else self._pictures.address(group.init_image),
                "question": question,
                "text": self._store.plan.questions[question],
                "number": names.index(question) + 1,
                "of": len(names),
            }
        return state

    async def vote(self, request: Request) -> Response:
        person, content = await self._person(request), _parse(await _read(request))

        def note() -> dict[str, object]:
            number, question = content.get("showing"), content.get("question")
            with self._lock:
                showing = self._showings.find(person, number) if type(number) is int else None
                if showing is None or question not in list(self._store.plan.questions):
                    raise HTTPException(400, "showing and question: must be those of /state")
                choice = _read_choice(content.get("choice"), showing)
                if not self._showings.vote(showing, str(question), choice):
                    raise HTTPException(409, "another vote stands; take it back first")
            return self._state(person)

        return JSONResponse(await run_in_threadpool(note))

    async def undo(self, request: Request) -> Response:
        person, content = await self._person(request), _parse(await _read(request))
        number = content.get("vote")
        if type(number) is not int:
            raise HTTPException(400, "vote: must be the last of /state")

        def undo() -> dict[str, object]:
            with self._lock:
                self._showings.undo(person, number)  # or it was sent twice
            return self._state(person)

        return JSONResponse(await run_in_threadpool(undo))

    async def image(self, request: Request) -> Response:
        await self._person(request)
        name, asked = request.path_params["name"], request.query_params.get("side", "")
        side = next((side for side in SIDES if str(side) == asked), None)
        if name not in self._pictures or side is None:
            raise HTTPException(404, "no such image")
        try:
            content = await run_in_threadpool(self._pictures.scaled, name, side)
        except UserError as error:  # a damaged image; its path would tell whose it is
            raise HTTPException(404, "this image cannot be shown; skip it") from error
        headers = {"cache-control": f"private, max-age={_YEAR}, immutable"}
        return Response(content, media_type="image/webp", headers=headers)

    async def file(self, request: Request) -> Response:
        kind = _FILES.get(name := request.path_params["name"])
        if kind is None:
            raise HTTPException(404, "no such file")
        return Response((_PAGE / name).read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})


def make_app(store: VoteStore, *, token: str | None = None, allow_outside: bool = False) -> Starlette:
    """Makes the application.

    Args:
      store: the votes; it is the only server that writes them.
      token: that a link must carry; None where the server listens to this machine alone.
      allow_outside: whether images may lie outside their folders.
    """

    async def refuse(request: Request, error: Exception) -> Response:
        del request
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    server = _Server(store, token, allow_outside)
    app = Starlette(routes=server.routes(), exception_handlers={HTTPException: refuse})
    app.add_middleware(_Guard, local=token is None)
    return app


def _digest(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "replace")).hexdigest()


async def _read(request: Request) -> bytes:
    """Reads a body, which must be small and there soon.

    Raises:
      HTTPException: it is neither.
    """
    body = b""
    try:
        async with asyncio.timeout(_SECONDS_FOR_BODY):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPException(413, f"more than {MAX_BODY} bytes")
    except TimeoutError as error:
        raise HTTPException(408, "too slow") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "gone") from error
    return body


def _parse(body: bytes) -> Mapping[str, object]:
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(body)
        if isinstance(content, dict):
            return content
    raise HTTPException(400, "must be a JSON object")


def _read_choice(said: object, showing: Showing) -> Choice:
    """Turns what a page says by places, from the left, into the numbers of a group's images."""
    places = showing.places
    if said in (TIE, SKIP):
        return str(said)
    if len(places) == 2 and said in ("left", "right"):
        return places[said == "right"]
    ranks = said if len(places) > 2 and isinstance(said, list) else []
    if all(type(place) is int for place in ranks) and sorted(ranks) == list(range(len(places))):
        return tuple(places[place] for place in ranks)
    allowed = "left, right" if len(places) == 2 else f"the places 0 to {len(places) - 1}, best first"
    raise HTTPException(400, f"choice: must be {allowed}, tie or skip")
